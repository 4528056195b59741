//! Programs that use the Sequor crates: see the folder `examples`.

#![forbid(unsafe_code)]
