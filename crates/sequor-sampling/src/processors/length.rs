//! Pressure towards an end.

use super::Context;

/// Adds `|s| (factor^n - 1)` to the scores of `eos`, where `n` counts the tokens
/// generated past `start`.
pub(super) fn exponential_decay(
    ctx: &Context<'_>,
    scores: &mut [f32],
    start: usize,
    factor: f64,
    eos: &[u32],
) {
    let generated = ctx.generated().len();
    if generated <= start {
        return;
    }
    let growth = factor.powf((generated - start) as f64) - 1.0;
    for &token in eos {
        if let Some(score) = scores.get_mut(token as usize)
            && score.is_finite()
        {
            // Kept finite, so that a long text ends instead of failing.
            *score = (f64::from(*score) + f64::from(score.abs()) * growth).min(f64::from(f32::MAX))
                as f32;
        }
    }
}
