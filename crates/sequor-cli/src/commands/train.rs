//! `sequor train lm`.

use crate::args::TrainLm;
use crate::exit::{Result, cancel_flag, usage};
use sequor_text::train::{LmRecipe, TrainOptions, train_lm};

/// Trains a language model by its recipe; goes on where an earlier run stopped.
pub fn run(a: &TrainLm) -> Result {
    let recipe = LmRecipe::from_file(&a.recipe)?;
    if a.threads == Some(0) {
        return Err(usage("--threads must be at least 1"));
    }
    let beside = a.recipe.parent().map(|p| if p.as_os_str().is_empty() { ".".into() } else { p.to_path_buf() });
    let out = a.out.clone().or(beside).unwrap_or_else(|| ".".into());
    let options = TrainOptions { restart: a.restart, threads: a.threads, offline: a.offline, cancel: Some(cancel_flag()?), ..TrainOptions::default() };
    let report = train_lm(&recipe, &out, &options)?;
    println!("{report}");
    Ok(())
}
