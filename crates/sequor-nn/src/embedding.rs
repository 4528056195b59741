//! Tables of vectors: token and learned position embeddings.

use crate::linear::Linear;
use crate::matrix::Matrix;
use crate::{Init, ParamBuilder, Result};
use tch::Tensor;

/// A table `[rows, dim]` looked up by index.
#[derive(Debug)]
pub struct Embedding {
    table: Matrix,
}

impl Embedding {
    /// Parameter `weight` `[rows, dim]`.
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, rows: i64, dim: i64, init: Init) -> Result<Self> {
        Ok(Self {
            table: p.weight("weight", rows, dim, init)?,
        })
    }

    /// `ids`: any shape, int64; gives `[.., dim]` f32.
    ///
    /// # Errors
    /// When an id lies outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.table.rows(ids)
    }

    /// The output head that shares this table. For inference the shared table is put into
    /// the order that suits the head.
    ///
    /// # Errors
    /// When libtorch cannot make the copy.
    pub fn tied_head(&mut self, p: &ParamBuilder) -> Result<Linear> {
        if p.may_join() {
            let table = std::mem::replace(&mut self.table, Matrix::Dense(Tensor::new()));
            self.table = table.pack()?;
        }
        Ok(Linear::from_matrix(self.table.share()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn a_transposed_table_is_the_same_table() {
        let p = ParamBuilder::init(1, Kind::Float, Device::Cpu);
        let mut e = Embedding::new(&p, 7, 3, Init::Normal(1.0)).unwrap();
        let ids = Tensor::from_slice(&[4i64, 0, 6, 4]).reshape([2, 2]);
        let plain = e.forward(&ids).unwrap();
        e.table = Matrix::Transposed(e.table.expand().unwrap().t_copy().contiguous());
        let turned = e.forward(&ids).unwrap();
        assert_eq!(turned.size(), [2, 2, 3]);
        assert_eq!((plain - turned).abs().max().double_value(&[]), 0.0);
        assert!(e.forward(&Tensor::from_slice(&[7i64])).is_err());
        let head = e.tied_head(&p).unwrap();
        assert_eq!((head.input(), head.output()), (3, 7));
    }
}
