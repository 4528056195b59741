//! Training of language models by recipe.
//!
//! A recipe is a TOML file that says everything: data, what is held out, tokenizer,
//! network, optimisation. [`train_lm`] turns it into a model folder that every part of
//! this library can load, with the log and the picture of its training and a card of
//! measured numbers. The same recipe gives the same bytes on the same machine, also when
//! the run was interrupted.
//!
//! ```no_run
//! use sequor_text::train::{LmRecipe, LmRun, train_lm};
//!
//! let recipe = LmRecipe::from_file("models/bible-lm/recipe.toml".as_ref())?;
//! let mut bar = sequor_train::Bar::new("bits_per_byte");
//! let report = train_lm(&recipe, "out/bible-lm".as_ref(), &LmRun::default(), &mut bar, &Default::default())?;
//! println!("{:.3} bits per byte of held-out text", report.bits_per_byte);
//! # Ok::<(), sequor_text::Error>(())
//! ```

mod card;
mod conduct;
mod corpus;
pub mod distill;
pub mod heads;
mod lm;
mod recipe;
pub mod router;
mod task;
pub mod transfer;

#[cfg(test)]
mod tests;

pub use corpus::{Corpus, HeldOut};
pub use lm::{LmReport, LmRun, train_lm};
pub use recipe::{
    DataRecipe, Dtype, HeldOutRecipe, LmRecipe, ModelRecipe, OptimisationRecipe, TokenizerRecipe,
};
pub use task::LmTask;
