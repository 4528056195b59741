//! Layers left out: the prompt decides which layers decoding will run (FiRST, Jain et al.
//! 2024, arXiv 2410.12513).
//!
//! Every layer has a router, one linear map and a sigmoid. While the prompt is taken in, the
//! routers look at its rows, and each layer is kept or left out once for the whole sequence.
//! A kept layer has the keys and values of every row, so that there are no holes to mend.
//!
//! - [`Routers`] are the small networks, [`RouterFolder`] what training leaves on disk;
//! - [`LayerSelection`] says who decides: the routers, or a fixed set to compare with;
//! - [`RoutedLm`] is a [`TargetModel`](sequor_sampling::TargetModel) that decodes with the
//!   chosen layers, [`RoutedState`] its memory;
//! - [`gated_forward`] is the forward of training, with soft or hard gates;
//! - [`load_adapted`] and [`adapt`] load a model with a low-rank adapter, for use and for
//!   training.
//!
//! Text from fewer layers is not the full model's text: this trades quality for speed. It is
//! lossless only as a draft that the full model verifies
//! ([`DraftModel`](sequor_sampling::draft::DraftModel) around a [`RoutedLm`]).

mod adapted;
mod folder;
mod gated;
mod model;
mod policy;
mod state;

#[cfg(test)]
mod tests;

pub use adapted::{adapt, load_adapted};
pub use folder::{RouterConfig, RouterFolder};
pub use gated::{Gating, RoutedPass, gated_forward, soft_layer};
pub use model::RoutedLm;
pub use policy::{GateRule, LayerScore, LayerSelection, Policy, Prefill};
pub use state::RoutedState;

use std::rc::Rc;

use sequor_nn::linear::Linear;
use sequor_nn::{Error, Init, Kind, ParamBuilder, Result, Tensor};

/// Added to the mean square of a row before its root is taken.
const EPS: f64 = 1e-6;

/// One router per layer: `r_l(h) = sigmoid(w_l . n(h) + b_l)`, where `n` divides a row by its
/// root mean square, so that the size of the rows, which grows from layer to layer, does not
/// matter. Clones share their weights.
#[derive(Clone, Debug)]
pub struct Routers {
    layers: Rc<[Linear]>,
    dim: i64,
}

impl Routers {
    /// Parameters `routers.{i}.weight` `[1, dim]` and `routers.{i}.bias` `[1]`, zero at first.
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, layers: usize, dim: i64) -> Result<Self> {
        let routers = p.pp("routers");
        let layers = (0..layers)
            .map(|i| Linear::new(&routers.pp(i), dim, 1, true, Init::Zeros))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            layers: layers.into(),
            dim,
        })
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of the rows.
    pub fn dim(&self) -> i64 {
        self.dim
    }

    /// What the router of `layer` says to `rows` `[rows, dim]`, the inputs of that layer:
    /// `[rows]` in (0, 1).
    ///
    /// # Errors
    /// [`Error::Input`] when there is no such layer; when the width does not fit.
    pub fn probabilities(&self, layer: usize, rows: &Tensor) -> Result<Tensor> {
        let router = self.layers.get(layer).ok_or_else(|| {
            Error::Input(format!(
                "layer {layer} of routers for {} layers",
                self.layers.len()
            ))
        })?;
        let size = rows
            .f_square()?
            .f_mean_dim([-1i64].as_slice(), true, Kind::Float)?;
        let normed = rows.f_mul(&size.f_add_scalar(EPS)?.f_rsqrt()?)?;
        Ok(router.forward(&normed)?.f_squeeze_dim(-1)?.f_sigmoid()?)
    }
}
