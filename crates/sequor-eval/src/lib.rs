#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
pub mod text;

pub use error::{Error, Result};
/// Chi-square, total variation and Kolmogorov-Smirnov: does a sampler follow its law?
pub use sequor_sampling::stats;
