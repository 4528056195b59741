//! Generation options under the names that checkpoints use in
//! `generation_config.json`.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::processors::WatermarkConfig;
use crate::{Error, Result};

/// Options of a generation, field names as in Hugging Face's `GenerationConfig`.
///
/// A field that is `None` is off: no default of the publisher is applied silently (in
/// particular `top_k` is not 50 unless set). Unknown fields are kept in `extra`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Draw from the distribution; otherwise take the best token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub do_sample: Option<bool>,
    /// Largest number of tokens, prompt included. `max_new_tokens` wins over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    /// Largest number of tokens after the prompt; 0 generates nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// No end-of-sequence before this many tokens, prompt included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_length: Option<usize>,
    /// No end-of-sequence before this many tokens after the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_new_tokens: Option<usize>,
    /// Time limit in seconds, checked between forward passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_time: Option<f64>,
    /// Tokens that end the sequence: one id or a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos_token_id: Option<TokenIds>,
    /// Token that begins a sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Padding token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<u32>,
    /// Divides the scores; 0 means greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Entropy share of top-H filtering, `(0, 1]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_h: Option<f64>,
    /// Keep the best `top_k` tokens (ties included); 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Keep the smallest set of best tokens with at least this mass, `(0, 1]`; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Remove tokens less probable than this share of the best, `[0, 1]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Mass kept by locally typical sampling, `(0, 1]`; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub typical_p: Option<f64>,
    /// Remove tokens less probable than this, `[0, 1)`; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon_cutoff: Option<f64>,
    /// Entropy-dependent cut-off, `[0, 1)`; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_cutoff: Option<f64>,
    /// Factor on the scores of tokens seen before, `> 0`; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// The inverse factor on the scores of the prompt's tokens, `> 0`; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_repetition_penalty: Option<f64>,
    /// Subtracted from a score once per occurrence among the generated tokens (not a
    /// field of Hugging Face).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Subtracted from the score of every generated token (not a field of Hugging Face).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// No n-gram of this size occurs twice; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_repeat_ngram_size: Option<usize>,
    /// No n-gram of this size from the prompt occurs again; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_no_repeat_ngram_size: Option<usize>,
    /// Token sequences that must not be completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bad_words_ids: Option<Vec<Vec<u32>>>,
    /// Token sequences and what is added to the score of their last token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence_bias: Option<Vec<(Vec<u32>, f64)>>,
    /// Token that must follow a sequence of length 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forced_bos_token_id: Option<u32>,
    /// Token that must come last when the length limit is reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forced_eos_token_id: Option<TokenIds>,
    /// Replace NaN by 0 and infinities by the largest finite numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remove_invalid_values: Option<bool>,
    /// `(start, factor)`: past `start` generated tokens the score of end-of-sequence
    /// grows by `|score| (factor^n - 1)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    /// Tokens that never occur.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suppress_tokens: Option<Vec<u32>>,
    /// Tokens that do not occur first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begin_suppress_tokens: Option<Vec<u32>>,
    /// Scale of classifier-free guidance; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    /// Watermark of green lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watermarking_config: Option<WatermarkConfig>,
    /// Turn the processed scores into log-probabilities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renormalize_logits: Option<bool>,
    /// Fields that are not known here, kept as they were.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

/// One token id or several; written back the way it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// A single id.
    One(u32),
    /// A list.
    Many(Vec<u32>),
}

impl TokenIds {
    /// The ids.
    #[must_use]
    pub fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

impl From<u32> for TokenIds {
    fn from(id: u32) -> Self {
        Self::One(id)
    }
}

impl From<Vec<u32>> for TokenIds {
    fn from(ids: Vec<u32>) -> Self {
        Self::Many(ids)
    }
}

const UNIT: RangeInclusive<f64> = 0.0..=1.0;

impl GenerationConfig {
    /// Greedy decoding.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            do_sample: Some(false),
            ..Self::default()
        }
    }

    /// Sampling at `temperature`, nothing else set.
    #[must_use]
    pub fn sampling(temperature: f64) -> Self {
        Self {
            do_sample: Some(true),
            temperature: Some(temperature),
            ..Self::default()
        }
    }

    /// Reads a `generation_config.json`.
    ///
    /// # Errors
    /// `Config` naming the field that cannot be read.
    pub fn from_json(text: &str) -> Result<Self> {
        let fields: BTreeMap<String, Value> = serde_json::from_str(text)
            .map_err(|e| Error::Config(format!("not a JSON object: {e}")))?;
        let read = |fields| serde_json::from_value(Value::Object(fields));
        read(fields.clone().into_iter().collect()).map_err(|whole: serde_json::Error| {
            // serde does not say which field was at fault; reading one at a time does.
            let guilty = fields.into_iter().find_map(|(name, value)| {
                let alone = [(name.clone(), value.clone())].into_iter().collect();
                let error = read(alone).map(|_: Self| ()).err()?;
                Some(format!("`{name}` is {value}: {error}"))
            });
            Error::Config(guilty.unwrap_or_else(|| whole.to_string()))
        })
    }

    /// Whether the best token is taken instead of a draw: `do_sample` is not set, or the
    /// temperature is 0.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.do_sample != Some(true) || self.temperature == Some(0.0)
    }

    /// The end-of-sequence ids.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        self.eos_token_id.as_ref().map_or(&[], TokenIds::as_slice)
    }

    /// Largest total length for a prompt of `prompt_len` tokens, if one was set.
    #[must_use]
    pub fn total_limit(&self, prompt_len: usize) -> Option<usize> {
        self.max_new_tokens
            .map(|new| prompt_len.saturating_add(new))
            .or(self.max_length)
    }

    /// Checks every option against its range, and every token id against a vocabulary of
    /// `vocab` tokens.
    ///
    /// # Errors
    /// `Input` naming the option, its value and the allowed range.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        self.validate_ranges()?;
        let ids = |name: &str, ids: &[u32]| match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::input(
                name,
                id,
                format!("ids below the vocabulary size {vocab}"),
            )),
            None => Ok(()),
        };
        ids("eos_token_id", self.eos_ids())?;
        ids(
            "forced_eos_token_id",
            self.forced_eos_token_id
                .as_ref()
                .map_or(&[], TokenIds::as_slice),
        )?;
        ids("forced_bos_token_id", self.forced_bos_token_id.as_slice())?;
        ids(
            "suppress_tokens",
            self.suppress_tokens.as_deref().unwrap_or_default(),
        )?;
        ids(
            "begin_suppress_tokens",
            self.begin_suppress_tokens.as_deref().unwrap_or_default(),
        )?;
        for word in self.bad_words_ids.iter().flatten() {
            ids("bad_words_ids", word)?;
        }
        for (sequence, _) in self.sequence_bias.iter().flatten() {
            ids("sequence_bias", sequence)?;
        }
        Ok(())
    }

    /// The part of [`validate`](Self::validate) that needs no vocabulary.
    ///
    /// # Errors
    /// `Input` naming the option, its value and the allowed range.
    pub fn validate_ranges(&self) -> Result<()> {
        at_least_zero(
            "temperature",
            self.temperature,
            "a finite number >= 0 (0 means greedy)",
        )?;
        at_least_zero("max_time", self.max_time, "a finite number of seconds >= 0")?;
        within(
            "top_h",
            self.top_h,
            |x| x > 0.0 && UNIT.contains(&x),
            "a number in (0, 1]",
        )?;
        within(
            "top_p",
            self.top_p,
            |x| x > 0.0 && UNIT.contains(&x),
            "a number in (0, 1]; 1 is off",
        )?;
        within(
            "min_p",
            self.min_p,
            |x| UNIT.contains(&x),
            "a number in [0, 1]",
        )?;
        within(
            "typical_p",
            self.typical_p,
            |x| x > 0.0 && UNIT.contains(&x),
            "a number in (0, 1]; 1 is off",
        )?;
        for (name, value) in [
            ("epsilon_cutoff", self.epsilon_cutoff),
            ("eta_cutoff", self.eta_cutoff),
        ] {
            within(
                name,
                value,
                |x| (0.0..1.0).contains(&x),
                "a number in [0, 1); 0 is off",
            )?;
        }
        for (name, value) in [
            ("repetition_penalty", self.repetition_penalty),
            (
                "encoder_repetition_penalty",
                self.encoder_repetition_penalty,
            ),
            (
                "exponential_decay_length_penalty",
                self.exponential_decay_length_penalty.map(|(_, f)| f),
            ),
        ] {
            within(
                name,
                value,
                |x| x.is_finite() && x > 0.0,
                "a finite number > 0",
            )?;
        }
        for (name, value) in [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
            ("guidance_scale", self.guidance_scale),
        ] {
            within(name, value, f64::is_finite, "a finite number")?;
        }
        for (sequence, bias) in self.sequence_bias.iter().flatten() {
            within(
                "sequence_bias",
                Some(*bias),
                f64::is_finite,
                "finite numbers",
            )?;
            not_empty("sequence_bias", sequence)?;
        }
        for word in self.bad_words_ids.iter().flatten() {
            not_empty("bad_words_ids", word)?;
        }
        self.watermarking_config
            .as_ref()
            .map_or(Ok(()), WatermarkConfig::validate)
    }
}

fn within(
    name: &str,
    value: Option<f64>,
    allowed: impl Fn(f64) -> bool,
    expected: &str,
) -> Result<()> {
    match value {
        Some(x) if !allowed(x) => Err(Error::input(name, x, expected)),
        _ => Ok(()),
    }
}

fn at_least_zero(name: &str, value: Option<f64>, expected: &str) -> Result<()> {
    within(name, value, |x| x.is_finite() && x >= 0.0, expected)
}

fn not_empty(name: &str, sequence: &[u32]) -> Result<()> {
    if sequence.is_empty() {
        Err(Error::input(
            name,
            "an empty sequence",
            "at least one token",
        ))
    } else {
        Ok(())
    }
}
