//! The loop: micro-batches to gradients, gradients to an update, now and then an
//! evaluation, a checkpoint, a line in the log.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::Tensor;
use sequor_nn::params::Param;
use sequor_nn::tch::{manual_seed, no_grad_guard};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Lock, Parts, Store};
use crate::clip;
use crate::collective::{Collective, Single};
use crate::ema::Ema;
use crate::flat::Layout;
use crate::grads::Gradients;
use crate::log::Log;
use crate::optim::{AdamW, AdamWOptions};
use crate::progress::{Progress, StepReport};
use crate::schedule::Schedule;
use crate::state::{Best, FORMAT, TrainerState, Window, config_hash, first_difference};
use crate::{Error, Result};

/// After this many steps in a row without a finite gradient a run gives up.
const PATIENCE_WITH_NAN: u64 = 50;

/// libtorch's generator, from which dropout draws, belongs to the whole process. A
/// micro-batch has it for itself, so that two runs in one process do not mix.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Which micro-batch is asked for, and the seed of whatever is random in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepCtx {
    /// Steps done before this one.
    pub step: u64,
    /// Number of the micro-batch within the step.
    pub micro: usize,
    /// Seed that belongs to this micro-batch of this process alone. libtorch's
    /// generator (dropout) was seeded with it already.
    pub seed: u64,
}

/// The loss of one micro-batch.
#[derive(Debug)]
pub struct MicroLoss {
    /// Sum over the targets, a scalar with a gradient.
    pub sum: Tensor,
    /// Number of targets (tokens, pixels, frames).
    pub targets: usize,
}

/// What is trained: a network, its data and its loss.
pub trait Task {
    /// The parameters, the same tensors at every call.
    fn params(&self) -> Vec<Param>;

    /// The loss of the next micro-batch. Everything random must follow from `ctx`, and
    /// the place in the data from the cursor.
    ///
    /// # Errors
    /// Any; it ends the run.
    fn loss(&mut self, ctx: &StepCtx) -> Result<MicroLoss>;

    /// Measures held-out data; the metrics by name. Called without recording gradients.
    ///
    /// # Errors
    /// Any; it ends the run.
    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>>;

    /// Where it stands in its data.
    fn cursor(&self) -> Value;

    /// Goes to a place that [`cursor`](Self::cursor) gave.
    ///
    /// # Errors
    /// When there is no such place.
    fn set_cursor(&mut self, cursor: &Value) -> Result<()>;

    /// Passes over the data so far, for a person to read.
    fn epoch(&self) -> f64 {
        0.0
    }
}

/// The settings of a run that decide its result.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Micro-batches per step, at least 1.
    pub accumulation: usize,
    /// Seed of every random draw.
    pub seed: u64,
    /// Learning rates, and the number of steps.
    pub schedule: Schedule,
    /// Constants of the optimizer.
    pub adamw: AdamWOptions,
    /// Longest gradient (global L2 norm); 0 for no bound.
    pub clip: f64,
    /// Decay of the averaged weights; `None` for no average.
    pub ema: Option<f64>,
    /// Steps between lines of the log, at least 1.
    pub log_every: u64,
    /// Steps between evaluations; 0 for none.
    pub eval_every: u64,
    /// The evaluation metric that is to fall.
    pub metric: String,
    /// Evaluations without a new best after which the run stops; `None` for never.
    pub patience: Option<u32>,
}

impl TrainOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        self.adamw.validate()?;
        let fail = |what: &str| Err(Error::Config(what.to_owned()));
        if self.accumulation == 0 {
            return fail("accumulation must be at least 1");
        }
        if self.log_every == 0 {
            return fail("log_every must be at least 1");
        }
        if !(self.clip >= 0.0 && self.clip.is_finite()) {
            return fail("clip must be at least 0 (0 switches it off)");
        }
        if self.patience == Some(0) {
            return fail("patience must be at least 1 (leave it out to never stop early)");
        }
        Ok(())
    }
}

/// Where a run keeps what it makes, and how often. None of it decides the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Workplace {
    /// Folder of the checkpoints.
    pub checkpoints: PathBuf,
    /// The log, a file of JSON lines.
    pub log: PathBuf,
    /// Time between checkpoints. One is also written at each new best evaluation, at
    /// the end, and when the run is cancelled.
    pub save_every: Duration,
    /// All settings of the run; a run with other settings cannot resume its checkpoints.
    pub config: Value,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All steps were done.
    Finished,
    /// The metric had stopped falling.
    Early,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Why it ended.
    pub ended: Ended,
    /// Steps done.
    pub steps: u64,
    /// Targets trained on.
    pub tokens: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Steps whose gradient was not finite.
    pub skipped: u64,
    /// Wall time of training in seconds, over all sessions.
    pub seconds: f64,
}

/// A run of training.
pub struct Trainer<'a, T: Task> {
    task: &'a mut T,
    options: TrainOptions,
    workplace: Workplace,
    collective: Box<dyn Collective>,
    store: Store,
    _lock: Lock,
    log: Log,
    layout: Layout,
    gradients: Gradients,
    adamw: AdamW,
    ema: Option<Ema>,
    state: TrainerState,
}

impl<'a, T: Task> Trainer<'a, T> {
    /// A run at its beginning, or, with `resume`, after its newest checkpoint that is
    /// whole (at the beginning when there is none).
    ///
    /// # Errors
    /// [`Error::Input`] when there are checkpoints and `resume` is false, or another
    /// process trains in the folder;
    /// [`Error::Resume`] when they are of a run with other settings;
    /// [`Error::Weights`] when all of them are damaged; [`Error::Config`].
    pub fn new(
        task: &'a mut T,
        options: TrainOptions,
        workplace: Workplace,
        resume: bool,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        options.validate()?;
        let store = Store::open(&workplace.checkpoints)?;
        let lock = store.lock()?;
        let found = if resume {
            store.newest(&mut |n| progress.notice(n))?
        } else {
            refuse_old(&store)?;
            None
        };
        let layout = Layout::new(task.params())?;
        let gradients = Gradients::new(&layout)?;
        let adamw = AdamW::new(&layout, options.adamw)?;
        let ema = options
            .ema
            .map(|decay| Ema::new(adamw.master(), decay))
            .transpose()?;
        let state = TrainerState {
            format: FORMAT,
            step: 0,
            updates: 0,
            tokens: 0,
            epoch: 0.0,
            cursor: task.cursor(),
            seed: options.seed,
            skipped: 0,
            skipped_in_a_row: 0,
            best: None,
            stale: 0,
            window: Window::default(),
            seconds: 0.0,
            threads: sequor_kernels::threads::get(),
            schedule: options.schedule,
            config_hash: config_hash(&workplace.config),
            config: workplace.config.clone(),
        };
        let log = Log::open(&workplace.log, found.as_ref().map_or(0, |c| c.state().step))?;
        let collective = Box::new(Single);
        let mut trainer = Self {
            task,
            options,
            workplace,
            collective,
            store,
            _lock: lock,
            log,
            layout,
            gradients,
            adamw,
            ema,
            state,
        };
        if let Some(checkpoint) = found {
            trainer.restore(&checkpoint, progress)?;
        }
        Ok(trainer)
    }

    /// Trains together with other processes.
    #[must_use]
    pub fn with_collective(mut self, collective: Box<dyn Collective>) -> Self {
        self.collective = collective;
        self
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    fn restore(&mut self, checkpoint: &Checkpoint, progress: &mut dyn Progress) -> Result<()> {
        let saved = checkpoint.state();
        if saved.config_hash != self.state.config_hash {
            let (field, saved, now) = first_difference(&saved.config, &self.state.config)
                .unwrap_or_else(|| {
                    (
                        "the settings".into(),
                        saved.config_hash.clone(),
                        self.state.config_hash.clone(),
                    )
                });
            return Err(Error::Resume {
                path: checkpoint.path().to_owned(),
                field,
                saved,
                now,
            });
        }
        if saved.threads != self.state.threads {
            progress.notice(&format!(
                "this run used {} threads and goes on with {}: a valid run, but its last digits will differ",
                saved.threads, self.state.threads
            ));
        }
        self.load_weights(&checkpoint.model()?)?;
        self.adamw
            .load(&self.layout, &checkpoint.optimizer()?, saved.updates)?;
        if let Some(ema) = &mut self.ema {
            let absent = || Error::weights(checkpoint.path(), "ema.safetensors is missing");
            ema.load(&self.layout, &checkpoint.ema()?.ok_or_else(absent)?)?;
        }
        self.task.set_cursor(&saved.cursor)?;
        self.state = TrainerState {
            threads: self.state.threads,
            ..saved.clone()
        };
        Ok(())
    }

    fn load_weights(&self, source: &dyn sequor_nn::weights::TensorSource) -> Result<()> {
        let flat = self.layout.zeros()?;
        self.layout.fill(&flat, "", source)?;
        self.layout.publish(&flat)
    }

    /// Trains to the end, or until `cancel` becomes true.
    ///
    /// # Errors
    /// [`Error::Cancelled`] after writing a checkpoint; [`Error::Diverged`]; whatever
    /// the task or the disk refuses.
    pub fn run(&mut self, progress: &mut dyn Progress, cancel: &AtomicBool) -> Result<Outcome> {
        let total = self.options.schedule.steps;
        progress.begin(self.state.step, total);
        let result = self.steps(total, progress, cancel);
        progress.end();
        let ended = result?;
        let s = &self.state;
        Ok(Outcome {
            ended,
            steps: s.step,
            tokens: s.tokens,
            epoch: s.epoch,
            best: s.best,
            skipped: s.skipped,
            seconds: s.seconds,
        })
    }

    fn steps(
        &mut self,
        total: u64,
        progress: &mut dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Ended> {
        let (begun, before) = (Instant::now(), self.state.seconds);
        let mut saved = (Instant::now(), self.state.step);
        loop {
            let ended = match self.options.patience {
                Some(patience) if self.state.stale >= patience => Some(Ended::Early),
                _ if self.state.step >= total => Some(Ended::Finished),
                _ => None,
            };
            let cancelled = cancel.load(Ordering::Relaxed);
            if ended.is_some() || cancelled {
                if saved.1 != self.state.step {
                    self.save()?;
                }
                return ended.ok_or(Error::Cancelled);
            }
            self.step(progress)?;
            self.state.seconds = before + begun.elapsed().as_secs_f64();
            let better = self.report(total, progress)?;
            if better || saved.0.elapsed() >= self.workplace.save_every {
                self.save()?;
                saved = (Instant::now(), self.state.step);
            }
        }
    }

    /// One update of the weights.
    fn step(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let (step, rank) = (self.state.step, self.collective.rank() as u64);
        self.gradients.clear()?;
        let mut sums = [0.0, 0.0];
        for micro in 0..self.options.accumulation {
            let site = rank << 32 | micro as u64;
            let seed = Key::new(self.options.seed, step)
                .stream(site, Purpose::Dropout)
                .next_u64();
            let MicroLoss { sum, targets } = {
                let _mine = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
                manual_seed(seed as i64);
                self.task.loss(&StepCtx { step, micro, seed })?
            };
            self.gradients.add(&sum)?;
            sums[0] += sum.f_detach()?.f_double_value(&[])?;
            sums[1] += targets as f64;
        }
        let mut sums = Tensor::f_from_slice(&sums)?;
        self.collective.all_reduce_sum(&mut sums)?;
        self.collective.all_reduce_sum(self.gradients.flat_mut())?;
        let (loss, targets) = (sums.f_double_value(&[0])?, sums.f_double_value(&[1])?);

        // Every target of the step weighs the same, however the micro-batches divide them.
        let mean = 1.0 / targets.max(1.0);
        let norm = clip::norm(self.gradients.flat())? * mean;
        let lr = self.options.schedule.at(step);
        self.state.step += 1;
        self.state.cursor = self.task.cursor();
        self.state.epoch = self.task.epoch();
        if norm.is_finite() && loss.is_finite() {
            let _no_grad = no_grad_guard();
            let _ = self
                .gradients
                .flat_mut()
                .f_mul_scalar_(mean * clip::factor(norm, self.options.clip))?;
            self.adamw.step(&self.layout, self.gradients.flat(), lr)?;
            self.state.updates = self.adamw.updates();
            if let Some(ema) = &mut self.ema {
                ema.update(self.adamw.master(), self.state.updates)?;
            }
            self.state.skipped_in_a_row = 0;
            self.state.tokens += targets as u64;
            self.state.window.loss += loss;
            self.state.window.targets += targets as u64;
        } else {
            progress.notice(&format!(
                "step {step}: the gradient is not finite; the step is skipped"
            ));
            self.state.skipped += 1;
            self.state.skipped_in_a_row += 1;
            if self.state.skipped_in_a_row >= PATIENCE_WITH_NAN {
                return Err(Error::Diverged {
                    steps: PATIENCE_WITH_NAN,
                    last: step,
                });
            }
        }
        let steps = self.options.schedule.steps;
        let report = StepReport {
            step: self.state.step,
            steps,
            loss: loss * mean,
            lr,
            norm,
            targets: targets as u64,
        };
        progress.step(&report);
        if self.state.step.is_multiple_of(self.options.log_every) || self.state.step == steps {
            let window = std::mem::take(&mut self.state.window);
            let record = json!({
                "kind": "train",
                "step": self.state.step,
                "epoch": self.state.epoch,
                "loss": window.loss / (window.targets.max(1)) as f64,
                "lr": lr,
                "norm": norm,
                "tokens": self.state.tokens,
                "seconds": self.state.seconds,
            });
            self.write(record, progress)?;
        }
        Ok(())
    }

    /// Evaluates when it is time. Is this the best so far?
    fn report(&mut self, total: u64, progress: &mut dyn Progress) -> Result<bool> {
        let every = self.options.eval_every;
        let step = self.state.step;
        if every == 0 || !(step.is_multiple_of(every) || step == total) {
            return Ok(false);
        }
        let metrics = self.with_best_weights(|task| task.evaluate())?;
        let Some(&value) = metrics.get(&self.options.metric) else {
            let known: Vec<&str> = metrics.keys().map(String::as_str).collect();
            let what = format!(
                "there is no metric '{}' to judge by (there are: {})",
                self.options.metric,
                known.join(", ")
            );
            return Err(Error::Config(what));
        };
        let mut record = json!({"kind": "eval", "step": step, "epoch": self.state.epoch});
        if let Some(map) = record.as_object_mut() {
            map.extend(metrics.into_iter().map(|(k, v)| (k, json!(v))));
            map.insert("seconds".into(), json!(self.state.seconds));
        }
        let better = value.is_finite() && self.state.best.is_none_or(|b| value < b.value);
        if better {
            self.state.best = Some(Best { step, value });
            self.state.stale = 0;
        } else {
            self.state.stale += 1;
        }
        self.write(record, progress)?;
        Ok(better)
    }

    /// Calls `f` while the model has the averaged weights, where they are kept.
    fn with_best_weights<R>(&mut self, f: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let _no_grad = no_grad_guard();
        if let Some(ema) = &self.ema {
            self.layout.publish(ema.average())?;
        }
        let result = f(self.task);
        if self.ema.is_some() {
            self.layout.publish(self.adamw.master())?;
        }
        result
    }

    fn write(&mut self, record: Value, progress: &mut dyn Progress) -> Result<()> {
        let Value::Object(record) = record else {
            return Ok(());
        };
        self.log.write(&record)?;
        progress.record(&record);
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        if self.collective.rank() != 0 {
            return Ok(());
        }
        self.log.sync()?;
        let ema = self
            .ema
            .as_ref()
            .map(|e| self.layout.named(e.average(), ""))
            .transpose()?;
        let parts = Parts {
            model: self.layout.named_params()?,
            optimizer: self.adamw.state(&self.layout)?,
            ema,
            state: self.state.clone(),
        };
        self.store.save(&parts)?;
        Ok(())
    }

    /// Gives the model the weights of its best evaluation (the averaged ones, where they
    /// are kept), or the present ones when it was never evaluated. The run must not go
    /// on after this.
    ///
    /// # Errors
    /// [`Error::Weights`] when that checkpoint is damaged.
    pub fn finish_with_best(self) -> Result<()> {
        let Some(best) = self.state.best else {
            return match &self.ema {
                Some(ema) => self.layout.publish(ema.average()),
                None => Ok(()),
            };
        };
        let checkpoint = self.store.at(best.step)?;
        match checkpoint.ema()? {
            Some(ema) => self.load_weights(&ema),
            None => self.load_weights(&checkpoint.model()?),
        }
    }
}

/// Hours of work are not thrown away by a forgotten flag.
fn refuse_old(store: &Store) -> Result<()> {
    match store.steps()?.last() {
        None => Ok(()),
        Some(step) => Err(Error::Input(format!(
            "{} holds checkpoints of a run that did {step} steps; resume it, or remove that folder",
            store.dir().display()
        ))),
    }
}

/// The number of values in the parameters of a task.
pub fn count_params(params: &[Param]) -> u64 {
    params.iter().map(|p| p.tensor.numel() as u64).sum()
}

#[cfg(test)]
mod tests;
