//! Tokens to text as they come.

use crate::options::TextOptions;
use crate::{Error, Result};
use sequor_backbone::CausalLm;
use sequor_sampling::generate::Event;
use sequor_sampling::{FinishReason, Report, Session};
use sequor_tokenizers::{DecodeStream, StopMatcher, Tokenizer};
use serde_json::{Value, json};
use std::collections::VecDeque;

/// A finished text.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text, without the stop text or the end-of-text token.
    pub text: String,
    /// The tokens, the one that ended the text included.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub finish: FinishReason,
    /// Counts and times.
    pub report: Report,
    /// The speculation method that was asked for.
    pub method: String,
    /// Seed of its random numbers.
    pub seed: u64,
}

impl Generation {
    /// Did somebody cancel it?
    pub fn cancelled(&self) -> bool {
        self.finish == FinishReason::Cancelled
    }

    /// Tokens per second after the first token.
    pub fn tokens_per_second(&self) -> f64 {
        self.report.tokens_per_second()
    }

    /// Everything as one JSON object. Times are in seconds.
    pub fn to_json(&self) -> Value {
        let r = &self.report;
        json!({
            "text": self.text,
            "token_ids": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.tokens.len(),
            "finish": self.finish.to_string(),
            "seed": self.seed,
            "prefill_seconds": r.prefill_seconds,
            "decode_seconds": r.decode_seconds,
            "first_token_seconds": r.first_token_seconds,
            "tokens_per_second": self.tokens_per_second(),
            "tokens_per_call": r.tokens_per_call(),
            "speculation": {
                "method": self.method,
                "rounds": r.rounds,
                "target_calls": r.target_calls,
                "drafted": r.drafted,
                "accepted": r.accepted,
                "drafted_by_depth": r.drafted_by_depth,
                "accepted_by_depth": r.accepted_by_depth,
                "depth_histogram": r.depth_histogram,
                "switched_off": r.switched_off,
                "draft_seconds": r.draft_seconds,
                "verify_seconds": r.verify_seconds,
                "sampling_seconds": r.sampling_seconds,
            },
        })
    }
}

/// A text in progress: an iterator over its pieces, never half a character. Dropping it
/// at any time is fine; [`finish`](Self::finish) gives the whole with its statistics.
pub struct TextStream<'p> {
    session: Session<'p, 'p, CausalLm>,
    decoder: DecodeStream<'p>,
    stop: StopMatcher,
    eos: &'p [u32],
    ready: VecDeque<String>,
    text: String,
    /// Tokens up to the one that completed a stop text.
    kept: Option<usize>,
    seen: usize,
    ended: bool,
    prompt_tokens: usize,
    method: String,
    seed: u64,
}

impl<'p> TextStream<'p> {
    pub(crate) fn new(
        session: Session<'p, 'p, CausalLm>,
        tokenizer: &'p Tokenizer,
        eos: &'p [u32],
        prompt_tokens: usize,
        options: &TextOptions,
    ) -> Result<Self> {
        Ok(Self {
            session,
            decoder: tokenizer.decode_stream(true),
            stop: StopMatcher::new(options.stop.clone()),
            eos,
            ready: VecDeque::new(),
            text: String::new(),
            kept: None,
            seen: 0,
            ended: false,
            prompt_tokens,
            method: options.speculate.to_string(),
            seed: options.seed,
        })
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// When the model fails.
    pub fn collect_all(mut self) -> Result<Generation> {
        for piece in &mut self {
            piece?;
        }
        Ok(self.finish())
    }

    /// The text so far, with counts and times.
    pub fn finish(self) -> Generation {
        let (done, _) = self.session.into_parts();
        let mut tokens = done.tokens;
        tokens.truncate(self.kept.unwrap_or(usize::MAX));
        Generation {
            text: self.text,
            tokens,
            prompt_tokens: self.prompt_tokens,
            finish: if self.kept.is_some() {
                FinishReason::Stop
            } else {
                done.finish
            },
            report: done.report,
            method: self.method,
            seed: self.seed,
        }
    }

    fn emit(&mut self, piece: String) {
        if !piece.is_empty() {
            self.text.push_str(&piece);
            self.ready.push_back(piece);
        }
    }

    /// Takes in one token; says whether a stop text was completed.
    fn take(&mut self, token: u32) -> Result<bool> {
        self.seen += 1;
        if self.eos.contains(&token) {
            return Ok(false); // ends the text without being part of it
        }
        let Some(piece) = self.decoder.push(token)? else {
            return Ok(false);
        };
        let (emit, stopped) = self.stop.push(&piece);
        self.emit(emit);
        Ok(stopped.is_some())
    }

    fn advance(&mut self) -> Result<()> {
        match self.session.step()? {
            Event::Prefill { .. } => {}
            Event::Tokens(tokens) => {
                for token in tokens {
                    if self.take(token)? {
                        self.kept = Some(self.seen);
                        self.session.end(FinishReason::Stop);
                        self.ended = true;
                        break;
                    }
                }
            }
            Event::Finished(_) => {
                self.ended = true;
                let rest = self.decoder.finish()?;
                let (emit, stopped) = self.stop.push(&rest);
                self.emit(emit);
                if stopped.is_none() {
                    let held = self.stop.finish();
                    self.emit(held);
                }
            }
        }
        Ok(())
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<String, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            if self.ended {
                return None;
            }
            if let Err(e) = self.advance() {
                self.ended = true;
                return Some(Err(e));
            }
        }
    }
}
