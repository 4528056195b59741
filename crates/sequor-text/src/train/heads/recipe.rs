//! The recipe of draft heads: which, and how they learn.

use sequor_backbone::heads::HeadsKind;
use sequor_train::{AdamWOptions, Schedule, Shape, TrainOptions};
use serde::{Deserialize, Serialize};

use super::task::HELD_OUT_LOSS;
use crate::{Error, Result};

/// What a head is taught to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// The target's whole law at that place (soft cross-entropy; Ankner et al., 2024).
    #[default]
    Laws,
    /// The token that stands there (Cai et al., 2024).
    Tokens,
}

/// Everything that decides how draft heads come out, besides the target and its corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadsRecipe {
    /// Which heads.
    pub kind: HeadsKind,
    /// Tokens ahead: heads of Medusa and Hydra; for EAGLE, which repeats itself, how deep it
    /// is measured. 1 to 16.
    pub depth: usize,
    /// Size of the drafted vocabulary, the most frequent tokens of the corpus's answers; 0
    /// for the target's whole vocabulary.
    pub draft_vocab: usize,
    /// In training, laws are compared on the tokens of the batch and this many of the most
    /// frequent ones only, at a fraction of the price; 0 for all drafted tokens.
    pub sampled_vocab: usize,
    /// Begin at the best linear guess, which has a closed form, instead of at the state itself.
    pub regression: bool,
    /// What the heads are taught to say.
    pub labels: Labels,
    /// Weight of a head relative to the one before, in `(0, 1]`.
    pub decay: f64,
    /// Number of updates.
    pub steps: u64,
    /// Sequences per update.
    pub batch: usize,
    /// Most positions of a sequence that an update looks at.
    pub context: usize,
    /// Share of the prompt's positions that is learned from, in `[0, 1]`; answers always are.
    pub prompt_share: f64,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Dropout in the networks, in `[0, 1)`.
    pub dropout: f64,
    /// EAGLE: passes over its own predictions in training, at least 1.
    pub unroll: usize,
    /// EAGLE: weight of the distance to the true state, beside 1 for the laws.
    pub state_weight: f64,
    /// EAGLE: width of the uniform noise on the states it reads, in units of their size.
    pub noise: f64,
    /// Seed of all random numbers.
    pub seed: u64,
}

impl HeadsRecipe {
    /// The recipe of the bundled heads of this kind.
    pub fn new(kind: HeadsKind) -> Self {
        Self {
            kind,
            depth: if kind == HeadsKind::Eagle { 5 } else { 3 },
            draft_vocab: 6144,
            sampled_vocab: 768,
            regression: true,
            labels: Labels::Laws,
            decay: 0.8,
            steps: 1000,
            batch: 8,
            context: 256,
            prompt_share: 0.3,
            learning_rate: 3e-4,
            dropout: 0.0,
            unroll: 3,
            state_weight: 1.0,
            noise: 0.2,
            seed: 0,
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field, [`Error::Unsupported`] for kinds that are not heads
    /// beside a decoder.
    pub fn validate(&self) -> Result<()> {
        if matches!(self.kind, HeadsKind::HiddenTransfer | HeadsKind::Router) {
            return Err(Error::Unsupported(format!(
                "{} networks are not trained from stored states: they change the target's own pass",
                self.kind.name()
            )));
        }
        let whole = |name: &str, value: u64, least: u64, most: u64| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(Error::Input(format!(
                    "{name} = {value} must lie in {least}..={most}"
                )))
            }
        };
        whole("depth", self.depth as u64, 1, 16)?;
        whole("steps", self.steps, 1, 10_000_000)?;
        whole("batch", self.batch as u64, 1, 1024)?;
        whole("context", self.context as u64, 8, 8192)?;
        whole(
            "batch times context",
            (self.batch * self.context) as u64,
            8,
            1 << 17,
        )?;
        whole("unroll", self.unroll as u64, 1, 16)?;
        let real = |name: &str, value: f64, fits: bool, range: &str| {
            if fits {
                Ok(())
            } else {
                Err(Error::Input(format!(
                    "{name} = {value} must lie in {range}"
                )))
            }
        };
        let (decay, share, rate) = (self.decay, self.prompt_share, self.learning_rate);
        real("decay", decay, decay > 0.0 && decay <= 1.0, "(0, 1]")?;
        real(
            "prompt_share",
            share,
            (0.0..=1.0).contains(&share),
            "[0, 1]",
        )?;
        real("learning_rate", rate, rate > 0.0 && rate <= 1.0, "(0, 1]")?;
        real(
            "dropout",
            self.dropout,
            (0.0..1.0).contains(&self.dropout),
            "[0, 1)",
        )?;
        let weight = self.state_weight;
        real(
            "state_weight",
            weight,
            (0.0..=1e3).contains(&weight),
            "[0, 1000]",
        )?;
        real(
            "noise",
            self.noise,
            (0.0..=10.0).contains(&self.noise),
            "[0, 10]",
        )
    }

    /// The settings of the training loop: AdamW with a cosine to a tenth after a short
    /// warm-up, gradients no longer than 1.
    pub(super) fn train_options(&self) -> TrainOptions {
        TrainOptions {
            accumulation: 1,
            seed: self.seed,
            schedule: Schedule {
                peak: self.learning_rate,
                warmup: (self.steps / 20).min(100),
                steps: self.steps,
                shape: Shape::Cosine { min_ratio: 0.1 },
            },
            adamw: AdamWOptions::default(),
            clip: 1.0,
            ema: None,
            log_every: (self.steps / 100).clamp(1, 20),
            eval_every: self.steps.div_ceil(8),
            metric: HELD_OUT_LOSS.into(),
            patience: None,
        }
    }
}
