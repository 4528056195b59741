//! The recipe of routers: how many layers shall stay, and how they learn.

use sequor_backbone::routers::{GateRule, Policy, Prefill};
use sequor_nn::lora::LoraConfig;
use sequor_train::{AdamWOptions, Schedule, Shape, TrainOptions};
use serde::{Deserialize, Serialize};

use super::HELD_OUT_LOSS;
use super::task::Phase;
use crate::{Error, Result};

/// Everything that decides how routers and their adapter come out, besides the model and its
/// corpus. All numbers are this library's choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterRecipe {
    /// Share of the layers that shall run, in (0, 1].
    pub kept: f64,
    /// What the layers do with the prompt. With full prefill the second phase keeps exactly
    /// the wanted number of layers, with gated prefill those above one half.
    pub prefill: Prefill,
    /// How scores are read once gates are hard.
    pub rule: GateRule,
    /// Protect the first two layers and the last.
    pub protect: bool,
    /// Updates of the routers.
    pub steps: u64,
    /// Updates of the adapter; 0 for no adapter.
    pub adapter_steps: u64,
    /// Texts per update.
    pub batch: usize,
    /// Most tokens of a text, prompt included.
    pub context: usize,
    /// Highest learning rate of the routers.
    pub learning_rate: f64,
    /// Highest learning rate of the adapter.
    pub adapter_rate: f64,
    /// Weight of the mean gate: keeping costs.
    pub sum_weight: f64,
    /// Weight of the squared distance of a text's mean gate to `kept`.
    pub budget_weight: f64,
    /// Weight of `r (1 - r)`, which rises from 0 over the first half: gates shall be 0 or 1.
    pub binary_weight: f64,
    /// Rank of the adapter.
    pub rank: i64,
    /// Strength of the adapter; its update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout on the adapter's input in training, in `[0, 1)`.
    pub dropout: f64,
    /// The layers that are adapted, by name.
    pub targets: Vec<String>,
    /// Texts that are kept for measuring.
    pub held_out: usize,
    /// Seed of all random numbers.
    pub seed: u64,
}

impl Default for RouterRecipe {
    fn default() -> Self {
        let targets = [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ];
        Self {
            kept: 0.75,
            prefill: Prefill::Full,
            rule: GateRule::Majority,
            protect: true,
            steps: 150,
            adapter_steps: 150,
            batch: 2,
            context: 160,
            learning_rate: 1e-3,
            adapter_rate: 1e-3,
            sum_weight: 0.01,
            budget_weight: 10.0,
            binary_weight: 0.05,
            rank: 4,
            alpha: 8.0,
            dropout: 0.05,
            targets: targets.map(str::to_owned).into(),
            held_out: 16,
            seed: 0,
        }
    }
}

impl RouterRecipe {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Input`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let whole = |name: &str, value: u64, least: u64, most: u64| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(Error::Input(format!(
                    "{name} = {value} must lie in {least}..={most}"
                )))
            }
        };
        whole("steps", self.steps, 1, 1_000_000)?;
        whole("adapter_steps", self.adapter_steps, 0, 1_000_000)?;
        whole("batch", self.batch as u64, 1, 1024)?;
        whole("context", self.context as u64, 16, 8192)?;
        whole("held_out", self.held_out as u64, 1, 4096)?;
        whole("rank", self.rank.unsigned_abs(), 1, 1024)?;
        let real = |name: &str, value: f64, fits: bool, range: &str| {
            if fits {
                Ok(())
            } else {
                Err(Error::Input(format!(
                    "{name} = {value} must lie in {range}"
                )))
            }
        };
        let share = |x: f64| x > 0.0 && x <= 1.0;
        real("kept", self.kept, share(self.kept), "(0, 1]")?;
        let (rate, adapter) = (self.learning_rate, self.adapter_rate);
        real("learning_rate", rate, share(rate), "(0, 1]")?;
        real("adapter_rate", adapter, share(adapter), "(0, 1]")?;
        for (name, weight) in [
            ("sum_weight", self.sum_weight),
            ("budget_weight", self.budget_weight),
            ("binary_weight", self.binary_weight),
        ] {
            real(name, weight, (0.0..=1e4).contains(&weight), "[0, 10000]")?;
        }
        if self.adapter_steps > 0 {
            self.lora().validate()?;
        }
        Ok(())
    }

    /// The hard gates of this recipe for a model of `layers` layers.
    pub fn policy(&self, layers: usize) -> Policy {
        let keep = match self.prefill {
            Prefill::Full => Policy::keeping(self.kept, layers).keep,
            Prefill::Gated => None,
        };
        Policy {
            rule: self.rule,
            keep,
            protect: self.protect,
        }
    }

    /// The adapter.
    pub(super) fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: self.targets.clone(),
        }
    }

    /// The settings of the training loop: AdamW without decay, a cosine to a tenth after a
    /// warm-up of 3 %, gradients no longer than 1.
    pub(super) fn train_options(&self, phase: Phase, steps: u64) -> TrainOptions {
        TrainOptions {
            accumulation: self.batch,
            seed: self.seed,
            schedule: Schedule {
                peak: match phase {
                    Phase::Routers => self.learning_rate,
                    Phase::Adapter => self.adapter_rate,
                },
                warmup: (steps * 3).div_ceil(100).min(steps),
                steps,
                shape: Shape::Cosine { min_ratio: 0.1 },
            },
            adamw: AdamWOptions {
                weight_decay: 0.0,
                ..AdamWOptions::default()
            },
            clip: 1.0,
            ema: None,
            log_every: (steps / 50).clamp(1, 20),
            eval_every: steps.div_ceil(3),
            metric: HELD_OUT_LOSS.into(),
            patience: None,
        }
    }
}
