//! Tables of vectors: token and learned position embeddings.

use crate::linear::{Linear, prefers_transposed};
use crate::{Init, ParamBuilder, Result};
use tch::{Kind, Tensor};

/// A table `[rows, dim]` looked up by index.
#[derive(Debug)]
pub struct Embedding {
    weight: Tensor,
    /// `[dim, rows]` instead, in the order that suits a head that shares the table.
    transposed: bool,
}

impl Embedding {
    /// Parameter `weight` `[rows, dim]`.
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, rows: i64, dim: i64, init: Init) -> Result<Self> {
        Ok(Self {
            weight: p.matrix("weight", &[rows, dim], init)?,
            transposed: false,
        })
    }

    /// `ids`: any shape, int64; gives `[.., dim]` f32.
    ///
    /// # Errors
    /// When an id lies outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        if !self.transposed {
            return Ok(
                Tensor::f_embedding(&self.weight, ids, -1, false, false)?.f_to_kind(Kind::Float)?
            );
        }
        // A head reads the whole table for every token, a lookup one column of it.
        let mut shape = ids.size();
        shape.push(self.weight.size()[0]);
        let columns = self.weight.f_index_select(1, &ids.f_reshape([-1])?)?;
        Ok(columns.f_t_copy()?.f_reshape(shape)?)
    }

    /// The output head that shares this table. For inference the shared table is put into
    /// the order that suits the head.
    ///
    /// # Errors
    /// When libtorch cannot make the copy.
    pub fn tied_head(&mut self, p: &ParamBuilder) -> Result<Linear> {
        if p.may_join() && !self.transposed && prefers_transposed(&self.weight) {
            self.weight = self.weight.f_t_copy()?.f_contiguous()?;
            self.transposed = true;
        }
        let weight = self.weight.shallow_clone();
        if self.transposed {
            Linear::from_transposed(weight)
        } else {
            Linear::from_weight(weight)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn a_transposed_table_is_the_same_table() {
        let p = ParamBuilder::init(1, Kind::Float, Device::Cpu);
        let mut e = Embedding::new(&p, 7, 3, Init::Normal(1.0)).unwrap();
        let ids = Tensor::from_slice(&[4i64, 0, 6, 4]).reshape([2, 2]);
        let plain = e.forward(&ids).unwrap();
        e.weight = e.weight.t_copy().contiguous();
        e.transposed = true;
        let turned = e.forward(&ids).unwrap();
        assert_eq!(turned.size(), [2, 2, 3]);
        assert_eq!((plain - turned).abs().max().double_value(&[]), 0.0);
        assert!(e.forward(&Tensor::from_slice(&[7i64])).is_err());
        let head = e.tied_head(&p).unwrap();
        assert_eq!((head.input(), head.output()), (3, 7));
    }
}
