//! Finding the heads that a proof needs, or training them.

use std::path::{Path, PathBuf};

use sequor_backbone::heads::HeadsKind;

use super::bench::{Bench, SEED};
use crate::train::distill::{DistillCorpus, DistillOptions, distill};
use crate::train::heads::{HeadsRecipe, HeadsRun, TOP1, train_heads};
use crate::train::router::{self, RouterRecipe};
use crate::train::transfer::{TransferRecipe, train_transfer};
use crate::{Error, Result, drafting};

/// Tokens of the corpus of a short run, and minutes of training per kind.
const QUICK: (usize, f64) = (20_000, 1.0);

/// The folder of the heads of this kind for the model, with its name.
///
/// # Errors
/// [`Error::Input`] saying how to train them when there are none.
pub(super) fn find(
    bench: &Bench<'_>,
    kind: HeadsKind,
    say: &mut dyn FnMut(&str),
) -> Result<(String, PathBuf)> {
    let folder = if bench.options.train {
        train(bench, kind, say)?
    } else {
        let found = drafting::find(&bench.resolver(), None, kind.name(), bench.pipeline.model());
        found.map_err(|e| match e {
            Error::Input(why) => Error::Input(format!("{why}; or run this with --train")),
            e => e,
        })?
    };
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    Ok((name.into_owned(), folder))
}

/// Trains heads into the folder of the results. What an earlier, interrupted run left there
/// is taken up again.
fn train(bench: &Bench<'_>, kind: HeadsKind, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let command = format!(
        "sequor train heads --kind {} --model {}",
        kind.name(),
        bench.model_name
    );
    let quick = bench.options.quick;
    let work = bench.options.out.join("heads");
    let folder = work.join(format!("{}-{}", bench.model_name, kind.name()));
    let corpus_dir = work.join(if quick { "corpus-quick" } else { "corpus" });
    let corpus = corpus(bench, &corpus_dir, say)?;
    say(&format!(
        "training {} heads in {}",
        kind.name(),
        folder.display()
    ));
    let run = HeadsRun {
        base: bench.model_name.clone(),
        resume: true,
        minutes: quick.then_some(QUICK.1),
        threads: bench.options.load.threads,
        command,
        ..HeadsRun::default()
    };
    let exact = bench.exact()?;
    let (model, cancel) = (exact.model(), &*bench.options.cancel);
    match kind {
        HeadsKind::Router => {
            let mut bar = sequor_train::Bar::new(router::HELD_OUT_LOSS);
            let recipe = RouterRecipe::default();
            let path = &bench.model_path;
            router::train_router(path, &corpus, &folder, &recipe, &run, &mut bar, cancel)?;
        }
        HeadsKind::HiddenTransfer => {
            let mut bar = sequor_train::Bar::new(TOP1);
            let recipe = TransferRecipe::new(model.config());
            train_transfer(model, &corpus, &recipe, &folder, &run, &mut bar, cancel)?;
        }
        kind => {
            let mut bar = sequor_train::Bar::new(TOP1);
            let recipe = HeadsRecipe::new(kind);
            train_heads(model, &corpus, &recipe, &folder, &run, &mut bar, cancel)?;
        }
    }
    Ok(folder)
}

fn corpus(bench: &Bench<'_>, dir: &Path, say: &mut dyn FnMut(&str)) -> Result<DistillCorpus> {
    let tokens = if bench.options.quick {
        QUICK.0
    } else {
        DistillOptions::default().tokens
    };
    say(&format!(
        "writing a corpus of {tokens} tokens in {}",
        dir.display()
    ));
    let options = DistillOptions {
        tokens,
        seed: SEED,
        ..DistillOptions::default()
    };
    let mut told = |done: usize| say(&format!("{done} tokens"));
    distill(
        &bench.pipeline,
        dir,
        &options,
        &mut told,
        &bench.options.cancel,
    )?;
    DistillCorpus::open(dir)
}
