//! Drafters: cheap guesses at what comes next.
//!
//! A drafter proposes a [`DraftTree`]; what it proposes can only change the speed of a
//! generation, never its distribution, provided that it says truthfully where each unit
//! came from ([`Proposal`](crate::tree::Proposal)).
//!
//! | drafter | guesses | topology |
//! |---|---|---|
//! | [`NoDraft`] | nothing: plain decoding | - |
//! | [`PromptLookup`] | what followed the last words before | chain |
//! | [`Copying`] | what followed the longest repetition, as far as copies were right | chain |
//! | [`Trigram`] | what follows such pairs of tokens, learned on the way (ADED) | tree |
//! | [`Jacobi`] | what the target said about the last guesses | chain |
//! | [`Lookahead`] | n-grams found in a Jacobi window | tree |
//! | [`DraftModel`] | what a smaller model says | chain |
//! | [`Joined`] | what two drafters guess | tree |
//! | anything with an [`Expander`] | ranked continuations: heads, draft layers | [`Topology`] |
//!
//! A rule for stopping early may use what is known *before* a unit is drawn (entropy or
//! largest probability of the draft law). Throwing away a unit after it was drawn because
//! it looks unlikely is not allowed: what survives is no longer distributed as the law
//! that is handed to the verifier, and the output is biased.
//!
//! # A drafter of one's own
//!
//! ```
//! use std::collections::HashMap;
//!
//! use sequor_sampling::draft::{Budget, DraftContext, Drafter};
//! use sequor_sampling::{DraftTree, Result};
//!
//! /// Guesses what followed a token the last time.
//! #[derive(Default)]
//! struct Bigrams(HashMap<u32, u32>);
//!
//! impl Drafter for Bigrams {
//!     fn name(&self) -> &str {
//!         "bigrams"
//!     }
//!
//!     fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
//!         let pairs = ctx.tokens.iter().zip(ctx.tokens.iter().skip(1));
//!         self.0.extend(pairs);
//!         let guess = |token: &u32| self.0.get(token).copied();
//!         let guesses = std::iter::successors(ctx.tokens.last().and_then(guess), guess);
//!         Ok(DraftTree::chain(guesses.take(budget.depth)))
//!     }
//!
//!     fn reset(&mut self) {
//!         self.0.clear();
//!     }
//! }
//!
//! # use sequor_sampling::Key;
//! # let ctx = DraftContext {
//! #     tokens: &[1, 2, 3, 1], prompt_len: 4, max_length: 99, eos: &[], key: Key::new(0, 0), features: None,
//! # };
//! let tree = Bigrams::default().propose(&ctx, Budget::chain(4))?;
//! assert_eq!(tree.units(), [2, 3, 1, 2]);
//! # Ok::<(), sequor_sampling::Error>(())
//! ```

mod copy;
pub mod grow;
mod jacobi;
mod joined;
mod lookahead;
mod model;
mod none;
mod prompt_lookup;
mod static_tree;
mod trigram;

use sequor_kernels::rng::Key;
use sequor_nn::Tensor;

use crate::Result;
use crate::tree::DraftTree;

pub use copy::Copying;
pub use grow::{Expander, StaticTree, Topology, grow};
pub use jacobi::Jacobi;
pub use joined::Joined;
pub use lookahead::{Lookahead, LookaheadOptions};
pub use model::{DraftMode, DraftModel};
pub use none::NoDraft;
pub use prompt_lookup::PromptLookup;
pub use trigram::{AdaptiveTrigram, TreeSearch, Trigram, TrigramOptions, TrigramTable, Vocabulary};

/// What a drafter may look at.
#[derive(Clone, Copy, Debug)]
pub struct DraftContext<'a> {
    /// Prompt and generated tokens. The target has not yet seen the last of them.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Largest total length of the sequence.
    pub max_length: usize,
    /// Tokens that end the sequence.
    pub eos: &'a [u32],
    /// Random numbers of the request; drafts use [`Purpose::Draft`] at the position of
    /// the drafted token.
    ///
    /// [`Purpose::Draft`]: sequor_kernels::rng::Purpose::Draft
    pub key: Key,
    /// Hidden features of the target, `[rows, dim]`: one row for each token that the
    /// target took in since the last call, in order; only for drafters that ask for them.
    pub features: Option<&'a Tensor>,
}

/// How much may be proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Longest path.
    pub depth: usize,
    /// Number of nodes.
    pub nodes: usize,
}

impl Budget {
    /// A chain of at most `depth` tokens.
    #[must_use]
    pub fn chain(depth: usize) -> Self {
        Self {
            depth,
            nodes: depth,
        }
    }
}

/// What became of a proposal.
#[derive(Clone, Copy, Debug)]
pub struct Feedback<'a> {
    /// The proposal.
    pub tree: &'a DraftTree,
    /// Its accepted nodes.
    pub path: &'a [usize],
    /// All tokens that were added to the sequence, the target's own included.
    pub added: &'a [u32],
    /// The token with the largest raw logit in every row that was checked: row 0 follows
    /// the root, row `1 + n` follows node `n`; 0 where a row has none. Only for drafters
    /// that ask for it.
    pub best: Option<&'a [u32]>,
}

/// A source of guesses.
pub trait Drafter {
    /// A short name for reports.
    fn name(&self) -> &str;

    /// Guesses at what follows `ctx.tokens`, within `budget`. An empty tree means "no
    /// idea" and costs the target nothing.
    ///
    /// # Errors
    /// When the drafter itself fails.
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree>;

    /// Hears what became of the last proposal.
    fn observe(&mut self, _feedback: &Feedback<'_>) {}

    /// Forgets the sequence. The loop does not call it: a drafter may be carried from one
    /// sequence to the next, and notices by `ctx.tokens` if it has to.
    fn reset(&mut self);

    /// Whether proposals are drawn at random. Then the depth of a draft changes which
    /// random numbers decide a token, so that only a fixed depth repeats an output.
    fn is_random(&self) -> bool {
        false
    }

    /// Whether the target's hidden features are wanted.
    fn wants_features(&self) -> bool {
        false
    }

    /// Whether the best token of every checked row is wanted.
    fn wants_best(&self) -> bool {
        false
    }

    /// For drafters of trees: the chance that each node of the next proposal is accepted,
    /// most likely first, by the drafter's own estimate (for instance
    /// [`StaticTree::chances`]). A round with `n` nodes is then expected to yield one token
    /// plus the sum of the first `n`. The loop chooses the number of nodes by it, scaled by
    /// what it sees, and by what rows cost. `None` means chains: one node per level.
    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        None
    }
}

impl<D: Drafter + ?Sized> Drafter for &mut D {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        (**self).propose(ctx, budget)
    }
    fn observe(&mut self, feedback: &Feedback<'_>) {
        (**self).observe(feedback);
    }
    fn reset(&mut self) {
        (**self).reset();
    }
    fn is_random(&self) -> bool {
        (**self).is_random()
    }
    fn wants_features(&self) -> bool {
        (**self).wants_features()
    }
    fn wants_best(&self) -> bool {
        (**self).wants_best()
    }
    fn chances(&mut self, ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        (**self).chances(ctx)
    }
}

impl<D: Drafter + ?Sized> Drafter for Box<D> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        (**self).propose(ctx, budget)
    }
    fn observe(&mut self, feedback: &Feedback<'_>) {
        (**self).observe(feedback);
    }
    fn reset(&mut self) {
        (**self).reset();
    }
    fn is_random(&self) -> bool {
        (**self).is_random()
    }
    fn wants_features(&self) -> bool {
        (**self).wants_features()
    }
    fn wants_best(&self) -> bool {
        (**self).wants_best()
    }
    fn chances(&mut self, ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        (**self).chances(ctx)
    }
}
