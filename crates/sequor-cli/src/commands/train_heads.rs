//! `sequor train heads`.

use super::model::{load_options, resolve};
use super::train::remove_checkpoints;
use crate::args::TrainHeads;
use crate::exit::{Result, cancel_flag, usage};
use sequor_data::catalog;
use sequor_text::TextPipeline;
use sequor_text::train::distill::{DistillCorpus, DistillOptions, distill};
use sequor_text::train::heads::{HeadsKind, HeadsRecipe, HeadsReport, HeadsRun, TOP1, train_heads};
use sequor_text::train::router::{self, RouterRecipe, RouterReport, train_router};
use sequor_text::train::transfer::{TransferRecipe, train_transfer};
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Trains draft heads, transfer maps or routers for a model; goes on where an earlier run
/// stopped.
pub fn run(a: &TrainHeads) -> Result {
    let kind = kind(&a.kind)?;
    let recipe = recipe(a, kind)?;
    let loading = load_options(&a.model)?;
    let name = short_name(&a.model.model);
    let home = Path::new("heads").join(&name);
    let out = a.out.clone().unwrap_or_else(|| home.join(kind.name()));
    if a.restart {
        remove_checkpoints(&out)?;
    }
    let cancel = cancel_flag()?;
    let path = resolve(&a.model.model, a.model.offline)?;
    let pipeline = TextPipeline::load(&path, &loading)?;
    let corpus = match &a.corpus {
        Some(dir) if has_shards(dir) => DistillCorpus::open(dir)?,
        Some(dir) => make(dir, &pipeline, &cancel)?,
        None => make(&home.join("corpus"), &pipeline, &cancel)?,
    };
    let entry = catalog::find(sequor_data::Kind::Model, &a.model.model);
    let run = HeadsRun {
        licence: entry.map_or_else(String::new, |e| e.licence.to_owned()),
        resume: !a.restart,
        minutes: a.minutes,
        keep_checkpoints: a.keep_checkpoints,
        save_every: std::time::Duration::from_secs(a.save_every),
        threads: a.model.threads,
        command: command(a, &name),
        base: name,
    };
    match recipe {
        Recipe::Heads(recipe) => {
            let mut bar = sequor_train::Bar::new(TOP1);
            let model = pipeline.model();
            let report = train_heads(model, &corpus, &recipe, &out, &run, &mut bar, &cancel)?;
            print_heads(&report);
        }
        Recipe::Transfer => {
            let model = pipeline.model();
            let recipe = transfer_recipe(a, TransferRecipe::new(model.config()));
            let mut bar = sequor_train::Bar::new(TOP1);
            let report = train_transfer(model, &corpus, &recipe, &out, &run, &mut bar, &cancel)?;
            print_heads(&report);
        }
        Recipe::Router(recipe) => {
            // It loads the model again, more than once.
            drop(pipeline);
            let mut bar = sequor_train::Bar::new(router::HELD_OUT_LOSS);
            let report = train_router(&path, &corpus, &out, &recipe, &run, &mut bar, &cancel)?;
            print_router(&report);
        }
    }
    Ok(())
}

/// What is to be trained, and how.
enum Recipe {
    Heads(HeadsRecipe),
    /// It depends on the model's number of layers.
    Transfer,
    Router(RouterRecipe),
}

fn transfer_recipe(a: &TrainHeads, usual: TransferRecipe) -> TransferRecipe {
    TransferRecipe {
        draft_vocab: a.draft_vocab,
        seed: a.seed,
        steps: a.steps.unwrap_or(usual.steps),
        learning_rate: a.learning_rate.unwrap_or(usual.learning_rate),
        ..usual
    }
}

fn recipe(a: &TrainHeads, kind: HeadsKind) -> Result<Recipe> {
    if kind == HeadsKind::Router {
        let usual = RouterRecipe::default();
        let recipe = RouterRecipe {
            seed: a.seed,
            steps: a.steps.unwrap_or(usual.steps),
            adapter_steps: a.steps.unwrap_or(usual.adapter_steps),
            learning_rate: a.learning_rate.unwrap_or(usual.learning_rate),
            adapter_rate: a.learning_rate.unwrap_or(usual.adapter_rate),
            ..usual
        };
        recipe.validate()?;
        return Ok(Recipe::Router(recipe));
    }
    if kind == HeadsKind::HiddenTransfer {
        return Ok(Recipe::Transfer);
    }
    let usual = HeadsRecipe::new(kind);
    let recipe = HeadsRecipe {
        draft_vocab: a.draft_vocab,
        seed: a.seed,
        steps: a.steps.unwrap_or(usual.steps),
        learning_rate: a.learning_rate.unwrap_or(usual.learning_rate),
        ..usual
    };
    recipe.validate()?;
    Ok(Recipe::Heads(recipe))
}

const KINDS: [HeadsKind; 6] = [
    HeadsKind::Medusa,
    HeadsKind::Hydra,
    HeadsKind::HydraPlus,
    HeadsKind::Eagle,
    HeadsKind::HiddenTransfer,
    HeadsKind::Router,
];

fn kind(name: &str) -> Result<HeadsKind> {
    let found = KINDS.into_iter().find(|k| k.name() == name);
    found.ok_or_else(|| {
        let names = KINDS.map(HeadsKind::name).join(", ");
        usage(format!("--kind must be one of {names}, not '{name}'"))
    })
}

fn has_shards(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// A corpus of the usual size: what is missing is written by the model.
fn make(dir: &Path, pipeline: &TextPipeline, cancel: &AtomicBool) -> Result<DistillCorpus> {
    let options = DistillOptions::default();
    let start = Instant::now();
    let mut progress = |done: usize| {
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "corpus: {done} of {} tokens, {seconds:.0} s",
            options.tokens
        );
    };
    distill(pipeline, dir, &options, &mut progress, cancel)?;
    Ok(DistillCorpus::open(dir)?)
}

/// What a model is called in folders and cards: a name, or the last part of a path.
fn short_name(model: &str) -> String {
    let path = Path::new(model.strip_prefix("hf:").unwrap_or(model));
    let last = path
        .file_stem()
        .filter(|_| path.extension().is_some_and(|e| e == "gguf"));
    let last = last
        .or(path.file_name())
        .map(|n| n.to_string_lossy().into_owned());
    last.unwrap_or_else(|| "model".into())
}

/// The command that makes the same heads again, for the card. Folders of this machine are
/// nobody else's business.
fn command(a: &TrainHeads, name: &str) -> String {
    let mut text = format!("sequor train heads --kind {} --model {name}", a.kind);
    let mut add = |option: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = write!(text, " {option}");
    };
    if let Some(steps) = a.steps {
        add(format_args!("--steps {steps}"));
    }
    if let Some(minutes) = a.minutes {
        add(format_args!("--minutes {minutes}"));
    }
    if let Some(rate) = a.learning_rate {
        add(format_args!("--learning-rate {rate}"));
    }
    if a.draft_vocab != HeadsRecipe::new(HeadsKind::Medusa).draft_vocab {
        add(format_args!("--draft-vocab {}", a.draft_vocab));
    }
    if a.seed != 0 {
        add(format_args!("--seed {}", a.seed));
    }
    if let Some(threads) = a.model.threads {
        add(format_args!("--threads {threads}"));
    }
    text
}

fn print_heads(report: &HeadsReport) {
    println!(
        "{} heads for {}: {:.2} M parameters, {} steps, {:.0} s; in {}",
        report.kind.name(),
        report.base,
        report.parameters as f64 / 1e6,
        report.steps,
        report.seconds,
        report.folder.display()
    );
    println!("held-out accuracy ({} positions):", report.measured);
    for (i, head) in report.heads.iter().enumerate() {
        println!(
            "  {} ahead: top 1 {:.1} %, top 3 {:.1} %, top 10 {:.1} %",
            i + 2,
            head.top1 * 100.0,
            head.top3 * 100.0,
            head.top10 * 100.0
        );
    }
    println!(
        "a chain of best guesses gives {:.2} tokens per pass; a draft reads {:.1} % of a pass's weights",
        report.chain_tokens,
        report.cost_share * 100.0
    );
}

fn print_router(report: &RouterReport) {
    println!(
        "routers for {}: {:.1} of {} layers run, {:.0} s; in {}",
        report.base,
        report.layers_kept,
        report.layers,
        report.seconds,
        report.folder.display()
    );
    println!("held-out loss, nats per token ({} texts):", report.texts);
    for (what, loss) in &report.losses {
        println!("  {what}: {loss:.3}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_short_names() {
        for (model, name) in [
            ("smollm2", "smollm2"),
            ("/a/b/model-1.7/", "model-1.7"),
            ("x/y.Q4_1.gguf", "y.Q4_1"),
            ("hf:owner/name-135M", "name-135M"),
        ] {
            assert_eq!(short_name(model), name);
        }
    }
}
