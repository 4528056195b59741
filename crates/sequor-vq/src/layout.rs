//! Where the channels are.

use crate::{Error, Result};
use sequor_nn::Tensor;

/// `[batch, channels, ..]` to `[batch, .., channels]`, as a view: from the layout of
/// convolutions to that of the quantisers.
///
/// # Errors
/// [`Error::Input`] when there are fewer than two dimensions.
pub fn channels_last(x: &Tensor) -> Result<Tensor> {
    moved(x, 1, -1)
}

/// `[batch, .., channels]` to `[batch, channels, ..]`, as a view: the inverse of
/// [`channels_last`].
///
/// # Errors
/// [`Error::Input`] when there are fewer than two dimensions.
pub fn channels_first(x: &Tensor) -> Result<Tensor> {
    moved(x, -1, 1)
}

fn moved(x: &Tensor, from: i64, to: i64) -> Result<Tensor> {
    if !x.defined() || x.dim() < 2 {
        return Err(Error::Input(
            "a batch with channels has at least two dimensions".into(),
        ));
    }
    Ok(x.f_movedim_int(from, to)?)
}
