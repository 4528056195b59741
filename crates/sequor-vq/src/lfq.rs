//! Lookup-free quantisation: the code is the signs of the channels (Yu et al., "Language model
//! beats diffusion: tokenizer is key to visual generation", 2023).

use crate::config::{finite, positive, size};
use crate::estimator::straight_through;
use crate::math::{entropy, mse};
use crate::projection::Projection;
use crate::quantizer::{Encoded, Quantizer, StageLoss, Trained, total};
use crate::rows::{Indices, Rows};
use crate::{Error, Result};
use sequor_kernels::rng::Key;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Kind, ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of an [`Lfq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LfqConfig {
    /// Number of codes, a power of two; its logarithm is the number of channels. Must be
    /// given.
    pub codebook_size: i64,
    /// Length of the vectors, when it is not the number of channels: learned projections
    /// lead there and back. Default: the number of channels.
    pub dim: Option<i64>,
    /// Weight of the entropy term `E H(p) - diversity_gamma H(E p)`. Default: 0.1.
    pub entropy_loss_weight: f64,
    /// Weight of the batch's entropy within the term. Default: 1.
    pub diversity_gamma: f64,
    /// Weight of `mse(z, sg(code))`. Default: 0.25.
    pub commitment_loss_weight: f64,
    /// Inverse temperature of the choices in the entropy term. Default: 100.
    pub inv_temperature: f64,
}

impl Default for LfqConfig {
    fn default() -> Self {
        Self {
            codebook_size: 0,
            dim: None,
            entropy_loss_weight: 0.1,
            diversity_gamma: 1.0,
            commitment_loss_weight: 0.25,
            inv_temperature: 100.0,
        }
    }
}

/// Codes beyond which the entropy of the batch is not computed: 64 MiB of probabilities.
const MOST_CODES: i64 = 1 << 24;

impl LfqConfig {
    /// The defaults for `codebook_size` codes.
    #[must_use]
    pub fn new(codebook_size: i64) -> Self {
        Self {
            codebook_size,
            ..Self::default()
        }
    }

    fn channels(&self) -> i64 {
        i64::from(self.codebook_size.trailing_zeros())
    }

    fn wants_diversity(&self) -> bool {
        self.entropy_loss_weight > 0.0 && self.diversity_gamma > 0.0
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the field.
    pub fn validate(&self) -> Result<()> {
        if self.codebook_size < 2 || !self.codebook_size.unsigned_abs().is_power_of_two() {
            return Err(Error::config(
                "codebook_size",
                self.codebook_size,
                "set it to a power of two, from 2 to 2^62",
            ));
        }
        size("dim", self.dim.unwrap_or(1))?;
        finite("entropy_loss_weight", self.entropy_loss_weight)?;
        finite("diversity_gamma", self.diversity_gamma)?;
        finite("commitment_loss_weight", self.commitment_loss_weight)?;
        positive("inv_temperature", self.inv_temperature)?;
        if self.wants_diversity() && self.codebook_size > MOST_CODES {
            return Err(Error::config(
                "diversity_gamma",
                self.diversity_gamma,
                format!(
                    "the entropy of the batch is over all codes: set it to 0, or codebook_size to at most {MOST_CODES}"
                ),
            ));
        }
        Ok(())
    }
}

/// Lookup-free quantisation. `z` is `[.., dim]`, indices are `[..]`, codes are -1 and +1; a
/// channel at zero counts as -1. The first channel is the **highest** bit of the index.
/// Parameters: the projections `project_in` and `project_out` where there are any.
#[derive(Debug)]
pub struct Lfq {
    config: LfqConfig,
    channels: i64,
    dim: i64,
    projection: Projection,
}

impl Lfq {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a field out of range; when a file cannot
    /// be read.
    pub fn new(p: &ParamBuilder, config: &LfqConfig) -> Result<Self> {
        config.validate()?;
        let channels = config.channels();
        let dim = config.dim.unwrap_or(channels);
        Ok(Self {
            projection: Projection::new(p, dim, channels, true)?,
            config: config.clone(),
            channels,
            dim,
        })
    }

    /// Bit values, highest first, `[channels]`.
    fn places(&self, like: &Tensor) -> Result<Tensor> {
        let places: Vec<i64> = (0..self.channels).rev().map(|bit| 1i64 << bit).collect();
        Ok(Tensor::f_from_slice(&places)?.f_to_device(like.device())?)
    }

    fn index(&self, x: &Tensor) -> Result<Tensor> {
        let bits = x.f_gt(0.0)?.f_to_kind(Kind::Int64)?;
        Ok(bits
            .f_mul(&self.places(x)?)?
            .f_sum_dim_intlist(-1, false, Kind::Int64)?)
    }

    fn codes_of(&self, index: &Tensor) -> Result<Tensor> {
        let bits = index
            .f_unsqueeze(-1)?
            .f_bitwise_and_tensor(&self.places(index)?)?
            .f_ne(0)?;
        signs(&bits)
    }

    /// `E H(p) - gamma H(E p)`, where `p` is softmax of `2 inv_temperature z.c` over the
    /// codes `c`. The channels of `p` are independent, bit `i` being 1 with probability
    /// `sigmoid(4 inv_temperature z_i)`, so the first entropy is a sum over bits. The second
    /// is not; its `E p` is made by one product of the laws of the upper and of the lower
    /// half of the bits, which holds `2^(channels/2)` numbers per vector instead of
    /// `2^channels`.
    fn entropy_loss(&self, x: &Tensor) -> Result<Tensor> {
        let logits = x.f_mul_scalar(4.0 * self.config.inv_temperature)?;
        let p = logits.f_sigmoid()?;
        // H of a bit: softplus(a) - a sigmoid(a), exact in both tails.
        let bit = logits.f_softplus()?.f_sub(&logits.f_mul(&p)?)?;
        let each = bit.f_sum_dim_intlist(-1, false, None)?.f_mean(None)?;
        if !self.config.wants_diversity() {
            return Ok(each);
        }
        let upper = self.channels / 2;
        let law = |first: i64, bits: i64| -> Result<Tensor> {
            let rows = p.size().first().copied().unwrap_or(0);
            let mut law = Tensor::f_ones([rows, 1], (Kind::Float, p.device()))?;
            for i in first..first + bits {
                let one = p.f_narrow(1, i, 1)?;
                let zero = logits.f_narrow(1, i, 1)?.f_neg()?.f_sigmoid()?;
                let pair = Tensor::f_cat(&[zero, one], 1)?.f_unsqueeze(1)?;
                law = law.f_unsqueeze(2)?.f_mul(&pair)?.f_flatten(1, -1)?;
            }
            Ok(law)
        };
        let (high, low) = (law(0, upper)?, law(upper, self.channels - upper)?);
        let rows = x.size().first().copied().unwrap_or(1);
        let mean = high
            .f_transpose(0, 1)?
            .f_matmul(&low)?
            .f_div_scalar(rows as f64)?;
        let all = entropy(&mean.f_flatten(0, -1)?)?;
        Ok(each.f_sub(&all.f_mul_scalar(self.config.diversity_gamma)?)?)
    }
}

/// -1 and +1 for false and true.
fn signs(bits: &Tensor) -> Result<Tensor> {
    let bits = bits.f_to_kind(Kind::Float)?;
    Ok(bits.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?)
}

impl Quantizer for Lfq {
    fn dim(&self) -> i64 {
        self.dim
    }

    fn codebook_size(&self) -> i64 {
        self.config.codebook_size
    }

    fn index_shape(&self) -> Vec<i64> {
        Vec::new()
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        let _no_grad = no_grad_guard();
        let rows = Rows::new(z, self.dim)?;
        let x = self.projection.inwards(&rows.flat)?;
        let quantized = self.projection.outwards(&signs(&x.f_gt(0.0)?)?)?;
        Ok(Encoded {
            indices: rows.restore(&self.index(&x)?)?,
            quantized: rows.vectors(&quantized)?,
        })
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.config.codebook_size)?;
        i.restore(&self.codes_of(&i.flat)?)
    }

    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.config.codebook_size)?;
        i.restore(&self.projection.outwards(&self.codes_of(&i.flat)?)?)
    }

    /// Draws nothing from `key`.
    fn train(&mut self, z: &Tensor, _key: Key) -> Result<Trained> {
        let rows = Rows::new(z, self.dim)?;
        let x = self.projection.inwards(&rows.flat)?;
        let code = signs(&x.f_detach()?.f_gt(0.0)?)?;
        let c = &self.config;
        let commitment = mse(&x, &code)?.f_mul_scalar(c.commitment_loss_weight)?;
        let entropy = if c.entropy_loss_weight > 0.0 {
            let term = self.entropy_loss(&x)?;
            Some(term.f_mul_scalar(c.entropy_loss_weight)?)
        } else {
            None
        };
        let stages = vec![StageLoss {
            commitment: Some(commitment),
            codebook: None,
            entropy,
        }];
        let quantized = self.projection.outwards(&straight_through(&x, &code)?)?;
        Ok(Trained {
            indices: rows.restore(&self.index(&x.f_detach()?)?)?,
            quantized: rows.vectors(&quantized)?,
            loss: total(&stages, &quantized)?,
            stages,
            restarted: 0,
        })
    }
}
