//! Finite scalar quantisation: every channel is rounded to a few levels, and the codebook is
//! the grid (Mentzer et al., "Finite scalar quantization: VQ-VAE made simple", 2023).

use crate::estimator::straight_through;
use crate::levels::Levels;
use crate::projection::Projection;
use crate::quantizer::{Encoded, Quantizer, StageLoss, Trained, total};
use crate::rows::{Indices, Rows};
use crate::{Result, config};
use sequor_kernels::rng::Key;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of an [`Fsq`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FsqConfig {
    /// Levels of each channel, at least 2: `[8, 5, 5, 5]` makes 1000 codes. Must be given.
    pub levels: Vec<i64>,
    /// Length of the vectors, when it is not the number of channels: learned projections
    /// lead there and back. Default: the number of channels.
    pub dim: Option<i64>,
}

impl FsqConfig {
    /// Channels with these levels, without projections.
    #[must_use]
    pub fn new(levels: &[i64]) -> Self {
        Self {
            levels: levels.to_vec(),
            dim: None,
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the field.
    pub fn validate(&self) -> Result<()> {
        Levels::new(&self.levels)?;
        config::size("dim", self.dim.unwrap_or(1))
    }
}

/// Finite scalar quantisation. `z` is `[.., dim]`, indices are `[..]`; no loss term, and no
/// parameters but the projections `project_in` and `project_out` where there are any.
///
/// A channel with `L` levels is squashed to their range, `h = tanh(z + s) H - o` with
/// `H = (L - 1)(1 + eps)/2`, `eps = 1e-3`, `o = 1/2` for even `L` and 0 for odd, and
/// `s = atanh(o / H)`, which leaves zero at zero; then rounded, and divided by `floor(L/2)`:
/// codes lie in `[-1, 1]`. The constants are those of vector-quantize-pytorch.
#[derive(Debug)]
pub struct Fsq {
    levels: Levels,
    dim: i64,
    projection: Projection,
}

/// Widens the range a little, so that the outermost levels are reached.
const EPS: f64 = 1e-3;

fn half_range(levels: f64) -> f64 {
    (levels - 1.0) * (1.0 + EPS) / 2.0
}

fn offset(levels: f64) -> f64 {
    if levels % 2.0 == 0.0 { 0.5 } else { 0.0 }
}

fn half_width(levels: f64) -> f64 {
    (levels / 2.0).floor()
}

impl Fsq {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a field out of range; when a file cannot
    /// be read.
    pub fn new(p: &ParamBuilder, config: &FsqConfig) -> Result<Self> {
        config.validate()?;
        let levels = Levels::new(&config.levels)?;
        let dim = config.dim.unwrap_or(levels.channels());
        Ok(Self {
            projection: Projection::new(p, dim, levels.channels(), true)?,
            levels,
            dim,
        })
    }

    /// The squashed channels, before rounding.
    fn bound(&self, x: &Tensor) -> Result<Tensor> {
        let per = |f: fn(f64) -> f64| self.levels.per_channel(x, f);
        let shift = per(|l| (offset(l) / half_range(l)).atanh())?;
        let h = x.f_add(&shift)?.f_tanh()?;
        Ok(h.f_mul(&per(half_range)?)?.f_sub(&per(offset)?)?)
    }

    /// Rounded channels to indices.
    fn index(&self, rounded: &Tensor) -> Result<Tensor> {
        let middle = self.levels.per_channel(rounded, half_width)?;
        self.levels.index(&rounded.f_add(&middle)?)
    }

    fn codes(&self, rounded: &Tensor) -> Result<Tensor> {
        Ok(rounded.f_div(&self.levels.per_channel(rounded, half_width)?)?)
    }

    fn codes_of(&self, index: &Tensor) -> Result<Tensor> {
        let digits = self.levels.digits(index)?;
        let middle = self.levels.per_channel(&digits, half_width)?;
        self.codes(&digits.f_sub(&middle)?)
    }
}

impl Quantizer for Fsq {
    fn dim(&self) -> i64 {
        self.dim
    }

    fn codebook_size(&self) -> i64 {
        self.levels.product
    }

    fn index_shape(&self) -> Vec<i64> {
        Vec::new()
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        let _no_grad = no_grad_guard();
        let rows = Rows::new(z, self.dim)?;
        let rounded = self
            .bound(&self.projection.inwards(&rows.flat)?)?
            .f_round()?;
        let quantized = self.projection.outwards(&self.codes(&rounded)?)?;
        Ok(Encoded {
            indices: rows.restore(&self.index(&rounded)?)?,
            quantized: rows.vectors(&quantized)?,
        })
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.levels.product)?;
        i.restore(&self.codes_of(&i.flat)?)
    }

    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.levels.product)?;
        i.restore(&self.projection.outwards(&self.codes_of(&i.flat)?)?)
    }

    /// Draws nothing from `key`: rounding is not random.
    fn train(&mut self, z: &Tensor, _key: Key) -> Result<Trained> {
        let rows = Rows::new(z, self.dim)?;
        let bound = self.bound(&self.projection.inwards(&rows.flat)?)?;
        let rounded = straight_through(&bound, &bound.f_detach()?.f_round()?)?;
        let quantized = self.projection.outwards(&self.codes(&rounded)?)?;
        let stages = vec![StageLoss::default()];
        Ok(Trained {
            indices: rows.restore(&self.index(&rounded.f_detach()?)?)?,
            quantized: rows.vectors(&quantized)?,
            loss: total(&stages, &quantized)?,
            stages,
            restarted: 0,
        })
    }
}
