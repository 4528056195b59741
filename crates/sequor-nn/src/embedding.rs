//! Tables of vectors: token and learned position embeddings.

use crate::linear::Linear;
use crate::{Init, ParamBuilder, Result};
use tch::{Kind, Tensor};

/// A table `[rows, dim]` looked up by index.
#[derive(Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// Parameter `weight` `[rows, dim]`.
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, rows: i64, dim: i64, init: Init) -> Result<Self> {
        Ok(Self {
            weight: p.matrix("weight", &[rows, dim], init)?,
        })
    }

    /// `ids`: any shape, int64; gives `[.., dim]` f32.
    ///
    /// # Errors
    /// When an id lies outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.weight, ids, -1, false, false)?.f_to_kind(Kind::Float)?)
    }

    /// The output head that shares this table.
    ///
    /// # Errors
    /// Never for a table made by [`Embedding::new`].
    pub fn tied_head(&self) -> Result<Linear> {
        Linear::from_weight(self.weight.shallow_clone())
    }
}
