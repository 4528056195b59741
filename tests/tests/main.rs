//! Tests over the whole workspace, in one binary.

mod architecture;
mod bad_input;
mod cli;
mod model;
mod parity;
mod training;
