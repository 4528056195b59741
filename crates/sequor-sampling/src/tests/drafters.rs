//! Drafters under sampling: exact joint laws, and how Jacobi and lookahead work.

use std::ops::ControlFlow;

use sequor_kernels::rng::Key;

use super::laws::{LEN, RUNS, Toy, V, assert_law, tokens_of};
use super::toy::{Grown, Markov};
use crate::draft::{
    Budget, Copying, DraftContext, DraftMode, DraftModel, Drafter, Feedback, Jacobi, Joined,
    Lookahead, LookaheadOptions, TreeSearch, Trigram, TrigramOptions,
};
use crate::generate::{Event, Request, generate_batch};
use crate::state::SequenceState;
use crate::verify::{self, Draws};
use crate::{
    DepthPolicy, Error, FinishReason, GenerationConfig, Generator, Options, StaticTree, Topology,
};

/// The token in front of the four whose law is tested.
const START: u32 = 2;

/// One round of `drafter` on the toy, feedback included.
fn round(
    toy: &Toy,
    drafter: &mut dyn Drafter,
    history: &[u32],
    key: Key,
    budget: Budget,
) -> Vec<u32> {
    let tokens: Vec<u32> = [&[START], history].concat();
    let ctx = DraftContext {
        tokens: &tokens,
        prompt_len: 1,
        max_length: 1 + LEN,
        eos: &[],
        key,
        features: None,
    };
    let depth = budget.depth.min(LEN - history.len());
    let tree = drafter
        .propose(&ctx, Budget { depth, ..budget })
        .unwrap()
        .cut(depth, budget.nodes);
    let draws = Draws::new(key, history.len() as u64);
    let law = |path: &[usize]| toy.after(history, &tree, path);
    let verdict = verify::tree(&tree, law, &draws, |_| false).unwrap();
    let added = tokens_of(&tree, &verdict);
    let best = |path: Vec<usize>| toy.after(history, &tree, &path).unwrap().mode().0;
    let best: Option<Vec<u32>> = drafter.wants_best().then(|| {
        let nodes = (0..tree.len()).map(|n| best(crate::tree::path_to(tree.parents(), n)));
        std::iter::once(best(vec![])).chain(nodes).collect()
    });
    drafter.observe(&Feedback {
        tree: &tree,
        path: &verdict.path,
        added: &added,
        best: best.as_deref(),
    });
    added
}

fn small_lookahead() -> Lookahead {
    let options = LookaheadOptions {
        window: 2,
        ngram: 3,
        pool: 2,
        pool_from_text: true,
    };
    Lookahead::new(options).unwrap()
}

fn small_trigram() -> Trigram {
    let search = TreeSearch {
        iterations: 10,
        ..TreeSearch::default()
    };
    let options = TrigramOptions {
        search: Some(search),
        ..TrigramOptions::default()
    };
    Trigram::new(options).unwrap()
}

fn grown(topology: Topology) -> Grown {
    Grown {
        guess: Markov::new(V, 1, 1.5, 2),
        topology,
    }
}

/// Copies beside a tree of guesses.
fn joined() -> Box<dyn Drafter> {
    let tree = grown(Topology::Dynamic { top_k: 3 });
    Box::new(Joined::new(Copying::default(), tree).unwrap())
}

/// The drafters live through all runs: what they learn must not bias what they check.
#[test]
fn every_drafter_follows_the_law() {
    let shape = StaticTree::search(&vec![vec![0.5, 0.2, 0.1]; 3], 12);
    let budget = |depth, nodes| Budget { depth, nodes };
    let drafters: Vec<(Box<dyn Drafter>, Budget)> = vec![
        (Box::new(small_trigram()), budget(4, 12)),
        (Box::new(Jacobi::new(3).unwrap()), budget(3, 3)),
        (Box::new(small_lookahead()), budget(4, 10)),
        (Box::new(grown(Topology::Static(shape))), budget(3, 9)),
        (
            Box::new(grown(Topology::Dynamic { top_k: 2 })),
            budget(3, 6),
        ),
        (joined(), budget(3, 9)),
    ];
    let toy = Toy::peaked();
    for (mut drafter, budget) in drafters {
        let mut accepted = 0;
        let counts = toy.count(RUNS, |toy, history, key| {
            let added = round(toy, drafter.as_mut(), history, key, budget);
            accepted += added.len() - 1;
            added
        });
        assert_law(drafter.name(), &counts, &toy.joint());
        assert!(
            accepted > RUNS as usize / 3,
            "{}: {accepted}",
            drafter.name()
        );
    }
}

#[test]
fn jacobi_reaches_its_fixed_point() {
    let target = Markov::new(30, 2, 2.0, 1);
    let options = Options::from(GenerationConfig::greedy())
        .max_new_tokens(120)
        .depth(DepthPolicy::Fixed(8));
    let generator = Generator::new(&target, options).unwrap();
    let mut jacobi = Jacobi::new(8).unwrap();
    let mut run = || {
        let drafter: Box<dyn Drafter + '_> = Box::new(&mut jacobi);
        generator
            .generate(&[1, 2], Some(drafter), |_| ControlFlow::Continue(()))
            .unwrap()
    };
    let first = run();
    assert!(first.report.accepted > 0);
    // On a second run it is another sequence: guesses of the first are not taken up.
    assert_eq!(run().tokens, first.tokens);
    // A guess moves up when plain steps come between.
    let tokens = [5, 6, 7, 8];
    let ctx = |tokens| DraftContext {
        tokens,
        prompt_len: 1,
        max_length: 99,
        eos: &[],
        key: Key::new(1, 1),
        features: None,
    };
    let mut jacobi = Jacobi::new(3).unwrap();
    let tree = jacobi
        .propose(&ctx(&tokens[..2]), Budget::chain(3))
        .unwrap();
    let best = [7, 20, 21, 22];
    jacobi.observe(&Feedback {
        tree: &tree,
        path: &[],
        added: &[7],
        best: Some(&best),
    });
    let next = jacobi
        .propose(&ctx(&tokens[..3]), Budget::chain(3))
        .unwrap();
    assert_eq!(next.units(), [20, 21, 22]);
    let later = jacobi.propose(&ctx(&tokens), Budget::chain(2)).unwrap();
    assert_eq!(later.units(), [21, 22]);
    let other = jacobi
        .propose(&ctx(&[1, 1, 1, 1, 1]), Budget::chain(2))
        .unwrap();
    assert_eq!(other.units(), [1, 1]);
    jacobi.reset();
    assert!(
        jacobi
            .propose(&ctx(&[]), Budget::chain(2))
            .unwrap()
            .is_empty()
    );
    assert!(Jacobi::new(0).is_err() && Jacobi::new(257).is_err());
}

#[test]
fn lookahead_finds_ngrams_in_its_window() {
    // The rows say: what follows token t is t + 1, in a circle of eight.
    let options = LookaheadOptions {
        window: 3,
        ngram: 3,
        pool: 2,
        pool_from_text: false,
    };
    let mut drafter = Lookahead::new(options).unwrap();
    let after = |t: u32| (t + 1) % 8;
    let mut tokens = vec![4, 1, 2, 3];
    let mut drafts = Vec::new();
    for _ in 0..24 {
        let ctx = DraftContext {
            tokens: &tokens,
            prompt_len: 4,
            max_length: 99,
            eos: &[],
            key: Key::new(1, 1),
            features: None,
        };
        let budget = Budget {
            depth: options.depth(),
            nodes: options.nodes(),
        };
        let tree = drafter.propose(&ctx, budget).unwrap();
        assert!(
            (6..=10).contains(&tree.len()),
            "three columns of two, at most two n-grams"
        );
        assert!(tree.depths().into_iter().max().unwrap() < options.depth());
        let newest = *tokens.last().unwrap();
        let best: Vec<u32> = std::iter::once(newest)
            .chain(tree.units().iter().copied())
            .map(after)
            .collect();
        let mut path: Vec<usize> = Vec::new();
        let mut added = vec![after(newest)];
        while let Some(child) = tree
            .children(path.last().copied())
            .find(|&c| tree.units()[c] == added[added.len() - 1])
        {
            path.push(child);
            added.push(after(added[added.len() - 1]));
        }
        drafter.observe(&Feedback {
            tree: &tree,
            path: &path,
            added: &added,
            best: Some(&best),
        });
        drafts.push(path.len());
        tokens.extend(added);
    }
    assert!(drafts.iter().sum::<usize>() > 24, "{drafts:?}");
    // Too little room for a column: nothing but the pool.
    let ctx = DraftContext {
        tokens: &[200],
        prompt_len: 1,
        max_length: 99,
        eos: &[],
        key: Key::new(1, 1),
        features: None,
    };
    assert!(drafter.propose(&ctx, Budget::chain(1)).unwrap().is_empty());
    assert!(
        drafter
            .propose(&ctx, Budget { depth: 0, nodes: 0 })
            .unwrap()
            .is_empty()
    );
    for bad in [
        LookaheadOptions {
            window: 0,
            ..options
        },
        LookaheadOptions {
            ngram: 1,
            ..options
        },
        LookaheadOptions {
            pool: 65,
            ..options
        },
    ] {
        assert!(Lookahead::new(bad).is_err());
    }
}

fn fresh(kind: usize) -> Box<dyn Drafter> {
    match kind {
        0 => Box::new(small_trigram()),
        1 => Box::new(Jacobi::new(4).unwrap()),
        2 => Box::new(small_lookahead()),
        3 => joined(),
        _ => Box::new(Grown {
            guess: Markov::new(9, 2, 2.5, 1),
            topology: Topology::Dynamic { top_k: 3 },
        }),
    }
}

#[test]
fn budgets_and_limits_of_trees() {
    let target = Markov {
        context: 30,
        ..Markov::new(9, 2, 2.5, 1)
    };
    let plain = Generator::new(&target, Options::from(GenerationConfig::sampling(0.8))).unwrap();
    let plain = plain
        .generate(&[1, 2], None, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(plain.tokens.len(), 28);
    for kind in 0..5 {
        for nodes in [0, 1, 5, 10_000] {
            // Deeper than the context is long; the toy asserts that no row is beyond it.
            let options = Options::from(GenerationConfig::sampling(0.8))
                .depth(DepthPolicy::Fixed(40))
                .draft_nodes(nodes);
            let generator = Generator::new(&target, options).unwrap();
            let out = generator
                .generate(&[1, 2], Some(fresh(kind)), |_| ControlFlow::Continue(()))
                .unwrap();
            assert_eq!(out.tokens, plain.tokens, "drafter {kind}, {nodes} nodes");
            assert_eq!(out.report.drafted == 0, nodes == 0);
        }
    }
}

#[test]
fn cancelled_at_every_step() {
    let target = Markov::new(9, 2, 2.5, 1);
    let options = Options::from(GenerationConfig::sampling(0.8))
        .max_new_tokens(20)
        .depth(DepthPolicy::Fixed(4))
        .draft_nodes(9);
    for kind in 0..5 {
        let generator = Generator::new(&target, options.clone()).unwrap();
        let whole = generator
            .generate(&[1, 2, 3], Some(fresh(kind)), |_| ControlFlow::Continue(()))
            .unwrap();
        for steps in 1.. {
            let mut session = generator.session(&[1, 2, 3], Some(fresh(kind))).unwrap();
            let over = (0..steps).any(|_| matches!(session.step().unwrap(), Event::Finished(_)));
            session.end(FinishReason::Cancelled);
            assert_eq!(session.state().pending_len(0), 0);
            let tokens = session.tokens();
            assert_eq!(session.state().committed(0), &tokens[..tokens.len() - 1]);
            assert_eq!(
                session.generated(),
                &whole.tokens[..session.generated().len()]
            );
            if over {
                break;
            }
        }
    }
}

#[test]
fn rows_that_are_not_numbers() {
    let good = Markov::new(9, 2, 2.5, 1);
    let bad = Markov {
        poison: Some(4),
        ..good.clone()
    };
    for kind in 0..5 {
        // The fifth is a draft model that breaks by itself.
        let make = |i: u64| -> Box<dyn Drafter> {
            match kind {
                4 if i % 2 == 1 => {
                    Box::new(DraftModel::new(bad.clone(), DraftMode::Sampled).unwrap())
                }
                4 => Box::new(DraftModel::new(good.clone(), DraftMode::Sampled).unwrap()),
                _ => fresh(kind),
            }
        };
        let target = if kind == 4 { &good } else { &bad };
        let requests = |target: &Markov| {
            let rows = (0..8_u64).map(|i| {
                let mut options = Options::from(GenerationConfig::sampling(0.9))
                    .max_new_tokens(25)
                    .request(i)
                    .depth(DepthPolicy::Fixed(3))
                    .draft_nodes(8);
                let prompt = if i % 2 == 0 {
                    options.config.suppress_tokens = Some(vec![4]);
                    vec![1, i as u32 % 3]
                } else {
                    vec![3, 4]
                };
                Request {
                    drafter: Some(make(i)),
                    ..Request::new(prompt, options)
                }
            });
            generate_batch(target, rows.collect(), None).unwrap()
        };
        let without = requests(&good);
        for (i, (with, without)) in requests(target).into_iter().zip(without).enumerate() {
            if i % 2 == 0 {
                assert_eq!(
                    with.unwrap().tokens,
                    without.unwrap().tokens,
                    "drafter {kind}, row {i}"
                );
            } else {
                let error = with.unwrap_err();
                assert!(
                    matches!(error, Error::Logits { .. }),
                    "drafter {kind}, row {i}: {error}"
                );
            }
        }
    }
}
