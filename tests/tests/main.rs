//! Tests over the whole workspace, in one binary.

// A test says what is wrong by panicking.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods
)]

mod architecture;
mod bad_input;
mod cli;
mod model;
mod outside;
mod parity;
mod speculative;
mod systems;
mod training;
