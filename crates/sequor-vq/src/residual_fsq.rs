//! Residual finite scalar quantisation: each level refines the grid of the one before.

use crate::config::{probability, size};
use crate::dropout::{active_rows, kept_levels};
use crate::estimator::straight_through;
use crate::levels::Levels;
use crate::projection::Projection;
use crate::quantizer::{Encoded, Quantizer, StageLoss, Trained, total};
use crate::residual::{batch, levels, no_level, present};
use crate::rows::{Indices, Rows};
use crate::{Error, Result};
use sequor_kernels::rng::Key;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Kind, ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of a [`ResidualFsq`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResidualFsqConfig {
    /// Number of levels of the residual. Must be given.
    pub num_quantizers: i64,
    /// Levels of each channel, at least 2, the same in all stages. Must be given.
    pub levels: Vec<i64>,
    /// Length of the vectors, when it is not the number of channels: learned projections
    /// lead there and back. Default: the number of channels.
    pub dim: Option<i64>,
    /// Share of the items of a training batch (first dimension of `z`) that keep only a
    /// random number of stages. Default: 0.
    pub quantizer_dropout: f64,
}

impl ResidualFsqConfig {
    /// `num_quantizers` stages over channels with these levels.
    #[must_use]
    pub fn new(num_quantizers: i64, levels: &[i64]) -> Self {
        Self {
            num_quantizers,
            levels: levels.to_vec(),
            ..Self::default()
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        levels(self.num_quantizers)?;
        Levels::new(&self.levels)?;
        size("dim", self.dim.unwrap_or(1))?;
        probability("quantizer_dropout", self.quantizer_dropout)?;
        let most = self.levels.iter().max().copied().unwrap_or(2) as f64;
        // Beyond, the steps of the last stage are zero in f32.
        if most.powi((self.num_quantizers - 1) as i32) > 1e30 {
            return Err(Error::config(
                "num_quantizers",
                self.num_quantizers,
                "the last stage is finer than f32 can tell apart: use fewer stages",
            ));
        }
        Ok(())
    }
}

/// Residual finite scalar quantisation, as in vector-quantize-pytorch 1.32.
///
/// `z` is `[.., dim]`, indices are `[.., stages]`; -1 and prefixes as in
/// [`ResidualVq`](crate::ResidualVq). Channels are first squashed,
/// `x <- c tanh(x / c)` with `c = 1 + 1/(L - 1)`. Stage `q` takes the residual `r`, and in
/// each channel `i = floor((L - 1)(clamp(r L^q, -1, 1) + 1)/2 + 1/2)`, which stands for
/// `(2i/(L - 1) - 1) L^-q`: levels are symmetric about zero, unlike those of
/// [`Fsq`](crate::Fsq). Parameters: the projections where there are any.
#[derive(Debug)]
pub struct ResidualFsq {
    config: ResidualFsqConfig,
    levels: Levels,
    dim: i64,
    projection: Projection,
}

impl ResidualFsq {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`] for a field out of range; when a file cannot be read.
    pub fn new(p: &ParamBuilder, config: &ResidualFsqConfig) -> Result<Self> {
        config.validate()?;
        let levels = Levels::new(&config.levels)?;
        let dim = config.dim.unwrap_or(levels.channels());
        Ok(Self {
            projection: Projection::new(p, dim, levels.channels(), true)?,
            config: config.clone(),
            levels,
            dim,
        })
    }

    fn squash(&self, x: &Tensor) -> Result<Tensor> {
        let c = self.levels.per_channel(x, |l| 1.0 + 1.0 / (l - 1.0))?;
        Ok(x.f_div(&c)?.f_tanh()?.f_mul(&c)?)
    }

    /// Digits of the stage for a residual, `[rows, channels]`.
    fn digits(&self, rest: &Tensor, stage: i64) -> Result<Tensor> {
        let power = stage as i32;
        let scale = self.levels.per_channel(rest, |l| l.powi(power))?;
        let steps = self.levels.per_channel(rest, |l| (l - 1.0) / 2.0)?;
        let u = rest.f_mul(&scale)?.f_clamp(-1.0, 1.0)?;
        Ok(u.f_add_scalar(1.0)?
            .f_mul(&steps)?
            .f_add_scalar(0.5)?
            .f_floor()?)
    }

    /// What digits of a stage stand for.
    fn values(&self, digits: &Tensor, stage: i64) -> Result<Tensor> {
        let power = -(stage as i32);
        let scale = self.levels.per_channel(digits, |l| l.powi(power))?;
        let steps = self.levels.per_channel(digits, |l| (l - 1.0) / 2.0)?;
        Ok(digits.f_div(&steps)?.f_sub_scalar(1.0)?.f_mul(&scale)?)
    }

    /// Indices `[rows, stages]` and their sum, for squashed `x`; `kept` stages per item.
    fn stages(&self, x: &Tensor, stages: i64, kept: &[i64]) -> Result<(Tensor, Tensor)> {
        let count = x.size().first().copied().unwrap_or(0);
        let item_rows = count / (kept.len().max(1) as i64);
        let (mut rest, mut sum) = (x.shallow_clone(), x.f_zeros_like()?);
        let mut indices = Vec::new();
        for stage in 0..stages {
            let digits = self.digits(&rest, stage)?;
            let mut q = self.values(&digits, stage)?;
            let mut index = self.levels.index(&digits)?;
            if let Some(active) = active_rows(kept, stage, item_rows) {
                let mut mask = Tensor::f_zeros([count], (Kind::Bool, x.device()))?;
                let active = Tensor::f_from_slice(&active)?.f_to_device(x.device())?;
                let mask = mask.f_index_fill_(0, &active, 1)?;
                index = index.f_masked_fill(&mask.f_logical_not()?, -1)?;
                q = q.f_mul(&mask.f_to_kind(Kind::Float)?.f_unsqueeze(1)?)?;
            }
            rest = rest.f_sub(&q)?;
            sum = sum.f_add(&q)?;
            indices.push(index);
        }
        Ok((Tensor::f_stack(&indices, -1)?, sum))
    }

    /// As [`encode`](Quantizer::encode), with the first `stages` stages only.
    ///
    /// # Errors
    /// As [`encode`](Quantizer::encode); [`Error::Input`] when there are not that many.
    pub fn encode_levels(&self, z: &Tensor, stages: i64) -> Result<Encoded> {
        let _no_grad = no_grad_guard();
        if !(1..=self.config.num_quantizers).contains(&stages) {
            return Err(no_level(stages, self.config.num_quantizers));
        }
        let rows = Rows::new(z, self.dim)?;
        let x = self.squash(&self.projection.inwards(&rows.flat)?)?;
        let (index, sum) = self.stages(&x, stages, &[])?;
        Ok(Encoded {
            indices: rows.restore(&index)?,
            quantized: rows.vectors(&self.projection.outwards(&sum)?)?,
        })
    }

    /// `[rows, stages, channels]` and the rows.
    fn found(&self, indices: &Tensor) -> Result<(Indices, Tensor)> {
        let given = if indices.defined() {
            indices.size().last().copied().unwrap_or(0)
        } else {
            0
        };
        if !(1..=self.config.num_quantizers).contains(&given) {
            return Err(no_level(given, self.config.num_quantizers));
        }
        let i = Indices::new(indices, &[given], -1, self.levels.product)?;
        let mut all = Vec::new();
        for stage in 0..given {
            let column = i.flat.f_select(1, stage)?;
            let digits = self.levels.digits(&column.f_clamp_min(0)?)?;
            all.push(self.values(&digits, stage)?.f_mul(&present(&column)?)?);
        }
        Ok((i, Tensor::f_stack(&all, 1)?))
    }
}

impl Quantizer for ResidualFsq {
    fn dim(&self) -> i64 {
        self.dim
    }

    fn codebook_size(&self) -> i64 {
        self.levels.product
    }

    fn index_shape(&self) -> Vec<i64> {
        vec![self.config.num_quantizers]
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        self.encode_levels(z, self.config.num_quantizers)
    }

    /// `[.., stages, channels]`; zeros where an index is -1.
    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let (i, found) = self.found(indices)?;
        i.restore(&found)
    }

    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let (i, found) = self.found(indices)?;
        // In the order of encoding: sums of f32 depend on it.
        let mut sum = found.f_select(1, 0)?;
        for stage in 1..found.size().get(1).copied().unwrap_or(1) {
            sum = sum.f_add(&found.f_select(1, stage)?)?;
        }
        i.restore(&self.projection.outwards(&sum)?)
    }

    fn train(&mut self, z: &Tensor, key: Key) -> Result<Trained> {
        let rows = Rows::new(z, self.dim)?;
        let c = &self.config;
        let kept = kept_levels(key, batch(z), c.quantizer_dropout, c.num_quantizers);
        let x = self.squash(&self.projection.inwards(&rows.flat)?)?;
        let (index, sum) = self.stages(&x.f_detach()?, c.num_quantizers, &kept)?;
        let quantized = self.projection.outwards(&straight_through(&x, &sum)?)?;
        let stages: Vec<StageLoss> = (0..c.num_quantizers)
            .map(|_| StageLoss::default())
            .collect();
        Ok(Trained {
            indices: rows.restore(&index)?,
            quantized: rows.vectors(&quantized)?,
            loss: total(&stages, &quantized)?,
            stages,
            restarted: 0,
        })
    }
}
