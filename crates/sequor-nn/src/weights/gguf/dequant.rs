//! Expands ggml's quantised blocks to `f32`.
//!
//! A block stores one or two half-precision scales and a few bits per element;
//! the K types group eight or sixteen sub-blocks with their own small integer
//! scales under one super-block of 256. Each function below states its layout
//! as `(bytes: content)` and the value of an element `q`. Products are rounded
//! in the same order as in ggml, so that results agree bit for bit.

use half::f16;
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
    match dtype {
        SourceDtype::Q4_0 => each(bytes, out, q4_0),
        SourceDtype::Q4_1 => each(bytes, out, q4_1),
        SourceDtype::Q5_0 => each(bytes, out, q5_0),
        SourceDtype::Q5_1 => each(bytes, out, q5_1),
        SourceDtype::Q8_0 => each(bytes, out, q8_0),
        SourceDtype::Q4K => each(bytes, out, q4_k),
        SourceDtype::Q5K => each(bytes, out, q5_k),
        SourceDtype::Q6K => each(bytes, out, q6_k),
        _ => false,
    }
}

/// Runs `block` over all blocks, `B` bytes to `N` elements.
fn each<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; B], &mut [f32; N]),
) -> bool {
    let (blocks, rest) = bytes.as_chunks::<B>();
    let (outs, out_rest) = out.as_chunks_mut::<N>();
    if blocks.len() != outs.len() || !rest.is_empty() || !out_rest.is_empty() {
        return false;
    }
    for (b, o) in blocks.iter().zip(outs) {
        block(b, o);
    }
    true
}

/// The half-precision number at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `(2: d) (16: nibbles)`; `d (q - 8)`. Element `i` is the low nibble of byte
/// `i`, element `16 + i` the high one; likewise in the next three.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((&byte, lo), hi) in block[2..].iter().zip(low).zip(high) {
        *lo = d * (f32::from(byte & 15) - 8.0);
        *hi = d * (f32::from(byte >> 4) - 8.0);
    }
}

/// `(2: d) (2: m) (16: nibbles)`; `d q + m`.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((&byte, lo), hi) in block[4..].iter().zip(low).zip(high) {
        *lo = d * f32::from(byte & 15) + m;
        *hi = d * f32::from(byte >> 4) + m;
    }
}

/// The 32 five-bit numbers made of nibbles and of the bits of `fifth`.
fn five_bits(fifth: [u8; 4], nibbles: &[u8], out: &mut [f32; 32], value: impl Fn(u8) -> f32) {
    let bits = u32::from_le_bytes(fifth);
    let (low, high) = out.split_at_mut(16);
    for (i, ((&byte, lo), hi)) in nibbles.iter().zip(low).zip(high).enumerate() {
        let bit = |j: usize| ((bits >> j) & 1) as u8;
        *lo = value((byte & 15) | (bit(i) << 4));
        *hi = value((byte >> 4) | (bit(i + 16) << 4));
    }
}

/// `(2: d) (4: fifth bits) (16: nibbles)`; `d (q - 16)`.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let fifth = [block[2], block[3], block[4], block[5]];
    five_bits(fifth, &block[6..], out, |q| d * (f32::from(q) - 16.0));
}

/// `(2: d) (2: m) (4: fifth bits) (16: nibbles)`; `d q + m`.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let fifth = [block[4], block[5], block[6], block[7]];
    five_bits(fifth, &block[8..], out, |q| d * f32::from(q) + m);
}

/// `(2: d) (32: signed bytes)`; `d q`.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (&q, o) in block[2..].iter().zip(out) {
        *o = d * f32::from(q.cast_signed());
    }
}

/// Scale and minimum of sub-block `j` (0..8) of a K type: 6 bits each, packed
/// in 12 bytes. The first four lie in the low six bits of bytes `0..4` and
/// `4..8`; the last four have their low nibbles in bytes `8..12` and their upper
/// two bits on top of the first four.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let low = packed[j + 4];
        (
            (low & 15) | ((packed[j - 4] >> 6) << 4),
            (low >> 4) | ((packed[j] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

/// `(2: d) (2: dmin) (12: scales, minima) (128: nibbles)`;
/// `d scale q - dmin min`. Each run of 32 bytes holds sub-block `2g` in its low
/// nibbles and sub-block `2g + 1` in its high ones.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, nibbles) = block[4..].split_at(12);
    for (g, (bytes, out)) in nibbles
        .chunks_exact(32)
        .zip(out.chunks_exact_mut(64))
        .enumerate()
    {
        let (s0, m0) = scale_and_min(packed, 2 * g);
        let (s1, m1) = scale_and_min(packed, 2 * g + 1);
        let (d0, m0, d1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        let (low, high) = out.split_at_mut(32);
        for ((&byte, lo), hi) in bytes.iter().zip(low).zip(high) {
            *lo = d0 * f32::from(byte & 15) - m0;
            *hi = d1 * f32::from(byte >> 4) - m1;
        }
    }
}

/// `(2: d) (2: dmin) (12: scales, minima) (32: fifth bits) (128: nibbles)`; as
/// `q4_k`, where bit `j` of fifth-bit byte `i` belongs to element `i` of
/// sub-block `j`.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, rest) = block[4..].split_at(12);
    let (fifth, nibbles) = rest.split_at(32);
    for (g, (bytes, out)) in nibbles
        .chunks_exact(32)
        .zip(out.chunks_exact_mut(64))
        .enumerate()
    {
        let (s0, m0) = scale_and_min(packed, 2 * g);
        let (s1, m1) = scale_and_min(packed, 2 * g + 1);
        let (d0, m0, d1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        let (low, high) = out.split_at_mut(32);
        for (((&byte, &bits), lo), hi) in bytes.iter().zip(fifth).zip(low).zip(high) {
            let bits = bits >> (2 * g);
            *lo = d0 * f32::from((byte & 15) | ((bits & 1) << 4)) - m0;
            *hi = d1 * f32::from((byte >> 4) | ((bits & 2) << 3)) - m1;
        }
    }
}

/// `(128: low nibbles) (64: upper bit pairs) (16: signed scales) (2: d)`;
/// `d scale (q - 32)`. Each half of 128 elements takes 64 nibble bytes, 32 pair
/// bytes and 8 scales; its four runs of 32 elements use the low nibbles of the
/// first and second 32 bytes, then the high nibbles of the same, with bit pair
/// 0, 1, 2, 3 of each pair byte; a scale serves 16 elements.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (lows, rest) = block.split_at(128);
    let (pairs, rest) = rest.split_at(64);
    let (scales, _) = rest.split_at(16);
    let d = half_at(block, 208);
    let halves = lows
        .chunks_exact(64)
        .zip(pairs.chunks_exact(32))
        .zip(scales.chunks_exact(8));
    for (((lows, pairs), scales), out) in halves.zip(out.chunks_exact_mut(128)) {
        for (run, out) in out.chunks_exact_mut(32).enumerate() {
            let nibbles = &lows[32 * (run % 2)..][..32];
            let (nibble_shift, pair_shift) = (4 * (run / 2), 2 * run);
            for (i, o) in out.iter_mut().enumerate() {
                let low = (nibbles[i] >> nibble_shift) & 15;
                let high = (pairs[i] >> pair_shift) & 3;
                let q = (low | (high << 4)).cast_signed() - 32;
                let scale = scales[2 * run + i / 16].cast_signed();
                *o = d * f32::from(scale) * f32::from(q);
            }
        }
    }
}
