//! How well a model predicts a text.

use crate::{Error, Result, TextPipeline};
use sequor_eval::text::{Likelihood, WindowOptions, score_decoder};
use serde::Serialize;

/// A scored text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// The likelihood of its tokens.
    pub likelihood: Likelihood,
    /// Its bytes (UTF-8).
    pub bytes: usize,
}

impl Score {
    /// Bits per byte: comparable between models with different tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.likelihood.bits_per_byte(self.bytes)
    }
}

impl TextPipeline {
    /// Scores a text in overlapping windows of `context` tokens that begin `stride` tokens
    /// apart; only the first `max_tokens` tokens when given.
    ///
    /// # Errors
    /// [`Error::Input`] for a text of fewer than two tokens and windows that do not fit.
    pub fn perplexity(
        &self,
        text: &str,
        context: usize,
        stride: usize,
        max_tokens: Option<usize>,
    ) -> Result<Score> {
        let mut ids = self.tokenizer().encode(text, false)?;
        ids.truncate(max_tokens.unwrap_or(usize::MAX));
        if ids.len() < 2 {
            return Err(Error::Input(
                "a text of fewer than two tokens cannot be scored".into(),
            ));
        }
        let context = context.min(self.model().config().context.saturating_sub(1));
        let options = WindowOptions {
            context,
            stride: stride.min(context),
            batch: 1,
        };
        let likelihood = score_decoder(self.model().decoder(), &ids, &options)?;
        let scored = self.tokenizer().decode(&ids, false)?;
        Ok(Score {
            likelihood,
            bytes: scored.len(),
        })
    }
}
