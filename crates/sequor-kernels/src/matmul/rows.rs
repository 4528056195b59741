//! Rows as the products take them.

use super::{Format, Isa};
use crate::fused::for_isa;
use crate::team;
use half::bf16;

/// Numbers of one block of 8-bit rows.
pub(super) const BLOCK: usize = 32;

/// Rows with at least this many numbers are converted by several threads.
const PARALLEL: usize = 1 << 16;

pub(super) enum Prepared<'a> {
    Bf16(Bf16Rows),
    Int8(Int8Rows<'a>),
}

/// Rows of pairs of bf16, an odd last number paired with zero.
pub(super) struct Bf16Rows {
    /// `[rows, pairs]`, the first of a pair in the low half.
    pub pairs: Vec<u32>,
    pub per_row: usize,
}

/// Rows in blocks of 32: `x = scale q`, where `scale = max |x| / 127`.
pub(super) struct Int8Rows<'a> {
    /// `[rows, blocks, 32]`, zero behind the end.
    pub q: Vec<i8>,
    /// `[rows, blocks]` each.
    pub scale: Vec<f32>,
    /// Sum of `q`.
    pub sum: Vec<i32>,
    /// `scale * sum`.
    pub weight: Vec<f32>,
    pub blocks: usize,
    /// Rows with a number that is not finite, whose `q` is zero.
    bad: Vec<(usize, &'a [f32])>,
}

impl Int8Rows<'_> {
    /// Calls `f` for each row that could not be converted.
    pub fn unusual(&self, mut f: impl FnMut(usize, &[f32])) {
        for (row, x) in &self.bad {
            f(*row, x);
        }
    }
}

impl<'a> Prepared<'a> {
    pub fn new(
        format: Format,
        x: &'a [f32],
        rows: usize,
        k: usize,
        threads: usize,
        isa: Isa,
    ) -> Self {
        let threads = if x.len() >= PARALLEL { threads } else { 1 };
        if format == Format::Bf16 {
            let per_row = k.div_ceil(2);
            let mut pairs = vec![0u32; rows * per_row];
            by_rows(&mut pairs, per_row, rows, threads, |row, out| {
                to_bf16(&x[row * k..(row + 1) * k], out, isa);
            });
            return Self::Bf16(Bf16Rows { pairs, per_row });
        }
        let blocks = k.div_ceil(BLOCK);
        let mut q = vec![0i8; rows * blocks * BLOCK];
        let mut facts = vec![Facts::default(); rows * blocks];
        let mut both: Vec<(&mut [i8], &mut [Facts])> = q
            .chunks_mut((blocks * BLOCK).max(1))
            .zip(facts.chunks_mut(blocks.max(1)))
            .collect();
        by_rows(
            &mut both,
            1,
            if blocks == 0 { 0 } else { rows },
            threads,
            |row, out| {
                if let [(q, facts)] = out {
                    to_int8(&x[row * k..(row + 1) * k], q, facts, isa);
                }
            },
        );
        let mut bad = Vec::new();
        for (row, facts) in facts.chunks_mut(blocks.max(1)).enumerate() {
            if facts.iter().any(|f| !f.scale.is_finite()) {
                bad.push((row, &x[row * k..(row + 1) * k]));
                facts.fill(Facts::default());
            }
        }
        Self::Int8(Int8Rows {
            q,
            scale: facts.iter().map(|f| f.scale).collect(),
            sum: facts.iter().map(|f| f.sum).collect(),
            weight: facts.iter().map(|f| f.scale * f.sum as f32).collect(),
            blocks,
            bad,
        })
    }
}

/// Calls `f` with each row's part of `out`, in several threads.
fn by_rows<T: Send>(
    out: &mut [T],
    per_row: usize,
    rows: usize,
    threads: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    if threads <= 1 || rows <= 1 {
        for (row, out) in out.chunks_mut(per_row.max(1)).enumerate().take(rows) {
            f(row, out);
        }
        return;
    }
    let share = rows.div_ceil(threads).max(1);
    let parts: Vec<_> = out
        .chunks_mut((share * per_row).max(1))
        .map(|part| std::sync::Mutex::new(Some(part)))
        .collect();
    team::share(parts.len(), 1, threads, |range| {
        for i in range {
            // Each part is taken by one thread, once.
            let part = parts[i].lock().unwrap_or_else(|e| e.into_inner()).take();
            for (j, out) in part
                .into_iter()
                .flat_map(|p| p.chunks_mut(per_row.max(1)))
                .enumerate()
            {
                f(i * share + j, out);
            }
        }
    });
}

#[derive(Clone, Copy, Default)]
struct Facts {
    scale: f32,
    sum: i32,
}

for_isa! {
    fn to_bf16(x: &[f32], out: &mut [u32]) {
        let (pairs, rest) = x.as_chunks::<2>();
        for (pair, out) in pairs.iter().zip(out.iter_mut()) {
            *out = rounded(pair[0]) | (rounded(pair[1]) << 16);
        }
        if let ([last], Some(out)) = (rest, out.last_mut()) {
            *out = rounded(*last);
        }
    }
}

/// The bits of the nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let even = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() {
        (bits >> 16) | 0x40
    } else {
        even
    }
}

for_isa! {
    fn to_int8(x: &[f32], q: &mut [i8], facts: &mut [Facts]) {
        let (blocks, rest) = x.as_chunks::<BLOCK>();
        let (outs, _) = q.as_chunks_mut::<BLOCK>();
        let mut last = [0f32; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        let all = blocks.iter().chain((!rest.is_empty()).then_some(&last));
        for ((x, q), facts) in all.zip(outs).zip(facts) {
            *facts = block_to_int8(x, q);
        }
    }
}

#[inline(always)]
fn block_to_int8(x: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> Facts {
    // Sizes compared as integers: for numbers without a sign the order is the same, and
    // what is not finite is larger than all others.
    let mut most = [0u32; 16];
    for half in x.as_chunks::<16>().0 {
        for lane in 0..16 {
            most[lane] = most[lane].max(half[lane].to_bits() & 0x7fff_ffff);
        }
    }
    let most = f32::from_bits(most.into_iter().fold(0, u32::max));
    if !most.is_finite() {
        q.fill(0);
        return Facts {
            scale: f32::NAN,
            sum: 0,
        };
    }
    let scale = most / 127.0;
    // A block of numbers so small that its scale has no inverse counts as zero.
    let inverse = if scale >= f32::MIN_POSITIVE {
        scale.recip()
    } else {
        0.0
    };
    /// Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let mut sums = [0i32; 16];
    for (x, q) in x.as_chunks::<16>().0.iter().zip(q.as_chunks_mut::<16>().0) {
        for lane in 0..16 {
            let n = (x[lane] * inverse + ROUNDER)
                .to_bits()
                .wrapping_sub(ROUNDER.to_bits()) as i32;
            sums[lane] += n;
            q[lane] = n as i8;
        }
    }
    Facts {
        scale,
        sum: sums.into_iter().sum(),
    }
}

/// The two numbers of a pair.
#[inline(always)]
pub(super) fn unpair(pair: u32) -> (f32, f32) {
    let low = bf16::from_bits(pair as u16);
    let high = bf16::from_bits((pair >> 16) as u16);
    (low.to_f32(), high.to_f32())
}
