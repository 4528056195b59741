//! A checkpoint of `torch.save`: a zip archive with a pickle.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sequor_fuzz::{limits, read_all};
use sequor_nn::weights::TorchCheckpoint;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = TorchCheckpoint::from_bytes(bytes.to_vec(), "fuzz.pt", &limits()) {
        read_all(&file);
    }
});
