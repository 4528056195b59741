//! The networks of draft heads and their forward in training.

use super::config::{HeadsConfig, HeadsKind};
use super::layer::DraftLayer;
use sequor_nn::attention::Dense;
use sequor_nn::linear::{Joined, Linear};
use sequor_nn::mask::Mask;
use sequor_nn::{Error, Init, ParamBuilder, Result, Tensor};

/// Draft heads of one kind with their weights.
#[derive(Debug)]
pub struct Heads {
    config: HeadsConfig,
    pub(super) network: Network,
    /// The tokens that are drafted and the output head cut to them.
    pub(super) vocabulary: Option<Vocabulary>,
}

#[derive(Debug)]
pub(super) enum Network {
    Medusa(Vec<Head>),
    Hydra {
        prefix: Option<DraftLayer>,
        heads: Vec<Head>,
    },
    Eagle(Eagle),
}

/// A part of the vocabulary.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// Target id of each draft id.
    pub tokens: Vec<u32>,
    /// The target's output head for these tokens.
    pub head: Linear,
}

/// Drops entries of `x` with this probability and scales the others; nothing at 0.
pub(super) fn drop(x: Tensor, probability: f64) -> Result<Tensor> {
    if probability > 0.0 {
        Ok(x.f_dropout(probability, true)?)
    } else {
        Ok(x)
    }
}

/// One Medusa or Hydra head: residual blocks, and perhaps an output matrix of its own.
#[derive(Debug)]
pub(super) struct Head {
    first: First,
    rest: Vec<Linear>,
    pub output: Option<Linear>,
}

/// The first block of a head.
#[derive(Debug)]
enum First {
    /// Medusa: `h + silu(W h)`.
    Plain(Linear),
    /// Hydra: `R v + silu(W v)` for `v` = the state and the embeddings of the path.
    Wide(Joined),
    /// Thin matrices: `h + R v + silu(W v)`, each of R and W a product of two; for Medusa `v`
    /// is the state alone.
    Thin {
        down: Joined,
        linear: Linear,
        residual: Linear,
    },
}

impl Head {
    /// A head that reads the state and `inputs - 1` embeddings.
    fn new(p: &ParamBuilder, c: &HeadsConfig, inputs: i64) -> Result<Self> {
        let (dim, wide) = (c.hidden_size, c.hidden_size * inputs);
        let uniform = Init::Uniform((wide as f64).sqrt().recip());
        let blocks = p.pp("blocks");
        let linear =
            |j: usize| Linear::new(&blocks.pp(j).pp("linear"), dim, dim, true, Init::Zeros);
        let p0 = blocks.pp(0);
        let first = match (c.kind, c.rank) {
            (HeadsKind::Medusa, None) => First::Plain(linear(0)?),
            (_, None) => {
                let w = Linear::new(&p0.pp("linear"), wide, dim, true, Init::Zeros)?;
                let r = Linear::new(&p0.pp("residual"), wide, dim, true, uniform)?;
                First::Wide(Joined::new(vec![w, r], p)?)
            }
            (_, Some(rank)) => {
                let down = |name| Linear::new(&p0.pp(name), wide, rank, false, uniform);
                let up = |name| Linear::new(&p0.pp(name), rank, dim, true, Init::Zeros);
                First::Thin {
                    down: Joined::new(vec![down("linear_down")?, down("residual_down")?], p)?,
                    linear: up("linear_up")?.packed(p)?,
                    residual: up("residual_up")?.packed(p)?,
                }
            }
        };
        let output = if c.own_outputs {
            let bias = c.kind != HeadsKind::Medusa;
            let init = Init::Normal(0.02);
            Some(Linear::new(&p.pp("output"), dim, c.vocab_size, bias, init)?.packed(p)?)
        } else {
            None
        };
        Ok(Self {
            first,
            rest: (1..c.layers).map(linear).collect::<Result<_>>()?,
            output,
        })
    }

    /// `v`: `[.., inputs * dim]`, the state first; gives the state `[.., dim]` that the output
    /// head reads. `dropout` applies to what every block reads.
    pub fn forward(&self, v: &Tensor, dim: i64, dropout: f64) -> Result<Tensor> {
        let read = |x: &Tensor| drop(x.shallow_clone(), dropout);
        let mut x = match &self.first {
            First::Plain(w) => v.f_add(&w.forward(&read(v)?)?.f_silu()?)?,
            First::Wide(both) => {
                let y = both.forward(&read(v)?)?;
                y.f_narrow(-1, 0, dim)?
                    .f_silu()?
                    .f_add(&y.f_narrow(-1, dim, dim)?)?
            }
            First::Thin {
                down,
                linear,
                residual,
            } => {
                let y = down.forward(&read(v)?)?;
                let rank = linear.input();
                let update = linear.forward(&y.f_narrow(-1, 0, rank)?)?.f_silu()?;
                v.f_narrow(-1, 0, dim)?
                    .f_add(&residual.forward(&y.f_narrow(-1, rank, rank)?)?)?
                    .f_add(&update)?
            }
        };
        for block in &self.rest {
            x = x.f_add(&block.forward(&read(&x)?)?.f_silu()?)?;
        }
        Ok(x)
    }
}

/// EAGLE: a projection of (embedding, state) pairs and a decoder layer.
#[derive(Debug)]
pub(super) struct Eagle {
    fc: Linear,
    pub layer: DraftLayer,
}

impl Eagle {
    /// What the layer reads: `embeds` and the `states` before them, both `[.., dim]`.
    pub fn pairs(&self, embeds: &Tensor, states: &Tensor) -> Result<Tensor> {
        self.fc.forward(&Tensor::f_cat(&[embeds, states], -1)?)
    }
}

impl Heads {
    /// Builds the networks from their parameters: `heads.{i}.blocks.{j}`, `prefix`, `fc` and
    /// `layer`. Without a checkpoint they begin where every head gives back the state it was
    /// given, except for EAGLE, which begins at a random projection, and for Hydra with full
    /// matrices, which begins at random.
    ///
    /// # Errors
    /// [`Error::Config`] when the configuration contradicts itself, [`Error::Unsupported`] for
    /// kinds that are not heads beside a decoder. Missing and mis-shaped tensors are reported
    /// by [`ParamBuilder::finish`].
    pub fn new(p: &ParamBuilder, config: &HeadsConfig) -> Result<Self> {
        let c = config;
        c.validate()?;
        if c.draft_vocab_size.is_some() {
            p.ignore("d2t"); // read by whoever cuts the output head
        }
        let heads = |wide: bool| -> Result<Vec<Head>> {
            (0..c.heads)
                .map(|i| {
                    let inputs = if wide { i as i64 + 2 } else { 1 };
                    Head::new(&p.pp("heads").pp(i), c, inputs)
                })
                .collect()
        };
        let layer = || {
            c.layer
                .as_ref()
                .ok_or_else(|| Error::Config("layer is missing".into()))
        };
        let network = match c.kind {
            HeadsKind::Medusa => Network::Medusa(heads(false)?),
            HeadsKind::Hydra => Network::Hydra {
                prefix: None,
                heads: heads(true)?,
            },
            HeadsKind::HydraPlus => Network::Hydra {
                prefix: Some(DraftLayer::new(
                    &p.pp("prefix"),
                    layer()?,
                    c.hidden_size,
                    true,
                    Init::Zeros,
                )?),
                heads: heads(true)?,
            },
            HeadsKind::Eagle => {
                let pair = 2 * c.hidden_size;
                let init = Init::Uniform((pair as f64).sqrt().recip());
                Network::Eagle(Eagle {
                    fc: Linear::new(&p.pp("fc"), pair, c.hidden_size, c.bias, init)?,
                    layer: DraftLayer::new(
                        &p.pp("layer"),
                        layer()?,
                        c.hidden_size,
                        false,
                        Init::Zeros,
                    )?,
                })
            }
            HeadsKind::HiddenTransfer | HeadsKind::Router => {
                return Err(Error::Unsupported(format!(
                    "{} networks change the decoder's own pass and are not heads beside it",
                    c.kind.name()
                )));
            }
        };
        Ok(Self {
            config: c.clone(),
            network,
            vocabulary: None,
        })
    }

    /// What they are made of.
    pub fn config(&self) -> &HeadsConfig {
        &self.config
    }

    /// Target id of each draft id, when only a part of the vocabulary is drafted.
    pub fn draft_tokens(&self) -> Option<&[u32]> {
        self.vocabulary.as_ref().map(|v| &v.tokens[..])
    }

    /// Restricts drafts to `tokens` (target ids): the target's output head is cut to them.
    ///
    /// # Errors
    /// [`Error::Input`] when there are not `draft_vocab_size` of them or one lies outside the
    /// vocabulary.
    pub fn set_draft_tokens(&mut self, tokens: Vec<u32>, head: &Linear) -> Result<()> {
        if Some(tokens.len() as i64) != self.config.draft_vocab_size {
            return Err(Error::Input(format!(
                "{} draft tokens where draft_vocab_size is {:?}",
                tokens.len(),
                self.config.draft_vocab_size
            )));
        }
        let head = head.select_outputs(&tokens)?;
        self.vocabulary = Some(Vocabulary { tokens, head });
        Ok(())
    }

    /// Scores `[.., draft vocabulary]` for states `[.., dim]` of head `head`: by its own output
    /// matrix, or else by that of `target`, cut to the draft tokens where there are any.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no such head; when the width does not fit.
    pub fn logits(&self, head: usize, states: &Tensor, target: &Linear) -> Result<Tensor> {
        let count = self.config.heads;
        let own = match &self.network {
            Network::Medusa(heads) | Network::Hydra { heads, .. } => heads.get(head),
            Network::Eagle(_) => None,
        };
        if head >= count {
            return Err(Error::Input(format!("head {head} of {count}")));
        }
        match (own.and_then(|h| h.output.as_ref()), &self.vocabulary) {
            (Some(output), _) => output.forward(states),
            (None, Some(v)) => v.head.forward(states),
            (None, None) => target.forward(states),
        }
    }

    /// The forward of training and evaluation over whole sequences, with the true tokens as
    /// paths: `features` `[batch, time, dim]` are the target's states after its final norm,
    /// `embeds` `[batch, time, dim]` the input embeddings of the same tokens. Gives, for head
    /// `i`, the states `[batch, time, dim]` that the output head reads: entry `t` guesses
    /// token `t + 2 + i`. For EAGLE there is one head, and entry `t` is also its prediction of
    /// feature `t + 1`. Entries that would need tokens from beyond the end (the last `i + 1`
    /// of Hydra's head `i`, the last of EAGLE) hold nonsense.
    ///
    /// # Errors
    /// [`Error::Input`] when shapes do not fit.
    pub fn train_forward(
        &self,
        features: &Tensor,
        embeds: &Tensor,
        dropout: f64,
    ) -> Result<Vec<Tensor>> {
        let dim = self.config.hidden_size;
        let size = features.size();
        let [batch, time, width] = size[..] else {
            return Err(Error::Input(format!(
                "features must be [batch, time, dim], not {size:?}"
            )));
        };
        if width != dim || embeds.size() != size {
            return Err(Error::Input(format!(
                "features {size:?} and embeddings {:?} must both be [batch, time, {dim}]",
                embeds.size()
            )));
        }
        let layer = |layer: &DraftLayer, x: &Tensor| -> Result<Tensor> {
            let positions: Vec<i64> = (0..batch).flat_map(|_| 0..time).collect();
            let mut attend = Dense::new(batch, time, Mask::Causal);
            let rows = x.f_reshape([batch * time, dim])?;
            Ok(layer
                .forward(&rows, &positions, &mut attend, dropout)?
                .f_reshape([batch, time, dim])?)
        };
        // Entry t of the rolled embeddings is that of token t + ahead.
        let ahead = |ahead: usize| embeds.f_roll([-(ahead as i64)].as_slice(), [1i64].as_slice());
        match &self.network {
            Network::Medusa(heads) => heads
                .iter()
                .map(|head| head.forward(features, dim, dropout))
                .collect(),
            Network::Hydra { prefix, heads } => {
                let state = match prefix {
                    Some(prefix) => layer(prefix, features)?,
                    None => features.shallow_clone(),
                };
                let mut inputs = vec![state];
                let mut states = Vec::with_capacity(heads.len());
                for (i, head) in heads.iter().enumerate() {
                    inputs.push(ahead(i + 1)?);
                    states.push(head.forward(&Tensor::f_cat(&inputs, -1)?, dim, dropout)?);
                }
                Ok(states)
            }
            Network::Eagle(eagle) => {
                let pairs = eagle.pairs(&ahead(1)?, features)?;
                Ok(vec![layer(&eagle.layer, &pairs)?])
            }
        }
    }
}
