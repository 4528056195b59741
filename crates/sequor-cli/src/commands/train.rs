//! `sequor train lm`.

use crate::args::TrainLm;
use crate::exit::{Result, cancel_flag, failure, usage};
use sequor_text::train::{LmRecipe, LmRun, train_lm};
use std::path::Path;

/// Trains a language model by its recipe; goes on where an earlier run stopped.
pub fn run(a: &TrainLm) -> Result {
    if a.threads == Some(0) {
        return Err(usage("--threads must be at least 1"));
    }
    let recipe = LmRecipe::from_file(&a.recipe)?;
    let beside = a.recipe.parent().map(|p| {
        if p.as_os_str().is_empty() {
            ".".into()
        } else {
            p.to_path_buf()
        }
    });
    let out = a.out.clone().or(beside).unwrap_or_else(|| ".".into());
    if a.restart {
        remove_checkpoints(&out)?;
    }
    let run = LmRun {
        resume: !a.restart,
        offline: a.offline,
        threads: a.threads,
        save_every: std::time::Duration::from_secs(a.save_every),
        keep_checkpoints: a.keep_checkpoints,
        command: Some(format!("sequor train lm {}", a.recipe.display())),
    };
    let cancel = cancel_flag()?;
    let mut bar = sequor_train::Bar::new("bits_per_byte");
    let report = train_lm(&recipe, &out, &run, &mut bar, &cancel)?;
    println!(
        "{}: {:.2} M parameters, {} steps, {:.0} s; {:.3} bits per byte of held-out text (perplexity {:.1}); in {}",
        report.name,
        report.parameters as f64 / 1e6,
        report.steps,
        report.seconds,
        report.bits_per_byte,
        report.perplexity,
        report.folder.display()
    );
    Ok(())
}

/// Only what a training run puts there is removed.
pub(super) fn remove_checkpoints(out: &Path) -> Result {
    let dir = out.join(".checkpoints");
    match std::fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(failure(format!("{}: {e}", dir.display())))
        }
        _ => Ok(()),
    }
}
