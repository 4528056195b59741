//! Green-list watermarks (Kirchenbauer et al. 2023, "A Watermark for Large Language
//! Models"), bit-compatible with Hugging Face on a CPU.
//!
//! The last tokens seed a generator, which shuffles the vocabulary; the first part of
//! it is "green" and gains a bias. Whoever knows the key can count green tokens in a
//! text. The list must be the one that PyTorch's CPU generator would give, or existing
//! detectors would not find it; hence a Mersenne Twister here, used for nothing else.

use std::sync::{Arc, OnceLock};

use sequor_kernels::select;
use serde::{Deserialize, Serialize};

use super::Context;
use crate::{Error, Result};

/// Size of the table of the self-hashing scheme, a published constant.
const TABLE: usize = 1_000_003;
/// Candidates that the self-hashing scheme tries.
const CANDIDATES: usize = 40;

/// Options, named as in Hugging Face's `watermarking_config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatermarkConfig {
    /// Part of the vocabulary that is green, `[0, 1]`.
    pub greenlist_ratio: f64,
    /// Added to the scores of green tokens.
    pub bias: f64,
    /// The key.
    pub hashing_key: i64,
    /// What seeds the list.
    pub seeding_scheme: SeedingScheme,
    /// How many tokens the self-hashing scheme looks back, at least 1.
    pub context_width: usize,
}

/// What seeds a green list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeedingScheme {
    /// The last token (algorithm 2 of the paper).
    #[default]
    LeftHash,
    /// The last tokens and the candidate itself (algorithm 3).
    SelfHash,
}

impl Default for WatermarkConfig {
    fn default() -> Self {
        Self {
            greenlist_ratio: 0.25,
            bias: 2.0,
            hashing_key: 15_485_863,
            seeding_scheme: SeedingScheme::LeftHash,
            context_width: 1,
        }
    }
}

impl WatermarkConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// `Input` naming the option.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.greenlist_ratio) {
            return Err(Error::input(
                "watermarking_config.greenlist_ratio",
                self.greenlist_ratio,
                "a number in [0, 1]",
            ));
        }
        if !self.bias.is_finite() {
            return Err(Error::input(
                "watermarking_config.bias",
                self.bias,
                "a finite number",
            ));
        }
        if self.context_width == 0 {
            return Err(Error::input(
                "watermarking_config.context_width",
                0,
                "at least 1",
            ));
        }
        Ok(())
    }
}

/// A watermark that is ready for use.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "WatermarkConfig", into = "WatermarkConfig")]
pub struct Watermark {
    config: WatermarkConfig,
    /// A keyed permutation of `0..TABLE`, made when first needed.
    table: Arc<OnceLock<Vec<u32>>>,
}

impl Watermark {
    /// A watermark with these options.
    ///
    /// # Errors
    /// `Input` naming an option that is out of range.
    pub fn new(config: WatermarkConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            table: Arc::default(),
        })
    }

    /// Green tokens after `tokens` for a vocabulary of `vocab`, in the order of the
    /// shuffle: what a detector needs.
    #[must_use]
    pub fn green_list(&self, tokens: &[u32], vocab: usize) -> Vec<u32> {
        let mut list = Mersenne::new(self.seed(tokens) as u32).permutation(vocab);
        list.truncate((vocab as f64 * self.config.greenlist_ratio) as usize);
        list
    }

    pub(super) fn process(&self, ctx: &Context<'_>, scores: &mut [f32]) {
        if ctx.tokens.is_empty() || ctx.tokens.len() < self.config.context_width {
            return;
        }
        let green = match self.config.seeding_scheme {
            SeedingScheme::LeftHash => self.green_list(ctx.tokens, scores.len()),
            SeedingScheme::SelfHash => {
                let best = select::top_n(scores, CANDIDATES)
                    .into_iter()
                    .filter_map(|(i, _)| u32::try_from(i).ok());
                let mut tokens = ctx.tokens.to_vec();
                best.filter(|&candidate| {
                    tokens.truncate(ctx.tokens.len());
                    tokens.push(candidate);
                    self.green_list(&tokens, scores.len()).contains(&candidate)
                })
                .collect()
            }
        };
        for token in green {
            if let Some(score) = scores.get_mut(token as usize) {
                *score += self.config.bias as f32;
            }
        }
    }

    /// The 64-bit seed; the generator uses its low 32 bits.
    fn seed(&self, tokens: &[u32]) -> u64 {
        let key = self.config.hashing_key;
        let last = tokens.last().copied().unwrap_or(0);
        // Products wrap as 64-bit integers, then are reduced modulo 2^64 - 1.
        let product = match self.config.seeding_scheme {
            SeedingScheme::LeftHash => i128::from(key) * i128::from(last),
            SeedingScheme::SelfHash => {
                let context = tokens
                    .get(tokens.len().saturating_sub(self.config.context_width)..)
                    .unwrap_or_default();
                let b = self.entry(last);
                let products = context
                    .iter()
                    .map(|&t| key.wrapping_mul(self.entry(t)).wrapping_mul(b));
                i128::from(products.min().unwrap_or(0))
            }
        };
        product.rem_euclid(i128::from(u64::MAX)) as u64
    }

    fn entry(&self, token: u32) -> i64 {
        let table = self
            .table
            .get_or_init(|| Mersenne::new(self.config.hashing_key as u32).permutation(TABLE));
        table
            .get(token as usize % TABLE)
            .map_or(1, |&x| i64::from(x) + 1)
    }
}

impl PartialEq for Watermark {
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config
    }
}

impl TryFrom<WatermarkConfig> for Watermark {
    type Error = Error;

    fn try_from(config: WatermarkConfig) -> Result<Self> {
        Self::new(config)
    }
}

impl From<Watermark> for WatermarkConfig {
    fn from(watermark: Watermark) -> Self {
        watermark.config
    }
}

/// MT19937 (Matsumoto and Nishimura 1998), the generator of PyTorch on a CPU.
struct Mersenne {
    state: [u32; Self::N],
    next: usize,
}

impl Mersenne {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [0; Self::N];
        let mut last = seed;
        for (i, word) in (0_u32..).zip(&mut state) {
            if i > 0 {
                last = (last ^ (last >> 30))
                    .wrapping_mul(1_812_433_253)
                    .wrapping_add(i);
            }
            *word = last;
        }
        Self {
            state,
            next: Self::N,
        }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == Self::N {
            for i in 0..Self::N {
                let joined =
                    self.state[i] & 0x8000_0000 | self.state[(i + 1) % Self::N] & 0x7fff_ffff;
                let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + Self::M) % Self::N] ^ (joined >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A shuffle of `0..n` as `torch.randperm` makes it on a CPU.
    fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut items: Vec<u32> = (0_u32..).take(n).collect();
        for i in 0..n.saturating_sub(1) {
            let step = self.next_u32() as usize % (n - i);
            items.swap(i, i + step);
        }
        items
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sequor_nn::{Device, Kind, Tensor, tch};

    #[test]
    fn permutation_is_the_one_of_torch() {
        for (seed, n) in [(0_u32, 1_i64), (15_485_863, 48), (123_456_789, 1000)] {
            tch::manual_seed(i64::from(seed));
            let expected =
                Vec::<i64>::try_from(Tensor::f_randperm(n, (Kind::Int64, Device::Cpu)).unwrap())
                    .unwrap();
            let found: Vec<i64> = Mersenne::new(seed)
                .permutation(n as usize)
                .into_iter()
                .map(i64::from)
                .collect();
            assert_eq!(found, expected, "seed {seed}");
        }
    }

    #[test]
    fn green_tokens_gain_the_bias_and_nothing_else_changes() {
        for seeding_scheme in [SeedingScheme::LeftHash, SeedingScheme::SelfHash] {
            let watermark = Watermark::new(WatermarkConfig {
                seeding_scheme,
                ..Default::default()
            })
            .unwrap();
            let tokens = [3, 17, 5];
            let plain: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut scores = plain.clone();
            watermark.process(&Context::new(&tokens, 1), &mut scores);
            let green: Vec<u32> = (0..64)
                .filter(|&i| scores[i as usize] != plain[i as usize])
                .collect();
            assert!(
                green
                    .iter()
                    .all(|&i| scores[i as usize] == plain[i as usize] + 2.0)
            );
            match seeding_scheme {
                SeedingScheme::LeftHash => {
                    let mut expected = watermark.green_list(&tokens, 64);
                    expected.sort_unstable();
                    assert_eq!(green, expected);
                }
                // On average a quarter of the 40 candidates is green.
                SeedingScheme::SelfHash => assert!((1..=25).contains(&green.len()), "{green:?}"),
            }
        }
    }

    #[test]
    fn a_short_context_is_left_alone_and_bad_options_are_refused() {
        let watermark = Watermark::new(WatermarkConfig {
            context_width: 4,
            ..Default::default()
        })
        .unwrap();
        let mut scores = [1.0; 8];
        watermark.process(&Context::new(&[1, 2], 1), &mut scores);
        assert_eq!(scores, [1.0; 8]);
        assert!(
            Watermark::new(WatermarkConfig {
                greenlist_ratio: 1.5,
                ..Default::default()
            })
            .is_err()
        );
        assert!(
            Watermark::new(WatermarkConfig {
                context_width: 0,
                ..Default::default()
            })
            .is_err()
        );
    }
}
