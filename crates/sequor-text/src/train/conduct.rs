//! What all training runs of heads, maps and routers have in common: how they are conducted,
//! how long they are, and what is told of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use sequor_backbone::CausalLm;
use sequor_backbone::heads::{Base, HeadsKind};
use sequor_kernels::threads;
use sequor_nn::{Kind, Tensor};
use sequor_sampling::{Layout, LogitRows, Step, TargetModel};
use sequor_train::checkpoint::Store;
use sequor_train::plot::{PlotOptions, plot};
use sequor_train::{Outcome, Progress, StepCtx, Task, TrainOptions, Trainer, Workplace};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::distill::DistillCorpus;
use super::heads::{HELD_OUT_LOSS, HeadAccuracy, TOP1, Table};
use super::lm::{CHECKPOINTS, put, put_json, to_json};
use crate::{Error, Result};

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

impl HeadsRun {
    /// Checks the run, sets the number of threads and makes the folder.
    pub(super) fn begin(&self, out_dir: &Path) -> Result<()> {
        if self.minutes.is_some_and(|m| !(m > 0.0 && m.is_finite())) {
            return Err(Error::Input("minutes must be positive".into()));
        }
        threads::set(self.threads.unwrap_or_else(threads::default_count));
        std::fs::create_dir_all(out_dir).map_err(|e| Error::io(out_dir, e))
    }

    /// Number of steps that a run which is to be resumed from `checkpoints` began with.
    pub(super) fn begun(&self, checkpoints: &Path) -> Result<Option<u64>> {
        if !self.resume || !checkpoints.is_dir() {
            return Ok(None);
        }
        let newest = Store::open(checkpoints)?.newest(&mut |_| {})?;
        Ok(newest.map(|c| c.state().schedule.steps))
    }

    /// Number of steps: `recipe`'s, or as many as fit into `share` of the time at the pace of
    /// `seconds_per_step`.
    pub(super) fn steps(
        &self,
        checkpoints: &Path,
        recipe: u64,
        share: f64,
        seconds_per_step: impl FnOnce() -> Result<f64>,
    ) -> Result<u64> {
        let Some(minutes) = self.minutes else {
            return Ok(recipe);
        };
        Ok(match self.begun(checkpoints)? {
            Some(steps) => steps,
            None => {
                let fit = share * minutes * 60.0 / seconds_per_step()?;
                (fit as u64).clamp(1, 10_000_000)
            }
        })
    }

    /// Trains `task`, ending with its best weights, in `out_dir`. `settings` is all that
    /// decides the result.
    pub(super) fn train<T: Task>(
        &self,
        task: &mut T,
        options: TrainOptions,
        out_dir: &Path,
        settings: Value,
        progress: &mut dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Outcome> {
        let place = Workplace {
            checkpoints: out_dir.join(CHECKPOINTS),
            log: out_dir.join("training").join("log.jsonl"),
            save_every: self.save_every,
            config: settings,
        };
        let mut trainer = Trainer::new(task, options, place, self.resume, progress)?;
        let outcome = trainer.run(progress, cancel)?;
        trainer.finish_with_best()?;
        Ok(outcome)
    }

    /// Removes the checkpoints in these folders, unless they are to be kept.
    pub(super) fn clear(&self, checkpoints: &[PathBuf]) -> Result<()> {
        if !self.keep_checkpoints {
            for folder in checkpoints {
                Store::open(folder)?.remove_all()?;
            }
        }
        Ok(())
    }
}

/// The drafted tokens, where they are not all, and the share of the corpus's answers that
/// they cover.
pub(super) struct Drafted {
    pub tokens: Option<Vec<u32>>,
    pub coverage: f64,
}

impl Drafted {
    /// The `size` most frequent tokens of the corpus's answers; 0 for all of `target`'s.
    pub fn choose(target: &CausalLm, corpus: &DistillCorpus, size: usize) -> Result<Self> {
        let all = target.config().vocab_size as usize;
        if size == 0 || size >= all {
            return Ok(Self {
                tokens: None,
                coverage: 1.0,
            });
        }
        let (tokens, coverage) = corpus.frequent_tokens(size);
        if tokens.is_empty() {
            return Err(Error::Input(
                "the corpus has no answers to learn from; make a larger one".into(),
            ));
        }
        Ok(Self {
            tokens: Some(tokens),
            coverage,
        })
    }

    /// Their number, where they are not all.
    pub fn size(&self) -> Option<usize> {
        self.tokens.as_ref().map(Vec::len)
    }

    /// One line about a run of `steps` steps.
    pub fn summary(
        &self,
        what: &str,
        parameters: u64,
        target: &CausalLm,
        corpus: &DistillCorpus,
        steps: u64,
    ) -> String {
        format!(
            "{what}: {parameters} parameters, {} drafted tokens ({:.2} % of the answers), a corpus of {} tokens, {steps} steps, {} thread(s)",
            self.size().unwrap_or(target.config().vocab_size as usize),
            self.coverage * 100.0,
            corpus.tokens(),
            threads::get(),
        )
    }
}

/// The model that something is trained for.
pub(super) fn base(run: &HeadsRun, target: &CausalLm) -> Result<Base> {
    Ok(Base {
        name: run.base.clone(),
        fingerprint: target.fingerprint()?,
    })
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
    /// The folder; not written down.
    #[serde(skip)]
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

/// What a report is made from.
pub(super) struct Told<'a> {
    pub kind: HeadsKind,
    pub run: &'a HeadsRun,
    pub out_dir: &'a Path,
    pub corpus: &'a DistillCorpus,
    pub drafted: &'a Drafted,
    pub outcome: &'a Outcome,
    /// Held-out loss and accuracies of the stored weights.
    pub held_out: (&'a Table, f64),
    pub parameters: u64,
    pub bytes: u64,
    pub cost_share: f64,
}

impl Told<'_> {
    pub fn report(self) -> HeadsReport {
        let (table, held_out_loss) = self.held_out;
        HeadsReport {
            kind: self.kind,
            base: self.run.base.clone(),
            licence: self.run.licence.clone(),
            folder: self.out_dir.to_owned(),
            parameters: self.parameters,
            bytes: self.bytes,
            draft_vocab: self.drafted.size(),
            coverage: self.drafted.coverage,
            corpus_tokens: self.corpus.tokens(),
            corpus_sequences: self.corpus.sequences(),
            steps: self.outcome.steps,
            best_step: self.outcome.best.map_or(self.outcome.steps, |b| b.step),
            positions: self.outcome.tokens,
            epochs: self.outcome.epoch,
            seconds: self.outcome.seconds,
            threads: threads::get(),
            processor: processor(),
            held_out_loss,
            heads: table.heads(),
            measured: table.positions(),
            chain_tokens: table.chain(),
            cost_share: self.cost_share,
        }
    }
}

impl HeadsReport {
    /// Writes what a person reads beside the weights: `README.md`, and in `training/` the
    /// report and the picture of the loss.
    pub(super) fn publish(
        &self,
        out_dir: &Path,
        card: &str,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let training = out_dir.join("training");
        draw(&training, self, progress);
        put_json(&training.join("report.json"), &to_json(self)?)?;
        put(&out_dir.join("README.md"), card.as_bytes())
    }
}

/// The name of the processor, or of its kind.
pub(super) fn processor() -> String {
    sequor_kernels::cpu::model_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Held-out metrics of a step, as the log has them.
pub(super) fn metrics(table: &Table, loss: f64) -> BTreeMap<String, f64> {
    let mut metrics = BTreeMap::from([(HELD_OUT_LOSS.to_owned(), loss)]);
    for (i, head) in table.heads().iter().enumerate() {
        let name = if i == 0 {
            TOP1.to_owned()
        } else {
            format!("{TOP1}_head_{i}")
        };
        metrics.insert(name, head.top1);
    }
    metrics
}

/// What a card says of the licence.
pub(super) fn licence_text(report: &HeadsReport) -> String {
    if report.licence.is_empty() {
        return format!("That of {}, whose output they learned from.", report.base);
    }
    format!(
        "{}, like {}, whose output they learned from.",
        report.licence, report.base
    )
}

/// Refuses a corpus that another model wrote: by width, by vocabulary, and by the states after
/// the first tokens, which this model must have too (but for their number format).
pub(super) fn check_corpus(target: &CausalLm, corpus: &DistillCorpus) -> Result<()> {
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

/// Time of one step, measured on a few whose gradients are thrown away.
pub(super) fn seconds_per_step(task: &mut dyn Task) -> Result<f64> {
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

fn draw(training: &Path, report: &HeadsReport, progress: &mut dyn Progress) {
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
