#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub use sequor_backbone as backbone;
pub use sequor_data as data;
pub use sequor_nn as nn;
pub use sequor_sampling as sampling;
#[cfg(feature = "text")]
pub use sequor_text as text;
#[cfg(feature = "text")]
pub use sequor_tokenizers as tokenizers;

pub mod auto;
