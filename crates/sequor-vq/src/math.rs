//! Small formulas that several quantisers use.

use crate::Result;
use sequor_nn::Tensor;
use sequor_nn::tch::Reduction;

/// Lengths of the vectors in the last dimension, which stays with size 1.
pub(crate) fn norms(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_norm_scalaropt_dim(2, [-1], true)?)
}

/// Vectors of length 1 in the same directions; zero stays zero.
pub(crate) fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_div(&norms(x)?.f_clamp_min(1e-12)?)?)
}

/// Mean of the squared differences of all entries.
pub(crate) fn mse(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.f_mse_loss(b, Reduction::Mean)?)
}

/// `-sum p ln p` over the last dimension, in nats. Probabilities below 1e-12 count as that,
/// where the term is far below what f32 resolves: the gradient stays finite.
pub(crate) fn entropy(p: &Tensor) -> Result<Tensor> {
    let log = p.f_clamp_min(1e-12)?.f_log()?;
    Ok(p.f_mul(&log)?.f_sum_dim_intlist(-1, false, None)?.f_neg()?)
}
