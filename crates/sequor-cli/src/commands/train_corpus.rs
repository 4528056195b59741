//! `sequor train corpus`.

use super::model::{load_options, resolve};
use crate::args::TrainCorpus;
use crate::exit::{Result, cancel_flag};
use sequor_text::TextPipeline;
use sequor_text::train::distill::{DistillCorpus, DistillOptions, distill};
use std::time::Instant;

/// Lets a model write a corpus; goes on where an earlier run stopped.
pub fn run(a: &TrainCorpus) -> Result {
    let loading = load_options(&a.model)?;
    let options = DistillOptions {
        tokens: a.tokens,
        answer: a.answer,
        seed: a.seed,
    };
    let cancel = cancel_flag()?;
    let pipeline = TextPipeline::load(&resolve(&a.model.model, a.model.offline)?, &loading)?;
    let start = Instant::now();
    let mut progress = |done: usize| {
        eprintln!(
            "{done} of {} tokens, {:.0} s",
            a.tokens,
            start.elapsed().as_secs_f64()
        );
    };
    distill(&pipeline, &a.out, &options, &mut progress, &cancel)?;
    let corpus = DistillCorpus::open(&a.out)?;
    println!(
        "{}: {} sequences, {} tokens",
        a.out.display(),
        corpus.sequences(),
        corpus.tokens()
    );
    Ok(())
}
