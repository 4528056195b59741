//! Gradients of one step, summed over its micro-batches in f32.

use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Kind, Tensor};

use crate::Result;
use crate::flat::Layout;

/// A flat f32 vector into which the gradients of micro-batches are added.
///
/// libtorch's own `.grad` buffers are not used: they take the parameters' number
/// format, in which sums of many micro-batches lose digits, and whether one exists
/// already changes the arithmetic after a resume.
#[derive(Debug)]
pub struct Gradients {
    params: Vec<Tensor>,
    flat: Tensor,
    views: Vec<Tensor>,
}

impl Gradients {
    /// Zero gradients for the parameters of a layout.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub fn new(layout: &Layout) -> Result<Self> {
        let flat = layout.zeros()?;
        Ok(Self {
            params: layout.params(),
            views: layout.views(&flat)?,
            flat,
        })
    }

    /// Back to zero.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn clear(&mut self) -> Result<()> {
        let _ = self.flat.f_zero_()?;
        Ok(())
    }

    /// Adds the gradient of `loss`, a scalar. Parameters that the loss does not depend
    /// on are left as they are.
    ///
    /// # Errors
    /// When `loss` is not a scalar or has no gradient.
    pub fn add(&mut self, loss: &Tensor) -> Result<()> {
        let grads = Tensor::f_run_backward(&[loss], &self.params, false, false)?;
        let _no_grad = no_grad_guard();
        for (view, grad) in self.views.iter_mut().zip(grads) {
            if grad.defined() {
                // Mixed formats add in f32.
                let _ = view.f_add_(&grad.f_to_kind(Kind::Float)?)?;
            }
        }
        Ok(())
    }

    /// The flat vector.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The flat vector, to be reduced over processes or scaled.
    pub fn flat_mut(&mut self) -> &mut Tensor {
        &mut self.flat
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::tests::builder;

    #[test]
    fn micro_batches_add_up_and_unused_parameters_stay_zero() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let p = builder(kind);
            let layout = Layout::new(p.params()).unwrap();
            let mut grads = Gradients::new(&layout).unwrap();
            let bias = p
                .params()
                .into_iter()
                .find(|p| p.name == "b.bias")
                .unwrap()
                .tensor;
            for factor in [1.0, 2.5] {
                grads
                    .add(&(bias.to_kind(Kind::Float) * factor).sum(Kind::Float))
                    .unwrap();
            }
            let got = Vec::<f32>::try_from(grads.flat()).unwrap();
            assert_eq!(got, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.5, 3.5]);
            grads.clear().unwrap();
            assert_eq!(grads.flat().abs().max().double_value(&[]), 0.0);
        }
    }
}
