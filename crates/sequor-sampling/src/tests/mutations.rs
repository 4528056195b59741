//! Plausible mistakes, each of which the test of `laws` must catch.
//!
//! The laws are peaked and the counts large because some of these biases are well below
//! one per cent in total variation.

use sequor_kernels::rng::{Key, Purpose};

use super::laws::{RUNS, Toy, ranked, tokens_of, two_levels};
use crate::Law;
use crate::stats::chi_square;
use crate::tree::{DraftTree, Draw, Proposal, paths};
use crate::verify::{self, Acceptance, Draws};

fn assert_caught(name: &str, round: impl FnMut(&Toy, &[u32], Key) -> Vec<u32>) {
    let toy = Toy::peaked();
    let test = chi_square(&toy.count(RUNS, round), &toy.joint());
    assert!(test.p_value < 1e-6, "{name} went unnoticed: {test:?}");
}

#[test]
fn sampling_the_target_after_a_rejection() {
    assert_caught("no residual", |toy, history, key| {
        let tree = toy.draft_chain(history, 3, key);
        let mut new = Vec::new();
        for (i, &x) in tree.units().iter().enumerate() {
            let before: Vec<u32> = history.iter().chain(&new).copied().collect();
            let (p, q) = (toy.p(&before), toy.q(&before));
            let position = before.len() as u64;
            if key.stream(position, Purpose::Accept).uniform() <= p.ratio(&q, &x) {
                new.push(x);
            } else {
                new.push(p.sample(&mut key.stream(position, Purpose::Residual)));
                break;
            }
            assert_eq!(new.len(), i + 1);
        }
        new
    });
}

#[test]
fn drawing_again_after_a_mismatch() {
    assert_caught("redraw", |toy, history, key| {
        let tree = ranked(toy, history, 2);
        let mut path: Vec<usize> = Vec::new();
        loop {
            let p = toy.after(history, &tree, &path).unwrap();
            let position = (history.len() + path.len()) as u64;
            let y = p.sample(&mut key.stream(position, Purpose::Sample));
            let child = tree
                .children(path.last().copied())
                .find(|&c| tree.units()[c] == y);
            match child {
                Some(child) => path.push(child),
                None => {
                    let fresh = p.sample(&mut key.stream(position, Purpose::Residual));
                    return path
                        .iter()
                        .map(|&n| tree.units()[n])
                        .chain([fresh])
                        .collect();
                }
            }
        }
    });
}

/// Some programs draw one token per position of every *path*: a shared beginning is drawn
/// several times, and the longest match wins.
#[test]
fn drawing_per_path_instead_of_per_node() {
    assert_caught("per path", |toy, history, key| {
        let tree = ranked(toy, history, 2);
        let mut best: Vec<u32> = Vec::new();
        for (row, path) in paths(tree.parents()).into_iter().enumerate() {
            let mut tokens = Vec::new();
            for depth in 0..=path.len() {
                let p = toy.after(history, &tree, &path[..depth]).unwrap();
                let position = (history.len() + depth) as u64;
                let mut stream = Key::new(key.seed + 1 + row as u64, key.request)
                    .stream(position, Purpose::Sample);
                let y = p.sample(&mut stream);
                tokens.push(y);
                if path.get(depth).is_none_or(|&n| tree.units()[n] != y) {
                    break;
                }
            }
            if tokens.len() > best.len() {
                best = tokens;
            }
        }
        best
    });
}

#[test]
fn dropping_unlikely_drafts_after_drawing_them() {
    assert_caught("drop after draw", |toy, history, key| {
        let drafted = toy.draft_chain(history, 3, key);
        let mut tree = DraftTree::new();
        for (i, &x) in drafted.units().iter().enumerate() {
            let Some((_, Proposal::Law(q))) = drafted.node(i) else {
                unreachable!()
            };
            if q.prob(x) < 0.3 {
                break;
            }
            tree.push(i.checked_sub(1), x, Proposal::Law(q.clone()))
                .unwrap();
        }
        let draws = Draws::new(key, history.len() as u64);
        let law = |path: &[usize]| toy.after(history, &tree, path);
        let verdict = verify::chain(&tree, law, &draws, Acceptance::Exact, |_| false).unwrap();
        tokens_of(&tree, &verdict)
    });
}

#[test]
fn updating_the_draft_law_by_the_wrong_rule() {
    for (drawn, claimed) in [
        (Draw::WithoutReplacement, Draw::WithReplacement),
        (Draw::WithReplacement, Draw::WithoutReplacement),
    ] {
        assert_caught(
            &format!("{drawn:?} verified as {claimed:?}"),
            |toy, history, key| {
                let tree = two_levels(toy, history, key, 3, drawn).drawn(claimed);
                let draws = Draws::new(key, history.len() as u64);
                let verdict = verify::tree(
                    &tree,
                    |path| toy.after(history, &tree, path),
                    &draws,
                    |_| false,
                )
                .unwrap();
                tokens_of(&tree, &verdict)
            },
        );
    }
}

#[test]
fn testing_and_redrawing_with_one_uniform() {
    assert_caught("shared uniform", |toy, history, key| {
        let tree = toy.draft_chain(history, 1, key);
        let (x, p, q) = (tree.units()[0], toy.p(history), toy.q(history));
        let u = key.stream(history.len() as u64, Purpose::Accept).uniform();
        if u <= p.ratio(&q, &x) {
            vec![x]
        } else {
            vec![p.residual_law(&q).unwrap().quantile(u)]
        }
    });
}

#[test]
fn the_lossy_rule_is_lossy() {
    assert_caught("ensemble", |toy, history, key| {
        let tree = toy.draft_chain(history, 3, key);
        let draws = Draws::new(key, history.len() as u64);
        let law = |path: &[usize]| toy.after(history, &tree, path);
        let acceptance = Acceptance::Ensemble { weight: 0.8 };
        let verdict = verify::chain(&tree, law, &draws, acceptance, |_| false).unwrap();
        tokens_of(&tree, &verdict)
    });
}

#[test]
fn the_lossy_rule_with_full_weight_is_the_exact_one() {
    let toy = Toy::peaked();
    for run in 0..20_000 {
        let key = Key::new(3, run);
        let tree = toy.draft_chain(&[], 3, key);
        let draws = Draws::new(key, 0);
        let both = [Acceptance::Exact, Acceptance::Ensemble { weight: 1.0 }].map(|a| {
            verify::chain(
                &tree,
                |path| toy.after(&[], &tree, path),
                &draws,
                a,
                |_| false,
            )
            .unwrap()
        });
        assert_eq!(both[0], both[1]);
    }
}
