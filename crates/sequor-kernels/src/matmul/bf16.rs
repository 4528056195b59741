//! Products with panels of bf16.

use super::rows::{Bf16Rows, unpair};
use super::{Isa, Out, Packed, TILE, by_count, tiles};

/// Outputs of a panel.
const WIDTH: usize = 32;

/// All rows of one panel.
pub(super) fn panel(w: &Packed, panel: usize, x: &Bf16Rows, rows: usize, out: &Out, isa: Isa) {
    let data = w.panel(panel);
    let first = panel * WIDTH;
    let there = WIDTH.min(w.outputs() - first);
    let most = match isa {
        Isa::Avx512 => TILE,
        Isa::Avx2 => 2,
        Isa::Portable => 1,
    };
    for (start, count) in tiles(rows, most) {
        let x = &x.pairs[start * x.per_row..(start + count) * x.per_row];
        if there == WIDTH {
            // SAFETY: the rows and the 32 columns of this panel lie inside `y`, and no
            // other thread touches them.
            unsafe {
                tile(
                    data,
                    x,
                    count,
                    out.start.add(start * out.stride + first),
                    out.stride,
                    isa,
                )
            };
        } else {
            let mut y = [0f32; TILE * WIDTH];
            // SAFETY: `y` holds `count` rows of 32.
            unsafe { tile(data, x, count, y.as_mut_ptr(), WIDTH, isa) };
            for (i, row) in y.chunks_exact(WIDTH).enumerate().take(count) {
                // SAFETY: only the columns that are there are written.
                unsafe {
                    let to = out.start.add((start + i) * out.stride + first);
                    to.copy_from_nonoverlapping(row.as_ptr(), there);
                }
            }
        }
    }
}

/// One tile: `count` rows of `x` against a panel.
///
/// # Safety
/// `y` must be valid for writes of 32 numbers at each of `count` rows, `stride` apart, and
/// the processor must have `isa`.
unsafe fn tile(data: &[u8], x: &[u32], count: usize, y: *mut f32, stride: usize, isa: Isa) {
    let pairs = x.len() / count;
    assert!(data.len() >= pairs * 4 * WIDTH);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `data` and `x` are as long as asserted, `y` as promised by the caller.
    unsafe {
        match isa {
            Isa::Avx512 => {
                return by_count!(count, [1 2 3 4 5 6 7 8 9 10 11 12],
                    M => avx512::<M>(data.as_ptr(), x.as_ptr(), pairs, y, stride));
            }
            Isa::Avx2 => {
                return by_count!(count, [1 2], M => avx2::<M>(data.as_ptr(), x.as_ptr(), pairs, y, stride));
            }
            Isa::Portable => {}
        }
    }
    let _ = isa;
    for (i, x) in x.chunks_exact(pairs.max(1)).enumerate() {
        let sums = portable(data, x);
        // SAFETY: as promised by the caller.
        unsafe {
            y.add(i * stride)
                .copy_from_nonoverlapping(sums.as_ptr(), WIDTH)
        };
    }
    if pairs == 0 {
        for i in 0..count {
            // SAFETY: as promised by the caller.
            unsafe { y.add(i * stride).write_bytes(0, WIDTH) };
        }
    }
}

/// One row against a panel.
fn portable(data: &[u8], x: &[u32]) -> [f32; WIDTH] {
    let mut sums = [0f32; WIDTH];
    for (&x, w) in x.iter().zip(data.as_chunks::<{ 4 * WIDTH }>().0) {
        let (x0, x1) = unpair(x);
        for (sum, w) in sums.iter_mut().zip(w.as_chunks::<4>().0) {
            let (w0, w1) = unpair(u32::from_le_bytes(*w));
            // Products of bf16 are exact in f32: fused or not is the same.
            *sum += x1 * w1;
            *sum += x0 * w0;
        }
    }
    sums
}

/// # Safety
/// The processor has AVX-512 with bf16; `data` holds `pairs` groups of 128 bytes, `x` `M`
/// rows of `pairs`; `y` takes 32 numbers at each of `M` rows, `stride` apart.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[allow(clippy::needless_range_loop)] // indices name registers
unsafe fn avx512<const M: usize>(
    data: *const u8,
    x: *const u32,
    pairs: usize,
    y: *mut f32,
    stride: usize,
) {
    use std::arch::x86_64::*;
    /// Bytes that are asked for ahead: about the time that memory takes to answer.
    const AHEAD: usize = 4096;
    let mut low = [_mm512_setzero_ps(); M];
    let mut high = [_mm512_setzero_ps(); M];
    // SAFETY: all addresses lie within what the caller promised; a prefetch may point
    // anywhere. The types of 512 bits are but views of each other.
    unsafe {
        for l in 0..pairs {
            let w = data.add(l * 128);
            let w0: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.cast()));
            let w1: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.add(64).cast()));
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + 64).cast());
            for i in 0..M {
                let pair: __m512bh =
                    std::mem::transmute(_mm512_set1_epi32(*x.add(i * pairs + l) as i32));
                low[i] = _mm512_dpbf16_ps(low[i], w0, pair);
                high[i] = _mm512_dpbf16_ps(high[i], w1, pair);
            }
        }
        for i in 0..M {
            _mm512_storeu_ps(y.add(i * stride), low[i]);
            _mm512_storeu_ps(y.add(i * stride + 16), high[i]);
        }
    }
}

/// # Safety
/// As `avx512`, for a processor with AVX2 and fused multiply-add.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop)] // indices name registers
unsafe fn avx2<const M: usize>(
    data: *const u8,
    x: *const u32,
    pairs: usize,
    y: *mut f32,
    stride: usize,
) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm256_setzero_ps(); 4]; M];
    let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        for l in 0..pairs {
            for part in 0..4 {
                let w = _mm256_loadu_si256(data.add(l * 128 + part * 32).cast());
                let w0 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
                let w1 = _mm256_castsi256_ps(_mm256_and_si256(w, upper));
                for i in 0..M {
                    let (x0, x1) = unpair(*x.add(i * pairs + l));
                    let sum = _mm256_fmadd_ps(w1, _mm256_set1_ps(x1), sums[i][part]);
                    sums[i][part] = _mm256_fmadd_ps(w0, _mm256_set1_ps(x0), sum);
                }
            }
        }
        for i in 0..M {
            for part in 0..4 {
                _mm256_storeu_ps(y.add(i * stride + part * 8), sums[i][part]);
            }
        }
    }
}
