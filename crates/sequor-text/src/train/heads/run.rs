//! From a model and its corpus to a folder of draft heads.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use sequor_backbone::CausalLm;
use sequor_backbone::heads::{Base, Heads, HeadsConfig, HeadsKind};
use sequor_kernels::threads;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_sampling::{Layout, LogitRows, Step, TargetModel};
use sequor_train::checkpoint::Store;
use sequor_train::plot::{PlotOptions, plot};
use sequor_train::trainer::count_params;
use sequor_train::{Outcome, Progress, StepCtx, Task, Trainer, Workplace};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::accuracy::HeadAccuracy;
use super::card;
use super::data::held_out;
use super::folder;
use super::judge::Judge;
use super::recipe::HeadsRecipe;
use super::regress;
use super::task::{HELD_OUT_LOSS, HeadsTask, Lesson};
use crate::train::distill::DistillCorpus;
use crate::train::lm::{CHECKPOINTS, put, put_json};
use crate::{Error, Result};

/// Held-out positions that the final numbers come from, at most.
const MEASURED: u64 = 12_000;

/// How a training run of heads is conducted. None of it decides the result but `minutes`.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadsRun {
    /// Name of the target, for the card.
    pub base: String,
    /// Licence of the target, as an SPDX identifier; empty when unknown.
    pub licence: String,
    /// Go on after the newest checkpoint in the output folder, if there is one.
    pub resume: bool,
    /// As many updates as fit into this time on this machine, instead of the recipe's number.
    /// A run that is resumed keeps the number it began with.
    pub minutes: Option<f64>,
    /// Leave the checkpoints in the output folder when all is done.
    pub keep_checkpoints: bool,
    /// Time between checkpoints.
    pub save_every: Duration,
    /// Number of threads; the machine's cores when absent.
    pub threads: Option<usize>,
    /// The command that a person would type for this run; for the card.
    pub command: String,
}

impl Default for HeadsRun {
    fn default() -> Self {
        Self {
            base: "the model".into(),
            licence: String::new(),
            resume: false,
            minutes: None,
            keep_checkpoints: false,
            save_every: Duration::from_secs(120),
            threads: None,
            command: "sequor train heads".into(),
        }
    }
}

/// What came of a training run of heads; also written to `training/report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadsReport {
    /// Which heads.
    pub kind: HeadsKind,
    /// Name of the target.
    pub base: String,
    /// Licence of the target; empty when unknown.
    pub licence: String,
    /// The folder.
    pub folder: PathBuf,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of the weights as they are stored.
    pub bytes: u64,
    /// Size of the drafted vocabulary, where it is not the whole.
    pub draft_vocab: Option<usize>,
    /// Share of the corpus's answers that it covers.
    pub coverage: f64,
    /// Tokens of the corpus.
    pub corpus_tokens: usize,
    /// Sequences of the corpus.
    pub corpus_sequences: usize,
    /// Updates done.
    pub steps: u64,
    /// Update whose weights were kept.
    pub best_step: u64,
    /// Positions learned from, repetitions counted.
    pub positions: u64,
    /// Passes over the corpus.
    pub epochs: f64,
    /// Wall time of training in seconds, evaluations included.
    pub seconds: f64,
    /// Threads.
    pub threads: usize,
    /// The processor.
    pub processor: String,
    /// Held-out loss of the stored weights.
    pub held_out_loss: f64,
    /// Held-out accuracy of each head (of each depth for EAGLE), by the stored weights.
    pub heads: Vec<HeadAccuracy>,
    /// Held-out positions behind these numbers.
    pub measured: u64,
    /// Tokens per target pass that a chain of best guesses would give by these numbers.
    pub chain_tokens: f64,
    /// Parameters that a draft to full depth reads, as a share of those that one pass of the
    /// target reads.
    pub cost_share: f64,
}

/// Trains draft heads for `target` on the states in `corpus`, and writes their folder:
/// `heads.json`, `heads.safetensors` (bf16), `README.md`, and `training/` with `log.jsonl`,
/// `loss.png` and `report.json`. Checkpoints lie in `.checkpoints` meanwhile. The target itself
/// is never run, but for a few tokens that tell whether the corpus is its own.
///
/// The same recipe, corpus and number of threads give the same bytes, also when the run was
/// interrupted.
///
/// # Errors
/// [`Error::Cancelled`] when `cancel` became true (a checkpoint was written);
/// [`Error::Input`] for a recipe out of range or a corpus of another model;
/// [`Error::Unsupported`] for kinds that are not heads beside a decoder; errors of training
/// and disk.
pub fn train_heads(
    target: &CausalLm,
    corpus: &DistillCorpus,
    recipe: &HeadsRecipe,
    out_dir: &Path,
    run: &HeadsRun,
    progress: &mut dyn Progress,
    cancel: &AtomicBool,
) -> Result<HeadsReport> {
    recipe.validate()?;
    if run.minutes.is_some_and(|m| !(m > 0.0 && m.is_finite())) {
        return Err(Error::Input("minutes must be positive".into()));
    }
    threads::set(run.threads.unwrap_or_else(threads::default_count));
    check_corpus(target, corpus)?;
    std::fs::create_dir_all(out_dir).map_err(|e| Error::io(out_dir, e))?;
    let mut plan = Plan::new(target, corpus, recipe, run)?;
    let checkpoints = out_dir.join(CHECKPOINTS);
    if let Some(minutes) = run.minutes {
        plan.recipe.steps = match begun(&checkpoints, run.resume)? {
            Some(steps) => steps,
            None => {
                let pace = seconds_per_step(&mut plan.task()?)?;
                ((minutes * 60.0 / pace) as u64).clamp(1, 10_000_000)
            }
        };
    }
    let mut task = plan.task()?;
    progress.notice(&plan.summary(&task));
    if plan.recipe.regression && begun(&checkpoints, run.resume)?.is_none() {
        regress::begin(&task)?;
    }
    let log = out_dir.join("training").join("log.jsonl");
    let place = Workplace {
        checkpoints: checkpoints.clone(),
        log: log.clone(),
        save_every: run.save_every,
        config: plan.settings()?,
    };
    let options = plan.recipe.train_options();
    let mut trainer = Trainer::new(&mut task, options, place, run.resume, progress)?;
    let outcome = trainer.run(progress, cancel)?;
    trainer.finish_with_best()?;
    let report = plan.write(&task, &outcome, out_dir, run, progress)?;
    if !run.keep_checkpoints {
        Store::open(&checkpoints)?.remove_all()?;
    }
    Ok(report)
}

/// What is trained for whom, and on what.
struct Plan<'a> {
    target: &'a CausalLm,
    corpus: &'a DistillCorpus,
    recipe: HeadsRecipe,
    config: HeadsConfig,
    /// The drafted tokens, where they are not all.
    tokens: Option<Vec<u32>>,
    /// Share of the corpus's answers that they cover.
    coverage: f64,
}

impl<'a> Plan<'a> {
    fn new(
        target: &'a CausalLm,
        corpus: &'a DistillCorpus,
        recipe: &HeadsRecipe,
        run: &HeadsRun,
    ) -> Result<Self> {
        let all = target.config().vocab_size as usize;
        let (tokens, coverage) = if recipe.draft_vocab == 0 || recipe.draft_vocab >= all {
            (None, 1.0)
        } else {
            let (tokens, coverage) = corpus.frequent_tokens(recipe.draft_vocab);
            if tokens.is_empty() {
                return Err(Error::Input(
                    "the corpus has no answers to learn from; make a larger one".into(),
                ));
            }
            (Some(tokens), coverage)
        };
        let base = Base {
            name: run.base.clone(),
            fingerprint: target.fingerprint()?,
        };
        let mut config = HeadsConfig {
            draft_vocab_size: tokens.as_ref().map(|t| t.len() as i64),
            ..HeadsConfig::small(recipe.kind, target.config(), base)
        };
        if recipe.kind != HeadsKind::Eagle {
            config.heads = recipe.depth;
        }
        Ok(Self {
            target,
            corpus,
            recipe: recipe.clone(),
            config,
            tokens,
            coverage,
        })
    }

    /// New heads and what they learn from.
    fn task(&self) -> Result<HeadsTask<'_>> {
        let builder = ParamBuilder::init(self.recipe.seed, Kind::Float, Device::Cpu);
        let heads = Heads::new(&builder, &self.config)?;
        let lesson = Lesson {
            target: self.target,
            corpus: self.corpus,
            recipe: &self.recipe,
            judge: Judge::new(self.target, self.tokens.as_deref())?,
            held_out: held_out(self.corpus),
        };
        Ok(HeadsTask::new(lesson, heads, builder))
    }

    fn summary(&self, task: &HeadsTask<'_>) -> String {
        format!(
            "{}: {} parameters, {} drafted tokens ({:.2} % of the answers), a corpus of {} tokens, {} steps, {} thread(s)",
            self.recipe.kind.name(),
            count_params(&task.params()),
            self.config
                .draft_vocab_size
                .unwrap_or(self.config.vocab_size),
            self.coverage * 100.0,
            self.corpus.tokens(),
            self.recipe.steps,
            threads::get(),
        )
    }

    /// All that decides the result.
    fn settings(&self) -> Result<Value> {
        Ok(json!({
            "recipe": serde_json::to_value(&self.recipe).map_err(json_error)?,
            "heads": serde_json::to_value(&self.config).map_err(json_error)?,
            "corpus": {"sequences": self.corpus.sequences(), "tokens": self.corpus.tokens()},
        }))
    }

    /// Writes the folder; the file that makes it usable comes last.
    fn write(
        &self,
        task: &HeadsTask<'_>,
        outcome: &Outcome,
        out_dir: &Path,
        run: &HeadsRun,
        progress: &mut dyn Progress,
    ) -> Result<HeadsReport> {
        let params = task.params();
        folder::write_weights(out_dir, &params, self.tokens.as_deref())?;
        // The numbers are those of the rounded weights that a user gets.
        let stored = folder::read_weights(out_dir, &self.config)?;
        let (table, held_out_loss) = task.lesson().measure(&stored, MEASURED)?;
        let cpu = sequor_kernels::cpu::model_name();
        let report = HeadsReport {
            kind: self.recipe.kind,
            base: run.base.clone(),
            licence: run.licence.clone(),
            folder: out_dir.to_owned(),
            parameters: count_params(&params),
            bytes: folder::size(out_dir)?,
            draft_vocab: self.tokens.as_ref().map(Vec::len),
            coverage: self.coverage,
            corpus_tokens: self.corpus.tokens(),
            corpus_sequences: self.corpus.sequences(),
            steps: outcome.steps,
            best_step: outcome.best.map_or(outcome.steps, |b| b.step),
            positions: outcome.tokens,
            epochs: outcome.epoch,
            seconds: outcome.seconds,
            threads: threads::get(),
            processor: cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            held_out_loss,
            heads: table.heads(),
            measured: table.positions(),
            chain_tokens: table.chain(),
            cost_share: self.cost_share(count_params(&params)),
        };
        let training = out_dir.join("training");
        draw(&training, &report, progress);
        let json = serde_json::to_value(&report).map_err(json_error)?;
        put_json(&training.join("report.json"), &json)?;
        let text = card::card(&self.recipe, &report, &run.command);
        put(&out_dir.join("README.md"), text.as_bytes())?;
        let config = HeadsConfig {
            accuracies: table.by_rank(),
            ..self.config.clone()
        };
        folder::write_config(out_dir, &config)?;
        Ok(report)
    }

    /// Medusa reads the output head once for all its heads; whoever needs a token for the next
    /// reads it once per token, EAGLE its layer too.
    fn cost_share(&self, params: u64) -> f64 {
        let c = &self.config;
        let head = (c.draft_vocab_size.unwrap_or(c.vocab_size) * c.hidden_size) as f64;
        let (params, depth) = (params as f64, self.recipe.depth as f64);
        let read = match self.recipe.kind {
            HeadsKind::Medusa => params + head,
            HeadsKind::Eagle => depth * (params + head),
            _ => params + depth * head,
        };
        let width = self.target.dtype().kind().elt_size_in_bytes().max(1);
        read / (self.target.decoder().bytes_per_token() / width).max(1) as f64
    }
}

/// Refuses a corpus that another model wrote: by width, by vocabulary, and by the states after
/// the first tokens, which this model must have too (but for their number format).
pub(in crate::train) fn check_corpus(target: &CausalLm, corpus: &DistillCorpus) -> Result<()> {
    /// Tokens that are compared.
    const LOOK: usize = 24;
    /// Least mean cosine; states of other models have next to none in common.
    const ALIKE: f64 = 0.8;
    let width = target.decoder().head().input();
    if corpus.dim() != width {
        return Err(Error::Input(format!(
            "the corpus has states of width {} and the model has {width}: it was made by another model; make one with `sequor train corpus`",
            corpus.dim()
        )));
    }
    let sample = corpus.read(0)?;
    let vocab = target.config().vocab_size;
    let look = sample.tokens.len().min(LOOK).min(target.context_len());
    let tokens = sample.tokens.get(..look).unwrap_or_default();
    if let Some(bad) = sample.tokens.iter().find(|&&t| i64::from(t) >= vocab) {
        return Err(Error::Input(format!(
            "the corpus has token {bad} and the model a vocabulary of {vocab}: it was made by another model; make one with `sequor train corpus`"
        )));
    }
    if tokens.is_empty() {
        return Ok(());
    }
    let mut state = target.new_state(1)?;
    let step = Step {
        slot: 0,
        tokens,
        layout: Layout::Chain,
        logits: LogitRows::None,
        features: true,
    };
    let outputs = target.forward(&[step], &mut state)?;
    let found = outputs.into_iter().next().and_then(|o| o.features);
    let found = found.ok_or_else(|| Error::Unsupported("a model that shows no states".into()))?;
    let cosine = |a: &Tensor, b: &Tensor| -> sequor_nn::Result<f64> {
        let cosine = Tensor::f_cosine_similarity(a, b, 1, 1e-8)?;
        Ok(cosine.f_mean(Kind::Float)?.f_double_value(&[])?)
    };
    let stored = sample.features.f_narrow(0, 0, look as i64);
    let alike = cosine(&stored.map_err(sequor_nn::Error::from)?, &found)?;
    if alike.is_nan() || alike < ALIKE {
        return Err(Error::Input(format!(
            "the states in the corpus are not this model's (mean cosine {alike:.2} over {look} tokens): it was made by another model; make one with `sequor train corpus`"
        )));
    }
    Ok(())
}

/// Number of steps of a run that is to be resumed.
pub(in crate::train) fn begun(checkpoints: &Path, resume: bool) -> Result<Option<u64>> {
    if !resume || !checkpoints.is_dir() {
        return Ok(None);
    }
    let newest = Store::open(checkpoints)?.newest(&mut |_| {})?;
    Ok(newest.map(|c| c.state().schedule.steps))
}

/// Time of one step, measured on a few whose gradients are thrown away.
pub(in crate::train) fn seconds_per_step(task: &mut dyn Task) -> Result<f64> {
    const TRIALS: u64 = 4;
    let mut times = Vec::new();
    for step in 0..TRIALS {
        let start = Instant::now();
        let ctx = StepCtx {
            step,
            micro: 0,
            seed: step,
        };
        let loss = task.loss(&ctx)?;
        let params: Vec<Tensor> = task.params().into_iter().map(|p| p.tensor).collect();
        Tensor::f_run_backward(&[loss.sum], &params, false, false)
            .map_err(sequor_nn::Error::from)?;
        times.push(start.elapsed().as_secs_f64());
    }
    // The first also pays for reading the corpus and for memory.
    let rest = times.get(1..).unwrap_or_default();
    Ok((rest.iter().sum::<f64>() / rest.len().max(1) as f64).max(1e-6))
}

pub(in crate::train) fn draw(training: &Path, report: &HeadsReport, progress: &mut dyn Progress) {
    let top1 = report.heads.first().map_or(0.0, |h| h.top1 * 100.0);
    let options = PlotOptions {
        title: format!("{} heads for {}", report.kind.name(), report.base),
        subtitle: format!(
            "{:.2} M parameters, best at step {}: first guess right in {top1:.1} % of held-out positions",
            report.parameters as f64 / 1e6,
            report.best_step,
        ),
        y_label: "loss (nats per position)".into(),
        held_out: HELD_OUT_LOSS.into(),
    };
    // Too short a run has nothing to draw; that is no reason to lose its heads.
    let drawn = sequor_train::log::read(&training.join("log.jsonl"))
        .and_then(|records| plot(&records, &options, &training.join("loss.png")));
    if let Err(e) = drawn {
        progress.notice(&format!("the loss was not drawn: {e}"));
    }
}

fn json_error(e: serde_json::Error) -> Error {
    Error::Config(format!("cannot be written as JSON: {e}"))
}
