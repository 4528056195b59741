//! What a folder of transfer maps says about itself (`heads.json`).

use crate::heads::{Base, HeadsKind};
use crate::{CausalLm, DecoderConfig};
use sequor_nn::{Error, Result};
use serde::{Deserialize, Serialize};

/// Most offsets that are read as meant.
const MAX_OFFSETS: usize = 16;

/// The content of `heads.json` for hidden transfer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransferConfig {
    /// Always [`HeadsKind::HiddenTransfer`].
    pub kind: HeadsKind,
    /// The model that the maps were made for.
    #[serde(default)]
    pub base: Base,
    /// Width of the model's rows.
    pub hidden_size: i64,
    /// Number of the model's token ids.
    pub vocab_size: i64,
    /// How many of them are drafted; the tensor `d2t` names them. `None` for all.
    #[serde(default)]
    pub draft_vocab_size: Option<i64>,
    /// For each offset 1, 2, ..: after how many layers its pseudo state is made, from 1 to
    /// the number of layers and never falling.
    pub transfer_layers: Vec<usize>,
    /// Measured on held-out text: for each offset, the probability that the guess of a rank
    /// is right given that the path before it is. Static trees are searched in it.
    #[serde(default)]
    pub accuracies: Vec<Vec<f64>>,
}

impl TransferConfig {
    /// Maps for a model, made after `transfer_layers[j]` layers for offset `j + 1`.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn new(model: &DecoderConfig, transfer_layers: Vec<usize>, base: Base) -> Result<Self> {
        let config = Self {
            kind: HeadsKind::HiddenTransfer,
            base,
            hidden_size: model.dim,
            vocab_size: model.vocab_size,
            draft_vocab_size: None,
            transfer_layers,
            accuracies: Vec::new(),
        };
        config.validate(model)?;
        Ok(config)
    }

    /// Number of offsets.
    pub fn offsets(&self) -> usize {
        self.transfer_layers.len()
    }

    /// Checks that the maps fit `model`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field, what it holds and what fits.
    pub fn validate(&self, model: &DecoderConfig) -> Result<()> {
        let fail = |what: String| Err(Error::Config(what));
        if self.kind != HeadsKind::HiddenTransfer {
            return fail(format!(
                "kind is {}, and hidden transfer is needed here",
                self.kind.name()
            ));
        }
        if (self.hidden_size, self.vocab_size) != (model.dim, model.vocab_size) {
            return fail(format!(
                "hidden_size {} and vocab_size {} are not those of the model ({}, {})",
                self.hidden_size, self.vocab_size, model.dim, model.vocab_size
            ));
        }
        let layers = &self.transfer_layers;
        let within = layers.iter().all(|t| (1..=model.layers).contains(t));
        if !(1..=MAX_OFFSETS).contains(&layers.len()) || !within || !layers.is_sorted() {
            return fail(format!(
                "transfer_layers must be 1 to {MAX_OFFSETS} numbers from 1 to {} that never fall, not {layers:?}",
                model.layers
            ));
        }
        if let Some(n) = self
            .draft_vocab_size
            .filter(|n| !(1..=self.vocab_size).contains(n))
        {
            return fail(format!(
                "draft_vocab_size must be a number from 1 to {}, not {n}",
                self.vocab_size
            ));
        }
        let chances = self.accuracies.iter().flatten();
        if let Some(bad) = chances.into_iter().find(|a| !(0.0..=1.0).contains(*a)) {
            return fail(format!("accuracies must be probabilities, not {bad}"));
        }
        Ok(())
    }

    /// Checks that `model` is the one the maps were made for, where they say so.
    pub(super) fn check_base(&self, model: &CausalLm) -> Result<()> {
        let (made_for, found) = (&self.base.fingerprint, model.fingerprint()?);
        if made_for.is_empty() || *made_for == found {
            return Ok(());
        }
        Err(Error::Config(format!(
            "the maps were made for {} (fingerprint {made_for}), and the model at {} has fingerprint {found}",
            self.base.name,
            model.source().display()
        )))
    }
}
