//! The pair of linear layers between the vectors of a model and those of a codebook.

use crate::Result;
use crate::config::matrix;
use sequor_nn::linear::Linear;
use sequor_nn::{Init, ParamBuilder, Tensor};

/// `project_in` and `project_out`, or nothing where both sides have one width.
#[derive(Debug)]
pub(crate) struct Projection(Option<(Linear, Linear)>);

impl Projection {
    pub fn new(p: &ParamBuilder, outer: i64, inner: i64, bias: bool) -> Result<Self> {
        if outer == inner {
            return Ok(Self(None));
        }
        matrix("dim", outer, inner)?;
        // Never quantised: a small error here is another code.
        let p = p.exact();
        let layer = |name: &str, from: i64, to: i64| {
            let law = Init::Uniform((from as f64).sqrt().recip());
            Linear::new(&p.pp(name), from, to, bias, law)
        };
        Ok(Self(Some((
            layer("project_in", outer, inner)?,
            layer("project_out", inner, outer)?,
        ))))
    }

    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }

    pub fn inwards(&self, x: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Some((input, _)) => Ok(input.forward(x)?),
            None => Ok(x.shallow_clone()),
        }
    }

    pub fn outwards(&self, x: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Some((_, output)) => Ok(output.forward(x)?),
            None => Ok(x.shallow_clone()),
        }
    }
}
