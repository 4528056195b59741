//! Training of hidden transfer (Wu et al., 2024): linear maps that guess the states of later
//! tokens in the middle of a frozen decoder.
//!
//! Text that the model wrote itself ([`distill`](super::distill)) is read by the frozen model
//! once per step, without gradients. From a part of the answers' tokens (*anchors*) the maps
//! then make pseudo states, which run through the upper layers over the keys and values of
//! that reading; what comes out is compared with the model's own laws of the same text:
//! pseudo row `j` of token `n` with the law behind token `n + j`.
//!
//! A step costs, in products of rows and matrices: `T L` for the reading of `T` tokens by `L`
//! layers, `2 A k (L - t)` for the way of `k` rows of `A` anchors through the layers behind
//! `t` and back, and `3 A k` rows through the output head, cut to the drafted tokens (guess,
//! law, and back). Weights of the model need no gradients, which is why the way back costs no
//! more than the way there. For 30 layers, `t` = 24 and `k` = 3, anchors at half the tokens
//! add 60 per cent to the reading: more anchors are cheaper than more steps.

mod card;
mod recipe;
mod task;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use sequor_backbone::CausalLm;
use sequor_backbone::heads::{Base, HeadsKind};
use sequor_backbone::transfer::{HiddenTransfer, TransferConfig};
use sequor_kernels::threads;
use sequor_nn::{Device, Kind, ParamBuilder};
use sequor_train::checkpoint::Store;
use sequor_train::trainer::count_params;
use sequor_train::{Outcome, Progress, Task, Trainer, Workplace};
use serde_json::{Value, json};

use super::distill::DistillCorpus;
use super::heads::{
    HeadsReport, HeadsRun, Judge, begun, check_corpus, draw, held_out, seconds_per_step,
};
use super::lm::{CHECKPOINTS, put, put_json};
use crate::{Error, Result};
use task::{Lesson, TransferTask};

pub use recipe::TransferRecipe;

/// Held-out positions that the final numbers come from, at most.
const MEASURED: u64 = 8000;

/// Trains the maps for `target` on text in `corpus`, and writes their folder: `heads.json`,
/// `heads.safetensors` (bf16), `README.md`, and `training/` with `log.jsonl`, `loss.png` and
/// `report.json`. Checkpoints lie in `.checkpoints` meanwhile.
///
/// The same recipe, corpus and number of threads give the same bytes, also when the run was
/// interrupted.
///
/// # Errors
/// [`Error::Cancelled`] when `cancel` became true (a checkpoint was written);
/// [`Error::Input`] for a recipe out of range or a corpus of another model; errors of
/// training and disk.
pub fn train_transfer(
    target: &CausalLm,
    corpus: &DistillCorpus,
    recipe: &TransferRecipe,
    out_dir: &Path,
    run: &HeadsRun,
    progress: &mut dyn Progress,
    cancel: &AtomicBool,
) -> Result<HeadsReport> {
    recipe.validate(target.config())?;
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
                let pace = seconds_per_step(&mut plan.task()?)? * plan.recipe.batch as f64;
                ((minutes * 60.0 / pace) as u64).clamp(1, 10_000_000)
            }
        };
    }
    let mut task = plan.task()?;
    progress.notice(&plan.summary(&task));
    let place = Workplace {
        checkpoints: checkpoints.clone(),
        log: out_dir.join("training").join("log.jsonl"),
        save_every: run.save_every,
        config: plan.settings()?,
    };
    let options = plan.recipe.train_options();
    let mut trainer = Trainer::new(&mut task, options, place, run.resume, progress)?;
    let outcome = trainer.run(progress, cancel)?;
    trainer.finish_with_best()?;
    let report = plan.write(task, &outcome, out_dir, run, progress)?;
    if !run.keep_checkpoints {
        Store::open(&checkpoints)?.remove_all()?;
    }
    Ok(report)
}

/// What is trained for whom, and on what.
struct Plan<'a> {
    target: &'a CausalLm,
    corpus: &'a DistillCorpus,
    recipe: TransferRecipe,
    config: TransferConfig,
    /// The drafted tokens, where they are not all.
    tokens: Option<Vec<u32>>,
    /// Share of the corpus's answers that they cover.
    coverage: f64,
}

impl<'a> Plan<'a> {
    fn new(
        target: &'a CausalLm,
        corpus: &'a DistillCorpus,
        recipe: &TransferRecipe,
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
        let mut config = TransferConfig::new(target.config(), recipe.layers.clone(), base)?;
        config.draft_vocab_size = tokens.as_ref().map(|t| t.len() as i64);
        Ok(Self {
            target,
            corpus,
            recipe: recipe.clone(),
            config,
            tokens,
            coverage,
        })
    }

    /// New maps and what they learn from.
    fn task(&self) -> Result<TransferTask<'a>> {
        let builder = ParamBuilder::init(self.recipe.seed, Kind::Float, Device::Cpu);
        let mut maps = HiddenTransfer::identity(&builder, &self.config)?;
        if let Some(tokens) = &self.tokens {
            maps.set_draft_tokens(tokens.clone())?;
        }
        let lesson = Lesson {
            target: self.target,
            corpus: self.corpus,
            recipe: self.recipe.clone(),
            judge: Judge::new(self.target, self.tokens.as_deref())?,
            held_out: held_out(self.corpus),
        };
        Ok(TransferTask::new(lesson, maps, builder))
    }

    fn summary(&self, task: &TransferTask<'_>) -> String {
        format!(
            "hidden transfer behind layers {:?}: {} parameters, {} drafted tokens ({:.2} % of the answers), a corpus of {} tokens, {} steps, {} thread(s)",
            self.recipe.layers,
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
            "maps": serde_json::to_value(&self.config).map_err(json_error)?,
            "corpus": {"sequences": self.corpus.sequences(), "tokens": self.corpus.tokens()},
        }))
    }

    /// Writes the folder; the file that makes it usable comes last.
    fn write(
        &self,
        task: TransferTask<'_>,
        outcome: &Outcome,
        out_dir: &Path,
        run: &HeadsRun,
        progress: &mut dyn Progress,
    ) -> Result<HeadsReport> {
        let parameters = count_params(&task.params());
        let (lesson, mut maps) = task.into_parts();
        // The numbers are those of the rounded weights that a user gets.
        maps.round()?;
        let measured = lesson.measure(&maps, MEASURED)?;
        let cpu = sequor_kernels::cpu::model_name();
        let report = HeadsReport {
            kind: HeadsKind::HiddenTransfer,
            base: run.base.clone(),
            licence: run.licence.clone(),
            folder: out_dir.to_owned(),
            parameters,
            bytes: 2 * parameters + 8 * self.tokens.as_ref().map_or(0, Vec::len) as u64,
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
            held_out_loss: measured.loss,
            heads: measured.table.heads(),
            measured: measured.table.positions(),
            chain_tokens: measured.table.chain(),
            cost_share: self.cost_share(parameters),
        };
        let training = out_dir.join("training");
        draw(&training, &report, progress);
        let json = serde_json::to_value(&report).map_err(json_error)?;
        put_json(&training.join("report.json"), &json)?;
        let text = card::card(&self.recipe, &report, &measured.divergences, &run.command);
        put(&out_dir.join("README.md"), text.as_bytes())?;
        maps.set_accuracies(measured.table.by_rank());
        maps.save(out_dir)?;
        Ok(report)
    }

    /// The layers above are read for the real rows anyhow: a draft reads the maps and the
    /// output head.
    fn cost_share(&self, params: u64) -> f64 {
        let c = &self.config;
        let vocab = c.draft_vocab_size.unwrap_or(c.vocab_size);
        let head = (vocab * self.target.config().embed_dim) as f64;
        let width = self.target.dtype().kind().elt_size_in_bytes().max(1);
        (params as f64 + head) / (self.target.decoder().bytes_per_token() / width).max(1) as f64
    }
}

fn json_error(e: serde_json::Error) -> Error {
    Error::Config(format!("cannot be written as JSON: {e}"))
}
