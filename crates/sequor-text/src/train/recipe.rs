//! The recipe of a language model.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use sequor_backbone::DecoderConfig;
use sequor_train::{AdamWOptions, Schedule, Shape, TrainOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Largest recipe file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Everything that decides a language model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LmRecipe {
    /// Name of the model.
    pub name: String,
    /// One line for the model's card.
    pub description: String,
    /// What it learns from.
    pub data: DataRecipe,
    /// How text becomes tokens.
    pub tokenizer: TokenizerRecipe,
    /// The network.
    pub model: ModelRecipe,
    /// How it learns.
    pub train: OptimisationRecipe,
    /// Folder that relative paths start from; that of the recipe file.
    #[serde(skip)]
    pub base: PathBuf,
}

/// What a model learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// A data set of the catalogue (`bible-web`), a text file, or a folder of `.txt` files.
    pub source: String,
    /// What is kept away from training, to measure with.
    pub held_out: HeldOutRecipe,
}

/// What is kept away from training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "held_out must be a list of names (\"Ruth\") or a fraction between 0 and 1"
)]
pub enum HeldOutRecipe {
    /// Whole books, or files by name without extension.
    Names(Vec<String>),
    /// This part of the files, or the end of the text when there is one file only.
    Fraction(f64),
}

/// How text becomes tokens: one of the two.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerRecipe {
    /// Learn a byte-level BPE vocabulary of this many tokens from the training text.
    pub vocab_size: Option<usize>,
    /// Use the tokenizer of this `tokenizer.json` or model folder.
    pub path: Option<PathBuf>,
}

/// The network, by the field names of a published Llama config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecipe {
    /// Width of the rows.
    pub hidden_size: i64,
    /// Inner width of the feed-forward part.
    pub intermediate_size: i64,
    /// Number of blocks.
    pub num_hidden_layers: i64,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key/value heads.
    pub num_key_value_heads: i64,
    /// Longest sequence of the model.
    pub max_position_embeddings: i64,
    /// Base of the rotary frequencies.
    #[serde(default = "ten_thousand")]
    pub rope_theta: f64,
    /// Epsilon of the norms.
    #[serde(default = "norm_eps")]
    pub rms_norm_eps: f64,
    /// Is the output head the transposed embedding?
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    /// Standard deviation of initial weights.
    #[serde(default = "init_std")]
    pub initializer_range: f64,
}

/// Number format in which the network computes while it learns. Master weights are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit brain floats in linear layers: faster on processors that have them.
    Bf16,
}

/// How a model learns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimisationRecipe {
    /// Updates of the weights, at most.
    pub steps: u64,
    /// Windows of text per micro-batch.
    pub batch: usize,
    /// Micro-batches per step.
    #[serde(default = "one")]
    pub accumulation: usize,
    /// Tokens per window.
    pub context: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// Last learning rate over the peak; a cosine lies between.
    #[serde(default = "tenth")]
    pub min_ratio: f64,
    /// Decoupled weight decay of matrices.
    #[serde(default = "tenth")]
    pub weight_decay: f64,
    /// Decay rates of the optimizer's moments.
    #[serde(default = "betas")]
    pub betas: (f64, f64),
    /// Longest gradient; 0 for no bound.
    #[serde(default = "unit")]
    pub clip: f64,
    /// Probability of dropping entries of residual updates and embeddings.
    #[serde(default)]
    pub dropout: f64,
    /// Decay of averaged weights; left out for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Number format of the linear layers.
    #[serde(default)]
    pub dtype: Dtype,
    /// Seed of every random draw.
    #[serde(default)]
    pub seed: u64,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// Steps between lines of the log.
    #[serde(default = "ten")]
    pub log_every: u64,
    /// Evaluations without a new best after which training stops; left out for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<u32>,
    /// Threads; left out for as many as the machine has cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
}

fn ten_thousand() -> f64 {
    1e4
}
fn norm_eps() -> f64 {
    1e-5
}
fn init_std() -> f64 {
    0.02
}
fn yes() -> bool {
    true
}
fn one() -> usize {
    1
}
fn ten() -> u64 {
    10
}
fn tenth() -> f64 {
    0.1
}
fn unit() -> f64 {
    1.0
}
fn betas() -> (f64, f64) {
    (0.9, 0.95)
}

impl LmRecipe {
    /// Reads and checks a recipe file. Relative paths in it start from its folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] naming the file, and the line or the field.
    pub fn from_file(path: &Path) -> Result<Self> {
        let meta = path.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() || meta.len() > MAX_BYTES {
            let what = format!(
                "{}: a recipe is a TOML file of at most {MAX_BYTES} bytes",
                path.display()
            );
            return Err(Error::Config(what));
        }
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let base = path.parent().unwrap_or(Path::new("")).to_owned();
        Self::from_toml(&text, base).map_err(|e| Error::Config(format!("{}: {e}", path.display())))
    }

    /// Reads and checks a recipe. Relative paths in it start from `base`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the line or the field.
    pub fn from_toml(text: &str, base: PathBuf) -> Result<Self> {
        let recipe: Self =
            toml::from_str(text).map_err(|e| Error::Config(e.to_string().trim_end().to_owned()))?;
        let recipe = Self { base, ..recipe };
        recipe.validate()?;
        Ok(recipe)
    }

    /// Checks every range, and that the parts fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let (t, m) = (&self.train, &self.model);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty()
            || self.name.len() > 96
            || self.name.starts_with('.')
            || !self.name.chars().all(plain)
        {
            return Err(wrong(
                "name",
                &self.name,
                "must be a word of letters, digits and -_.",
            ));
        }
        match &self.data.held_out {
            HeldOutRecipe::Names(names) if names.is_empty() => {
                return Err(wrong(
                    "data.held_out",
                    "[]",
                    "must name something to measure with",
                ));
            }
            HeldOutRecipe::Fraction(f) if !(*f > 0.0 && *f < 1.0) => {
                return Err(wrong("data.held_out", f, "must lie between 0 and 1"));
            }
            _ => {}
        }
        match (&self.tokenizer.vocab_size, &self.tokenizer.path) {
            (Some(n), None) => within("tokenizer.vocab_size", *n, 257..=1 << 20)?,
            (None, Some(_)) => {}
            _ => {
                return Err(Error::Config(
                    "[tokenizer] needs either vocab_size or path".into(),
                ));
            }
        }
        within("model.hidden_size", m.hidden_size, 1..=1 << 16)?;
        within("model.intermediate_size", m.intermediate_size, 1..=1 << 18)?;
        within("model.num_hidden_layers", m.num_hidden_layers, 1..=1024)?;
        within(
            "model.max_position_embeddings",
            m.max_position_embeddings,
            2..=1 << 20,
        )?;
        within("train.steps", t.steps, 1..=1 << 32)?;
        within("train.batch", t.batch, 1..=1 << 16)?;
        within("train.accumulation", t.accumulation, 1..=1 << 16)?;
        within(
            "train.context",
            t.context,
            1..=m.max_position_embeddings as usize,
        )?;
        // One micro-batch must fit into memory, with its logits.
        let tokens = t.batch.saturating_mul(t.context);
        within("train.batch times train.context", tokens, 1..=1 << 18)?;
        let block = m.hidden_size * (4 * m.hidden_size + 3 * m.intermediate_size);
        let weights = m.num_hidden_layers.saturating_mul(block);
        within("weights of [model]", weights, 1..=1 << 31)?;
        within("train.eval_every", t.eval_every, 1..=1 << 32)?;
        within("train.log_every", t.log_every, 1..=1 << 32)?;
        if let Some(threads) = t.threads {
            within("train.threads", threads, 1..=4096)?;
        }
        if !(0.0..1.0).contains(&t.dropout) {
            return Err(wrong("train.dropout", t.dropout, "must lie in [0, 1)"));
        }
        if t.ema.is_some_and(|e| !(0.0..1.0).contains(&e)) {
            return Err(wrong(
                "train.ema",
                t.ema.unwrap_or_default(),
                "must lie in [0, 1)",
            ));
        }
        // A float of the recipe that JSON cannot hold would read as absent.
        if [m.rope_theta, m.rms_norm_eps, m.initializer_range]
            .iter()
            .any(|x| !x.is_finite())
        {
            return Err(Error::Config(
                "[model] has a number that is not finite".into(),
            ));
        }
        self.train_options().validate()?;
        DecoderConfig::from_json(&self.config_json(257, 0))
            .map_err(|e| Error::Config(format!("[model]: {e}")))?;
        Ok(())
    }

    /// The options of the training loop.
    pub fn train_options(&self) -> TrainOptions {
        let t = &self.train;
        let shape = Shape::Cosine {
            min_ratio: t.min_ratio,
        };
        TrainOptions {
            accumulation: t.accumulation,
            seed: t.seed,
            schedule: Schedule {
                peak: t.learning_rate,
                warmup: t.warmup,
                steps: t.steps,
                shape,
            },
            adamw: AdamWOptions {
                betas: t.betas,
                weight_decay: t.weight_decay,
                ..AdamWOptions::default()
            },
            clip: t.clip,
            ema: t.ema,
            log_every: t.log_every,
            eval_every: t.eval_every,
            metric: crate::train::task::METRIC.to_owned(),
            patience: t.patience,
        }
    }

    /// The published `config.json` of the model, with a vocabulary of `vocab` tokens of
    /// which `end` begins and ends every text.
    pub fn config_json(&self, vocab: usize, end: u32) -> Value {
        let m = &self.model;
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": m.hidden_size,
            "intermediate_size": m.intermediate_size,
            "num_hidden_layers": m.num_hidden_layers,
            "num_attention_heads": m.num_attention_heads,
            "num_key_value_heads": m.num_key_value_heads,
            "max_position_embeddings": m.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": m.rms_norm_eps,
            "rope_theta": m.rope_theta,
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            "dropout": self.train.dropout,
            "initializer_range": m.initializer_range,
            "tie_word_embeddings": m.tie_word_embeddings,
            "bos_token_id": end,
            "eos_token_id": end,
            "torch_dtype": "bfloat16",
        })
    }

    /// A path of the recipe, from where it is meant.
    pub(crate) fn resolve(&self, path: &Path) -> PathBuf {
        self.base.join(path)
    }
}

fn wrong(field: &str, value: impl Display, rule: &str) -> Error {
    Error::Config(format!("{field} = {value} {rule}"))
}

fn within<T: PartialOrd + Display>(field: &str, value: T, range: RangeInclusive<T>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(wrong(
        field,
        value,
        &format!("must lie in {}..={}", range.start(), range.end()),
    ))
}
