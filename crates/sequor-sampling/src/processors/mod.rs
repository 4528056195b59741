//! Logits processors: what turns a row of logits into the scores that are sampled
//! from.
//!
//! [`LogitsProcessor`] is open: anyone may write one. [`Processor`] is the closed,
//! serialisable sum of the published ones with the semantics of Hugging Face
//! `transformers`. A [`ProcessorList`] applies several in order; the distribution that
//! the rest of this crate calls "the target law" is always the one *after* the list.
//!
//! Scores are f32; a removed token has the score `-inf`.

mod bias;
mod filter;
mod guidance;
mod length;
mod list;
mod ngram;
mod penalty;
mod top_p;
mod watermark;

use serde::{Deserialize, Serialize};

use crate::Result;

pub use guidance::GuidanceSpace;
pub use list::ProcessorList;
pub use watermark::{SeedingScheme, Watermark, WatermarkConfig};

/// What a processor may look at besides the scores.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The sequence so far: prompt, generated tokens and, while drafts are verified,
    /// the accepted drafts before this row.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Raw logits of the unconditional branch, `[vocab]`, for guidance.
    pub unconditional: Option<&'a [f32]>,
    /// Largest total length of the sequence, if there is one.
    pub max_length: Option<usize>,
}

impl<'a> Context<'a> {
    /// A context without guidance or length limit.
    #[must_use]
    pub fn new(tokens: &'a [u32], prompt_len: usize) -> Self {
        Self {
            tokens,
            prompt_len,
            unconditional: None,
            max_length: None,
        }
    }

    /// The prompt.
    #[must_use]
    pub fn prompt(&self) -> &'a [u32] {
        self.tokens.get(..self.prompt_len).unwrap_or(self.tokens)
    }

    /// The tokens after the prompt.
    #[must_use]
    pub fn generated(&self) -> &'a [u32] {
        self.tokens.get(self.prompt_len..).unwrap_or_default()
    }
}

/// A step from scores to scores.
pub trait LogitsProcessor {
    /// Changes the scores `[vocab]` of the token that follows `ctx.tokens`.
    ///
    /// # Errors
    /// When the context lacks something it needs.
    fn process(&self, ctx: &Context<'_>, scores: &mut [f32]) -> Result<()>;
}

impl<F> LogitsProcessor for F
where
    F: Fn(&Context<'_>, &mut [f32]) -> Result<()>,
{
    fn process(&self, ctx: &Context<'_>, scores: &mut [f32]) -> Result<()> {
        self(ctx, scores)
    }
}

/// The published processors, in the order in which Hugging Face applies them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Processor {
    /// Classifier-free guidance: `u + scale (c - u)`.
    Guidance {
        /// Guidance scale; 1 leaves the conditional branch.
        scale: f32,
        /// What is mixed.
        space: GuidanceSpace,
    },
    /// Adds a number to the last token of each sequence whose beginning has just occurred.
    SequenceBias {
        /// Sequences and what to add.
        biases: Vec<(Vec<u32>, f32)>,
    },
    /// [`RepetitionPenalty`](Self::RepetitionPenalty) with the inverse penalty over the
    /// tokens of the prompt.
    EncoderRepetitionPenalty {
        /// Above 1 favours the prompt's tokens.
        penalty: f32,
    },
    /// Divides positive and multiplies negative scores of every token seen so far
    /// (CTRL, Keskar et al. 2019, section 4.1).
    RepetitionPenalty {
        /// Above 1 discourages repetition.
        penalty: f32,
    },
    /// `score - frequency * count - presence * [count > 0]` over generated tokens.
    FrequencyPresence {
        /// Per occurrence.
        frequency: f32,
        /// Once.
        presence: f32,
    },
    /// Removes tokens that would repeat an n-gram of the sequence.
    NoRepeatNgram {
        /// Length of the n-gram.
        size: usize,
    },
    /// Removes tokens that would repeat an n-gram of the prompt.
    EncoderNoRepeatNgram {
        /// Length of the n-gram.
        size: usize,
    },
    /// Removes tokens that would complete one of the sequences.
    BadWords {
        /// The sequences.
        words: Vec<Vec<u32>>,
    },
    /// Removes end-of-sequence while the whole sequence is shorter than `length`.
    MinLength {
        /// Tokens, prompt included.
        length: usize,
        /// End-of-sequence ids.
        eos: Vec<u32>,
    },
    /// Removes end-of-sequence before `tokens` were generated.
    MinNewTokens {
        /// Tokens after the prompt.
        tokens: usize,
        /// End-of-sequence ids.
        eos: Vec<u32>,
    },
    /// Leaves only `token` after a sequence of length 1.
    ForcedBos {
        /// The token.
        token: u32,
    },
    /// Leaves only `tokens` for the last position before the length limit.
    ForcedEos {
        /// The tokens.
        tokens: Vec<u32>,
    },
    /// NaN becomes 0, infinities become the largest finite numbers.
    RemoveInvalid,
    /// Adds `|s| (factor^n - 1)` to end-of-sequence, `n` tokens past `start`.
    ExponentialDecay {
        /// Generated tokens before it begins.
        start: usize,
        /// Growth per token.
        factor: f64,
        /// End-of-sequence ids.
        eos: Vec<u32>,
    },
    /// Removes tokens.
    Suppress {
        /// The tokens.
        tokens: Vec<u32>,
    },
    /// Removes tokens from the first position after the prompt (after the forced first
    /// token, if there is one).
    BeginSuppress {
        /// The tokens.
        tokens: Vec<u32>,
        /// Whether a first token is forced after a prompt of one token.
        after_forced: bool,
    },
    /// Divides the scores.
    Temperature {
        /// Above 0.
        temperature: f32,
    },
    /// Among the best 100, keeps tokens while the running entropy stays within a share
    /// of the whole (top-H, Potraghloo et al. 2025).
    TopH {
        /// The share.
        share: f64,
    },
    /// Keeps the best `k` tokens and everything equal to the last of them.
    TopK {
        /// How many.
        k: usize,
    },
    /// Keeps the smallest set of best tokens whose mass reaches `mass` (Holtzman et al. 2020).
    TopP {
        /// The mass.
        mass: f64,
    },
    /// Removes tokens less probable than `share` of the best (Nguyen et al. 2024).
    MinP {
        /// The share.
        share: f64,
    },
    /// Keeps the tokens whose surprise is nearest to the entropy, up to `mass`
    /// (locally typical sampling, Meister et al. 2022).
    Typical {
        /// The mass.
        mass: f64,
    },
    /// Removes tokens less probable than `cutoff`, never the best (Hewitt et al. 2022).
    Epsilon {
        /// The cut-off.
        cutoff: f64,
    },
    /// Removes tokens less probable than `min(cutoff, sqrt(cutoff) exp(-entropy))`
    /// (Hewitt et al. 2022).
    Eta {
        /// The cut-off.
        cutoff: f64,
    },
    /// Favours a keyed random part of the vocabulary (Kirchenbauer et al. 2023).
    Watermark(Watermark),
    /// Turns scores into log-probabilities.
    Renormalize,
}

impl Processor {
    /// Its place in Hugging Face's order, counted from 1; places 10 (allowed prefixes)
    /// and 17 (user processors) belong to functions and never occur here.
    #[must_use]
    pub fn place(&self) -> u8 {
        match self {
            Self::Guidance { .. } => 1,
            Self::SequenceBias { .. } => 2,
            Self::EncoderRepetitionPenalty { .. } => 3,
            Self::RepetitionPenalty { .. } | Self::FrequencyPresence { .. } => 4,
            Self::NoRepeatNgram { .. } => 5,
            Self::EncoderNoRepeatNgram { .. } => 6,
            Self::BadWords { .. } => 7,
            Self::MinLength { .. } => 8,
            Self::MinNewTokens { .. } => 9,
            Self::ForcedBos { .. } => 11,
            Self::ForcedEos { .. } => 12,
            Self::RemoveInvalid => 13,
            Self::ExponentialDecay { .. } => 14,
            Self::Suppress { .. } => 15,
            Self::BeginSuppress { .. } => 16,
            // Top-H came later and stands between temperature and top-k.
            Self::Temperature { .. } | Self::TopH { .. } => 18,
            Self::TopK { .. } => 19,
            Self::TopP { .. } => 20,
            Self::MinP { .. } => 21,
            Self::Typical { .. } => 22,
            Self::Epsilon { .. } => 23,
            Self::Eta { .. } => 24,
            Self::Watermark(_) => 25,
            Self::Renormalize => 26,
        }
    }

    /// Whether it decides which tokens stay by their probability: what a sampler with a
    /// truncation of its own (Mirostat) replaces.
    #[must_use]
    pub fn truncates(&self) -> bool {
        matches!(self, Self::TopH { .. }) || (19..=24).contains(&self.place())
    }
}

impl LogitsProcessor for Processor {
    fn process(&self, ctx: &Context<'_>, scores: &mut [f32]) -> Result<()> {
        match self {
            Self::Guidance { scale, space } => return guidance::mix(ctx, scores, *scale, *space),
            Self::SequenceBias { biases } => bias::sequences(ctx, scores, biases),
            Self::EncoderRepetitionPenalty { penalty } => {
                penalty::repetition(ctx.prompt(), scores, 1.0 / penalty)
            }
            Self::RepetitionPenalty { penalty } => {
                penalty::repetition(ctx.tokens, scores, *penalty)
            }
            Self::FrequencyPresence {
                frequency,
                presence,
            } => {
                penalty::frequency_presence(ctx.generated(), scores, *frequency, *presence);
            }
            Self::NoRepeatNgram { size } => {
                ngram::forbid_repeats(ctx.tokens, ctx.tokens, *size, scores)
            }
            Self::EncoderNoRepeatNgram { size } => {
                ngram::forbid_repeats(ctx.prompt(), ctx.tokens, *size, scores)
            }
            Self::BadWords { words } => bias::bad_words(ctx, scores, words),
            Self::MinLength { length, eos } => {
                if ctx.tokens.len() < *length {
                    bias::remove(scores, eos);
                }
            }
            Self::MinNewTokens { tokens, eos } => {
                if ctx.generated().len() < *tokens {
                    bias::remove(scores, eos);
                }
            }
            Self::ForcedBos { token } => {
                if ctx.tokens.len() == 1 {
                    bias::force(scores, &[*token]);
                }
            }
            Self::ForcedEos { tokens } => {
                if ctx.max_length == Some(ctx.tokens.len() + 1) {
                    bias::force(scores, tokens);
                }
            }
            Self::RemoveInvalid => filter::remove_invalid(scores),
            Self::ExponentialDecay { start, factor, eos } => {
                length::exponential_decay(ctx, scores, *start, *factor, eos);
            }
            Self::Suppress { tokens } => bias::remove(scores, tokens),
            Self::BeginSuppress {
                tokens,
                after_forced,
            } => {
                let begin = ctx.prompt_len + usize::from(*after_forced && ctx.prompt_len == 1);
                if ctx.tokens.len() == begin {
                    bias::remove(scores, tokens);
                }
            }
            Self::Temperature { temperature } => filter::temperature(scores, *temperature),
            Self::TopH { share } => filter::top_h(scores, *share),
            Self::TopK { k } => filter::top_k(scores, *k),
            Self::TopP { mass } => return top_p::keep(scores, *mass),
            Self::MinP { share } => filter::min_p(scores, *share),
            Self::Typical { mass } => filter::typical(scores, *mass),
            Self::Epsilon { cutoff } => filter::epsilon(scores, *cutoff),
            Self::Eta { cutoff } => filter::eta(scores, *cutoff),
            Self::Watermark(watermark) => watermark.process(ctx, scores),
            Self::Renormalize => filter::renormalize(scores),
        }
        Ok(())
    }
}
