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
//! | [`any_order()`] | positions drafted in parallel | exactly the target's, in order |
//! | [`grouped_exact()`] | one unit and a partition | exactly the target's |
//! | [`Gaussian::reflection_coupling`], [`chain()`] of Gaussians | vectors | exactly the target's |
//! | [`chain()`] or [`relaxed()`] with [`Acceptance::Ensemble`] | one path, ranked tree | a mixture with the draft (lossy) |
//! | [`relaxed()`] with [`Acceptance::Tolerance`] | one path, ranked tree | nearer to the draft (lossy) |
//! | [`relaxed()`] with [`Acceptance::Lantern`] | one path, ranked tree | moves mass to neighbours (lossy) |
//! | [`typical()`] | any tree of tokens | favours the probable (lossy) |
//! | [`grouped()`] | one unit and its group | closed form for partitions (lossy) |
//! | [`local()`] | a block of an image | favours the probable (lossy) |
//! | [`AlignedRule`] | vectors with aligned noise | near the target's (lossy) |
//! | [`synthetic()`] | any tree | none: measures speed |
//!
//! Accepted units are those on the path. The unit that the target adds by itself after
//! them ([`Verdict::emitted`]) is not counted as accepted.

mod any_order;
mod chain;
mod gaussian;
mod greedy;
mod grouped;
mod hf;
mod lantern;
mod local;
mod relaxed;
mod synthetic;
mod tree;
mod typical;

use std::fmt;

use sequor_kernels::rng::{Key, Purpose, Stream};
use serde::{Deserialize, Serialize};

pub use any_order::{AnyOrderVerdict, any_order, any_order_published};
pub use chain::chain;
pub use gaussian::{AlignedRule, FixedTerm, LastStep};
pub use greedy::greedy;
pub use grouped::{
    Decided, GroupRule, WindowVerdict, group_acceptance, grouped, grouped_exact, grouped_window,
};
pub use hf::{HfVerdict, speculative_sampling};
pub use lantern::{NeighbourTable, Neighbours, squared_distances};
pub use local::{Grid, LocalRule, LocalVerdict, local};
pub(crate) use relaxed::check_relaxed;
pub use relaxed::relaxed;
pub use synthetic::synthetic;
pub use tree::tree;
pub use typical::{typical, typical_paths, typical_threshold};

use crate::{Error, Result};

#[cfg(doc)]
use crate::{distribution::Gaussian, tree::DraftTree};

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
///
/// A greedy target leaves nothing to relax: it accepts exactly its own best tokens
/// whatever the rule, [`Synthetic`](Self::Synthetic) excepted.
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
    /// **Lossy.** Accept what is typical for the target, without randomness, and go on with
    /// its best token ([`typical()`]).
    Typical {
        /// Probability that is always enough, `(0, 1]`; published: 0.09.
        epsilon: f64,
        /// Share of `exp(-entropy)` that is enough, `[0, 1]`; published: 0.3.
        delta: f64,
    },
    /// **Lossy.** Accept with the mass of near tokens added ([`relaxed()`]).
    Lantern {
        /// Near tokens that are looked at; published: 1000; 0 is [`Exact`](Self::Exact).
        k: usize,
        /// Most mass that is added; above 1, `delta - 1` times the token's own. Published:
        /// 0.1; 0 is [`Exact`](Self::Exact).
        delta: f64,
    },
    /// **Lossy.** Accept with probability `min(1, p/q + r)` ([`relaxed()`]).
    Tolerance {
        /// Added to the ratio, `[0, 1]`; 0 is [`Exact`](Self::Exact).
        r: f64,
    },
    /// **Lossy; for measurements.** Accept every draft with this probability, whatever the
    /// target says ([`synthetic()`]).
    Synthetic {
        /// The probability, `[0, 1]`.
        rate: f64,
    },
}

impl Acceptance {
    /// [`Typical`](Self::Typical) with the published options.
    #[must_use]
    pub fn typical() -> Self {
        Self::Typical {
            epsilon: 0.09,
            delta: 0.3,
        }
    }

    /// [`Lantern`](Self::Lantern) with the published options.
    #[must_use]
    pub fn lantern() -> Self {
        Self::Lantern {
            k: 1000,
            delta: 0.1,
        }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// `Input` naming the option.
    pub fn validate(&self) -> Result<()> {
        let unit = |name: &str, value: f64| match value {
            _ if (0.0..=1.0).contains(&value) => Ok(()),
            _ => Err(Error::input(
                format!("acceptance.{name}"),
                value,
                "a number in [0, 1]",
            )),
        };
        match *self {
            Self::Exact => Ok(()),
            Self::Ensemble { weight } => unit("weight", weight),
            Self::Typical { epsilon, delta } => {
                unit("epsilon", epsilon).and_then(|()| unit("delta", delta))
            }
            Self::Lantern { delta, .. } if delta.is_finite() && delta >= 0.0 => Ok(()),
            Self::Lantern { delta, .. } => Err(Error::input(
                "acceptance.delta",
                delta,
                "a finite number >= 0",
            )),
            Self::Tolerance { r } => unit("r", r),
            Self::Synthetic { rate } => unit("rate", rate),
        }
    }

    /// Whether a draft with likelihood ratio `ratio = p/q` is accepted at the uniform
    /// number `u` in `[0, 1)`, as far as that decides: the rules that look at more than the
    /// ratio are exact here. A draft that the target cannot produce (`p = 0`) is never
    /// accepted by the exact rule, not even at `u = 0`.
    #[must_use]
    pub fn accepts(&self, ratio: f64, u: f64) -> bool {
        let ratio = match self {
            Self::Ensemble { weight } => 1.0 - weight + weight * ratio,
            Self::Tolerance { r } => ratio + r,
            _ => ratio,
        };
        ratio > 0.0 && u <= ratio
    }

    /// Whether the output law is the target's. The rules that can be lossy count as lossy
    /// whatever their options, except for an ensemble that is all target.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        match self {
            Self::Exact => true,
            Self::Ensemble { weight } => *weight == 1.0,
            _ => false,
        }
    }

    /// Whether the rule changes the output of a target that is sampled from, or (`greedy`)
    /// whose best token is taken.
    #[must_use]
    pub fn changes_output(&self, greedy: bool) -> bool {
        if greedy {
            matches!(self, Self::Synthetic { .. })
        } else {
            !self.is_exact()
        }
    }

    /// Probability with which a mismatch with a certain draft of probability `p` is
    /// forgiven: what the rule adds to `p`, as a share of `1 - p`.
    fn forgiveness(&self, p: f64) -> f64 {
        match self {
            Self::Ensemble { weight } => 1.0 - weight,
            Self::Tolerance { r } if *r > 0.0 => r / (1.0 - p),
            _ => 0.0,
        }
    }
}

impl fmt::Display for Acceptance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact => f.write_str("exact"),
            Self::Ensemble { weight } => write!(f, "ensemble (weight {weight})"),
            Self::Typical { epsilon, delta } => {
                write!(f, "typical (epsilon {epsilon}, delta {delta})")
            }
            Self::Lantern { k, delta } => write!(f, "lantern (k {k}, delta {delta})"),
            Self::Tolerance { r } => write!(f, "tolerance (r {r})"),
            Self::Synthetic { rate } => write!(f, "synthetic (rate {rate})"),
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
