//! Proofs of the text systems: what `sequor reproduce` runs.
//!
//! Each proof runs its arms on the same model, prompts and seeds, one prompt after the
//! other through all arms, so that a busy moment hits them alike. Tokens per call are
//! counted up to the first repeated 8-gram of a generation
//! ([`before_repeat`](crate::prompts::before_repeat)): the loops of a small model would
//! flatter every method. What the arms measured is judged by [`sequor_eval::proof`].

mod aded;
mod bench;
mod decode;
mod first;
mod heads;
mod hydra;
mod transfer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sequor_eval::proof::Outcome;
use sequor_eval::systems::System;
use sequor_nn::device::DType;

use crate::{Error, LoadOptions, Result};
use bench::Bench;

/// The systems that have a proof here.
pub const BUILT: [u32; 4] = [15, 19, 23, 27];

/// How a proof is run.
#[derive(Clone, Debug)]
pub struct ReproduceOptions {
    /// Few prompts and short answers: a minute or two, and preliminary verdicts.
    pub quick: bool,
    /// Trains the heads that the proof needs first, into `heads/` below `out`, on a corpus
    /// that the model writes (hours on a few cores; a few minutes and poor heads with
    /// `quick`).
    pub train: bool,
    /// Folder of the results.
    pub out: PathBuf,
    /// File of prompts; Spec-Bench where it is found, else the bundled ones when absent.
    pub prompts: Option<PathBuf>,
    /// The model: a name or a path. Heads are found by its fingerprint.
    pub model: String,
    /// Number format and threads of the arms that are timed.
    pub load: LoadOptions,
    /// Never use the network.
    pub offline: bool,
    /// What was typed, for the record.
    pub command: String,
    /// Ends the run when it becomes true; nothing is written then.
    pub cancel: Arc<AtomicBool>,
}

impl Default for ReproduceOptions {
    fn default() -> Self {
        Self {
            quick: false,
            train: false,
            out: PathBuf::from("docs/results"),
            prompts: None,
            model: "smollm2".to_owned(),
            load: LoadOptions {
                weights: DType::Bf16.into(),
                ..LoadOptions::default()
            },
            offline: false,
            command: String::new(),
            cancel: Arc::default(),
        }
    }
}

/// Checks that there is a proof of this system.
///
/// # Errors
/// [`Error::Input`] naming those that there are.
pub fn check(system: u32) -> Result<()> {
    if BUILT.contains(&system) {
        return Ok(());
    }
    let built: Vec<String> = BUILT
        .iter()
        .map(|&n| format!("{n} ({})", System::find(n).map_or("", |s| s.name)))
        .collect();
    let what = match System::find(system) {
        Some(s) => format!("system {system} ({}) is not built yet", s.name),
        None => format!("there is no system {system}: they are numbered from 1 to 51"),
    };
    Err(Error::Input(format!(
        "{what}; built are {}",
        built.join(", ")
    )))
}

/// Runs the proof of `system` and writes its files into [`ReproduceOptions::out`]; `say` is
/// told about progress. A claim that does not hold is a result, not an error.
///
/// # Errors
/// [`Error::Input`] for a system without a proof here and when heads are missing that it
/// needs; [`Error::Cancelled`]; when the model fails or a file cannot be written.
pub fn reproduce(
    system: u32,
    options: &ReproduceOptions,
    say: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    check(system)?;
    let mut bench = Bench::open(options, say)?;
    match system {
        15 => aded::run(&mut bench, say),
        19 => transfer::run(&mut bench, say),
        23 => hydra::run(&mut bench, say),
        _ => first::run(&mut bench, say),
    }
}

#[cfg(test)]
mod tests;
