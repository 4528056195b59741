//! Options of a text generation, as people say them.

use crate::{Error, Result};
use sequor_nn::Device;
use sequor_nn::device::DType;
use sequor_sampling::{DepthPolicy, GenerationConfig, Options};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Deepest draft of a chain drafter when the depth adapts.
const ADAPTIVE_MAX: usize = 10;

/// How a model is brought into memory.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Number format of the matrices.
    pub dtype: DType,
    /// Where they are kept.
    pub device: Device,
    /// Threads for arithmetic; the machine's cores when absent.
    pub threads: Option<usize>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            device: Device::Cpu,
            threads: None,
        }
    }
}

/// Where drafts come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Speculate {
    /// No drafts: plain decoding.
    #[default]
    Off,
    /// The best method for this model here, or none where none pays.
    Auto,
    /// Copies what followed the last words earlier in the text.
    PromptLookup,
    /// A small model with the same vocabulary: a path or a name.
    Draft(String),
}

impl Speculate {
    /// The draft model that must be loaded, if any.
    pub fn draft_model(&self) -> Option<&str> {
        match self {
            Self::Draft(name) => Some(name),
            _ => None,
        }
    }
}

impl fmt::Display for Speculate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Auto => f.write_str("auto"),
            Self::PromptLookup => f.write_str("prompt-lookup"),
            Self::Draft(name) => write!(f, "draft={name}"),
        }
    }
}

impl From<Speculate> for String {
    fn from(s: Speculate) -> Self {
        s.to_string()
    }
}

impl TryFrom<String> for Speculate {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl FromStr for Speculate {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "off" | "none" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "prompt-lookup" => Ok(Self::PromptLookup),
            _ => match s.strip_prefix("draft=") {
                Some(name) if !name.is_empty() => Ok(Self::Draft(name.to_owned())),
                _ => Err(Error::Input(format!(
                    "unknown speculation method '{s}': choose off, auto, prompt-lookup or draft=MODEL"
                ))),
            },
        }
    }
}

/// How many tokens are drafted per round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// As many as pay best.
    #[default]
    Adaptive,
    /// Always this many.
    Fixed(usize),
}

impl FromStr for Depth {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.parse::<usize>() {
            Ok(n @ 1..=256) => Ok(Self::Fixed(n)),
            _ if s == "adaptive" => Ok(Self::Adaptive),
            _ => Err(Error::Input(format!(
                "draft depth '{s}': give a number from 1 to 256, or adaptive"
            ))),
        }
    }
}

/// Options of one generation. The default takes the best token each time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TextOptions {
    /// Randomness; 0 is greedy. When absent it is 0, or 1 if one of the filters below is set.
    pub temperature: Option<f64>,
    /// Choose among this many best tokens only; 0 is off.
    pub top_k: Option<usize>,
    /// Choose among the best tokens that hold this much probability, `(0, 1]`.
    pub top_p: Option<f64>,
    /// Drop tokens less likely than this share of the best, `[0, 1]`.
    pub min_p: Option<f64>,
    /// Keep tokens of typical surprise that hold this much probability, `(0, 1]`.
    pub typical_p: Option<f64>,
    /// Factor on tokens seen before, above 0; 1 is off.
    pub repetition_penalty: Option<f64>,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Most tokens to generate; 0 generates nothing.
    #[serde(default = "default_max")]
    pub max_new_tokens: usize,
    /// Texts before which the generation stops.
    pub stop: Vec<String>,
    /// Go on after the end-of-text token.
    pub ignore_eos: bool,
    /// Where drafts come from.
    pub speculate: Speculate,
    /// How deep they go.
    pub depth: Depth,
    /// Ends the generation when it becomes true.
    #[serde(skip)]
    pub cancel: Option<Arc<AtomicBool>>,
}

fn default_max() -> usize {
    256
}

impl TextOptions {
    /// Greedy decoding of at most `max_new_tokens`.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            ..Self::default()
        }
    }

    /// Sampling at `temperature` with `seed`.
    pub fn sampling(max_new_tokens: usize, temperature: f64, seed: u64) -> Self {
        Self {
            max_new_tokens,
            temperature: Some(temperature),
            seed,
            ..Self::default()
        }
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// Naming the option, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::Input("a stop text must not be empty".into()));
        }
        // No vocabulary is known yet; only ranges are checked.
        self.to_sampling(&[]).validate(usize::MAX)?;
        Ok(())
    }

    fn temperature(&self) -> f64 {
        let filtered = self.top_k.is_some_and(|k| k > 0)
            || [self.top_p, self.min_p, self.typical_p]
                .iter()
                .any(Option::is_some);
        self.temperature.unwrap_or(if filtered { 1.0 } else { 0.0 })
    }

    /// The options of the sampling crate.
    pub(crate) fn to_sampling(&self, eos: &[u32]) -> Options {
        let temperature = self.temperature();
        let config = GenerationConfig {
            do_sample: Some(temperature != 0.0),
            temperature: Some(temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            max_new_tokens: Some(self.max_new_tokens),
            eos_token_id: Some(eos.to_vec().into()),
            ..GenerationConfig::default()
        };
        let depth = match (&self.speculate, self.depth) {
            (_, Depth::Fixed(n)) => DepthPolicy::Fixed(n),
            (Speculate::Auto, Depth::Adaptive) => DepthPolicy::Auto { max: ADAPTIVE_MAX },
            (_, Depth::Adaptive) => DepthPolicy::Adaptive { max: ADAPTIVE_MAX },
        };
        Options {
            seed: self.seed,
            ignore_eos: self.ignore_eos,
            depth,
            ..Options::from(config)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_and_depths_are_read_and_printed() {
        for s in ["off", "auto", "prompt-lookup", "draft=models/bible-draft"] {
            assert_eq!(s.parse::<Speculate>().unwrap().to_string(), s);
        }
        assert!("draft=".parse::<Speculate>().is_err());
        assert!("medusa?".parse::<Speculate>().unwrap_err().is_usage());
        assert_eq!("4".parse::<Depth>().unwrap(), Depth::Fixed(4));
        assert!("0".parse::<Depth>().is_err());
    }

    #[test]
    fn impossible_options_are_usage_errors() {
        let bad = |o: TextOptions| assert!(o.validate().unwrap_err().is_usage(), "{o:?}");
        bad(TextOptions {
            temperature: Some(f64::NAN),
            ..TextOptions::default()
        });
        bad(TextOptions {
            temperature: Some(-1.0),
            ..TextOptions::default()
        });
        bad(TextOptions {
            top_p: Some(0.0),
            ..TextOptions::default()
        });
        bad(TextOptions {
            top_p: Some(2.0),
            ..TextOptions::default()
        });
        bad(TextOptions {
            min_p: Some(1.5),
            ..TextOptions::default()
        });
        bad(TextOptions {
            repetition_penalty: Some(0.0),
            ..TextOptions::default()
        });
        bad(TextOptions {
            stop: vec![String::new()],
            ..TextOptions::default()
        });
        TextOptions::sampling(5, 0.7, 1).validate().unwrap();
    }

    #[test]
    fn a_filter_alone_means_sampling() {
        assert_eq!(TextOptions::default().temperature(), 0.0);
        assert_eq!(
            TextOptions {
                top_p: Some(0.9),
                ..TextOptions::default()
            }
            .temperature(),
            1.0
        );
        assert_eq!(
            TextOptions {
                top_p: Some(0.9),
                temperature: Some(0.0),
                ..TextOptions::default()
            }
            .temperature(),
            0.0
        );
    }
}
