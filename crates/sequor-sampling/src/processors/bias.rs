//! Tokens that are favoured, forbidden or forced by name.
//!
//! Ids outside the vocabulary are ignored here; [`GenerationConfig::validate`] reports
//! them before generation begins.
//!
//! [`GenerationConfig::validate`]: crate::GenerationConfig::validate

use super::Context;

/// Removes `tokens`.
pub(super) fn remove(scores: &mut [f32], tokens: &[u32]) {
    for &token in tokens {
        add(scores, token, f32::NEG_INFINITY);
    }
}

/// Removes everything but `tokens`, which become equally likely.
pub(super) fn force(scores: &mut [f32], tokens: &[u32]) {
    scores.fill(f32::NEG_INFINITY);
    for &token in tokens {
        if let Some(score) = scores.get_mut(token as usize) {
            *score = 0.0;
        }
    }
}

pub(super) fn sequences(ctx: &Context<'_>, scores: &mut [f32], biases: &[(Vec<u32>, f32)]) {
    for (sequence, bias) in biases {
        add_where_completed(ctx, scores, sequence, *bias);
    }
}

pub(super) fn bad_words(ctx: &Context<'_>, scores: &mut [f32], words: &[Vec<u32>]) {
    for word in words {
        add_where_completed(ctx, scores, word, f32::NEG_INFINITY);
    }
}

/// Adds `bias` to the last token of `sequence` if the tokens before it have just
/// occurred. A sequence longer than the whole history is skipped.
fn add_where_completed(ctx: &Context<'_>, scores: &mut [f32], sequence: &[u32], bias: f32) {
    let Some((&last, start)) = sequence.split_last() else {
        return;
    };
    if start.is_empty() || (sequence.len() <= ctx.tokens.len() && ctx.tokens.ends_with(start)) {
        add(scores, last, bias);
    }
}

fn add(scores: &mut [f32], token: u32, bias: f32) {
    if let Some(score) = scores.get_mut(token as usize) {
        // A removed token stays removed: -inf plus a finite number.
        *score += bias;
    }
}
