//! Verifiers: which drafts become part of the sequence.
//!
//! A verifier is a pure function. It gets a [`DraftTree`], a way to obtain the target's
//! law after any accepted path, and keyed random numbers; it gives a [`Verdict`]. Laws
//! are asked for one at a time along the walk, so that processors that depend on the
//! history see the accepted drafts, and rows that are never reached cost nothing.
//!
//! | verifier | drafts | output law |
//! |---|---|---|
//! | [`greedy()`] | any tree | the target's argmax, token for token |
//! | [`chain()`] | one path, any unit | exactly the target's |
//! | [`tree()`] | any tree of tokens | exactly the target's |
//! | [`chain()`] with [`Acceptance::Ensemble`] | one path | a mixture with the draft law (lossy) |
//!
//! Accepted units are those on the path. The unit that the target adds by itself after
//! them ([`Verdict::emitted`]) is not counted as accepted.

mod chain;
mod greedy;
mod hf;
mod tree;

use sequor_kernels::rng::{Key, Purpose, Stream};
use serde::{Deserialize, Serialize};

pub use chain::chain;
pub use greedy::greedy;
pub use hf::{HfVerdict, speculative_sampling};
pub use tree::tree;

#[cfg(doc)]
use crate::tree::DraftTree;

/// What a verifier decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict<U> {
    /// Accepted nodes, from a child of the root downwards.
    pub path: Vec<usize>,
    /// The unit that follows the path: the replacement of a rejected draft or the bonus
    /// after full acceptance. `None` if the path ended the sequence.
    pub emitted: Option<U>,
    /// Whether the node after the path had drafts and none of them was accepted.
    pub rejected: bool,
}

/// Random numbers of one verification: streams keyed by the position in the sequence,
/// so that they depend neither on the batch nor on how drafts were grouped.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    key: Key,
    position: u64,
}

impl Draws {
    /// Streams for units at `position` (index in the sequence of a child of the root)
    /// and after.
    #[must_use]
    pub fn new(key: Key, position: u64) -> Self {
        Self { key, position }
    }

    /// The stream of `purpose` for a unit `depth` below the first.
    #[must_use]
    pub fn stream(&self, depth: usize, purpose: Purpose) -> Stream {
        self.key
            .stream(self.position.wrapping_add(depth as u64), purpose)
    }
}

/// When a draft is accepted. Everything but [`Exact`](Self::Exact) changes the
/// distribution of the output and has to be asked for by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Acceptance {
    /// Accept with probability `min(1, p/q)`: the output law is the target's.
    #[default]
    Exact,
    /// **Lossy.** Accept with probability `min(1, 1 - weight + weight p/q)`: verification
    /// against a mixture of target and draft.
    Ensemble {
        /// Weight of the target, `[0, 1]`; 1 is [`Exact`](Self::Exact).
        weight: f64,
    },
}

impl Acceptance {
    /// Whether a draft with likelihood ratio `ratio = p/q` is accepted at the uniform
    /// number `u` in `[0, 1)`. A draft that the target cannot produce (`p = 0`) is never
    /// accepted by the exact rule, not even at `u = 0`.
    #[must_use]
    pub fn accepts(&self, ratio: f64, u: f64) -> bool {
        let ratio = match self {
            Self::Exact => ratio,
            Self::Ensemble { weight } => 1.0 - weight + weight * ratio,
        };
        ratio > 0.0 && u <= ratio
    }

    /// Whether the output law is the target's.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        match self {
            Self::Exact => true,
            Self::Ensemble { weight } => *weight == 1.0,
        }
    }

    /// Probability with which a mismatch is forgiven when the draft was certain: what
    /// the rule adds to `p` for `q = 1`, as a share of `1 - p`.
    fn leniency(&self) -> f64 {
        match self {
            Self::Exact => 0.0,
            Self::Ensemble { weight } => 1.0 - weight,
        }
    }
}

impl<U> Verdict<U> {
    fn ended(path: Vec<usize>) -> Self {
        Self {
            path,
            emitted: None,
            rejected: false,
        }
    }

    fn bonus(path: Vec<usize>, unit: U) -> Self {
        Self {
            path,
            emitted: Some(unit),
            rejected: false,
        }
    }

    fn replaced(path: Vec<usize>, unit: U) -> Self {
        Self {
            path,
            emitted: Some(unit),
            rejected: true,
        }
    }
}
