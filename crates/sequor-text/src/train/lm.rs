//! From a recipe to a model folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use sequor_backbone::{Decoder, DecoderConfig};
use sequor_data::Resolver;
use sequor_kernels::threads;
use sequor_nn::params::Param;
use sequor_nn::weights::{self, write_safetensors};
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_train::checkpoint::Store;
use sequor_train::plot::{PlotOptions, plot};
use sequor_train::trainer::count_params;
use sequor_train::{Ended, Outcome, Progress, Task, Trainer, Workplace};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::card;
use super::corpus::Corpus;
use super::recipe::LmRecipe;
use super::task::{HELD_OUT_LOSS, LmTask};
use crate::{Error, Result};

/// Folder of the checkpoints within the output folder.
pub(super) const CHECKPOINTS: &str = ".checkpoints";

/// How a run is conducted. None of it decides the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LmRun {
    /// Go on after the newest checkpoint in the output folder, if there is one.
    pub resume: bool,
    /// Forbid fetching.
    pub offline: bool,
    /// Leave the checkpoints in the output folder when all is done.
    pub keep_checkpoints: bool,
    /// Time between checkpoints.
    pub save_every: Duration,
    /// Number of threads, where it is to differ from the recipe's.
    pub threads: Option<usize>,
    /// The command that a person would type for this run; for the card.
    pub command: Option<String>,
}

impl Default for LmRun {
    fn default() -> Self {
        Self {
            resume: false,
            offline: false,
            keep_checkpoints: false,
            save_every: Duration::from_secs(180),
            threads: None,
            command: None,
        }
    }
}

/// What came of a training run; also written to `training/report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LmReport {
    /// Name of the model.
    pub name: String,
    /// The model folder.
    pub folder: PathBuf,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of training text.
    pub train_bytes: usize,
    /// Tokens of training text.
    pub train_tokens: usize,
    /// Steps done.
    pub steps: u64,
    /// Step whose weights were kept.
    pub best_step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Passes over the training text.
    pub epochs: f64,
    /// Did it stop before the last step because the held-out text was no longer predicted
    /// better?
    pub stopped_early: bool,
    /// Wall time of training in seconds, evaluations included.
    pub seconds: f64,
    /// Threads.
    pub threads: usize,
    /// The processor.
    pub processor: String,
    /// Bits per byte of held-out text, by the weights as they are stored.
    pub bits_per_byte: f64,
    /// Perplexity per token of held-out text, by the weights as they are stored.
    pub perplexity: f64,
    /// Bits per byte of each held-out book or file.
    pub held_out: BTreeMap<String, f64>,
    /// Bytes of held-out text.
    pub held_out_bytes: usize,
}

/// Trains a language model by its recipe and writes the model folder: `config.json`,
/// `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`,
/// `model.safetensors` (bf16), `README.md`, `recipe.toml`, and `training/` with
/// `log.jsonl`, `loss.png` and `report.json`. Checkpoints lie in `.checkpoints` meanwhile.
///
/// # Errors
/// [`Error::Cancelled`] when `cancel` became true (a checkpoint was written);
/// [`Error::Config`]; errors of data, tokenizer, training and disk.
pub fn train_lm(
    recipe: &LmRecipe,
    out_dir: &Path,
    run: &LmRun,
    progress: &mut dyn Progress,
    cancel: &AtomicBool,
) -> Result<LmReport> {
    recipe.validate()?;
    let resolver = Resolver::from_env().offline(run.offline);
    train_with(recipe, &resolver, out_dir, run, progress, cancel)
}

pub(super) fn train_with(
    recipe: &LmRecipe,
    resolver: &Resolver,
    out_dir: &Path,
    run: &LmRun,
    progress: &mut dyn Progress,
    cancel: &AtomicBool,
) -> Result<LmReport> {
    threads::set(
        run.threads
            .or(recipe.train.threads)
            .unwrap_or_else(threads::default_count),
    );
    let mut corpus = Corpus::new(recipe, resolver)?;
    let held_out_bytes = corpus.held_out_bytes();
    let mut task = LmTask::new(recipe, &mut corpus)?;
    progress.notice(&format!(
        "{}: {} parameters, {} tokens of training text ({:.2} bytes per token), {held_out_bytes} bytes held out, {} threads",
        recipe.name,
        count_params(&task.params()),
        corpus.train.len(),
        corpus.train_bytes as f64 / corpus.train.len().max(1) as f64,
        threads::get(),
    ));

    let training = out_dir.join("training");
    let log = training.join("log.jsonl");
    let checkpoints = out_dir.join(CHECKPOINTS);
    let place = Workplace {
        checkpoints: checkpoints.clone(),
        log: log.clone(),
        save_every: run.save_every,
        config: settings(recipe, &corpus)?,
    };
    let mut trainer = Trainer::new(
        &mut task,
        recipe.train_options(),
        place,
        run.resume,
        progress,
    )?;
    let outcome = trainer.run(progress, cancel)?;
    trainer.finish_with_best()?;

    write_model(recipe, &corpus, &task.params(), out_dir)?;
    let report = measure(recipe, &corpus, &task, &outcome, held_out_bytes, out_dir)?;
    let subtitle = format!(
        "{:.1} M parameters, best at step {}: {:.3} bits per byte held out",
        report.parameters as f64 / 1e6,
        report.best_step,
        report.bits_per_byte
    );
    let options = PlotOptions {
        title: recipe.name.clone(),
        subtitle,
        y_label: "loss (nats per token)".into(),
        held_out: HELD_OUT_LOSS.into(),
    };
    // Too short a run has nothing to draw; that is no reason to lose its model.
    if let Err(e) = plot(
        &sequor_train::log::read(&log)?,
        &options,
        &training.join("loss.png"),
    ) {
        progress.notice(&format!("the loss was not drawn: {e}"));
    }
    put_json(&training.join("report.json"), &to_json(&report)?)?;
    put(
        &out_dir.join("README.md"),
        card::card(recipe, &corpus, &report, run.command.as_deref()).as_bytes(),
    )?;
    if !run.keep_checkpoints {
        Store::open(&checkpoints)?.remove_all()?;
    }
    Ok(report)
}

/// All that decides the result. The number of threads changes last digits only, and is
/// kept beside it.
fn settings(recipe: &LmRecipe, corpus: &Corpus) -> Result<Value> {
    let mut settings = to_json(recipe)?;
    if let Some(train) = settings.get_mut("train").and_then(Value::as_object_mut) {
        train.remove("threads");
    }
    if let Some(all) = settings.as_object_mut() {
        all.remove("description");
        all.insert(
            "text".into(),
            json!(format!("{:016x}", corpus.train.fingerprint())),
        );
    }
    Ok(settings)
}

fn write_model(recipe: &LmRecipe, corpus: &Corpus, params: &[Param], out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
    let rounded = params.iter().map(|p| {
        Ok((
            p.name.as_str(),
            p.tensor.f_detach()?.f_to_kind(Kind::BFloat16)?,
        ))
    });
    let rounded = rounded.collect::<sequor_nn::Result<Vec<(&str, Tensor)>>>()?;
    let tensors: Vec<(&str, &Tensor)> = rounded.iter().map(|(n, t)| (*n, t)).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&out.join("model.safetensors"), &tensors, &metadata)?;
    let config = recipe.config_json(corpus.tokenizer.vocab_size(), corpus.end);
    put_json(&out.join("config.json"), &config)?;
    let generation = json!({"bos_token_id": corpus.end, "eos_token_id": corpus.end});
    put_json(&out.join("generation_config.json"), &generation)?;
    corpus.tokenizer.save_dir(out)?;
    let text = toml::to_string(recipe)
        .map_err(|e| Error::Config(format!("the recipe cannot be written: {e}")))?;
    // A recipe that lies there already has comments that are worth keeping.
    let path = out.join("recipe.toml");
    if path.exists() {
        Ok(())
    } else {
        put(&path, text.as_bytes())
    }
}

/// Loads what was written and measures that: the numbers of the card are those of the
/// rounded weights a user gets.
fn measure(
    recipe: &LmRecipe,
    corpus: &Corpus,
    task: &LmTask,
    outcome: &Outcome,
    held_out_bytes: usize,
    out: &Path,
) -> Result<LmReport> {
    let config =
        DecoderConfig::from_json(&recipe.config_json(corpus.tokenizer.vocab_size(), corpus.end))?;
    let params = ParamBuilder::load(
        weights::open(&out.join("model.safetensors"))?,
        Kind::Float,
        Device::Cpu,
    );
    let decoder = Decoder::new(&params, &config)?;
    params.finish()?;
    let measured = task.measure(&decoder)?;
    let (likelihood, bytes) = LmTask::total(&measured);
    let cpu = sequor_kernels::cpu::model_name();
    Ok(LmReport {
        name: recipe.name.clone(),
        folder: out.to_owned(),
        parameters: count_params(&task.params()),
        train_bytes: corpus.train_bytes,
        train_tokens: corpus.train.len(),
        steps: outcome.steps,
        best_step: outcome.best.map_or(outcome.steps, |b| b.step),
        tokens: outcome.tokens,
        epochs: outcome.epoch,
        stopped_early: outcome.ended == Ended::Early,
        seconds: outcome.seconds,
        threads: threads::get(),
        processor: cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        bits_per_byte: likelihood.bits_per_byte(bytes),
        perplexity: likelihood.perplexity(),
        held_out: measured
            .iter()
            .map(|(name, l, bytes)| (name.clone(), l.bits_per_byte(*bytes)))
            .collect(),
        held_out_bytes,
    })
}

fn json_error(e: serde_json::Error) -> Error {
    Error::Config(format!("cannot be written as JSON: {e}"))
}

/// Something that is written down, as JSON.
pub(super) fn to_json(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(json_error)
}

pub(super) fn put_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(json_error)?;
    text.push(b'\n');
    put(path, &text)
}

pub(super) fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    weights::write_atomic(path, |file| {
        file.write_all(bytes)
            .map_err(|e| sequor_nn::Error::io(path, e))
    })?;
    Ok(())
}
