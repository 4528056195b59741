//! Bootstrap intervals and permutation tests, seeded.
//!
//! Sources: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13
//! (percentile interval); Good, "Permutation, Parametric and Bootstrap Tests of
//! Hypotheses" (2005), section 3.2 (sign flips of paired differences).

use sequor_kernels::rng::{Key, Purpose, Stream};

/// Resamples of a bootstrap.
const RESAMPLES: usize = 10_000;
/// Flips of a permutation test with more pairs than [`EXACT`].
const FLIPS: usize = 20_000;
/// Up to this many pairs every flip is tried.
const EXACT: usize = 14;

/// A stream of random numbers for a purpose within a test.
pub fn stream(seed: u64, test: u64) -> Stream {
    Key::new(seed, test).stream(0, Purpose::Test)
}

/// Mean; NaN for no values.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Median; NaN for no values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => at(n / 2),
        n => (at(n / 2 - 1) + at(n / 2)) / 2.0,
    }
}

/// The 95 % percentile interval of `statistic` over resampled units. `None` when a
/// resample has no finite statistic.
pub fn bootstrap(
    units: usize,
    mut random: Stream,
    statistic: impl Fn(&[usize]) -> f64,
) -> Option<[f64; 2]> {
    let mut chosen = vec![0; units];
    let mut values = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        for index in &mut chosen {
            *index = random.below(units as u64) as usize;
        }
        let value = statistic(&chosen);
        if !value.is_finite() {
            return None;
        }
        values.push(value);
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| {
        values
            .get((share * (RESAMPLES - 1) as f64).round() as usize)
            .copied()
    };
    at(0.025).zip(at(0.975)).map(|(low, high)| [low, high])
}

/// Chance that random signs give a sum of `deltas` at least as large as theirs. Zeros
/// never count against the hypothesis that nothing is there.
pub fn sign_flip(deltas: &[f64], mut random: Stream) -> f64 {
    let observed: f64 = deltas.iter().sum();
    // Sums in another order differ in the last bits.
    let scale: f64 = deltas.iter().map(|d| d.abs()).sum();
    let bound = observed - 1e-12 * scale;
    if deltas.len() <= EXACT {
        let all = 1_u64 << deltas.len();
        let sum = |flips: u64| -> f64 {
            let sign = |i: usize| if flips >> i & 1 == 1 { -1.0 } else { 1.0 };
            deltas.iter().enumerate().map(|(i, d)| sign(i) * d).sum()
        };
        let hits = (0..all).filter(|&flips| sum(flips) >= bound).count();
        return hits as f64 / all as f64;
    }
    let mut flip = |d: &f64| if random.next_u32() & 1 == 1 { -d } else { *d };
    let hits = (0..FLIPS)
        .filter(|_| deltas.iter().map(&mut flip).sum::<f64>() >= bound)
        .count();
    // The observed signs are one of the flips.
    (hits + 1) as f64 / (FLIPS + 1) as f64
}

/// Each value's rank by size, with its sign; ties share the mean of their ranks and zeros
/// have none (Wilcoxon).
pub fn signed_ranks(deltas: &[f64]) -> Vec<f64> {
    let size = |d: f64| if d == 0.0 { None } else { Some(d.abs()) };
    let sizes: Vec<f64> = deltas.iter().filter_map(|&d| size(d)).collect();
    let rank = |d: f64| -> f64 {
        let below = sizes.iter().filter(|&&s| s < d).count();
        let equal = sizes.iter().filter(|&&s| s == d).count();
        below as f64 + (equal as f64 + 1.0) / 2.0
    };
    let signed = |&d: &f64| size(d).map_or(0.0, |s| rank(s) * d.signum());
    deltas.iter().map(signed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_by_hand() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert!(median(&[]).is_nan() && mean(&[]).is_nan());
        assert_eq!(signed_ranks(&[-3.0, 0.0, 1.0, 3.0]), [-2.5, 0.0, 1.0, 2.5]);
        // One of 2^5 sign patterns is as good as all positive.
        assert_eq!(sign_flip(&[1.0; 5], stream(0, 0)), 1.0 / 32.0);
        assert_eq!(sign_flip(&[0.0; 5], stream(0, 0)), 1.0);
        // Many pairs: by random flips, and again the same.
        let many: Vec<f64> = (0..40)
            .map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })
            .collect();
        let p = sign_flip(&many, stream(0, 0));
        assert!((0.5..0.65).contains(&p), "{p}");
        assert_eq!(p, sign_flip(&many, stream(0, 0)));
        assert!(sign_flip(&[1.0; 40], stream(0, 0)) < 1e-4);
    }

    #[test]
    fn the_bootstrap_interval_has_the_width_of_the_normal_one() {
        let mut random = stream(1, 1);
        let values: Vec<f64> = (0..400).map(|_| random.normal()).collect();
        let of = |chosen: &[usize]| mean(&chosen.iter().map(|&i| values[i]).collect::<Vec<_>>());
        let [low, high] = bootstrap(400, stream(2, 2), of).unwrap();
        let half = (high - low) / 2.0;
        assert!((half - 1.96 / 20.0).abs() < 0.015, "{half}");
        assert!(low < mean(&values) && mean(&values) < high);
        assert!(bootstrap(3, stream(0, 0), |_| f64::NAN).is_none());
    }
}
