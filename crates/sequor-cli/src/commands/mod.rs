//! One module per command.

mod bench;
mod bench_kernels;
mod bench_speculate;
mod catalog;
mod chat;
mod demo;
mod doctor;
mod eval;
mod forward;
mod generate;
mod inspect;
mod model;
mod quantize;
mod reproduce;
mod systems;
mod train;
mod train_corpus;
mod train_heads;
mod verify;

use crate::args::{Bench, CatalogKind, Command, Eval, Generate, Train};
use crate::exit::Result;

/// Runs a command.
pub fn run(command: Command) -> Result {
    // A wrong value would otherwise be one that does nothing.
    sequor_kernels::matmul::Isa::forced().map_err(crate::exit::usage)?;
    match command {
        Command::Generate(Generate::Text(a)) => generate::run(&a),
        Command::Chat(a) => chat::run(&a),
        Command::Inspect(a) => inspect::run(&a),
        Command::Quantize(a) => quantize::run(&a),
        Command::Doctor(a) => doctor::run(&a),
        Command::Forward(a) => forward::run(&a),
        Command::Bench(Bench::Decode(a)) => bench::run(&a),
        Command::Bench(Bench::Kernels(a)) => bench_kernels::run(&a),
        Command::Bench(Bench::Speculate(a)) => bench_speculate::run(&a),
        Command::Verify(a) => verify::run(&a),
        Command::Reproduce(a) => reproduce::run(&a),
        Command::Systems(a) => systems::run(&a),
        Command::Models(a) => catalog::run(CatalogKind::Models, &a),
        Command::Data(a) => catalog::run(CatalogKind::Data, &a),
        Command::Train(Train::Lm(a)) => train::run(&a),
        Command::Train(Train::Corpus(a)) => train_corpus::run(&a),
        Command::Train(Train::Heads(a)) => train_heads::run(&a),
        Command::Eval(Eval::Perplexity(a)) => eval::run(&a),
        Command::Demo(a) => demo::run(&a),
    }
}
