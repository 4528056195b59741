//! Tests of the weight files. The formats are written here by small writers of
//! the tests' own, or by independent ones (the `safetensors` and `zip` crates,
//! bytes made by PyTorch), never by the code under test.

mod fixtures;
mod gguf;
mod hostile;
mod opening;
mod quantised;
mod rename;
mod safetensors;
mod torch;
mod write;
