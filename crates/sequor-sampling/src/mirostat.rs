//! Mirostat: sampling with feedback that keeps the surprise of the text near a target
//! (Basu et al. 2021).
//!
//! Before each draw, tokens that are too surprising for the current bound `mu` are
//! removed; after it, `mu` moves against the error: `mu <- mu - eta (s - tau)`, where
//! `s = -log2 p(x)` is the surprise of the drawn token under the untruncated law.
//! Version 2 keeps tokens with `s_i <= mu`; version 1 derives a top-k from a Zipf fit.
//!
//! It replaces top-k, top-p and their like. The bound is part of the history: under
//! speculation it advances along the accepted path only.

use sequor_kernels::select;
use serde::{Deserialize, Serialize};

use crate::distribution::{Categorical, best_score};
use crate::{Error, Result};

/// Tokens that version 1 fits the exponent on.
const FIT: usize = 100;

/// Options of Mirostat.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MirostatConfig {
    /// Which algorithm.
    pub version: MirostatVersion,
    /// Target surprise in bits, above 0.
    pub tau: f64,
    /// Learning rate, above 0.
    pub eta: f64,
}

/// Which algorithm of the paper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MirostatVersion {
    /// Zipf fit and top-k.
    V1,
    /// A plain bound on surprise.
    #[default]
    V2,
}

impl Default for MirostatConfig {
    fn default() -> Self {
        Self {
            version: MirostatVersion::V2,
            tau: 5.0,
            eta: 0.1,
        }
    }
}

/// The state of one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mirostat {
    config: MirostatConfig,
    mu: f64,
}

impl Mirostat {
    /// The state at the beginning, `mu = 2 tau`.
    ///
    /// # Errors
    /// `Input` when `tau` or `eta` is not a positive number.
    pub fn new(config: MirostatConfig) -> Result<Self> {
        for (name, value) in [("mirostat.tau", config.tau), ("mirostat.eta", config.eta)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::input(name, value, "a finite number > 0"));
            }
        }
        Ok(Self {
            config,
            mu: 2.0 * config.tau,
        })
    }

    /// The current bound in bits.
    #[must_use]
    pub fn mu(&self) -> f64 {
        self.mu
    }

    /// Removes what is too surprising from processed `scores`. The best token stays.
    ///
    /// # Errors
    /// `Logits` when the row has no distribution.
    pub fn truncate(&self, scores: &mut [f32]) -> Result<()> {
        let (_, best) = best_score(scores)?;
        match self.config.version {
            MirostatVersion::V1 => {
                let k = self.zipf_top_k(scores);
                select::keep_top_k(scores, k, 1);
            }
            MirostatVersion::V2 => {
                // -log2 p <= mu  <=>  score >= log_sum_exp - mu ln 2
                let bar = select::log_sum_exp(scores) - self.mu * std::f64::consts::LN_2;
                for score in scores {
                    if f64::from(*score) < bar && *score < best {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        Ok(())
    }

    /// Moves the bound after `token` was drawn; `law` is the untruncated one.
    pub fn observe(&mut self, law: &Categorical, token: u32) {
        let surprise = -law.prob(token).log2();
        if surprise.is_finite() {
            self.mu -= self.config.eta * (surprise - self.config.tau);
        }
    }

    /// The `k` whose expected cross-entropy is `mu` under a Zipf law with the exponent
    /// that fits the best tokens (equations 5 and 13 of the paper).
    fn zipf_top_k(&self, scores: &[f32]) -> usize {
        let best = select::top_n(scores, FIT);
        let (mut tb, mut tt) = (0.0, 0.0);
        for (i, pair) in best.windows(2).enumerate() {
            if let [(_, a), (_, b)] = pair {
                let t = ((i as f64 + 2.0) / (i as f64 + 1.0)).ln();
                // A difference of scores is the logarithm of a ratio of probabilities.
                tb += t * f64::from(a - b);
                tt += t * t;
            }
        }
        let vocab = scores.len() as f64;
        let exponent = if tt > 0.0 { tb / tt } else { 0.0 };
        let epsilon = exponent - 1.0;
        // epsilon / (1 - V^-epsilon), whose limit at 0 is 1 / ln V.
        let share = if epsilon.abs() < 1e-9 {
            1.0 / vocab.ln()
        } else {
            epsilon / (1.0 - vocab.powf(-epsilon))
        };
        let k = (share * self.mu.exp2()).powf(1.0 / exponent);
        if k.is_nan() {
            scores.len()
        } else {
            (k.round().clamp(1.0, vocab)) as usize
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zipf(vocab: usize, exponent: f64) -> Vec<f32> {
        (0..vocab)
            .map(|i| (-exponent * (i as f64 + 1.0).ln()) as f32)
            .collect()
    }

    fn surprise(scores: &[f32]) -> Vec<f64> {
        let law = Categorical::from_scores(scores).unwrap();
        (0..scores.len() as u32)
            .map(|i| -law.prob(i).log2())
            .collect()
    }

    #[test]
    fn version_two_keeps_what_is_not_too_surprising() {
        let scores = zipf(50, 1.3);
        let plain = surprise(&scores);
        let mut state = Mirostat::new(MirostatConfig {
            tau: 2.0,
            ..Default::default()
        })
        .unwrap();
        let mut kept = scores.clone();
        state.truncate(&mut kept).unwrap();
        for (i, s) in plain.iter().enumerate() {
            assert_eq!(kept[i].is_finite(), *s <= 4.0, "token {i} has surprise {s}");
        }
        // However small the bound, the best token stays.
        state.mu = -3.0;
        state.truncate(&mut kept).unwrap();
        assert_eq!(kept.iter().filter(|s| s.is_finite()).count(), 1);
        assert!(kept[0].is_finite());
    }

    #[test]
    fn version_one_finds_the_exponent_and_a_monotone_k() {
        let config = MirostatConfig {
            version: MirostatVersion::V1,
            tau: 3.0,
            eta: 0.1,
        };
        let mut state = Mirostat::new(config).unwrap();
        let mut last = 0;
        for mu in [0.5, 2.0, 4.0, 6.0] {
            state.mu = mu;
            // By hand from the formula with the true exponent.
            let (s, v) = (1.2_f64, 1000.0_f64);
            let k = ((s - 1.0) * 2_f64.powf(mu) / (1.0 - v.powf(1.0 - s))).powf(1.0 / s);
            let expected = k.round().clamp(1.0, v) as usize;
            assert_eq!(state.zipf_top_k(&zipf(1000, 1.2)), expected);
            assert!(expected >= last);
            last = expected;
        }
        // Degenerate rows: uniform, one token, exponent exactly one.
        for row in [vec![0.0; 10], vec![1.0], zipf(64, 1.0)] {
            assert!((1..=row.len()).contains(&state.zipf_top_k(&row)));
        }
    }

    #[test]
    fn the_bound_moves_against_the_error() {
        let mut state = Mirostat::new(MirostatConfig {
            tau: 3.0,
            eta: 0.5,
            ..Default::default()
        })
        .unwrap();
        let law = Categorical::from_weights(vec![1.0, 1.0, 2.0, 0.0]).unwrap();
        state.observe(&law, 2);
        assert!((state.mu() - (6.0 - 0.5 * (1.0 - 3.0))).abs() < 1e-12);
        let before = state.mu();
        state.observe(&law, 3);
        assert_eq!(state.mu(), before, "an impossible token teaches nothing");
        assert!(
            Mirostat::new(MirostatConfig {
                tau: 0.0,
                ..Default::default()
            })
            .is_err()
        );
        assert!(
            Mirostat::new(MirostatConfig {
                eta: f64::NAN,
                ..Default::default()
            })
            .is_err()
        );
    }
}
