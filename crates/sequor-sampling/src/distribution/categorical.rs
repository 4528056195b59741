//! A law over the tokens `0..vocab`.

use sequor_kernels::rng::Stream;
use sequor_kernels::select;

use super::Law;
use crate::error::LogitsProblem;
use crate::{Error, Result};

/// Residual mass below which `p` and `q` count as equal.
const NEGLIGIBLE_MASS: f64 = 1e-12;

/// A law over the tokens `0..vocab`.
///
/// Holds unnormalised weights and their sum; sums run in f64 and in index order, so
/// that a draw depends on nothing but the weights and the uniform number. When most
/// tokens were removed only the remaining ones are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Categorical {
    /// Ids of the weights in ascending order; `None` when there is one weight per token.
    ids: Option<Vec<u32>>,
    weights: Vec<f32>,
    total: f64,
    vocab: usize,
}

impl Categorical {
    /// Softmax of processed scores; `-inf` marks removed tokens. A `Vec` is reused, a
    /// slice is copied.
    ///
    /// # Errors
    /// `Logits` when a score is NaN or plus infinity or when no token is left.
    pub fn from_scores(scores: impl Into<Vec<f32>>) -> Result<Self> {
        let mut scores = scores.into();
        let max = best_score(&scores)?.1;
        let vocab = scores.len();
        let kept = scores.iter().filter(|&&s| s > f32::NEG_INFINITY).count();
        // Looking a token up by bisection pays when few are left.
        if kept < vocab / 8 {
            let left = (0_u32..)
                .zip(&scores)
                .filter(|&(_, &s)| s > f32::NEG_INFINITY);
            let (ids, weights) = left.map(|(id, &s)| (id, (s - max).exp())).unzip();
            return Ok(Self::assemble(Some(ids), weights, vocab));
        }
        if !select::softmax_in_place(&mut scores) {
            return Err(problem(LogitsProblem::AllRemoved));
        }
        Ok(Self::assemble(None, scores, vocab))
    }

    /// From weights that need not sum to one.
    ///
    /// # Errors
    /// `Input` when a weight is negative or not finite, or when their sum is not
    /// positive.
    pub fn from_weights(weights: Vec<f32>) -> Result<Self> {
        if let Some(bad) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
            return Err(Error::input("weights", bad, "finite numbers >= 0"));
        }
        let vocab = weights.len();
        let law = Self::assemble(None, weights, vocab);
        if law.total > 0.0 {
            Ok(law)
        } else {
            Err(Error::input("weights", "all zero", "a positive sum"))
        }
    }

    /// Certainty: all mass on `token`.
    ///
    /// # Errors
    /// `Input` when `token` is outside the vocabulary.
    pub fn one_hot(token: u32, vocab: usize) -> Result<Self> {
        if token as usize >= vocab {
            return Err(Error::input("token", token, format!("an id below {vocab}")));
        }
        Ok(Self::assemble(Some(vec![token]), vec![1.0], vocab))
    }

    fn assemble(ids: Option<Vec<u32>>, weights: Vec<f32>, vocab: usize) -> Self {
        let total = weights.iter().map(|&w| f64::from(w)).sum();
        Self {
            ids,
            weights,
            total,
            vocab,
        }
    }

    /// Number of tokens, removed ones included.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Probability of `token`; 0 outside the vocabulary.
    #[must_use]
    pub fn prob(&self, token: u32) -> f64 {
        let index = match &self.ids {
            None => Some(token as usize),
            Some(ids) => ids.binary_search(&token).ok(),
        };
        index
            .and_then(|i| self.weights.get(i))
            .map_or(0.0, |&w| f64::from(w) / self.total)
    }

    /// All probabilities, `[vocab]`.
    #[must_use]
    pub fn to_probs(&self) -> Vec<f64> {
        let mut probs = vec![0.0; self.vocab];
        for (id, p) in self.iter() {
            if let Some(slot) = probs.get_mut(id as usize) {
                *slot = p;
            }
        }
        probs
    }

    /// Stored tokens with their probabilities, ids ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, f64)> + '_ {
        self.entries().map(|(id, w)| (id, w / self.total))
    }

    fn entries(&self) -> impl Iterator<Item = (u32, f64)> + '_ {
        let sparse = self.ids.as_deref().unwrap_or_default().iter().copied();
        let dense = if self.ids.is_some() {
            0..0
        } else {
            0..self.weights.len() as u32
        };
        sparse
            .chain(dense)
            .zip(self.weights.iter().map(|&w| f64::from(w)))
    }

    /// The most probable token (the first of equals) and its probability.
    #[must_use]
    pub fn mode(&self) -> (u32, f64) {
        self.iter().fold((0, f64::NEG_INFINITY), |best, next| {
            if next.1 > best.1 { next } else { best }
        })
    }

    /// Entropy in nats.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        self.iter()
            .filter(|&(_, p)| p > 0.0)
            .map(|(_, p)| -p * p.ln())
            .sum()
    }

    /// The first token at which the cumulative sum in index order exceeds `u`, `u` in
    /// `[0, 1)`. Never a token without mass.
    #[must_use]
    pub fn quantile(&self, u: f64) -> u32 {
        let u = u.clamp(0.0, 1.0 - f64::EPSILON);
        match (select::sample_probs(&self.weights, u), &self.ids) {
            (Some(index), Some(ids)) => ids.get(index).copied(),
            (Some(index), None) => u32::try_from(index).ok(),
            (None, _) => None,
        }
        .unwrap_or_else(|| self.mode().0)
    }

    /// Total variation distance to `other`, in `[0, 1]`.
    #[must_use]
    pub fn total_variation(&self, other: &Self) -> f64 {
        self.iter()
            .map(|(id, p)| (p - other.prob(id)).max(0.0))
            .sum()
    }

    /// The law `norm([p - q]+)` with `self` as `p`, or `None` when the two are equal
    /// up to rounding.
    #[must_use]
    pub fn residual_law(&self, q: &Self) -> Option<Self> {
        self.reweighted(|id, p| (p - q.prob(id)).max(0.0))
    }

    /// The law given that the draw is not `token`, or `None` when nothing else is
    /// possible.
    #[must_use]
    pub fn without(&self, token: u32) -> Option<Self> {
        self.without_any(|id| id == token)
    }

    /// The law given that the draw is none of the tokens that `removed` names, or `None`
    /// when nothing else is possible.
    #[must_use]
    pub fn without_any(&self, removed: impl Fn(u32) -> bool) -> Option<Self> {
        self.reweighted(|id, p| if removed(id) { 0.0 } else { p })
    }

    fn reweighted(&self, weight: impl Fn(u32, f64) -> f64) -> Option<Self> {
        let weights: Vec<f32> = self.iter().map(|(id, p)| weight(id, p) as f32).collect();
        let law = Self::assemble(self.ids.clone(), weights, self.vocab);
        (law.total >= NEGLIGIBLE_MASS).then_some(law)
    }
}

/// The best token (the first of equals) and its score.
///
/// # Errors
/// `Logits` when a score is NaN or plus infinity or when no token is left.
pub fn best_score(scores: &[f32]) -> Result<(u32, f32)> {
    let best = select::argmax(scores).and_then(|i| Some((u32::try_from(i).ok()?, *scores.get(i)?)));
    match best {
        Some((_, f32::INFINITY)) => Err(problem(LogitsProblem::Infinite)),
        Some(best) => Ok(best),
        None if scores.is_empty() => Err(problem(LogitsProblem::Empty)),
        None if scores.iter().any(|s| s.is_nan()) => Err(problem(LogitsProblem::NotANumber)),
        None => Err(problem(LogitsProblem::AllRemoved)),
    }
}

fn problem(problem: LogitsProblem) -> Error {
    Error::Logits {
        position: 0,
        problem,
    }
}

impl Law for Categorical {
    type Unit = u32;

    fn sample(&self, stream: &mut Stream) -> u32 {
        self.quantile(stream.uniform())
    }

    fn log_density(&self, unit: &u32) -> f64 {
        self.prob(*unit).ln()
    }

    fn density(&self, unit: &u32) -> f64 {
        self.prob(*unit)
    }

    fn ratio(&self, q: &Self, unit: &u32) -> f64 {
        let p = self.prob(*unit);
        if p > 0.0 { p / q.prob(*unit) } else { 0.0 }
    }

    /// Closed form: one inverse-CDF draw from [`Categorical::residual_law`]. Equal laws
    /// are rejected with probability 0 up to rounding; then `p` itself is drawn from.
    fn residual(&self, q: &Self, stream: &mut Stream) -> Result<u32> {
        let u = stream.uniform();
        Ok(self
            .residual_law(q)
            .map_or_else(|| self.quantile(u), |law| law.quantile(u)))
    }
}
