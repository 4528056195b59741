//! Repetition of n-grams.

/// Removes every token that followed, somewhere in `source`, the last `size - 1`
/// tokens of `history`.
pub(super) fn forbid_repeats(source: &[u32], history: &[u32], size: usize, scores: &mut [f32]) {
    // With fewer tokens than an n-gram needs there is nothing to repeat.
    if size == 0 || history.len() + 1 < size {
        return;
    }
    let recent = history.get(history.len() + 1 - size..).unwrap_or_default();
    for gram in source.windows(size) {
        if let Some((&last, start)) = gram.split_last()
            && start == recent
            && let Some(score) = scores.get_mut(last as usize)
        {
            *score = f32::NEG_INFINITY;
        }
    }
}
