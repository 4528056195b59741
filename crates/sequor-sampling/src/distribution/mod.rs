//! Laws: what a model says about the next unit.
//!
//! The *unit* is what is decided at once: a token, a column of codes, a vector. A
//! [`Law`] is a probability law over units. Everything that drafts, verifies or
//! counts is written against this trait, so that one accept/reject rule serves
//! tokens ([`Categorical`]), columns of a residual codec ([`ProductCategorical`])
//! and continuous latents ([`Gaussian`]).

mod categorical;
mod diagonal;
mod gaussian;
mod product;

use sequor_kernels::rng::Stream;

use crate::{Error, Result};

pub use categorical::{Categorical, best_score};
pub use diagonal::DiagonalGaussian;
pub use gaussian::{Coupled, Gaussian};
pub use product::ProductCategorical;

/// Most draws that an acceptance-rejection loop makes before it reports
/// [`Error::Residual`].
///
/// A rejection happens with probability `TV(p, q)` and each try then succeeds with
/// that same probability, so that the chance of a rejection whose loop runs dry is
/// at most `TV (1 - TV)^N <= 1 / (e N)`, 4e-7 in the worst case.
pub const MAX_RESIDUAL_TRIES: usize = 1 << 20;

/// A probability law over units.
pub trait Law {
    /// What one draw is.
    type Unit: Clone + PartialEq;

    /// Draws a unit.
    fn sample(&self, stream: &mut Stream) -> Self::Unit;

    /// Logarithm (nats) of the density at `unit`, `-inf` where it is impossible. Laws
    /// of one type are taken with respect to one base measure, so that differences
    /// between two of them are log density ratios.
    fn log_density(&self, unit: &Self::Unit) -> f64;

    /// Density at `unit`.
    fn density(&self, unit: &Self::Unit) -> f64 {
        self.log_density(unit).exp()
    }

    /// `p(unit) / q(unit)` with `self` as `p`: 0 where `p` is 0, infinite where only
    /// `q` is 0.
    fn ratio(&self, q: &Self, unit: &Self::Unit) -> f64 {
        let p = self.log_density(unit);
        if p == f64::NEG_INFINITY {
            0.0
        } else {
            (p - q.log_density(unit)).exp()
        }
    }

    /// Draws from the residual law `norm([p - q]+)`, where `self` is `p`.
    ///
    /// The default is exact for any pair of laws: draw `y ~ p` and keep it with
    /// probability `[1 - q(y)/p(y)]+`. The number of tries is geometric with mean
    /// `1 / TV(p, q)`.
    ///
    /// # Errors
    /// [`Error::Residual`] after [`MAX_RESIDUAL_TRIES`] draws.
    fn residual(&self, q: &Self, stream: &mut Stream) -> Result<Self::Unit> {
        for _ in 0..MAX_RESIDUAL_TRIES {
            let y = self.sample(stream);
            if stream.uniform() < 1.0 - 1.0 / self.ratio(q, &y) {
                return Ok(y);
            }
        }
        Err(Error::Residual {
            tries: MAX_RESIDUAL_TRIES,
        })
    }
}
