#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod attention;
pub mod block;
pub mod device;
pub mod embedding;
mod error;
pub mod ffn;
pub mod kv;
pub mod linear;
pub mod lora;
pub mod mask;
pub mod matrix;
pub mod norm;
pub mod params;
pub mod rope;
pub mod weights;

pub use error::{Error, Result};
pub use kv::KvCache;
pub use params::{Init, MismatchReport, ParamBuilder};
/// The libtorch binding. Every other crate reaches it through here, so that one
/// version serves the whole workspace.
pub use tch;
pub use tch::{Device, Kind, Tensor};
