//! The feature map that grows scale by scale.

use super::MultiScaleVq;
use crate::layout::{channels_first, channels_last};
use crate::rows::{Indices, Rows};
use crate::{Error, Result};
use sequor_nn::Tensor;

/// The sum of what the scales so far contribute: VAR's `f_hat`. A generator adds one scale at
/// a time and asks for the input of the next:
///
/// ```
/// use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
/// use sequor_vq::{MultiScaleVq, MultiScaleVqConfig};
///
/// let p = ParamBuilder::init(1, Kind::Float, Device::Cpu);
/// let vq = MultiScaleVq::new(&p, &MultiScaleVqConfig::new(8, 32, &[1, 2, 4]))?;
/// let mut features = vq.features(5);
/// for side in [1, 2, 4] {
///     let sampled = Tensor::f_zeros([5, side * side], (Kind::Int64, Device::Cpu))?;
///     features.add(&vq, &sampled)?;
///     if let Some(input) = features.next_input(&vq)? {
///         assert_eq!(input.size()[0], 5); // [batch, next side ^ 2, dim]
///     }
/// }
/// assert_eq!(features.map().unwrap().size(), [5, 8, 4, 4]);
/// # Ok::<(), sequor_vq::Error>(())
/// ```
#[derive(Debug)]
pub struct Features {
    batch: i64,
    map: Option<Tensor>,
    scales: usize,
}

impl Features {
    pub(super) fn new(batch: i64) -> Self {
        Self {
            batch,
            map: None,
            scales: 0,
        }
    }

    /// Number of scales that were added.
    pub fn scales(&self) -> usize {
        self.scales
    }

    /// The sum so far, `[batch, dim, side, side]`, which convolutional decoders take; `None`
    /// before the first scale.
    pub fn map(&self) -> Option<&Tensor> {
        self.map.as_ref()
    }

    /// The same sum, to be continued on its own: a draft, or a branch of guidance.
    #[must_use]
    pub fn fork(&self) -> Self {
        // Sums are made anew, never in place: the storage can be shared.
        Self {
            map: self.map.as_ref().map(Tensor::shallow_clone),
            ..*self
        }
    }

    /// Adds the next scale: `indices` `[batch, p * p]`, row by row.
    ///
    /// # Errors
    /// [`Error::Input`] when all scales are there, the shape is another, or an index does not
    /// exist.
    pub fn add(&mut self, vq: &MultiScaleVq, indices: &Tensor) -> Result<()> {
        let side = vq.side_of(self.scales)?;
        let codes = vq.config().codebook_size;
        let i = Indices::new(indices, &[side * side], 0, codes)?;
        let flat = i.flat.f_flatten(0, -1)?;
        let vectors = vq.codebook().rows(&flat)?;
        let shape = [-1, side * side, vq.config().dim];
        self.add_vectors(vq, &vectors.f_reshape(shape)?)
    }

    /// Adds the next scale as vectors `[batch, p * p, dim]`: codes, or mixtures of them.
    ///
    /// # Errors
    /// [`Error::Input`] when all scales are there, the shape is another, or a number is not
    /// finite.
    pub fn add_vectors(&mut self, vq: &MultiScaleVq, vectors: &Tensor) -> Result<()> {
        let (side, dim) = (vq.side_of(self.scales)?, vq.config().dim);
        let rows = Rows::new(vectors, dim)?;
        let wanted = [self.batch, side * side, dim];
        if vectors.size() != wanted {
            return Err(Error::Input(format!(
                "scale {} has the shape {:?}: expected {wanted:?}",
                self.scales,
                vectors.size()
            )));
        }
        let picture = rows.flat.f_reshape([self.batch, side, side, dim])?;
        let h = vq.contribution(&channels_first(&picture)?, self.scales)?;
        self.map = Some(match &self.map {
            Some(map) => map.f_add(&h)?,
            None => h,
        });
        self.scales += 1;
        Ok(())
    }

    /// The features averaged down to the next scale, `[batch, p * p, dim]`: what a predictor
    /// of that scale is given. `None` before the first scale and after the last.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn next_input(&self, vq: &MultiScaleVq) -> Result<Option<Tensor>> {
        let Some(map) = self
            .map
            .as_ref()
            .filter(|_| self.scales < vq.scales().len())
        else {
            return Ok(None);
        };
        let small = channels_last(&vq.down(map, self.scales)?)?;
        Ok(Some(small.f_flatten(1, 2)?))
    }
}
