#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bytes;
mod chat;
mod config;
mod definition;
mod error;
mod gguf;
mod guard;
mod load;
mod pieces;
mod python;
mod sandbox;
mod split;
mod stop;
mod stream;
mod strftime;
mod tokenizer;
mod train;

#[cfg(test)]
mod tests;

pub use chat::{ChatOptions, ChatTemplate, Message};
pub use error::{Error, Result};
pub use gguf::GgufVocab;
pub use split::Split;
pub use stop::StopMatcher;
pub use stream::DecodeStream;
pub use tokenizer::Tokenizer;
pub use train::{BpeOptions, train_bpe};
