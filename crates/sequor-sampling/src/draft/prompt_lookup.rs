//! Prompt lookup: what followed the last words the first time they occurred (Saxena
//! 2023), with the semantics of Hugging Face.

use serde::{Deserialize, Serialize};

use super::{Budget, DraftContext, Drafter};
use crate::tree::DraftTree;
use crate::{Error, Result};

/// Copies what followed an earlier occurrence of the last tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptLookup {
    /// Most tokens to copy, at least 1.
    pub num_output_tokens: usize,
    /// Longest n-gram to look for, at least 1.
    pub max_matching_ngram_size: usize,
}

impl Default for PromptLookup {
    fn default() -> Self {
        Self {
            num_output_tokens: 10,
            max_matching_ngram_size: 2,
        }
    }
}

impl PromptLookup {
    /// Checks the options.
    ///
    /// # Errors
    /// `Input` when one of them is 0.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("prompt_lookup_num_tokens", self.num_output_tokens),
            ("max_matching_ngram_size", self.max_matching_ngram_size),
        ] {
            if value == 0 {
                return Err(Error::input(name, value, "at least 1"));
            }
        }
        Ok(())
    }

    /// Tokens that may follow `history`.
    ///
    /// From the longest n-gram down to one token, the first earlier occurrence of the
    /// last n tokens that has a continuation is taken. The copy ends at `max_length`
    /// (a position in the history, not a count) and before the first of `eos`; if that
    /// leaves nothing, nothing is proposed.
    #[must_use]
    pub fn candidates(&self, history: &[u32], max_length: usize, eos: &[u32]) -> Vec<u32> {
        // The target always adds one token of its own.
        if max_length == history.len() + 1 {
            return Vec::new();
        }
        let longest = self
            .max_matching_ngram_size
            .min(history.len().saturating_sub(1));
        let found = (1..=longest)
            .rev()
            .find_map(|n| self.continuation(history, n, max_length));
        let copied = found.unwrap_or_default().iter().copied();
        copied.take_while(|token| !eos.contains(token)).collect()
    }

    fn continuation<'a>(
        &self,
        history: &'a [u32],
        n: usize,
        max_length: usize,
    ) -> Option<&'a [u32]> {
        let recent = history.get(history.len().checked_sub(n)?..)?;
        history
            .windows(n)
            .enumerate()
            .filter(|&(_, gram)| gram == recent)
            .find_map(|(at, _)| {
                let start = at + n;
                let end = start
                    .saturating_add(self.num_output_tokens)
                    .min(history.len())
                    .min(max_length);
                history.get(start..end).filter(|copied| !copied.is_empty())
            })
    }
}

impl Drafter for PromptLookup {
    fn name(&self) -> &str {
        "prompt-lookup"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let mut tokens = self.candidates(ctx.tokens, ctx.max_length, ctx.eos);
        tokens.truncate(budget.depth.min(budget.nodes));
        Ok(DraftTree::chain(tokens))
    }

    fn reset(&mut self) {}
}
