//! From a model and its corpus to a folder of draft heads.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use sequor_backbone::CausalLm;
use sequor_backbone::heads::{Heads, HeadsConfig, HeadsKind};
use sequor_nn::{Device, Kind, ParamBuilder};
use sequor_train::trainer::count_params;
use sequor_train::{Outcome, Progress, Task};
use serde_json::{Value, json};

use super::card;
use super::data::held_out;
use super::folder;
use super::judge::Judge;
use super::recipe::HeadsRecipe;
use super::regress;
use super::task::{HeadsTask, Lesson};
use crate::Result;
use crate::train::conduct::{
    Drafted, HeadsReport, HeadsRun, Told, base, check_corpus, seconds_per_step,
};
use crate::train::distill::DistillCorpus;
use crate::train::lm::{CHECKPOINTS, to_json};

/// Held-out positions that the final numbers come from, at most.
const MEASURED: u64 = 12_000;

/// Trains draft heads for `target` on the states in `corpus`, and writes their folder:
/// `heads.json`, `heads.safetensors` (bf16), `README.md`, and `training/` with `log.jsonl`,
/// `loss.png` and `report.json`. Checkpoints lie in `.checkpoints` meanwhile. The target itself
/// is never run, but for a few tokens that tell whether the corpus is its own.
///
/// The same recipe, corpus and number of threads give the same bytes, also when the run was
/// interrupted.
///
/// # Errors
/// [`Error::Cancelled`](crate::Error::Cancelled) when `cancel` became true (a checkpoint was written);
/// [`Error::Input`](crate::Error::Input) for a recipe out of range or a corpus of another model;
/// [`Error::Unsupported`](crate::Error::Unsupported) for kinds that are not heads beside a decoder; errors of training
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
    run.begin(out_dir)?;
    check_corpus(target, corpus)?;
    let mut plan = Plan::new(target, corpus, recipe, run)?;
    let checkpoints = out_dir.join(CHECKPOINTS);
    plan.recipe.steps = run.steps(&checkpoints, recipe.steps, 1.0, || {
        seconds_per_step(&mut plan.task()?)
    })?;
    let mut task = plan.task()?;
    progress.notice(&plan.summary(&task));
    if plan.recipe.regression && run.begun(&checkpoints)?.is_none() {
        regress::begin(&task)?;
    }
    let (options, settings) = (plan.recipe.train_options(), plan.settings()?);
    let outcome = run.train(&mut task, options, out_dir, settings, progress, cancel)?;
    let report = plan.write(&task, &outcome, out_dir, run, progress)?;
    run.clear(&[checkpoints])?;
    Ok(report)
}

/// What is trained for whom, and on what.
struct Plan<'a> {
    target: &'a CausalLm,
    corpus: &'a DistillCorpus,
    recipe: HeadsRecipe,
    config: HeadsConfig,
    drafted: Drafted,
}

impl<'a> Plan<'a> {
    fn new(
        target: &'a CausalLm,
        corpus: &'a DistillCorpus,
        recipe: &HeadsRecipe,
        run: &HeadsRun,
    ) -> Result<Self> {
        let drafted = Drafted::choose(target, corpus, recipe.draft_vocab)?;
        let base = base(run, target)?;
        let mut config = HeadsConfig {
            draft_vocab_size: drafted.size().map(|size| size as i64),
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
            drafted,
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
            judge: Judge::new(self.target, self.drafted.tokens.as_deref())?,
            held_out: held_out(self.corpus),
        };
        Ok(HeadsTask::new(lesson, heads, builder))
    }

    fn summary(&self, task: &HeadsTask<'_>) -> String {
        self.drafted.summary(
            self.recipe.kind.name(),
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
            "heads": to_json(&self.config)?,
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
        folder::write_weights(out_dir, &params, self.drafted.tokens.as_deref())?;
        // The numbers are those of the rounded weights that a user gets.
        let stored = folder::read_weights(out_dir, &self.config)?;
        let (table, held_out_loss) = task.lesson().measure(&stored, MEASURED)?;
        let parameters = count_params(&params);
        let told = Told {
            kind: self.recipe.kind,
            run,
            out_dir,
            corpus: self.corpus,
            drafted: &self.drafted,
            outcome,
            held_out: (&table, held_out_loss),
            parameters,
            bytes: folder::size(out_dir)?,
            cost_share: self.cost_share(parameters),
        };
        let report = told.report();
        let card = card::card(&self.recipe, &report, &run.command);
        report.publish(out_dir, &card, progress)?;
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
