//! What the targets share.

use sequor_nn::weights::{Limits, TensorSource};

/// Tensors larger than this are described but not read.
const MAX_TENSOR: u64 = 1 << 20;
/// Tensors read from one file.
const MAX_TENSORS: usize = 64;

/// Limits that keep one run within the memory that a fuzzer allows.
pub fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_header_bytes = 1 << 20;
    limits.max_tensors = 1 << 12;
    limits.max_metadata_string = 1 << 16;
    limits.max_array_len = 1 << 16;
    limits.max_expanded_bytes = 1 << 20;
    limits
}

/// Does with a file what a loader does: lists it, then reads tensors. What is
/// listed must be described, and what is read must be as it was described.
pub fn read_all(source: &dyn TensorSource) {
    let _ = source.metadata();
    for name in source.names().into_iter().take(MAX_TENSORS) {
        let Some(info) = source.info(&name) else {
            panic!("{name} is listed and not described");
        };
        let small = info.numel().unsigned_abs().saturating_mul(8) <= MAX_TENSOR;
        if info.bytes <= MAX_TENSOR
            && small
            && let Ok(tensor) = source.load(&name)
        {
            assert_eq!(tensor.size(), info.shape, "{name}");
        }
    }
}
