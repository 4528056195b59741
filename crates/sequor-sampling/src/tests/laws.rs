//! Verifiers give the target's law: exact joint laws of four tokens against 200,000 runs.

use std::sync::Arc;

use sequor_kernels::rng::{Key, Purpose};

use super::toy::{Markov, draw_children};
use crate::draft::{Budget, DraftMode, DraftModel, Drafter};
use crate::stats::{chi_square, total_variation};
use crate::tree::{DraftTree, Draw, Proposal};
use crate::verify::{self, Acceptance, Draws};
use crate::{Categorical, DepthPolicy, GenerationConfig, Generator, Law, Options};

pub const V: usize = 5;
pub const LEN: usize = 4;
pub const RUNS: u64 = 200_000;

/// Target and draft laws for every prefix of at most three tokens.
pub struct Toy {
    p: Vec<Categorical>,
    q: Vec<Arc<Categorical>>,
}

fn prefixes() -> impl Iterator<Item = Vec<u32>> {
    (0..LEN as u32).flat_map(|len| (0..(V as u32).pow(len)).map(move |code| digits(code, len)))
}

fn digits(code: u32, len: u32) -> Vec<u32> {
    (0..len)
        .rev()
        .map(|i| code / (V as u32).pow(i) % V as u32)
        .collect()
}

fn index(prefix: &[u32]) -> usize {
    let below: usize = (0..prefix.len()).map(|l| V.pow(l as u32)).sum();
    below + prefix.iter().fold(0, |code, &t| code * V + t as usize)
}

impl Toy {
    pub fn new(p: impl Fn(&[u32]) -> Categorical, q: impl Fn(&[u32]) -> Categorical) -> Self {
        Self {
            p: prefixes().map(|prefix| p(&prefix)).collect(),
            q: prefixes().map(|prefix| Arc::new(q(&prefix))).collect(),
        }
    }

    /// Peaked laws that disagree.
    pub fn peaked() -> Self {
        let (p, q) = (Markov::new(V, 3, 1.5, 1), Markov::new(V, 3, 1.5, 2));
        Self::new(|h| p.law(h), |h| q.law(h))
    }

    pub fn p(&self, prefix: &[u32]) -> Categorical {
        self.p[index(prefix)].clone()
    }

    pub fn q(&self, prefix: &[u32]) -> Arc<Categorical> {
        Arc::clone(&self.q[index(prefix)])
    }

    /// Exact probabilities of all sequences of four tokens.
    pub fn joint(&self) -> Vec<f64> {
        let all = (0..(V as u32).pow(LEN as u32)).map(|code| digits(code, LEN as u32));
        all.map(|s| {
            (0..LEN)
                .map(|i| self.p[index(&s[..i])].prob(s[i]))
                .product()
        })
        .collect()
    }

    /// Counts sequences that `round(history, key)` builds up by any number of tokens at a
    /// time.
    pub fn count(
        &self,
        runs: u64,
        mut round: impl FnMut(&Self, &[u32], Key) -> Vec<u32>,
    ) -> Vec<u64> {
        let mut counts = vec![0; V.pow(LEN as u32)];
        for run in 0..runs {
            let key = Key::new(99, run);
            let mut history = Vec::new();
            while history.len() < LEN {
                let new = round(self, &history, key);
                assert!(!new.is_empty());
                history.extend(new);
            }
            history.truncate(LEN);
            counts[history.iter().fold(0, |code, &t| code * V + t as usize)] += 1;
        }
        counts
    }

    /// A chain of at most `depth` tokens drawn from the draft law.
    pub fn draft_chain(&self, history: &[u32], depth: usize, key: Key) -> DraftTree {
        let mut tree = DraftTree::new();
        let mut tokens = history.to_vec();
        while tree.len() < depth && tokens.len() < LEN {
            let q = self.q(&tokens);
            let token = q.sample(&mut key.stream(tokens.len() as u64, Purpose::Draft));
            tree.push(tree.len().checked_sub(1), token, Proposal::Law(q))
                .unwrap();
            tokens.push(token);
        }
        tree
    }

    /// The target's law after `path`.
    pub fn after(
        &self,
        history: &[u32],
        tree: &DraftTree,
        path: &[usize],
    ) -> crate::Result<Categorical> {
        let tokens: Vec<u32> = history
            .iter()
            .copied()
            .chain(path.iter().map(|&n| tree.units()[n]))
            .collect();
        // Beyond four tokens the law does not matter any more.
        Ok(if tokens.len() < LEN {
            self.p(&tokens)
        } else {
            self.p(&[])
        })
    }
}

pub fn tokens_of(tree: &DraftTree, verdict: &verify::Verdict<u32>) -> Vec<u32> {
    verdict
        .path
        .iter()
        .map(|&n| tree.units()[n])
        .chain(verdict.emitted)
        .collect()
}

/// Chi-square and total variation of `counts` against `probs`.
pub fn assert_law(name: &str, counts: &[u64], probs: &[f64]) {
    let test = chi_square(counts, probs);
    assert!(test.p_value > 0.001, "{name}: {test:?}");
    let runs = counts.iter().sum::<u64>() as f64;
    // The expected distance of exact sampling is about sqrt(cells / (2 pi n)).
    let noise = (probs.len() as f64 / (std::f64::consts::TAU * runs)).sqrt();
    assert!(total_variation(counts, probs) < noise + 0.005, "{name}");
}

fn chain_round(toy: &Toy, history: &[u32], key: Key, tree: &DraftTree) -> Vec<u32> {
    let draws = Draws::new(key, history.len() as u64);
    let law = |path: &[usize]| toy.after(history, tree, path);
    let verdict = verify::chain(tree, law, &draws, Acceptance::Exact, |_| false).unwrap();
    tokens_of(tree, &verdict)
}

fn tree_round(toy: &Toy, history: &[u32], key: Key, tree: &DraftTree) -> Vec<u32> {
    let draws = Draws::new(key, history.len() as u64);
    let verdict = verify::tree(
        tree,
        |path| toy.after(history, tree, path),
        &draws,
        |_| false,
    )
    .unwrap();
    tokens_of(tree, &verdict)
}

/// `law` with the tokens `zeros(prefix)` removed.
fn without(law: Categorical, zero: u32) -> Categorical {
    law.without(zero).unwrap()
}

fn pairs() -> Vec<(&'static str, Toy)> {
    let (p, q) = (Markov::new(V, 3, 1.5, 1), Markov::new(V, 3, 1.5, 2));
    let zero = |h: &[u32]| h.iter().sum::<u32>() % V as u32;
    vec![
        ("random q", Toy::peaked()),
        ("q = p", Toy::new(|h| p.law(h), |h| p.law(h))),
        (
            "q one-hot",
            Toy::new(
                |h| p.law(h),
                |h| Categorical::one_hot(q.law(h).mode().0, V).unwrap(),
            ),
        ),
        (
            "q = 0 where p > 0",
            Toy::new(|h| p.law(h), |h| without(q.law(h), zero(h))),
        ),
        (
            "p = 0 where q > 0",
            Toy::new(|h| without(p.law(h), zero(h)), |h| q.law(h)),
        ),
        (
            "disjoint",
            Toy::new(
                |h| without(without(without(p.law(h), 0), 1), 2),
                |h| without(without(q.law(h), 3), 4),
            ),
        ),
    ]
}

#[test]
fn chain_is_exact_for_every_pair_of_laws() {
    for (name, toy) in pairs() {
        // Depth 1 differs only in how rounds are cut.
        let depths: &[usize] = if name == "random q" { &[1, 3] } else { &[3] };
        for &depth in depths {
            let counts = toy.count(RUNS, |toy, history, key| {
                let tree = toy.draft_chain(history, depth, key);
                chain_round(toy, history, key, &tree)
            });
            assert_law(&format!("{name}, depth {depth}"), &counts, &toy.joint());
        }
    }
}

#[test]
fn sample_and_match_is_exact_and_equals_plain_sampling() {
    let toy = Toy::peaked();
    let mut mismatches = 0;
    let counts = toy.count(RUNS, |toy, history, key| {
        let best: Vec<u32> = {
            let mut tokens = history.to_vec();
            while tokens.len() < LEN {
                tokens.push(toy.q(&tokens).mode().0);
            }
            tokens.split_off(history.len())
        };
        let tree = DraftTree::chain(best);
        let new = chain_round(toy, history, key, &tree);
        for (i, &token) in new.iter().enumerate().take(LEN - history.len()) {
            let before: Vec<u32> = history.iter().chain(&new[..i]).copied().collect();
            let plain = toy
                .p(&before)
                .sample(&mut key.stream(before.len() as u64, Purpose::Sample));
            mismatches += usize::from(plain != token);
        }
        new
    });
    assert_eq!(mismatches, 0);
    assert_law("sample and match", &counts, &toy.joint());
}

/// A tree of two levels: `width` children of the root, `width` of the first of them.
pub fn two_levels(toy: &Toy, history: &[u32], key: Key, width: usize, draw: Draw) -> DraftTree {
    let mut tree = DraftTree::new().drawn(draw);
    let mut tokens = history.to_vec();
    let mut parent = None;
    for _ in 0..2 {
        if tokens.len() >= LEN {
            break;
        }
        let q = toy.q(&tokens);
        let mut stream = key.stream(tokens.len() as u64, Purpose::Draft);
        let first = tree.len();
        for token in draw_children(&q, width, draw, &mut stream) {
            tree.push(parent, token, Proposal::Law(Arc::clone(&q)))
                .unwrap();
        }
        parent = Some(first);
        tokens.push(tree.units()[first]);
    }
    tree
}

fn assert_multi_round(draw: Draw) {
    let toy = Toy::peaked();
    for width in 1..=4 {
        let counts = toy.count(RUNS, |toy, history, key| {
            let tree = two_levels(toy, history, key, width, draw);
            tree_round(toy, history, key, &tree)
        });
        assert_law(
            &format!("{draw:?}, {width} children"),
            &counts,
            &toy.joint(),
        );
    }
}

#[test]
fn multi_round_is_exact_with_replacement() {
    assert_multi_round(Draw::WithReplacement);
}

#[test]
fn multi_round_is_exact_without_replacement() {
    assert_multi_round(Draw::WithoutReplacement);
}

/// A tree whose children are the best `width` of the draft law.
pub fn ranked(toy: &Toy, history: &[u32], width: usize) -> DraftTree {
    let mut tree = DraftTree::new();
    let mut tokens = history.to_vec();
    let mut parent = None;
    while tokens.len() < LEN {
        let mut best: Vec<(u32, f64)> = toy.q(&tokens).iter().collect();
        best.sort_by(|a, b| b.1.total_cmp(&a.1));
        let first = tree.len();
        for &(token, _) in best.iter().take(width) {
            tree.push(parent, token, Proposal::OneHot).unwrap();
        }
        parent = Some(first);
        tokens.push(best[0].0);
    }
    tree
}

#[test]
fn sample_and_walk_is_exact() {
    let toy = Toy::peaked();
    for width in [1, 2, 4] {
        let counts = toy.count(RUNS, |toy, history, key| {
            let tree = ranked(toy, history, width);
            tree_round(toy, history, key, &tree)
        });
        assert_law(
            &format!("ranked tree, width {width}"),
            &counts,
            &toy.joint(),
        );
    }
}

#[test]
fn drawn_and_chosen_siblings_may_be_mixed() {
    let toy = Toy::peaked();
    let counts = toy.count(RUNS, |toy, history, key| {
        let mut tree = two_levels(toy, history, key, 2, Draw::WithoutReplacement);
        tree.push(None, history.len() as u32 % V as u32, Proposal::OneHot)
            .unwrap();
        tree_round(toy, history, key, &tree)
    });
    assert_law("mixed siblings", &counts, &toy.joint());
}

/// Whole generations through the loop, with processors, at three temperatures.
#[test]
fn the_loop_follows_the_processed_law() {
    let (target, guess) = (Markov::new(V, 2, 1.5, 1), Markov::new(V, 2, 1.5, 2));
    let len = 3;
    for temperature in [0.7, 1.0, 1.5] {
        let config = GenerationConfig {
            max_new_tokens: Some(len),
            ..GenerationConfig::sampling(temperature)
        };
        let law = |h: &[u32]| {
            let scores: Vec<f32> = target
                .logits(h)
                .iter()
                .map(|s| s / temperature as f32)
                .collect();
            Categorical::from_scores(scores).unwrap()
        };
        let mut probs = Vec::new();
        for code in 0..(V as u32).pow(len as u32) {
            let mut tokens = vec![1, 2];
            let mut prob = 1.0;
            for t in digits(code, len as u32) {
                prob *= law(&tokens).prob(t);
                tokens.push(t);
            }
            probs.push(prob);
        }
        for drafter in 0..3 {
            let mut counts = vec![0; probs.len()];
            let mut model = DraftModel::new(&guess, DraftMode::Sampled).unwrap();
            let mut tree = super::toy::DrawnTree {
                guess: guess.clone(),
                width: 2,
                draw: Draw::WithoutReplacement,
                heard: Vec::new(),
            };
            for run in 0..30_000 {
                let mut options = Options::from(config.clone())
                    .seed(5)
                    .request(run)
                    .depth(DepthPolicy::Fixed(2));
                options.draft_nodes = Some(4);
                let drafter: Option<Box<dyn Drafter>> = match drafter {
                    0 => None,
                    1 => Some(Box::new(&mut model)),
                    _ => Some(Box::new(&mut tree)),
                };
                let generator = Generator::new(&target, options).unwrap();
                let out = generator
                    .generate(&[1, 2], drafter, |_| std::ops::ControlFlow::Continue(()))
                    .unwrap();
                assert_eq!(out.tokens.len(), len);
                counts[out.tokens.iter().fold(0, |code, &t| code * V + t as usize)] += 1;
            }
            let test = chi_square(&counts, &probs);
            assert!(
                test.p_value > 1e-4,
                "temperature {temperature}, drafter {drafter}: {test:?}"
            );
        }
    }
}

#[test]
fn budgets_reach_the_drafter() {
    assert_eq!(Budget::chain(3), Budget { depth: 3, nodes: 3 });
}
