//! Every rule against a reference that sorts, on random and on awkward rows.

use std::sync::atomic::Ordering;

use super::lanes::{Extent, exp_of_nonpositive};
use super::wide::ONLY_PORTABLE;
use super::*;
use crate::rng::{Key, Purpose, Stream};

const INF: f32 = f32::INFINITY;
const GONE: f32 = f32::NEG_INFINITY;

fn stream(n: u64) -> Stream {
    Key::new(n, 0).stream(0, Purpose::Test)
}

/// Rows of many lengths and shapes: spread out, nearly flat, tied, removed in
/// part, dominated by one entry, with entries far below the rest.
fn rows() -> Vec<Vec<f32>> {
    let mut rows = vec![
        vec![0.5],
        vec![1.0, 1.0],
        vec![GONE, -3.0, GONE],
        vec![2.0; 100],
    ];
    let mut s = stream(1);
    for length in [1, 2, 3, 15, 16, 17, 40, 64, 100, 500, 3000] {
        for kind in 0..8 {
            let scale = [1.0, 5.0, 20.0, 0.001, 3.0, 3.0, 0.2, 60.0][kind];
            let mut row: Vec<f32> = (0..length).map(|_| (s.normal() * scale) as f32).collect();
            match kind {
                4 => row.iter_mut().for_each(|x| *x = x.round()),
                5 => row.iter_mut().for_each(|x| {
                    if s.uniform() < 0.6 {
                        *x = GONE;
                    }
                }),
                6 => row[s.below(length) as usize] += 12.0,
                _ => {}
            }
            if row.iter().any(|x| *x != GONE) {
                rows.push(row);
            }
        }
    }
    rows
}

/// Rows that have no distribution.
fn bad_rows() -> Vec<Vec<f32>> {
    let with = |x: f32, at: usize| {
        let mut row = vec![0.25; 40];
        row[at] = x;
        row
    };
    let nan = f32::NAN;
    vec![
        vec![],
        vec![GONE; 20],
        vec![nan],
        with(nan, 0),
        with(nan, 37),
        with(INF, 20),
    ]
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
}

fn kept(row: &[f32]) -> Vec<usize> {
    (0..row.len()).filter(|&i| row[i] != GONE).collect()
}

/// Indices of what is not removed, best first, lower index first.
fn ranking(row: &[f32]) -> Vec<usize> {
    let mut order = kept(row);
    order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
    order
}

/// Probabilities in double precision.
fn probabilities(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(GONE, f32::max);
    let weights: Vec<f64> = row.iter().map(|&x| f64::from(x - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

fn reference_entropy(row: &[f32]) -> f64 {
    probabilities(row)
        .iter()
        .filter(|&&p| p > 0.0)
        .map(|p| -p * p.ln())
        .sum()
}

/// How many of `order` hold `share` of the mass, in double precision; and how
/// close the nearest other answer was.
fn count_for(order: &[usize], p: &[f64], share: f64, min_keep: usize) -> (usize, f64) {
    let (mut sum, mut margin) = (0.0, f64::INFINITY);
    let mut count = order.len();
    for (at, &i) in order.iter().enumerate() {
        sum += p[i];
        margin = margin.min((sum - share).abs());
        if sum >= share {
            count = at + 1;
            break;
        }
    }
    (count.max(min_keep).max(1).min(order.len()), margin)
}

/// Runs `rule` on a copy and checks that what it keeps is unchanged.
fn apply(row: &[f32], rule: impl Fn(&mut [f32]) -> bool) -> Vec<usize> {
    let mut out = row.to_vec();
    assert!(rule(&mut out));
    for (after, before) in out.iter().zip(row) {
        assert!(*after == GONE || after.to_bits() == before.to_bits());
    }
    kept(&out)
}

fn sorted(mut indices: Vec<usize>) -> Vec<usize> {
    indices.sort_unstable();
    indices
}

#[test]
fn exp_is_accurate() {
    let mut worst = 0.0f64;
    for i in 0..=870_000 {
        let x = -(i as f32) * 1e-4;
        let (exact, ours) = (f64::from(x).exp(), f64::from(exp_of_nonpositive(x)));
        if x > -87.0 {
            worst = worst.max((ours / exact - 1.0).abs());
        }
    }
    assert!(worst < 2e-7, "{worst}");
    assert_eq!(exp_of_nonpositive(0.0), 1.0);
    for x in [-87.0, -88.0, -1e9, f32::MIN, GONE] {
        assert_eq!(exp_of_nonpositive(x), 0.0);
    }
}

#[test]
fn best_of_the_row() {
    for row in rows() {
        let order = ranking(&row);
        assert_eq!(argmax(&row), order.first().copied());
        let extent = Extent::of(&row).unwrap();
        assert_eq!(extent.max, row[order[0]]);
        assert_eq!(extent.min, row[order[order.len() - 1]]);
        for k in [0, 1, 2, 5, 17, 300, 2999, 3000, 5000, usize::MAX] {
            let expected: Vec<_> = order.iter().take(k).map(|&i| (i, row[i])).collect();
            assert_eq!(top_n(&row, k), expected);
            let threshold = match k {
                0 => INF,
                _ => order.get(k - 1).map_or(GONE, |&i| row[i]),
            };
            assert_eq!(top_k_threshold(&row, k), threshold);
        }
    }
    assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
    assert_eq!(argmax(&[1.0, INF, INF]), Some(1));
    assert_eq!(top_n(&[-0.0, 0.0, -1.0], 1), [(0, 0.0)]);
    // The worst order for a rising threshold.
    let rising: Vec<f32> = (0..10_000u16).map(f32::from).collect();
    assert_eq!(top_n(&rising, 2), [(9999, 9999.0), (9998, 9998.0)]);
}

#[test]
fn bad_rows_are_reported_and_left_alone() {
    for row in bad_rows() {
        let nan = row.iter().any(|x| x.is_nan());
        if !row.contains(&INF) {
            assert_eq!(argmax(&row), None);
        }
        assert_eq!(sample(&row, 0.5), None);
        assert_eq!(entropy(&row), None);
        assert!(!nan || log_sum_exp(&row).is_nan());
        assert!(!nan || top_k_threshold(&row, 3).is_nan());
        assert!(!nan || top_n(&row, 3).is_empty());
        let rules: [fn(&mut [f32]) -> bool; 9] = [
            softmax_in_place,
            log_softmax_in_place,
            |r| keep_top_k(r, 3, 1),
            |r| keep_top_p(r, 0.5, 1),
            |r| keep_min_p(r, 0.5, 1),
            |r| keep_typical(r, 0.5, 1),
            |r| keep_epsilon(r, 0.5, 1),
            |r| keep_eta(r, 0.5, 1),
            |r| keep_top_h(r, 0.5, 1),
        ];
        for rule in rules {
            let mut out = row.clone();
            assert!(!rule(&mut out));
            assert!(same_bits(&out, &row));
        }
    }
    assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
    assert_eq!(log_sum_exp(&[INF, 0.0]), f64::INFINITY);
}

#[test]
fn softmax_and_its_sums() {
    for row in rows() {
        let p = probabilities(&row);
        let (mut soft, mut log) = (row.clone(), row.clone());
        assert!(softmax_in_place(&mut soft) && log_softmax_in_place(&mut log));
        for ((&p, &soft), &log) in p.iter().zip(&soft).zip(&log) {
            assert!(
                (f64::from(soft) - p).abs() <= 1e-6 * p + 1e-37,
                "{soft} {p}"
            );
            assert!((f64::from(log) - p.ln()).abs() <= 1e-6 * p.ln().abs() + 1e-6 || p == 0.0);
        }
        let sum: f64 = soft.iter().map(|&x| f64::from(x)).sum();
        assert!((sum - 1.0).abs() < 1e-5);
        assert!((entropy(&row).unwrap() - reference_entropy(&row)).abs() < 1e-4);
        let max = f64::from(row[argmax(&row).unwrap()]);
        let exact = max
            + row
                .iter()
                .map(|&x| (f64::from(x) - max).exp())
                .sum::<f64>()
                .ln();
        assert!((log_sum_exp(&row) - exact).abs() < 1e-6 * exact.abs() + 1e-6);
    }
    let mut halved = [1.0, GONE];
    assert!(divide_in_place(&mut halved, 2.0));
    assert_eq!(halved, [0.5, GONE]);
    for bad in [0.0, -1.0, f32::NAN, INF] {
        assert!(!divide_in_place(&mut halved, bad));
    }
}

#[test]
fn top_k_keeps_ties() {
    for row in rows() {
        let order = ranking(&row);
        for (k, min_keep) in [(1, 1), (3, 1), (3, 8), (50, 1), (3000, 1), (1, usize::MAX)] {
            let last = order[k.max(min_keep).min(order.len()) - 1];
            let expected = kept(&row)
                .into_iter()
                .filter(|&i| row[i] >= row[last])
                .collect();
            assert_eq!(
                apply(&row, |r| keep_top_k(r, k, min_keep)),
                sorted(expected)
            );
        }
        assert_eq!(apply(&row, |r| keep_top_k(r, 0, 1)), kept(&row));
    }
}

#[test]
fn top_p_keeps_the_smallest_set() {
    let mut compared = 0;
    for row in rows() {
        let (order, p) = (ranking(&row), probabilities(&row));
        for share in [-1.0, 0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999] {
            for min_keep in [1, 4, 1000] {
                let (count, margin) = count_for(&order, &p, share, min_keep);
                let result = apply(&row, |r| keep_top_p(r, share, min_keep));
                // Always a prefix of the ranking, and long enough.
                assert_eq!(result, sorted(order[..result.len()].to_vec()));
                assert!(result.len() >= min_keep.min(order.len()));
                if margin > 1e-6 {
                    assert_eq!(result.len(), count, "{share} {min_keep}");
                    compared += 1;
                }
            }
        }
        for off in [1.0, 1.5, f64::NAN] {
            assert_eq!(apply(&row, |r| keep_top_p(r, off, 1)), kept(&row));
        }
    }
    assert!(compared > 1500, "{compared}");
    // Ties: equal weights add up exactly, the lower index stays.
    assert_eq!(
        apply(&[0.5; 40], |r| keep_top_p(r, 0.25, 1)),
        (0..10).collect::<Vec<_>>()
    );
    assert_eq!(
        apply(&[1.0, 3.0, 3.0, 3.0], |r| keep_top_p(r, 0.5, 1)),
        [1, 2]
    );
}

#[test]
fn min_p_is_relative_to_the_best() {
    for row in rows() {
        let (order, p) = (ranking(&row), probabilities(&row));
        for min_p in [0.01, 0.1, 0.6, 1.0] {
            let bar = min_p * p[order[0]];
            if p.iter()
                .any(|p| (p / bar - 1.0).abs() < 1e-5 && min_p < 1.0)
            {
                continue;
            }
            let passing = if min_p < 1.0 {
                order.iter().filter(|&&i| p[i] >= bar).count()
            } else {
                order.iter().filter(|&&i| row[i] == row[order[0]]).count()
            };
            for min_keep in [1, 3, 1000] {
                let count = passing.max(min_keep).min(order.len());
                let expected = sorted(order[..count].to_vec());
                assert_eq!(apply(&row, |r| keep_min_p(r, min_p, min_keep)), expected);
            }
        }
        for off in [0.0, -0.5, f64::NAN] {
            assert_eq!(apply(&row, |r| keep_min_p(r, off, 1)), kept(&row));
        }
        assert_eq!(
            apply(&row, |r| keep_min_p(r, 7.0, 1)),
            apply(&row, |r| keep_top_k(r, 1, 1))
        );
    }
}

#[test]
fn typical_keeps_what_is_near_the_entropy() {
    let mut compared = 0;
    for row in rows() {
        let (p, entropy) = (probabilities(&row), reference_entropy(&row));
        let max = f64::from(row[argmax(&row).unwrap()]);
        let log_sum = max
            + row
                .iter()
                .map(|&x| (f64::from(x) - max).exp())
                .sum::<f64>()
                .ln();
        let shift = |i: usize| (log_sum - f64::from(row[i]) - entropy).abs();
        let mut order = kept(&row);
        order.sort_by(|&a, &b| shift(a).total_cmp(&shift(b)).then(a.cmp(&b)));
        for mass in [0.0, 0.05, 0.2, 0.5, 0.9, 0.999] {
            let (count, margin) = count_for(&order, &p, mass, 1);
            // Entries on the two sides of the entropy must not be too close to
            // tell apart in single precision.
            let last = order[count - 1];
            let close = |&i: &usize| row[i] != row[last] && (shift(i) - shift(last)).abs() < 1e-5;
            if margin < 1e-6 || order.iter().any(close) {
                continue;
            }
            compared += 1;
            let ties = order.iter().filter(|&&i| shift(i) <= shift(last)).count();
            let result = apply(&row, |r| keep_typical(r, mass, 1));
            assert_eq!(result, sorted(order[..ties].to_vec()), "{mass}");
            for min_keep in [3, 1000] {
                let result = apply(&row, |r| keep_typical(r, mass, min_keep));
                assert!(result.len() >= min_keep.min(order.len()).max(ties));
                if min_keep == 1000 || ties >= min_keep {
                    let count = ties.max(min_keep).min(order.len());
                    let inside = sorted(order[..count].to_vec());
                    // Beyond the mass the last place may go to either side.
                    let differing = inside.iter().filter(|i| !result.contains(i)).count();
                    assert!(result.len() == count && differing <= 1);
                }
            }
        }
        assert_eq!(apply(&row, |r| keep_typical(r, 1.0, 1)), kept(&row));
    }
    assert!(compared > 250, "{compared}");
    // All tie with the last one.
    assert_eq!(apply(&[0.0; 20], |r| keep_typical(r, 0.3, 1)).len(), 20);
    // Those that only make up the number do not bring their ties.
    let row = [0.0, 0.0, -3.0, -3.0, -3.0];
    assert_eq!(apply(&row, |r| keep_typical(r, 0.1, 3)), [0, 1, 2]);
}

#[test]
fn epsilon_and_eta_cut_at_a_probability() {
    for row in rows() {
        let (order, p) = (ranking(&row), probabilities(&row));
        for epsilon in [1e-4f64, 0.02, 0.3, 0.6] {
            let eta = epsilon.min(epsilon.sqrt() * (-reference_entropy(&row)).exp());
            type Rule = fn(&mut [f32], f64, usize) -> bool;
            for (bar, rule) in [(epsilon, keep_epsilon as Rule), (eta, keep_eta as Rule)] {
                if p.iter().any(|p| (p / bar - 1.0).abs() < 1e-4) {
                    continue;
                }
                for min_keep in [1, 3, 1000] {
                    let floor = row[order[min_keep.min(order.len()) - 1]];
                    let stays = |&i: &usize| p[i] >= bar || row[i] >= floor;
                    let expected: Vec<_> = kept(&row).into_iter().filter(stays).collect();
                    assert_eq!(apply(&row, |r| rule(r, epsilon, min_keep)), expected);
                }
            }
        }
        assert_eq!(apply(&row, |r| keep_epsilon(r, 0.0, 1)), kept(&row));
        assert_eq!(apply(&row, |r| keep_eta(r, 0.0, 1)), kept(&row));
    }
}

#[test]
fn top_h_bounds_the_entropy() {
    for row in rows() {
        let order = ranking(&row);
        let head: Vec<f32> = order.iter().take(100).map(|&i| row[i]).collect();
        let (p, entropy) = (probabilities(&head), reference_entropy(&head));
        for top_h in [0.1, 0.4, 0.9] {
            let (mut sum, mut count, mut margin) = (0.0, 0, f64::INFINITY);
            for p in &p {
                sum -= if *p > 0.0 { p * p.ln() } else { 0.0 };
                margin = margin.min((sum - top_h * entropy).abs());
                count += usize::from(sum <= top_h * entropy);
            }
            if margin > 1e-9 {
                for min_keep in [1, 2, 1000] {
                    let count = count.max(min_keep).min(order.len());
                    let expected = sorted(order[..count].to_vec());
                    assert_eq!(apply(&row, |r| keep_top_h(r, top_h, min_keep)), expected);
                }
            }
        }
        assert_eq!(
            apply(&row, |r| keep_top_h(r, 1.0, 1)).len(),
            order.len().min(100)
        );
    }
}

#[test]
fn sampling_inverts_the_distribution() {
    for row in rows() {
        let p = probabilities(&row);
        let mut probs = row.clone();
        assert!(softmax_in_place(&mut probs));
        for step in 0..200 {
            let u = f64::from(step) / 200.0 + 0.00123;
            let mut sum = 0.0;
            let bounds: Vec<(f64, f64)> = p
                .iter()
                .map(|p| {
                    sum += p;
                    (sum - p, sum)
                })
                .collect();
            for index in [sample(&row, u).unwrap(), sample_probs(&probs, u).unwrap()] {
                let (low, high) = bounds[index];
                assert!(low - 1e-6 <= u && u <= high + 1e-6, "{low} {u} {high}");
                assert!(row[index] != GONE);
            }
        }
        // The ends: the first and the last entry with weight.
        let weighty: Vec<usize> = (0..row.len()).filter(|&i| probs[i] > 0.0).collect();
        assert_eq!(sample(&row, 0.0), weighty.first().copied());
        let last = sample(&row, 1.0f64.next_down()).unwrap();
        assert!(weighty.contains(&last) && bounds_reach_end(&p, last));
        for bad in [1.0, -0.1, f64::NAN, f64::INFINITY] {
            assert_eq!(sample(&row, bad), None);
            assert_eq!(sample_probs(&probs, bad), None);
        }
    }
}

/// Whether nothing of weight comes after `index`.
fn bounds_reach_end(p: &[f64], index: usize) -> bool {
    p[index + 1..].iter().sum::<f64>() < 1e-12
}

#[test]
fn sampling_is_exact_by_count() {
    // Chi-square of 200,000 draws against the probabilities.
    let row: Vec<f32> = (0..50)
        .map(|i| if i % 7 == 3 { GONE } else { (i % 5) as f32 })
        .collect();
    let p = probabilities(&row);
    let (mut s, mut counts, n) = (stream(2), [0u32; 50], 200_000);
    for _ in 0..n {
        counts[sample(&row, s.uniform()).unwrap()] += 1;
    }
    let chi: f64 = counts
        .iter()
        .zip(&p)
        .filter(|&(_, &p)| p > 0.0)
        .map(|(&c, &p)| (f64::from(c) - p * f64::from(n)).powi(2) / (p * f64::from(n)))
        .sum();
    // 42 degrees of freedom; 76 has a chance of one in a thousand.
    assert!(chi < 76.0, "{chi}");
    assert!((0..50).all(|i| p[i] > 0.0 || counts[i] == 0));
}

#[test]
fn sampling_never_falls_off_the_end() {
    // The last entries have no weight; rounding must not reach them.
    let mut probs = vec![1.0f32 / 3.0; 3000];
    probs.extend([0.0; 77]);
    for u in [0.999_999_999, 1.0f64.next_down()] {
        assert_eq!(sample_probs(&probs, u), Some(2999));
    }
    let scores: Vec<f32> = probs.iter().map(|p| p.ln()).collect();
    assert_eq!(sample(&scores, 1.0f64.next_down()), Some(2999));
    assert_eq!(
        sample_probs(&[0.0, 1e-40, 0.0], 1.0f64.next_down()),
        Some(1)
    );
    for bad in [
        vec![],
        vec![0.0; 3],
        vec![0.5, -0.1],
        vec![f32::NAN, 1.0],
        vec![INF],
    ] {
        assert_eq!(sample_probs(&bad, 0.5), None);
    }
}

/// Everything that a processor with wide vectors computes in another way, as bits.
fn fingerprint(row: &[f32]) -> Vec<u64> {
    let rules: [fn(&mut [f32]) -> bool; 6] = [
        softmax_in_place,
        |r| keep_top_k(r, 40, 1),
        |r| keep_top_p(r, 0.8, 1),
        |r| keep_min_p(r, 0.01, 20),
        |r| keep_typical(r, 0.8, 1),
        |r| keep_eta(r, 0.01, 1),
    ];
    let mut bits = Vec::new();
    for rule in rules {
        let mut out = row.to_vec();
        bits.push(u64::from(rule(&mut out)));
        bits.extend(out.iter().map(|x| u64::from(x.to_bits())));
    }
    bits.extend([
        log_sum_exp(row).to_bits(),
        entropy(row).map_or(0, f64::to_bits),
    ]);
    for index in [
        argmax(row),
        sample(row, 0.3),
        sample(row, 0.999),
        sample_probs(row, 0.5),
    ] {
        bits.push(index.map_or(u64::MAX, |i| i as u64));
    }
    bits.extend(
        top_n(row, 30)
            .iter()
            .map(|&(i, x)| (i as u64) << 32 | u64::from(x.to_bits())),
    );
    bits
}

#[test]
fn vector_width_does_not_change_a_bit() {
    for row in rows().into_iter().chain(bad_rows()) {
        let wide = fingerprint(&row);
        ONLY_PORTABLE.store(true, Ordering::Relaxed);
        let portable = fingerprint(&row);
        ONLY_PORTABLE.store(false, Ordering::Relaxed);
        assert_eq!(wide, portable);
    }
}
