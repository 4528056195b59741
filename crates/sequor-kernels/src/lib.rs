#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod bandwidth;
pub mod blocks;
pub mod bridge;
pub mod cost;
pub mod cpu;
pub mod cuda;
pub mod fused;
pub mod matmul;
pub mod memory;
pub mod rng;
pub mod select;
pub mod team;
pub mod threads;
