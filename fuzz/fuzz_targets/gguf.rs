//! A GGUF file: metadata, vocabulary, tensors under both kinds of names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sequor_fuzz::{limits, read_all};
use sequor_nn::weights::{Gguf, hugging_face_names};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Gguf::from_bytes(bytes.to_vec(), "fuzz.gguf", &limits()) else {
        return;
    };
    let _ = file.architecture();
    let _ = file.vocab_fields();
    read_all(&file);
    if let Ok(renamed) = hugging_face_names(file) {
        read_all(&renamed);
    }
});
