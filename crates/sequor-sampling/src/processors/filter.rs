//! Reshaping and truncation: thin names over the selection kernels.
//!
//! A row that has no distribution (NaN, plus infinity, everything removed) passes
//! through unchanged; whoever draws from it reports the problem.

use sequor_kernels::select;

/// At least this many tokens always stay.
const MIN_KEEP: usize = 1;

pub(super) fn remove_invalid(scores: &mut [f32]) {
    for score in scores {
        *score = if score.is_nan() {
            0.0
        } else {
            score.clamp(f32::MIN, f32::MAX)
        };
    }
}

pub(super) fn temperature(scores: &mut [f32], temperature: f32) {
    if !(select::largest_finite(scores) / temperature).is_finite() {
        // A temperature close to zero overflows. The law does not change when the best
        // score is moved to 0 first, and then only hopeless tokens leave the range.
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|s| *s -= best);
    }
    // Options were checked: it is positive.
    select::divide_in_place(scores, temperature);
}

pub(super) fn top_h(scores: &mut [f32], share: f64) {
    select::keep_top_h(scores, share, MIN_KEEP);
}

pub(super) fn top_k(scores: &mut [f32], k: usize) {
    select::keep_top_k(scores, k, MIN_KEEP);
}

pub(super) fn min_p(scores: &mut [f32], share: f64) {
    select::keep_min_p(scores, share, MIN_KEEP);
}

pub(super) fn typical(scores: &mut [f32], mass: f64) {
    select::keep_typical(scores, mass, MIN_KEEP);
}

pub(super) fn epsilon(scores: &mut [f32], cutoff: f64) {
    select::keep_epsilon(scores, cutoff, MIN_KEEP);
}

pub(super) fn eta(scores: &mut [f32], cutoff: f64) {
    select::keep_eta(scores, cutoff, MIN_KEEP);
}

pub(super) fn renormalize(scores: &mut [f32]) {
    select::log_softmax_in_place(scores);
}
