#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod draw;
mod error;
mod hash;
pub mod proof;
pub mod systems;
pub mod text;

pub use error::{Error, Result};
pub use hash::{sha256_bytes, sha256_file, weights_sha256};
/// Chi-square, total variation and Kolmogorov-Smirnov: does a sampler follow its law?
pub use sequor_sampling::stats;
