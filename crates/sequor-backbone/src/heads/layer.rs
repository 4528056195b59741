//! The one decoder layer that Hydra++ and EAGLE own.

use super::config::LayerConfig;
use sequor_nn::attention::{Attend, AttentionConfig, SelfAttention};
use sequor_nn::ffn::{Activation, FfnConfig, Mlp};
use sequor_nn::norm::{Norm, NormKind};
use sequor_nn::rope::Rope;
use sequor_nn::{Init, ParamBuilder, Result, Tensor};

/// A Llama decoder layer with RMS norms. EAGLE has no norm before attention; Hydra++ may
/// have one behind the layer.
#[derive(Debug)]
pub(super) struct DraftLayer {
    before: Option<Norm>,
    attention: SelfAttention,
    between: Norm,
    mlp: Mlp,
    behind: Option<Norm>,
    rope: Rope,
}

impl DraftLayer {
    /// Parameters under their names in `LlamaForCausalLM`, and `norm`. `out_init` is the law
    /// of what is added to the rows: with zeros the layer begins as the identity.
    pub fn new(
        p: &ParamBuilder,
        c: &LayerConfig,
        dim: i64,
        input_norm: bool,
        out_init: Init,
    ) -> Result<Self> {
        let init = Init::Normal(0.02);
        let rope = c.rotary(dim)?;
        let norm = |name: &str| Norm::new(&p.pp(name), NormKind::Rms, dim, c.eps);
        let attention = AttentionConfig {
            dim,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: None,
            window: None,
            scale: None,
            init,
            out_init,
        };
        let mlp = FfnConfig {
            dim,
            hidden: c.ffn,
            activation: Activation::Silu,
            gated: true,
            bias: false,
            init,
            out_init,
        };
        Ok(Self {
            before: input_norm.then(|| norm("input_layernorm")).transpose()?,
            attention: SelfAttention::new(&p.pp("self_attn"), attention)?,
            between: norm("post_attention_layernorm")?,
            mlp: Mlp::new(&p.pp("mlp"), &mlp)?,
            behind: c.final_norm.then(|| norm("norm")).transpose()?,
            rope,
        })
    }

    /// `x`: `[rows, dim]` at these positions, seeing each other by `attend`; gives
    /// `[rows, dim]`. `dropout` is the probability of dropping entries of what is added.
    pub fn forward(
        &self,
        x: &Tensor,
        positions: &[i64],
        attend: &mut dyn Attend,
        dropout: f64,
    ) -> Result<Tensor> {
        let positions: Vec<f32> = positions.iter().map(|&p| p as f32).collect();
        let rope = self.rope.tables(&[&positions], x.device())?;
        let add = |x: &Tensor, update: Tensor| -> Result<Tensor> {
            Ok(x.f_add(&super::network::drop(update, dropout)?)?)
        };
        let normed = match &self.before {
            Some(norm) => norm.forward(x)?,
            None => x.shallow_clone(),
        };
        let h = add(x, self.attention.forward(&normed, 0, Some(&rope), attend)?)?;
        let y = add(&h, self.mlp.forward(&self.between.forward(&h)?)?)?;
        match &self.behind {
            Some(norm) => norm.forward(&y),
            None => Ok(y),
        }
    }
}
