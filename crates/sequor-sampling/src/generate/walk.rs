//! From the rows of one forward pass to laws along the accepted path.

use sequor_kernels::select;

use crate::Result;
use crate::distribution::{Categorical, best_score};
use crate::error::Error;
use crate::mirostat::Mirostat;
use crate::processors::{Context, LogitsProcessor, ProcessorList};
use crate::target::Logits;
use crate::tree::DraftTree;
use crate::verify::Verdict;

/// What turns rows into laws for one request.
#[derive(Debug)]
pub(super) struct Sampler {
    pub greedy: bool,
    pub processors: ProcessorList,
    pub mirostat: Option<Mirostat>,
    pub prompt_len: usize,
    pub max_length: usize,
}

/// One walk down a draft tree. Every row is processed when the walk reaches it, with the
/// history that it would have in plain decoding.
pub(super) struct Walk<'a> {
    sampler: &'a Sampler,
    tree: &'a DraftTree,
    logits: &'a Logits,
    /// Index in `logits` of the row after the last token of the sequence.
    root_row: usize,
    /// The sequence, with the accepted path behind it; empty if no processor asks.
    tokens: Vec<u32>,
    len: usize,
    mirostat: Option<Mirostat>,
    /// Scores while they are processed; kept from round to round.
    scratch: &'a mut Vec<f32>,
    /// The last law before Mirostat truncated it.
    untruncated: Option<Categorical>,
}

impl<'a> Walk<'a> {
    pub fn new(
        sampler: &'a Sampler,
        tree: &'a DraftTree,
        logits: &'a Logits,
        root_row: usize,
        tokens: &[u32],
        scratch: &'a mut Vec<f32>,
    ) -> Self {
        let len = tokens.len();
        let mut history = Vec::new();
        if !sampler.processors.is_empty() {
            history.reserve_exact(len + tree.len());
            history.extend_from_slice(tokens);
        }
        let mirostat = sampler.mirostat;
        Self {
            sampler,
            tree,
            logits,
            root_row,
            tokens: history,
            len,
            mirostat,
            scratch,
            untruncated: None,
        }
    }

    /// The best token after the accepted nodes `path`.
    pub fn best(&mut self, path: &[usize]) -> Result<u32> {
        let position = self.len + path.len();
        let best = if self.sampler.processors.is_empty() {
            // Nothing changes the row: it is read where it lies.
            best_score(self.row(path)?)
        } else {
            best_score(self.process(path)?)
        };
        best.map(|(token, _)| token)
            .map_err(|e| e.at_position(position))
    }

    /// A draw from the target's law after the accepted nodes `path`, at the uniform number
    /// `u`, without writing the law down. Only without Mirostat, which has to know it.
    pub fn draw(&mut self, path: &[usize], u: f64) -> Result<u32> {
        let position = self.len + path.len();
        let drawn = |scores: &[f32]| match select::sample(scores, u) {
            Some(index) => Ok(u32::try_from(index).unwrap_or(u32::MAX)),
            // Nothing can be drawn: this says why.
            None => best_score(scores).map(|(token, _)| token),
        };
        let drawn = if self.sampler.processors.is_empty() {
            drawn(self.row(path)?)
        } else {
            drawn(self.process(path)?)
        };
        drawn.map_err(|e| e.at_position(position))
    }

    /// The target's law after the accepted nodes `path`.
    pub fn law(&mut self, path: &[usize]) -> Result<Categorical> {
        let position = self.len + path.len();
        let mut scores = self.process(path)?.to_vec();
        self.learn(path.last().and_then(|&n| self.tree.units().get(n)).copied());
        if let Some(mirostat) = &self.mirostat {
            let untruncated =
                Categorical::from_scores(scores.as_slice()).map_err(|e| e.at_position(position))?;
            mirostat.truncate(&mut scores)?;
            self.untruncated = Some(untruncated);
        }
        Categorical::from_scores(scores).map_err(|e| e.at_position(position))
    }

    /// The state of Mirostat after everything that `verdict` adds.
    pub fn finish(mut self, verdict: &Verdict<u32>) -> Option<Mirostat> {
        let last_node = verdict.path.last().and_then(|&n| self.tree.units().get(n));
        self.learn(verdict.emitted.or(last_node.copied()));
        self.mirostat
    }

    fn learn(&mut self, token: Option<u32>) {
        if let (Some(mirostat), Some(law), Some(token)) =
            (&mut self.mirostat, self.untruncated.take(), token)
        {
            mirostat.observe(&law, token);
        }
    }

    /// The raw logits after `path`.
    fn row(&self, path: &[usize]) -> Result<&'a [f32]> {
        let row = path
            .last()
            .map_or(self.root_row, |node| self.root_row + 1 + node);
        self.logits.row(row).ok_or_else(|| {
            let rows = self.logits.rows();
            Error::contract(
                "the model",
                format!("gave {rows} rows of logits, row {row} is missing"),
            )
        })
    }

    /// The processed scores after `path`.
    fn process(&mut self, path: &[usize]) -> Result<&mut [f32]> {
        let row = self.row(path)?;
        self.scratch.clear();
        self.scratch.extend_from_slice(row);
        if !self.sampler.processors.is_empty() {
            self.tokens.truncate(self.len);
            self.tokens
                .extend(path.iter().filter_map(|&n| self.tree.units().get(n)));
            let ctx = Context {
                tokens: &self.tokens,
                prompt_len: self.sampler.prompt_len,
                unconditional: None,
                max_length: Some(self.sampler.max_length),
            };
            self.sampler.processors.process(&ctx, self.scratch)?;
        }
        Ok(self.scratch)
    }
}
