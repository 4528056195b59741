#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod error;
pub mod text;

pub use error::{Error, Result};
/// Chi-square, total variation and Kolmogorov-Smirnov: does a sampler follow its law?
pub use sequor_sampling::stats;
