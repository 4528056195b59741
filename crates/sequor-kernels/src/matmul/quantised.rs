//! Products with panels of bytes and nibbles, rows taken as 8 bits.
//!
//! For each block of 32 inputs the products of bytes are summed as integers, exactly; the
//! sum is then scaled and added: `y += (dot * x_scale) * w_scale`, and where the format
//! has a minimum, `y += x_weight * minimum` with `x_weight = x_scale * sum(x_q)`.

use super::rows::{BLOCK, Int8Rows};
use super::{Format, Isa, Out, Packed, by_count, tiles};
use half::f16;

/// Outputs of a panel.
const WIDTH: usize = 16;

/// Most rows of a tile.
const TILE: usize = 8;

/// Formats as numbers, for code that is compiled for each.
const INT8: u8 = 0;
const Q8_0: u8 = 1;
const Q4_0: u8 = 2;
const Q4_1: u8 = 3;
const Q4K: u8 = 4;

/// A tile of rows and what they are multiplied with.
struct Tile {
    data: *const u8,
    q: *const i8,
    x_scale: *const f32,
    x_sum: *const i32,
    x_weight: *const f32,
    blocks: usize,
    y: *mut f32,
    stride: usize,
}

/// All rows of one panel.
pub(super) fn panel(w: &Packed, panel: usize, x: &Int8Rows<'_>, rows: usize, out: &Out, isa: Isa) {
    let data = w.panel(panel);
    assert_eq!(x.blocks, w.inputs().div_ceil(BLOCK));
    let first = panel * WIDTH;
    let there = WIDTH.min(w.outputs() - first);
    let most = match isa {
        Isa::Avx512 => TILE,
        Isa::Avx2 => 4,
        Isa::Portable => 1,
    };
    for (start, count) in tiles(rows, most) {
        let from = start * x.blocks;
        let mut spare = [0f32; TILE * WIDTH];
        let whole = there == WIDTH;
        let (y, stride) = if whole {
            // SAFETY: the rows and the 16 columns of this panel lie inside `y`, and no other
            // thread touches them.
            (
                unsafe { out.start.add(start * out.stride + first) },
                out.stride,
            )
        } else {
            (spare.as_mut_ptr(), WIDTH)
        };
        let tile = Tile {
            data: data.as_ptr(),
            q: x.q[from * BLOCK..].as_ptr(),
            x_scale: x.scale[from..].as_ptr(),
            x_sum: x.sum[from..].as_ptr(),
            x_weight: x.weight[from..].as_ptr(),
            blocks: x.blocks,
            y,
            stride,
        };
        // SAFETY: the panel holds the numbers and scales of all its blocks, the rows hold
        // `count` rows of blocks from `start` on, and `y` takes `count` rows of 16.
        unsafe {
            match w.format() {
                Format::Int8 => run::<INT8>(&tile, count, isa),
                Format::Q8_0 => run::<Q8_0>(&tile, count, isa),
                Format::Q4_0 => run::<Q4_0>(&tile, count, isa),
                Format::Q4_1 => run::<Q4_1>(&tile, count, isa),
                Format::Q4K => run::<Q4K>(&tile, count, isa),
                Format::Bf16 => unreachable!("bf16 has a product of its own"),
            }
        }
        if !whole {
            for (i, row) in spare.chunks_exact(WIDTH).enumerate().take(count) {
                // SAFETY: only the columns that are there are written.
                unsafe {
                    let to = out.start.add((start + i) * out.stride + first);
                    to.copy_from_nonoverlapping(row.as_ptr(), there);
                }
            }
        }
    }
}

/// # Safety
/// The pointers of `tile` are valid for `count` rows and all blocks; the processor has `isa`.
unsafe fn run<const F: u8>(tile: &Tile, count: usize, isa: Isa) {
    // SAFETY: as promised by the caller.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        match isa {
            Isa::Avx512 => return by_count!(count, [1 2 3 4 5 6 7 8], M => avx512::<F, M>(tile)),
            Isa::Avx2 => {
                by_count!(count, [1 2 3 4], M => avx2::<F, M>(tile, 0));
                by_count!(count, [1 2 3 4], M => avx2::<F, M>(tile, 1));
                return;
            }
            Isa::Portable => {}
        }
        let _ = isa;
        for row in 0..count {
            portable::<F>(tile, row);
        }
    }
}

/// Bytes of the numbers of one block of a panel.
const fn group<const F: u8>() -> usize {
    match F {
        INT8 | Q8_0 => 512,
        _ => 256,
    }
}

/// Does an element have a minimum added?
const fn has_minimum<const F: u8>() -> bool {
    F == Q4_1 || F == Q4K
}

/// Where the dot product starts, in sums of `q`: what was added to the numbers when they
/// were packed is taken off again.
const fn offset<const F: u8>() -> i32 {
    match F {
        INT8 | Q8_0 => -128,
        Q4_0 => -8,
        _ => 0,
    }
}

/// Bytes of the scales of one block of a panel (of a super-block, for `q4_k`).
const fn scale_bytes<const F: u8>() -> usize {
    match F {
        Q8_0 | Q4_0 => 32,
        Q4_1 => 64,
        _ => 256,
    }
}

/// Where the numbers of block `b` of a panel begin.
const fn numbers_of<const F: u8>(b: usize) -> usize {
    match F {
        INT8 => b * group::<F>(),
        Q4K => b / 8 * (8 * group::<F>() + scale_bytes::<F>()) + b % 8 * group::<F>(),
        _ => b * (group::<F>() + scale_bytes::<F>()),
    }
}

/// Where the scales of block `b` of `blocks` begin (of its super-block, for `q4_k`).
const fn scales_of<const F: u8>(b: usize, blocks: usize) -> usize {
    match F {
        INT8 => blocks * group::<F>(),
        Q4K => numbers_of::<F>(b / 8 * 8) + 8 * group::<F>(),
        _ => numbers_of::<F>(b) + group::<F>(),
    }
}

/// Scale and minimum of output `o` in block `b`.
///
/// # Safety
/// `scales` is where the scales of that block begin.
unsafe fn scale_of<const F: u8>(scales: *const u8, b: usize, o: usize) -> (f32, f32) {
    // SAFETY: as promised by the caller; the entries stand as `Packed` describes.
    unsafe {
        let half = |entry: usize| {
            let p = scales.add((entry * WIDTH + o) * 2);
            f16::from_le_bytes([*p, *p.add(1)]).to_f32()
        };
        match F {
            Q8_0 | Q4_0 => (half(0), 0.0),
            Q4_1 => (half(0), half(1)),
            Q4K => {
                let j = b % 8;
                let packed = |i: usize| *scales.add(64 + i * WIDTH + o);
                let (scale, min) = if j < 4 {
                    (packed(j) & 63, packed(j + 4) & 63)
                } else {
                    (
                        (packed(j + 4) & 15) | ((packed(j - 4) >> 6) << 4),
                        (packed(j + 4) >> 4) | ((packed(j) >> 6) << 4),
                    )
                };
                let (d, dmin) = (half(0), half(1));
                (d * f32::from(scale), -(dmin * f32::from(min)))
            }
            _ => {
                let p = scales.add(o * 4);
                (
                    f32::from_le_bytes([*p, *p.add(1), *p.add(2), *p.add(3)]),
                    0.0,
                )
            }
        }
    }
}

/// # Safety
/// As `run`, for one row.
unsafe fn portable<const F: u8>(t: &Tile, row: usize) {
    // SAFETY: as promised by the caller.
    unsafe {
        for o in 0..WIDTH {
            let mut y = 0f32;
            for b in 0..t.blocks {
                let block = row * t.blocks + b;
                let x = t.q.add(block * BLOCK);
                let numbers = t.data.add(numbers_of::<F>(b));
                let mut dot = offset::<F>() * *t.x_sum.add(block);
                for l in 0..group::<F>() / WIDTH {
                    let byte = *numbers.add(l / 4 * 64 + o * 4 + l % 4);
                    if group::<F>() == 512 {
                        dot += i32::from(byte) * i32::from(*x.add(l));
                    } else {
                        dot += i32::from(byte & 15) * i32::from(*x.add(l));
                        dot += i32::from(byte >> 4) * i32::from(*x.add(l + 16));
                    }
                }
                let value = dot as f32;
                if F == INT8 {
                    y = value.mul_add(*t.x_scale.add(block), y);
                    continue;
                }
                let scales = t.data.add(scales_of::<F>(b, t.blocks));
                let (scale, minimum) = scale_of::<F>(scales, b, o);
                y = (value * *t.x_scale.add(block)).mul_add(scale, y);
                if has_minimum::<F>() {
                    y = (*t.x_weight.add(block)).mul_add(minimum, y);
                }
            }
            if F == INT8 {
                y *= scale_of::<F>(t.data.add(scales_of::<F>(0, t.blocks)), 0, o).0;
            }
            t.y.add(row * t.stride + o).write(y);
        }
    }
}

/// # Safety
/// As `run`, for `M` rows and a processor with AVX-512 and VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn avx512<const F: u8, const M: usize>(t: &Tile) {
    use std::arch::x86_64::*;
    /// Bytes that are asked for ahead.
    const AHEAD: usize = 2048;
    let mut y = [_mm512_setzero_ps(); M];
    let low_nibbles = _mm512_set1_epi8(15);
    // SAFETY: all addresses lie within what the caller promised; a prefetch may point
    // anywhere.
    unsafe {
        let halves = |p: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        let mut expanded = [[[0f32; WIDTH]; 2]; 8];
        for b in 0..t.blocks {
            if F == Q4K && b % 8 == 0 {
                expand_scales(t.data.add(scales_of::<F>(b, t.blocks)), &mut expanded);
            }
            let w = t.data.add(numbers_of::<F>(b));
            let scales = t.data.add(scales_of::<F>(b, t.blocks));
            let mut dot = [_mm512_setzero_si512(); M];
            if offset::<F>() != 0 {
                for (i, dot) in dot.iter_mut().enumerate() {
                    *dot = _mm512_set1_epi32(offset::<F>() * *t.x_sum.add(i * t.blocks + b));
                }
            }
            let four = |i: usize, l: usize| {
                let p = t.q.add((i * t.blocks + b) * BLOCK + l * 4).cast::<i32>();
                _mm512_set1_epi32(p.read_unaligned())
            };
            for l in 0..group::<F>() / 64 {
                let bytes = _mm512_loadu_si512(w.add(l * 64).cast());
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + l * 64).cast());
                if group::<F>() == 512 {
                    for (i, dot) in dot.iter_mut().enumerate() {
                        *dot = _mm512_dpbusd_epi32(*dot, bytes, four(i, l));
                    }
                } else {
                    let low = _mm512_and_si512(bytes, low_nibbles);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low_nibbles);
                    for (i, dot) in dot.iter_mut().enumerate() {
                        *dot = _mm512_dpbusd_epi32(*dot, low, four(i, l));
                        *dot = _mm512_dpbusd_epi32(*dot, high, four(i, l + 4));
                    }
                }
            }
            let (scale, minimum) = match F {
                Q8_0 | Q4_0 => (halves(scales), _mm512_setzero_ps()),
                Q4_1 => (halves(scales), halves(scales.add(32))),
                Q4K => {
                    let [scale, minimum] = &expanded[b % 8];
                    (
                        _mm512_loadu_ps(scale.as_ptr()),
                        _mm512_loadu_ps(minimum.as_ptr()),
                    )
                }
                _ => (_mm512_setzero_ps(), _mm512_setzero_ps()),
            };
            for i in 0..M {
                let at = i * t.blocks + b;
                let value = _mm512_cvtepi32_ps(dot[i]);
                let x_scale = _mm512_set1_ps(*t.x_scale.add(at));
                if F == INT8 {
                    y[i] = _mm512_fmadd_ps(value, x_scale, y[i]);
                    continue;
                }
                y[i] = _mm512_fmadd_ps(_mm512_mul_ps(value, x_scale), scale, y[i]);
                if has_minimum::<F>() {
                    let weight = _mm512_set1_ps(*t.x_weight.add(at));
                    y[i] = _mm512_fmadd_ps(weight, minimum, y[i]);
                }
            }
        }
        for (i, y) in y.into_iter().enumerate() {
            let y = if F == INT8 {
                _mm512_mul_ps(
                    y,
                    _mm512_loadu_ps(t.data.add(scales_of::<F>(0, t.blocks)).cast()),
                )
            } else {
                y
            };
            _mm512_storeu_ps(t.y.add(i * t.stride), y);
        }
    }
}

/// Scales and minima (negated) of the eight sub-blocks of a `q4_k` super-block. Apart from
/// the loop that uses them, which would lose its registers to it.
///
/// # Safety
/// `scales` points to the 256 bytes of a super-block; the processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
#[inline(never)]
unsafe fn expand_scales(scales: *const u8, out: &mut [[[f32; WIDTH]; 2]; 8]) {
    use std::arch::x86_64::*;
    // SAFETY: all addresses lie within what the caller promised, and within `out`.
    unsafe {
        let halves = |p: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        let (d, dmin) = (halves(scales), halves(scales.add(32)));
        for (j, [scale, minimum]) in out.iter_mut().enumerate() {
            let (s, m) = six_bits(scales.add(64), j);
            let number = |v: __m128i| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v));
            _mm512_storeu_ps(scale.as_mut_ptr(), _mm512_mul_ps(d, number(s)));
            let m = _mm512_mul_ps(dmin, number(m));
            _mm512_storeu_ps(minimum.as_mut_ptr(), _mm512_sub_ps(_mm512_set1_ps(-0.0), m));
        }
    }
}

/// The 6-bit scales and minima of sub-block `j` of 16 outputs.
///
/// # Safety
/// `packed` points to 12 groups of 16 bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.1")]
#[inline]
unsafe fn six_bits(
    packed: *const u8,
    j: usize,
) -> (std::arch::x86_64::__m128i, std::arch::x86_64::__m128i) {
    use std::arch::x86_64::*;
    // SAFETY: `j` is below 8, so that all groups are among the twelve.
    unsafe {
        let group = |i: usize| _mm_loadu_si128(packed.add(i * 16).cast());
        let mask = |v: __m128i, bits: i8| _mm_and_si128(v, _mm_set1_epi8(bits));
        if j < 4 {
            return (mask(group(j), 63), mask(group(j + 4), 63));
        }
        let top = |v: __m128i| mask(_mm_srli_epi16::<2>(v), 0x30);
        let both = group(j + 4);
        let scale = _mm_or_si128(mask(both, 15), top(group(j - 4)));
        let min = _mm_or_si128(mask(_mm_srli_epi16::<4>(both), 15), top(group(j)));
        (scale, min)
    }
}

/// Eight of the sixteen outputs.
///
/// # Safety
/// As `run`, for `M` rows and a processor with AVX2, fused multiply-add and conversions of
/// half precision; `half` is 0 or 1.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const F: u8, const M: usize>(t: &Tile, half: usize) {
    use std::arch::x86_64::*;
    let mut y = [_mm256_setzero_ps(); M];
    let low_nibbles = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        let halves = |p: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(p.add(half * 16).cast()));
        for b in 0..t.blocks {
            let w = t.data.add(numbers_of::<F>(b) + half * 32);
            let scales = t.data.add(scales_of::<F>(b, t.blocks));
            let mut dot = [_mm256_setzero_si256(); M];
            if F == Q4_0 {
                for (i, dot) in dot.iter_mut().enumerate() {
                    *dot = _mm256_set1_epi32(offset::<F>() * *t.x_sum.add(i * t.blocks + b));
                }
            }
            let four = |i: usize, l: usize| {
                let p = t.q.add((i * t.blocks + b) * BLOCK + l * 4).cast::<i32>();
                _mm256_set1_epi32(p.read_unaligned())
            };
            // Sums of two products of bytes must fit 16 bits: 2 * 128 * 127 and less.
            let add = |dot: __m256i, unsigned: __m256i, signed: __m256i| {
                let pairs = _mm256_maddubs_epi16(unsigned, signed);
                _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones))
            };
            for l in 0..group::<F>() / 64 {
                let bytes = _mm256_loadu_si256(w.add(l * 64).cast());
                if group::<F>() == 512 {
                    // Back to signed numbers, whose signs move over to x.
                    let signed = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
                    let size = _mm256_abs_epi8(signed);
                    for (i, dot) in dot.iter_mut().enumerate() {
                        *dot = add(*dot, size, _mm256_sign_epi8(four(i, l), signed));
                    }
                } else {
                    let low = _mm256_and_si256(bytes, low_nibbles);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low_nibbles);
                    for (i, dot) in dot.iter_mut().enumerate() {
                        *dot = add(add(*dot, low, four(i, l)), high, four(i, l + 4));
                    }
                }
            }
            let (scale, minimum) = match F {
                Q8_0 | Q4_0 => (halves(scales), _mm256_setzero_ps()),
                Q4_1 => (halves(scales), halves(scales.add(32))),
                Q4K => {
                    let (scale, min) = six_bits(scales.add(64), b % 8);
                    let number = |v: __m128i| {
                        let mine = if half == 0 { v } else { _mm_srli_si128::<8>(v) };
                        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(mine))
                    };
                    let scale = _mm256_mul_ps(halves(scales), number(scale));
                    let min = _mm256_mul_ps(halves(scales.add(32)), number(min));
                    (scale, _mm256_sub_ps(_mm256_set1_ps(-0.0), min))
                }
                _ => (_mm256_setzero_ps(), _mm256_setzero_ps()),
            };
            for i in 0..M {
                let at = i * t.blocks + b;
                let value = _mm256_cvtepi32_ps(dot[i]);
                let x_scale = _mm256_set1_ps(*t.x_scale.add(at));
                if F == INT8 {
                    y[i] = _mm256_fmadd_ps(value, x_scale, y[i]);
                    continue;
                }
                y[i] = _mm256_fmadd_ps(_mm256_mul_ps(value, x_scale), scale, y[i]);
                if has_minimum::<F>() {
                    let weight = _mm256_set1_ps(*t.x_weight.add(at));
                    y[i] = _mm256_fmadd_ps(weight, minimum, y[i]);
                }
            }
        }
        for (i, y) in y.into_iter().enumerate() {
            let y = if F == INT8 {
                _mm256_mul_ps(
                    y,
                    _mm256_loadu_ps(t.data.add(scales_of::<F>(0, t.blocks) + half * 32).cast()),
                )
            } else {
                y
            };
            _mm256_storeu_ps(t.y.add(i * t.stride + half * 8), y);
        }
    }
}
