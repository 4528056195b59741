//! Rows as the products take them.

use super::{Format, Isa};
use crate::fused::for_isa;
use crate::team;
use half::bf16;

/// Numbers of one block of 8-bit rows.
pub(super) const BLOCK: usize = 32;

/// Rows with at least this many numbers are converted by several threads.
const PARALLEL: usize = 1 << 16;

#[allow(clippy::large_enum_variant)] // one for a product, on the stack
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

/// One in so many blocks of a row, those with the largest scales, gets a second term.
const SECOND: usize = 32;

/// Rows in blocks of 32: `x = scale q`, where `scale = max |x| / 127`.
///
/// A few numbers of a row are far larger than the others, and what is rounded off in their
/// blocks is most of what is lost. So the blocks with the largest scales, one in 32, get a
/// second term, `x = scale q + scale' q'`: 16 bits where they count, for a thirty-second of the
/// work (docs/benchmarks.md has the effect on perplexity).
pub(super) struct Int8Rows<'a> {
    pub first: BlockRows,
    /// Blocks of a row.
    pub blocks: usize,
    pub second: BlockRows,
    /// `[rows, seconds]`: which blocks these are, in rising order.
    pub at: Vec<u32>,
    /// Second terms of a row.
    pub seconds: usize,
    /// Rows with a number that is not finite, whose `q` is zero.
    bad: Vec<(usize, &'a [f32])>,
}

/// Blocks of 32 numbers, one after another.
pub(super) struct BlockRows {
    /// `[blocks, 32]`, zero behind the end of a row.
    q: Vec<i8>,
    scale: Vec<f32>,
    /// Sum of `q`.
    sum: Vec<i32>,
    /// `scale * sum`.
    weight: Vec<f32>,
}

/// Where blocks begin, for code that walks them by pointers.
pub(super) struct Blocks {
    pub q: *const i8,
    pub scale: *const f32,
    pub sum: *const i32,
    pub weight: *const f32,
}

impl BlockRows {
    fn new(q: Vec<i8>, facts: &[Facts]) -> Self {
        Self {
            q,
            scale: facts.iter().map(|f| f.scale).collect(),
            sum: facts.iter().map(|f| f.sum).collect(),
            weight: facts.iter().map(|f| f.scale * f.sum as f32).collect(),
        }
    }

    /// The blocks from this one on.
    pub fn from(&self, block: usize) -> Blocks {
        Blocks {
            q: self.q[block * BLOCK..].as_ptr(),
            scale: self.scale[block..].as_ptr(),
            sum: self.sum[block..].as_ptr(),
            weight: self.weight[block..].as_ptr(),
        }
    }
}

impl Blocks {
    /// The blocks from this one on.
    ///
    /// # Safety
    /// There are so many.
    #[inline(always)]
    pub unsafe fn at(&self, block: usize) -> Self {
        // SAFETY: as promised by the caller.
        unsafe {
            Self {
                q: self.q.add(block * BLOCK),
                scale: self.scale.add(block),
                sum: self.sum.add(block),
                weight: self.weight.add(block),
            }
        }
    }
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
        let seconds = blocks.div_ceil(SECOND);
        let mut q = vec![0i8; rows * blocks * BLOCK];
        let mut facts = vec![Facts::default(); rows * blocks];
        let mut second_q = vec![0i8; rows * seconds * BLOCK];
        let mut second_facts = vec![Facts::default(); rows * seconds];
        let mut at = vec![0u32; rows * seconds];
        if blocks > 0 {
            let mut parts: Vec<RowParts<'_>> = q
                .chunks_mut(blocks * BLOCK)
                .zip(facts.chunks_mut(blocks))
                .zip(second_q.chunks_mut(seconds * BLOCK))
                .zip(second_facts.chunks_mut(seconds))
                .zip(at.chunks_mut(seconds))
                .map(|((((q, facts), second_q), second_facts), at)| RowParts {
                    q,
                    facts,
                    second_q,
                    second_facts,
                    at,
                })
                .collect();
            by_rows(&mut parts, 1, rows, threads, |row, parts| {
                for part in parts {
                    part.fill(&x[row * k..(row + 1) * k], isa);
                }
            });
        }
        let bad = facts
            .chunks(blocks.max(1))
            .enumerate()
            .filter(|(_, facts)| facts.iter().any(|f| !f.scale.is_finite()))
            .map(|(row, _)| (row, &x[row * k..(row + 1) * k]))
            .collect::<Vec<_>>();
        for &(row, _) in &bad {
            facts[row * blocks..(row + 1) * blocks].fill(Facts::default());
            second_facts[row * seconds..(row + 1) * seconds].fill(Facts::default());
        }
        Self::Int8(Int8Rows {
            first: BlockRows::new(q, &facts),
            blocks,
            second: BlockRows::new(second_q, &second_facts),
            at,
            seconds,
            bad,
        })
    }
}

/// Where one row goes.
struct RowParts<'a> {
    q: &'a mut [i8],
    facts: &'a mut [Facts],
    second_q: &'a mut [i8],
    second_facts: &'a mut [Facts],
    at: &'a mut [u32],
}

impl RowParts<'_> {
    fn fill(&mut self, x: &[f32], isa: Isa) {
        to_int8(x, self.q, self.facts, isa);
        let mut order: Vec<u32> = (0..self.facts.len() as u32).collect();
        let count = self.at.len();
        if count < order.len() {
            // Scales are not negative, and of two that are equal the first comes first: the
            // choice is the same everywhere. A row with NaN among them is not used.
            order.select_nth_unstable_by(count, |&a, &b| {
                let scale = |i: u32| self.facts[i as usize].scale;
                scale(b).total_cmp(&scale(a)).then(a.cmp(&b))
            });
        }
        order.truncate(count);
        order.sort_unstable();
        self.at.copy_from_slice(&order);
        let outs = self.second_q.as_chunks_mut::<BLOCK>().0.iter_mut();
        for ((&b, q), facts) in order.iter().zip(outs).zip(&mut *self.second_facts) {
            let b = b as usize;
            let mut rest = [0f32; BLOCK];
            let x = &x[b * BLOCK..x.len().min((b + 1) * BLOCK)];
            let scale = self.facts[b].scale;
            for ((rest, x), q) in rest.iter_mut().zip(x).zip(&self.q[b * BLOCK..]) {
                *rest = x - scale * f32::from(*q);
            }
            *facts = block_to_int8(&rest, q);
        }
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
