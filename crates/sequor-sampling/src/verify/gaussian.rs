//! Verification of vectors (CSpD, Wang et al. 2024): the last denoising step of a draft
//! and a target that used the same noise.
//!
//! Both models end with a normal law per coordinate. With `x` from the draft,
//!
//! ```text
//! ratio = F prod(s_q / s_p) exp(-|(x - m_p) / (t s_p)|^2 / 2 + |(x - m_q) / (t s_q)|^2 / 2)
//! ```
//!
//! where `t` is an inner temperature and `F` accounts for the earlier steps: with shared
//! noise their exponents cancel and only the normalisers remain, `F = exp(sum log s_q -
//! sum log s_p)`. The published program uses the reciprocal; both forms are here. A
//! rejected vector is replaced by a draw `y ~ N(m_p, s_p)` that is kept with probability
//! `[1 - q(y) / (p(y) F)]+`.
//!
//! With `t = 1` and without earlier steps this is the exact chain rule for
//! [`DiagonalGaussian`] laws, whose residual is the same acceptance-rejection loop. **Lossy**
//! otherwise: an inner temperature above 1 flattens the test, and the ratio of last steps is
//! not the ratio of whole trajectories.

use serde::{Deserialize, Serialize};

use crate::distribution::DiagonalGaussian;
use crate::{Error, Result};

/// The last step of a denoising chain for one position.
#[derive(Clone, Debug, PartialEq)]
pub struct LastStep {
    law: DiagonalGaussian,
    sum_log_std: f64,
}

impl LastStep {
    /// The law of the last step, and the sum over the earlier steps (and coordinates) of
    /// the logarithm of the standard deviation.
    ///
    /// # Errors
    /// `Input` when `sum_log_std` is not finite.
    pub fn new(law: DiagonalGaussian, sum_log_std: f64) -> Result<Self> {
        if !sum_log_std.is_finite() {
            return Err(Error::input("sum_log_std", sum_log_std, "a finite number"));
        }
        Ok(Self { law, sum_log_std })
    }

    /// The law of the last step.
    #[must_use]
    pub fn law(&self) -> &DiagonalGaussian {
        &self.law
    }
}

/// How the earlier steps count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FixedTerm {
    /// `exp(sum log s_q - sum log s_p)`, which follows from shared noise.
    #[default]
    Derived,
    /// Its reciprocal, as in the published program.
    Published,
}

/// Options of the rule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AlignedRule {
    /// Inner temperature of the test, above 0; 1 leaves it as it is.
    pub temperature: f64,
    /// How the earlier steps count.
    pub fixed_term: FixedTerm,
    /// Most draws for a replacement.
    pub max_tries: usize,
}

impl Default for AlignedRule {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            fixed_term: FixedTerm::Derived,
            max_tries: 100,
        }
    }
}

impl AlignedRule {
    /// The rule of the published program: inner temperature 42 and the reciprocal term.
    #[must_use]
    pub fn published() -> Self {
        Self {
            temperature: 42.0,
            fixed_term: FixedTerm::Published,
            max_tries: 100,
        }
    }

    /// Logarithm of the term for the earlier steps.
    #[must_use]
    pub fn log_fixed_term(&self, p: &LastStep, q: &LastStep) -> f64 {
        let derived = q.sum_log_std - p.sum_log_std;
        match self.fixed_term {
            FixedTerm::Derived => derived,
            FixedTerm::Published => -derived,
        }
    }

    /// Logarithm of the ratio that a uniform number is tested against.
    #[must_use]
    pub fn log_ratio(&self, p: &LastStep, q: &LastStep, x: &[f64]) -> f64 {
        let flat = p.law.log_ratio(&q.law, x, self.temperature);
        self.log_fixed_term(p, q) + flat
    }

    /// Whether the draft `x` is kept at the uniform number `u` in `[0, 1)`.
    #[must_use]
    pub fn accepts(&self, p: &LastStep, q: &LastStep, x: &[f64], u: f64) -> bool {
        u < self.log_ratio(p, q, x).exp()
    }

    /// Probability with which the draw `y ~ p` is kept as a replacement.
    #[must_use]
    pub fn keep_probability(&self, p: &LastStep, q: &LastStep, y: &[f64]) -> f64 {
        let log_ratio = self.log_fixed_term(p, q) + p.law.log_ratio(&q.law, y, 1.0);
        (1.0 - (-log_ratio).exp()).max(0.0)
    }

    /// Replacements for several positions at once, as the published loop makes them: in
    /// every try each position proposes `proposal(try, position)`, a draw from its `p`, and
    /// a uniform number. The loop ends when each has been kept once; the *last* proposal
    /// that was kept counts. `None` for a position whose proposals were all refused. Gives
    /// the number of tries too.
    pub fn replacements(
        &self,
        steps: &[(&LastStep, &LastStep)],
        mut proposal: impl FnMut(usize, usize) -> (Vec<f64>, f64),
    ) -> (Vec<Option<Vec<f64>>>, usize) {
        let mut kept = vec![None; steps.len()];
        let mut tries = 0;
        while tries < self.max_tries && kept.iter().any(Option::is_none) {
            for (i, ((p, q), kept)) in steps.iter().zip(&mut kept).enumerate() {
                let (y, u) = proposal(tries, i);
                if u < self.keep_probability(p, q, &y) {
                    *kept = Some(y);
                }
            }
            tries += 1;
        }
        (kept, tries)
    }
}

impl DiagonalGaussian {
    /// `log p(x) - log q(x)` with `self` as `p`, the squares divided by `temperature^2`;
    /// minus infinity for a vector of the wrong dimension.
    #[must_use]
    pub fn log_ratio(&self, q: &Self, x: &[f64], temperature: f64) -> f64 {
        if x.len() != self.mean().len() || x.len() != q.mean().len() {
            return f64::NEG_INFINITY;
        }
        let side = |law: &Self| -> f64 {
            let terms = x.iter().zip(law.mean().iter().zip(law.std()));
            terms
                .map(|(x, (m, s))| ((x - m) / (temperature * s)).powi(2) / 2.0 + s.ln())
                .sum()
        };
        side(q) - side(self)
    }
}
