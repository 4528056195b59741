#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod config;
pub mod distribution;
pub mod draft;
pub mod error;
pub mod generate;
pub mod mirostat;
mod nn_state;
pub mod processors;
pub mod state;
pub mod stats;
pub mod target;
pub mod tree;
pub mod verify;

#[cfg(test)]
mod tests;

pub use config::{GenerationConfig, TokenIds};
pub use distribution::{Categorical, Law};
pub use draft::{
    DraftModel, Drafter, Expander, Jacobi, Lookahead, PromptLookup, StaticTree, Topology, Trigram,
    grow,
};
pub use error::{Error, Result};
pub use generate::{
    DepthPolicy, Event, FinishReason, Generation, Generator, Options, Report, Request, RowCost,
    Session, generate_batch,
};
pub use processors::{LogitsProcessor, Processor, ProcessorList};
pub use sequor_kernels::rng::{Key, Purpose, Stream};
pub use state::SequenceState;
pub use target::{Layout, LogitRows, Logits, Output, Step, TargetModel};
pub use tree::{DraftTree, Proposal};
pub use verify::{Acceptance, NeighbourTable, Neighbours};
