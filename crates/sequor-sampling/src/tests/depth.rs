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
