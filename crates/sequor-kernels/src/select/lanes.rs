//! Passes over a whole row, written over fixed groups of lanes so that the
//! compiler turns them into vector instructions, with the same result whatever
//! the width it chooses.

use super::wide::wide;

/// Entries that are handled together.
pub(super) const LANES: usize = 16;

/// The score of a removed entry.
pub(super) const REMOVED: f32 = f32::NEG_INFINITY;

/// What one pass finds out about a valid row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// The largest score, finite.
    pub max: f32,
    /// The smallest score that is not removed.
    pub min: f32,
}

impl Extent {
    /// `None` if the row has no distribution: it is empty, holds NaN or plus
    /// infinity, or everything is removed.
    pub fn of(scores: &[f32]) -> Option<Self> {
        extent(scores)
    }
}

wide! {
    fn extent(scores: &[f32]) -> Option<Extent> {
        let mut max = [REMOVED; LANES];
        let mut min = [f32::INFINITY; LANES];
        let mut nan = [false; LANES];
        for group in groups(scores) {
            for lane in 0..LANES {
                let x = group[lane];
                let live = if x == REMOVED { f32::INFINITY } else { x };
                max[lane] = if x > max[lane] { x } else { max[lane] };
                min[lane] = if live < min[lane] { live } else { min[lane] };
                nan[lane] |= x.is_nan();
            }
        }
        let max = max.into_iter().fold(REMOVED, f32::max);
        let min = min.into_iter().fold(f32::INFINITY, f32::min);
        (max.is_finite() && !nan.contains(&true)).then_some(Extent { max, min })
    }
}

/// The row in groups of [`LANES`], the last one filled up with removed entries.
#[inline(always)]
pub(super) fn groups(row: &[f32]) -> impl Iterator<Item = [f32; LANES]> {
    let (groups, rest) = row.as_chunks::<LANES>();
    let mut last = [REMOVED; LANES];
    last[..rest.len()].copy_from_slice(rest);
    groups
        .iter()
        .copied()
        .chain((!rest.is_empty()).then_some(last))
}

/// `f` of each entry of a group. Written as a loop over lanes, like everything
/// here, because that is what becomes vector instructions.
#[inline(always)]
pub(super) fn each<T: Copy + Default>(group: &[f32; LANES], f: impl Fn(f32) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for lane in 0..LANES {
        out[lane] = f(group[lane]);
    }
    out
}

/// Replaces each entry of the row.
#[inline(always)]
pub(super) fn update(row: &mut [f32], f: impl Fn(f32) -> f32) {
    let (groups, rest) = row.as_chunks_mut::<LANES>();
    for group in groups {
        *group = each(group, &f);
    }
    for x in rest {
        *x = f(*x);
    }
}

/// Whether anything in a group is not removed: after a top-k nearly all groups can
/// be passed over.
#[inline(always)]
pub(super) fn has_live(group: &[f32]) -> bool {
    group.iter().fold(false, |found, &x| found | (x != REMOVED))
}

/// `exp(x)` for `x <= 0`, zero below -87 (where single precision starts to lose
/// digits); relative error below 2e-7 elsewhere. Branch-free.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor polynomial of degree 7 for
/// exp(r), whose remainder is below 1e-8.
#[inline(always)]
pub(crate) fn exp_of_nonpositive(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
    const ROUNDER: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first short enough for exact multiples.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let y = if x > -87.0 { x } else { -87.0 };
    let shifted = y * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (y - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + coefficient;
    }
    // The integer sits in the low bits of `shifted`; everything above bit 8 of it
    // falls out of the shift.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x > -87.0 { p * power } else { 0.0 }
}

wide! {
    /// Sum of exp(score - max), at least 1 for a valid row.
    pub(super) fn weight_sum(scores: &[f32], max: f32) -> f64 {
        let mut sums = [0f64; LANES];
        for group in groups(scores) {
            if has_live(&group) {
                let weights = each(&group, |x| exp_of_nonpositive(x - max));
                for lane in 0..LANES {
                    sums[lane] += f64::from(weights[lane]);
                }
            }
        }
        sums.iter().sum()
    }
}

wide! {
    /// (log of the sum of exp(score - max), entropy in nats).
    pub(super) fn log_weight_and_entropy(scores: &[f32], max: f32) -> (f64, f64) {
        let mut weights = [0f64; LANES];
        let mut energies = [0f64; LANES];
        for group in groups(scores) {
            if has_live(&group) {
                // Finite also for a removed entry, whose weight is zero.
                let below = each(&group, |x| if x - max > -88.0 { x - max } else { -88.0 });
                let weight = each(&below, exp_of_nonpositive);
                for lane in 0..LANES {
                    let w = f64::from(weight[lane]);
                    weights[lane] += w;
                    energies[lane] += w * f64::from(below[lane]);
                }
            }
        }
        let weight: f64 = weights.iter().sum();
        let energy: f64 = energies.iter().sum();
        let log_weight = weight.ln();
        (log_weight, (log_weight - energy / weight).max(0.0))
    }
}

/// The index of the largest score, the first of several; `None` if the row is
/// empty, holds NaN, or everything is removed.
#[must_use]
pub fn argmax(scores: &[f32]) -> Option<usize> {
    first_max(scores)
}

wide! {
    fn first_max(scores: &[f32]) -> Option<usize> {
        let mut max = [REMOVED; LANES];
        let mut nan = [false; LANES];
        for group in groups(scores) {
            for lane in 0..LANES {
                max[lane] = if group[lane] > max[lane] { group[lane] } else { max[lane] };
                nan[lane] |= group[lane].is_nan();
            }
        }
        let max = max.into_iter().fold(REMOVED, f32::max);
        if max == REMOVED || nan.contains(&true) {
            return None;
        }
        // Pass over the groups without it; then look closely.
        let here = |group: &[f32; LANES]| group.iter().fold(false, |found, &x| found | (x == max));
        let passed = LANES * groups(scores).position(|group| here(&group))?;
        scores[passed..].iter().position(|&x| x == max).map(|at| passed + at)
    }
}

/// Log of the sum of exponentials, in nats. Minus infinity if everything is
/// removed or there is nothing; NaN if there is one; else plus infinity if there
/// is one.
#[must_use]
pub fn log_sum_exp(scores: &[f32]) -> f64 {
    match Extent::of(scores) {
        Some(Extent { max, .. }) => f64::from(max) + weight_sum(scores, max).ln(),
        None if scores.iter().any(|x| x.is_nan()) => f64::NAN,
        None if scores.contains(&f32::INFINITY) => f64::INFINITY,
        None => f64::NEG_INFINITY,
    }
}

/// Entropy of the softmax of the row, in nats; `None` if the row is bad.
#[must_use]
pub fn entropy(scores: &[f32]) -> Option<f64> {
    let Extent { max, .. } = Extent::of(scores)?;
    Some(log_weight_and_entropy(scores, max).1)
}

/// Replaces scores by probabilities that sum to 1. Removed entries become 0, and
/// so does whatever is more than 87 nats below the best. False, and unchanged, if
/// the row is bad.
pub fn softmax_in_place(scores: &mut [f32]) -> bool {
    let Some(Extent { max, .. }) = Extent::of(scores) else {
        return false;
    };
    let scale = (1.0 / weight_sum(scores, max)) as f32;
    write_weights(scores, max, scale);
    true
}

wide! {
    fn write_weights(scores: &mut [f32], max: f32, scale: f32) -> () {
        update(scores, |x| exp_of_nonpositive(x - max) * scale);
    }
}

/// Replaces scores by log-probabilities; removed entries stay removed. False, and
/// unchanged, if the row is bad.
pub fn log_softmax_in_place(scores: &mut [f32]) -> bool {
    let Some(Extent { max, .. }) = Extent::of(scores) else {
        return false;
    };
    let log_sum = weight_sum(scores, max).ln() as f32;
    for x in scores {
        *x = (*x - max) - log_sum;
    }
    true
}

/// Divides the scores by `temperature`. False, and unchanged, if that is not a
/// positive finite number (zero means "take the best", which is not a division).
pub fn divide_in_place(scores: &mut [f32], temperature: f32) -> bool {
    let valid = temperature > 0.0 && temperature.is_finite();
    if valid {
        divide(scores, temperature);
    }
    valid
}

wide! {
    fn divide(scores: &mut [f32], divisor: f32) -> () {
        update(scores, |x| x / divisor);
    }
}

wide! {
    /// The largest absolute value that is finite, 0 where there is none.
    #[must_use]
    pub fn largest_finite(scores: &[f32]) -> f32 {
        let mut most = [0f32; LANES];
        for group in groups(scores) {
            for lane in 0..LANES {
                let size = group[lane].abs();
                let counts = size < f32::INFINITY && size > most[lane];
                most[lane] = if counts { size } else { most[lane] };
            }
        }
        most.into_iter().fold(0.0, f32::max)
    }
}
