//! Drawing an index: inverse of the cumulative distribution in index order.

use super::lanes::{Extent, LANES, each, exp_of_nonpositive, has_live};
use super::wide::wide;

/// Blocks of a row whose sums are remembered between finding the total and finding
/// the entry.
const BLOCKS: usize = 64;

/// Draws from the softmax of `scores`: the first index at which the cumulative
/// weight exceeds `u` times the total, for `u` in `[0, 1)`. Never an entry that is
/// removed or has no weight, also not by rounding at `u` near 1. `None` if the row
/// is bad or `u` is not in `[0, 1)`.
///
/// No allocation. The whole row is summed once and one part in 64 of it twice.
#[must_use]
pub fn sample(scores: &[f32], u: f64) -> Option<usize> {
    let Extent { max, .. } = Extent::of(scores)?;
    sample_below(scores, max, u)
}

/// As [`sample`] for a row of probabilities (or any weights that are not
/// negative), which need not sum to 1. `None` if an entry is negative, NaN or
/// infinite, if all are zero, or if `u` is not in `[0, 1)`.
#[must_use]
pub fn sample_probs(probs: &[f32], u: f64) -> Option<usize> {
    sample_weights(probs, u)
}

wide! {
    fn sample_below(scores: &[f32], max: f32, u: f64) -> Option<usize> {
        invert(scores, u, |score| exp_of_nonpositive(score - max))
    }
}

wide! {
    fn sample_weights(probs: &[f32], u: f64) -> Option<usize> {
        let valid = |ok: bool, &p: &f32| ok & p.is_finite() & (p >= 0.0);
        if !probs.iter().fold(true, valid) {
            return None;
        }
        invert(probs, u, |p| p)
    }
}

#[inline(always)]
fn invert(row: &[f32], u: f64, weight: impl Fn(f32) -> f32) -> Option<usize> {
    if !(0.0..1.0).contains(&u) || row.is_empty() {
        return None;
    }
    let size = row.len().div_ceil(BLOCKS).next_multiple_of(LANES);
    let mut sums = [0f64; BLOCKS];
    for (sum, block) in sums.iter_mut().zip(row.chunks(size)) {
        if has_live(block) {
            *sum = block_sum(block, &weight);
        }
    }
    let total: f64 = sums.iter().sum();
    let wanted = u * total;

    let mut before = 0.0;
    let mut last_block = None;
    for (block, &sum) in sums.iter().enumerate().filter(|&(_, &sum)| sum > 0.0) {
        last_block = Some((block, before));
        if before + sum > wanted {
            break;
        }
        before += sum;
    }
    let (block, mut cumulative) = last_block?;
    let start = block * size;
    let mut last = None;
    for (index, &x) in row.iter().enumerate().skip(start).take(size) {
        let w = f64::from(weight(x));
        cumulative += w;
        if w > 0.0 {
            last = Some(index);
            if cumulative > wanted {
                break;
            }
        }
    }
    // Where rounding kept the sums below `wanted`, this is the last with weight.
    last
}

#[inline(always)]
fn block_sum(block: &[f32], weight: &impl Fn(f32) -> f32) -> f64 {
    let mut sums = [0f64; LANES];
    let (groups, rest) = block.as_chunks::<LANES>();
    for group in groups {
        let weights = each(group, weight);
        for lane in 0..LANES {
            sums[lane] += f64::from(weights[lane]);
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        sums[lane] += f64::from(weight(x));
    }
    sums.iter().sum()
}
