//! Products with panels of bytes and nibbles, rows taken as 8 bits.
//!
//! For each block of 32 inputs the products of bytes are summed as integers, exactly; the
//! sum is then scaled and added: `y += (dot * x_scale) * w_scale`, and where the format
//! has a minimum, `y += x_weight * minimum` with `x_weight = x_scale * sum(x_q)`. Behind
//! all blocks come the second terms of a row's largest ones ([`Int8Rows`]), in the same way.

use super::rows::{BLOCK, Blocks, Int8Rows};
use super::{Format, Isa, Out, Packed, by_count, tiles};
use half::{bf16, f16};

/// Outputs of a panel.
const WIDTH: usize = 16;

/// Most rows of a tile.
const TILE: usize = 8;

/// Bytes that are asked for ahead.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;

/// Formats as numbers, for code that is compiled for each.
const INT8: u8 = 0;
const Q8_0: u8 = 1;
const Q4_0: u8 = 2;
const Q4_1: u8 = 3;
const Q4K: u8 = 4;

/// A tile of rows and what they are multiplied with.
struct Tile {
    data: *const u8,
    /// Blocks of the first row, and from one row to the next.
    x: Blocks,
    blocks: usize,
    /// Second terms of the first row, which blocks they belong to, and from one row to the
    /// next.
    second: Blocks,
    at: *const u32,
    seconds: usize,
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
            x: x.first.from(start * x.blocks),
            blocks: x.blocks,
            second: x.second.from(start * x.seconds),
            at: x.at[start * x.seconds..].as_ptr(),
            seconds: x.seconds,
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

/// Bytes of the scales of the blocks that stand together.
const fn scale_bytes<const F: u8>() -> usize {
    match F {
        INT8 | Q8_0 | Q4_0 => 32,
        Q4_1 => 64,
        _ => 256,
    }
}

/// Blocks of a panel before their scales.
const fn together<const F: u8>() -> usize {
    match F {
        INT8 => 2,
        Q4K => 8,
        _ => 1,
    }
}

/// Where the numbers of block `b` of a panel begin.
const fn numbers_of<const F: u8>(b: usize) -> usize {
    let stride = together::<F>() * group::<F>() + scale_bytes::<F>();
    b / together::<F>() * stride + b % together::<F>() * group::<F>()
}

/// Where the scales of block `b` and those that it stands together with begin.
const fn scales_of<const F: u8>(b: usize) -> usize {
    numbers_of::<F>(b / together::<F>() * together::<F>()) + together::<F>() * group::<F>()
}

/// Scale and minimum of output `o` in block `b`.
///
/// # Safety
/// `scales` is where the scales of that block begin.
unsafe fn scale_of<const F: u8>(scales: *const u8, b: usize, o: usize) -> (f32, f32) {
    // SAFETY: as promised by the caller; the entries stand as `Packed` describes.
    unsafe {
        let two = |entry: usize| {
            let p = scales.add((entry * WIDTH + o) * 2);
            [*p, *p.add(1)]
        };
        let half = |entry: usize| f16::from_le_bytes(two(entry)).to_f32();
        match F {
            INT8 => (bf16::from_le_bytes(two(0)).to_f32(), 0.0),
            Q8_0 | Q4_0 => (half(0), 0.0),
            Q4_1 => (half(0), half(1)),
            _ => {
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
                y = portable_block::<F>(t.data, b, &t.x, row * t.blocks + b, o, y);
            }
            for i in row * t.seconds..(row + 1) * t.seconds {
                let b = *t.at.add(i) as usize;
                y = portable_block::<F>(t.data, b, &t.second, i, o, y);
            }
            t.y.add(row * t.stride + o).write(y);
        }
    }
}

/// `y` with block `b` of output `o` added, times block `i` of `x`.
///
/// # Safety
/// There are such blocks.
unsafe fn portable_block<const F: u8>(
    data: *const u8,
    b: usize,
    x: &Blocks,
    i: usize,
    o: usize,
    y: f32,
) -> f32 {
    // SAFETY: as promised by the caller.
    unsafe {
        let q = x.q.add(i * BLOCK);
        let numbers = data.add(numbers_of::<F>(b));
        let mut dot = offset::<F>() * *x.sum.add(i);
        for l in 0..group::<F>() / WIDTH {
            let byte = *numbers.add(l / 4 * 64 + o * 4 + l % 4);
            if group::<F>() == 512 {
                dot += i32::from(byte) * i32::from(*q.add(l));
            } else {
                dot += i32::from(byte & 15) * i32::from(*q.add(l));
                dot += i32::from(byte >> 4) * i32::from(*q.add(l + 16));
            }
        }
        let (scale, minimum) = scale_of::<F>(data.add(scales_of::<F>(b)), b, o);
        let y = (dot as f32 * *x.scale.add(i)).mul_add(scale, y);
        if has_minimum::<F>() {
            (*x.weight.add(i)).mul_add(minimum, y)
        } else {
            y
        }
    }
}

/// # Safety
/// As `run`, for `M` rows and a processor with AVX-512 and VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn avx512<const F: u8, const M: usize>(t: &Tile) {
    use std::arch::x86_64::*;
    let mut y = [_mm512_setzero_ps(); M];
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        let mut expanded = [[[0f32; WIDTH]; 2]; 8];
        for b in 0..t.blocks {
            let scales = t.data.add(scales_of::<F>(b));
            if F == Q4K && b % 8 == 0 {
                expand_scales(scales, &mut expanded);
            }
            let w = t.data.add(numbers_of::<F>(b));
            let scales = if F == Q4K {
                let [scale, minimum] = &expanded[b % 8];
                (
                    _mm512_loadu_ps(scale.as_ptr()),
                    _mm512_loadu_ps(minimum.as_ptr()),
                )
            } else {
                avx512_scales::<F>(scales, b)
            };
            let ahead = w.wrapping_add(AHEAD);
            avx512_block::<F, M>(w, ahead, scales, &t.x.at(b), t.blocks, &mut y);
        }
        // Memory goes on with the next panel meanwhile.
        let next = t.data.wrapping_add(numbers_of::<F>(t.blocks) + AHEAD);
        for (i, y) in y.iter_mut().enumerate() {
            for e in i * t.seconds..(i + 1) * t.seconds {
                let b = *t.at.add(e) as usize;
                let w = t.data.add(numbers_of::<F>(b));
                let ahead = next.wrapping_add((e * group::<F>()).min(2 * AHEAD));
                let scales = avx512_scales::<F>(t.data.add(scales_of::<F>(b)), b);
                let y = std::array::from_mut(y);
                avx512_block::<F, 1>(w, ahead, scales, &t.second.at(e), 0, y);
            }
        }
        for (i, y) in y.into_iter().enumerate() {
            _mm512_storeu_ps(t.y.add(i * t.stride), y);
        }
    }
}

/// Adds one block of a panel, times one block of each of `M` rows, `stride` blocks apart.
/// As many bytes from `ahead` on will be needed soon, and are asked for.
///
/// # Safety
/// There are such blocks; the processor has AVX-512 and VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
#[inline]
unsafe fn avx512_block<const F: u8, const M: usize>(
    w: *const u8,
    ahead: *const u8,
    (scale, minimum): (std::arch::x86_64::__m512, std::arch::x86_64::__m512),
    x: &Blocks,
    stride: usize,
    y: &mut [std::arch::x86_64::__m512; M],
) {
    use std::arch::x86_64::*;
    let low_nibbles = _mm512_set1_epi8(15);
    // SAFETY: all addresses lie within what the caller promised; a prefetch may point
    // anywhere.
    unsafe {
        let mut dot = [_mm512_setzero_si512(); M];
        if offset::<F>() != 0 {
            for (i, dot) in dot.iter_mut().enumerate() {
                *dot = _mm512_set1_epi32(offset::<F>() * *x.sum.add(i * stride));
            }
        }
        let four = |i: usize, l: usize| {
            let p = x.q.add(i * stride * BLOCK + l * 4).cast::<i32>();
            _mm512_set1_epi32(p.read_unaligned())
        };
        for l in 0..group::<F>() / 64 {
            let bytes = _mm512_loadu_si512(w.add(l * 64).cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(l * 64).cast());
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
        for i in 0..M {
            let value = _mm512_cvtepi32_ps(dot[i]);
            let x_scale = _mm512_set1_ps(*x.scale.add(i * stride));
            y[i] = _mm512_fmadd_ps(_mm512_mul_ps(value, x_scale), scale, y[i]);
            if has_minimum::<F>() {
                let weight = _mm512_set1_ps(*x.weight.add(i * stride));
                y[i] = _mm512_fmadd_ps(weight, minimum, y[i]);
            }
        }
    }
}

/// Scales and minima (negated) of the 16 outputs in block `b`.
///
/// # Safety
/// `scales` is where the scales of that block begin; the processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
#[inline]
unsafe fn avx512_scales<const F: u8>(
    scales: *const u8,
    b: usize,
) -> (std::arch::x86_64::__m512, std::arch::x86_64::__m512) {
    use std::arch::x86_64::*;
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        let sixteen = |p: *const u8| _mm256_loadu_si256(p.cast());
        let halves = |p: *const u8| _mm512_cvtph_ps(sixteen(p));
        match F {
            INT8 => {
                let bits = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(sixteen(scales)));
                (_mm512_castsi512_ps(bits), _mm512_setzero_ps())
            }
            Q8_0 | Q4_0 => (halves(scales), _mm512_setzero_ps()),
            Q4_1 => (halves(scales), halves(scales.add(32))),
            _ => {
                let (s, m) = six_bits(scales.add(64), b % 8);
                let number = |v: __m128i| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v));
                let scale = _mm512_mul_ps(halves(scales), number(s));
                let m = _mm512_mul_ps(halves(scales.add(32)), number(m));
                (scale, _mm512_sub_ps(_mm512_set1_ps(-0.0), m))
            }
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
        for (j, [scale, minimum]) in out.iter_mut().enumerate() {
            let (s, m) = avx512_scales::<Q4K>(scales, j);
            _mm512_storeu_ps(scale.as_mut_ptr(), s);
            _mm512_storeu_ps(minimum.as_mut_ptr(), m);
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
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        for b in 0..t.blocks {
            avx2_block::<F, M>(t.data, b, half, &t.x.at(b), t.blocks, &mut y);
        }
        for (i, y) in y.iter_mut().enumerate() {
            for e in i * t.seconds..(i + 1) * t.seconds {
                let b = *t.at.add(e) as usize;
                let y = std::array::from_mut(y);
                avx2_block::<F, 1>(t.data, b, half, &t.second.at(e), 0, y);
            }
        }
        for (i, y) in y.into_iter().enumerate() {
            _mm256_storeu_ps(t.y.add(i * t.stride + half * 8), y);
        }
    }
}

/// Adds block `b` of eight outputs, times one block of each of `M` rows, `stride` blocks apart.
///
/// # Safety
/// There are such blocks; the processor has what `avx2` asks for; `half` is 0 or 1.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn avx2_block<const F: u8, const M: usize>(
    data: *const u8,
    b: usize,
    half: usize,
    x: &Blocks,
    stride: usize,
    y: &mut [std::arch::x86_64::__m256; M],
) {
    use std::arch::x86_64::*;
    let low_nibbles = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        let w = data.add(numbers_of::<F>(b) + half * 32);
        let scales = data.add(scales_of::<F>(b));
        let mut dot = [_mm256_setzero_si256(); M];
        if F == Q4_0 {
            for (i, dot) in dot.iter_mut().enumerate() {
                *dot = _mm256_set1_epi32(offset::<F>() * *x.sum.add(i * stride));
            }
        }
        let four = |i: usize, l: usize| {
            let p = x.q.add(i * stride * BLOCK + l * 4).cast::<i32>();
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
        let eight = |p: *const u8| _mm_loadu_si128(p.add(half * 16).cast());
        let halves = |p: *const u8| _mm256_cvtph_ps(eight(p));
        let (scale, minimum) = match F {
            INT8 => {
                let bits = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(eight(scales)));
                (_mm256_castsi256_ps(bits), _mm256_setzero_ps())
            }
            Q8_0 | Q4_0 => (halves(scales), _mm256_setzero_ps()),
            Q4_1 => (halves(scales), halves(scales.add(32))),
            _ => {
                let (scale, min) = six_bits(scales.add(64), b % 8);
                let number = |v: __m128i| {
                    let mine = if half == 0 { v } else { _mm_srli_si128::<8>(v) };
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(mine))
                };
                let scale = _mm256_mul_ps(halves(scales), number(scale));
                let min = _mm256_mul_ps(halves(scales.add(32)), number(min));
                (scale, _mm256_sub_ps(_mm256_set1_ps(-0.0), min))
            }
        };
        for i in 0..M {
            let value = _mm256_cvtepi32_ps(dot[i]);
            let x_scale = _mm256_set1_ps(*x.scale.add(i * stride));
            y[i] = _mm256_fmadd_ps(_mm256_mul_ps(value, x_scale), scale, y[i]);
            if has_minimum::<F>() {
                let weight = _mm256_set1_ps(*x.weight.add(i * stride));
                y[i] = _mm256_fmadd_ps(weight, minimum, y[i]);
            }
        }
    }
}
