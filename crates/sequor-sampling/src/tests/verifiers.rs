//! Verifiers outside the loop: groups, positions in any order, images, vectors.

use sequor_kernels::rng::{Key, Purpose};

use super::laws::{LEN, Toy, V, assert_law};
use super::toy::Markov;
use crate::distribution::DiagonalGaussian;
use crate::stats::{chi_square, kolmogorov_smirnov, normal_cdf};
use crate::tree::{DraftTree, Proposal};
use crate::verify::{
    self, AlignedRule, Draws, FixedTerm, Grid, GroupRule, LastStep, LocalRule, NeighbourTable,
};
use crate::{Acceptance, Categorical, Law};

const RUNS: u64 = 200_000;

fn uniforms<const N: usize>(run: u64) -> [f64; N] {
    let mut stream = Key::new(31, run).stream(0, Purpose::Test);
    std::array::from_fn(|_| stream.uniform())
}

fn pair(seed: u64) -> (Categorical, Categorical) {
    (
        Markov::new(8, 0, 1.2, seed).law(&[]),
        Markov::new(8, 0, 1.2, seed + 1000).law(&[]),
    )
}

#[test]
fn groups_follow_the_closed_form() {
    let (p, q) = pair(1);
    let partition = [0_u32, 0, 1, 1, 1, 2, 3, 3];
    let group = |t: u32| -> Vec<u32> {
        (0..8)
            .filter(|&x| partition[x as usize] == partition[t as usize])
            .collect()
    };
    let mut lossy = vec![0; 8];
    let mut exact = vec![0; 8];
    let mut moved = 0;
    for run in 0..RUNS {
        let [draft, a, b, c] = uniforms(run);
        let token = q.quantile(draft);
        let decided = verify::grouped(&p, &q, token, &group(token), [a, b]);
        assert!(!decided.accepted || decided.token == token);
        lossy[decided.token as usize] += 1;
        let decided = verify::grouped_exact(&p, &q, token, &partition, [a, b, c]).unwrap();
        moved += u64::from(decided.accepted && decided.token != token);
        exact[decided.token as usize] += 1;
    }
    let accept = |t: u32| verify::group_acceptance(&p, &q, &group(t));
    let kept: f64 = (0..8).map(|t| q.prob(t) * accept(t)).sum();
    let residual = p.residual_law(&q).unwrap();
    let law: Vec<f64> = (0..8)
        .map(|t| q.prob(t) * accept(t) + (1.0 - kept) * residual.prob(t))
        .collect();
    assert_law("published", &lossy, &law);
    assert_law("lossless", &exact, &p.to_probs());
    assert!(
        chi_square(&lossy, &p.to_probs()).p_value < 1e-6,
        "it is lossy"
    );
    assert!(
        moved > RUNS / 20,
        "an accepted group need not give the draft"
    );
    assert!(verify::grouped_exact(&p, &q, 0, &[0; 3], [0.5; 3]).is_err());
    assert!(verify::grouped_exact(&p, &q, 0, &[99; 8], [0.5; 3]).is_err());
}

#[test]
fn partitions_never_lower_acceptance() {
    for seed in 0..10_000 {
        let (p, q) = pair(seed);
        let mut stream = Key::new(seed, 7).stream(0, Purpose::Test);
        let partition: Vec<u64> = (0..8).map(|_| stream.below(4)).collect();
        let mut by_group = [(0.0, 0.0); 4];
        for t in 0..8_u32 {
            let cell = &mut by_group[partition[t as usize] as usize];
            *cell = (cell.0 + p.prob(t), cell.1 + q.prob(t));
        }
        let grouped: f64 = by_group.iter().map(|(p, q)| p.min(*q)).sum();
        let single = 1.0 - p.total_variation(&q);
        assert!(grouped >= single - 1e-6, "seed {seed}");
    }
}

#[test]
fn windows_of_ranks() {
    let p: Vec<f64> = (1..=20).map(|i| f64::from(i) / 210.0).collect();
    let near = |_| 0.0;
    let rule = GroupRule::default();
    // Ids are ranks here. The window is moved at both ends, and holds the token.
    assert_eq!(rule.group(&p, 0, near), (0..14).collect::<Vec<_>>());
    assert_eq!(rule.group(&p, 19, near), (6..20).collect::<Vec<_>>());
    assert_eq!(rule.group(&p, 10, near), (3..17).collect::<Vec<_>>());
    let published = GroupRule {
        alone_at_the_bottom: true,
        ..rule
    };
    assert_eq!(published.group(&p, 6, near), [6]);
    assert_eq!(published.group(&p, 7, near), (0..14).collect::<Vec<_>>());
    assert_eq!(published.group(&p, 19, near), (12..20).collect::<Vec<_>>());
    // Filters by probability and by distance; the token itself passes both.
    let close = GroupRule {
        p_threshold: 1.5 / 210.0,
        ..rule
    };
    assert_eq!(close.group(&p, 10, near), [9, 10, 11]);
    assert_eq!(
        rule.group(&p, 10, |id| if id < 5 { 0.1 } else { 0.9 }),
        [3, 4, 10]
    );
    assert_eq!(rule.group(&p, 99, near), [99]);
    // A group of one is the exact rule.
    let one = GroupRule {
        below: 0,
        above: 0,
        ..rule
    };
    for run in 0..5000 {
        let (p, q) = pair(run);
        let [draft, a, b] = uniforms(run);
        let token = q.quantile(draft);
        let group = one.group(&p.to_probs(), token, near);
        let decided = verify::grouped(&p, &q, token, &group, [a, b]);
        let exact = verify::speculative_sampling(
            &[token],
            std::slice::from_ref(&q),
            &[p.clone(), p.clone()],
            &[a],
            b,
            Acceptance::Exact,
        )
        .unwrap();
        assert_eq!(
            (decided.accepted, decided.token),
            (exact.n_matches == 1, exact.tokens[0])
        );
    }
    // A forced token is never rejected.
    let sure = Categorical::one_hot(3, 8).unwrap();
    for run in 0..100 {
        let decided = verify::grouped(&sure, &sure, 3, &[3], uniforms(run));
        assert!(decided.accepted);
    }
    assert!(verify::grouped_window(&[1], &[], (&[], &[]), &[], &[], 0.5).is_err());
}

#[test]
fn any_order_is_exact_and_accepts_the_first() {
    let toy = Toy::peaked();
    for further in [false, true] {
        let mut rounds = 0;
        let counts = toy.count(RUNS, |toy, history, key| {
            rounds += 1;
            let n = 3.min(LEN - history.len());
            // The first draft comes from the target's own law, the others from laws that do
            // not see it.
            let q: Vec<Categorical> = (0..n)
                .map(|i| match i {
                    0 => toy.p(history),
                    _ => toy
                        .q(&[&history[..history.len().min(1)], &[i as u32]].concat())
                        .as_ref()
                        .clone(),
                })
                .collect();
            let draft = |(i, q): (usize, &Categorical)| {
                q.sample(&mut key.stream((history.len() + i) as u64, Purpose::Draft))
            };
            let drafts: Vec<u32> = q.iter().enumerate().map(draft).collect();
            if n == 1 {
                let draws = Draws::new(key, history.len() as u64);
                let verdict = verify::any_order(&drafts, &q, &[], &draws, 0.0).unwrap();
                assert_eq!(verdict.accepted, 1);
                return verdict.tokens;
            }
            let last = if further && history.len() + n < LEN {
                n + 1
            } else {
                n
            };
            let p: Vec<Categorical> = (0..last)
                .map(|i| toy.p(&[history, &drafts[..i]].concat()))
                .collect();
            let draws = Draws::new(key, history.len() as u64);
            let verdict = verify::any_order(&drafts, &q, &p, &draws, 0.0).unwrap();
            assert!(verdict.accepted >= 1 && verdict.tokens.len() >= 2);
            verdict.tokens
        });
        assert_law(
            &format!("any order, further token: {further}"),
            &counts,
            &toy.joint(),
        );
        // Two passes per round, never more than one per token.
        assert!(2 * rounds <= RUNS * LEN as u64);
    }
    let law = toy.p(&[]);
    let one = std::slice::from_ref(&law);
    let draws = Draws::new(Key::new(1, 1), 0);
    assert!(verify::any_order(&[1], &[], one, &draws, 0.0).is_err());
    assert!(verify::any_order(&[1, 2], &[law.clone(), law.clone()], &[], &draws, 0.0).is_err());
    assert!(verify::any_order(&[1], one, one, &draws, -1.0).is_err());
    // Full tolerance accepts everything.
    let sure = Categorical::one_hot(0, V).unwrap();
    let verdict = verify::any_order(&[1], one, &[sure], &draws, 1.0).unwrap();
    assert_eq!(verdict.accepted, 1);
}

#[test]
fn the_published_form_with_rows_that_do_not_sum_to_one() {
    let (q, p) = (
        vec![vec![0.5, 0.4, 0.0]; 2],
        vec![vec![0.5, 0.4, 0.0], vec![0.1, 0.2, 0.6]],
    );
    let run = |drafts: &[u32], accept: &[f64], redraw| {
        verify::any_order_published(drafts, &q, &p, accept, redraw).unwrap()
    };
    let all = run(&[0, 1], &[0.999, 0.49], 0.5);
    assert_eq!((all.accepted, all.tokens), (2, vec![0, 1]));
    let cut = run(&[0, 0], &[0.1, 0.21], 0.5);
    assert_eq!((cut.accepted, cut.tokens), (1, vec![0, 2]));
    assert!(verify::any_order_published(&[0], &q, &p, &[0.5], 0.5).is_err());
    assert!(verify::any_order_published(&[0, 1], &q, &p, &[0.5], 0.5).is_err());
}

#[test]
fn islands_of_an_image() {
    let grid = Grid {
        rows: 4,
        columns: 5,
    };
    let mask = |cells: &[usize]| -> Vec<bool> { (0..20).map(|i| cells.contains(&i)).collect() };
    // Diagonals connect; opposite borders do not.
    let islands = grid.islands(&mask(&[0, 6, 4, 5, 15, 19]));
    assert_eq!(islands, [vec![0, 5, 6], vec![4], vec![15], vec![19]]);
    let cells = |mask: Vec<bool>| -> Vec<usize> { (0..20).filter(|&i| mask[i]).collect() };
    assert_eq!(cells(grid.dilate(&[0], 1)), [0, 1, 5, 6]);
    assert_eq!(cells(grid.dilate(&[9], 1)), [3, 4, 8, 9, 13, 14]);
    assert_eq!(cells(grid.dilate(&[7, 999], 0)), [7]);
    assert_eq!(
        cells(grid.dilate(&[12], usize::MAX)),
        (0..20).collect::<Vec<_>>()
    );
    assert!(cells(grid.dilate(&[], 3)).is_empty());
}

#[test]
fn local_verification() {
    let near = NeighbourTable::new((0..4).map(|t| vec![(t + 1) % 4]).collect());
    let laws = |cell: usize| {
        let weights = if cell == 7 {
            [0.7, 0.1, 0.1, 0.1]
        } else {
            [0.05, 0.35, 0.5, 0.1]
        };
        Ok(Categorical::from_weights(weights.to_vec()).unwrap())
    };
    // Code 1 and its neighbour 2 have 0.85 everywhere but in cell 7, where they have 0.2.
    let codes = [1_u32; 12];
    let run = |k, tau, radius| {
        verify::local(&codes, 3, laws, &near, &LocalRule { k, tau, radius }).unwrap()
    };
    let verdict = run(1, 0.5, 1);
    assert_eq!(verdict.rejected, [7]);
    assert_eq!(verdict.islands, [vec![2, 3, 6, 7, 10, 11]]);
    assert_eq!(verdict.passes().len(), 6);
    assert!(
        run(0, 0.0, 1).islands.is_empty(),
        "nothing is decided again"
    );
    let all = run(1, 1.1, 0);
    assert_eq!(
        (all.rejected.len(), all.islands),
        (12, vec![(0..12).collect::<Vec<_>>()])
    );
    assert_eq!(
        run(0, 0.5, 0).rejected.len(),
        12,
        "without neighbours 0.35 is too little"
    );
    let two = Grid {
        rows: 1,
        columns: 5,
    };
    let verdict = verify::LocalVerdict {
        rejected: vec![],
        islands: two.islands(&[true, false, true, true, false]),
    };
    assert_eq!(verdict.passes(), [vec![0, 2], vec![3]]);
    assert!(verify::local(&codes, 5, laws, &near, &LocalRule::default()).is_err());
    assert!(verify::local(&codes, 0, laws, &near, &LocalRule::default()).is_err());
}

fn step(mean: f64, std: f64, sum_log_std: f64) -> LastStep {
    let law = DiagonalGaussian::new(vec![mean; 16], vec![std; 16]).unwrap();
    LastStep::new(law, sum_log_std).unwrap()
}

#[test]
fn vectors_with_a_deviation_of_their_own() {
    let q = DiagonalGaussian::new(vec![0.3, -0.2], vec![0.8, 1.1]).unwrap();
    let p = DiagonalGaussian::new(vec![0.0, 0.1], vec![1.0, 0.7]).unwrap();
    let mut uniforms = [Vec::new(), Vec::new()];
    let mut accepted = 0;
    for run in 0..RUNS {
        let key = Key::new(41, run);
        let x = q.sample(&mut key.stream(0, Purpose::Draft));
        let mut tree = DraftTree::<DiagonalGaussian>::new();
        tree.push(
            None,
            x.clone(),
            Proposal::Law(std::sync::Arc::new(q.clone())),
        )
        .unwrap();
        // Nothing may follow: the second unit would cost a draw.
        let draws = Draws::new(key, 0);
        let law = |_: &[usize]| Ok(p.clone());
        let verdict = verify::chain(&tree, law, &draws, Acceptance::Exact, |_| true).unwrap();
        accepted += verdict.path.len();
        let y = verdict.emitted.unwrap_or(x);
        for (c, uniforms) in uniforms.iter_mut().enumerate() {
            uniforms.push(normal_cdf((y[c] - p.mean()[c]) / p.std()[c]));
        }
    }
    for uniforms in uniforms {
        let test = kolmogorov_smirnov(&uniforms, |u| u);
        assert!(test.p_value > 1e-3, "{test:?}");
    }
    assert!((0.4..0.9).contains(&(accepted as f64 / RUNS as f64)));
    for (mean, std) in [
        (vec![], vec![]),
        (vec![0.0], vec![0.0]),
        (vec![f64::NAN], vec![1.0]),
    ] {
        assert!(DiagonalGaussian::new(mean, std).is_err());
    }
}

#[test]
fn aligned_noise() {
    let (p, q) = (step(0.0, 1.0, -3.0), step(0.05, 1.0, -2.5));
    let exact = AlignedRule::default();
    let x = vec![0.4; 16];
    // Without earlier steps it is the ratio of densities.
    let (p0, q0) = (step(0.0, 1.0, 0.0), step(0.05, 1.0, 0.0));
    let ratio = p0.law().log_density(&x) - q0.law().log_density(&x);
    assert!((exact.log_ratio(&p0, &q0, &x) - ratio).abs() < 1e-9);
    assert!((exact.log_fixed_term(&p, &q) - 0.5).abs() < 1e-12);
    let published = AlignedRule::published();
    assert_eq!(published.fixed_term, FixedTerm::Published);
    assert!((published.log_fixed_term(&p, &q) + 0.5).abs() < 1e-12);
    // Equal models accept everything; a wrong dimension nothing.
    assert!(exact.accepts(&p, &p, &x, 1.0 - f64::EPSILON));
    assert!(!exact.accepts(&p, &p, &[0.0], 0.0));
    assert_eq!(exact.keep_probability(&p0, &p0, &x), 0.0);
    // Refused proposals leave nothing; the last that is kept counts.
    let far = step(9.0, 1.0, 0.0);
    let (none, tries) = exact.replacements(&[(&p0, &p0)], |_, _| (x.clone(), 0.0));
    assert_eq!((none, tries), (vec![None], 100));
    let both = [(&p0, &far), (&p0, &p0)];
    let (kept, _) = exact.replacements(&both, |t, _| (vec![t as f64 / 1000.0; 16], 0.0));
    assert_eq!(kept, [Some(vec![0.099; 16]), None]);
    assert!(LastStep::new(p.law().clone(), f64::NAN).is_err());
}
