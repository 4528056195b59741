//! Options of a text generation, as people say them.

use crate::{Error, Result};
use sequor_nn::Device;
use sequor_nn::device::{DType, Weights};
use sequor_sampling::verify::Acceptance;
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
    /// How the matrices are kept. f32 is the reference arithmetic; with [`Weights::Auto`] they
    /// stay as the file has them, and are read as fast as this machine can.
    pub weights: Weights,
    /// Where they are kept.
    pub device: Device,
    /// Threads for arithmetic; the machine's cores when absent.
    pub threads: Option<usize>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            weights: Weights::Float(DType::F32),
            device: Device::Cpu,
            threads: None,
        }
    }
}

/// What draft heads there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadKind {
    /// Heads on the last state, each guessing one offset (Medusa).
    Medusa,
    /// Heads that also read the tokens guessed before (Hydra).
    Hydra,
    /// Hydra with a layer over all states and deeper heads (Hydra++).
    HydraPlus,
    /// One layer that guesses states (EAGLE).
    Eagle,
    /// Guessed states that run through the upper layers (hidden transfer).
    HiddenTransfer,
}

impl HeadKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Medusa,
        Self::Hydra,
        Self::HydraPlus,
        Self::Eagle,
        Self::HiddenTransfer,
    ];

    /// The name of the method, which is the kind in `heads.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Medusa => "medusa",
            Self::Hydra => "hydra",
            Self::HydraPlus => "hydra++",
            Self::Eagle => "eagle",
            Self::HiddenTransfer => "hidden-transfer",
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
    /// Copies what followed the longest repetition, as far as copies have been right.
    Copy,
    /// A table of what followed pairs of tokens, learnt as it goes, and a tree search in it
    /// (ADED).
    Trigram,
    /// The target's own guesses of the pass before (Jacobi iteration).
    Jacobi,
    /// N-grams harvested from parallel Jacobi iterations (lookahead decoding).
    Lookahead,
    /// The first layers of the target; a third of them when no number is given.
    EarlyExit(Option<usize>),
    /// A small model with the same vocabulary: a path or a name.
    Draft(String),
    /// Heads trained for the target.
    Heads(HeadKind),
    /// Heads and copies in one tree.
    CopyAndHeads(HeadKind),
}

/// Written before the name of heads that copies are joined with.
const COPY_AND: &str = "copy+";

impl Speculate {
    /// The methods that need nothing but the target, for lists and messages.
    pub const BARE: [&str; 6] = [
        "prompt-lookup",
        "copy",
        "trigram",
        "jacobi",
        "lookahead",
        "early-exit",
    ];

    /// The draft model that must be loaded, if any.
    pub fn draft_model(&self) -> Option<&str> {
        match self {
            Self::Draft(name) => Some(name),
            _ => None,
        }
    }

    /// The heads that must be loaded, if any.
    pub fn heads(&self) -> Option<HeadKind> {
        match self {
            Self::Heads(kind) | Self::CopyAndHeads(kind) => Some(*kind),
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
            Self::Copy => f.write_str("copy"),
            Self::Trigram => f.write_str("trigram"),
            Self::Jacobi => f.write_str("jacobi"),
            Self::Lookahead => f.write_str("lookahead"),
            Self::EarlyExit(None) => f.write_str("early-exit"),
            Self::EarlyExit(Some(layers)) => write!(f, "early-exit={layers}"),
            Self::Draft(name) => write!(f, "draft={name}"),
            Self::Heads(kind) => f.write_str(kind.name()),
            Self::CopyAndHeads(kind) => write!(f, "{COPY_AND}{}", kind.name()),
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
        let heads = |name: &str| HeadKind::ALL.into_iter().find(|k| k.name() == name);
        if let Some(kind) = heads(s) {
            return Ok(Self::Heads(kind));
        }
        if let Some(kind) = s.strip_prefix(COPY_AND).and_then(heads) {
            return Ok(Self::CopyAndHeads(kind));
        }
        let unknown = || {
            let heads = HeadKind::ALL.map(HeadKind::name).join(", ");
            Error::Input(format!(
                "unknown speculation method '{s}': choose off, auto, {}, early-exit=LAYERS, draft=MODEL, {heads}, or {COPY_AND} and one of these heads",
                Self::BARE.join(", ")
            ))
        };
        match s {
            "off" | "none" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "prompt-lookup" => Ok(Self::PromptLookup),
            "copy" => Ok(Self::Copy),
            "trigram" => Ok(Self::Trigram),
            "jacobi" => Ok(Self::Jacobi),
            "lookahead" => Ok(Self::Lookahead),
            "early-exit" => Ok(Self::EarlyExit(None)),
            _ => match s.split_once('=') {
                Some(("draft", name)) if !name.is_empty() => Ok(Self::Draft(name.to_owned())),
                Some(("early-exit", layers)) => match layers.parse() {
                    Ok(n) if n > 0 => Ok(Self::EarlyExit(Some(n))),
                    _ => Err(unknown()),
                },
                _ => Err(unknown()),
            },
        }
    }
}

/// The shape of drafts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// The method's own.
    #[default]
    Default,
    /// One path.
    Chain,
    /// A tree of fixed shape, searched for the heads' accuracies.
    Static,
    /// A tree that follows the draft's confidence (EAGLE-2).
    Dynamic,
}

impl FromStr for Shape {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "default" => Ok(Self::Default),
            "chain" => Ok(Self::Chain),
            "static" => Ok(Self::Static),
            "dynamic" => Ok(Self::Dynamic),
            _ => Err(Error::Input(format!(
                "draft shape '{s}': choose default, chain, static or dynamic"
            ))),
        }
    }
}

/// Which layers of the target run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layers {
    /// All of them.
    #[default]
    All,
    /// Those that routers choose from the prompt (FiRST). **Another model**: the text is not
    /// that of the full one.
    Router,
    /// This many, evenly spaced, whatever the prompt. **Another model.**
    Even(usize),
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Router => f.write_str("router"),
            Self::Even(n) => write!(f, "even={n}"),
        }
    }
}

impl FromStr for Layers {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let even = s.strip_prefix("even=").and_then(|n| n.parse().ok());
        match (s, even) {
            ("all", _) => Ok(Self::All),
            ("router", _) => Ok(Self::Router),
            (_, Some(n)) if n > 0 => Ok(Self::Even(n)),
            _ => Err(Error::Input(format!(
                "layers '{s}': choose all, router or even=N"
            ))),
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
    /// What shape they have.
    pub shape: Shape,
    /// Most nodes of a draft tree, `1..=256`; chosen by cost and acceptance when absent.
    pub tree_nodes: Option<usize>,
    /// When a draft is accepted. Anything but the default changes the distribution of the
    /// text.
    pub acceptance: Acceptance,
    /// Which layers of the target run.
    pub layers: Layers,
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
        if self.tree_nodes.is_some_and(|n| !(1..=256).contains(&n)) {
            return Err(Error::Input("a draft tree has from 1 to 256 nodes".into()));
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
            draft_nodes: self.tree_nodes,
            acceptance: self.acceptance,
            ..Options::from(config)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_and_depths_are_read_and_printed() {
        let methods = [
            "off",
            "auto",
            "prompt-lookup",
            "trigram",
            "jacobi",
            "lookahead",
            "early-exit",
            "early-exit=12",
            "medusa",
            "hydra",
            "hydra++",
            "eagle",
            "hidden-transfer",
            "draft=models/bible-draft",
        ];
        for s in methods {
            assert_eq!(s.parse::<Speculate>().unwrap().to_string(), s);
        }
        for s in ["all", "router", "even=20"] {
            assert_eq!(s.parse::<Layers>().unwrap().to_string(), s);
        }
        assert!("even=0".parse::<Layers>().is_err());
        assert!("early-exit=0".parse::<Speculate>().is_err());
        assert!("star".parse::<Shape>().is_err());
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
