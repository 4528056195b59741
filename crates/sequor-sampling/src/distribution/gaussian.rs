//! Normal laws over vectors: one ancestral step of a diffusion sampler, or the head of
//! a model of continuous latents.

use std::f64::consts::PI;

use sequor_kernels::rng::Stream;

use super::Law;
use crate::{Error, Result};

/// Normal law with mean `mean` and covariance `sigma^2 I`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gaussian {
    mean: Vec<f64>,
    sigma: f64,
}

/// Outcome of a coupling of draft and target.
#[derive(Clone, Debug, PartialEq)]
pub struct Coupled {
    /// A draw from the target law.
    pub unit: Vec<f64>,
    /// Whether it is the draft itself.
    pub accepted: bool,
}

impl Gaussian {
    /// Normal law around `mean` with standard deviation `sigma` in every coordinate.
    ///
    /// # Errors
    /// `Input` when `mean` is empty or not finite, or `sigma` is not a positive number.
    pub fn new(mean: Vec<f64>, sigma: f64) -> Result<Self> {
        if mean.is_empty() || mean.iter().any(|m| !m.is_finite()) {
            return Err(Error::input(
                "mean",
                format!("{mean:?}"),
                "at least one finite number",
            ));
        }
        if !(sigma.is_finite() && sigma > 0.0) {
            return Err(Error::input("sigma", sigma, "a finite number > 0"));
        }
        Ok(Self { mean, sigma })
    }

    /// The mean.
    #[must_use]
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The standard deviation of each coordinate.
    #[must_use]
    pub fn sigma(&self) -> f64 {
        self.sigma
    }

    /// Turns the draft `x ~ q` into a draw from `self` that equals `x` as often as
    /// any method can make it, without a loop (reflection-maximal coupling).
    ///
    /// With `xi = (x - mu_q) / sigma`, `z = (mu_q - mu_p) / sigma` and `e = z / |z|`,
    /// `x` is kept when `u < exp(-|xi + z|^2 / 2 + |xi|^2 / 2)`, which is
    /// `p(x) / q(x)`; otherwise `xi` is mirrored at the hyperplane half-way between
    /// the two means: `y = mu_p + sigma (xi - 2 (e . xi) e)`. The mirror image of what
    /// `q` has too much is exactly what `p` has too much.
    ///
    /// # Errors
    /// `Input` when dimensions or standard deviations differ.
    pub fn reflection_coupling(&self, q: &Self, x: &[f64], u: f64) -> Result<Coupled> {
        if q.mean.len() != self.mean.len() || x.len() != self.mean.len() {
            let found = format!("{} and {}", q.mean.len(), x.len());
            return Err(Error::input(
                "dimension of q and x",
                found,
                format!("{}", self.mean.len()),
            ));
        }
        if q.sigma != self.sigma {
            return Err(Error::input(
                "sigma of q",
                q.sigma,
                format!("{}, as the target has", self.sigma),
            ));
        }
        let s = self.sigma;
        let z: Vec<f64> = q
            .mean
            .iter()
            .zip(&self.mean)
            .map(|(a, b)| (a - b) / s)
            .collect();
        let xi: Vec<f64> = x.iter().zip(&q.mean).map(|(x, m)| (x - m) / s).collect();
        let dot: f64 = z.iter().zip(&xi).map(|(z, xi)| z * xi).sum();
        let square: f64 = z.iter().map(|z| z * z).sum();
        // |xi + z|^2 - |xi|^2 = 2 xi . z + |z|^2
        if square == 0.0 || u < (-dot - square / 2.0).exp() {
            return Ok(Coupled {
                unit: x.to_vec(),
                accepted: true,
            });
        }
        let turn = 2.0 * dot / square;
        let unit = self
            .mean
            .iter()
            .zip(xi.iter().zip(&z))
            .map(|(m, (xi, z))| m + s * (xi - turn * z));
        Ok(Coupled {
            unit: unit.collect(),
            accepted: false,
        })
    }
}

impl Law for Gaussian {
    type Unit = Vec<f64>;

    fn sample(&self, stream: &mut Stream) -> Vec<f64> {
        self.mean
            .iter()
            .map(|m| m + self.sigma * stream.normal())
            .collect()
    }

    /// A vector of the wrong dimension is impossible.
    fn log_density(&self, unit: &Vec<f64>) -> f64 {
        if unit.len() != self.mean.len() {
            return f64::NEG_INFINITY;
        }
        let square: f64 = unit
            .iter()
            .zip(&self.mean)
            .map(|(x, m)| ((x - m) / self.sigma).powi(2))
            .sum();
        -0.5 * square - unit.len() as f64 * (self.sigma * (2.0 * PI).sqrt()).ln()
    }
}
