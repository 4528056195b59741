#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod codebook;
pub mod config;
mod dropout;
mod error;
mod estimator;
mod fsq;
mod grouped;
mod kmeans;
mod layout;
mod levels;
mod lfq;
mod math;
mod multiscale;
pub mod names;
mod projection;
mod quantizer;
mod residual;
mod residual_fsq;
mod rows;
mod search;
mod usage;
mod vector;

#[cfg(test)]
mod tests;

pub use codebook::Codebook;
pub use config::{Average, Distance, Entropy, Learning, Restart, Threshold};
pub use error::{Error, Result};
pub use estimator::{Estimator, rotate, straight_through};
pub use fsq::{Fsq, FsqConfig};
pub use grouped::{GroupedResidualVq, GroupedResidualVqConfig};
pub use kmeans::{Clusters, kmeans};
pub use layout::{channels_first, channels_last};
pub use lfq::{Lfq, LfqConfig};
pub use multiscale::{Features, MultiScaleVq, MultiScaleVqConfig};
pub use quantizer::{Encoded, Quantizer, StageLoss, Trained, part_key};
pub use residual::{ResidualVq, ResidualVqConfig};
pub use residual_fsq::{ResidualFsq, ResidualFsqConfig};
/// Randomness is keyed: a seed and the number of the training step.
pub use sequor_kernels::rng::Key;
pub use usage::Usage;
pub use vector::{VectorQuantizer, VqConfig};
