//! ggml's quantised blocks: numbers to blocks and back.
//!
//! A block stores one or two half-precision scales and a few bits per element;
//! the K types group eight or sixteen sub-blocks with their own small integer
//! scales under one super-block of 256. Each function below states its layout
//! as `(bytes: content)` and the value of an element `q`. Products are rounded
//! in the same order as in ggml, so that results agree bit for bit.

use half::f16;

/// A type of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 32 elements, 4 bits, scale.
    Q4_0,
    /// 32 elements, 4 bits, scale and minimum.
    Q4_1,
    /// 32 elements, 5 bits, scale.
    Q5_0,
    /// 32 elements, 5 bits, scale and minimum.
    Q5_1,
    /// 32 elements, 8 bits, scale.
    Q8_0,
    /// 256 elements, 4 bits, 6-bit scales and minima.
    Q4K,
    /// 256 elements, 5 bits, 6-bit scales and minima.
    Q5K,
    /// 256 elements, 6 bits, 8-bit scales.
    Q6K,
}

impl BlockType {
    /// Elements and bytes of one block.
    #[must_use]
    pub const fn size(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }
}

/// Expands whole blocks. Returns `false`, with `out` in an unknown state, when the two
/// lengths do not belong together.
#[must_use]
pub fn expand(blocks: BlockType, bytes: &[u8], out: &mut [f32]) -> bool {
    match blocks {
        BlockType::Q4_0 => each(bytes, out, q4_0),
        BlockType::Q4_1 => each(bytes, out, q4_1),
        BlockType::Q5_0 => each(bytes, out, q5_0),
        BlockType::Q5_1 => each(bytes, out, q5_1),
        BlockType::Q8_0 => each(bytes, out, q8_0),
        BlockType::Q4K => each(bytes, out, q4_k),
        BlockType::Q5K => each(bytes, out, q5_k),
        BlockType::Q6K => each(bytes, out, q6_k),
    }
}

/// Quantises finite numbers to whole blocks of a type that can be made here (`Q8_0`,
/// `Q4_0`, `Q4_1`, `Q4K`). `None` for another type, a length that is not whole blocks, or
/// numbers that are not finite or too large for a half-precision scale.
#[must_use]
pub fn quantise(blocks: BlockType, values: &[f32]) -> Option<Vec<u8>> {
    if !values.iter().all(|x| x.is_finite()) {
        return None;
    }
    let bytes = match blocks {
        BlockType::Q8_0 => each_back(values, to_q8_0),
        BlockType::Q4_0 => each_back(values, to_q4_0),
        BlockType::Q4_1 => each_back(values, to_q4_1),
        BlockType::Q4K => each_back(values, to_q4_k),
        _ => None,
    }?;
    let (_, size) = blocks.size();
    let halves = match blocks {
        BlockType::Q8_0 | BlockType::Q4_0 => 1,
        _ => 2,
    };
    let finite = bytes
        .chunks_exact(size)
        .all(|block| (0..halves).all(|i| half_at(block, 2 * i).is_finite()));
    finite.then_some(bytes)
}

fn each_back<const B: usize, const N: usize>(
    values: &[f32],
    block: impl Fn(&[f32; N]) -> [u8; B],
) -> Option<Vec<u8>> {
    let (groups, rest) = values.as_chunks::<N>();
    if !rest.is_empty() {
        return None;
    }
    Some(groups.iter().flat_map(block).collect())
}

/// `1 / x`, or 0 for 0.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.recip() }
}

/// Scale `max |x| / 127`, elements to the nearest.
fn to_q8_0(x: &[f32; 32]) -> [u8; 34] {
    let d = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = inverse(d);
    let mut block = [0; 34];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (q, v) in block[2..].iter_mut().zip(x) {
        *q = ((v * inverse).round() as i8).cast_unsigned();
    }
    block
}

/// Two groups of sixteen nibbles in sixteen bytes.
fn nibbles(q: &[u8; 32], out: &mut [u8]) {
    for (i, byte) in out.iter_mut().enumerate().take(16) {
        *byte = q[i] | (q[i + 16] << 4);
    }
}

/// The scale takes the element that is largest in size, with its sign, to -8.
fn to_q4_0(x: &[f32; 32]) -> [u8; 18] {
    let most = x
        .iter()
        .fold(0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let d = most / -8.0;
    let inverse = inverse(d);
    let mut block = [0; 18];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let q = x.map(|v| ((v * inverse + 8.5) as u8).min(15));
    nibbles(&q, &mut block[2..]);
    block
}

/// Scale and minimum take the extremes to 0 and 15.
fn to_q4_1(x: &[f32; 32]) -> [u8; 20] {
    let min = x.iter().fold(f32::INFINITY, |m, &v| m.min(v));
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let d = (max - min) / 15.0;
    let inverse = inverse(d);
    let mut block = [0; 20];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    let q = x.map(|v| (((v - min) * inverse + 0.5) as u8).min(15));
    nibbles(&q, &mut block[4..]);
    block
}

/// Scale and minimum (not negative; the value of `q` is `scale q - minimum`) of a
/// sub-block of a K type: of several roundings, each with the scale and the minimum that
/// fit it best, the one with the smallest squared error, where large elements count more.
fn scale_and_minimum(x: &[f32]) -> (f32, f32) {
    let n = x.len() as f32;
    let size = (x.iter().map(|v| v * v).sum::<f32>() / n).sqrt();
    let weight = |v: f32| size + v.abs();
    let low = x.iter().fold(0f32, |m, &v| m.min(v));
    let high = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    if high <= low {
        return (0.0, -low);
    }
    let round = |inverse: f32, min: f32, v: f32| ((v - min) * inverse).round().clamp(0.0, 15.0);
    let error = |scale: f32, min: f32| -> f32 {
        let inverse = inverse(scale);
        let off = |v: f32| scale * round(inverse, min, v) + min - v;
        x.iter().map(|&v| weight(v) * off(v) * off(v)).sum()
    };
    let mut best = ((high - low) / 15.0, low);
    let mut least = error(best.0, best.1);
    for step in 0..=20 {
        let inverse = (14.0 + 0.1 * step as f32) / (high - low);
        // Weighted least squares of x against the rounded q.
        let (mut w, mut wq, mut wqq, mut wx, mut wqx) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for &v in x {
            let (q, a) = (round(inverse, low, v), weight(v));
            (w, wq, wqq) = (w + a, wq + a * q, wqq + a * q * q);
            (wx, wqx) = (wx + a * v, wqx + a * q * v);
        }
        let determinant = w * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (w * wqx - wx * wq) / determinant;
        let mut min = (wqq * wx - wq * wqx) / determinant;
        if min > 0.0 {
            (scale, min) = (wqx / wqq, 0.0);
        }
        let found = error(scale, min);
        if scale > 0.0 && found < least {
            (best, least) = ((scale, min), found);
        }
    }
    (best.0, -best.1)
}

fn to_q4_k(x: &[f32; 256]) -> [u8; 144] {
    let (parts, _) = x.as_chunks::<32>();
    let fits: Vec<(f32, f32)> = parts.iter().map(|p| scale_and_minimum(p)).collect();
    let most = |f: fn(&(f32, f32)) -> f32| fits.iter().map(f).fold(0f32, f32::max);
    let (d, dmin) = (most(|f| f.0) / 63.0, most(|f| f.1) / 63.0);
    let (inverse_d, inverse_min) = (inverse(d), inverse(dmin));
    let mut block = [0; 144];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(dmin).to_le_bytes());
    for (j, &(scale, min)) in fits.iter().enumerate() {
        let scale = ((scale * inverse_d).round() as u8).min(63);
        let min = ((min * inverse_min).round() as u8).min(63);
        let packed = &mut block[4..16];
        if j < 4 {
            packed[j] = scale;
            packed[j + 4] = min;
        } else {
            packed[j + 4] = (scale & 15) | ((min & 15) << 4);
            packed[j - 4] |= (scale >> 4) << 6;
            packed[j] |= (min >> 4) << 6;
        }
    }
    // Elements against the scales as they were stored.
    let (d, dmin) = (half_at(&block, 0), half_at(&block, 2));
    for (j, part) in parts.iter().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let inverse = inverse(scale);
        for (i, v) in part.iter().enumerate() {
            let q = ((v + min) * inverse).round().clamp(0.0, 15.0) as u8;
            block[16 + 32 * (j / 2) + i] |= q << (4 * (j % 2));
        }
    }
    block
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
