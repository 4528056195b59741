#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod causal_lm;
pub mod config;
pub mod decoder;
pub mod gguf;
pub mod heads;
pub mod keys;
pub mod routers;
pub mod subnetwork;
pub mod transfer;

#[cfg(test)]
mod tests;

pub use causal_lm::CausalLm;
pub use config::{DecoderConfig, Family};
pub use decoder::Decoder;
pub use subnetwork::Subnetwork;
