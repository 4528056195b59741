//! What a folder of draft heads says about itself (`heads.json`).

use crate::config::{DecoderConfig, PositionKind};
use sequor_nn::rope::Rope;
use sequor_nn::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Which networks a folder of heads holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadsKind {
    /// Independent heads on the last state (Cai et al., 2024).
    Medusa,
    /// Heads that also read the tokens of their own path (Ankner et al., 2024).
    Hydra,
    /// Hydra after a decoder layer over the whole prefix (the same).
    #[serde(rename = "hydra++")]
    HydraPlus,
    /// A decoder layer that continues the states themselves (Li et al., 2024).
    Eagle,
    /// Pseudo states inside the decoder (Wu et al., 2024).
    HiddenTransfer,
    /// Routers that leave layers out, with their adapters.
    Router,
}

impl HeadsKind {
    /// Its name in `heads.json` and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Medusa => "medusa",
            Self::Hydra => "hydra",
            Self::HydraPlus => "hydra++",
            Self::Eagle => "eagle",
            Self::HiddenTransfer => "hidden-transfer",
            Self::Router => "router",
        }
    }
}

/// The model that heads were made for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its name, for people.
    #[serde(default)]
    pub name: String,
    /// Its [`CausalLm::fingerprint`](crate::CausalLm::fingerprint); empty when unknown, as in
    /// published folders.
    #[serde(default)]
    pub fingerprint: String,
}

/// Sizes of the decoder layer that Hydra++ and EAGLE own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerConfig {
    /// Query heads.
    pub heads: i64,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Channels per head.
    pub head_dim: i64,
    /// Inner width of the feed-forward part.
    pub ffn: i64,
    /// Epsilon of the norms.
    pub eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Is there a norm behind the layer? (In published Hydra++ checkpoints.)
    #[serde(default)]
    pub final_norm: bool,
    /// The rotary embedding of a published config, scaling included, instead of `rope_theta`.
    #[serde(skip)]
    pub(crate) rope: Option<Rope>,
}

impl LayerConfig {
    /// A layer with the attention sizes of `base` and `ffn` inner channels, on a plain
    /// rotary embedding and without a norm behind it.
    pub fn like(base: &DecoderConfig, ffn: i64) -> Self {
        Self {
            heads: base.heads,
            kv_heads: base.kv_heads,
            head_dim: base.head_dim,
            ffn,
            eps: base.eps,
            rope_theta: 1e4,
            final_norm: false,
            rope: None,
        }
    }

    /// A layer exactly like those of `base`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when `base` has learned positions.
    pub(crate) fn copy_of(base: &DecoderConfig) -> Result<Self> {
        let PositionKind::Rotary(rope) = &base.positions else {
            return Err(Error::Unsupported(format!(
                "a draft layer like those of {}, which has learned positions",
                base.family.architecture()
            )));
        };
        Ok(Self {
            rope: Some(rope.clone()),
            ..Self::like(base, base.hidden)
        })
    }

    /// The rotary embedding, after all sizes were checked by the reader of published configs.
    pub(crate) fn rotary(&self, dim: i64) -> Result<Rope> {
        let published = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": dim, "num_hidden_layers": 1, "vocab_size": 1,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.ffn, "rms_norm_eps": self.eps, "rope_theta": self.rope_theta,
        });
        let read = DecoderConfig::from_json(&published)?;
        match (&self.rope, read.positions) {
            (Some(rope), _) => Ok(rope.clone()),
            (None, PositionKind::Rotary(rope)) => Ok(rope),
            (None, PositionKind::Learned { .. }) => Err(Error::Config(
                "a draft layer needs a rotary embedding".into(),
            )),
        }
    }
}

/// The content of `heads.json`. Fields of other kinds of networks are left alone, so that one
/// reader tells all kinds apart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeadsConfig {
    /// Which networks.
    pub kind: HeadsKind,
    /// The model they were made for.
    #[serde(default)]
    pub base: Base,
    /// Width of the model's states after its final norm.
    pub hidden_size: i64,
    /// Number of the model's token ids.
    pub vocab_size: i64,
    /// How many of them are drafted; the tensor `d2t` names them. `None` for all.
    #[serde(default)]
    pub draft_vocab_size: Option<i64>,
    /// Number of heads (1 for EAGLE, which repeats itself).
    #[serde(default = "one")]
    pub heads: usize,
    /// Residual blocks per head.
    #[serde(default = "one")]
    pub layers: usize,
    /// Inner width of the first block as a product of two thin matrices beside an identity on
    /// the state; `None` for full matrices, as in published checkpoints. Heads that share the
    /// model's output matrix need the linear part of such a block: their own matrix would
    /// have held it.
    #[serde(default)]
    pub rank: Option<i64>,
    /// Does every head have its own output matrix, as in published Medusa and Hydra
    /// checkpoints? Otherwise all use the model's.
    #[serde(default)]
    pub own_outputs: bool,
    /// Has EAGLE's first projection a bias?
    #[serde(default)]
    pub bias: bool,
    /// The decoder layer of Hydra++ and EAGLE.
    #[serde(default)]
    pub layer: Option<LayerConfig>,
    /// Measured on held-out text: for each depth, the probability that the continuation of a
    /// rank is right given that the path before it is. Static trees are searched in it.
    #[serde(default)]
    pub accuracies: Vec<Vec<f64>>,
}

fn one() -> usize {
    1
}

/// Largest sizes that are read as meant.
const MAX_HEADS: usize = 64;
const MAX_LAYERS: usize = 64;
const MAX_WIDTH: i64 = 1 << 20;
const MAX_VOCAB: i64 = 1 << 24;

impl HeadsConfig {
    /// A small set of heads for a model: four heads of one thin block (Medusa, Hydra) or of
    /// two behind a prefix layer (Hydra++), or one EAGLE layer. Every field may
    /// be changed before the networks are made.
    pub fn small(kind: HeadsKind, model: &DecoderConfig, base: Base) -> Self {
        let plus = kind == HeadsKind::HydraPlus;
        let eagle = kind == HeadsKind::Eagle;
        // Half the usual inner width of a gated feed-forward part.
        let ffn = (model.embed_dim * 4 / 3).max(1);
        Self {
            kind,
            base,
            hidden_size: model.embed_dim,
            vocab_size: model.vocab_size,
            draft_vocab_size: None,
            heads: if eagle { 1 } else { 4 },
            layers: if plus { 2 } else { 1 },
            rank: match kind {
                HeadsKind::Medusa => Some((model.embed_dim / 3).max(1)),
                HeadsKind::Hydra | HeadsKind::HydraPlus => Some((model.embed_dim / 5).max(1)),
                _ => None,
            },
            own_outputs: false,
            bias: eagle,
            layer: (plus || eagle).then(|| LayerConfig::like(model, ffn)),
            accuracies: Vec::new(),
        }
    }

    /// Checks that the sizes can be meant.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let within = |name: &str, value: i64, max: i64| {
            if (1..=max).contains(&value) {
                Ok(())
            } else {
                Err(Error::Config(format!(
                    "{name} must be a whole number from 1 to {max}, not {value}"
                )))
            }
        };
        within("hidden_size", self.hidden_size, MAX_WIDTH)?;
        within("vocab_size", self.vocab_size, MAX_VOCAB)?;
        if let Some(n) = self.draft_vocab_size {
            within("draft_vocab_size", n, self.vocab_size)?;
        }
        if let Some(rank) = self.rank {
            within("rank", rank, MAX_WIDTH)?;
        }
        if !(1..=MAX_HEADS).contains(&self.heads) || !(1..=MAX_LAYERS).contains(&self.layers) {
            return Err(Error::Config(format!(
                "heads must be a number from 1 to {MAX_HEADS} and layers one from 1 to {MAX_LAYERS}, not {} and {}",
                self.heads, self.layers
            )));
        }
        if self.own_outputs && self.draft_vocab_size.is_some() {
            return Err(Error::Config(
                "own_outputs and draft_vocab_size exclude each other: a cut vocabulary is cut from the model's output head".into(),
            ));
        }
        let needs_layer = matches!(self.kind, HeadsKind::HydraPlus | HeadsKind::Eagle);
        if needs_layer && self.layer.is_none() {
            return Err(Error::Config(format!(
                "layer is missing: {} heads own a decoder layer",
                self.kind.name()
            )));
        }
        if let Some(bad) = self
            .accuracies
            .iter()
            .flatten()
            .find(|a| !(0.0..=1.0).contains(*a))
        {
            return Err(Error::Config(format!(
                "accuracies must be probabilities, not {bad}"
            )));
        }
        Ok(())
    }
}
