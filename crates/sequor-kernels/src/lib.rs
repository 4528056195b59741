#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod bandwidth;
pub mod bridge;
pub mod cost;
pub mod cpu;
pub mod cuda;
pub mod memory;
pub mod rng;
pub mod select;
pub mod threads;
