#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod bench;
mod drafting;
mod error;
mod forward;
mod inspect;
pub mod matrix;
mod options;
mod pipeline;
pub mod prompts;
pub mod proofs;
mod quantise;
mod score;
mod stream;
pub mod train;
pub mod verify;

pub use drafting::DraftHeads;
pub use error::{Error, Result};
pub use forward::forward;
pub use inspect::{Inspection, TensorLine, inspect};
pub use options::{Depth, HeadKind, Layers, LoadOptions, Shape, Speculate, TextOptions};
pub use pipeline::TextPipeline;
pub use quantise::{QuantiseOptions, QuantiseReport, quantise};
pub use score::Score;
pub use sequor_sampling::{Acceptance, FinishReason, Report};
pub use sequor_tokenizers::Message;
pub use stream::{Generation, TextStream};
