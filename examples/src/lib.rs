//! Programs that use the Sequor crates; see `examples/`.
