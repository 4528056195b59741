//! Cancellation, time, limits and resumption: the state is consistent after every step.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::toy::Markov;
use crate::draft::{Budget, DraftContext, DraftMode, DraftModel, Drafter, PromptLookup};
use crate::generate::{Event, Request, generate_batch};
use crate::state::SequenceState;
use crate::{
    DepthPolicy, DraftTree, Error, FinishReason, GenerationConfig, Generator, Options, Result,
    TargetModel,
};

const PROMPT: [u32; 7] = [1, 2, 3, 1, 2, 4, 1];

fn options() -> Options {
    let config = GenerationConfig {
        repetition_penalty: Some(1.1),
        ..GenerationConfig::sampling(0.9)
    };
    let mut options = Options::from(config)
        .seed(4)
        .max_new_tokens(25)
        .depth(DepthPolicy::Fixed(3));
    options.prefill_chunk = 3;
    options
}

fn draft() -> Option<Box<dyn Drafter>> {
    Some(Box::new(
        DraftModel::new(Markov::new(9, 1, 2.5, 1), DraftMode::Greedy).unwrap(),
    ))
}

#[test]
fn cancellation_at_every_step() {
    let target = Markov::new(9, 2, 2.5, 1);
    let whole = Generator::new(&target, options())
        .unwrap()
        .generate(&PROMPT, draft(), |_| ControlFlow::Continue(()));
    let whole = whole.unwrap().tokens;
    let mut steps = 0;
    loop {
        let flag = Arc::new(AtomicBool::new(false));
        let generator = Generator::new(&target, options())
            .unwrap()
            .cancelled_by(Arc::clone(&flag));
        let mut session = generator.session(&PROMPT, draft()).unwrap();
        let done = (0..steps).any(|_| matches!(session.step().unwrap(), Event::Finished(_)));
        if done {
            break;
        }
        flag.store(true, Ordering::Relaxed);
        let calls = target.calls.borrow().len();
        let finished = session.step().unwrap();
        assert_eq!(
            target.calls.borrow().len(),
            calls,
            "no forward pass after cancellation"
        );
        if !matches!(finished, Event::Finished(FinishReason::Cancelled)) {
            assert_eq!(finished, Event::Finished(FinishReason::Length));
        }
        // Nothing pending; every token but the newest committed, or the part of the
        // prompt that was taken in.
        let state = session.state();
        assert_eq!(state.pending_len(0), 0);
        let committed = state.committed(0).to_vec();
        let expected = if session.generated().is_empty() {
            PROMPT.len().min(3 * steps)
        } else {
            session.tokens().len() - 1
        };
        assert_eq!(committed, &session.tokens()[..expected]);
        assert_eq!(session.generated(), &whole[..session.generated().len()]);

        // Whoever goes on from here gets the same text.
        let so_far = session.tokens().to_vec();
        let (_, state) = session.into_parts();
        let mut rest = options();
        rest.config.max_new_tokens = Some(PROMPT.len() + 25 - so_far.len());
        let again = Generator::new(&target, rest)
            .unwrap()
            .resume(state, &so_far, draft())
            .unwrap();
        let tokens: Vec<u32> = so_far
            .iter()
            .copied()
            .chain(again.map(Result::unwrap))
            .collect();
        assert_eq!(&tokens[PROMPT.len()..], whole);
        steps += 1;
    }
    assert!(steps > 8, "{steps}");
}

#[test]
fn a_state_that_holds_too_much_is_shortened() {
    let target = Markov::new(9, 2, 2.5, 1);
    let generator = Generator::new(&target, options()).unwrap();
    let mut session = generator.session(&PROMPT, None).unwrap();
    while !matches!(session.step().unwrap(), Event::Finished(_)) {}
    let (first, state) = session.into_parts();
    let again = generator.resume(state, &PROMPT, None).unwrap();
    assert_eq!(again.map(Result::unwrap).collect::<Vec<_>>(), first.tokens);
}

#[test]
fn limits_of_length() {
    let target = Markov {
        context: 10,
        ..Markov::new(9, 2, 2.5, 1)
    };
    let unlimited = || Options::from(GenerationConfig::greedy()).depth(DepthPolicy::Fixed(6));
    let generator = Generator::new(&target, unlimited()).unwrap();
    let run = |prompt: &[u32]| {
        generator.generate(prompt, Some(Box::new(PromptLookup::default())), |_| {
            ControlFlow::Continue(())
        })
    };
    // Up to the context length, and no row beyond it (the toy asserts that).
    for len in 1..=10 {
        let prompt: Vec<u32> = (0..len).map(|i| i % 2).collect();
        let out = run(&prompt).unwrap();
        assert_eq!(
            (out.tokens.len(), out.finish),
            (10 - len as usize, FinishReason::Length)
        );
    }
    match run(&[0; 11]) {
        Err(Error::Limits {
            found: 11,
            limit: 10,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(run(&[]), Err(Error::Input { .. })));
    assert!(matches!(run(&[9]), Err(Error::Input { .. })));
    // `max_length` counts the prompt, `max_new_tokens` wins.
    let config = GenerationConfig {
        max_length: Some(6),
        ..GenerationConfig::greedy()
    };
    let out = |config: GenerationConfig| {
        let generator = Generator::new(&target, config).unwrap();
        generator
            .generate(&[1, 2], None, |_| ControlFlow::Continue(()))
            .unwrap()
            .tokens
            .len()
    };
    assert_eq!(out(config.clone()), 4);
    assert_eq!(
        out(GenerationConfig {
            max_new_tokens: Some(3),
            ..config.clone()
        }),
        3
    );
    assert_eq!(
        out(GenerationConfig {
            max_length: Some(1),
            ..config
        }),
        0
    );
}

#[test]
fn limits_of_time() {
    let target = Markov::new(9, 2, 2.5, 1);
    let config = GenerationConfig {
        max_time: Some(0.0),
        ..GenerationConfig::greedy()
    };
    let out = Generator::new(&target, config)
        .unwrap()
        .generate(&PROMPT, None, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!((out.finish, out.tokens.len()), (FinishReason::Time, 0));
    assert!(target.calls.borrow().is_empty());
    // A limit beyond what a clock can hold is no limit.
    let config = GenerationConfig {
        max_time: Some(1e300),
        max_new_tokens: Some(2),
        ..GenerationConfig::greedy()
    };
    let out = Generator::new(&target, config)
        .unwrap()
        .generate(&PROMPT, None, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(out.finish, FinishReason::Length);
}

#[test]
fn a_failing_row_leaves_the_others_alone() {
    let good = Markov::new(9, 2, 2.5, 1);
    let bad = Markov {
        poison: Some(4),
        ..good.clone()
    };
    let requests = |model: &Markov| -> Vec<Result<_>> {
        let rows = (0..8).map(|i| {
            let mut options = options().request(i);
            // Rows that cannot meet the poisoned token.
            if i % 2 == 0 {
                options.config.suppress_tokens = Some(vec![4]);
            }
            let prompt = if i % 2 == 0 {
                vec![1, i as u32 % 3]
            } else {
                vec![3, 4]
            };
            Request {
                drafter: draft(),
                ..Request::new(prompt, options)
            }
        });
        generate_batch(model, rows.collect(), None).unwrap()
    };
    for (i, (with, without)) in requests(&bad).into_iter().zip(requests(&good)).enumerate() {
        if i % 2 == 0 {
            assert_eq!(with.unwrap().tokens, without.unwrap().tokens, "row {i}");
        } else {
            let error = with.unwrap_err();
            assert!(
                matches!(error, Error::Logits { position: 2, .. }),
                "row {i}: {error}"
            );
        }
    }
    // A request that cannot begin has its error in its place.
    let rows = vec![
        Request::new(vec![], options()),
        Request::new(vec![1], options()),
    ];
    let out = generate_batch(&good, rows, None).unwrap();
    assert!(out[0].is_err() && out[1].is_ok());
    let flag = AtomicBool::new(true);
    let out = generate_batch(&good, vec![Request::new(vec![1], options())], Some(&flag)).unwrap();
    assert_eq!(out[0].as_ref().unwrap().finish, FinishReason::Cancelled);
    assert!(generate_batch(&good, vec![], None).unwrap().is_empty());
}

#[test]
fn a_failing_row_leaves_nothing_pending() {
    // The sixth token of the text is poisoned while drafts are verified.
    let clean = Markov::new(9, 2, 2.5, 1);
    let whole = Generator::new(&clean, options())
        .unwrap()
        .generate(&PROMPT, draft(), |_| ControlFlow::Continue(()));
    let poison = whole.unwrap().tokens[5];
    let target = Markov {
        poison: Some(poison),
        ..clean
    };
    let generator = Generator::new(&target, options()).unwrap();
    let mut session = generator.session(&[7, 8], draft()).unwrap();
    let error = loop {
        match session.step() {
            Ok(Event::Finished(reason)) => panic!("{reason}"),
            Ok(_) => {}
            Err(e) => break e,
        }
    };
    assert!(matches!(error, Error::Logits { .. }), "{error}");
    assert_eq!(session.state().pending_len(0), 0);
    assert_eq!(
        session.step().unwrap(),
        Event::Finished(FinishReason::Error)
    );
    assert_eq!(session.finish(), Some(FinishReason::Error));
}

/// Proposes a token that does not exist, or fails.
struct Broken(bool);

impl Drafter for Broken {
    fn name(&self) -> &str {
        "broken"
    }
    fn propose(&mut self, _: &DraftContext<'_>, _: Budget) -> Result<DraftTree> {
        if self.0 {
            Ok(DraftTree::chain([999]))
        } else {
            Err(Error::Backend("out of ideas".into()))
        }
    }
    fn reset(&mut self) {}
}

#[test]
fn a_broken_drafter_is_an_error_and_not_a_panic() {
    let target = Markov::new(9, 2, 2.5, 1);
    for kind in [true, false] {
        let generator = Generator::new(&target, options()).unwrap();
        let result = generator.generate(&PROMPT, Some(Box::new(Broken(kind))), |_| {
            ControlFlow::Continue(())
        });
        assert!(matches!(
            result,
            Err(Error::Contract { .. } | Error::Backend(_))
        ));
    }
}

/// Gives rows of the wrong size.
struct Liar(Markov, usize);

impl TargetModel for Liar {
    type State = super::toy::ToyState;
    fn vocab_size(&self) -> usize {
        self.0.vocab + self.1
    }
    fn context_len(&self) -> usize {
        self.0.context
    }
    fn new_state(&self, slots: usize) -> Result<Self::State> {
        self.0.new_state(slots)
    }
    fn forward(
        &self,
        steps: &[crate::Step<'_>],
        state: &mut Self::State,
    ) -> Result<Vec<crate::Output>> {
        let mut outputs = self.0.forward(steps, state)?;
        if self.1 == 0 {
            outputs.clear();
        }
        Ok(outputs)
    }
}

#[test]
fn a_model_that_breaks_its_contract_is_an_error() {
    for lie in [0, 1] {
        let target = Liar(Markov::new(9, 2, 2.5, 1), lie);
        let generator = Generator::new(&target, options()).unwrap();
        let mut session = generator.session(&PROMPT, None).unwrap();
        let error = std::iter::repeat_with(|| session.step())
            .find_map(Result::err)
            .unwrap();
        assert!(matches!(error, Error::Contract { .. }), "{error}");
        assert_eq!(session.state().pending_len(0), 0);
    }
}

/// Asks for features and checks that there is one row per committed token.
struct Watcher {
    seen: Vec<i64>,
    guess: DraftModel<Markov>,
}

impl Drafter for Watcher {
    fn name(&self) -> &str {
        "watcher"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let features = ctx.features.expect("features");
        self.seen
            .extend(Vec::<i64>::try_from(features.f_flatten(0, -1).unwrap()).unwrap());
        let expected: Vec<i64> = ctx.tokens[..ctx.tokens.len() - 1]
            .iter()
            .map(|&t| i64::from(t))
            .collect();
        assert_eq!(self.seen, expected);
        self.guess.propose(ctx, budget)
    }
    fn reset(&mut self) {}
    fn wants_features(&self) -> bool {
        true
    }
}

#[test]
fn features_follow_the_accepted_path() {
    let target = Markov::new(9, 2, 2.5, 1);
    let guess = DraftModel::new(target.clone(), DraftMode::Greedy).unwrap();
    let mut watcher = Watcher {
        seen: Vec::new(),
        guess,
    };
    let generator = Generator::new(&target, options()).unwrap();
    let out = generator
        .generate(&PROMPT, Some(Box::new(&mut watcher)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(out.report.accepted > 3);
    assert!(watcher.seen.len() > PROMPT.len());
}

#[test]
fn the_draft_model_keeps_in_step() {
    // Every row that the draft model takes in is taken in once, its own last draft after
    // full acceptance included.
    let target = Markov::new(9, 2, 2.5, 1);
    let mut drafter = DraftModel::new(target.clone(), DraftMode::Greedy).unwrap();
    let config = Options::from(GenerationConfig::greedy())
        .max_new_tokens(31)
        .depth(DepthPolicy::Fixed(4));
    let generator = Generator::new(&target, config).unwrap();
    let out = generator
        .generate(&PROMPT, Some(Box::new(&mut drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(
        out.report.accepted, out.report.drafted,
        "it drafts for itself"
    );
    assert_eq!(out.report.target_calls, 6);
    let rows: usize = drafter.model().calls.borrow().iter().map(|c| c.1).sum();
    // Prompt and text without the newest token and without the last draft.
    assert_eq!(rows, PROMPT.len() + 31 - 2);
    // A new sequence on the same drafter.
    drafter.reset();
    let again = generator
        .generate(&PROMPT, Some(Box::new(&mut drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(again.tokens, out.tokens);
    // Also without being told: what differs is dropped.
    let other = generator
        .generate(&[5, 5], Some(Box::new(&mut drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(other.report.accepted, other.report.drafted);
}
