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
use sequor_backbone::heads::HeadsKind;
use sequor_backbone::transfer::{HiddenTransfer, TransferConfig};
use sequor_nn::{Device, Kind, ParamBuilder};
use sequor_train::trainer::count_params;
use sequor_train::{Outcome, Progress, Task};
use serde_json::{Value, json};

use super::conduct::{Drafted, HeadsReport, HeadsRun, Told, base, check_corpus, seconds_per_step};
use super::distill::DistillCorpus;
use super::heads::{Judge, held_out};
use super::lm::{CHECKPOINTS, to_json};
use crate::Result;
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
/// [`Error::Cancelled`](crate::Error::Cancelled) when `cancel` became true (a checkpoint was written);
/// [`Error::Input`](crate::Error::Input) for a recipe out of range or a corpus of another model; errors of
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
    run.begin(out_dir)?;
    check_corpus(target, corpus)?;
    let mut plan = Plan::new(target, corpus, recipe, run)?;
    let checkpoints = out_dir.join(CHECKPOINTS);
    plan.recipe.steps = run.steps(&checkpoints, recipe.steps, 1.0, || {
        Ok(seconds_per_step(&mut plan.task()?)? * recipe.batch as f64)
    })?;
    let mut task = plan.task()?;
    progress.notice(&plan.summary(&task));
    let (options, settings) = (plan.recipe.train_options(), plan.settings()?);
    let outcome = run.train(&mut task, options, out_dir, settings, progress, cancel)?;
    let report = plan.write(task, &outcome, out_dir, run, progress)?;
    run.clear(&[checkpoints])?;
    Ok(report)
}

/// What is trained for whom, and on what.
struct Plan<'a> {
    target: &'a CausalLm,
    corpus: &'a DistillCorpus,
    recipe: TransferRecipe,
    config: TransferConfig,
    drafted: Drafted,
}

impl<'a> Plan<'a> {
    fn new(
        target: &'a CausalLm,
        corpus: &'a DistillCorpus,
        recipe: &TransferRecipe,
        run: &HeadsRun,
    ) -> Result<Self> {
        let drafted = Drafted::choose(target, corpus, recipe.draft_vocab)?;
        let base = base(run, target)?;
        let mut config = TransferConfig::new(target.config(), recipe.layers.clone(), base)?;
        config.draft_vocab_size = drafted.size().map(|size| size as i64);
        Ok(Self {
            target,
            corpus,
            recipe: recipe.clone(),
            config,
            drafted,
        })
    }

    /// New maps and what they learn from.
    fn task(&self) -> Result<TransferTask<'a>> {
        let builder = ParamBuilder::init(self.recipe.seed, Kind::Float, Device::Cpu);
        let mut maps = HiddenTransfer::identity(&builder, &self.config)?;
        if let Some(tokens) = &self.drafted.tokens {
            maps.set_draft_tokens(tokens.clone())?;
        }
        let lesson = Lesson {
            target: self.target,
            corpus: self.corpus,
            recipe: self.recipe.clone(),
            judge: Judge::new(self.target, self.drafted.tokens.as_deref())?,
            held_out: held_out(self.corpus),
        };
        Ok(TransferTask::new(lesson, maps, builder))
    }

    fn summary(&self, task: &TransferTask<'_>) -> String {
        self.drafted.summary(
            &format!("hidden transfer behind layers {:?}", self.recipe.layers),
            count_params(&task.params()),
            self.target,
            self.corpus,
            self.recipe.steps,
        )
    }

    /// All that decides the result.
    fn settings(&self) -> Result<Value> {
        Ok(json!({
            "recipe": to_json(&self.recipe)?,
            "maps": to_json(&self.config)?,
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
        let told = Told {
            kind: HeadsKind::HiddenTransfer,
            run,
            out_dir,
            corpus: self.corpus,
            drafted: &self.drafted,
            outcome,
            held_out: (&measured.table, measured.loss),
            parameters,
            bytes: 2 * parameters + 8 * self.drafted.size().unwrap_or(0) as u64,
            cost_share: self.cost_share(parameters),
        };
        let report = told.report();
        let card = card::card(&self.recipe, &report, &measured.divergences, &run.command);
        report.publish(out_dir, &card, progress)?;
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
