//! Clipping by the global norm (Pascanu et al., 2013).

use sequor_nn::Tensor;

use crate::Result;

/// The L2 norm of a flat gradient. One number is read from the device.
///
/// # Errors
/// When libtorch refuses.
pub fn norm(gradient: &Tensor) -> Result<f64> {
    Ok(gradient.f_norm()?.f_double_value(&[])?)
}

/// The factor that brings a gradient of this norm to at most `max`; 1 when it is
/// shorter already, or when `max` is 0, which means no clipping.
pub fn factor(norm: f64, max: f64) -> f64 {
    if max > 0.0 && norm > max {
        max / (norm + 1e-6)
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_are_shortened_and_short_ones_left() {
        let g = Tensor::from_slice(&[3.0f32, 4.0]);
        assert_eq!(norm(&g).unwrap(), 5.0);
        assert!((factor(5.0, 1.0) * 5.0 - 1.0).abs() < 1e-6);
        assert_eq!(factor(0.5, 1.0), 1.0);
        assert_eq!(factor(5.0, 0.0), 1.0);
        assert!(norm(&Tensor::from_slice(&[f32::NAN])).unwrap().is_nan());
    }
}
