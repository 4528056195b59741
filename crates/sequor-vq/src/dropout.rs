//! Quantiser dropout: training with fewer levels, so that a prefix of them is useful.

use sequor_kernels::rng::{Key, Purpose};

/// How many levels each of `batch` items keeps: the first `floor(batch * share)` items draw a
/// number from `1..=levels`, the others keep all (Kumar et al., "High-fidelity audio
/// compression with improved RVQGAN", 2023, section 3.2).
pub(crate) fn kept_levels(key: Key, batch: i64, share: f64, levels: i64) -> Vec<i64> {
    let dropped = (batch as f64 * share) as i64;
    let mut stream = key.stream(0, Purpose::Dropout);
    (0..batch)
        .map(|item| {
            if item < dropped {
                1 + stream.below(levels.max(1) as u64) as i64
            } else {
                levels
            }
        })
        .collect()
}

/// The rows of the items that keep more than `level` levels, where every item has `rows`
/// rows; `None` when that is all of them.
pub(crate) fn active_rows(kept: &[i64], level: i64, rows: i64) -> Option<Vec<i64>> {
    if kept.iter().all(|&n| n > level) {
        return None;
    }
    let active = kept.iter().zip(0i64..).filter(|(n, _)| **n > level);
    Some(
        active
            .flat_map(|(_, item)| item * rows..(item + 1) * rows)
            .collect(),
    )
}
