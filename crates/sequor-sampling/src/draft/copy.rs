//! Copying: what followed the longest repetition, as long as copies have been right.
//!
//! Prompt lookup with a memory: the longest n-gram that ends the sequence and occurred before
//! is looked for, its most recent occurrence is continued, and how often copies after an
//! n-gram of that length were right decides how much of the copy is worth a row. It is meant
//! to stand beside another drafter ([`Joined`](super::Joined)): on its own it knows nothing
//! where nothing repeats.

use super::{Budget, DraftContext, Drafter, Feedback};
use crate::tree::DraftTree;
use crate::{Error, Result};

/// Weight of the past in the running shares of right copies, per round.
const MEMORY: f64 = 0.9;
/// Copied tokens that the share assumed at the beginning counts for.
const PRIOR_WEIGHT: f64 = 2.0;
/// Longest n-gram that may be asked for.
const MAX_NGRAM: usize = 64;

/// Copies what followed the last occurrence of the longest repeated end of the sequence.
#[derive(Clone, Debug)]
pub struct Copying {
    /// Longest copy.
    tokens: usize,
    /// Copied tokens that were right and that were looked at, after n-grams of length
    /// `1 + index`; the last entry is for all longer ones.
    shares: Vec<(f64, f64)>,
    /// Length of the n-gram of the last proposal.
    matched: usize,
}

impl Default for Copying {
    fn default() -> Self {
        Self::with(10, 6)
    }
}

impl Copying {
    /// Copies at most `tokens` tokens after n-grams of at most `ngram`.
    ///
    /// # Errors
    /// `Input` when one of them is 0 or `ngram` is above 64.
    pub fn new(tokens: usize, ngram: usize) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::input("tokens", tokens, "at least 1"));
        }
        if !(1..=MAX_NGRAM).contains(&ngram) {
            return Err(Error::input("ngram", ngram, "a number in 1..=64"));
        }
        Ok(Self::with(tokens, ngram))
    }

    fn with(tokens: usize, ngram: usize) -> Self {
        // The more agrees already, the likelier the next token does too.
        let prior = |n: usize| (1.0 - 0.75_f64.powi(n as i32)).min(0.9);
        Self {
            tokens,
            shares: (1..=ngram)
                .map(|n| (PRIOR_WEIGHT * prior(n), PRIOR_WEIGHT))
                .collect(),
            matched: 0,
        }
    }

    /// The continuation of the most recent earlier occurrence of the longest repeated end
    /// of `history`, and the length of that end.
    fn find<'h>(&self, history: &'h [u32]) -> (usize, &'h [u32]) {
        let mut found = (0, &history[..0]);
        for end in (1..history.len()).rev() {
            let earlier = history.iter().take(end).rev();
            let agree = earlier
                .zip(history.iter().rev())
                .take(self.shares.len())
                .take_while(|(a, b)| a == b)
                .count();
            if agree > found.0 {
                found = (agree, history.get(end..).unwrap_or_default());
                if agree == self.shares.len() {
                    break;
                }
            }
        }
        found
    }

    /// The copy for `ctx`, and the length of the n-gram before it.
    fn copy<'h>(&self, ctx: &DraftContext<'h>) -> (usize, &'h [u32]) {
        let (matched, rest) = self.find(ctx.tokens);
        let end = rest.iter().position(|token| ctx.eos.contains(token));
        let length = end.unwrap_or(rest.len()).min(self.tokens);
        (matched, rest.get(..length).unwrap_or_default())
    }

    /// Share of right tokens in copies after n-grams of this length.
    fn share(&self, matched: usize) -> f64 {
        let (right, seen) = matched
            .checked_sub(1)
            .and_then(|i| self.shares.get(i))
            .copied()
            .unwrap_or((0.0, 1.0));
        right / seen
    }
}

impl Drafter for Copying {
    fn name(&self) -> &str {
        "copy"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let (matched, copied) = self.copy(ctx);
        self.matched = matched;
        let length = budget.depth.min(budget.nodes).min(copied.len());
        Ok(DraftTree::chain(copied.iter().copied().take(length)))
    }

    fn observe(&mut self, feedback: &Feedback<'_>) {
        let looked_at = (feedback.path.len() + 1).min(feedback.tree.len());
        let entry = self.matched.checked_sub(1);
        let entry = entry.and_then(|i| self.shares.get_mut(i));
        if let (Some((right, seen)), true) = (entry, looked_at > 0) {
            *right = *right * MEMORY + feedback.path.len() as f64;
            *seen = *seen * MEMORY + looked_at as f64;
        }
    }

    fn reset(&mut self) {
        *self = Self::with(self.tokens, self.shares.len());
    }

    fn chances(&mut self, ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        let (mut matched, copied) = self.copy(ctx);
        let mut chance = 1.0;
        let chances = copied.iter().map(|_| {
            chance *= self.share(matched);
            // A copy that goes on is one after a longer n-gram.
            matched = (matched + 1).min(self.shares.len());
            chance
        });
        Some(chances.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Key;

    fn context(tokens: &[u32]) -> DraftContext<'_> {
        DraftContext {
            tokens,
            prompt_len: 1,
            max_length: 99,
            eos: &[9],
            key: Key::new(0, 0),
            features: None,
        }
    }

    #[test]
    fn the_longest_and_most_recent_repetition_is_continued() {
        let mut copying = Copying::new(3, 2).unwrap();
        let mut copy = |tokens: &[u32]| {
            let tree = copying.propose(&context(tokens), Budget::chain(8)).unwrap();
            tree.units().to_vec()
        };
        assert_eq!(copy(&[1, 2, 3, 4, 5, 1, 2]), [3, 4, 5]);
        // "1 2" beats the more recent "2".
        assert_eq!(copy(&[1, 2, 3, 2, 4, 1, 2]), [3, 2, 4]);
        // Of two equal ones the more recent.
        assert_eq!(copy(&[1, 2, 3, 1, 2, 4, 1, 2]), [4, 1, 2]);
        // Nothing beyond an end, nothing where nothing repeats.
        assert_eq!(copy(&[1, 2, 3, 9, 5, 1, 2]), [3]);
        assert_eq!(copy(&[1, 2, 3]), [0; 0]);
        assert_eq!(copy(&[7]), [0; 0]);
        assert_eq!(copy(&[]), [0; 0]);
        assert!(Copying::new(0, 2).is_err());
        assert!(Copying::new(2, 0).is_err());
        assert!(Copying::new(2, 65).is_err());
    }

    #[test]
    fn it_learns_how_far_copies_can_be_trusted() {
        let mut copying = Copying::default();
        let tokens = [1, 2, 3, 4, 5, 6, 1, 2];
        let ctx = context(&tokens);
        let sum = |c: &mut Copying| c.chances(&ctx).unwrap().iter().sum::<f64>();
        let before = sum(&mut copying);
        let mut tell = |right: usize| {
            for _ in 0..40 {
                let tree = copying.propose(&ctx, Budget::chain(4)).unwrap();
                let path: Vec<usize> = (0..right).collect();
                copying.observe(&Feedback {
                    tree: &tree,
                    path: &path,
                    added: &[],
                    best: None,
                });
            }
            sum(&mut copying)
        };
        let (trusted, doubted) = (tell(4), tell(0));
        assert!(
            doubted < 0.3 * before && before < trusted,
            "{doubted} {before} {trusted}"
        );
        copying.reset();
        assert_eq!(sum(&mut copying), before);
    }
}
