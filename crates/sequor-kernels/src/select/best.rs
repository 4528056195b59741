//! The best k of a row: a buffer of candidates behind a rising threshold.

use super::lanes::{LANES, REMOVED, groups};
use super::wide::wide;

/// A score and its index packed so that ascending order means: better score
/// first, among equals the lower index first. Rows are shorter than 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ranked(u64);

impl Ranked {
    fn new(score: f32, index: usize) -> Self {
        Self(u64::from(descending(score)) << 32 | index as u64 & 0xffff_ffff)
    }

    pub fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }

    pub fn score(self) -> f32 {
        let ordered = !((self.0 >> 32) as u32);
        f32::from_bits(if ordered >> 31 == 1 {
            ordered & 0x7fff_ffff
        } else {
            !ordered
        })
    }
}

/// An integer that falls as the score rises; both zeros are the same.
pub(super) fn descending(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    !(if bits >> 31 == 1 {
        !bits
    } else {
        bits | 0x8000_0000
    })
}

wide! {
    /// The best `k` entries in no particular order, fewer if fewer are not removed.
    /// `None` if the row holds NaN.
    ///
    /// Once the buffer is full, the k best in it are selected and the k-th becomes
    /// the bar for everything that follows: of a row in random order nearly all
    /// entries fail one comparison. Linear in the row in any order.
    pub(super) fn best(scores: &[f32], k: usize) -> Option<Vec<Ranked>> {
        let capacity = k.saturating_add(k.max(256)).min(scores.len());
        let mut kept: Vec<Ranked> = Vec::with_capacity(capacity);
        let mut bar = REMOVED;
        for (number, group) in groups(scores).enumerate() {
            let promising =
                group.iter().fold(false, |found, &x| found | (x > bar) | x.is_nan());
            if promising && !admit(&group, number * LANES, k, capacity, &mut bar, &mut kept) {
                return None;
            }
        }
        shorten(&mut kept, k);
        Some(kept)
    }
}

/// Takes in what is above the bar; false on NaN.
fn admit(
    scores: &[f32],
    start: usize,
    k: usize,
    capacity: usize,
    bar: &mut f32,
    kept: &mut Vec<Ranked>,
) -> bool {
    for (offset, &score) in scores.iter().enumerate() {
        if score.is_nan() {
            return false;
        }
        if score > *bar {
            kept.push(Ranked::new(score, start + offset));
            if kept.len() >= capacity && k < capacity {
                *bar = shorten(kept, k);
            }
        }
    }
    true
}

/// Keeps the best `k`; returns the score of the last of them.
fn shorten(kept: &mut Vec<Ranked>, k: usize) -> f32 {
    if k == 0 {
        kept.clear();
        return f32::INFINITY;
    }
    if kept.len() < k {
        return REMOVED;
    }
    let kth = kept.select_nth_unstable(k - 1).1.score();
    kept.truncate(k);
    kth
}

/// The k-th largest score; minus infinity if fewer than `k` entries are not
/// removed, plus infinity for `k = 0`, NaN if the row holds one.
#[must_use]
pub fn top_k_threshold(scores: &[f32], k: usize) -> f32 {
    match best(scores, k) {
        None => f32::NAN,
        Some(kept) if kept.len() < k => REMOVED,
        Some(kept) => kept.into_iter().max().map_or(f32::INFINITY, Ranked::score),
    }
}

/// The best `n` entries as (index, score), best first, ties by lower index first;
/// fewer if fewer are not removed, none if the row holds NaN.
#[must_use]
pub fn top_n(scores: &[f32], n: usize) -> Vec<(usize, f32)> {
    let mut kept = best(scores, n).unwrap_or_default();
    kept.sort_unstable();
    kept.into_iter()
        .map(|entry| (entry.index(), entry.score()))
        .collect()
}
