//! The rules that remove entries from a row of scores.
//!
//! Source of the semantics: the processors of the same names in Hugging Face
//! `transformers`; of the ideas: top-p (Holtzman et al. 2020), typical (Meister et
//! al. 2023), epsilon and eta (Hewitt et al. 2022), min-p (Nguyen et al. 2024),
//! top-h (Potraghloo et al. 2025).

use super::best::{Ranked, best, top_k_threshold};
use super::lanes::{Extent, REMOVED, log_weight_and_entropy, update, weight_sum};
use super::mass::{cut_by_score, cut_by_typicality};
use super::wide::wide;

/// Keeps the `k` best and everything that ties with the last of them. `k = 0`
/// means "off": nothing is removed.
pub fn keep_top_k(scores: &mut [f32], k: usize, min_keep: usize) -> bool {
    if Extent::of(scores).is_none() {
        return false;
    }
    if k > 0 && k.max(min_keep) < scores.len() {
        let bar = top_k_threshold(scores, k.max(min_keep));
        remove_below(scores, bar);
    }
    true
}

/// Nucleus: keeps the smallest set of best entries that holds at least `top_p` of
/// the probability. `top_p >= 1` removes nothing.
pub fn keep_top_p(scores: &mut [f32], top_p: f64, min_keep: usize) -> bool {
    match Nucleus::of(scores, top_p, min_keep) {
        None => return false,
        Some(Nucleus::Everything) => {}
        Some(Nucleus::UpTo { score, index }) => remove_after(scores, score, index),
    }
    true
}

/// What top-p keeps of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Nucleus {
    /// All of it.
    Everything,
    /// What is better than this entry, the entry, and what equals it at a lower index.
    UpTo {
        /// Its score.
        score: f32,
        /// Its index.
        index: usize,
    },
}

impl Nucleus {
    /// The nucleus of `scores`, as [`keep_top_p`] takes it; `None` if the row is bad.
    #[must_use]
    pub fn of(scores: &[f32], top_p: f64, min_keep: usize) -> Option<Self> {
        let extent = Extent::of(scores)?;
        if top_p >= 1.0 {
            return Some(Self::Everything);
        }
        let last = cut_by_score(scores, extent, top_p, min_keep);
        Some(last.map_or(Self::Everything, |last| Self::UpTo {
            score: last.score,
            index: last.index,
        }))
    }
}

/// Keeps what has at least `min_p` times the probability of the best. Only a
/// positive `min_p` removes anything.
pub fn keep_min_p(scores: &mut [f32], min_p: f64, min_keep: usize) -> bool {
    let Some(extent) = Extent::of(scores) else {
        return false;
    };
    if !is_positive(min_p) {
        return true;
    }
    // Of probabilities only the ratio counts, so the bar is a score.
    let bar = at_least(f64::from(extent.max) + min_p.ln()).min(extent.max);
    let enough = min_keep <= 1 || scores.iter().filter(|&&x| x >= bar).count() >= min_keep;
    if enough {
        remove_below(scores, bar);
        return true;
    }
    match best(scores, min_keep).and_then(|kept| kept.into_iter().max()) {
        Some(last) => remove_after(scores, last.score(), last.index()),
        None => return false,
    }
    true
}

/// Locally typical: in the order of how far the surprise of an entry is from the
/// entropy of the row, keeps the fewest that hold at least `mass` of the
/// probability, and everything that ties with the last of them. `mass >= 1`
/// removes nothing.
pub fn keep_typical(scores: &mut [f32], mass: f64, min_keep: usize) -> bool {
    let Some(extent) = Extent::of(scores) else {
        return false;
    };
    if mass >= 1.0 {
        return true;
    }
    let (log_weight, entropy) = log_weight_and_entropy(scores, extent.max);
    // The score whose surprise equals the entropy.
    let center = f64::from(extent.max) + log_weight - entropy;
    if let Some(last) = cut_by_typicality(scores, extent, center, mass, min_keep) {
        let first_tie_to_go = if last.by_mass {
            scores.len()
        } else {
            last.index + 1
        };
        remove_atypical(scores, center, last.score, first_tie_to_go);
    }
    true
}

/// Keeps what has at least probability `epsilon`, and in any case the best
/// `min_keep` with their ties. Only a positive `epsilon` removes anything.
pub fn keep_epsilon(scores: &mut [f32], epsilon: f64, min_keep: usize) -> bool {
    let Some(extent) = Extent::of(scores) else {
        return false;
    };
    if !is_positive(epsilon) {
        return true;
    }
    let log_sum = f64::from(extent.max) + weight_sum(scores, extent.max).ln();
    let bar = at_least(log_sum + epsilon.ln());
    remove_below_but(scores, bar, extent, min_keep);
    true
}

/// Entropy-adaptive: keeps what has at least probability
/// `min(epsilon, sqrt(epsilon) * exp(-entropy))`, entropy in nats of the row as it
/// is, and in any case the best `min_keep` with their ties. Only a positive
/// `epsilon` removes anything.
pub fn keep_eta(scores: &mut [f32], epsilon: f64, min_keep: usize) -> bool {
    let Some(extent) = Extent::of(scores) else {
        return false;
    };
    if !is_positive(epsilon) {
        return true;
    }
    let (log_weight, entropy) = log_weight_and_entropy(scores, extent.max);
    let log_eta = epsilon.ln().min(0.5 * epsilon.ln() - entropy);
    let bar = at_least(f64::from(extent.max) + log_weight + log_eta);
    remove_below_but(scores, bar, extent, min_keep);
    true
}

/// Bounded entropy: among the best 100, renormalised, keeps the best while the sum
/// of their terms of the entropy stays within `top_h` times the whole.
pub fn keep_top_h(scores: &mut [f32], top_h: f64, min_keep: usize) -> bool {
    /// How many of the best the rule looks at.
    const CONSIDERED: usize = 100;
    let Some(extent) = Extent::of(scores) else {
        return false;
    };
    let Some(mut head) = best(scores, CONSIDERED.max(min_keep)) else {
        return false;
    };
    head.sort_unstable();
    let considered = &head[..head.len().min(CONSIDERED)];
    let weight = |entry: &Ranked| (f64::from(entry.score()) - f64::from(extent.max)).exp();
    let total: f64 = considered.iter().map(weight).sum();
    // Sums of the terms of the entropy, up to each entry.
    let sums: Vec<f64> = considered
        .iter()
        .map(|entry| weight(entry) / total)
        .map(|p| if p > 0.0 { -p * p.ln() } else { 0.0 })
        .scan(0.0, |sum, term| {
            *sum += term;
            Some(*sum)
        })
        .collect();
    let bound = top_h * sums.last().copied().unwrap_or(0.0);
    let within = sums.iter().take_while(|&&sum| sum <= bound).count();
    let kept = within.max(min_keep).max(1).min(head.len());
    if let Some(last) = kept.checked_sub(1).and_then(|at| head.get(at)) {
        remove_after(scores, last.score(), last.index());
    }
    true
}

/// False also for NaN.
fn is_positive(x: f64) -> bool {
    x > 0.0
}

wide! {
    /// Removes what is below `bar`.
    fn remove_below(scores: &mut [f32], bar: f32) -> () {
        update(scores, |x| if x < bar { REMOVED } else { x });
    }
}

wide! {
    /// Removes what is not above `bar`.
    fn remove_up_to(scores: &mut [f32], bar: f32) -> () {
        update(scores, |x| if x <= bar { REMOVED } else { x });
    }
}

wide! {
    /// Removes what is farther from `center` than `last`, and from index
    /// `first_tie_to_go` on also what is as far.
    fn remove_atypical(scores: &mut [f32], center: f64, last: f32, first_tie_to_go: usize) -> () {
        let bar = (center - f64::from(last)).abs();
        let far = |x: f32| (center - f64::from(x)).abs();
        let (early, late) = scores.split_at_mut(first_tie_to_go);
        update(early, |x| if far(x) > bar { REMOVED } else { x });
        update(late, |x| if far(x) >= bar { REMOVED } else { x });
    }
}

/// Removes what is below `bar`, but none of the best `min_keep` and their ties.
fn remove_below_but(scores: &mut [f32], bar: f32, extent: Extent, min_keep: usize) {
    let floor = if min_keep <= 1 {
        extent.max
    } else {
        top_k_threshold(scores, min_keep)
    };
    remove_below(scores, bar.min(floor));
}

/// Removes what is worse than `score`, and what ties with it at a later index.
fn remove_after(scores: &mut [f32], score: f32, index: usize) {
    let (early, late) = scores.split_at_mut(index.saturating_add(1).min(scores.len()));
    remove_below(early, score);
    remove_up_to(late, score);
}

/// The smallest single that is not below `x`: comparing scores with it is the same
/// as comparing them with `x` in double precision.
fn at_least(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) < x {
        nearest.next_up()
    } else {
        nearest
    }
}
