#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod causal_lm;
pub mod config;
pub mod decoder;
pub mod gguf;
pub mod keys;

#[cfg(test)]
mod tests;

pub use causal_lm::CausalLm;
pub use config::{DecoderConfig, Family};
pub use decoder::Decoder;
