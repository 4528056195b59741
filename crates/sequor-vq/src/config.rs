//! Choices that several quantisers share, and the checks of their ranges.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What "nearest" means, and which vector an index stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// The smallest `|z - e|`.
    #[default]
    Euclidean,
    /// Both are scaled to length 1, for the search and for everything after it: indices
    /// stand for unit vectors, and the losses compare unit vectors (improved VQGAN, LlamaGen).
    Cosine,
    /// The largest cosine, as [`Cosine`](Self::Cosine), but indices stand for the codes as
    /// they are stored, and the losses compare those with `z` as it is (DAC, SNAC; VAR with
    /// `using_znorm`).
    Direction,
}

/// How the codes follow the vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learning {
    /// By running means of the vectors that chose them (van den Oord et al., 2017,
    /// appendix A.1).
    #[default]
    Ema,
    /// By the gradient of a loss term, with the optimizer of the model.
    Gradient,
}

/// How running sums `s` and counts `n` become codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Average {
    /// `s / n'` with Laplace-smoothed counts `n' = (n + eps) / (N + K eps) N`, where `N` is
    /// the sum of the counts. The codes are stored as `embed` beside the sums.
    #[default]
    Laplace,
    /// `s / max(n, eps)`. The codes are not stored (Mimi).
    Floor,
}

/// When a code counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Threshold {
    /// Its running count is below this fraction of the mean count.
    MeanFraction(f64),
    /// Its running count is below this many vectors per step.
    Count(f64),
}

/// Restart of dead codes: each is moved to a random vector of the batch and gets the mean
/// count (with its running sum to match, so that the next update does not pull it back).
///
/// A codebook that learns by gradient is changed in place; what the optimizer remembers of
/// the code stays as it was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restart {
    /// When a code is dead.
    pub threshold: Threshold,
    /// Steps between two looks, at least 1. A look happens at steps (`key.request`) that
    /// are multiples.
    pub every: u64,
}

impl Default for Restart {
    /// A tenth of the mean count, every 5 steps.
    fn default() -> Self {
        Self {
            threshold: Threshold::MeanFraction(0.1),
            every: 5,
        }
    }
}

impl Restart {
    pub(crate) fn validate(&self) -> Result<()> {
        let (Threshold::MeanFraction(t) | Threshold::Count(t)) = self.threshold;
        positive("threshold", t)?;
        if matches!(self.threshold, Threshold::MeanFraction(f) if f >= 1.0) {
            return Err(Error::config(
                "threshold",
                t,
                "a fraction of the mean count must be below 1, or live codes would count as dead",
            ));
        }
        at_least("every", self.every, 1)
    }
}

/// The entropy term: each vector should choose sharply (small entropy), the batch as a whole
/// should use all codes (large entropy).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Entropy {
    /// Weight of the term.
    pub weight: f64,
    /// Choices are softmax of `-|z - e|^2 / temperature`.
    pub temperature: f64,
}

impl Default for Entropy {
    /// Weight 0.1, temperature 0.01.
    fn default() -> Self {
        Self {
            weight: 0.1,
            temperature: 0.01,
        }
    }
}

impl Entropy {
    pub(crate) fn validate(&self) -> Result<()> {
        finite("weight", self.weight)?;
        positive("temperature", self.temperature)
    }
}

/// Codebooks and vectors larger than this are a mistake in a configuration.
const LARGEST: i64 = 1 << 24;
/// So are matrices of more numbers than this (4 GiB in f32).
const MOST_NUMBERS: i64 = 1 << 30;

pub(crate) fn size(field: &'static str, value: i64) -> Result<()> {
    if (1..=LARGEST).contains(&value) {
        return Ok(());
    }
    Err(Error::config(
        field,
        value,
        format!("set it to a size from 1 to {LARGEST}"),
    ))
}

/// Does a matrix of these sizes fit the memory of some machine? `field` is the one to change.
pub(crate) fn matrix(field: &'static str, rows: i64, columns: i64) -> Result<()> {
    if rows.checked_mul(columns).is_some_and(|n| n <= MOST_NUMBERS) {
        return Ok(());
    }
    Err(Error::config(
        field,
        rows,
        format!(
            "a matrix of {rows} x {columns} numbers is beyond the limit of {MOST_NUMBERS}: make it smaller"
        ),
    ))
}

pub(crate) fn at_least(field: &'static str, value: u64, least: u64) -> Result<()> {
    if value >= least {
        return Ok(());
    }
    Err(Error::config(
        field,
        value,
        format!("set it to at least {least}"),
    ))
}

pub(crate) fn finite(field: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        field,
        value,
        "set it to zero (off) or a positive number",
    ))
}

pub(crate) fn positive(field: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(field, value, "set it to a positive number"))
}

pub(crate) fn probability(field: &'static str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(field, value, "set it to a number in [0, 1]"))
}
