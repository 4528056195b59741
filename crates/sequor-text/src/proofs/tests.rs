//! Counting, and a whole proof on the small bundled model.

use super::decode::{Arm, Ask, Call, Decode, PLAIN, Run, compare, metrics, sweep};
use super::*;
use crate::TextPipeline;
use crate::prompts::Encoded;
use sequor_eval::proof::{Claim, Proof, Recorder, Setup, Verdict};
use sequor_sampling::PromptLookup;
use std::path::Path;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/bible-lm")
}

#[test]
fn only_what_comes_before_a_loop_counts() {
    let call = |added| Call {
        added,
        accepted: added - 1,
        seconds: 1.0,
        draft_seconds: 0.25,
    };
    // One token from the prompt, then 2 + 4 + 4; nothing repeats.
    let run = Run {
        tokens: (0..11).collect(),
        calls: vec![call(2), call(4), call(4)],
    };
    let counted = run.count();
    assert_eq!(
        (counted.tokens, counted.calls, counted.seconds),
        (10.0, 3.0, 3.0)
    );
    assert_eq!(counted.draft_seconds, 0.75);
    assert_eq!(counted.reached, [3.0, 2.0, 2.0, 0.0, 0.0]);
    // From token 13 on it repeats: of the last call 2 of 4 tokens count.
    let looped = Run {
        tokens: (0..10).chain((0..20).map(|i| 100 + i % 3)).collect(),
        calls: vec![call(4), call(4), call(4), call(4)],
    };
    let counted = looped.count();
    assert_eq!((counted.tokens, counted.calls), (12.0, 3.0));
    let longer = Run {
        calls: vec![call(4), call(4), call(8), call(4)],
        ..looped
    };
    let counted = longer.count();
    assert_eq!((counted.tokens, counted.calls), (12.0, 2.5));
    assert_eq!(Run::default().count().calls, 0.0);
}

#[test]
fn systems_without_a_proof_are_usage_errors_that_name_the_others() {
    for system in [0, 1, 52] {
        let error = check(system).unwrap_err();
        assert!(error.is_usage());
        for built in BUILT {
            assert!(error.to_string().contains(&built.to_string()), "{error}");
        }
    }
    assert!(check(23).is_ok());
}

#[test]
fn arms_run_interleaved_and_texts_are_equal() {
    let pipeline = TextPipeline::load(&model(), &LoadOptions::default()).unwrap();
    let model = pipeline.model();
    let prompts: Vec<Encoded> = [
        "In the beginning",
        "And Jesus said to",
        "Blessed are those",
        "The king of",
        "You shall not",
    ]
    .into_iter()
    .map(|text| Encoded {
        id: text.to_owned(),
        kind: "bible".to_owned(),
        tokens: pipeline.encode(text).unwrap(),
        cut: 0,
    })
    .collect();
    let ask = Ask {
        new_tokens: 40,
        temperature: 0.0,
        eos: pipeline.eos(),
        cancel: Arc::default(),
    };
    let mut arms: Vec<Box<dyn Arm>> = vec![
        Box::new(Decode::plain(model)),
        Box::new(Decode::new(
            "lookup",
            model,
            PromptLookup::default(),
            (4, 4),
        )),
    ];
    let proof = metrics(Proof::new(15, "t", "p"))
        .claim(Claim::level("tokens_per_call", PLAIN).always(1.0))
        .claim(Claim::ratio("tokens_per_call", "lookup", PLAIN).at_least(1.0))
        .claim(Claim::level("equal", decode::EXACT).always(1.0));
    let mut recorder = Recorder::start(proof, Setup::default()).unwrap();
    sweep(&mut recorder, &mut arms, &prompts, &ask, "", &mut |_| {}).unwrap();
    compare(&mut recorder, &mut arms, &prompts[..2], &ask, &mut |_| {}).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let outcome = recorder.finish(dir.path()).unwrap();
    for claim in &outcome.result.claims {
        assert_eq!(claim.verdict, Verdict::Holds, "{claim:?}");
    }
    assert!(outcome.png.is_some());
    // Cancelled before the first token.
    ask.cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(
        arms[1].run(&prompts[0].tokens, 0, &ask),
        Err(Error::Cancelled)
    ));
}

#[test]
fn missing_heads_are_named_with_the_command_that_makes_them() {
    let dir = tempfile::tempdir().unwrap();
    let options = ReproduceOptions {
        quick: true,
        out: dir.path().to_path_buf(),
        model: model().display().to_string(),
        prompts: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("prompts.jsonl")),
        offline: true,
        ..ReproduceOptions::default()
    };
    for (system, kind) in [(19, "medusa"), (23, "medusa"), (27, "router")] {
        let error = reproduce(system, &options, &mut |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("--kind {kind}")), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
