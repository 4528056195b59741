//! Training of routers that leave layers out (FiRST, Jain et al. 2024).
//!
//! Two phases, on text that the model wrote itself ([`distill`](super::distill)):
//!
//! 1. the routers alone, the model frozen. Gates are soft, one per layer and sequence (the
//!    mean over the prompt), and hold for the tokens behind the prompt, as at inference; in
//!    the last third the forward is hard and the gradient soft (straight through). The loss
//!    is the cross-entropy of the model's own text, a pull towards the wanted number of
//!    layers, and a push of each gate to 0 or 1;
//! 2. a low-rank adapter, the routers frozen, with the hard gates of inference. It learns to
//!    do without the layers that are left out.
//!
//! The paper names these parts; how they are weighed is this library's choice.

mod card;
mod recipe;
mod task;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use sequor_backbone::CausalLm;
use sequor_backbone::heads::{Base, HeadsKind};
use sequor_backbone::routers::{
    LayerScore, LayerSelection, Policy, Prefill, RouterConfig, RouterFolder, Routers, adapt,
};
use sequor_kernels::threads;
use sequor_nn::device::DType;
use sequor_nn::lora::{Adapter, LoraConfig};
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_train::trainer::count_params;
use sequor_train::{Progress, Trainer, Workplace};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::conduct::{HeadsRun, processor, seconds_per_step};
use super::distill::DistillCorpus;
use super::lm::{CHECKPOINTS, put, put_json, to_json};
use crate::{Error, Result};
pub use recipe::RouterRecipe;
use task::{Lesson, Phase, RouterTask};

/// The held-out metric of both phases: cross-entropy with hard gates, in nats per token.
pub const HELD_OUT_LOSS: &str = "held_out_loss";
/// Where a router begins: nearly every layer is kept.
const FIRST_BIAS: f64 = 2.0;
/// Prompts over which mean scores are taken.
const SCORED: usize = 64;

/// What came of training routers; also in `heads.json` and `training/report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterReport {
    /// Name of the model.
    pub base: String,
    /// Licence of the model; empty when unknown.
    pub licence: String,
    /// The folder; not written down.
    #[serde(skip)]
    pub folder: PathBuf,
    /// Number of parameters of the routers.
    pub parameters: u64,
    /// Number of parameters of the adapter.
    pub adapter_parameters: u64,
    /// Bytes of all weights as they are stored.
    pub bytes: u64,
    /// Updates of the routers.
    pub steps: u64,
    /// Updates of the adapter.
    pub adapter_steps: u64,
    /// Wall time of both phases in seconds.
    pub seconds: f64,
    /// Threads.
    pub threads: usize,
    /// The processor.
    pub processor: String,
    /// Layers that run, of all; with gated prefill the mean.
    pub layers_kept: f64,
    /// Layers of the model.
    pub layers: usize,
    /// Different sets of layers that held-out prompts were given.
    pub choices: usize,
    /// Held-out texts behind the losses.
    pub texts: usize,
    /// Held-out cross-entropy in nats per token of the model's own text, by what runs: `full`,
    /// `routers`, `static best`, `evenly spaced`, `random`, `routers + adapter`.
    pub losses: BTreeMap<String, f64>,
}

/// Trains routers and an adapter for the model at `model_path` on its own text in `corpus`,
/// and writes a folder: `heads.json`, `heads.safetensors` (routers), `adapter_config.json` and
/// `adapter_model.safetensors` (layout of PEFT), `README.md`, and `training/` with the logs of
/// both phases and `report.json`. Weights are bf16. Checkpoints lie in `.checkpoints`
/// meanwhile; a run that was interrupted goes on in the phase it was in.
///
/// # Errors
/// [`Error::Cancelled`] when `cancel` became true (a checkpoint was written); [`Error::Input`]
/// for a recipe out of range, or a corpus without texts that fit it or of another model; errors
/// of training and disk.
pub fn train_router(
    model_path: &Path,
    corpus: &DistillCorpus,
    out_dir: &Path,
    recipe: &RouterRecipe,
    run: &HeadsRun,
    progress: &mut dyn Progress,
    cancel: &AtomicBool,
) -> Result<RouterReport> {
    recipe.validate()?;
    run.begin(out_dir)?;
    let model = CausalLm::load(model_path, DType::F32, Device::Cpu)?;
    let lesson = Lesson::new(corpus, recipe, &model)?;
    // A folder with a config is whole: the old one goes first, the new one comes last.
    let config = out_dir.join("heads.json");
    match std::fs::remove_file(&config) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(config, e)),
        _ => {}
    }
    let work = Work {
        model_path,
        out_dir,
        recipe,
        run,
        lesson,
    };
    work.all(model, progress, cancel)
}

struct Work<'a> {
    model_path: &'a Path,
    out_dir: &'a Path,
    recipe: &'a RouterRecipe,
    run: &'a HeadsRun,
    lesson: Lesson,
}

impl Work<'_> {
    fn all(
        &self,
        model: CausalLm,
        progress: &mut dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<RouterReport> {
        let c = model.config();
        let (layers, dim, vocab) = (c.layers, c.dim, c.vocab_size);
        let builder = ParamBuilder::init(self.recipe.seed, Kind::Float, Device::Cpu);
        let routers = Routers::new(&builder, layers, dim)?;
        begin(&builder)?;
        let policy = self.recipe.policy(layers);
        policy.validate(layers, self.recipe.prefill)?;
        let mut phase = RouterTask {
            model: &model,
            routers: &routers,
            builder: &builder,
            recipe: self.recipe,
            policy,
            lesson: &self.lesson,
            phase: Phase::Routers,
            steps: 1,
            next: 0,
        };
        let (steps, adapter_steps) = self.lengths(&mut phase)?;
        progress.notice(&format!(
            "router: {} parameters for {layers} layers, {} texts, {steps} steps, then {adapter_steps} of the adapter, {} thread(s)",
            count_params(&builder.params()),
            self.lesson.texts.len(),
            threads::get(),
        ));
        phase.steps = steps;
        let first = self.train(&mut phase, "routers", progress, cancel)?;
        // What is stored is what is measured and what the adapter sees.
        round(&builder)?;
        let mut losses = BTreeMap::new();
        let scores = self.scores(&phase)?;
        let measured = self.compare(&phase, &scores, &mut losses)?;
        let base = Base {
            name: self.run.base.clone(),
            fingerprint: model.fingerprint()?,
        };
        drop(model);

        let mut seconds = first;
        let mut adapter_parameters = 0;
        if adapter_steps > 0 {
            let (adapted, updates) = adapt(
                self.model_path,
                self.recipe.lora(),
                self.recipe.seed,
                Device::Cpu,
            )?;
            adapter_parameters = count_params(&updates.params());
            let mut phase = RouterTask {
                model: &adapted,
                routers: &routers,
                builder: &updates,
                recipe: self.recipe,
                policy,
                lesson: &self.lesson,
                phase: Phase::Adapter,
                steps: adapter_steps,
                next: 0,
            };
            seconds += self.train(&mut phase, "adapter", progress, cancel)?;
            round(&updates)?;
            let held_out = &self.lesson.held_out;
            losses.insert("routers + adapter".into(), phase.measure(held_out)?.loss);
            let config: LoraConfig = self.recipe.lora();
            let params = updates.params();
            Adapter::write(self.out_dir, &config, &params, Kind::BFloat16, &base.name)?;
        }
        let report = RouterReport {
            base: base.name.clone(),
            licence: self.run.licence.clone(),
            folder: self.out_dir.to_owned(),
            parameters: count_params(&builder.params()),
            adapter_parameters,
            bytes: 2 * (count_params(&builder.params()) + adapter_parameters),
            steps,
            adapter_steps,
            seconds,
            threads: threads::get(),
            processor: processor(),
            layers_kept: measured.layers,
            layers,
            choices: measured.choices,
            texts: self.lesson.held_out.len(),
            losses,
        };
        let training = self.out_dir.join("training");
        let mut told = to_json(&report)?;
        put_json(&training.join("report.json"), &told)?;
        put(
            &self.out_dir.join("README.md"),
            card::card(self.recipe, &report, &self.run.command).as_bytes(),
        )?;
        if let Some(fields) = told.as_object_mut() {
            let recipe = to_json(self.recipe)?;
            fields.insert("recipe".into(), recipe);
        }
        let config = RouterConfig {
            kind: HeadsKind::Router,
            base,
            hidden_size: dim,
            vocab_size: vocab,
            decoder_layers: layers,
            kept: self.recipe.kept,
            prefill: self.recipe.prefill,
            rule: self.recipe.rule,
            protect: self.recipe.protect,
            scores: scores.iter().map(|s| s.mean).collect(),
            adapter: adapter_steps > 0,
            training: told,
        };
        RouterFolder::write(self.out_dir, &config, &builder.params())?;
        self.run
            .clear(&["routers", "adapter"].map(|phase| self.checkpoints(phase)))?;
        Ok(report)
    }

    fn checkpoints(&self, phase: &str) -> PathBuf {
        self.out_dir.join(CHECKPOINTS).join(phase)
    }

    /// Steps of both phases: the recipe's, or as many as fit into the time. A run that is
    /// resumed keeps what it began with.
    fn lengths(&self, phase: &mut RouterTask<'_>) -> Result<(u64, u64)> {
        let recipe = self.recipe;
        let share = recipe.steps as f64 / (recipe.steps + recipe.adapter_steps) as f64;
        let folder = self.checkpoints("routers");
        let steps = self.run.steps(&folder, recipe.steps, share, || {
            let pace = seconds_per_step(phase)? * recipe.batch as f64;
            phase.next = 0;
            Ok(pace)
        })?;
        let ratio = recipe.adapter_steps as f64 / recipe.steps as f64;
        Ok((steps, (steps as f64 * ratio).round() as u64))
    }

    /// Trains one phase; gives its wall time.
    fn train(
        &self,
        task: &mut RouterTask<'_>,
        name: &str,
        progress: &mut dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<f64> {
        let place = Workplace {
            checkpoints: self.checkpoints(name),
            log: self.out_dir.join("training").join(format!("{name}.jsonl")),
            save_every: self.run.save_every,
            config: json!({
                "recipe": to_json(self.recipe)?,
                "phase": name,
                "steps": task.steps,
                "texts": self.lesson.fingerprint(),
            }),
        };
        let options = self.recipe.train_options(task.phase, task.steps);
        let adapter = task.phase == Phase::Adapter;
        let mut trainer = Trainer::new(task, options, place, self.run.resume, progress)?;
        let outcome = trainer.run(progress, cancel)?;
        if adapter {
            trainer.finish_with_best()?;
        }
        // The routers of the last step are the ones that were made hard.
        Ok(outcome.seconds)
    }

    /// Mean scores of all layers over prompts of the training data.
    fn scores(&self, phase: &RouterTask<'_>) -> Result<Vec<LayerScore>> {
        let _no_grad = no_grad_guard();
        let mut rows: Vec<Vec<f64>> = Vec::new();
        for text in self.lesson.texts.iter().take(SCORED) {
            rows.push(phase.prompt_scores(text)?);
        }
        let layers = rows.first().map_or(0, Vec::len);
        let n = rows.len().max(1) as f64;
        let mean = |l: usize| rows.iter().filter_map(|r| r.get(l)).sum::<f64>() / n;
        Ok((0..layers)
            .map(|l| LayerScore {
                mean: mean(l),
                votes: 0.0,
            })
            .collect())
    }

    /// Held-out losses of the routers and of choices that ignore the prompt, at the same
    /// number of layers.
    fn compare(
        &self,
        phase: &RouterTask<'_>,
        scores: &[LayerScore],
        losses: &mut BTreeMap<String, f64>,
    ) -> Result<task::Measured> {
        let held_out = &self.lesson.held_out;
        let layers = scores.len();
        let routed = phase.measure(held_out)?;
        let keep = (routed.layers.round() as usize).clamp(1, layers);
        let best = Policy {
            rule: sequor_backbone::routers::GateRule::MeanProb,
            keep: Some(keep),
            protect: self.recipe.protect,
        };
        let fixed = |s: LayerSelection| Ok::<_, Error>(s.gates(layers)?.unwrap_or_default());
        let random = LayerSelection::Random {
            keep,
            seed: self.recipe.seed,
        };
        let choices = [
            ("full", fixed(LayerSelection::All)?),
            ("static best", best.decide(scores)),
            ("evenly spaced", fixed(LayerSelection::EvenlySpaced(keep))?),
            ("random", fixed(random)?),
        ];
        for (name, gates) in choices {
            losses.insert(name.into(), phase.fixed_loss(held_out, &gates)?);
        }
        losses.insert("routers".into(), routed.loss);
        Ok(routed)
    }
}

/// Sets the biases of new routers.
fn begin(builder: &ParamBuilder) -> Result<()> {
    let _no_grad = no_grad_guard();
    for p in builder.params().iter().filter(|p| p.name.ends_with("bias")) {
        let filled = p.tensor.shallow_clone().f_fill_(FIRST_BIAS);
        let _ = filled.map_err(sequor_nn::Error::from)?;
    }
    Ok(())
}

/// Rounds parameters to what bf16 stores.
fn round(builder: &ParamBuilder) -> Result<()> {
    let _no_grad = no_grad_guard();
    let one = |t: &Tensor| -> sequor_nn::Result<()> {
        let stored = t.f_to_kind(Kind::BFloat16)?.f_to_kind(Kind::Float)?;
        Ok(t.shallow_clone().f_copy_(&stored)?)
    };
    for p in builder.params() {
        one(&p.tensor)?;
    }
    Ok(())
}

/// A place in the data as the training loop keeps it.
fn cursor(next: u64) -> Value {
    json!({ "next": next })
}
