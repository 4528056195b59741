//! Training of draft heads by self-distillation.
//!
//! Heads learn from a corpus that their target wrote itself
//! ([`distill`](super::distill)), with the target's states stored beside the tokens: training
//! never runs the target. Head `i` reads the state `h_n` (Hydra also the true tokens up to
//! `x_{n+1+i}`) and is taught the target's law of token `x_{n+2+i}`, which is what the frozen
//! output head makes of the stored state `h_{n+1+i}`. EAGLE's layer is taught the state
//! `h_{n+1}` as well, and reads its own predictions in part of the passes. Only the most
//! frequent tokens of the target's own text are drafted; the products with the output head
//! are most of the work, and of the cost of drafting.
//!
//! All positions of answers are learned from, a part of those of prompts (they are the
//! target's states too, but drafting happens in answers), and never the first few of a
//! sequence.

mod accuracy;
mod card;
mod data;
mod eagle;
mod folder;
mod judge;
mod recipe;
mod regress;
mod run;
mod task;

#[cfg(test)]
mod tests;

pub use super::conduct::{HeadsReport, HeadsRun};
pub use accuracy::HeadAccuracy;
pub use recipe::{HeadsRecipe, Labels};
pub use run::train_heads;
pub use sequor_backbone::heads::HeadsKind;
pub use task::TOP1;

// Shared with what is trained inside the target's own pass.
pub(super) use accuracy::Table;
pub(super) use data::{Batch, Row, Sequences, held_out, index};
pub(super) use judge::Judge;
pub(super) use task::HELD_OUT_LOSS;
