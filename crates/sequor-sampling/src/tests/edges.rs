//! Rows and laws at the edges.

use std::ops::ControlFlow;
use std::sync::Arc;

use sequor_kernels::rng::{Key, Purpose};

use super::toy::Markov;
use crate::distribution::best_score;
use crate::error::LogitsProblem;
use crate::tree::{DraftTree, Proposal};
use crate::verify::{self, Acceptance, Draws, speculative_sampling};
use crate::{Categorical, Error, GenerationConfig, Generator, Law, Options};

const INF: f32 = f32::INFINITY;

#[test]
fn rows_without_a_distribution() {
    let cases: [(&[f32], LogitsProblem); 6] = [
        (&[], LogitsProblem::Empty),
        (&[1.0, f32::NAN, 2.0], LogitsProblem::NotANumber),
        (&[f32::NAN; 3], LogitsProblem::NotANumber),
        (&[1.0, INF], LogitsProblem::Infinite),
        (&[-INF, -INF], LogitsProblem::AllRemoved),
        (&[f32::NAN, INF], LogitsProblem::NotANumber),
    ];
    for (row, expected) in cases {
        let found = Categorical::from_scores(row).unwrap_err();
        assert!(
            matches!(found, Error::Logits { problem, .. } if problem == expected),
            "{row:?}: {found}"
        );
        let found = best_score(row).unwrap_err();
        assert!(
            matches!(found, Error::Logits { problem, .. } if problem == expected),
            "{row:?}: {found}"
        );
    }
}

#[test]
fn one_token_and_equal_tokens() {
    let one = Categorical::from_scores([3.5]).unwrap();
    assert_eq!(
        (one.mode(), one.entropy(), one.quantile(0.999_999)),
        ((0, 1.0), 0.0, 0)
    );
    let equal = Categorical::from_scores([0.0; 4]).unwrap();
    assert!((equal.entropy() - 4_f64.ln()).abs() < 1e-6);
    assert_eq!(
        [0.0, 0.24, 0.26, 0.51, 0.76, 1.0 - f64::EPSILON].map(|u| equal.quantile(u)),
        [0, 0, 1, 2, 3, 3]
    );
    assert_eq!(equal.mode().0, 0);
    // A whole generation over a vocabulary of one.
    let target = Markov::new(1, 1, 1.0, 1);
    let config = GenerationConfig {
        max_new_tokens: Some(5),
        top_k: Some(3),
        top_p: Some(0.5),
        ..GenerationConfig::sampling(0.7)
    };
    let out = Generator::new(&target, config)
        .unwrap()
        .generate(&[0], None, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(out.tokens, [0; 5]);
}

#[test]
fn removed_tokens_are_never_drawn() {
    // Sparse and dense storage.
    for vocab in [4_usize, 400] {
        let mut scores = vec![-INF; vocab];
        scores[1] = 0.0;
        scores[3] = 0.0;
        let law = Categorical::from_scores(scores).unwrap();
        for u in [0.0, 0.499_999, 0.5, 0.999_999_999, 1.0 - f64::EPSILON] {
            assert!([1, 3].contains(&law.quantile(u)));
        }
        assert_eq!(
            (law.prob(0), law.prob(2), law.prob(vocab as u32 + 9)),
            (0.0, 0.0, 0.0)
        );
        assert!((law.prob(1) - 0.5).abs() < 1e-7);
        assert_eq!(law.to_probs().len(), vocab);
        assert_eq!(law.vocab(), vocab);
        assert_eq!(law.quantile(f64::NAN), 1, "never a panic");
    }
}

#[test]
fn storage_does_not_change_a_law() {
    let target = Markov::new(200, 1, 2.0, 3);
    let mut scores = target.logits(&[5]);
    sequor_kernels::select::keep_top_k(&mut scores, 20, 1);
    let sparse = Categorical::from_scores(scores.as_slice()).unwrap();
    let weights = scores.iter().map(|s| s.exp()).collect();
    let dense = Categorical::from_weights(weights).unwrap();
    for token in 0..200 {
        assert!((sparse.prob(token) - dense.prob(token)).abs() < 1e-6);
    }
    assert!((sparse.entropy() - dense.entropy()).abs() < 1e-5);
    assert!(sparse.total_variation(&dense) < 1e-6);
    for i in 0..1000 {
        let u = f64::from(i) / 1000.0 + 0.000_37;
        assert_eq!(sparse.quantile(u), dense.quantile(u));
    }
}

#[test]
fn laws_from_weights() {
    assert!(Categorical::from_weights(vec![]).is_err());
    assert!(Categorical::from_weights(vec![0.0, 0.0]).is_err());
    assert!(Categorical::from_weights(vec![1.0, -1.0]).is_err());
    assert!(Categorical::from_weights(vec![1.0, f32::NAN]).is_err());
    assert!(Categorical::one_hot(3, 3).is_err());
    let law = Categorical::from_weights(vec![1.0, 3.0]).unwrap();
    assert_eq!((law.prob(0), law.prob(1)), (0.25, 0.75));
    assert!(law.residual_law(&law).is_none());
    let only = Categorical::one_hot(1, 3).unwrap();
    assert!(only.without(1).is_none());
    // Equal laws cannot be rejected; if it happened all the same, the target is drawn.
    let mut stream = Key::new(1, 2).stream(3, Purpose::Residual);
    assert_eq!(only.residual(&only, &mut stream).unwrap(), 1);
}

/// Verifies one drafted token with many random numbers; gives how often it was accepted
/// and whether the emitted tokens were possible.
fn accepted(p: &Categorical, q: &Categorical, token: u32) -> usize {
    let mut tree = DraftTree::new();
    tree.push(None, token, Proposal::Law(Arc::new(q.clone())))
        .unwrap();
    let mut count = 0;
    for run in 0..2000 {
        let draws = Draws::new(Key::new(8, run), 0);
        let by_chain = verify::chain(
            &tree,
            |_| Ok(p.clone()),
            &draws,
            Acceptance::Exact,
            |_| false,
        )
        .unwrap();
        let by_tree = verify::tree(&tree, |_| Ok(p.clone()), &draws, |_| false).unwrap();
        assert_eq!(by_chain, by_tree);
        assert!(p.prob(by_chain.emitted.unwrap()) > 0.0);
        count += by_chain.path.len();
    }
    count
}

#[test]
fn zero_probabilities() {
    let law = |weights: [f32; 3]| Categorical::from_weights(weights.to_vec()).unwrap();
    let (p, q) = (law([0.5, 0.5, 0.0]), law([0.5, 0.0, 0.5]));
    assert_eq!(accepted(&p, &p, 0), 2000, "identical laws accept all");
    assert_eq!(
        accepted(&p, &q, 2),
        0,
        "what the target cannot say is rejected"
    );
    assert_eq!(
        accepted(&p, &q, 1),
        2000,
        "a draft that the draft law denies, but the target allows"
    );
    assert_eq!(
        accepted(&law([1.0, 1.0, 0.0]), &law([0.0, 0.0, 1.0]), 2),
        0,
        "disjoint laws reject all"
    );
    // Nobody allows it: neither division by zero nor acceptance.
    assert_eq!(accepted(&law([0.5, 0.5, 0.0]), &law([1.0, 0.0, 0.0]), 2), 0);
    // The uniform number zero accepts anything possible and nothing impossible.
    assert!(Acceptance::Exact.accepts(1e-300, 0.0));
    assert!(!Acceptance::Exact.accepts(0.0, 0.0));
    assert!(Acceptance::Exact.accepts(f64::INFINITY, 1.0 - f64::EPSILON));
}

#[test]
fn one_hot_drafts_at_the_edges() {
    let p = Categorical::from_weights(vec![0.0, 1.0]).unwrap();
    for (token, accepts) in [(0, false), (1, true)] {
        let tree = DraftTree::chain([token]);
        for run in 0..100 {
            let draws = Draws::new(Key::new(1, run), 0);
            let verdict = verify::chain(
                &tree,
                |_| Ok(p.clone()),
                &draws,
                Acceptance::Exact,
                |_| false,
            )
            .unwrap();
            assert_eq!(
                (verdict.path.len() == 1, verdict.emitted),
                (accepts, Some(1))
            );
        }
    }
}

#[test]
fn an_end_inside_the_path_ends_it() {
    let p = Categorical::one_hot(2, 4).unwrap();
    let tree = DraftTree::chain([2, 2, 2]);
    let draws = Draws::new(Key::new(1, 1), 0);
    let mut asked = Vec::new();
    let verdict = verify::chain(
        &tree,
        |path| {
            asked.push(path.len());
            Ok(p.clone())
        },
        &draws,
        Acceptance::Exact,
        |&t| t == 2,
    )
    .unwrap();
    assert_eq!(
        (verdict.path, verdict.emitted, verdict.rejected),
        (vec![0], None, false)
    );
    assert_eq!(asked, [0], "rows that are not reached are not processed");
    let greedy = verify::greedy(&tree, |_| Ok(2), |&t| t == 2).unwrap();
    assert_eq!((greedy.path, greedy.emitted), (vec![0], None));
}

#[test]
fn hugging_face_form_checks_lengths() {
    let p = Categorical::one_hot(0, 2).unwrap();
    let one = std::slice::from_ref(&p);
    let two = [p.clone(), p.clone()];
    assert!(speculative_sampling(&[0], one, &two, &[0.5], 0.5, Acceptance::Exact).is_ok());
    assert!(speculative_sampling(&[0], one, one, &[0.5], 0.5, Acceptance::Exact).is_err());
    assert!(speculative_sampling(&[0], &[], &two, &[0.5], 0.5, Acceptance::Exact).is_err());
    assert!(speculative_sampling(&[0], one, &two, &[], 0.5, Acceptance::Exact).is_err());
    assert_eq!(
        speculative_sampling(&[], &[], one, &[], 0.5, Acceptance::Exact)
            .unwrap()
            .tokens,
        [0]
    );
}

#[test]
fn options_are_checked_before_anything_runs() {
    let target = Markov::new(4, 1, 1.0, 1);
    let refused = |change: fn(&mut Options)| {
        let mut options = Options::from(GenerationConfig::sampling(1.0));
        change(&mut options);
        Generator::new(&target, options).unwrap_err().to_string()
    };
    assert!(refused(|o| o.prefill_chunk = 0).contains("prefill_chunk"));
    assert!(refused(|o| o.depth = crate::DepthPolicy::Fixed(10_000)).contains("depth"));
    assert!(refused(|o| o.stop_token_ids = vec![4]).contains("stop_token_ids"));
    assert!(refused(|o| o.acceptance = Acceptance::Ensemble { weight: 1.5 }).contains("weight"));
    assert!(
        refused(|o| o.mirostat = Some(crate::mirostat::MirostatConfig {
            tau: -1.0,
            ..Default::default()
        }))
        .contains("tau")
    );
    assert!(
        refused(|o| {
            o.mirostat = Some(Default::default());
            o.config.temperature = Some(0.0);
        })
        .contains("Mirostat")
    );
    // Guidance without a second branch is said, not ignored.
    let config = GenerationConfig {
        guidance_scale: Some(2.0),
        ..GenerationConfig::greedy()
    };
    assert!(matches!(
        Generator::new(&target, config),
        Err(Error::Unsupported(_))
    ));
}

#[test]
fn options_can_be_written_down() {
    let mut options = Options::from(GenerationConfig {
        top_k: Some(7),
        ..GenerationConfig::sampling(0.5)
    })
    .seed(3);
    options.processors = Some(crate::ProcessorList::from_config(&options.config).unwrap());
    options.mirostat = Some(Default::default());
    let json = serde_json::to_string(&options).unwrap();
    let back: Options = serde_json::from_str(&json).unwrap();
    assert_eq!(serde_json::to_string(&back).unwrap(), json);
    // Everything has a default.
    assert_eq!(
        serde_json::from_str::<Options>("{}").unwrap().prefill_chunk,
        512
    );
}
