//! The chain rule for units that are not tokens.

use std::sync::Arc;

use sequor_kernels::rng::{Key, Purpose, Stream};

use super::laws::assert_law;
use crate::distribution::{Gaussian, ProductCategorical};
use crate::stats::{chi_square, kolmogorov_smirnov, normal_cdf};
use crate::tree::{DraftTree, Proposal};
use crate::verify::{self, Acceptance, Draws};
use crate::{Categorical, Law, Result};

const STEPS: usize = 2;

/// One sequence of `STEPS` units by draft and verification.
fn run<L: Law>(p: impl Fn(&[L::Unit]) -> L, q: impl Fn(&[L::Unit]) -> L, key: Key) -> Vec<L::Unit> {
    let mut history: Vec<L::Unit> = Vec::new();
    while history.len() < STEPS {
        let mut tree = DraftTree::<L>::new();
        let mut tokens = history.clone();
        while tokens.len() < STEPS {
            let law = q(&tokens);
            let unit = law.sample(&mut key.stream(tokens.len() as u64, Purpose::Draft));
            tree.push(
                tree.len().checked_sub(1),
                unit.clone(),
                Proposal::Law(Arc::new(law)),
            )
            .unwrap();
            tokens.push(unit);
        }
        let law = |path: &[usize]| -> Result<L> {
            let drafted = path.iter().map(|&n| tree.units()[n].clone());
            Ok(p(&history
                .iter()
                .cloned()
                .chain(drafted)
                .collect::<Vec<_>>()))
        };
        let draws = Draws::new(key, history.len() as u64);
        let verdict = verify::chain(&tree, law, &draws, Acceptance::Exact, |_| false).unwrap();
        let accepted: Vec<L::Unit> = verdict
            .path
            .iter()
            .map(|&n| tree.units()[n].clone())
            .collect();
        history.extend(accepted.into_iter().chain(verdict.emitted));
    }
    history.truncate(STEPS);
    history
}

fn column_law(seed: u64, history: &[Vec<u32>]) -> ProductCategorical {
    let past = history
        .iter()
        .flatten()
        .fold(1, |code, &t| code * 4 + u64::from(t));
    let mut stream = Key::new(seed, past).stream(0, Purpose::Test);
    let mut book = |vocab: usize| {
        let scores: Vec<f32> = (0..vocab).map(|_| 1.5 * stream.normal() as f32).collect();
        Categorical::from_scores(scores).unwrap()
    };
    ProductCategorical::new(vec![book(3), book(2)]).unwrap()
}

#[test]
fn columns_of_codes() {
    let cells: Vec<Vec<u32>> = (0..6).map(|i| vec![i / 2, i % 2]).collect();
    let mut probs = Vec::new();
    for a in &cells {
        for b in &cells {
            let first = column_law(1, &[]).density(a);
            probs.push(first * column_law(1, std::slice::from_ref(a)).density(b));
        }
    }
    assert!((probs.iter().sum::<f64>() - 1.0).abs() < 1e-6);
    let mut counts = vec![0; probs.len()];
    for i in 0..200_000 {
        let units = run(
            |h: &[Vec<u32>]| column_law(1, h),
            |h| column_law(2, h),
            Key::new(11, i),
        );
        let cell = |u: &Vec<u32>| (u[0] * 2 + u[1]) as usize;
        counts[cell(&units[0]) * 6 + cell(&units[1])] += 1;
    }
    assert_law("columns", &counts, &probs);
}

fn target(history: &[Vec<f64>]) -> Gaussian {
    let mean = history
        .last()
        .map_or(vec![0.0, 1.0], |x| vec![0.5 * x[0], x[0] - 0.3 * x[1]]);
    Gaussian::new(mean, 0.8).unwrap()
}

fn draft(history: &[Vec<f64>]) -> Gaussian {
    let mean = target(history)
        .mean()
        .iter()
        .zip([0.6, -0.4])
        .map(|(m, d)| m + d)
        .collect();
    Gaussian::new(mean, 0.8).unwrap()
}

/// The target's distribution functions turn exact samples into uniform numbers.
fn assert_gaussian_chain(name: &str, mut sample: impl FnMut(Key) -> Vec<Vec<f64>>) {
    let runs = 100_000;
    let mut uniforms = vec![Vec::new(); 4];
    let mut cells = vec![0_u64; 4 * 4 * 4 * 4];
    for i in 0..runs {
        let units = sample(Key::new(21, i));
        let mut cell = 0;
        for step in 0..STEPS {
            let law = target(&units[..step]);
            for c in 0..2 {
                let u = normal_cdf((units[step][c] - law.mean()[c]) / law.sigma());
                uniforms[step * 2 + c].push(u);
                cell = cell * 4 + ((u * 4.0) as usize).min(3);
            }
        }
        cells[cell] += 1;
    }
    for (i, u) in uniforms.iter().enumerate() {
        let test = kolmogorov_smirnov(u, |x| x);
        assert!(test.p_value > 1e-3, "{name}, coordinate {i}: {test:?}");
    }
    let joint = chi_square(&cells, &vec![1.0; cells.len()]);
    assert!(joint.p_value > 1e-3, "{name}: {joint:?}");
}

#[test]
fn vectors_by_acceptance_rejection() {
    assert_gaussian_chain("chain", |key| run(target, draft, key));
}

fn coupled(key: Key, accepted: &mut u64) -> Vec<Vec<f64>> {
    let mut history: Vec<Vec<f64>> = Vec::new();
    for step in 0..STEPS {
        let (p, q) = (target(&history), draft(&history));
        let x = q.sample(&mut key.stream(step as u64, Purpose::Draft));
        let u = key.stream(step as u64, Purpose::Accept).uniform();
        let out = p.reflection_coupling(&q, &x, u).unwrap();
        *accepted += u64::from(out.accepted);
        history.push(out.unit);
    }
    history
}

#[test]
fn vectors_by_reflection() {
    let mut accepted = 0;
    assert_gaussian_chain("reflection", |key| coupled(key, &mut accepted));
    // A maximal coupling keeps 1 - TV = 2 Phi(-|z| / 2) of the drafts.
    let z = (0.6_f64.powi(2) + 0.4_f64.powi(2)).sqrt() / 0.8;
    let expected = 2.0 * normal_cdf(-z / 2.0);
    let rate = accepted as f64 / (100_000 * STEPS) as f64;
    assert!(
        (rate - expected).abs() < 0.005,
        "{rate} instead of {expected}"
    );
}

#[test]
fn a_shifted_law_would_be_noticed() {
    let shifted = |h: &[Vec<f64>]| {
        let mean = target(h).mean().iter().map(|m| m + 0.02).collect();
        Gaussian::new(mean, 0.8).unwrap()
    };
    let samples: Vec<f64> = (0..100_000)
        .map(|i| {
            let x = run(shifted, draft, Key::new(21, i));
            normal_cdf(x[0][0] / 0.8)
        })
        .collect();
    assert!(kolmogorov_smirnov(&samples, |x| x).p_value < 1e-4);
}

#[test]
fn residuals_at_the_edges() {
    let stream = || -> Stream { Key::new(1, 1).stream(0, Purpose::Residual) };
    // Disjoint: every draw of p is kept.
    let p = ProductCategorical::new(vec![Categorical::one_hot(0, 2).unwrap()]).unwrap();
    let q = ProductCategorical::new(vec![Categorical::one_hot(1, 2).unwrap()]).unwrap();
    assert_eq!(p.residual(&q, &mut stream()).unwrap(), [0]);
    assert_eq!(p.ratio(&q, &vec![1]), 0.0);
    assert_eq!(p.ratio(&q, &vec![0]), f64::INFINITY);
    // Equal: there is nothing to draw, and the loop ends by itself.
    assert!(matches!(
        p.residual(&p, &mut stream()),
        Err(crate::Error::Residual { .. })
    ));
    // A wrong height or dimension is impossible, not a panic.
    assert_eq!(p.density(&vec![0, 0]), 0.0);
    let g = Gaussian::new(vec![0.0, 0.0], 1.0).unwrap();
    assert_eq!(g.density(&vec![0.0]), 0.0);
    assert!(
        g.reflection_coupling(&Gaussian::new(vec![0.0], 1.0).unwrap(), &[0.0], 0.5)
            .is_err()
    );
    assert!(
        g.reflection_coupling(
            &Gaussian::new(vec![0.0, 0.0], 2.0).unwrap(),
            &[0.0, 0.0],
            0.5
        )
        .is_err()
    );
    // Equal laws keep the draft at any uniform number.
    let kept = g
        .reflection_coupling(&g, &[0.3, -2.0], 1.0 - f64::EPSILON)
        .unwrap();
    assert!(kept.accepted && kept.unit == [0.3, -2.0]);
    for bad in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
        assert!(Gaussian::new(vec![0.0], bad).is_err());
    }
    assert!(Gaussian::new(vec![], 1.0).is_err());
    assert!(ProductCategorical::new(vec![]).is_err());
}
