//! Jacobi iteration (Santilli et al. 2023): guess a block, replace every guess by what the
//! target says there given the guesses before it, and repeat.
//!
//! One forward pass over the block is both the check of the last guesses and the next
//! iteration: what was right is accepted, and the best tokens of the other rows are the
//! new guesses. Under greedy decoding at least one token per pass is right; a sampled
//! target accepts a guess whenever it happens to draw it.

use sequor_kernels::rng::Purpose;

use super::{Budget, DraftContext, Drafter, Feedback};
use crate::tree::DraftTree;
use crate::{Error, Result};

/// Largest block.
const MAX_WINDOW: usize = 256;

/// Drafts the last iterate of a block of guesses.
#[derive(Clone, Debug)]
pub struct Jacobi {
    window: usize,
    /// Guesses for the positions from `start` on.
    guesses: Vec<u32>,
    start: usize,
    /// The token before `start`, to notice that the sequence is another.
    before: Option<u32>,
}

impl Jacobi {
    /// A block of `window` guesses.
    ///
    /// # Errors
    /// `Input` when `window` is not in `1..=256`.
    pub fn new(window: usize) -> Result<Self> {
        if !(1..=MAX_WINDOW).contains(&window) {
            return Err(Error::input("window", window, "a number in 1..=256"));
        }
        Ok(Self {
            window,
            guesses: Vec::new(),
            start: 0,
            before: None,
        })
    }

    /// Drops the guesses for positions that are decided, or all for another sequence.
    fn catch_up(&mut self, tokens: &[u32]) {
        let before = self
            .start
            .checked_sub(1)
            .and_then(|i| tokens.get(i))
            .copied();
        let decided = match tokens.len().checked_sub(self.start) {
            Some(decided) if before == self.before => decided.min(self.guesses.len()),
            _ => self.guesses.len(),
        };
        self.guesses.drain(..decided);
        self.start = tokens.len();
        self.before = tokens.last().copied();
    }
}

impl Drafter for Jacobi {
    fn name(&self) -> &str {
        "jacobi"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        self.catch_up(ctx.tokens);
        let depth = budget.depth.min(budget.nodes).min(self.window);
        while self.guesses.len() < depth && !ctx.tokens.is_empty() {
            // The tokens of the sequence are likelier to occur than any others.
            let position = self.start + self.guesses.len();
            let mut stream = ctx.key.stream(position as u64, Purpose::Draft);
            let at = stream.below(ctx.tokens.len() as u64) as usize;
            self.guesses.extend(ctx.tokens.get(at));
        }
        Ok(DraftTree::chain(self.guesses.iter().copied().take(depth)))
    }

    fn observe(&mut self, feedback: &Feedback<'_>) {
        let Some(best) = feedback.best else { return };
        // Row `i` says what belongs at position `start + i`.
        let beyond = self.guesses.get(best.len()..).unwrap_or_default();
        self.guesses = best.iter().chain(beyond).copied().collect();
        let decided = feedback.added.len().min(self.guesses.len());
        self.guesses.drain(..decided);
        self.start += feedback.added.len();
        self.before = feedback.added.last().copied().or(self.before);
    }

    fn reset(&mut self) {
        self.guesses.clear();
        self.start = 0;
        self.before = None;
    }

    fn wants_best(&self) -> bool {
        true
    }
}
