//! Feed-forward parts of a block: plain, gated, and mixtures of experts.

use crate::linear::{Joined, Linear};
use crate::matrix::kernels_take;
use crate::{Error, Init, ParamBuilder, Result};
use sequor_kernels::matmul::Isa;
use sequor_kernels::{bridge, fused, threads};
use tch::{Kind, Tensor};

/// The non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)` with the exact normal distribution function.
    Gelu,
    /// Its approximation by tanh ("gelu_new").
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Reads the name used in published configs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other names.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "silu" | "swish" => Ok(Self::Silu),
            "gelu" => Ok(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Self::GeluTanh),
            "relu" => Ok(Self::Relu),
            _ => Err(Error::Unsupported(format!(
                "activation '{name}' (known: silu, gelu, gelu_new, relu)"
            ))),
        }
    }

    fn apply(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Silu => x.f_silu()?,
            Self::Gelu => x.f_gelu("none")?,
            Self::GeluTanh => x.f_gelu("tanh")?,
            Self::Relu => x.f_relu()?,
        })
    }
}

/// Sizes of a feed-forward part.
#[derive(Clone, Debug)]
pub struct FfnConfig {
    /// Width of the rows.
    pub dim: i64,
    /// Inner width.
    pub hidden: i64,
    /// The non-linearity.
    pub activation: Activation,
    /// `down(act(gate x) * up x)` instead of `down(act(up x))`.
    pub gated: bool,
    /// Biases on all projections.
    pub bias: bool,
    /// Law of the inner projections.
    pub init: Init,
    /// Law of the output projection.
    pub out_init: Init,
}

/// A feed-forward network on each row.
#[derive(Debug)]
pub struct Mlp {
    activation: Activation,
    gated: bool,
    input: Joined,
    down: Linear,
}

impl Mlp {
    /// Parameters `gate_proj` (gated only), `up_proj`, `down_proj`.
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, c: &FfnConfig) -> Result<Self> {
        let inner = |name: &str| Linear::new(&p.pp(name), c.dim, c.hidden, c.bias, c.init);
        let parts = if c.gated {
            vec![inner("gate_proj")?, inner("up_proj")?]
        } else {
            vec![inner("up_proj")?]
        };
        let down = Linear::new(&p.pp("down_proj"), c.hidden, c.dim, c.bias, c.out_init)?;
        Ok(Self {
            activation: c.activation,
            gated: c.gated,
            input: Joined::new(parts, p)?,
            down: down.packed(p)?,
        })
    }

    /// `x`: `[rows, dim]`; gives `[rows, dim]`.
    ///
    /// # Errors
    /// When the width does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.input.forward(x)?;
        let h = if self.gated && self.activation == Activation::Silu && kernels_take(&h) {
            silu_gated(&h)?
        } else if self.gated {
            let half = self.down.input();
            self.activation
                .apply(&h.f_narrow(-1, 0, half)?)?
                .f_mul(&h.f_narrow(-1, half, half)?)?
        } else {
            self.activation.apply(&h)?
        };
        self.down.forward(&h)
    }

    /// Bytes of weights that one pass reads.
    pub fn bytes(&self) -> usize {
        self.input.bytes() + self.down.bytes()
    }
}

/// `silu(gate) * up` of rows `[.., gate and up]`, in one call of our own.
fn silu_gated(h: &Tensor) -> Result<Tensor> {
    let mut shape = h.size();
    let width = match shape.last_mut() {
        Some(last) => {
            *last /= 2;
            *last as usize
        }
        None => 0,
    };
    let h = h.f_contiguous()?;
    let (y, ()) = bridge::read(&h, |h: &[f32]| {
        bridge::build(&shape, |y: &mut [f32]| {
            fused::silu_gated(h, width, y, threads::get(), Isa::chosen());
        })
    })??;
    Ok(y)
}

/// A mixture of experts: each row goes through its `top_k` best experts (Shazeer et al.,
/// 2017; Fedus et al., 2021). No row is ever dropped.
#[derive(Debug)]
pub struct Moe {
    gate: Linear,
    experts: Vec<Mlp>,
    top_k: i64,
    renormalise: bool,
}

impl Moe {
    /// Parameters `gate` and `experts.{e}`. The router's softmax runs over all experts in
    /// f32; `renormalise` makes the chosen weights sum to one.
    ///
    /// # Errors
    /// [`Error::Config`] when `top_k` is not between 1 and the number of experts.
    pub fn new(
        p: &ParamBuilder,
        c: &FfnConfig,
        experts: usize,
        top_k: usize,
        renormalise: bool,
    ) -> Result<Self> {
        if top_k == 0 || top_k > experts {
            return Err(Error::Config(format!(
                "{top_k} experts per token out of {experts}"
            )));
        }
        let gate = Linear::new(&p.pp("gate").exact(), c.dim, experts as i64, false, c.init)?;
        let experts = (0..experts)
            .map(|e| Mlp::new(&p.pp("experts").pp(e), c))
            .collect::<Result<_>>()?;
        Ok(Self {
            gate,
            experts,
            top_k: top_k as i64,
            renormalise,
        })
    }

    /// `x`: `[rows, dim]`; gives `[rows, dim]`.
    ///
    /// # Errors
    /// When the width does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let probs = self.gate.forward(x)?.f_softmax(-1, Kind::Float)?;
        let (mut weights, chosen) = probs.f_topk(self.top_k, -1, true, true)?;
        if self.renormalise {
            weights = weights.f_div(&weights.f_sum_dim_intlist(
                [-1i64].as_slice(),
                true,
                Kind::Float,
            )?)?;
        }
        let flat: Vec<i64> = sequor_kernels::bridge::to_vec(&chosen.f_reshape([-1])?)
            .map_err(|e| Error::Input(e.to_string()))?;
        let weights = weights.f_reshape([-1])?;
        let mut out = x.f_zeros_like()?;
        for (e, expert) in self.experts.iter().enumerate() {
            let slots: Vec<i64> = (0..flat.len())
                .filter(|&s| flat[s] == e as i64)
                .map(|s| s as i64)
                .collect();
            if slots.is_empty() {
                continue;
            }
            let rows: Vec<i64> = slots.iter().map(|s| s / self.top_k).collect();
            let rows = Tensor::f_from_slice(&rows)?.f_to_device(x.device())?;
            let slots = Tensor::f_from_slice(&slots)?.f_to_device(x.device())?;
            let y = expert.forward(&x.f_index_select(0, &rows)?)?;
            let w = weights.f_index_select(0, &slots)?.f_unsqueeze(-1)?;
            out = out.f_index_add(0, &rows, &y.f_mul(&w)?)?;
        }
        Ok(out)
    }

    /// Bytes of weights that one row's pass reads.
    pub fn bytes(&self) -> usize {
        let expert = self.experts.first().map_or(0, Mlp::bytes);
        self.gate.bytes() + expert * self.top_k as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn a_mixture_equals_the_dense_sum_over_masked_probabilities() {
        let c = FfnConfig {
            dim: 6,
            hidden: 5,
            activation: Activation::Silu,
            gated: true,
            bias: false,
            init: Init::Normal(0.7),
            out_init: Init::Normal(0.7),
        };
        for renormalise in [false, true] {
            let p = ParamBuilder::init(5, Kind::Float, Device::Cpu);
            let moe = Moe::new(&p, &c, 4, 2, renormalise).unwrap();
            let x = Tensor::from_slice(
                &(0..42)
                    .map(|i| ((i * 7 % 13) as f32 - 6.0) / 5.0)
                    .collect::<Vec<_>>(),
            )
            .reshape([7, 6]);
            let probs = moe.gate.forward(&x).unwrap().softmax(-1, Kind::Float);
            let third = probs.topk(3, -1, true, true).0.narrow(1, 2, 1);
            let mut masked = &probs * probs.gt_tensor(&third).to_kind(Kind::Float);
            if renormalise {
                masked = &masked / masked.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
            }
            let mut dense = x.zeros_like();
            for (e, expert) in moe.experts.iter().enumerate() {
                dense += expert.forward(&x).unwrap() * masked.narrow(1, e as i64, 1);
            }
            let diff = (moe.forward(&x).unwrap() - dense)
                .abs()
                .max()
                .double_value(&[]);
            assert!(diff < 1e-5, "{diff}");
        }
        let p = ParamBuilder::init(5, Kind::Float, Device::Cpu);
        assert!(Moe::new(&p, &c, 4, 5, false).is_err());
    }
}
