//! A safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sequor_fuzz::{limits, read_all};
use sequor_nn::weights::Safetensors;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = Safetensors::from_bytes(bytes.to_vec(), "fuzz.safetensors", &limits()) {
        read_all(&file);
    }
});
