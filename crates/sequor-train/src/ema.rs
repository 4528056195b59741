//! Exponential moving average of the weights.

use sequor_nn::Tensor;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::weights::TensorSource;

use crate::flat::Layout;
use crate::{Error, Result};

/// Averaged f32 weights: `e = b e + (1 - b) w`, where `b` after `t` updates is
/// `min(decay, (1 + t) / (10 + t))`, so that early averages forget the start quickly.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    average: Tensor,
}

impl Ema {
    /// Begins at the weights `master`.
    ///
    /// # Errors
    /// [`Error::Config`] when `decay` does not lie in `[0, 1)`.
    pub fn new(master: &Tensor, decay: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&decay) {
            return Err(Error::Config(format!("ema = {decay} must lie in [0, 1)")));
        }
        let _no_grad = no_grad_guard();
        let mut average = master.f_zeros_like()?;
        average.f_copy_(master)?;
        Ok(Self { decay, average })
    }

    /// Takes in the weights after update number `t`, counted from 1.
    ///
    /// # Errors
    /// When `master` has another length.
    pub fn update(&mut self, master: &Tensor, t: u64) -> Result<()> {
        let _no_grad = no_grad_guard();
        let t = t as f64;
        let b = self.decay.min((1.0 + t) / (10.0 + t));
        let _ = self.average.f_lerp_(master, 1.0 - b)?;
        Ok(())
    }

    /// The average as a flat vector.
    pub fn average(&self) -> &Tensor {
        &self.average
    }

    /// Takes up a saved average.
    ///
    /// # Errors
    /// [`Error::Weights`] naming a tensor that is missing or has another shape.
    pub fn load(&mut self, layout: &Layout, source: &dyn TensorSource) -> Result<()> {
        layout.fill(&self.average, "", source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_its_formula() {
        let at = |x: f32| Tensor::from_slice(&[x]);
        let mut ema = Ema::new(&at(1.0), 0.5).unwrap();
        let mut want = 1.0;
        for (t, x) in [2.0f32, -1.0, 4.0].into_iter().enumerate() {
            ema.update(&at(x), t as u64 + 1).unwrap();
            let t = t as f64 + 1.0;
            let b = 0.5f64.min((1.0 + t) / (10.0 + t));
            want = b * want + (1.0 - b) * f64::from(x);
        }
        assert!((ema.average().double_value(&[0]) - want).abs() < 1e-6);
        assert!(Ema::new(&at(1.0), 1.0).is_err());
    }
}
