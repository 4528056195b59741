//! Where, in a given order of the entries, a given share of the probability mass
//! is reached: a histogram of mass over the order, then an exact search in the one
//! bucket that matters.

use super::best::descending;
use super::lanes::{
    Extent, LANES, REMOVED, each, exp_of_nonpositive, groups, has_live, weight_sum,
};
use super::wide::wide;

/// Buckets of the histogram; a power of two.
const BUCKETS: usize = 1024;

/// Beyond this distance in nats all entries share the last bucket: what lies there
/// weighs nothing, so that finer buckets would be wasted on it.
const WIDEST: f32 = 32.0;

/// So many entries are ordered one by one rather than by a histogram.
const FEW: usize = 1024;

/// An order of the entries of a row.
trait Order {
    /// A coarse position, not negative, that never falls when `exact` rises.
    fn distance(&self, score: f32) -> f32;
    /// The exact position; equal positions are ordered by index.
    fn exact(&self, score: f32) -> u64;
}

/// The last entry to keep.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub score: f32,
    pub index: usize,
    /// Whether the share was reached at an entry of this position in the order;
    /// false if this one is kept only to make up the minimum number.
    pub by_mass: bool,
}

wide! {
    /// The cut in the order of falling scores.
    pub(super) fn cut_by_score(
        scores: &[f32],
        extent: Extent,
        share: f64,
        min_keep: usize,
    ) -> Option<Cut> {
        let order = ByScore { max: extent.max };
        if let Some(cut) = cut_among_few(scores, extent, &order, share, min_keep) {
            return Some(cut);
        }
        let reach = order.distance(extent.min);
        cut(scores, extent, &order, reach, share, min_keep)
    }
}

wide! {
    /// The cut in the order of rising distance from `center`.
    pub(super) fn cut_by_typicality(
        scores: &[f32],
        extent: Extent,
        center: f64,
        share: f64,
        min_keep: usize,
    ) -> Option<Cut> {
        let order = ByTypicality { center };
        let reach = order.distance(extent.min).max(order.distance(extent.max));
        cut(scores, extent, &order, reach, share, min_keep)
    }
}

struct ByScore {
    max: f32,
}

impl Order for ByScore {
    #[inline(always)]
    fn distance(&self, score: f32) -> f32 {
        self.max - score
    }

    fn exact(&self, score: f32) -> u64 {
        u64::from(descending(score))
    }
}

struct ByTypicality {
    center: f64,
}

impl Order for ByTypicality {
    #[inline(always)]
    fn distance(&self, score: f32) -> f32 {
        (self.center - f64::from(score)).abs() as f32
    }

    fn exact(&self, score: f32) -> u64 {
        // Bits of floats that are not negative rise with their value.
        (self.center - f64::from(score)).abs().to_bits()
    }
}

#[derive(Clone, Copy, Default)]
struct Bucket {
    mass: f64,
    entries: usize,
}

/// The bucket of each entry of a group, `BUCKETS` for a removed one.
struct Buckets<'a, O> {
    order: &'a O,
    scale: f32,
}

impl<O: Order> Buckets<'_, O> {
    #[inline(always)]
    fn of(&self, score: f32) -> u32 {
        /// Adding 2^23 leaves the nearest integer in the low mantissa bits.
        const ROUNDER: f32 = 8_388_608.0;
        const LAST: f32 = (BUCKETS - 1) as f32;
        let position = self.order.distance(score) * self.scale;
        // Also for NaN, which is zero times infinity where all scores are equal.
        let position = if position < LAST { position } else { LAST };
        let position = if score == REMOVED {
            BUCKETS as f32
        } else {
            position
        };
        (position + ROUNDER).to_bits() & (2 * BUCKETS - 1) as u32
    }
}

/// The cut in the order of falling scores where few entries hold the mass, as in most rows
/// of a trained model: entries so light that all of them together could not hold what is to
/// be left out are passed over. `None` where the histogram has to decide.
#[inline(always)]
fn cut_among_few(
    scores: &[f32],
    extent: Extent,
    order: &ByScore,
    share: f64,
    min_keep: usize,
) -> Option<Cut> {
    let total = weight_sum(scores, extent.max);
    let wanted = share * total;
    let light = (total - wanted) / scores.len() as f64;
    // Half of it, so that rounding does not matter.
    let bar = extent.max + (0.5 * light).ln() as f32;
    let mut members: Vec<(u64, usize)> = Vec::with_capacity(FEW);
    for (number, group) in groups(scores).enumerate() {
        if group.iter().fold(false, |found, &x| found | (x >= bar)) {
            if members.len() + LANES > FEW {
                return None;
            }
            for lane in (0..LANES).filter(|&lane| group[lane] >= bar) {
                members.push((order.exact(group[lane]), number * LANES + lane));
            }
        }
    }
    members.sort_unstable();
    let mut mass = 0.0;
    for (at, &(_, index)) in members.iter().enumerate() {
        mass += f64::from(exp_of_nonpositive(scores[index] - extent.max));
        if mass >= wanted && at + 1 >= min_keep {
            return Some(Cut {
                score: scores[index],
                index,
                by_mass: true,
            });
        }
    }
    None
}

/// The first entry in `order` at which the entries so far hold at least `share` of
/// the mass and are at least `min_keep`; `None` if there is no such entry before
/// the end, that is if everything is to be kept.
///
/// `reach` is the largest distance of an entry that is not removed.
#[inline(always)]
fn cut(
    scores: &[f32],
    extent: Extent,
    order: &impl Order,
    reach: f32,
    share: f64,
    min_keep: usize,
) -> Option<Cut> {
    let min_keep = min_keep.max(1);
    let buckets = Buckets {
        order,
        scale: BUCKETS as f32 / reach.min(WIDEST),
    };
    let weight = |score: f32| exp_of_nonpositive(score - extent.max);

    let mut histogram = [Bucket::default(); BUCKETS + 1];
    for group in groups(scores) {
        if has_live(&group) {
            let weights = each(&group, weight);
            let places = each(&group, |x| buckets.of(x));
            for lane in 0..LANES {
                let bucket = &mut histogram[places[lane] as usize % (BUCKETS + 1)];
                bucket.mass += f64::from(weights[lane]);
                bucket.entries += 1;
            }
        }
    }
    let histogram = &histogram[..BUCKETS];

    let wanted = share * histogram.iter().map(|b| b.mass).sum::<f64>();
    let mut before = Bucket::default();
    let place = histogram.iter().position(|bucket| {
        let mass = before.mass + bucket.mass;
        let entries = before.entries + bucket.entries;
        let reached = mass >= wanted && entries >= min_keep;
        if !reached {
            before = Bucket { mass, entries };
        }
        reached
    })?;

    let mut members: Vec<(u64, usize)> = Vec::with_capacity(histogram[place].entries);
    for (number, group) in groups(scores).enumerate() {
        let places = each(&group, |x| buckets.of(x));
        if places
            .iter()
            .fold(false, |found, &p| found | (p as usize == place))
        {
            for lane in (0..LANES).filter(|&lane| places[lane] as usize == place) {
                members.push((order.exact(group[lane]), number * LANES + lane));
            }
        }
    }
    members.sort_unstable();

    let last = members.len().checked_sub(1)?;
    let mut mass = before.mass;
    let mut lacking = before.mass < wanted || before.entries == 0;
    let mut reached_at = None;
    for (at, &(exact, index)) in members.iter().enumerate() {
        mass += f64::from(weight(scores[index]));
        if lacking && mass >= wanted {
            lacking = false;
            reached_at = Some(exact);
        }
        // At the end in any case: the sums of the histogram and of this loop may
        // differ in the last bit.
        if (!lacking && before.entries + at + 1 >= min_keep) || at == last {
            return Some(Cut {
                score: scores[index],
                index,
                by_mass: reached_at == Some(exact),
            });
        }
    }
    None
}
