//! Normal laws with a standard deviation of their own in every coordinate.

use std::f64::consts::TAU;

use sequor_kernels::rng::Stream;

use super::Law;
use crate::{Error, Result};

/// Normal law with independent coordinates.
#[derive(Clone, Debug, PartialEq)]
pub struct DiagonalGaussian {
    mean: Vec<f64>,
    std: Vec<f64>,
}

impl DiagonalGaussian {
    /// Normal law around `mean` with standard deviations `std`.
    ///
    /// # Errors
    /// `Input` when there are no or not as many numbers in both, when a mean is not finite
    /// or a standard deviation is not a positive number.
    pub fn new(mean: Vec<f64>, std: Vec<f64>) -> Result<Self> {
        if mean.is_empty() || mean.len() != std.len() {
            let found = format!("{} means and {} standard deviations", mean.len(), std.len());
            return Err(Error::input(
                "dimension",
                found,
                "as many of both, at least 1",
            ));
        }
        if let Some(bad) = mean.iter().find(|m| !m.is_finite()) {
            return Err(Error::input("mean", bad, "finite numbers"));
        }
        if let Some(bad) = std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(Error::input("std", bad, "finite numbers > 0"));
        }
        Ok(Self { mean, std })
    }

    /// The mean.
    #[must_use]
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The standard deviations.
    #[must_use]
    pub fn std(&self) -> &[f64] {
        &self.std
    }
}

impl Law for DiagonalGaussian {
    type Unit = Vec<f64>;

    fn sample(&self, stream: &mut Stream) -> Vec<f64> {
        let laws = self.mean.iter().zip(&self.std);
        laws.map(|(m, s)| m + s * stream.normal()).collect()
    }

    /// A vector of the wrong dimension is impossible.
    fn log_density(&self, unit: &Vec<f64>) -> f64 {
        if unit.len() != self.mean.len() {
            return f64::NEG_INFINITY;
        }
        let terms = unit.iter().zip(self.mean.iter().zip(&self.std));
        -terms
            .map(|(x, (m, s))| ((x - m) / s).powi(2) / 2.0 + s.ln() + TAU.ln() / 2.0)
            .sum::<f64>()
    }
}
