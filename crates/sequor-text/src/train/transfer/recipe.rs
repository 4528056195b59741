//! The recipe of hidden transfer.

use sequor_backbone::DecoderConfig;
use sequor_backbone::heads::Base;
use sequor_backbone::transfer::TransferConfig;
use sequor_train::{AdamWOptions, Schedule, Shape, TrainOptions};
use serde::{Deserialize, Serialize};

use crate::train::heads::HELD_OUT_LOSS;
use crate::{Error, Result};

/// Everything that decides how the maps come out, besides the target and its corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferRecipe {
    /// For each offset, after how many layers of the target its pseudo state is made; never
    /// falling, from 1 to the number of layers.
    pub layers: Vec<usize>,
    /// Do pseudo rows see those of smaller offsets? Drafting always lets them: `false` is an
    /// ablation, whose measured accuracies are what it is for.
    pub linked: bool,
    /// Size of the drafted vocabulary, the most frequent tokens of the corpus's answers; 0
    /// for the target's whole vocabulary.
    pub draft_vocab: usize,
    /// Weight of an offset relative to the one before, in `(0, 1]`.
    pub decay: f64,
    /// Number of updates.
    pub steps: u64,
    /// Sequences per update, read one after the other.
    pub batch: usize,
    /// Most tokens of a sequence that are read.
    pub context: usize,
    /// Share of the answers' tokens that carry pseudo rows, in `(0, 1]`.
    pub anchors: f64,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Seed of all random numbers.
    pub seed: u64,
}

impl TransferRecipe {
    /// The recipe of the bundled maps: three offsets, made after four fifths of the layers.
    pub fn new(model: &DecoderConfig) -> Self {
        Self::common(((model.layers * 4).div_ceil(5)).max(1), 3)
    }

    /// All offsets made after the same `layers` layers.
    pub fn common(layers: usize, offsets: usize) -> Self {
        Self {
            layers: vec![layers; offsets],
            linked: true,
            draft_vocab: 6144,
            decay: 0.8,
            steps: 2000,
            batch: 1,
            context: 256,
            anchors: 0.5,
            learning_rate: 1e-3,
            seed: 0,
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field; [`Error::Config`] for layers that the model does not
    /// have.
    pub fn validate(&self, model: &DecoderConfig) -> Result<()> {
        TransferConfig::new(model, self.layers.clone(), Base::default())?;
        let whole = |name: &str, value: u64, least: u64, most: u64| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(Error::Input(format!(
                    "{name} = {value} must lie in {least}..={most}"
                )))
            }
        };
        whole("steps", self.steps, 1, 10_000_000)?;
        whole("batch", self.batch as u64, 1, 1024)?;
        let least = self.layers.len() as u64 + 4;
        whole(
            "context",
            self.context as u64,
            least,
            model.context.min(2048) as u64,
        )?;
        for (name, value) in [
            ("decay", self.decay),
            ("anchors", self.anchors),
            ("learning_rate", self.learning_rate),
        ] {
            if !(value > 0.0 && value <= 1.0) {
                return Err(Error::Input(format!("{name} = {value} must lie in (0, 1]")));
            }
        }
        Ok(())
    }

    /// Weight of each offset; they sum to 1.
    pub(super) fn weights(&self) -> Vec<f64> {
        let powers: Vec<f64> = (0..self.layers.len())
            .map(|j| self.decay.powi(j as i32))
            .collect();
        let sum: f64 = powers.iter().sum();
        powers.into_iter().map(|p| p / sum).collect()
    }

    /// The settings of the training loop: AdamW with a cosine to a tenth after a short
    /// warm-up, gradients no longer than 1, and no weight decay, which would pull the maps
    /// away from the identity.
    pub(super) fn train_options(&self) -> TrainOptions {
        TrainOptions {
            accumulation: self.batch,
            seed: self.seed,
            schedule: Schedule {
                peak: self.learning_rate,
                warmup: (self.steps / 20).min(100),
                steps: self.steps,
                shape: Shape::Cosine { min_ratio: 0.1 },
            },
            adamw: AdamWOptions {
                weight_decay: 0.0,
                ..AdamWOptions::default()
            },
            clip: 1.0,
            ema: None,
            log_every: (self.steps / 100).clamp(1, 20),
            eval_every: self.steps.div_ceil(8),
            metric: HELD_OUT_LOSS.into(),
            patience: None,
        }
    }
}
