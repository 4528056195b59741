//! One codebook: VQ-VAE's quantiser with the choices that were added to it since.

use crate::codebook::Codebook;
use crate::config::{
    Average, Distance, Entropy, Learning, Restart, at_least, finite, matrix, positive, size,
};
use crate::estimator::Estimator;
use crate::math::{entropy, mse, unit};
use crate::projection::Projection;
use crate::quantizer::{Encoded, Quantizer, StageLoss, Trained, total};
use crate::rows::{Indices, Rows};
use crate::{Error, Result};
use sequor_kernels::rng::Key;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Kind, ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of a [`VectorQuantizer`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VqConfig {
    /// Length of the vectors. Must be given.
    pub dim: i64,
    /// Number of codes. Must be given.
    pub codebook_size: i64,
    /// Length of the codes, when it is not `dim`: learned projections lead there and back
    /// ("factorised" codes; Yu et al., "Vector-quantized image modeling with improved
    /// VQGAN", 2021). Default: `dim`, no projections.
    pub codebook_dim: Option<i64>,
    /// Have the projections a bias? Default: yes.
    pub projection_bias: bool,
    /// What "nearest" means. Default: Euclidean.
    pub distance: Distance,
    /// How the codes follow the vectors. Default: running means.
    pub learning: Learning,
    /// Decay of running counts and sums per step, in `[0, 1)`. Default: 0.99.
    pub decay: f64,
    /// Smoothing of the counts. Default: 1e-5.
    pub eps: f64,
    /// How running sums and counts become codes. Default: Laplace.
    pub average: Average,
    /// Weight of `mse(z, sg(code))`. Default: 0.25.
    pub commitment_weight: f64,
    /// Weight of `mse(code, sg(z))` where codes learn by gradient. Default: 1. The reversed
    /// weights of taming-transformers' "legacy" loss are commitment 1 and codebook beta.
    pub codebook_weight: f64,
    /// Gradients past the choice of the code. Default: straight through.
    pub estimator: Estimator,
    /// The entropy term. Default: none.
    pub entropy: Option<Entropy>,
    /// Iterations of k-means that make the first codes from the first training batch; until
    /// then codes are random. Default: none, codes begin random.
    pub kmeans: Option<u32>,
    /// Restart of dead codes. Default: none.
    pub restart: Option<Restart>,
}

impl Default for VqConfig {
    fn default() -> Self {
        Self {
            dim: 0,
            codebook_size: 0,
            codebook_dim: None,
            projection_bias: true,
            distance: Distance::default(),
            learning: Learning::default(),
            decay: 0.99,
            eps: 1e-5,
            average: Average::default(),
            commitment_weight: 0.25,
            codebook_weight: 1.0,
            estimator: Estimator::default(),
            entropy: None,
            kmeans: None,
            restart: None,
        }
    }
}

impl VqConfig {
    /// The defaults for vectors of length `dim` and `codebook_size` codes.
    #[must_use]
    pub fn new(dim: i64, codebook_size: i64) -> Self {
        Self {
            dim,
            codebook_size,
            ..Self::default()
        }
    }

    /// Length of the codes.
    #[must_use]
    pub fn code_dim(&self) -> i64 {
        self.codebook_dim.unwrap_or(self.dim)
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the field.
    pub fn validate(&self) -> Result<()> {
        size("dim", self.dim)?;
        size("codebook_size", self.codebook_size)?;
        size("codebook_dim", self.code_dim())?;
        matrix("codebook_size", self.codebook_size, self.code_dim())?;
        if !(0.0..1.0).contains(&self.decay) {
            return Err(Error::config(
                "decay",
                self.decay,
                "set it to a number in [0, 1)",
            ));
        }
        positive("eps", self.eps)?;
        finite("commitment_weight", self.commitment_weight)?;
        finite("codebook_weight", self.codebook_weight)?;
        if let Some(iterations) = self.kmeans {
            at_least("kmeans", iterations.into(), 1)?;
        }
        if let Some(entropy) = &self.entropy {
            entropy.validate()?;
        }
        self.restart.iter().try_for_each(Restart::validate)
    }
}

/// Vector quantisation with one codebook (van den Oord et al., "Neural discrete
/// representation learning", 2017).
///
/// `z` is `[.., dim]`, indices are `[..]`. Parameters: `codebook.*`
/// (the module [`codebook`](crate::codebook) lists them), and with projections
/// `project_in.{weight,bias}` and `project_out.{weight,bias}`.
#[derive(Debug)]
pub struct VectorQuantizer {
    config: VqConfig,
    codebook: Codebook,
    projection: Projection,
}

/// A training pass before the codebook has learned from it.
pub(crate) struct Pass {
    /// What the codes were compared with, `[rows, code_dim]`, detached.
    pub input: Tensor,
    /// The chosen codes, `[rows]`.
    pub index: Tensor,
    /// The quantised vectors with gradients, `[rows, dim]`.
    pub output: Tensor,
    pub loss: StageLoss,
    /// Were the codes made from this very pass?
    pub fresh: bool,
}

impl VectorQuantizer {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a field out of range; when a file cannot
    /// be read. Tensors that do not fit are reported by
    /// [`ParamBuilder::finish`].
    pub fn new(p: &ParamBuilder, config: &VqConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            projection: Projection::new(p, config.dim, config.code_dim(), config.projection_bias)?,
            codebook: Codebook::new(&p.pp("codebook"), config)?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &VqConfig {
        &self.config
    }

    /// The table of codes.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// Are there projections around the codebook?
    pub(crate) fn is_projected(&self) -> bool {
        self.projection.is_some()
    }

    /// Indices `[rows]` of `x` `[rows, dim]`.
    pub(crate) fn assign(&self, x: &Tensor) -> Result<Tensor> {
        let inner = self.projection.inwards(x)?;
        self.codebook.nearest(&self.codebook.comparable(&inner)?)
    }

    /// `[rows, dim]` of `index` `[rows]`.
    pub(crate) fn outputs(&self, index: &Tensor) -> Result<Tensor> {
        self.projection.outwards(&self.codebook.rows(index)?)
    }

    /// The part of a training pass that leaves the codes as they are.
    pub(crate) fn pass(&mut self, x: &Tensor, key: Key) -> Result<Pass> {
        if self.config.entropy.is_some() {
            self.check_choices(x)?;
        }
        let input = self.codebook.comparable(&self.projection.inwards(x)?)?;
        let still = input.f_detach()?;
        let fresh = self.codebook.prepare(&still, key)?;
        let index = self.codebook.nearest(&still)?;
        let code = self.codebook.rows(&index)?;
        let c = &self.config;
        let commitment = mse(&input, &code.f_detach()?)?.f_mul_scalar(c.commitment_weight)?;
        let codebook = match c.learning {
            Learning::Gradient => Some(mse(&code, &still)?.f_mul_scalar(c.codebook_weight)?),
            Learning::Ema => None,
        };
        let entropy = match &c.entropy {
            Some(e) => Some(self.entropy_loss(&input, e)?),
            None => None,
        };
        let output = c.estimator.apply(&input, &code)?;
        Ok(Pass {
            output: self.projection.outwards(&output)?,
            input: still,
            index,
            loss: StageLoss {
                commitment: Some(commitment),
                codebook,
                entropy,
            },
            fresh,
        })
    }

    /// Lets the codes learn from a pass, or several joined; gives how many were restarted.
    pub(crate) fn learn(
        &mut self,
        input: &Tensor,
        index: &Tensor,
        fresh: bool,
        key: Key,
    ) -> Result<usize> {
        self.codebook.update(input, index)?;
        // Codes that were just made from this batch have had no chance to be used.
        if fresh {
            return Ok(0);
        }
        self.codebook.restart(input, key)
    }

    /// Gradients need the whole matrix of choices: the entropy term alone is not chunked.
    fn check_choices(&self, x: &Tensor) -> Result<()> {
        let rows = x.size().first().copied().unwrap_or(0);
        let codes = self.config.codebook_size;
        if rows.saturating_mul(codes) <= MOST_CHOICES {
            return Ok(());
        }
        Err(Error::Limits(format!(
            "the entropy term of {rows} vectors and {codes} codes needs more than {MOST_CHOICES} \
             probabilities: use smaller batches, or leave `entropy` out"
        )))
    }

    /// `E H(p) - H(E p)`, `p = softmax(-|z - e|^2 / temperature)` over the codes (LlamaGen's
    /// tokenizer; the first term over vectors, the second over the batch).
    fn entropy_loss(&self, input: &Tensor, e: &Entropy) -> Result<Tensor> {
        // Copies: what the gradient will need must survive the update of the table.
        let all = Tensor::f_arange(self.config.codebook_size, (Kind::Int64, input.device()))?;
        let mut codes = self.codebook.rows(&all)?;
        let mut input = input.shallow_clone();
        if self.config.distance == Distance::Direction {
            (codes, input) = (unit(&codes)?, unit(&input)?);
        }
        let squares = codes.f_square()?.f_sum_dim_intlist(-1, false, None)?;
        let product = input.f_matmul(&codes.f_transpose(0, 1)?)?;
        // |z|^2 is the same for all codes and cancels in the softmax.
        let near = product.f_mul_scalar(2.0)?.f_sub(&squares)?;
        let p = near
            .f_div_scalar(e.temperature)?
            .f_softmax(-1, Kind::Float)?;
        let each = entropy(&p)?.f_mean(None)?;
        let all = entropy(&p.f_mean_dim(0, false, None)?)?;
        Ok(each.f_sub(&all)?.f_mul_scalar(e.weight)?)
    }
}

/// Probabilities that the entropy term may hold: 1 GiB.
const MOST_CHOICES: i64 = 1 << 28;

impl Quantizer for VectorQuantizer {
    fn dim(&self) -> i64 {
        self.config.dim
    }

    fn codebook_size(&self) -> i64 {
        self.config.codebook_size
    }

    fn index_shape(&self) -> Vec<i64> {
        Vec::new()
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        let _no_grad = no_grad_guard();
        let rows = Rows::new(z, self.config.dim)?;
        let index = self.assign(&rows.flat)?;
        Ok(Encoded {
            quantized: rows.vectors(&self.outputs(&index)?)?,
            indices: rows.restore(&index)?,
        })
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.config.codebook_size)?;
        i.restore(&self.codebook.rows(&i.flat)?)
    }

    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.config.codebook_size)?;
        i.restore(&self.outputs(&i.flat)?)
    }

    fn train(&mut self, z: &Tensor, key: Key) -> Result<Trained> {
        let rows = Rows::new(z, self.config.dim)?;
        let pass = self.pass(&rows.flat, key)?;
        let restarted = self.learn(&pass.input, &pass.index, pass.fresh, key)?;
        let stages = vec![pass.loss];
        Ok(Trained {
            indices: rows.restore(&pass.index)?,
            quantized: rows.vectors(&pass.output)?,
            loss: total(&stages, &pass.output)?,
            stages,
            restarted,
        })
    }
}
