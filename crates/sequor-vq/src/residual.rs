//! Residual quantisation: each level quantises what the levels before left over.

use crate::config::{probability, size};
use crate::dropout::{active_rows, kept_levels};
use crate::projection::Projection;
use crate::quantizer::{Encoded, Quantizer, StageLoss, Trained, part_key, total};
use crate::rows::{Indices, Rows};
use crate::vector::{Pass, VectorQuantizer, VqConfig};
use crate::{Error, Result};
use sequor_kernels::rng::Key;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Kind, ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of a [`ResidualVq`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResidualVqConfig {
    /// Number of levels. Must be given.
    pub num_quantizers: i64,
    /// What each level is. Its `dim` is the width in which residuals are taken. A
    /// `codebook_dim` here puts projections around every level (DAC).
    pub stage: VqConfig,
    /// Length of the vectors, when it is not `stage.dim`: one pair of learned projections
    /// around all levels (Mimi), with a bias as `stage.projection_bias` says. Default:
    /// `stage.dim`.
    pub dim: Option<i64>,
    /// Do all levels use the codebook (and projections) of the first? Default: no.
    pub shared_codebook: bool,
    /// Share of the items of a training batch (first dimension of `z`) that keep only a
    /// random number of levels. Default: 0.
    pub quantizer_dropout: f64,
}

impl ResidualVqConfig {
    /// `num_quantizers` levels of `stage`.
    #[must_use]
    pub fn new(num_quantizers: i64, stage: VqConfig) -> Self {
        Self {
            num_quantizers,
            stage,
            ..Self::default()
        }
    }

    /// Length of the vectors.
    #[must_use]
    pub fn outer_dim(&self) -> i64 {
        self.dim.unwrap_or(self.stage.dim)
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        levels(self.num_quantizers)?;
        self.stage.validate()?;
        size("dim", self.outer_dim())?;
        probability("quantizer_dropout", self.quantizer_dropout)
    }
}

/// Levels beyond this are a mistake in a configuration.
const MOST_LEVELS: i64 = 1024;

pub(crate) fn levels(n: i64) -> Result<()> {
    if (1..=MOST_LEVELS).contains(&n) {
        return Ok(());
    }
    Err(Error::config(
        "num_quantizers",
        n,
        format!("set it to a number of levels from 1 to {MOST_LEVELS}"),
    ))
}

/// Residual vector quantisation (Zeghidour et al., "SoundStream", 2021): `r_0 = z`,
/// `q_l = VQ_l(r_l)`, `r_{l+1} = r_l - q_l`; the output is the sum of the `q_l`.
///
/// `z` is `[.., dim]`, indices are `[.., levels]`. An index of -1, and every level beyond the
/// columns that are given, contributes nothing to [`decode`](Quantizer::decode): any prefix
/// of the levels can be decoded.
///
/// In training, residuals are taken from detached codes, so that the commitment of later
/// levels reaches the encoder, and the estimator acts once on the sum: its gradient is that
/// of one quantiser, not of `levels` of them. With projections around every level each level
/// has its own estimator, and residuals carry gradients, as in DAC.
///
/// Parameters: `layers.{l}.*` as [`VectorQuantizer`] (a shared codebook is `layers.0`), and
/// `project_in`, `project_out` where `dim` is not the width of the levels.
#[derive(Debug)]
pub struct ResidualVq {
    config: ResidualVqConfig,
    stages: Vec<VectorQuantizer>,
    projection: Projection,
}

/// What the levels of a training pass give, in rows.
pub(crate) struct ResidualPass {
    pub index: Tensor,
    pub output: Tensor,
    pub stages: Vec<StageLoss>,
    pub restarted: usize,
}

impl ResidualVq {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`] for a field out of range; when a file cannot be read.
    pub fn new(p: &ParamBuilder, config: &ResidualVqConfig) -> Result<Self> {
        config.validate()?;
        let separate = if config.shared_codebook {
            1
        } else {
            config.num_quantizers
        };
        let stages: Result<Vec<_>> = (0..separate)
            .map(|l| VectorQuantizer::new(&p.pp("layers").pp(l), &config.stage))
            .collect();
        let (outer, inner) = (config.outer_dim(), config.stage.dim);
        Ok(Self {
            projection: Projection::new(p, outer, inner, config.stage.projection_bias)?,
            stages: stages?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ResidualVqConfig {
        &self.config
    }

    /// The quantisers of the levels; one, when all share it.
    pub fn stages(&self) -> &[VectorQuantizer] {
        &self.stages
    }

    fn slot(&self, level: i64) -> usize {
        if self.config.shared_codebook {
            0
        } else {
            level as usize
        }
    }

    fn stage(&self, level: i64) -> Result<&VectorQuantizer> {
        let stage = self.stages.get(self.slot(level));
        stage.ok_or_else(|| no_level(level, self.config.num_quantizers))
    }

    /// As [`encode`](Quantizer::encode), with the first `levels` levels only: indices
    /// `[.., levels]`, equal to the first columns of all.
    ///
    /// # Errors
    /// As [`encode`](Quantizer::encode); [`Error::Input`] when there are not that many.
    pub fn encode_levels(&self, z: &Tensor, levels: i64) -> Result<Encoded> {
        let _no_grad = no_grad_guard();
        if !(1..=self.config.num_quantizers).contains(&levels) {
            return Err(no_level(levels, self.config.num_quantizers));
        }
        let rows = Rows::new(z, self.dim())?;
        let mut rest = self.projection.inwards(&rows.flat)?;
        let (mut sum, mut indices) = (rest.f_zeros_like()?, Vec::new());
        for level in 0..levels {
            let stage = self.stage(level)?;
            let index = stage.assign(&rest)?;
            let q = stage.outputs(&index)?;
            rest = rest.f_sub(&q)?;
            sum = sum.f_add(&q)?;
            indices.push(index);
        }
        Ok(Encoded {
            indices: rows.restore(&Tensor::f_stack(&indices, -1)?)?,
            quantized: rows.vectors(&self.projection.outwards(&sum)?)?,
        })
    }

    /// Rows of indices for the columns that `indices` has.
    fn columns(&self, indices: &Tensor) -> Result<(Indices, i64)> {
        let given = if indices.defined() {
            indices.size().last().copied().unwrap_or(0)
        } else {
            0
        };
        if !(1..=self.config.num_quantizers).contains(&given) {
            return Err(no_level(given, self.config.num_quantizers));
        }
        let size = self.config.stage.codebook_size;
        Ok((Indices::new(indices, &[given], -1, size)?, given))
    }

    /// The sum of the levels' vectors for rows of indices, `[rows, stage.dim]`.
    fn summed(&self, index: &Tensor, levels: i64) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for level in 0..levels {
            let column = index.f_select(1, level)?;
            let q = self.stage(level)?.outputs(&column.f_clamp_min(0)?)?;
            let q = q.f_mul(&present(&column)?)?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&q)?,
                None => q,
            });
        }
        sum.ok_or_else(|| no_level(levels, self.config.num_quantizers))
    }

    /// One training pass over `x` `[rows, dim]`, whose items have `rows / kept.len()` rows
    /// and keep that many levels each.
    pub(crate) fn pass(&mut self, x: &Tensor, kept: &[i64], key: Key) -> Result<ResidualPass> {
        let count = x.size().first().copied().unwrap_or(0);
        let item_rows = count / (kept.len().max(1) as i64);
        let projected = self.stages.iter().any(VectorQuantizer::is_projected);
        let z = self.projection.inwards(x)?;
        let mut rest = z.shallow_clone();
        let mut sum = z.f_zeros_like()?;
        let (mut columns, mut losses) = (Vec::new(), Vec::new());
        let mut passes: Vec<Vec<(Tensor, Tensor, bool)>> = Vec::new();
        passes.resize_with(self.stages.len(), Vec::new);
        for level in 0..self.config.num_quantizers {
            let active = active_rows(kept, level, item_rows);
            if active.as_ref().is_some_and(Vec::is_empty) {
                columns.push(Tensor::f_full([count], -1, (Kind::Int64, x.device()))?);
                losses.push(StageLoss::default());
                continue;
            }
            let slot = self.slot(level);
            let Some(stage) = self.stages.get_mut(slot) else {
                return Err(no_level(level, self.config.num_quantizers));
            };
            let chosen = match &active {
                Some(rows) => Some(Tensor::f_from_slice(rows)?.f_to_device(x.device())?),
                None => None,
            };
            let input = match &chosen {
                Some(rows) => rest.f_index_select(0, rows)?,
                None => rest.shallow_clone(),
            };
            let pass = stage.pass(&input, part_key(key, level as u64))?;
            let Pass { output, index, .. } = &pass;
            // Residuals that keep the gradient of a level without projections would have
            // none at all: the estimator's identity cancels that of the vector.
            let output = if projected {
                output.shallow_clone()
            } else {
                output.f_detach()?
            };
            let (output, column) = match &chosen {
                Some(rows) => {
                    let all = Tensor::f_full([count], -1, (Kind::Int64, x.device()))?;
                    let zeros = sum.f_zeros_like()?;
                    (
                        zeros.f_index_add(0, rows, &output)?,
                        { all }.f_index_copy_(0, rows, index)?,
                    )
                }
                None => (output, index.shallow_clone()),
            };
            rest = rest.f_sub(&output)?;
            sum = sum.f_add(&output)?;
            columns.push(column);
            // The mean is over all items, those that left the level out counting as zero.
            let share = active.map_or(1.0, |rows| rows.len() as f64 / count.max(1) as f64);
            losses.push(pass.loss.scaled(share)?);
            if let Some(list) = passes.get_mut(slot) {
                list.push((pass.input, pass.index, pass.fresh));
            }
        }
        // Only now: all codes of the pass come from the tables as they were.
        let mut restarted = 0;
        for ((stage, passes), slot) in self.stages.iter_mut().zip(passes).zip(0u64..) {
            if passes.is_empty() {
                continue;
            }
            let inputs: Vec<&Tensor> = passes.iter().map(|(x, _, _)| x).collect();
            let index: Vec<&Tensor> = passes.iter().map(|(_, i, _)| i).collect();
            let (inputs, index) = (Tensor::f_cat(&inputs, 0)?, Tensor::f_cat(&index, 0)?);
            let fresh = passes.iter().any(|(_, _, fresh)| *fresh);
            restarted += stage.learn(&inputs, &index, fresh, part_key(key, slot))?;
        }
        let output = if projected {
            sum
        } else {
            self.config.stage.estimator.apply(&z, &sum)?
        };
        Ok(ResidualPass {
            index: Tensor::f_stack(&columns, -1)?,
            output: self.projection.outwards(&output)?,
            stages: losses,
            restarted,
        })
    }

    pub(crate) fn kept(&self, z: &Tensor, key: Key) -> Vec<i64> {
        let c = &self.config;
        kept_levels(key, batch(z), c.quantizer_dropout, c.num_quantizers)
    }
}

/// The number of items: the first dimension, 1 for a lone vector.
pub(crate) fn batch(z: &Tensor) -> i64 {
    match (z.defined(), z.defined() && z.dim() > 1) {
        (true, true) => z.size().first().copied().unwrap_or(1),
        _ => 1,
    }
}

/// 1 where there is an index, 0 where it is -1: `[rows, 1]`.
pub(crate) fn present(column: &Tensor) -> Result<Tensor> {
    Ok(column.f_ge(0)?.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?)
}

pub(crate) fn no_level(asked: i64, have: i64) -> Error {
    Error::Input(format!(
        "{asked} levels of indices: this quantiser has 1 to {have}"
    ))
}

impl Quantizer for ResidualVq {
    fn dim(&self) -> i64 {
        self.config.outer_dim()
    }

    fn codebook_size(&self) -> i64 {
        self.config.stage.codebook_size
    }

    fn index_shape(&self) -> Vec<i64> {
        vec![self.config.num_quantizers]
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        self.encode_levels(z, self.config.num_quantizers)
    }

    /// `[.., levels, code_dim]`; zeros where an index is -1. Takes a prefix of the levels,
    /// too.
    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let (i, levels) = self.columns(indices)?;
        let mut all = Vec::new();
        for level in 0..levels {
            let column = i.flat.f_select(1, level)?;
            let codes = self
                .stage(level)?
                .codebook()
                .rows(&column.f_clamp_min(0)?)?;
            all.push(codes.f_mul(&present(&column)?)?);
        }
        i.restore(&Tensor::f_stack(&all, 1)?)
    }

    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let (i, levels) = self.columns(indices)?;
        let sum = self.summed(&i.flat, levels)?;
        i.restore(&self.projection.outwards(&sum)?)
    }

    fn train(&mut self, z: &Tensor, key: Key) -> Result<Trained> {
        let rows = Rows::new(z, self.dim())?;
        let kept = self.kept(z, key);
        let pass = self.pass(&rows.flat, &kept, key)?;
        Ok(Trained {
            indices: rows.restore(&pass.index)?,
            quantized: rows.vectors(&pass.output)?,
            loss: total(&pass.stages, &pass.output)?,
            stages: pass.stages,
            restarted: pass.restarted,
        })
    }
}
