//! Layer norms. Both work in f32 whatever the number format of the weights.

use crate::matrix::kernels_take;
use crate::{Error, Init, ParamBuilder, Result};
use sequor_kernels::matmul::Isa;
use sequor_kernels::{bridge, fused, threads};
use tch::Tensor;

/// Which of the two norms a network uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * weight` (Zhang and Sennrich, 2019).
    Rms,
    /// `(x - mean) / std * weight + bias` (Ba et al., 2016).
    Layer,
}

/// A norm over the last dimension.
#[derive(Debug)]
pub struct Norm {
    kind: NormKind,
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl Norm {
    /// Parameters `weight` (and `bias` for [`NormKind::Layer`]) of length `dim`.
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, kind: NormKind, dim: i64, eps: f64) -> Result<Self> {
        let bias = match kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(p.vector("bias", &[dim], Init::Zeros)?),
        };
        Ok(Self {
            kind,
            weight: p.vector("weight", &[dim], Init::Ones)?,
            bias,
            eps,
        })
    }

    /// The scale, `[dim]` f32.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// RMS norm in one call of our own.
    fn rms(&self, x: &Tensor) -> Result<Tensor> {
        let (shape, width) = (x.size(), self.weight.size());
        if shape.last() != width.first() {
            return Err(Error::Input(format!(
                "a norm of width {width:?} was given rows of shape {shape:?}"
            )));
        }
        let x = x.f_contiguous()?;
        let (y, ()) = bridge::read(&x, |x: &[f32]| {
            bridge::read(&self.weight, |w: &[f32]| {
                bridge::build(&shape, |y: &mut [f32]| {
                    fused::rms_norm(x, w, self.eps as f32, y, threads::get(), Isa::chosen());
                })
            })
        })???;
        Ok(y)
    }

    /// `x`: `[.., dim]` f32; the same shape comes back.
    ///
    /// # Errors
    /// When the last dimension is not `dim`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.kind {
            NormKind::Rms if kernels_take(x) && !self.weight.requires_grad() => self.rms(x),
            // libtorch's own rms_norm is a composite of more operations than this.
            NormKind::Rms => {
                let mut mean_square = x.f_square()?.f_mean_dim([-1i64].as_slice(), true, None)?;
                let scale = mean_square.f_add_scalar_(self.eps)?.f_rsqrt_()?;
                Ok((x.f_mul(&scale)?).f_mul(&self.weight)?)
            }
            NormKind::Layer => Ok(x.f_layer_norm(
                self.weight.size(),
                Some(&self.weight),
                self.bias.as_ref(),
                self.eps,
                false,
            )?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn both_norms_agree_with_their_definitions() {
        let p = ParamBuilder::init(3, Kind::Float, Device::Cpu);
        let x = Tensor::from_slice(&[1.0f32, -2.0, 4.0, 0.5, 0.25, -3.0]).reshape([2, 3]);
        let rms = Norm::new(&p.pp("r"), NormKind::Rms, 3, 1e-6)
            .unwrap()
            .forward(&x)
            .unwrap();
        let rms: Vec<f32> = Vec::try_from(rms.detach().reshape([-1])).unwrap();
        let scale = ((1.0f32 + 4.0 + 16.0) / 3.0 + 1e-6).sqrt();
        for (got, want) in rms.iter().zip([1.0 / scale, -2.0 / scale, 4.0 / scale]) {
            assert!((got - want).abs() < 1e-6);
        }
        let layer = Norm::new(&p.pp("l"), NormKind::Layer, 3, 1e-5)
            .unwrap()
            .forward(&x)
            .unwrap();
        assert!(
            layer
                .mean_dim([1i64].as_slice(), false, None)
                .abs()
                .max()
                .double_value(&[])
                < 1e-6
        );
    }
}
