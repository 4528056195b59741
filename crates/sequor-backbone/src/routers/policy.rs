//! Who decides which layers run.

use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::{Error, Result};
use serde::{Deserialize, Serialize};

/// Least share or probability that keeps a layer.
const THRESHOLD: f64 = 0.5;

/// What the routers' words about the tokens of a prompt amount to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GateRule {
    /// The mean probability over the prompt's tokens is at least one half.
    MeanProb,
    /// At least half of the prompt's tokens vote for the layer.
    #[default]
    Majority,
}

/// What the layers do with the prompt itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefill {
    /// All layers run on the prompt; the choice concerns decoding alone.
    #[default]
    Full,
    /// A layer that is left out is left out on the prompt too: its router decides just before
    /// it would run.
    Gated,
}

/// What the router of one layer said about a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    /// Mean probability over the tokens.
    pub mean: f64,
    /// Share of the tokens whose probability is at least one half.
    pub votes: f64,
}

impl LayerScore {
    /// The score of the probabilities of some tokens; zero for none.
    pub fn of(probabilities: impl IntoIterator<Item = f32>) -> Self {
        let (mut n, mut sum, mut votes) = (0usize, 0.0, 0usize);
        for p in probabilities {
            n += 1;
            sum += f64::from(p);
            votes += usize::from(f64::from(p) >= THRESHOLD);
        }
        let n = n.max(1) as f64;
        Self {
            mean: sum / n,
            votes: votes as f64 / n,
        }
    }
}

/// How routers decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// How a layer's score is read.
    pub rule: GateRule,
    /// Keep exactly this many layers, those with the best scores, instead of those above
    /// one half: every sequence costs the same.
    pub keep: Option<usize>,
    /// Never leave out the first two layers and the last.
    pub protect: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            rule: GateRule::default(),
            keep: None,
            protect: true,
        }
    }
}

impl Policy {
    /// A policy that keeps this share of the layers of a network, rounded.
    pub fn keeping(share: f64, layers: usize) -> Self {
        Self {
            keep: Some((share * layers as f64).round().max(0.0) as usize),
            ..Self::default()
        }
    }

    /// Is this layer of a network of `layers` layers never left out?
    pub fn protects(&self, layer: usize, layers: usize) -> bool {
        self.protect && protected(layer, layers)
    }

    /// The gate of one layer by its score alone.
    pub fn gate(&self, layer: usize, layers: usize, score: LayerScore) -> bool {
        let value = match self.rule {
            GateRule::MeanProb => score.mean,
            GateRule::Majority => score.votes,
        };
        self.protects(layer, layers) || value >= THRESHOLD
    }

    /// The gates of all layers. With a number to keep, ties go by mean probability, then to
    /// the lower layer.
    pub fn decide(&self, scores: &[LayerScore]) -> Vec<bool> {
        let layers = scores.len();
        let Some(keep) = self.keep else {
            let gate = |(l, s): (usize, &LayerScore)| self.gate(l, layers, *s);
            return scores.iter().enumerate().map(gate).collect();
        };
        let mut order: Vec<(usize, &LayerScore)> = scores.iter().enumerate().collect();
        order.sort_by(|(l, a), (m, b)| {
            let free = |l: usize| !self.protects(l, layers);
            let (first, second) = match self.rule {
                GateRule::MeanProb => (b.mean.total_cmp(&a.mean), std::cmp::Ordering::Equal),
                GateRule::Majority => (b.votes.total_cmp(&a.votes), b.mean.total_cmp(&a.mean)),
            };
            free(*l)
                .cmp(&free(*m))
                .then(first)
                .then(second)
                .then(l.cmp(m))
        });
        let mut gates = vec![false; layers];
        for (layer, _) in order.into_iter().take(keep) {
            if let Some(gate) = gates.get_mut(layer) {
                *gate = true;
            }
        }
        gates
    }

    /// Checks it against a network.
    ///
    /// # Errors
    /// [`Error::Config`] when the number to keep is beyond the layers or below those that are
    /// protected, or cannot be known in time.
    pub fn validate(&self, layers: usize, prefill: Prefill) -> Result<()> {
        let Some(keep) = self.keep else {
            return Ok(());
        };
        let least = (0..layers).filter(|&l| self.protects(l, layers)).count();
        if !(least..=layers).contains(&keep) {
            return Err(Error::Config(format!(
                "{keep} layers to keep must lie in {least}..={layers} ({least} are protected)"
            )));
        }
        if prefill == Prefill::Gated {
            return Err(Error::Config(
                "a number of layers to keep needs prefill 'full': the best layers are known when the prompt went through all of them".into(),
            ));
        }
        Ok(())
    }
}

fn protected(layer: usize, layers: usize) -> bool {
    layer < 2 || layer + 1 == layers
}

/// Which layers decoding runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerSelection {
    /// All of them: the base model.
    #[default]
    All,
    /// Those that the routers choose for each prompt.
    Routed(Policy),
    /// These, for every prompt. The first `n` layers are an early exit; the best by mean
    /// score ([`RouterConfig::static_best`](super::RouterConfig::static_best)) ignore the
    /// prompt otherwise.
    Fixed(Vec<usize>),
    /// This many layers at even distances, the first and the last among them (Unified
    /// Skipping, Liu et al. 2024).
    EvenlySpaced(usize),
    /// This many layers: the protected ones, then any.
    Random {
        /// How many layers.
        keep: usize,
        /// Seed of the choice.
        seed: u64,
    },
}

impl LayerSelection {
    /// The gates of a selection that does not depend on the prompt; `None` for
    /// [`Routed`](Self::Routed).
    ///
    /// # Errors
    /// [`Error::Config`] when a layer does not exist or more are wanted than there are.
    pub fn gates(&self, layers: usize) -> Result<Option<Vec<bool>>> {
        let wanted = |n: usize| {
            if n <= layers {
                Ok(n)
            } else {
                Err(Error::Config(format!(
                    "{n} layers of a network of {layers}"
                )))
            }
        };
        let chosen: Vec<usize> = match self {
            Self::All => (0..layers).collect(),
            Self::Routed(_) => return Ok(None),
            Self::Fixed(list) => list.clone(),
            Self::EvenlySpaced(n) => {
                let n = wanted(*n)?;
                let gaps = n.saturating_sub(1).max(1);
                (0..n)
                    .map(|i| (i * layers.saturating_sub(1) + gaps / 2) / gaps)
                    .collect()
            }
            Self::Random { keep, seed } => {
                let mut order: Vec<usize> = (0..layers).collect();
                Key::new(*seed, 0)
                    .stream(0, Purpose::Data)
                    .shuffle(&mut order);
                order.sort_by_key(|&l| !protected(l, layers)); // stable
                order.truncate(wanted(*keep)?);
                order
            }
        };
        let mut gates = vec![false; layers];
        for layer in chosen {
            *gates.get_mut(layer).ok_or_else(|| {
                Error::Config(format!("layer {layer} of a network of {layers} layers"))
            })? = true;
        }
        Ok(Some(gates))
    }
}
