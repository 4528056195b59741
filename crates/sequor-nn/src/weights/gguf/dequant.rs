//! Expands ggml's quantised blocks to `f32` tensors.

use sequor_kernels::blocks;
use sequor_kernels::bridge;
use tch::{Device, Kind, Tensor};

use super::super::source::SourceDtype;
use crate::error::{Error, Result};

/// Below this many elements a second thread costs more than it saves.
const PARALLEL_ELEMENTS: usize = 1 << 18;

/// Elements expanded at a time: they stay in the cache until they are copied
/// into the tensor, and libtorch copies so few without threads of its own.
const CHUNK: usize = 1 << 14;

/// Expands stored blocks of `(elements, bytes)` each into an `f32` tensor.
pub(super) fn tensor(
    dtype: &SourceDtype,
    (elements, block_bytes): (u64, u64),
    bytes: &[u8],
    shape: &[i64],
) -> Result<Tensor> {
    let (elements, block_bytes) = (elements as usize, block_bytes as usize);
    let blocks = bytes.len() / block_bytes;
    let flat = Tensor::f_empty([(blocks * elements) as i64], (Kind::Float, Device::Cpu))?;
    let threads = match usize::try_from(tch::get_num_threads()) {
        Ok(threads) if blocks * elements >= PARALLEL_ELEMENTS => threads.max(1),
        _ => 1,
    };
    let share = blocks.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (i, bytes) in bytes.chunks(share * block_bytes).enumerate() {
            let len = bytes.len() / block_bytes * elements;
            let part = flat.f_narrow(0, (i * share * elements) as i64, len as i64)?;
            let work = move || fill(dtype, elements, block_bytes, bytes, &part);
            if threads == 1 {
                work()?;
                continue;
            }
            let worker = std::thread::Builder::new().spawn_scoped(scope, work);
            workers.push(worker.map_err(|e| failed(&e.to_string()))?);
        }
        for worker in workers {
            worker
                .join()
                .map_err(|_| failed("a thread ended early"))??;
        }
        Ok::<(), Error>(())
    })?;
    Ok(flat.f_reshape(shape)?)
}

fn failed(message: &str) -> Error {
    Error::Backend {
        op: "dequantisation".to_owned(),
        message: message.to_owned(),
    }
}

/// Expands `bytes` into the flat tensor `out`, chunk by chunk.
fn fill(
    dtype: &SourceDtype,
    elements: usize,
    block_bytes: usize,
    bytes: &[u8],
    out: &Tensor,
) -> Result<()> {
    let mut buffer = vec![0f32; CHUNK];
    let mut at = 0;
    for bytes in bytes.chunks(CHUNK / elements * block_bytes) {
        let len = bytes.len() / block_bytes * elements;
        let values = &mut buffer[..len];
        if !expand(dtype, bytes, values) {
            return Err(failed("not a quantised dtype"));
        }
        let values =
            bridge::from_slice(values, &[len as i64]).map_err(|e| failed(&e.to_string()))?;
        out.f_narrow(0, at, len as i64)?.f_copy_(&values)?;
        at += len as i64;
    }
    Ok(())
}

/// Expands whole blocks. Returns `false` when `dtype` is not a quantised one or
/// the two lengths do not belong together.
pub(super) fn expand(dtype: &SourceDtype, bytes: &[u8], out: &mut [f32]) -> bool {
    dtype
        .block_type()
        .is_some_and(|blocks| blocks::expand(blocks, bytes, out))
}
