//! Tokens to text as they come.

use crate::options::{Layers, TextOptions};
use crate::{Error, Result};
use sequor_sampling::generate::Event;
use sequor_sampling::{FinishReason, Report, Session, TargetModel};
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
    /// Layers of the target that ran, if that was not all of them: the text is then that of
    /// another model.
    pub layers: Option<String>,
    /// Seed of its random numbers.
    pub seed: u64,
    /// Tokens that each forward pass of the target added; the first one is the prompt's.
    pub tokens_by_call: Vec<usize>,
}

impl Generation {
    /// Tokens per target call over the first `tokens` tokens only, for measures that end
    /// where a text begins to go in circles. Whole calls are counted.
    pub fn tokens_per_call_up_to(&self, tokens: usize) -> f64 {
        let (mut calls, mut added, mut before) = (0, 0, 0);
        for (call, &n) in self.tokens_by_call.iter().enumerate() {
            before += n;
            if before > tokens {
                break;
            }
            if call > 0 {
                calls += 1;
                added += n;
            }
        }
        if calls == 0 {
            return 1.0;
        }
        added as f64 / f64::from(calls)
    }

    /// Whether the text follows the target's own distribution.
    pub fn lossless(&self) -> bool {
        self.report.lossy.is_none() && self.layers.is_none()
    }

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
            "layers": self.layers,
            "lossless": self.lossless(),
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
                "rounds_by_accepted": r.rounds_by_accepted,
                "forward_by_rows": r.forward_by_rows,
                "plain_step_seconds": r.plain_step_seconds,
                "plain_decode_seconds": r.plain_seconds(),
                "speedup": r.speedup(),
                "lossy": r.lossy,
            },
        })
    }
}

/// A session of whatever model.
pub(crate) trait Run {
    /// As [`Session::step`].
    fn step(&mut self) -> sequor_sampling::Result<Event>;
    /// As [`Session::end`].
    fn end(&mut self, reason: FinishReason);
    /// The result so far.
    fn into_generation(self: Box<Self>) -> sequor_sampling::Generation;
}

impl<M: TargetModel> Run for Session<'_, M> {
    fn step(&mut self) -> sequor_sampling::Result<Event> {
        Session::step(self)
    }
    fn end(&mut self, reason: FinishReason) {
        Session::end(self, reason);
    }
    fn into_generation(self: Box<Self>) -> sequor_sampling::Generation {
        self.into_parts().0
    }
}

/// A text in progress: an iterator over its pieces, never half a character. Dropping it
/// at any time is fine; [`finish`](Self::finish) gives the whole with its statistics.
pub struct TextStream<'p> {
    session: Box<dyn Run + 'p>,
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
    layers: Option<String>,
    seed: u64,
    tokens_by_call: Vec<usize>,
}

impl<'p> TextStream<'p> {
    pub(crate) fn new(
        session: Box<dyn Run + 'p>,
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
            layers: (options.layers != Layers::All).then(|| options.layers.to_string()),
            seed: options.seed,
            tokens_by_call: Vec::new(),
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
        let done = self.session.into_generation();
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
            layers: self.layers,
            seed: self.seed,
            tokens_by_call: self.tokens_by_call,
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
                self.tokens_by_call.push(tokens.len());
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
