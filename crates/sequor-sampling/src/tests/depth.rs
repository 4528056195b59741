//! The depth policy pays where it can and hardly costs where it cannot.

use std::ops::ControlFlow;

use sequor_kernels::cost::CostCurve;

use super::toy::Markov;
use crate::draft::{Budget, DraftContext, DraftMode, DraftModel, Drafter};
use crate::{DepthPolicy, DraftTree, Generation, GenerationConfig, Generator, Options, Result};

const V: usize = 40;

/// Seconds per pass far above those of the toy itself, so that its own time does not
/// matter.
fn curve(price_of_row: f64) -> CostCurve {
    CostCurve::new(vec![1, 65], vec![1.0, 1.0 + 64.0 * price_of_row]).unwrap()
}

fn target(price_of_row: f64) -> Markov {
    Markov {
        curve: Some(curve(price_of_row)),
        ..Markov::new(V, 2, 2.0, 1)
    }
}

/// Is right with a given chance.
struct Oracle {
    truth: Markov,
    every: usize,
    calls: usize,
}

impl Drafter for Oracle {
    fn name(&self) -> &str {
        "oracle"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let mut tokens = ctx.tokens.to_vec();
        for _ in 0..budget.depth {
            self.calls += 1;
            let (best, _) = self.truth.law(&tokens).mode();
            let right = self.every > 0 && !self.calls.is_multiple_of(self.every);
            tokens.push(if right { best } else { (best + 1) % V as u32 });
        }
        Ok(DraftTree::chain(tokens.split_off(ctx.tokens.len())))
    }
    fn reset(&mut self) {}
}

fn run(price_of_row: f64, every: usize, depth: DepthPolicy, tokens: usize) -> Generation {
    let target = target(price_of_row);
    let oracle = Oracle {
        truth: target.clone(),
        every,
        calls: 0,
    };
    let options = Options::from(GenerationConfig::greedy())
        .max_new_tokens(tokens)
        .depth(depth);
    let generator = Generator::new(&target, options).unwrap();
    let out = generator
        .generate(&[1, 2], Some(Box::new(oracle)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    let plain = generator
        .generate(&[1, 2], None, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(out.tokens, plain.tokens);
    out
}

/// Price of the decoding calls by the curve, in plain steps per token.
fn price_per_token(out: &Generation, price_of_row: f64) -> f64 {
    let rows = out.report.drafted + out.report.target_calls;
    let price =
        out.report.target_calls as f64 + price_of_row * (rows - out.report.target_calls) as f64;
    price / (out.report.emitted - 1) as f64
}

#[test]
fn auto_loses_at_most_three_percent() {
    for tokens in [120, 400, 2000] {
        for (price, every) in [
            (1.0, 1),
            (1.0, 2),
            (1.0, 0),
            (0.3, 1),
            (0.02, 1),
            (3.0, 1),
            (0.9, 3),
        ] {
            let out = run(price, every, DepthPolicy::Auto { max: 8 }, tokens);
            let loss = price_per_token(&out, price) - 1.0;
            assert!(
                loss < 0.03,
                "price {price}, right but every {every}, {tokens} tokens: {loss}"
            );
        }
    }
}

/// An oracle that promises much, and is always wrong.
struct Promises(Oracle);

impl Drafter for Promises {
    fn name(&self) -> &str {
        "promises"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        self.0
            .propose(ctx, Budget::chain(budget.depth.min(budget.nodes)))
    }
    fn reset(&mut self) {}
    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        Some((1..=8).map(|depth| 0.9_f64.powi(depth)).collect())
    }
}

#[test]
fn promises_that_are_never_kept_cost_two_percent_and_three_steps() {
    for tokens in [120, 400, 2000] {
        for price in [0.02, 0.3, 1.0, 3.0] {
            let target = target(price);
            let truth = target.clone();
            let wrong = Promises(Oracle {
                truth,
                every: 0,
                calls: 0,
            });
            let options = Options::from(GenerationConfig::greedy())
                .max_new_tokens(tokens)
                .depth(DepthPolicy::Auto { max: 8 });
            let generator = Generator::new(&target, options).unwrap();
            let go_on = |_| ControlFlow::Continue(());
            let out = generator
                .generate(&[1, 2], Some(Box::new(wrong)), go_on)
                .unwrap();
            let lost = (price_per_token(&out, price) - 1.0) * (out.report.emitted - 1) as f64;
            let allowed = 0.02 * tokens as f64 + 3.0;
            // The time of the proposals themselves is next to nothing beside these passes.
            assert!(lost <= allowed + 0.1, "{price}, {tokens}: {lost}");
            assert!(out.report.drafted > 0 || price > 2.0, "{}", out.report);
        }
    }
}

#[test]
fn auto_drafts_where_it_pays() {
    // Nine in ten right and rows almost free.
    let out = run(0.02, 10, DepthPolicy::Auto { max: 8 }, 500);
    assert!(price_per_token(&out, 0.02) < 0.3, "{}", out.report);
    assert_eq!(out.report.switched_off, 0);
    // The histogram names the depths.
    assert!(out.report.depth_histogram.iter().skip(4).sum::<usize>() > out.report.rounds / 2);
    // Rows that cost a full pass never pay.
    let out = run(1.0, 10, DepthPolicy::Auto { max: 8 }, 500);
    assert!(out.report.switched_off > 400, "{}", out.report);
}

#[test]
fn named_policies_always_draft() {
    for (policy, depth) in [
        (DepthPolicy::Adaptive { max: 8 }, 1),
        (DepthPolicy::Fixed(3), 3),
    ] {
        let out = run(1.0, 0, policy, 100);
        assert_eq!(
            out.report.rounds,
            out.report.target_calls - 1,
            "all but the last, which has no room"
        );
        assert!(out.report.depth_histogram[depth] > 80);
    }
}

/// Wrong in the first half of the text, right in the second.
#[test]
fn auto_notices_that_drafts_became_good() {
    struct Late(Oracle, usize);
    impl Drafter for Late {
        fn name(&self) -> &str {
            "late"
        }
        fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
            self.0.every = if ctx.tokens.len() < self.1 {
                0
            } else {
                usize::MAX
            };
            self.0.propose(ctx, budget)
        }
        fn reset(&mut self) {}
    }
    let target = target(0.05);
    let drafter = Late(
        Oracle {
            truth: target.clone(),
            every: 0,
            calls: 0,
        },
        500,
    );
    let options = Options::from(GenerationConfig::greedy()).max_new_tokens(1000);
    let generator = Generator::new(&target, options).unwrap();
    let out = generator
        .generate(&[1, 2], Some(Box::new(drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    let calls = out.report.target_calls;
    assert!((500..700).contains(&calls), "{}", out.report);
}

#[test]
fn random_drafts_keep_a_fixed_depth() {
    let target = target(1.0);
    let drafter = DraftModel::new(Markov::new(V, 1, 2.0, 3), DraftMode::Sampled).unwrap();
    let options = Options::from(GenerationConfig::sampling(1.0))
        .max_new_tokens(50)
        .depth(DepthPolicy::Auto { max: 3 });
    let generator = Generator::new(&target, options).unwrap();
    let out = generator
        .generate(&[1, 2], Some(Box::new(drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    // Otherwise a measurement could change the output.
    assert_eq!(out.report.switched_off, 0);
    assert_eq!(
        out.report.depth_histogram[3],
        out.report.depth_histogram.iter().sum::<usize>() - tail(&out)
    );
}

/// Rounds near the end, where there is less room.
fn tail(out: &Generation) -> usize {
    out.report.depth_histogram[..3].iter().sum()
}

/// A drafter of static trees whose ranks are right as often as it says.
fn run_tree(price_of_row: f64, depth: DepthPolicy, tokens: usize) -> Generation {
    let target = target(price_of_row);
    let ranks: Vec<f64> = (1..6).map(|r| 0.5 / f64::from(r * r)).collect();
    let drafter = super::toy::Grown {
        guess: Markov::new(V, 2, 2.0, 1),
        topology: crate::Topology::Static(crate::StaticTree::search(&vec![ranks; 4], 64)),
    };
    let options = Options::from(GenerationConfig::sampling(1.0))
        .max_new_tokens(tokens)
        .depth(depth);
    let generator = Generator::new(&target, options).unwrap();
    let go = |drafter: Option<Box<dyn Drafter>>| {
        generator
            .generate(&[1, 2], drafter, |_| ControlFlow::Continue(()))
            .unwrap()
    };
    let out = go(Some(Box::new(drafter)));
    assert_eq!(out.tokens, go(None).tokens);
    out
}

#[test]
fn the_number_of_nodes_follows_the_price_of_rows() {
    let per_round = |out: &Generation| out.report.drafted as f64 / out.report.rounds.max(1) as f64;
    let policy = DepthPolicy::Auto { max: 4 };
    let free = run_tree(0.001, policy, 400);
    let cheap = run_tree(0.05, policy, 400);
    let dear = run_tree(2.0, policy, 400);
    assert!(per_round(&free) > 40.0, "{}", per_round(&free));
    assert!(
        (3.0..40.0).contains(&per_round(&cheap)),
        "{}",
        per_round(&cheap)
    );
    assert!(price_per_token(&free, 0.001) < 0.6 && price_per_token(&cheap, 0.05) < 0.9);
    assert!(dear.report.switched_off > 350, "{}", dear.report);
    assert!(price_per_token(&dear, 2.0) < 1.03);
    // Named policies always draft, but no more than pays.
    let fixed = run_tree(2.0, DepthPolicy::Fixed(4), 100);
    assert_eq!(
        (fixed.report.switched_off, per_round(&fixed).round()),
        (0, 1.0)
    );
    // A number that is given is kept.
    let target = target(2.0);
    let guess = Markov::new(V, 2, 2.0, 1);
    let topology = crate::Topology::Dynamic { top_k: 4 };
    let options = Options::from(GenerationConfig::greedy())
        .max_new_tokens(60)
        .depth(DepthPolicy::Fixed(4))
        .draft_nodes(7);
    let drafter = super::toy::Grown { guess, topology };
    let generator = Generator::new(&target, options).unwrap();
    let out = generator
        .generate(&[1, 2], Some(Box::new(drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(out.report.forward_by_rows.last().unwrap().rows, 8);
}

#[test]
fn what_a_run_cost_is_in_its_report() {
    let out = run_tree(0.05, DepthPolicy::Auto { max: 4 }, 200);
    let report = &out.report;
    let passes: usize = report.forward_by_rows.iter().map(|cost| cost.passes).sum();
    assert_eq!(passes, report.target_calls);
    assert!(report.forward_by_rows.is_sorted_by(|a, b| a.rows < b.rows));
    let seconds: f64 = report
        .forward_by_rows
        .iter()
        .map(|c| c.seconds * c.passes as f64)
        .sum();
    assert!((seconds / report.verify_seconds - 1.0).abs() < 1e-6);
    // The curve says one second per plain step.
    assert_eq!(report.plain_seconds(), Some(199.0));
    assert!(report.speedup().unwrap() > 1.0 && report.lossy.is_none());
    assert_eq!(
        report.rounds_by_accepted.iter().sum::<usize>(),
        report.rounds
    );
    let accepted = report
        .rounds_by_accepted
        .iter()
        .enumerate()
        .map(|(n, rounds)| n * rounds);
    assert_eq!(accepted.sum::<usize>(), report.accepted);
}
