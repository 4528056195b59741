//! Gradients past the choice of a code, which itself has none.

use crate::Result;
use crate::math::{norms, unit};
use sequor_nn::Tensor;
use serde::{Deserialize, Serialize};

/// How the gradient of a quantised vector becomes one of the vector that was quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// It is copied (van den Oord et al., 2017, section 3.2).
    #[default]
    StraightThrough,
    /// It is turned back by the rotation, and scaled by the ratio of lengths, that takes the
    /// vector to its code (Fifty et al., "Restructuring vector quantization with the rotation
    /// trick", 2024), so that the angle between gradient and code is kept.
    Rotation,
}

impl Estimator {
    /// `code`, exactly, with gradients to `x`; both `[.., dim]`.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn apply(self, x: &Tensor, code: &Tensor) -> Result<Tensor> {
        match self {
            Self::StraightThrough => straight_through(x, code),
            Self::Rotation => rotate(x, code),
        }
    }
}

/// `code` with the gradient of `x`. Written so that the value is `code` to the last bit:
/// the usual `x + (code - x)` is not.
///
/// # Errors
/// When the shapes differ.
pub fn straight_through(x: &Tensor, code: &Tensor) -> Result<Tensor> {
    let nothing = x.f_sub(&x.f_detach()?)?;
    Ok(code.f_detach()?.f_add(&nothing)?)
}

/// Lengths below this have no direction to turn from or to.
const TINY: f64 = 1e-6;

/// `code` with the gradient of the constant linear map `|q|/|x| R`, where `R` is the rotation
/// in the plane of `x` and `q = code` that takes one direction to the other:
/// `R = I - 2 r r' + 2 q^ x^'`, `r = (x^ + q^) / |x^ + q^|` (paper, section 4.2). Where `x`
/// or `q` is zero, the gradient is copied.
///
/// # Errors
/// When the shapes differ.
pub fn rotate(x: &Tensor, code: &Tensor) -> Result<Tensor> {
    let (from, to) = (x.f_detach()?, code.f_detach()?);
    let (length, wanted) = (norms(&from)?, norms(&to)?);
    let (x_hat, q_hat) = (unit(&from)?, unit(&to)?);
    // Opposite directions leave `r` at zero: the map is then the reflection of `x`.
    let r = unit(&x_hat.f_add(&q_hat)?)?;
    let along = |d: &Tensor| x.f_mul(d)?.f_sum_dim_intlist(-1, true, None);
    let reflected = r.f_mul(&along(&r)?)?.f_mul_scalar(2.0)?;
    let turned = q_hat.f_mul(&along(&x_hat)?)?.f_mul_scalar(2.0)?;
    let rotated = x.f_sub(&reflected)?.f_add(&turned)?;
    let ratio = wanted.f_div(&length.f_clamp_min(TINY)?)?;
    let undirected = length.f_minimum(&wanted)?.f_lt(TINY)?;
    let carrier = x.f_where_self(&undirected, &rotated.f_mul(&ratio)?)?;
    straight_through(&carrier, code)
}
