//! Tests over several modules.

mod decoders;
mod depth;
mod edges;
mod laws;
mod lifecycle;
mod mutations;
mod parity;
mod processors;
mod throughput;
mod toy;
mod units;
