//! Tokens per call follow the formula.

use std::ops::ControlFlow;

use super::toy::Markov;
use crate::draft::{DraftMode, DraftModel};
use crate::{DepthPolicy, GenerationConfig, Generator, Options};

/// On a target and a draft without memory, the chance of acceptance is `a = 1 - TV(p, q)`
/// at every position, and a call gives `(1 - a^(g+1)) / (1 - a)` tokens.
#[test]
fn expected_tokens_per_call() {
    let (target, guess) = (Markov::new(8, 0, 1.0, 1), Markov::new(8, 0, 1.0, 2));
    let a = 1.0 - target.law(&[]).total_variation(&guess.law(&[]));
    assert!((0.3..0.9).contains(&a), "{a}");
    for depth in [1, 2, 4, 7] {
        let mut total = crate::Report::default();
        let (mut tested, mut accepted) = (0, 0);
        for request in 0..20 {
            let options = Options::from(GenerationConfig::sampling(1.0))
                .request(request)
                .max_new_tokens(1500)
                .depth(DepthPolicy::Fixed(depth));
            let drafter = DraftModel::new(&guess, DraftMode::Sampled).unwrap();
            let generator = Generator::new(&target, options).unwrap();
            let report = generator
                .generate(&[1], Some(Box::new(drafter)), |_| ControlFlow::Continue(()))
                .unwrap()
                .report;
            total.emitted += report.emitted - 1;
            total.target_calls += report.target_calls;
            tested += report.drafted_by_depth[0];
            accepted += report.accepted_by_depth[0];
        }
        let expected = (1.0 - a.powi(depth as i32 + 1)) / (1.0 - a);
        let found = total.emitted as f64 / total.target_calls as f64;
        assert!(
            (found / expected - 1.0).abs() < 0.02,
            "{depth}: {found}, not {expected}"
        );
        let first = accepted as f64 / tested as f64;
        assert!((first / a - 1.0).abs() < 0.02, "{first} instead of {a}");
    }
}
