//! Tests over several modules.

mod decoders;
mod depth;
mod drafters;
mod edges;
mod laws;
mod lifecycle;
mod mutations;
mod parity;
mod processors;
mod relaxed;
mod throughput;
pub mod toy;
mod trigram;
mod units;
mod verifiers;
