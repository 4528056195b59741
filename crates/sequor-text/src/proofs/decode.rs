//! Arms that generate, and what is counted of a generation.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use sequor_eval::proof::{Metric, Proof, Recorder, Row};
use sequor_sampling::draft::Drafter;
use sequor_sampling::generate::Event;
use sequor_sampling::{
    DepthPolicy, FinishReason, GenerationConfig, Generator, Options, Report, TargetModel,
};

use super::bench::SEED;
use crate::prompts::{Encoded, before_repeat};
use crate::{Error, Result};

/// Depths whose acceptance is reported.
const DEPTHS: usize = 5;
/// Calls that plain decoding needs at least before a prompt counts: a shorter answer says
/// nothing about drafting.
const FEWEST_CALLS: f64 = 8.0;
/// Name of the arm that all others are compared with.
pub(super) const PLAIN: &str = "plain";
/// Name of the rows that compare texts.
pub(super) const EXACT: &str = "every method, f32";

/// What is asked of an arm.
#[derive(Clone, Debug)]
pub(super) struct Ask<'a> {
    pub new_tokens: usize,
    /// 0 takes the best token each time.
    pub temperature: f64,
    pub eos: &'a [u32],
    pub cancel: Arc<AtomicBool>,
}

/// One forward pass after the prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Call {
    /// Tokens that it added.
    pub added: usize,
    /// Drafts that were accepted.
    pub accepted: usize,
    pub seconds: f64,
    pub draft_seconds: f64,
}

/// One generation.
#[derive(Clone, Debug, Default)]
pub(super) struct Run {
    pub tokens: Vec<u32>,
    pub calls: Vec<Call>,
}

/// The part of a generation that counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counted {
    /// Tokens after the first one, which comes from the prompt's pass.
    pub tokens: f64,
    /// Calls; of the one that crosses into the loop the share of its tokens before it.
    pub calls: f64,
    pub seconds: f64,
    pub draft_seconds: f64,
    /// Calls whose draft was accepted at depth 1, 2, ...
    pub reached: [f64; DEPTHS],
}

impl Run {
    /// Counts what comes before the first repeated 8-gram.
    pub fn count(&self) -> Counted {
        let end = before_repeat(&self.tokens);
        let mut counted = Counted::default();
        let mut at = 1;
        for call in &self.calls {
            let inside = call.added.min(end.saturating_sub(at));
            if inside == 0 {
                break;
            }
            let share = inside as f64 / call.added as f64;
            counted.tokens += inside as f64;
            counted.calls += share;
            counted.seconds += share * call.seconds;
            counted.draft_seconds += share * call.draft_seconds;
            for reached in counted.reached.iter_mut().take(call.accepted) {
                *reached += share;
            }
            at += call.added;
        }
        counted
    }
}

/// Something that generates.
pub(super) trait Arm {
    fn name(&self) -> &str;
    /// Generates after `prompt`, which is number `request` of the run.
    fn run(&mut self, prompt: &[u32], request: u64, ask: &Ask<'_>) -> Result<Run>;
}

/// A target, and a drafter that is carried from prompt to prompt.
pub(super) struct Decode<'m, M: TargetModel> {
    name: String,
    target: Holder<'m, M>,
    drafter: Option<Box<dyn Drafter + 'm>>,
    depth: DepthPolicy,
    nodes: Option<usize>,
}

enum Holder<'m, M> {
    Borrowed(&'m M),
    Owned(Box<M>),
}

impl<'m, M: TargetModel> Decode<'m, M> {
    /// Plain decoding.
    pub fn plain(target: &'m M) -> Self {
        Self {
            name: PLAIN.to_owned(),
            target: Holder::Borrowed(target),
            drafter: None,
            depth: DepthPolicy::Fixed(0),
            nodes: None,
        }
    }

    /// Drafts of this depth and at most this many nodes.
    pub fn new(
        name: &str,
        target: &'m M,
        drafter: impl Drafter + 'm,
        (depth, nodes): (usize, usize),
    ) -> Self {
        Self {
            name: name.to_owned(),
            drafter: Some(Box::new(drafter)),
            depth: DepthPolicy::Fixed(depth),
            nodes: Some(nodes),
            ..Self::plain(target)
        }
    }

    /// As [`new`](Self::new), with a target of its own.
    pub fn owning(
        name: &str,
        target: M,
        drafter: impl Drafter + 'm,
        (depth, nodes): (usize, usize),
    ) -> Self {
        Self {
            name: name.to_owned(),
            target: Holder::Owned(Box::new(target)),
            drafter: Some(Box::new(drafter)),
            depth: DepthPolicy::Fixed(depth),
            nodes: Some(nodes),
        }
    }

    /// Lets depth and size follow what they cost on this machine.
    pub fn adaptive(mut self, depth: usize) -> Self {
        self.depth = DepthPolicy::Adaptive { max: depth };
        self.nodes = None;
        self
    }
}

impl<M: TargetModel> Arm for Decode<'_, M> {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&mut self, prompt: &[u32], request: u64, ask: &Ask<'_>) -> Result<Run> {
        let config = GenerationConfig {
            do_sample: Some(ask.temperature > 0.0),
            temperature: Some(ask.temperature),
            max_new_tokens: Some(ask.new_tokens),
            eos_token_id: Some(ask.eos.to_vec().into()),
            ..GenerationConfig::default()
        };
        let options = Options {
            depth: self.depth,
            draft_nodes: self.nodes,
            ..Options::from(config).seed(SEED).request(request)
        };
        if let Some(drafter) = &mut self.drafter {
            drafter.reset();
        }
        let target: &M = match &self.target {
            Holder::Borrowed(target) => target,
            Holder::Owned(target) => target,
        };
        let generator = Generator::new(target, options)?.cancelled_by(ask.cancel.clone());
        let drafter = self.drafter.as_mut();
        let drafter = drafter.map(|d| Box::new(&mut **d) as Box<dyn Drafter + '_>);
        let mut session = generator.session(prompt, drafter)?;
        let mut calls = Vec::new();
        let mut before = Snapshot::default();
        loop {
            let start = Instant::now();
            let event = session.step()?;
            let seconds = start.elapsed().as_secs_f64();
            match event {
                Event::Prefill { .. } => {}
                Event::Tokens(added) => {
                    let after = Snapshot::of(session.report());
                    // The first token comes from the prompt's pass.
                    if after.calls > before.calls {
                        calls.push(Call {
                            added: added.len(),
                            accepted: after.accepted.saturating_sub(before.accepted),
                            seconds,
                            draft_seconds: after.draft_seconds - before.draft_seconds,
                        });
                    }
                    before = after;
                }
                Event::Finished(FinishReason::Cancelled) => return Err(Error::Cancelled),
                Event::Finished(_) => break,
            }
        }
        Ok(Run {
            tokens: session.generated().to_vec(),
            calls,
        })
    }
}

/// The running counts of a report.
#[derive(Clone, Copy, Debug, Default)]
struct Snapshot {
    calls: usize,
    accepted: usize,
    draft_seconds: f64,
}

impl Snapshot {
    fn of(report: &Report) -> Self {
        Self {
            calls: report.target_calls,
            accepted: report.accepted,
            draft_seconds: report.draft_seconds,
        }
    }
}

/// The metrics of decoding.
pub(super) fn metrics(proof: Proof) -> Proof {
    let mut proof = proof
        .metric(Metric::new(
            "tokens_per_call",
            "tokens",
            "tokens per call of the target, before the first repeated 8-gram",
        ))
        .metric(Metric::new(
            "speedup",
            "",
            "tokens per second over plain decoding",
        ))
        .metric(Metric::new("tokens", "tokens", "tokens that count"))
        .metric(Metric::new("calls", "", "calls of the target for them").lower_is_better())
        .metric(Metric::new("seconds", "s", "time for them").lower_is_better())
        .metric(Metric::new("draft_us", "us", "drafting time per call").lower_is_better())
        .metric(
            Metric::new("draft_share", "", "share of the time spent drafting").lower_is_better(),
        );
    for depth in 1..=DEPTHS {
        proof = proof.metric(Metric::new(
            &format!("accepted_{depth}"),
            "",
            &format!("share of calls with a draft accepted at depth {depth}"),
        ));
    }
    proof
        .metric(Metric::new(
            "equal",
            "",
            "1 where the text is that of plain decoding",
        ))
        .plot("tokens_per_call")
        .plot("speedup")
}

/// The row of a run on a prompt, beside plain decoding's on the same prompt. `None` when
/// nothing of the run counts.
pub(super) fn row(name: &str, prompt: &Encoded, run: &Run, plain: &Counted) -> Option<Row> {
    let counted = run.count();
    if counted.calls <= 0.0 || plain.tokens <= 0.0 {
        return None;
    }
    let per_token = |c: &Counted| c.seconds / c.tokens;
    let mut row = Row::new(name, &prompt.id)
        .group(&prompt.kind)
        .value("tokens_per_call", counted.tokens / counted.calls)
        .value("speedup", per_token(plain) / per_token(&counted))
        .value("tokens", counted.tokens)
        .value("calls", counted.calls)
        .value("seconds", counted.seconds)
        .value("draft_us", 1e6 * counted.draft_seconds / counted.calls)
        .value("draft_share", counted.draft_seconds / counted.seconds);
    if name != PLAIN {
        for (depth, reached) in (1..).zip(counted.reached) {
            row = row.value(&format!("accepted_{depth}"), reached / counted.calls);
        }
    }
    Some(row)
}

/// Whether a prompt's answer is long enough to say something.
pub(super) fn counts(plain: &Counted) -> bool {
    plain.calls >= FEWEST_CALLS
}

/// Runs all `arms`, the first of which is plain decoding, over `prompts`, one prompt after
/// the other; the order of the others changes from prompt to prompt. `suffix` is added to
/// their names.
pub(super) fn sweep(
    recorder: &mut Recorder,
    arms: &mut [Box<dyn Arm + '_>],
    prompts: &[Encoded],
    ask: &Ask<'_>,
    suffix: &str,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut skipped = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        let Some((plain, others)) = arms.split_first_mut() else {
            return Ok(());
        };
        let reference = plain.run(&prompt.tokens, i as u64, ask)?;
        let counted = reference.count();
        if !counts(&counted) {
            skipped += 1;
            continue;
        }
        let mut rows: Vec<Option<Row>> = vec![row(plain.name(), prompt, &reference, &counted)];
        let n = others.len();
        let mut runs: Vec<(usize, Run)> = Vec::with_capacity(n);
        for turn in 0..n {
            let at = (turn + i) % n;
            if let Some(arm) = others.get_mut(at) {
                runs.push((at, arm.run(&prompt.tokens, i as u64, ask)?));
            }
        }
        runs.sort_by_key(|(at, _)| *at);
        for (arm, (_, run)) in others.iter().zip(&runs) {
            rows.push(row(arm.name(), prompt, run, &counted));
        }
        // A prompt counts for all arms or for none.
        match rows.into_iter().collect::<Option<Vec<Row>>>() {
            Some(rows) => {
                for mut row in rows {
                    row.arm.push_str(suffix);
                    recorder.push(row)?;
                }
            }
            None => skipped += 1,
        }
        say(&format!("prompt {} of {}{suffix}", i + 1, prompts.len()));
    }
    if skipped > 0 {
        recorder.note(format!(
            "{skipped} prompts{suffix} were left out: their answers are too short before they repeat themselves"
        ));
    }
    Ok(())
}

/// Compares the text of every arm with that of the first, plain decoding: rows of the arm
/// [`EXACT`]. Meant for f32, where equality is promised.
pub(super) fn compare(
    recorder: &mut Recorder,
    arms: &mut [Box<dyn Arm + '_>],
    prompts: &[Encoded],
    ask: &Ask<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    for (i, prompt) in prompts.iter().enumerate() {
        let Some((plain, others)) = arms.split_first_mut() else {
            return Ok(());
        };
        let reference = plain.run(&prompt.tokens, i as u64, ask)?;
        for arm in others {
            let run = arm.run(&prompt.tokens, i as u64, ask)?;
            let equal = run.tokens == reference.tokens;
            if !equal {
                let at = run
                    .tokens
                    .iter()
                    .zip(&reference.tokens)
                    .position(|(a, b)| a != b);
                let at = at.unwrap_or(run.tokens.len().min(reference.tokens.len()));
                recorder.note(format!(
                    "in f32 the text of {} on prompt {} differs from plain decoding's at token {at}",
                    arm.name(),
                    prompt.id
                ));
            }
            let unit = format!("{}: {}", arm.name(), prompt.id);
            let value = f64::from(u8::from(equal));
            recorder.push(
                Row::new(EXACT, unit)
                    .group(&prompt.kind)
                    .value("equal", value),
            )?;
        }
        say(&format!("f32: prompt {} of {}", i + 1, prompts.len()));
    }
    Ok(())
}
