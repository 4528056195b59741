//! The trait that every quantiser implements, and what its passes give.

use crate::Result;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::Tensor;

/// Vectors to indices and back.
///
/// Vectors lie in the **last** dimension: `z` is `[.., dim]`, whatever comes before
/// ([`channels_last`](crate::channels_last) brings `[batch, channels, ..]` there). Indices
/// are i64 with the shape of `z` without its last dimension, followed by
/// [`index_shape`](Self::index_shape): nothing for a quantiser with one codebook, the number
/// of levels for a residual one.
///
/// Numbers are computed in f32. `z` may be of any floating type, and what
/// [`encode`](Self::encode) and [`train`](Self::train) give is of the same type.
///
/// # Errors
/// All passes refuse a `z` that is empty, has another last dimension, or is not finite, and
/// indices that are empty, have another shape or lie outside the codebook:
/// [`Error::Input`](crate::Error::Input) says which.
pub trait Quantizer {
    /// Length of the vectors.
    fn dim(&self) -> i64;

    /// Number of codes of each codebook: indices lie in `0..codebook_size`.
    fn codebook_size(&self) -> i64;

    /// The dimensions that indices have where `z` has its vectors: one index per codebook.
    fn index_shape(&self) -> Vec<i64>;

    /// The nearest codes. Changes nothing and records no gradients.
    ///
    /// # Errors
    /// As the trait says.
    fn encode(&self, z: &Tensor) -> Result<Encoded>;

    /// The code vectors themselves, one per index, before sums and output projections:
    /// `[.., index_shape.., code_dim]`, f32. Differentiable in a learned codebook.
    ///
    /// # Errors
    /// As the trait says.
    fn lookup(&self, indices: &Tensor) -> Result<Tensor>;

    /// What the indices stand for: `[.., dim]`, f32, equal to the `quantized` that came with
    /// them. Differentiable in a learned codebook.
    ///
    /// # Errors
    /// As the trait says.
    fn decode(&self, indices: &Tensor) -> Result<Tensor>;

    /// One pass of training: codes by the tables as they are, gradients past the rounding,
    /// losses, and then the update of what learns without gradients (running means, restart
    /// of dead codes). `key.request` is the number of the training step; every random choice
    /// is drawn from `key`, so that a step can be repeated.
    ///
    /// # Errors
    /// As the trait says.
    fn train(&mut self, z: &Tensor, key: Key) -> Result<Trained>;
}

/// What [`Quantizer::encode`] gives.
#[derive(Debug)]
pub struct Encoded {
    /// The indices, i64.
    pub indices: Tensor,
    /// The vectors they stand for, `[.., dim]`, without gradients.
    pub quantized: Tensor,
}

/// What [`Quantizer::train`] gives.
#[derive(Debug)]
pub struct Trained {
    /// The indices, i64; -1 where quantiser dropout left a level out.
    pub indices: Tensor,
    /// The vectors they stand for, `[.., dim]`, with gradients to `z` as the estimator says
    /// ([`Estimator`](crate::Estimator)).
    pub quantized: Tensor,
    /// The sum of all terms of all stages, a scalar: add it to the loss of the model.
    pub loss: Tensor,
    /// The terms of each stage, in the order of the indices.
    pub stages: Vec<StageLoss>,
    /// How many dead codes were restarted after this pass.
    pub restarted: usize,
}

/// The terms that one codebook adds to the loss: scalars that carry their weights.
#[derive(Debug, Default)]
pub struct StageLoss {
    /// Draws the vectors to their codes.
    pub commitment: Option<Tensor>,
    /// Draws the codes to their vectors (codebooks learned by gradient only).
    pub codebook: Option<Tensor>,
    /// Sharp choices for each vector, all codes over the batch.
    pub entropy: Option<Tensor>,
}

impl StageLoss {
    /// The terms there are.
    pub fn terms(&self) -> impl Iterator<Item = &Tensor> {
        [&self.commitment, &self.codebook, &self.entropy]
            .into_iter()
            .flatten()
    }

    /// Their sum; `None` when there is none.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn total(&self) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for term in self.terms() {
            sum = Some(match sum {
                Some(sum) => sum.f_add(term)?,
                None => term.shallow_clone(),
            });
        }
        Ok(sum)
    }

    /// All terms times `factor`.
    pub(crate) fn scaled(self, factor: f64) -> Result<Self> {
        let scale = |t: Option<Tensor>| t.map(|t| t.f_mul_scalar(factor)).transpose();
        Ok(Self {
            commitment: scale(self.commitment)?,
            codebook: scale(self.codebook)?,
            entropy: scale(self.entropy)?,
        })
    }
}

/// The sum over stages, as a scalar beside `like`.
pub(crate) fn total(stages: &[StageLoss], like: &Tensor) -> Result<Tensor> {
    let mut sum = Tensor::f_zeros([], (sequor_nn::Kind::Float, like.device()))?;
    for stage in stages {
        if let Some(t) = stage.total()? {
            sum = sum.f_add(&t)?;
        }
    }
    Ok(sum)
}

/// The key of part `index` of a quantiser made of several: streams of different parts are
/// independent. Quantisers built on this crate derive the keys of their stages with it.
#[must_use]
pub fn part_key(key: Key, index: u64) -> Key {
    // Position 0 of this purpose is what a codebook draws its first codes from.
    let mut stream = key.stream(index.wrapping_add(1), Purpose::Init);
    Key::new(stream.next_u64(), key.request)
}
