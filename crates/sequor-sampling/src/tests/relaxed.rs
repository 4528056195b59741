//! Lossy rules: they reduce to the exact one, follow their own laws, and say what they are.

use std::ops::ControlFlow;
use std::sync::Arc;

use sequor_kernels::rng::Key;

use super::laws::{Toy, V, assert_law, ranked, tokens_of, two_levels};
use super::toy::{DrawnTree, Grown, Markov, RankTree};
use crate::draft::{DraftMode, DraftModel, Drafter};
use crate::generate::{Request, generate_batch};
use crate::tree::{DraftTree, Draw, Proposal};
use crate::verify::{self, Draws, Verdict};
use crate::{
    Acceptance, Categorical, DepthPolicy, Error, GenerationConfig, Generator, NeighbourTable,
    Neighbours, Options, Topology,
};

/// Every token's neighbours are the next ones, in a circle.
fn circle(vocab: u32) -> NeighbourTable {
    let list = |t| (1..vocab).map(|d| (t + d) % vocab).collect();
    NeighbourTable::new((0..vocab).map(list).collect())
}

fn relax(
    toy: &Toy,
    history: &[u32],
    tree: &DraftTree,
    key: Key,
    acceptance: Acceptance,
) -> crate::Result<Verdict<u32>> {
    let near = circle(V as u32);
    let draws = Draws::new(key, history.len() as u64);
    let law = |path: &[usize]| toy.after(history, tree, path);
    verify::relaxed(tree, law, &draws, acceptance, Some(&near), |_| false)
}

#[test]
fn without_leave_the_rules_are_the_exact_one() {
    let toy = Toy::peaked();
    let nothing = [
        Acceptance::Tolerance { r: 0.0 },
        Acceptance::Lantern { k: 0, delta: 0.5 },
        Acceptance::Lantern { k: 3, delta: 0.0 },
        Acceptance::Ensemble { weight: 1.0 },
    ];
    for run in 0..5000 {
        let key = Key::new(3, run);
        let draws = Draws::new(key, 0);
        let drawn = toy.draft_chain(&[], 3, key);
        let best = DraftTree::chain([toy.q(&[]).mode().0, 1, 2]);
        for tree in [drawn, best, ranked(&toy, &[], 3)] {
            let law = |path: &[usize]| toy.after(&[], &tree, path);
            let exact = verify::tree(&tree, law, &draws, |_| false).unwrap();
            for rule in nothing {
                assert_eq!(relax(&toy, &[], &tree, key, rule).unwrap(), exact, "{rule}");
            }
            if tree.is_chain() {
                let rule = Acceptance::Tolerance { r: 0.0 };
                assert_eq!(
                    verify::chain(&tree, law, &draws, rule, |_| false).unwrap(),
                    exact
                );
            }
        }
    }
    assert!(nothing.iter().take(3).all(|rule| !rule.is_exact()));
}

/// Counts the first token of rounds with `tree`.
fn first_tokens(toy: &Toy, tree: &DraftTree, acceptance: Acceptance) -> Vec<u64> {
    let mut counts = vec![0; V];
    for run in 0..200_000 {
        let verdict = relax(toy, &[], tree, Key::new(5, run), acceptance).unwrap();
        counts[tokens_of(tree, &verdict)[0] as usize] += 1;
    }
    counts
}

/// The law of the first token when children are tried in order, the `i`-th accepted with
/// `chance(P, c)`, after which `P` loses what `gone(P, c)` names.
fn by_hand(
    p: &Categorical,
    children: &[u32],
    chance: impl Fn(&[f64], u32) -> f64,
    gone: impl Fn(&[f64], u32) -> Vec<u32>,
) -> Vec<f64> {
    let mut left = p.to_probs();
    let mut reach = 1.0;
    let mut out = vec![0.0; V];
    for &c in children {
        let accept = chance(&left, c).min(1.0);
        out[c as usize] += reach * accept;
        reach *= 1.0 - accept;
        for token in gone(&left, c) {
            left[token as usize] = 0.0;
        }
        let total: f64 = left.iter().sum();
        left.iter_mut().for_each(|p| *p /= total);
    }
    for (out, p) in out.iter_mut().zip(left) {
        *out += reach * p;
    }
    out
}

#[test]
fn tolerance_and_ensemble_follow_their_laws() {
    let toy = Toy::peaked();
    let p = toy.p(&[]);
    for width in [1, 3] {
        let tree = ranked(&toy, &[], width);
        let children: Vec<u32> = tree.children(None).map(|c| tree.units()[c]).collect();
        let law =
            |add: fn(f64) -> f64| by_hand(&p, &children, |p, c| add(p[c as usize]), |_, c| vec![c]);
        let counts = first_tokens(&toy, &tree, Acceptance::Tolerance { r: 0.2 });
        assert_law("tolerance", &counts, &law(|p| p + 0.2));
        let counts = first_tokens(&toy, &tree, Acceptance::Ensemble { weight: 0.7 });
        assert_law("ensemble", &counts, &law(|p| 0.7 * p + 0.3));
        // It is far from the target's law, which the test would notice.
        let exact = crate::stats::chi_square(&counts, &p.to_probs());
        assert!(exact.p_value < 1e-6);
    }
    // Drawn from a law: accepted with min(1, p/q + r), else replaced by the residual.
    let q = toy.q(&[]);
    let mut counts = vec![0; V];
    for run in 0..200_000 {
        let key = Key::new(5, run);
        let tree = toy.draft_chain(&[], 1, key);
        let verdict = relax(&toy, &[], &tree, key, Acceptance::Tolerance { r: 0.2 }).unwrap();
        counts[tokens_of(&tree, &verdict)[0] as usize] += 1;
    }
    let accept = |t: u32| (p.prob(t) / q.prob(t) + 0.2).min(1.0) * q.prob(t);
    let kept: f64 = (0..V as u32).map(accept).sum();
    let residual = p.residual_law(&q).unwrap();
    let probs: Vec<f64> = (0..V as u32)
        .map(|t| accept(t) + (1.0 - kept) * residual.prob(t))
        .collect();
    assert_law("tolerance of drawn tokens", &counts, &probs);
}

#[test]
fn lantern_follows_its_law() {
    let toy = Toy::peaked();
    let p = toy.p(&[]);
    let near = circle(V as u32);
    for (k, delta) in [(2, 0.15), (4, 0.4), (2, 1.5), (4, 9.0)] {
        let lent = |p: &[f64], c: u32| {
            let most = if delta > 1.0 {
                (delta - 1.0) * p[c as usize]
            } else {
                delta
            };
            let sums = near.nearest(c, k).iter().scan(0.0, |sum, &v| {
                *sum += p[v as usize];
                Some(*sum)
            });
            sums.take_while(|&sum| sum <= most).last().unwrap_or(0.0)
        };
        for width in [1, 2, 3] {
            let tree = ranked(&toy, &[], width);
            let children: Vec<u32> = tree.children(None).map(|c| tree.units()[c]).collect();
            let gone = |p: &[f64], c: u32| {
                let mut all = vec![c];
                if lent(p, c) > 0.0 {
                    all.extend(near.nearest(c, k));
                }
                // Nothing would be left: nothing is taken.
                let rest: f64 = (0..V as u32)
                    .filter(|t| !all.contains(t))
                    .map(|t| p[t as usize])
                    .sum();
                if rest < 1e-12 { vec![c] } else { all }
            };
            let law = by_hand(&p, &children, |p, c| p[c as usize] + lent(p, c), gone);
            let counts = first_tokens(&toy, &tree, Acceptance::Lantern { k, delta });
            assert_law(
                &format!("lantern {k} {delta}, {width} children"),
                &counts,
                &law,
            );
        }
    }
}

#[test]
fn what_is_undefined_is_refused() {
    let toy = Toy::peaked();
    let key = Key::new(1, 1);
    let drawn = two_levels(&toy, &[], key, 2, Draw::WithReplacement);
    let tree = DraftTree::chain([1]);
    let draws = Draws::new(key, 0);
    let law = |path: &[usize]| toy.after(&[], &tree, path);
    let refused =
        |result: crate::Result<Verdict<u32>>| matches!(result, Err(Error::Unsupported(_)));
    for rule in [Acceptance::Tolerance { r: 0.1 }, Acceptance::lantern()] {
        assert!(refused(relax(&toy, &[], &drawn, key, rule)), "{rule}");
    }
    for rule in [Acceptance::typical(), Acceptance::Synthetic { rate: 0.5 }] {
        assert!(refused(relax(&toy, &[], &tree, key, rule)), "{rule}");
        assert!(
            refused(verify::chain(&tree, law, &draws, rule, |_| false)),
            "{rule}"
        );
    }
    assert!(refused(verify::chain(
        &tree,
        law,
        &draws,
        Acceptance::lantern(),
        |_| false
    )));
    let alone = verify::relaxed(&tree, law, &draws, Acceptance::lantern(), None, |_| false);
    assert!(matches!(alone, Err(Error::Config(_))));
    // The same in the loop, before and after the forward pass.
    let target = Markov::new(9, 2, 1.5, 1);
    let run = |rule: Acceptance, drafter: Box<dyn Drafter>| {
        let options = Options::from(GenerationConfig::sampling(1.0))
            .max_new_tokens(20)
            .depth(DepthPolicy::Fixed(3))
            .draft_nodes(9)
            .acceptance(rule);
        let generator = Generator::new(&target, options).unwrap();
        generator.generate(&[1, 2], Some(drafter), |_| ControlFlow::Continue(()))
    };
    let drawn = || {
        Box::new(DrawnTree {
            guess: Markov::new(9, 1, 1.5, 2),
            width: 2,
            draw: Draw::WithReplacement,
            heard: vec![],
        })
    };
    let rank = || {
        Box::new(RankTree {
            guess: Markov::new(9, 1, 1.5, 2),
            width: 2,
        })
    };
    let tolerance = Acceptance::Tolerance { r: 0.1 };
    assert!(matches!(
        run(tolerance, drawn()),
        Err(Error::Unsupported(_))
    ));
    assert!(matches!(
        run(Acceptance::lantern(), rank()),
        Err(Error::Config(_))
    ));
    assert!(run(tolerance, rank()).unwrap().report.accepted > 0);
    for bad in [
        Acceptance::Tolerance { r: -0.1 },
        Acceptance::Synthetic { rate: f64::NAN },
        Acceptance::Lantern {
            k: 1,
            delta: f64::INFINITY,
        },
        Acceptance::Typical {
            epsilon: 2.0,
            delta: 0.3,
        },
        Acceptance::Typical {
            epsilon: 0.1,
            delta: -1.0,
        },
    ] {
        let options = Options::from(GenerationConfig::sampling(1.0)).acceptance(bad);
        assert!(
            matches!(Generator::new(&target, options), Err(Error::Input { .. })),
            "{bad}"
        );
    }
    let mut options =
        Options::from(GenerationConfig::sampling(1.0)).acceptance(Acceptance::typical());
    options.mirostat = Some(Default::default());
    assert!(matches!(
        Generator::new(&target, options),
        Err(Error::Unsupported(_))
    ));
    let json = serde_json::to_string(&Acceptance::lantern()).unwrap();
    assert_eq!(
        serde_json::from_str::<Acceptance>(&json).unwrap(),
        Acceptance::lantern()
    );
}

#[test]
fn typical_takes_the_longest_typical_path() {
    let law = |w: [f32; 4]| Categorical::from_weights(w.to_vec()).unwrap();
    // Three paths: 0 alone, 1 then 2, 1 then 3.
    let parents = [None, None, Some(1), Some(1)];
    let tree = DraftTree::tree(vec![0, 1, 2, 3], &parents).unwrap();
    let laws = |path: &[usize]| match path {
        [] => Ok(law([0.6, 0.3, 0.05, 0.05])),
        [1] => Ok(law([0.0, 0.1, 0.3, 0.6])),
        [1, 3] => Ok(law([0.0, 0.7, 0.2, 0.1])),
        _ => Ok(law([1.0, 1.0, 1.0, 3.0])),
    };
    let run = |epsilon, ends: fn(u32) -> bool| {
        verify::typical(&tree, laws, (epsilon, 0.3), ends).unwrap()
    };
    // Longest, and of the two longest the likelier; then the target's best.
    let verdict = run(0.09, |_| false);
    assert_eq!(
        (verdict.path, verdict.emitted, verdict.rejected),
        (vec![1, 3], Some(1), false)
    );
    // Nothing follows an end: of two paths of one token the likelier wins.
    let verdict = run(0.09, |t| t == 1);
    assert_eq!((verdict.path, verdict.emitted), (vec![0], Some(3)));
    let verdict = run(0.09, |t| t == 3);
    assert_eq!((verdict.path, verdict.emitted), (vec![1, 3], None));
    // By hand: H = 0.9668 nats, 0.9 exp(-H) = 0.342: 0.3 is below, 0.6 is not.
    let verdict = verify::typical(&tree, laws, (0.99, 0.9), |_| false).unwrap();
    assert_eq!((verdict.path, verdict.emitted), (vec![0], Some(3)));
    assert!(
        (verify::typical_threshold(&laws(&[]).unwrap(), 0.99, 0.9) - 0.9 * (-0.9668_f64).exp())
            .abs()
            < 1e-3
    );
    let nothing = verify::typical(&DraftTree::new(), laws, (0.09, 0.3), |_| false).unwrap();
    assert_eq!(
        (nothing.path.len(), nothing.emitted, nothing.rejected),
        (0, Some(0), false)
    );
}

#[test]
fn synthetic_acceptance_has_the_rate_it_is_given() {
    let target = Markov::new(8, 1, 1.0, 1);
    for (config, rate) in [
        (GenerationConfig::greedy(), 0.7),
        (GenerationConfig::sampling(1.0), 0.4),
    ] {
        let options = Options::from(config)
            .max_new_tokens(30_000)
            .depth(DepthPolicy::Fixed(4))
            .acceptance(Acceptance::Synthetic { rate });
        let drafter = DraftModel::new(Markov::new(8, 0, 1.0, 2), DraftMode::Greedy).unwrap();
        let generator = Generator::new(&target, options).unwrap();
        let report = generator
            .generate(&[1], Some(Box::new(drafter)), |_| ControlFlow::Continue(()))
            .unwrap()
            .report;
        let expected = (1.0 - rate.powi(5)) / (1.0 - rate);
        let found = report.tokens_per_call();
        assert!(
            (found / expected - 1.0).abs() < 0.02,
            "{found}, not {expected}"
        );
        assert_eq!(report.lossy, Some(format!("synthetic (rate {rate})")));
        assert!(report.to_string().contains("LOSSY"));
    }
}

/// The loop with every lossy rule: tokens are valid, the rule is named, rows of a batch do
/// not disturb each other, and a greedy target stays greedy.
#[test]
fn lossy_rules_in_the_loop() {
    let target = Markov::new(12, 2, 2.0, 1);
    let near: Arc<dyn Neighbours> = Arc::new(circle(12));
    let grown = |topology: Topology| -> Option<Box<dyn Drafter>> {
        let guess = Markov::new(12, 2, 2.0, 1);
        Some(Box::new(Grown { guess, topology }))
    };
    for rule in [
        Acceptance::typical(),
        Acceptance::Lantern { k: 4, delta: 0.3 },
        Acceptance::Tolerance { r: 0.1 },
        Acceptance::Ensemble { weight: 0.8 },
    ] {
        for topology in [Topology::Chain, Topology::Dynamic { top_k: 3 }] {
            let options = |request, config: GenerationConfig| {
                let config = GenerationConfig {
                    eos_token_id: Some(3.into()),
                    repetition_penalty: Some(1.1),
                    ..config
                };
                Options::from(config)
                    .max_new_tokens(60)
                    .request(request)
                    .depth(DepthPolicy::Auto { max: 4 })
                    .draft_nodes(10)
                    .acceptance(rule)
            };
            let run = |options: Options, drafter| {
                let generator = Generator::new(&target, options).unwrap();
                let generator = generator.with_neighbours(Arc::clone(&near));
                generator
                    .generate(&[1, 2], drafter, |_| ControlFlow::Continue(()))
                    .unwrap()
            };
            let sampling = || GenerationConfig::sampling(1.0);
            let singles: Vec<_> = (0..8)
                .map(|i| run(options(i, sampling()), grown(topology.clone())))
                .collect();
            let accepted: usize = singles.iter().map(|out| out.report.accepted).sum();
            let exact: usize = (0..8)
                .map(|i| {
                    let options = options(i, sampling()).acceptance(Acceptance::Exact);
                    run(options, grown(topology.clone())).report.accepted
                })
                .sum();
            assert!(accepted > 20, "{rule}: {accepted}, exact {exact}");
            for out in &singles {
                assert_eq!(out.report.lossy, Some(rule.to_string()));
                assert!(out.tokens.iter().rev().skip(1).all(|&t| t != 3));
            }
            let requests = (0..8).map(|i| Request {
                drafter: grown(topology.clone()),
                neighbours: Some(Arc::clone(&near)),
                ..Request::new(vec![1, 2], options(i, sampling()))
            });
            let batch = generate_batch(&target, requests.collect(), None).unwrap();
            for (row, single) in batch.into_iter().zip(&singles) {
                assert_eq!(row.unwrap().tokens, single.tokens, "{rule}");
            }
            let greedy = run(options(0, GenerationConfig::greedy()), grown(topology));
            let plain = run(options(0, GenerationConfig::greedy()), None);
            assert_eq!((greedy.tokens, greedy.report.lossy), (plain.tokens, None));
        }
    }
}

#[test]
fn neighbours_by_distance() {
    let vectors = [0.0, 0.0, 1.0, 0.0, 0.0, 3.0, 1.0, 0.5];
    let table = NeighbourTable::from_vectors(&vectors, 2, 2).unwrap();
    assert_eq!(table.nearest(0, 9), [1, 3]);
    assert_eq!(table.nearest(2, 1), [3]);
    assert_eq!(table.nearest(9, 1), [0_u32; 0]);
    let distances = verify::squared_distances(&vectors, 2).unwrap();
    assert_eq!(
        (distances[0][2], distances[2][3], distances[1][1]),
        (9.0, 7.25, 0.0)
    );
    assert!(NeighbourTable::from_vectors(&vectors, 3, 2).is_err());
    assert!(NeighbourTable::from_vectors(&[f32::NAN], 1, 2).is_err());
    assert!(verify::squared_distances(&[], 0).is_err());
    let mut tree = DraftTree::new();
    tree.push(None, 0, Proposal::OneHot).unwrap();
    assert!(verify::check_relaxed(&tree).is_ok());
}
