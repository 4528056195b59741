//! The decoder: one readable network for every family of `config`.

use crate::config::{DecoderConfig, PositionKind};
use sequor_nn::attention::{Attend, AttentionConfig, Dense};
use sequor_nn::block::{Block, BlockConfig, FfnKind, Pass};
use sequor_nn::embedding::Embedding;
use sequor_nn::ffn::FfnConfig;
use sequor_nn::linear::Linear;
use sequor_nn::mask::Mask;
use sequor_nn::norm::Norm;
use sequor_nn::rope::RopeTables;
use sequor_nn::{Device, Error, Init, Kind, ParamBuilder, Result, Tensor};

/// A decoder-only transformer: embed, blocks, norm, head.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) config: DecoderConfig,
    pub(crate) embed: Embedding,
    positions: Option<(Embedding, i64)>,
    /// Projections between token embeddings and rows of another width (OPT-350m).
    project: Option<(Linear, Linear)>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Option<Norm>,
    pub(crate) head: Linear,
    device: Device,
}

/// What a forward starts from.
pub enum Input<'a> {
    /// Token ids `[rows]`, int64.
    Ids(&'a Tensor),
    /// Rows `[rows, dim]`, f32, already embedded.
    Embeds(&'a Tensor),
}

/// What a forward leaves behind.
#[derive(Debug)]
pub struct Hidden {
    /// Rows after the final norm `[rows, dim]`, ready for [`Decoder::logits`].
    pub last: Tensor,
    /// Rows after the layers asked for, in that order, each `[rows, dim]`.
    pub taps: Vec<Tensor>,
}

impl Decoder {
    /// Builds the network from its parameters, by their canonical names
    /// (those of `LlamaForCausalLM`; `keys` maps other families onto them).
    ///
    /// # Errors
    /// When the configuration contradicts itself or a file cannot be read. Missing and
    /// mis-shaped tensors are reported by [`ParamBuilder::finish`].
    pub fn new(p: &ParamBuilder, config: &DecoderConfig) -> Result<Self> {
        let c = config;
        let model = p.pp("model");
        let init = Init::Normal(c.init_std);
        let mut embed = Embedding::new(&model.pp("embed_tokens"), c.vocab_size, c.embed_dim, init)?;
        // The head comes first: what it copies for a moment is gone before the rest is read.
        let head = if c.tied {
            p.ignore("lm_head.weight"); // some files carry the copy
            embed.tied_head(p)?
        } else {
            Linear::new(&p.pp("lm_head"), c.embed_dim, c.vocab_size, false, init)?.packed(p)?
        };
        let positions = match &c.positions {
            PositionKind::Rotary(_) => None,
            PositionKind::Learned { rows, offset } => Some((
                Embedding::new(&model.pp("embed_positions"), *rows, c.dim, init)?,
                *offset,
            )),
        };
        let project = if c.embed_dim == c.dim {
            None
        } else {
            let into = Linear::new(&model.pp("project_in"), c.embed_dim, c.dim, false, init)?;
            Some((
                into,
                Linear::new(&model.pp("project_out"), c.dim, c.embed_dim, false, init)?,
            ))
        };
        let blocks = (0..c.layers)
            .map(|i| Block::new(&model.pp("layers").pp(i), &block(c, i)))
            .collect::<Result<Vec<_>>>()?;
        let norm = if c.final_norm {
            Some(Norm::new(&model.pp("norm"), c.norm, c.dim, c.eps)?)
        } else {
            None
        };
        Ok(Self {
            config: c.clone(),
            embed,
            positions,
            project,
            blocks,
            norm,
            head,
            device: p.device(),
        })
    }

    /// What it is made of.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Bytes of weights that one token's pass reads.
    pub fn bytes_per_token(&self) -> usize {
        self.blocks.iter().map(Block::bytes).sum::<usize>() + self.head.bytes()
    }

    /// Runs the whole network. `positions[i]` is the place of row `i` in its sequence; who
    /// sees whom is up to `attend`. Rows after the layers in `taps` are kept (layer `i` means
    /// the output of block `i`).
    ///
    /// # Errors
    /// When shapes do not fit; the message names the layer.
    pub fn forward(
        &self,
        input: &Input<'_>,
        positions: &[i64],
        attend: &mut dyn Attend,
        dropout: f64,
        taps: &[usize],
    ) -> Result<Hidden> {
        let rows = self.input_rows(input, positions, dropout)?;
        let rope = self.rotations(positions)?;
        let mut pass = Pass {
            attend,
            rope: rope.as_ref(),
            dropout,
        };
        let (rows, taps) = self.run_layers(0..self.blocks.len(), rows, &mut pass, taps)?;
        let last = self.finish(&rows)?;
        Ok(Hidden { last, taps })
    }

    /// Continues from an intermediate layer: `rows` `[rows, dim]` are outputs of block
    /// `layer - 1` (for `layer` 0, of [`input_rows`](Self::input_rows)), and run through
    /// block `layer` and all that follow. Everything else is as in
    /// [`forward`](Self::forward).
    ///
    /// # Errors
    /// When there is no such layer or shapes do not fit; the message names the layer.
    pub fn forward_from(
        &self,
        layer: usize,
        rows: &Tensor,
        positions: &[i64],
        attend: &mut dyn Attend,
        taps: &[usize],
    ) -> Result<Hidden> {
        if layer > self.blocks.len() {
            return Err(Error::Input(format!(
                "layer {layer} of a network of {} layers",
                self.blocks.len()
            )));
        }
        let rope = self.rotations(positions)?;
        let mut pass = Pass {
            attend,
            rope: rope.as_ref(),
            dropout: 0.0,
        };
        let rows = rows.shallow_clone();
        let (rows, taps) = self.run_layers(layer..self.blocks.len(), rows, &mut pass, taps)?;
        let last = self.finish(&rows)?;
        Ok(Hidden { last, taps })
    }

    /// What the first block reads: embeddings, brought to the width of the rows, plus
    /// learned positions where the family has them; `[rows, dim]`.
    ///
    /// # Errors
    /// When an id or a position lies outside its table.
    pub fn input_rows(&self, input: &Input<'_>, positions: &[i64], dropout: f64) -> Result<Tensor> {
        let mut x = match input {
            Input::Ids(ids) => {
                let x = self.embed.forward(ids)?;
                match &self.project {
                    Some((into, _)) => into.forward(&x)?,
                    None => x,
                }
            }
            Input::Embeds(x) => x.shallow_clone(),
        };
        if let Some((table, offset)) = &self.positions {
            let ids: Vec<i64> = positions.iter().map(|p| p + offset).collect();
            x = x.f_add(&table.forward(&Tensor::f_from_slice(&ids)?.f_to_device(self.device)?)?)?;
        }
        if dropout > 0.0 {
            x = x.f_dropout(dropout, true)?;
        }
        Ok(x)
    }

    /// Rotations of rows at these positions; `None` for families with learned positions.
    ///
    /// # Errors
    /// When the tables cannot be made.
    pub fn rotations(&self, positions: &[i64]) -> Result<Option<RopeTables>> {
        match &self.config.positions {
            PositionKind::Rotary(rope) => {
                let positions: Vec<f32> = positions.iter().map(|&p| p as f32).collect();
                Ok(Some(rope.tables(&[&positions], self.device)?))
            }
            PositionKind::Learned { .. } => Ok(None),
        }
    }

    /// Runs the blocks named by `layers`, in that order, over `rows` `[rows, dim]`: the loop
    /// behind every forward. All of them are a plain forward, the first few an early exit,
    /// the last few a continuation, any others a network with layers left out. Gives the
    /// rows, not yet normed, and those after the layers in `taps`.
    ///
    /// # Errors
    /// [`Error::Input`] for a layer that does not exist or a tap that does not run; when
    /// shapes do not fit.
    pub fn run_layers(
        &self,
        layers: impl IntoIterator<Item = usize>,
        rows: Tensor,
        pass: &mut Pass<'_>,
        taps: &[usize],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let mut x = rows;
        let mut kept: Vec<Option<Tensor>> = taps.iter().map(|_| None).collect();
        for layer in layers {
            let block = self.blocks.get(layer).ok_or_else(|| {
                let n = self.blocks.len();
                Error::Input(format!("layer {layer} of a network of {n} layers"))
            })?;
            x = block.forward(&x, layer, pass)?;
            for (_, keep) in taps.iter().zip(&mut kept).filter(|(tap, _)| **tap == layer) {
                *keep = Some(x.shallow_clone());
            }
        }
        let taps = kept.into_iter().collect::<Option<Vec<_>>>();
        let taps = taps.ok_or_else(|| {
            Error::Input(format!(
                "a tap lies outside the layers that run (of {})",
                self.blocks.len()
            ))
        })?;
        Ok((x, taps))
    }

    /// The final norm, and the way back to the width of the embeddings where it differs:
    /// from rows of any layer `[rows, dim]` to rows that [`logits`](Self::logits) takes.
    ///
    /// # Errors
    /// When the width does not fit.
    pub fn finish(&self, rows: &Tensor) -> Result<Tensor> {
        let last = match &self.norm {
            Some(norm) => norm.forward(rows)?,
            None => rows.shallow_clone(),
        };
        match &self.project {
            Some((_, out)) => out.forward(&last),
            None => Ok(last),
        }
    }

    /// All norms, layer by layer, the final one last.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.blocks
            .iter()
            .flat_map(Block::norms)
            .chain(self.norm.as_ref())
    }

    /// The rows of the input embedding for `ids` (any shape, int64): `[.., embed_dim]` f32.
    ///
    /// # Errors
    /// When an id lies outside the vocabulary.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.embed.forward(ids)
    }

    /// The output head, `[vocab, embed_dim]`, without a copy.
    pub fn head(&self) -> &Linear {
        &self.head
    }

    /// Scores over the vocabulary, `[rows, vocab]` f32, for rows of [`Hidden::last`].
    ///
    /// # Errors
    /// When the width does not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    /// The reference forward: `ids` `[batch, time]` int64, all at once and without state;
    /// gives logits `[batch, time, vocab]` f32. Also the forward of training, where
    /// `dropout` is above 0 and gradients are recorded.
    ///
    /// # Errors
    /// [`Error::Input`] for ids outside the vocabulary or another shape;
    /// [`Error::Limits`] for a text longer than the context.
    pub fn forward_dense(&self, ids: &Tensor, dropout: f64) -> Result<Tensor> {
        let [batch, time] = ids.size()[..] else {
            return Err(Error::Input(format!(
                "input_ids must be [batch, time], not {:?}",
                ids.size()
            )));
        };
        if time as usize > self.config.context {
            return Err(Error::Limits(format!(
                "a text of {time} tokens is longer than the model's context of {}",
                self.config.context
            )));
        }
        if batch * time == 0 {
            return Ok(Tensor::f_zeros(
                [batch, time, self.config.vocab_size],
                (Kind::Float, self.device),
            )?);
        }
        let ids = ids.f_to_device(self.device)?.f_to_kind(Kind::Int64)?;
        let (low, high) = (
            ids.f_min()?.f_int64_value(&[])?,
            ids.f_max()?.f_int64_value(&[])?,
        );
        if low < 0 || high >= self.config.vocab_size {
            let bad = if low < 0 { low } else { high };
            return Err(Error::Input(format!(
                "token id {bad} lies outside the vocabulary of {}",
                self.config.vocab_size
            )));
        }
        let positions: Vec<i64> = (0..batch).flat_map(|_| 0..time).collect();
        let mut attend = Dense::new(batch, time, Mask::Causal);
        let hidden = self.forward(
            &Input::Ids(&ids.f_reshape([-1])?),
            &positions,
            &mut attend,
            dropout,
            &[],
        )?;
        Ok(self.logits(&hidden.last)?.f_reshape([batch, time, -1])?)
    }
}

/// The configuration of block `i`.
fn block(c: &DecoderConfig, i: usize) -> BlockConfig {
    let init = Init::Normal(c.init_std);
    // Each of the 2L residual updates adds variance; scaling keeps the sum level (GPT-2).
    let out_init = Init::Normal(c.init_std / (2.0 * c.layers as f64).sqrt());
    let ffn = |hidden: i64| FfnConfig {
        dim: c.dim,
        hidden,
        activation: c.activation,
        gated: c.gated,
        bias: c.mlp_bias,
        init,
        out_init,
    };
    let plain = if c.scale_scores {
        (c.head_dim as f64).sqrt().recip()
    } else {
        1.0
    };
    BlockConfig {
        attention: AttentionConfig {
            dim: c.dim,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            qkv_bias: c.qkv_bias,
            out_bias: c.out_bias,
            qk_norm: c.qk_norm.then_some(c.eps),
            window: c.windows.get(i).copied().flatten(),
            scale: Some(if c.scale_by_layer {
                plain / (i + 1) as f64
            } else {
                plain
            }),
            init,
            out_init,
        },
        ffn: match &c.moe {
            Some(m) if m.layers.get(i) == Some(&true) => FfnKind::Moe {
                expert: ffn(m.hidden),
                experts: m.experts,
                top_k: m.top_k,
                renormalise: m.renormalise,
            },
            _ => FfnKind::Mlp(ffn(c.hidden)),
        },
        norm: c.norm,
        eps: c.eps,
        placement: c.placement,
    }
}
