//! The small steps between the products of a transformer block, each in one call.
//!
//! A step of libtorch costs a microsecond or two before it computes anything, and a block
//! takes forty of them for one token. These do the same arithmetic on plain slices. As
//! everywhere here, the order of every sum is written out, so that a row gives the same bits
//! alone, in a batch and in a tree, with any number of threads and any instructions.

use crate::matmul::{Isa, Parts};
use crate::select::lanes::exp_of_nonpositive;
use crate::team;

/// Lanes of a sum.
const LANES: usize = 16;

/// Compiles a body for each set of instructions; [`Isa`] says which is taken. A body may use
/// fused multiply-adds only where they are written out (`mul_add`), so that all give the same
/// bits.
macro_rules! for_isa {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$attribute])*
        $visibility fn $name($($argument: $type,)* isa: Isa) {
            #[inline(always)]
            fn portable($($argument: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
                fn with_avx512($($argument: $type),*) { portable($($argument),*) }
                #[target_feature(enable = "avx2,fma")]
                fn with_avx2($($argument: $type),*) { portable($($argument),*) }
                match isa {
                    Isa::Avx512 if isa.available() => {
                        // SAFETY: the processor was asked and has the instructions.
                        return unsafe { with_avx512($($argument),*) };
                    }
                    Isa::Avx2 if isa.available() => {
                        // SAFETY: as above.
                        return unsafe { with_avx2($($argument),*) };
                    }
                    _ => {}
                }
            }
            let _ = isa;
            portable($($argument),*);
        }
    };
}
pub(crate) use for_isa;

/// The sum of sixteen lanes, in the order in which vectors of any width can form it.
#[inline(always)]
fn sum_lanes(a: &[f32; LANES]) -> f32 {
    let quarter = |i: usize| (a[4 * i] + a[4 * i + 2]) + (a[4 * i + 1] + a[4 * i + 3]);
    (quarter(0) + quarter(2)) + (quarter(1) + quarter(3))
}

/// Sixteen entries from `at` on, with zeros behind the end.
#[inline(always)]
fn lanes_at(x: &[f32], at: usize) -> [f32; LANES] {
    let mut lanes = [0f32; LANES];
    match x.get(at..at + LANES) {
        Some(whole) => lanes.copy_from_slice(whole),
        None => {
            let rest = &x[at..];
            lanes[..rest.len()].copy_from_slice(rest);
        }
    }
    lanes
}

/// Fewer numbers than this are not worth a thread of their own.
const GRAIN: usize = 1 << 14;

/// `y = x / sqrt(mean(x^2) + eps) * weight` for each row of `weight.len()` entries (Zhang and
/// Sennrich, 2019).
///
/// # Panics
/// When `x` and `y` differ in length or are not whole rows.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], threads: usize, isa: Isa) {
    let width = weight.len().max(1);
    assert!(x.len() == y.len() && x.len().is_multiple_of(width));
    let rows = x.len() / width;
    let y = Parts::new(y, width);
    team::share(rows, GRAIN.div_ceil(width), threads, |rows| {
        // SAFETY: each row is worked on once.
        let y = unsafe { y.parts(rows.clone()) };
        norm_rows(
            &x[rows.start * width..rows.end * width],
            weight,
            eps,
            y,
            isa,
        );
    });
}

for_isa! {
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let width = weight.len();
        for (x, y) in x.chunks_exact(width.max(1)).zip(y.chunks_exact_mut(width.max(1))) {
            let mut squares = [0f32; LANES];
            for at in (0..width).step_by(LANES) {
                let part = lanes_at(x, at);
                for lane in 0..LANES {
                    squares[lane] += part[lane] * part[lane];
                }
            }
            let mean = sum_lanes(&squares) / width as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * scale * w;
            }
        }
    }
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
fn silu(x: f32) -> f32 {
    // exp of what is not positive cannot overflow: x > 0 is mirrored.
    let e = exp_of_nonpositive(if x > 0.0 { -x } else { x });
    let up = if x > 0.0 { 1.0 } else { e };
    let value = x * (up / (1.0 + e));
    if x.is_nan() { x } else { value }
}

/// `y = silu(gate) * up` for each row of `x`, which holds `width` gates, then `width` others
/// (Shazeer, 2020).
///
/// # Panics
/// When `x` is not whole rows or `y` not half as long.
pub fn silu_gated(x: &[f32], width: usize, y: &mut [f32], threads: usize, isa: Isa) {
    let width = width.max(1);
    assert!(x.len() == 2 * y.len() && y.len().is_multiple_of(width));
    let rows = y.len() / width;
    let y = Parts::new(y, width);
    team::share(rows, GRAIN.div_ceil(width), threads, |rows| {
        // SAFETY: each row is worked on once.
        let y = unsafe { y.parts(rows.clone()) };
        gate_rows(
            &x[2 * rows.start * width..2 * rows.end * width],
            width,
            y,
            isa,
        );
    });
}

for_isa! {
    fn gate_rows(x: &[f32], width: usize, y: &mut [f32]) {
        for (x, y) in x.chunks_exact((2 * width).max(1)).zip(y.chunks_exact_mut(width.max(1))) {
            let (gate, up) = x.split_at(width);
            for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = silu(gate) * up;
            }
        }
    }
}

/// Which channels a rotary embedding turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// Channel `i` with `i + d/2`.
    Halves,
    /// Channel `2 i` with `2 i + 1`.
    Neighbours,
}

for_isa! {
    /// Turns the first `cos.len()` channels of each head of one row, in place: channel `i` becomes
    /// `x cos + partner sin` with the entries `i` of the tables, where the sign of the rotation is
    /// in `sin` (Su et al., 2021).
    ///
    /// # Panics
    /// When the tables differ in length or are longer than a head, or `x` is not whole heads.
    pub fn rotate(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], pairs: Pairs) {
        let turned = cos.len();
        assert!(turned == sin.len() && turned <= head_dim && turned.is_multiple_of(2));
        assert!(head_dim == 0 || x.len().is_multiple_of(head_dim));
        for head in x.chunks_exact_mut(head_dim.max(1)) {
            match pairs {
                Pairs::Halves => {
                    let half = turned / 2;
                    let (a, b) = head[..turned].split_at_mut(half);
                    for i in 0..half {
                        let (first, second) = (a[i], b[i]);
                        a[i] = first * cos[i] + second * sin[i];
                        b[i] = second * cos[i + half] + first * sin[i + half];
                    }
                }
                Pairs::Neighbours => {
                    for (i, pair) in head[..turned].chunks_exact_mut(2).enumerate() {
                        let (first, second) = (pair[0], pair[1]);
                        pair[0] = first * cos[2 * i] + second * sin[2 * i];
                        pair[1] = second * cos[2 * i + 1] + first * sin[2 * i + 1];
                    }
                }
            }
        }
    }
}

/// Which columns of a cache a row sees: a run of them, then single ones behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// First column of the run.
    pub first: usize,
    /// End of the run.
    pub end: usize,
    /// Columns behind the run, rising.
    pub more: Vec<usize>,
}

impl Seen {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.first) + self.more.len()
    }

    /// None at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline(always)]
    fn column(&self, rank: usize) -> usize {
        let run = self.end - self.first;
        if rank < run {
            self.first + rank
        } else {
            self.more[rank - run]
        }
    }

    fn most(&self) -> usize {
        self.more.iter().map(|c| c + 1).fold(self.end, usize::max)
    }
}

/// Keys and values of one sequence, `[kv_heads, capacity, head_dim]` each.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// Keys.
    pub keys: &'a [f32],
    /// Values.
    pub values: &'a [f32],
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// Attention of a few rows over a cache: `out = softmax(scale q k^T) v` over the columns that
/// each row sees (Vaswani et al., 2017), with groups of query heads that share a key/value head
/// (Ainslie et al., 2023).
///
/// `q` and `out` are `[rows, heads, head_dim]`. The order of every sum is that of the columns
/// a row sees, wherever they stand: a row in a tree gives the bits of the same row decoded
/// one by one. A row with a score that is NaN or plus infinity, or that sees nothing, gives NaN.
///
/// # Panics
/// When lengths do not fit, or a row sees a column that is not there.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    q: &[f32],
    heads: usize,
    cache: Cache<'_>,
    seen: &[Seen],
    scale: f32,
    out: &mut [f32],
    threads: usize,
    isa: Isa,
) {
    let Cache {
        kv_heads, head_dim, ..
    } = cache;
    let rows = seen.len();
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim > 0);
    assert!(q.len() == rows * heads * head_dim && out.len() == q.len());
    assert!(cache.keys.len() == cache.values.len());
    let capacity = cache.keys.len() / (kv_heads * head_dim);
    assert!(
        seen.iter()
            .all(|s| s.most() <= capacity && s.first <= s.end)
    );
    let most = seen.iter().map(Seen::len).max().unwrap_or(0);
    let group = heads / kv_heads;
    let out = Parts::new(out, head_dim);
    let grain = GRAIN.div_ceil((most * head_dim).max(1));
    team::share(rows * heads, grain, threads, |tasks| {
        let mut scores = vec![0f32; most.next_multiple_of(LANES)];
        for task in tasks {
            let (row, head) = (task / heads, task % heads);
            let plane = head / group * capacity * head_dim;
            let plane = plane..plane + capacity * head_dim;
            let q = &q[task * head_dim..(task + 1) * head_dim];
            // SAFETY: each task is worked on once, and its part belongs to it alone.
            let out = unsafe { out.parts(task..task + 1) };
            let seen = &seen[row];
            one_head(
                q,
                &cache.keys[plane.clone()],
                &cache.values[plane],
                seen,
                scale,
                &mut scores,
                out,
                isa,
            );
        }
    });
}

/// One query against one plane of keys and values.
#[allow(clippy::too_many_arguments)]
fn one_head(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    seen: &Seen,
    scale: f32,
    scores: &mut [f32],
    out: &mut [f32],
    isa: Isa,
) {
    let n = seen.len();
    if n == 0 {
        return out.fill(f32::NAN);
    }
    dots(q, keys, seen, scale, &mut scores[..n], isa);
    let mut sum = f32::NAN;
    weigh(&mut scores[..n], &mut sum, isa);
    if sum.is_nan() {
        return out.fill(f32::NAN);
    }
    mix(&scores[..n], values, seen, 1.0 / sum, out, isa);
}

/// `scores[rank] = scale * (q . key of that rank)`.
fn dots(q: &[f32], keys: &[f32], seen: &Seen, scale: f32, scores: &mut [f32], isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && isa.available() && q.len().is_multiple_of(LANES) {
        let whole = scores.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            let columns: [usize; LANES] = std::array::from_fn(|i| seen.column(at + i));
            // SAFETY: the processor was asked; the columns are among the keys, as `attend` made
            // sure, and there is room for sixteen scores.
            unsafe { dots_avx512(q, keys, &columns, scale, &mut scores[at..at + LANES]) };
        }
        return dots_one_by_one(q, keys, seen, scale, whole, &mut scores[whole..], isa);
    }
    dots_one_by_one(q, keys, seen, scale, 0, scores, isa);
}

for_isa! {
    fn dots_one_by_one(q: &[f32], keys: &[f32], seen: &Seen, scale: f32, from: usize, scores: &mut [f32]) {
        let width = q.len();
        for (i, score) in scores.iter_mut().enumerate() {
            let column = seen.column(from + i);
            let key = &keys[column * width..(column + 1) * width];
            let mut sums = [0f32; LANES];
            for at in (0..width).step_by(LANES) {
                let (a, b) = (lanes_at(q, at), lanes_at(key, at));
                for lane in 0..LANES {
                    sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
                }
            }
            *score = sum_lanes(&sums) * scale;
        }
    }
}

/// Sixteen scores at once: sixteen sums of lanes, then turned so that one vector holds them.
///
/// # Safety
/// The processor has AVX-512; each column lies within `keys`, whose rows are as long as `q`, a
/// multiple of 16; `scores` holds 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn dots_avx512(
    q: &[f32],
    keys: &[f32],
    columns: &[usize; LANES],
    scale: f32,
    scores: &mut [f32],
) {
    use std::arch::x86_64::*;
    let width = q.len();
    let mut sums = [_mm512_setzero_ps(); LANES];
    // SAFETY: all addresses lie within what the caller promised.
    unsafe {
        for at in (0..width).step_by(LANES) {
            let a = _mm512_loadu_ps(q.as_ptr().add(at));
            for (sum, &column) in sums.iter_mut().zip(columns) {
                let b = _mm512_loadu_ps(keys.as_ptr().add(column * width + at));
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        // The order of `sum_lanes`: within quarters 0 + 2 and 1 + 3, then those, then the
        // quarters 0 + 2 and 1 + 3, then those.
        let two = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let four = |a, b| {
            let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
        };
        // Quarter sums of rows 4 g .. 4 g + 3, one row per lane of each quarter.
        let quarter: [__m512; 4] = std::array::from_fn(|g| {
            four(
                two(sums[4 * g], sums[4 * g + 1]),
                two(sums[4 * g + 2], sums[4 * g + 3]),
            )
        });
        // (q0 + q2, q1 + q3) of two groups of rows, then their sums.
        let halves = |a, b| {
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
            _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
        };
        let (x, y) = (
            halves(quarter[0], quarter[1]),
            halves(quarter[2], quarter[3]),
        );
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(x, y);
        let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(x, y);
        let all = _mm512_mul_ps(_mm512_add_ps(even, odd), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores.as_mut_ptr(), all);
    }
}

for_isa! {
    /// Scores to weights `exp(score - max)` and their sum; the sum is NaN where a score is NaN
    /// or plus infinity.
    fn weigh(scores: &mut [f32], sum: &mut f32) {
        let mut most = [f32::NEG_INFINITY; LANES];
        let mut bad = [false; LANES];
        let (groups, rest) = scores.as_chunks::<LANES>();
        for group in groups {
            for lane in 0..LANES {
                most[lane] = if group[lane] > most[lane] { group[lane] } else { most[lane] };
                bad[lane] |= group[lane].is_nan();
            }
        }
        for (lane, &x) in rest.iter().enumerate() {
            most[lane] = if x > most[lane] { x } else { most[lane] };
            bad[lane] |= x.is_nan();
        }
        let max = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
        if bad.contains(&true) || !max.is_finite() {
            *sum = f32::NAN;
            return;
        }
        let mut sums = [0f32; LANES];
        let (groups, rest) = scores.as_chunks_mut::<LANES>();
        for group in groups {
            for lane in 0..LANES {
                group[lane] = exp_of_nonpositive(group[lane] - max);
                sums[lane] += group[lane];
            }
        }
        for (lane, x) in rest.iter_mut().enumerate() {
            *x = exp_of_nonpositive(*x - max);
            sums[lane] += *x;
        }
        *sum = sum_lanes(&sums);
    }
}

for_isa! {
    /// `out = factor * sum over ranks of weight * value`, rank by rank.
    fn mix(weights: &[f32], values: &[f32], seen: &Seen, factor: f32, out: &mut [f32]) {
        /// Channels whose sums are kept in registers at a time.
        const CHANNELS: usize = 64;
        let width = out.len();
        for (part, out) in out.chunks_mut(CHANNELS).enumerate() {
            let start = part * CHANNELS;
            let mut sums = [0f32; CHANNELS];
            if out.len() == CHANNELS {
                for (rank, &w) in weights.iter().enumerate() {
                    let at = seen.column(rank) * width + start;
                    if let Some(value) = values[at..].first_chunk::<CHANNELS>() {
                        for (sum, v) in sums.iter_mut().zip(value) {
                            *sum = w.mul_add(*v, *sum);
                        }
                    }
                }
            } else {
                for (rank, &w) in weights.iter().enumerate() {
                    let at = seen.column(rank) * width + start;
                    for (sum, v) in sums.iter_mut().zip(&values[at..at + out.len()]) {
                        *sum = w.mul_add(*v, *sum);
                    }
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        let mut stream = Key::new(seed, 1).stream(0, Purpose::Test);
        (0..n)
            .map(|_| 4.0 * (stream.uniform() as f32 - 0.5))
            .collect()
    }

    fn isas() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|i| i.available()).collect()
    }

    /// The same bits from all instructions; gives them.
    fn same(n: usize, f: impl Fn(&mut [f32], Isa)) -> Vec<f32> {
        let run = |isa| {
            let mut y = vec![f32::NAN; n];
            f(&mut y, isa);
            y
        };
        let portable = run(Isa::Portable);
        for isa in isas() {
            assert_eq!(run(isa), portable, "{isa}");
        }
        portable
    }

    fn close(a: &[f32], b: &[f64], most: f64) {
        for (a, b) in a.iter().zip(b) {
            assert!(
                (f64::from(*a) - b).abs() <= most * (1.0 + b.abs()),
                "{a}, {b}"
            );
        }
    }

    #[test]
    fn norms_and_gates_agree_with_f64() {
        for width in [1, 7, 16, 33, 576] {
            let (x, w) = (numbers(1, 3 * width), numbers(2, width));
            let y = same(3 * width, |y, isa| rms_norm(&x, &w, 1e-5, y, 2, isa));
            let expected: Vec<f64> = x
                .chunks(width)
                .flat_map(|x| {
                    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                    let scale = (mean + 1e-5).sqrt().recip();
                    x.iter()
                        .zip(&w)
                        .map(move |(v, w)| f64::from(*v) * scale * f64::from(*w))
                        .collect::<Vec<_>>()
                })
                .collect();
            close(&y, &expected, 1e-6);
            let y = same(3 * width / 2 * 2 / 2, |y, isa| {
                if width % 2 == 0 {
                    silu_gated(&x[..2 * y.len()], width / 2, y, 2, isa);
                } else {
                    y.fill(0.0);
                }
            });
            if width % 2 == 0 {
                let expected: Vec<f64> = x
                    .chunks(width)
                    .flat_map(|x| {
                        let (g, u) = x.split_at(width / 2);
                        let silu = |g: f64| g / (1.0 + (-g).exp());
                        g.iter()
                            .zip(u)
                            .map(move |(g, u)| silu(f64::from(*g)) * f64::from(*u))
                            .collect::<Vec<_>>()
                    })
                    .collect();
                close(&y, &expected, 1e-6);
            }
        }
        for (x, expected) in [
            (0.0, 0.0),
            (200.0, 200.0),
            (-200.0, 0.0),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(silu(x), expected);
        }
        assert!(silu(f32::NAN).is_nan());
    }

    #[test]
    fn rotations_keep_lengths_and_undo_each_other() {
        let x = numbers(3, 24);
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            let table = |f: fn(f64) -> f64, sign: bool| -> Vec<f32> {
                (0..6)
                    .map(|i| {
                        let (pair, first) = match pairs {
                            Pairs::Halves => (i % 3, i < 3),
                            Pairs::Neighbours => (i / 2, i % 2 == 0),
                        };
                        let v = f(0.3 + pair as f64) as f32;
                        if sign && first { -v } else { v }
                    })
                    .collect()
            };
            let (cos, sin) = (table(f64::cos, false), table(f64::sin, true));
            let back: Vec<f32> = sin.iter().map(|s| -s).collect();
            let turned = same(24, |y, isa| {
                y.copy_from_slice(&x);
                rotate(y, 8, &cos, &sin, pairs, isa);
            });
            for (a, b) in turned.chunks(8).zip(x.chunks(8)) {
                assert_eq!(a[6..], b[6..]);
                let length = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
                assert!((length(a) - length(b)).abs() < 1e-4);
            }
            let mut again = turned;
            rotate(&mut again, 8, &cos, &back, pairs, Isa::Portable);
            close(
                &again,
                &x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(),
                1e-6,
            );
        }
    }

    /// Attention by its definition, in f64.
    fn definition(
        q: &[f32],
        heads: usize,
        cache: Cache<'_>,
        seen: &[Seen],
        scale: f64,
    ) -> Vec<f64> {
        let d = cache.head_dim;
        let capacity = cache.keys.len() / cache.kv_heads / d;
        let mut out = Vec::new();
        for (i, q) in q.chunks(d).enumerate() {
            let plane = i % heads / (heads / cache.kv_heads) * capacity;
            let s = &seen[i / heads];
            let columns: Vec<usize> = (0..s.len()).map(|r| (plane + s.column(r)) * d).collect();
            let score = |at: &usize| -> f64 {
                let dot = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
                q.iter().zip(&cache.keys[*at..]).map(dot).sum::<f64>() * scale
            };
            let weights: Vec<f64> = columns.iter().map(|c| score(c).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for j in 0..d {
                let value = |(c, w): (&usize, &f64)| w * f64::from(cache.values[c + j]);
                out.push(columns.iter().zip(&weights).map(value).sum::<f64>() / sum);
            }
        }
        out
    }

    #[test]
    fn attention_is_its_definition_and_the_same_bits_everywhere() {
        for (heads, kv_heads, d) in [(4, 2, 16), (9, 3, 64), (2, 2, 5), (3, 1, 80), (1, 1, 128)] {
            let capacity = 70;
            let (k, v) = (
                numbers(4, kv_heads * capacity * d),
                numbers(5, kv_heads * capacity * d),
            );
            let cache = Cache {
                keys: &k,
                values: &v,
                kv_heads,
                head_dim: d,
            };
            let seen: Vec<Seen> = vec![
                Seen {
                    first: 0,
                    end: 1,
                    more: vec![],
                },
                Seen {
                    first: 0,
                    end: 69,
                    more: vec![69],
                },
                Seen {
                    first: 10,
                    end: 33,
                    more: vec![40, 50, 52],
                },
                Seen {
                    first: 3,
                    end: 3,
                    more: vec![7],
                },
            ];
            let q = numbers(6, seen.len() * heads * d);
            let scale = 1.0 / (d as f32).sqrt();
            let y = same(q.len(), |y, isa| {
                attend(&q, heads, cache, &seen, scale, y, 2, isa)
            });
            close(
                &y,
                &definition(&q, heads, cache, &seen, f64::from(scale)),
                2e-6,
            );
            // A row does not know of the others.
            for (i, s) in seen.iter().enumerate() {
                let row = i * heads * d..(i + 1) * heads * d;
                let mut alone = vec![0f32; heads * d];
                attend(
                    &q[row.clone()],
                    heads,
                    cache,
                    std::slice::from_ref(s),
                    scale,
                    &mut alone,
                    1,
                    Isa::chosen(),
                );
                assert_eq!(alone, y[row]);
            }
        }
    }

    #[test]
    fn where_columns_stand_does_not_matter() {
        let (d, n) = (64, 50);
        let (k, v) = (numbers(7, n * d), numbers(8, n * d));
        // The same columns with gaps of other content between the last ones.
        let spread = |x: &[f32], other: &[f32]| -> Vec<f32> {
            let mut out = x[..40 * d].to_vec();
            for i in 40..n {
                out.extend_from_slice(&other[i * d..(i + 1) * d]);
                out.extend_from_slice(&x[i * d..(i + 1) * d]);
            }
            out
        };
        let (wide_k, wide_v) = (spread(&k, &v), spread(&v, &k));
        let q = numbers(9, d);
        for isa in isas() {
            let run = |keys: &[f32], values: &[f32], seen: Seen| {
                let mut y = vec![0f32; d];
                let cache = Cache {
                    keys,
                    values,
                    kv_heads: 1,
                    head_dim: d,
                };
                attend(&q, 1, cache, &[seen], 0.125, &mut y, 1, isa);
                y
            };
            let chain = run(
                &k,
                &v,
                Seen {
                    first: 0,
                    end: n,
                    more: vec![],
                },
            );
            let more = (0..10).map(|i| 41 + 2 * i).collect();
            let tree = run(
                &wide_k,
                &wide_v,
                Seen {
                    first: 0,
                    end: 40,
                    more,
                },
            );
            assert_eq!(chain, tree, "{isa}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_not_hidden() {
        let (k, v) = (numbers(1, 20 * 16), numbers(2, 20 * 16));
        let q = numbers(3, 16);
        for isa in isas() {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut keys = k.clone();
                keys[5 * 16..6 * 16].fill(bad);
                let cache = Cache {
                    keys: &keys,
                    values: &v,
                    kv_heads: 1,
                    head_dim: 16,
                };
                let mut y = vec![0f32; 16];
                let all = Seen {
                    first: 0,
                    end: 20,
                    more: vec![],
                };
                attend(&q, 1, cache, &[all], 1.0, &mut y, 1, isa);
                // (An infinite key times a mixed query is NaN as well.)
                assert!(y.iter().all(|y| y.is_nan()), "{isa}, {bad}");
                let others = Seen {
                    first: 6,
                    end: 20,
                    more: vec![],
                };
                attend(&q, 1, cache, &[others], 1.0, &mut y, 1, isa);
                assert!(y.iter().all(|y| y.is_finite()));
            }
        }
    }
}
