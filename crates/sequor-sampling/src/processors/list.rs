//! Processors in a row.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};

use super::{Context, LogitsProcessor, Processor, guidance::GuidanceSpace, watermark::Watermark};
use crate::config::{GenerationConfig, TokenIds};
use crate::{Error, Result};

/// Hugging Face's place of `prefix_allowed_tokens_fn`.
const ALLOWED_TOKENS: u8 = 10;
/// Hugging Face's place of user processors.
const USER: u8 = 17;

/// Several processors, applied in order.
///
/// Serialises as the list of its [`Processor`]s; a list with functions in it refuses.
#[derive(Clone, Default)]
pub struct ProcessorList {
    stages: Vec<Stage>,
}

#[derive(Clone)]
enum Stage {
    Published(Processor),
    Function {
        place: u8,
        run: Arc<dyn LogitsProcessor + Send + Sync>,
    },
}

impl Stage {
    fn place(&self) -> u8 {
        match self {
            Self::Published(processor) => processor.place(),
            Self::Function { place, .. } => *place,
        }
    }
}

impl ProcessorList {
    /// Processors in the order given.
    #[must_use]
    pub fn new(processors: impl IntoIterator<Item = Processor>) -> Self {
        Self {
            stages: processors.into_iter().map(Stage::Published).collect(),
        }
    }

    /// What `config` asks for, in Hugging Face's order. Without sampling, temperature and
    /// truncation are left out.
    ///
    /// # Errors
    /// `Input` naming an option that is out of range.
    pub fn from_config(config: &GenerationConfig) -> Result<Self> {
        config.validate_ranges()?;
        let mut list = constraints(config);
        if !config.is_greedy() {
            list.extend(warpers(config));
        }
        if let Some(watermark) = &config.watermarking_config {
            list.push(Processor::Watermark(Watermark::new(watermark.clone())?));
        }
        if config.renormalize_logits == Some(true) {
            list.push(Processor::Renormalize);
        }
        Ok(Self::new(list))
    }

    /// Adds a processor at the end.
    pub fn push(&mut self, processor: Processor) {
        self.stages.push(Stage::Published(processor));
    }

    /// Adds a processor of the user's own after the constraints and before temperature
    /// and truncation.
    #[must_use]
    pub fn with_user(self, processor: impl LogitsProcessor + Send + Sync + 'static) -> Self {
        self.with_function(USER, Arc::new(processor))
    }

    /// Removes every token that `allowed` does not name for a sequence: the way to
    /// impose a grammar.
    #[must_use]
    pub fn with_allowed_tokens(
        self,
        allowed: impl Fn(&[u32]) -> Vec<u32> + Send + Sync + 'static,
    ) -> Self {
        let run = move |ctx: &Context<'_>, scores: &mut [f32]| {
            let mut allowed = allowed(ctx.tokens);
            allowed.sort_unstable();
            for (id, score) in (0_u32..).zip(scores) {
                if allowed.binary_search(&id).is_err() {
                    *score = f32::NEG_INFINITY;
                }
            }
            Ok(())
        };
        self.with_function(ALLOWED_TOKENS, Arc::new(run))
    }

    fn with_function(mut self, place: u8, run: Arc<dyn LogitsProcessor + Send + Sync>) -> Self {
        let at = self
            .stages
            .iter()
            .position(|s| s.place() > place)
            .unwrap_or(self.stages.len());
        self.stages.insert(at, Stage::Function { place, run });
        self
    }

    /// The same list without the processors that truncate by probability.
    #[must_use]
    pub fn without_truncation(mut self) -> Self {
        self.stages
            .retain(|s| !matches!(s, Stage::Published(p) if p.truncates()));
        self
    }

    /// Number of processors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stages.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }

    /// The published processors in it, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Processor> {
        self.stages.iter().filter_map(|s| match s {
            Stage::Published(processor) => Some(processor),
            Stage::Function { .. } => None,
        })
    }
}

/// Processors that apply to greedy decoding too (places 1 to 16).
fn constraints(config: &GenerationConfig) -> Vec<Processor> {
    let mut list = Vec::new();
    let eos = config.eos_ids().to_vec();
    let penalty = |p: Option<f64>| p.filter(|&p| p != 1.0).map(|p| p as f32);
    let size = |n: Option<usize>| n.filter(|&n| n > 0);
    if let Some(scale) = config.guidance_scale.filter(|&g| g != 1.0) {
        list.push(Processor::Guidance {
            scale: scale as f32,
            space: GuidanceSpace::LogProbabilities,
        });
    }
    if let Some(biases) = &config.sequence_bias {
        let biases = biases
            .iter()
            .map(|(ids, bias)| (ids.clone(), *bias as f32))
            .collect();
        list.push(Processor::SequenceBias { biases });
    }
    list.extend(
        penalty(config.encoder_repetition_penalty)
            .map(|penalty| Processor::EncoderRepetitionPenalty { penalty }),
    );
    list.extend(
        penalty(config.repetition_penalty).map(|penalty| Processor::RepetitionPenalty { penalty }),
    );
    let frequency = config.frequency_penalty.unwrap_or(0.0) as f32;
    let presence = config.presence_penalty.unwrap_or(0.0) as f32;
    if frequency != 0.0 || presence != 0.0 {
        list.push(Processor::FrequencyPresence {
            frequency,
            presence,
        });
    }
    list.extend(size(config.no_repeat_ngram_size).map(|size| Processor::NoRepeatNgram { size }));
    list.extend(
        size(config.encoder_no_repeat_ngram_size)
            .map(|size| Processor::EncoderNoRepeatNgram { size }),
    );
    if let Some(words) = &config.bad_words_ids {
        // Forbidding end-of-sequence as a "bad word" would keep the text from ending.
        let is_eos = |word: &Vec<u32>| matches!(word.as_slice(), [id] if eos.contains(id));
        list.push(Processor::BadWords {
            words: words.iter().filter(|w| !is_eos(w)).cloned().collect(),
        });
    }
    if !eos.is_empty() {
        let eos = || eos.clone();
        list.extend(
            size(config.min_length).map(|length| Processor::MinLength { length, eos: eos() }),
        );
        list.extend(
            size(config.min_new_tokens)
                .map(|tokens| Processor::MinNewTokens { tokens, eos: eos() }),
        );
    }
    list.extend(
        config
            .forced_bos_token_id
            .map(|token| Processor::ForcedBos { token }),
    );
    let forced_eos = config.forced_eos_token_id.as_ref().map(TokenIds::as_slice);
    list.extend(forced_eos.map(|tokens| Processor::ForcedEos {
        tokens: tokens.to_vec(),
    }));
    if config.remove_invalid_values == Some(true) {
        list.push(Processor::RemoveInvalid);
    }
    if let Some((start, factor)) = config.exponential_decay_length_penalty {
        list.push(Processor::ExponentialDecay { start, factor, eos });
    }
    if let Some(tokens) = config.suppress_tokens.clone() {
        list.push(Processor::Suppress { tokens });
    }
    if let Some(tokens) = config.begin_suppress_tokens.clone() {
        let after_forced = config.forced_bos_token_id.is_some();
        list.push(Processor::BeginSuppress {
            tokens,
            after_forced,
        });
    }
    list
}

/// Processors that shape the distribution (places 18 to 24).
fn warpers(config: &GenerationConfig) -> Vec<Processor> {
    let mut list = Vec::new();
    let below_one = |x: Option<f64>| x.filter(|&x| x < 1.0);
    let above_zero = |x: Option<f64>| x.filter(|&x| x > 0.0);
    if let Some(temperature) = config.temperature.filter(|&t| t != 1.0) {
        let temperature = (temperature as f32).max(f32::MIN_POSITIVE);
        list.push(Processor::Temperature { temperature });
    }
    list.extend(config.top_h.map(|share| Processor::TopH { share }));
    list.extend(
        config
            .top_k
            .filter(|&k| k > 0)
            .map(|k| Processor::TopK { k }),
    );
    list.extend(below_one(config.top_p).map(|mass| Processor::TopP { mass }));
    list.extend(config.min_p.map(|share| Processor::MinP { share }));
    list.extend(below_one(config.typical_p).map(|mass| Processor::Typical { mass }));
    list.extend(above_zero(config.epsilon_cutoff).map(|cutoff| Processor::Epsilon { cutoff }));
    list.extend(above_zero(config.eta_cutoff).map(|cutoff| Processor::Eta { cutoff }));
    list
}

impl LogitsProcessor for ProcessorList {
    fn process(&self, ctx: &Context<'_>, scores: &mut [f32]) -> Result<()> {
        self.stages.iter().try_for_each(|stage| match stage {
            Stage::Published(processor) => processor.process(ctx, scores),
            Stage::Function { run, .. } => run.process(ctx, scores),
        })
    }
}

impl fmt::Debug for ProcessorList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        for stage in &self.stages {
            match stage {
                Stage::Published(processor) => list.entry(processor),
                Stage::Function { place, .. } => {
                    list.entry(&format_args!("function at place {place}"))
                }
            };
        }
        list.finish()
    }
}

impl Serialize for ProcessorList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let published: Vec<_> = self.iter().collect();
        if published.len() < self.stages.len() {
            return Err(ser::Error::custom(
                "a processor list with functions in it cannot be written down",
            ));
        }
        published.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ProcessorList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::new(Vec::<Processor>::deserialize(deserializer)?))
    }
}

impl From<Vec<Processor>> for ProcessorList {
    fn from(processors: Vec<Processor>) -> Self {
        Self::new(processors)
    }
}

impl TryFrom<&GenerationConfig> for ProcessorList {
    type Error = Error;

    fn try_from(config: &GenerationConfig) -> Result<Self> {
        Self::from_config(config)
    }
}
