//! System 27, FiRST: are layers that routers choose from the prompt better than layers
//! chosen otherwise, at the same number?
//!
//! The text is what the full model says to prompts that nothing was trained on; each arm's
//! loss on it is the cross-entropy with its layers left out, given the prompt (all layers
//! run on the prompt). Time per token is that of a generation of its own.

use std::collections::BTreeMap;
use std::time::Instant;

use sequor_backbone::CausalLm;
use sequor_backbone::heads::HeadsKind;
use sequor_backbone::routers::{
    LayerSelection, Policy, Prefill, RoutedLm, RouterFolder, load_adapted,
};
use sequor_eval::proof::{Claim, Metric, Outcome, Proof, Recorder, Row};
use sequor_sampling::generate::Event;
use sequor_sampling::{
    FinishReason, GenerationConfig, Generator, Layout, LogitRows, Options, SequenceState, Step,
    TargetModel,
};

use super::bench::{Bench, SEED};
use super::decode::PLAIN;
use super::heads::find;
use crate::prompts::{Encoded, before_repeat};
use crate::{Error, Result};

const FIRST: &str = "FiRST";
const FIXED: &str = "best fixed";
const EVEN: &str = "evenly spaced";
const RANDOM: &str = "random";
/// Added to the names of arms after the second phase of training.
const LORA: &str = " + LoRA";
/// Arms whose rows compare the layers that two prompts got.
const WITHIN: &str = "prompts of one kind";
const BETWEEN: &str = "prompts of different kinds";
/// Random choices.
const SEEDS: u64 = 5;
/// Tokens of the text at least.
const SHORTEST: usize = 8;
/// Tokens that are timed.
const TIMED: usize = 24;

fn proof() -> Proof {
    let lora = |arm: &str| format!("{arm}{LORA}");
    let loss = |a: &str, b: &str| Claim::ratio("loss", a, b).below(1.0);
    Proof::new(
        27,
        "FiRST: routers choose the layers from the prompt",
        "Jain et al., \"FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction\", EMNLP Findings 2025",
    )
    .metric(Metric::new("loss", "nats", "cross-entropy of the full model's text").lower_is_better())
    .metric(Metric::new("time", "", "time per token over that of all layers").lower_is_better())
    .metric(Metric::new("seconds", "s", "seconds per token").lower_is_better())
    .metric(Metric::new("layers", "", "layers that run").lower_is_better())
    .metric(Metric::new("agreement", "", "share of tokens that are the full model's best"))
    .metric(Metric::new("distance", "layers", "layers on which two prompts differ"))
    .plot("loss")
    .plot("time")
    .claim(loss(FIRST, EVEN).text("Chosen by routers, layers lose less than evenly spaced ones (same number, before LoRA)").paper("better than other layer-selection strategies"))
    .claim(loss(FIRST, RANDOM).text("They lose less than random ones (same number, before LoRA)").paper("better than other layer-selection strategies"))
    .claim(loss(FIRST, FIXED).text("They lose less than the best layers that ignore the prompt (same number, before LoRA)").paper("input adaptivity is critical"))
    .claim(loss(&lora(FIRST), &lora(EVEN)).text("They lose less than evenly spaced ones after LoRA").paper("better than other layer-selection strategies"))
    .claim(loss(&lora(FIRST), FIRST).text("LoRA repairs part of the loss"))
    .claim(Claim::ratio("loss", lora(FIRST), PLAIN).at_most(1.03).text("After LoRA the loss is within 3 % of the full model's").paper("competitive with the full model"))
    .claim(Claim::level("time", FIRST).median().below(1.0).text("A token takes less time than with all layers").paper("significantly lower latency (10 to 20 % at 15 to 25 % of the layers left out)"))
    .claim(Claim::difference("distance", BETWEEN, WITHIN).text("Prompts of different kinds get more different layers than prompts of one kind"))
}

/// One choice of layers on one model.
struct Choice {
    arm: String,
    repeat: usize,
    selection: LayerSelection,
    adapted: bool,
}

fn choices(keep: usize, folder: &RouterFolder) -> Result<Vec<Choice>> {
    let routed = LayerSelection::Routed(Policy {
        keep: Some(keep),
        ..folder.config.policy()
    });
    let fixed = LayerSelection::Fixed(folder.config.static_best(keep)?);
    let even = LayerSelection::EvenlySpaced(keep);
    let choice = |arm: &str, repeat: usize, selection: &LayerSelection, adapted: bool| Choice {
        arm: format!("{arm}{}", if adapted { LORA } else { "" }),
        repeat,
        selection: selection.clone(),
        adapted,
    };
    let mut all = vec![choice(PLAIN, 0, &LayerSelection::All, false)];
    for adapted in [false, true] {
        if adapted && folder.adapter().is_none() {
            continue;
        }
        all.push(choice(FIRST, 0, &routed, adapted));
        all.push(choice(FIXED, 0, &fixed, adapted));
        all.push(choice(EVEN, 0, &even, adapted));
    }
    for seed in 0..SEEDS {
        let selection = LayerSelection::Random { keep, seed };
        all.push(choice(RANDOM, seed as usize, &selection, false));
    }
    Ok(all)
}

pub(super) fn run(bench: &mut Bench<'_>, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let (name, path) = find(bench, HeadsKind::Router, say)?;
    let folders = BTreeMap::from([(name, path.clone())]);
    let folder = RouterFolder::open(&path)?;
    let base = bench.pipeline.model();
    folder.check(base)?;
    let load = &bench.options.load;
    let adapted = match folder.adapter() {
        Some(adapter) => Some(load_adapted(
            &bench.model_path,
            adapter,
            load.weights,
            load.device,
        )?),
        None => None,
    };
    let layers = base.config().layers;
    let keep = ((folder.config.kept * layers as f64).round() as usize).clamp(3, layers);
    let mut setup = bench.setup(&folders, say)?;
    setup.seeds.extend(0..SEEDS);
    let mut recorder = Recorder::start(proof(), setup)?;
    recorder.setting("layers", layers);
    recorder.setting("layers_kept", keep);
    if adapted.is_none() {
        recorder.note("the folder of routers has no adapter: nothing is known of LoRA");
    }
    let texts = texts(bench, base, say)?;
    if texts.len() < bench.prompts.len() {
        recorder.note(format!(
            "{} prompts were left out: their answers are too short before they repeat themselves",
            bench.prompts.len() - texts.len()
        ));
    }
    let choices = choices(keep, &folder)?;
    let mut models = Vec::new();
    for c in &choices {
        let model = match (&adapted, c.adapted) {
            (Some(adapted), true) => adapted,
            _ => base,
        };
        let routers =
            matches!(c.selection, LayerSelection::Routed(_)).then(|| RouterFolder::open(&path));
        let routers = routers.transpose()?.map(|f| f.routers);
        models.push(RoutedLm::new(model, routers, &c.selection, Prefill::Full)?);
    }
    // The layers that the routers chose for each text.
    let mut chosen: Vec<Vec<usize>> = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let mut full = f64::NAN;
        for (c, model) in choices.iter().zip(&models) {
            bench.check_cancelled()?;
            let scored = score(model, text)?;
            // All choices of one size cost the same: one random one is enough.
            let timed = c.repeat == 0;
            let seconds = timed.then(|| time(bench, model, &text.prompt.tokens));
            let seconds = seconds.transpose()?;
            if c.arm == PLAIN {
                full = seconds.unwrap_or(f64::NAN);
            }
            if c.arm == FIRST {
                chosen.push(scored.layers.clone());
            }
            recorder.push(
                Row::new(&c.arm, &text.prompt.id)
                    .group(&text.prompt.kind)
                    .repeat(c.repeat)
                    .value("loss", scored.loss)
                    .value("agreement", scored.agreement)
                    .value("layers", scored.layers.len() as f64)
                    .maybe("seconds", seconds)
                    .maybe("time", seconds.map(|s| s / full)),
            )?;
        }
        say(&format!("prompt {} of {}", i + 1, texts.len()));
    }
    for (text, layers) in texts.iter().zip(&chosen) {
        for (arm, same) in [(WITHIN, true), (BETWEEN, false)] {
            let others = texts.iter().zip(&chosen).filter(|(t, _)| {
                t.prompt.id != text.prompt.id && (t.prompt.kind == text.prompt.kind) == same
            });
            let differences: Vec<f64> = others.map(|(_, l)| differing(layers, l)).collect();
            if !differences.is_empty() {
                let mean = differences.iter().sum::<f64>() / differences.len() as f64;
                let row = Row::new(arm, &text.prompt.id).group(&text.prompt.kind);
                recorder.push(row.value("distance", mean))?;
            }
        }
    }
    Ok(recorder.finish(&bench.options.out)?)
}

/// Layers that are in one list and not in the other.
fn differing(a: &[usize], b: &[usize]) -> f64 {
    let alone = |a: &[usize], b: &[usize]| a.iter().filter(|l| !b.contains(l)).count();
    (alone(a, b) + alone(b, a)) as f64
}

/// A prompt with what the full model says to it.
struct Text<'p> {
    prompt: &'p Encoded,
    answer: Vec<u32>,
}

fn texts<'b>(
    bench: &'b Bench<'_>,
    model: &CausalLm,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Text<'b>>> {
    let config = GenerationConfig {
        do_sample: Some(false),
        max_new_tokens: Some(bench.size.new_tokens),
        eos_token_id: Some(bench.pipeline.eos().to_vec().into()),
        ..GenerationConfig::default()
    };
    let options = Options::from(config).seed(SEED);
    let generator = Generator::new(model, options)?.cancelled_by(bench.options.cancel.clone());
    let mut texts = Vec::new();
    for (i, prompt) in bench.prompts.iter().enumerate() {
        let mut session = generator.session(&prompt.tokens, None)?;
        loop {
            match session.step()? {
                Event::Finished(FinishReason::Cancelled) => return Err(Error::Cancelled),
                Event::Finished(_) => break,
                _ => {}
            }
        }
        let mut answer = session.generated().to_vec();
        answer.truncate(before_repeat(&answer));
        if answer.len() >= SHORTEST {
            texts.push(Text { prompt, answer });
        }
        say(&format!("text {} of {}", i + 1, bench.prompts.len()));
    }
    Ok(texts)
}

/// What a model with chosen layers thinks of a text.
struct Scored {
    /// Mean negative log-likelihood in nats.
    loss: f64,
    /// Share of the tokens that it would have said itself.
    agreement: f64,
    layers: Vec<usize>,
}

/// Scores an answer but for its first token, which comes from the prompt's pass.
fn score(model: &RoutedLm<'_>, text: &Text<'_>) -> Result<Scored> {
    let mut state = model.new_state(1)?;
    let mut pass = |tokens: &[u32], logits: LogitRows| -> Result<_> {
        let step = Step {
            slot: 0,
            tokens,
            layout: Layout::Chain,
            logits,
            features: false,
        };
        let output = model.forward(&[step], &mut state)?.pop();
        let rows: Vec<usize> = (0..tokens.len()).collect();
        state.commit(0, &rows)?;
        Ok((output, state.layers(0)))
    };
    pass(&text.prompt.tokens, LogitRows::Last)?;
    let given = text.answer.split_last().map(|(_, given)| given);
    let (output, layers) = pass(given.unwrap_or_default(), LogitRows::All)?;
    let (mut nats, mut hits, mut n) = (0.0, 0.0, 0.0);
    for (i, &token) in text.answer.iter().skip(1).enumerate() {
        let row = output
            .as_ref()
            .and_then(|o| o.logits.row(i))
            .unwrap_or_default();
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let said = row.get(token as usize).copied().unwrap_or(f32::NAN);
        let sum: f64 = row.iter().map(|&x| f64::from(x - best).exp()).sum();
        nats += sum.ln() - f64::from(said - best);
        hits += f64::from(u8::from(said == best));
        n += 1.0;
    }
    Ok(Scored {
        loss: nats / n,
        agreement: hits / n,
        layers: layers.unwrap_or_default(),
    })
}

/// Median time of a token after `prompt`.
fn time(bench: &Bench<'_>, model: &RoutedLm<'_>, prompt: &[u32]) -> Result<f64> {
    let config = GenerationConfig {
        do_sample: Some(false),
        max_new_tokens: Some(TIMED + 1),
        ..GenerationConfig::default()
    };
    let options = Options {
        ignore_eos: true,
        ..Options::from(config)
    };
    let generator = Generator::new(model, options)?.cancelled_by(bench.options.cancel.clone());
    let mut session = generator.session(prompt, None)?;
    let mut times = Vec::with_capacity(TIMED);
    loop {
        let begun = !session.generated().is_empty();
        let start = Instant::now();
        match session.step()? {
            Event::Tokens(_) if begun => times.push(start.elapsed().as_secs_f64()),
            Event::Finished(FinishReason::Cancelled) => return Err(Error::Cancelled),
            Event::Finished(_) => break,
            _ => {}
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(f64::NAN))
}
