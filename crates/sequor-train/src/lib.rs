#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Tests may use the forms that panic: that is how a test says what is wrong.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod checkpoint;
pub mod clip;
pub mod collective;
pub mod ema;
mod error;
mod files;
pub mod flat;
pub mod grads;
pub mod log;
pub mod optim;
pub mod plot;
pub mod progress;
pub mod schedule;
pub mod state;
pub mod trainer;

pub use collective::Collective;
pub use error::{Error, Result};
pub use optim::{AdamW, AdamWOptions};
pub use progress::{Bar, Progress, Silent};
pub use schedule::{Schedule, Shape};
pub use trainer::{Ended, MicroLoss, Outcome, StepCtx, Task, TrainOptions, Trainer, Workplace};
