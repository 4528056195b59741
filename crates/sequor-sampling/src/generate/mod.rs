//! The generation loop.
//!
//! A [`Sequence`] is one request as a state machine over forward passes: it says what it
//! wants evaluated ([`Sequence::plan`], [`Sequence::step`]) and takes in the result
//! ([`Sequence::absorb`]). A [`Session`] drives one of them and gives tokens as they come;
//! [`generate_batch`] drives many over one state, a forward pass for all of them; a server
//! may drive them by a schedule of its own.
//!
//! Invariant: between steps nothing is pending, and the state holds every token of the
//! sequence but the newest.

mod batch;
mod depth;
mod nodes;
mod options;
mod report;
mod sequence;
mod session;
mod walk;

pub use batch::{Request, generate_batch};
pub use depth::DepthPolicy;
pub use options::Options;
pub use report::{FinishReason, Generation, Report, RowCost};
pub use sequence::{ModelLimits, OnToken, Sequence};
pub use session::{Event, Generator, Session};
