//! The transformer block: the shared unit of every network here.

use crate::attention::{Attend, AttentionConfig, SelfAttention};
use crate::ffn::{FfnConfig, Mlp, Moe};
use crate::norm::{Norm, NormKind};
use crate::rope::RopeTables;
use crate::{ParamBuilder, Result};
use tch::Tensor;

/// Where a block's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// `x + f(norm(x))`.
    Pre,
    /// `norm(x + f(x))`.
    Post,
}

/// The feed-forward part of a block.
#[derive(Clone, Debug)]
pub enum FfnKind {
    /// One network for all rows.
    Mlp(FfnConfig),
    /// Experts of the given shape.
    Moe {
        /// Shape of one expert.
        expert: FfnConfig,
        /// Number of experts.
        experts: usize,
        /// Experts per row.
        top_k: usize,
        /// Make the chosen weights sum to one.
        renormalise: bool,
    },
}

/// Everything about one block.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// The attention part.
    pub attention: AttentionConfig,
    /// The feed-forward part.
    pub ffn: FfnKind,
    /// Which norm.
    pub norm: NormKind,
    /// Epsilon of the norms.
    pub eps: f64,
    /// Where they stand.
    pub placement: Placement,
}

#[derive(Debug)]
enum Ffn {
    Mlp(Mlp),
    Moe(Moe),
}

/// What a forward brings to every block.
pub struct Pass<'a> {
    /// Who sees whom, and the state.
    pub attend: &'a mut dyn Attend,
    /// Rotations of the rows, when the network uses them.
    pub rope: Option<&'a RopeTables>,
    /// Probability of dropping a residual update's entry; 0 outside training.
    pub dropout: f64,
}

/// Attention, then a feed-forward network, each added to the rows.
#[derive(Debug)]
pub struct Block {
    attention: SelfAttention,
    ffn: Ffn,
    norms: [Norm; 2],
    placement: Placement,
}

impl Block {
    /// Parameters `input_layernorm`, `self_attn`, `post_attention_layernorm`, `mlp`.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn new(p: &ParamBuilder, c: &BlockConfig) -> Result<Self> {
        let norm = |name: &str| Norm::new(&p.pp(name), c.norm, c.attention.dim, c.eps);
        let mlp = p.pp("mlp");
        let ffn = match &c.ffn {
            FfnKind::Mlp(f) => Ffn::Mlp(Mlp::new(&mlp, f)?),
            FfnKind::Moe {
                expert,
                experts,
                top_k,
                renormalise,
            } => Ffn::Moe(Moe::new(&mlp, expert, *experts, *top_k, *renormalise)?),
        };
        Ok(Self {
            attention: SelfAttention::new(&p.pp("self_attn"), c.attention.clone())?,
            ffn,
            norms: [norm("input_layernorm")?, norm("post_attention_layernorm")?],
            placement: c.placement,
        })
    }

    /// `x`: `[rows, dim]`, as layer number `layer`; gives `[rows, dim]`.
    ///
    /// # Errors
    /// When shapes do not fit; the message names the layer.
    pub fn forward(&self, x: &Tensor, layer: usize, pass: &mut Pass<'_>) -> Result<Tensor> {
        self.run(x, layer, pass)
            .map_err(|e| e.in_layer(&format!("layer {layer}")))
    }

    fn run(&self, x: &Tensor, layer: usize, pass: &mut Pass<'_>) -> Result<Tensor> {
        let dropout = pass.dropout;
        let add = |x: &Tensor, update: Tensor| -> Result<Tensor> {
            let update = if dropout > 0.0 {
                update.f_dropout(dropout, true)?
            } else {
                update
            };
            Ok(x.f_add(&update)?)
        };
        let [first, second] = &self.norms;
        match self.placement {
            Placement::Pre => {
                let h = add(
                    x,
                    self.attention
                        .forward(&first.forward(x)?, layer, pass.rope, pass.attend)?,
                )?;
                let update = self.feed(&second.forward(&h)?)?;
                add(&h, update)
            }
            Placement::Post => {
                let h = first.forward(&add(
                    x,
                    self.attention.forward(x, layer, pass.rope, pass.attend)?,
                )?)?;
                let update = self.feed(&h)?;
                second.forward(&add(&h, update)?)
            }
        }
    }

    fn feed(&self, x: &Tensor) -> Result<Tensor> {
        match &self.ffn {
            Ffn::Mlp(m) => m.forward(x),
            Ffn::Moe(m) => m.forward(x),
        }
    }

    /// Its norms: before attention, before the feed-forward part, then those of queries and
    /// keys where it has them.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.norms.iter().chain(self.attention.norms())
    }

    /// Bytes of weights that one row's pass reads.
    pub fn bytes(&self) -> usize {
        let ffn = match &self.ffn {
            Ffn::Mlp(m) => m.bytes(),
            Ffn::Moe(m) => m.bytes(),
        };
        self.attention.bytes() + ffn
    }
}
