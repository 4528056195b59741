//! Counter-based random numbers: Philox4x32-10.
//!
//! A draw is a pure function of (seed, request, position, purpose, how many
//! draws came before in that stream). Nothing is shared between requests, so the
//! random numbers of a request do not depend on the batch it runs in, on the
//! thread that serves it, or on how many numbers another purpose consumed. A
//! result can be repeated from its printed seed.
//!
//! # From key to stream
//!
//! Philox maps a 128-bit counter to 128 random bits under a 64-bit key, as a
//! bijection for every key. A stream is made in two passes:
//!
//! 1. key = seed, counter = (request, purpose, constant). For one seed this is
//!    injective in (request, purpose); call the result `d`.
//! 2. key = first half of `d`; counter = (block, position) xor (0, second half
//!    of `d` laid over the high word of the block and the low word of the
//!    position). For one `d` this is injective in (position, block).
//!
//! Two positions of the same request and purpose therefore never share a block,
//! and streams of different seed, request or purpose can (within their first 2^32
//! blocks) only if 96 of the 128 derived bits coincide.
//!
//! Integers and uniforms are the same on every platform. Normals, exponentials
//! and Gumbel draws call the logarithm, sine and cosine of the platform, whose
//! last bit may differ between systems.
//!
//! Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3" (SC 2011).

use std::f64::consts::TAU;

/// What random numbers are used for. Draws of different purposes are
/// independent, so that, for instance, the accept test of a draft never sees the
/// number that drew it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Purpose {
    /// Drawing a token from the target distribution.
    Sample = 1,
    /// Accept/reject tests of drafted tokens.
    Accept = 2,
    /// Drawing from the residual distribution after a rejection.
    Residual = 3,
    /// Drawing drafted tokens.
    Draft = 4,
    /// Noise of diffusion and flow models.
    Noise = 5,
    /// Initial weights.
    Init = 6,
    /// Order and augmentation of data.
    Data = 7,
    /// Dropout masks.
    Dropout = 8,
    /// Tests and measurements.
    Test = 9,
}

impl Purpose {
    /// Every purpose, in the order of the codes.
    pub const ALL: [Self; 9] = [
        Self::Sample,
        Self::Accept,
        Self::Residual,
        Self::Draft,
        Self::Noise,
        Self::Init,
        Self::Data,
        Self::Dropout,
        Self::Test,
    ];

    /// The stable code, for storing; codes are never reused.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The purpose with this code, if there is one.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.code() == code)
    }
}

/// What identifies the randomness of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The seed that the user gives or that is printed.
    pub seed: u64,
    /// The number of the request, sample or training step under this seed.
    pub request: u64,
}

impl Key {
    /// A key from a seed and a request number.
    #[must_use]
    pub const fn new(seed: u64, request: u64) -> Self {
        Self { seed, request }
    }

    /// The stream for `purpose` at `position` (for tokens: the index in the
    /// sequence of the token that is drawn). Costs one Philox block.
    #[must_use]
    pub fn stream(&self, position: u64, purpose: Purpose) -> Stream {
        /// Keeps derivation counters apart from any other use of the seed as key.
        const DERIVE: u32 = 0x5e90_0001;
        let [request_low, request_high] = halves(self.request);
        let counter = [request_low, request_high, purpose.code(), DERIVE];
        let [k0, k1, d0, d1] = philox4x32_10(counter, halves(self.seed));
        let [position_low, position_high] = halves(position);
        Stream {
            key: [k0, k1],
            block_high: d0,
            position: [position_low ^ d1, position_high],
            next_block: 0,
            words: [0; 4],
            used: 4,
        }
    }
}

/// An endless stream of random numbers; see [`Key::stream`].
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    /// Xored into the high word of the block number.
    block_high: u32,
    position: [u32; 2],
    next_block: u64,
    words: [u32; 4],
    /// How many of `words` were handed out.
    used: usize,
}

impl Stream {
    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used >= self.words.len() {
            let [low, high] = halves(self.next_block);
            let counter = [
                low,
                high ^ self.block_high,
                self.position[0],
                self.position[1],
            ];
            self.words = philox4x32_10(counter, self.key);
            self.next_block = self.next_block.wrapping_add(1);
            self.used = 0;
        }
        let word = self.words[self.used];
        self.used += 1;
        word
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        let high = u64::from(self.next_u32());
        high << 32 | low
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * 2f64.powi(-53)
    }

    /// Uniform in `(0, 1)`: an odd multiple of 2^-53, safe for a logarithm of
    /// itself and of one minus itself.
    pub fn uniform_open(&mut self) -> f64 {
        ((self.next_u64() >> 12) as f64 + 0.5) * 2f64.powi(-52)
    }

    /// Uniform integer in `0..n`, without bias. `n = 0` is read as 1.
    ///
    /// Source: Lemire, "Fast random integer generation in an interval" (2019).
    pub fn below(&mut self, n: u64) -> u64 {
        let n = n.max(1);
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            let (high, low) = ((product >> 64) as u64, product as u64);
            // Of the 2^64 inputs the first 2^64 mod n of each bucket are too many.
            if low >= n || low >= n.wrapping_neg() % n {
                return high;
            }
        }
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (2.0 * self.exponential()).sqrt();
        radius * (TAU * self.uniform()).cos()
    }

    /// Exponential with mean 1, always positive.
    pub fn exponential(&mut self) -> f64 {
        -self.uniform_open().ln()
    }

    /// Standard Gumbel: the index of the largest `score + gumbel` is distributed
    /// as softmax of the scores.
    pub fn gumbel(&mut self) -> f64 {
        -self.exponential().ln()
    }

    /// Puts `items` in uniformly random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }

    /// Fills `out` with uniforms in `[0, 1)`, multiples of 2^-24; one 32-bit word
    /// each.
    pub fn fill_uniform_f32(&mut self, out: &mut [f32]) {
        for x in out {
            *x = (self.next_u32() >> 8) as f32 * 2f32.powi(-24);
        }
    }

    /// Fills `out` with standard normals, within 6.8 of zero; one 32-bit word
    /// each, rounded up to a pair. These are not the numbers that [`Stream::normal`] would give.
    pub fn fill_normal_f32(&mut self, out: &mut [f32]) {
        let unit = 2f64.powi(-32);
        for pair in out.chunks_mut(2) {
            let radius = (-2.0 * ((f64::from(self.next_u32()) + 0.5) * unit).ln()).sqrt();
            let (sin, cos) = (TAU * f64::from(self.next_u32()) * unit).sin_cos();
            for (x, side) in pair.iter_mut().zip([cos, sin]) {
                *x = (radius * side) as f32;
            }
        }
    }
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// One block of Philox4x32-10: 128 random bits of a 128-bit counter under a
/// 64-bit key.
#[must_use]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIER: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
    /// Fractions of the golden ratio and of the square root of three.
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let [low0, high0] = halves(MULTIPLIER[0] * u64::from(c0));
        let [low1, high1] = halves(MULTIPLIER[1] * u64::from(c2));
        [c0, c1, c2, c3] = [high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0];
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn stream(seed: u64) -> Stream {
        Key::new(seed, 0).stream(0, Purpose::Test)
    }

    /// Chi-square of `counts` against equal expectation, in standard deviations
    /// from its mean.
    fn chi_square_sigmas(counts: &[u64]) -> f64 {
        let total: u64 = counts.iter().sum();
        let expected = total as f64 / counts.len() as f64;
        let chi: f64 = counts
            .iter()
            .map(|&c| (c as f64 - expected).powi(2) / expected)
            .sum();
        let freedom = counts.len() as f64 - 1.0;
        (chi - freedom) / (2.0 * freedom).sqrt()
    }

    /// Largest distance between the empirical and the given distribution
    /// function, times the square root of the sample size.
    fn kolmogorov_smirnov(mut xs: Vec<f64>, cdf: impl Fn(f64) -> f64) -> f64 {
        xs.sort_by(f64::total_cmp);
        let n = xs.len() as f64;
        let distance = xs.iter().enumerate().fold(0.0f64, |d, (i, &x)| {
            let f = cdf(x);
            d.max((f - i as f64 / n).abs())
                .max((f - (i as f64 + 1.0) / n).abs())
        });
        distance * n.sqrt()
    }

    /// Distribution function of the standard normal by Simpson's rule.
    fn normal_cdf(x: f64) -> f64 {
        let n = 200;
        let h = x.abs() / f64::from(n);
        let density = |t: f64| (-t * t / 2.0).exp() / TAU.sqrt();
        let sum: f64 = (0..=n)
            .map(|i| {
                let weight = if i == 0 || i == n {
                    1.0
                } else {
                    f64::from(2 + 2 * (i % 2))
                };
                weight * density(f64::from(i) * h)
            })
            .sum();
        0.5 + x.signum() * sum * h / 3.0
    }

    #[test]
    fn known_answers() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
            ),
            (
                [!0; 4],
                [!0; 2],
                [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
            ),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn streams_never_change_between_versions() {
        // Stored results are repeated from their seed: these numbers are a promise.
        let mut s = Key::new(42, 7).stream(1000, Purpose::Sample);
        let first: Vec<u32> = (0..6).map(|_| s.next_u32()).collect();
        let mut again = Key::new(42, 7).stream(1000, Purpose::Sample);
        assert_eq!(first, (0..6).map(|_| again.next_u32()).collect::<Vec<_>>());
        assert_eq!(first, PROMISED);
        for purpose in Purpose::ALL {
            assert_eq!(Purpose::from_code(purpose.code()), Some(purpose));
        }
        assert_eq!(Purpose::from_code(0), None);
        assert_eq!(Purpose::Sample.code(), 1);
        assert_eq!(Purpose::Test.code(), 9);
    }

    #[test]
    fn every_part_of_the_key_gives_another_stream() {
        let values = [
            0u64,
            1,
            2,
            255,
            1 << 31,
            1 << 32,
            (1 << 32) + 1,
            1 << 63,
            u64::MAX,
        ];
        let mut seen = HashSet::new();
        for &seed in &values {
            for &request in &values {
                for &position in &values {
                    for purpose in Purpose::ALL {
                        let mut s = Key::new(seed, request).stream(position, purpose);
                        assert!(seen.insert([s.next_u64(), s.next_u64()]));
                    }
                }
            }
        }
    }

    #[test]
    fn neighbouring_streams_are_uncorrelated() {
        // First byte of the xor of streams whose keys differ in one part by one.
        type Neighbour = fn(u64) -> (Stream, Stream);
        let neighbours: [Neighbour; 4] = [
            |i| (stream(i), stream(i + 1)),
            |i| {
                let at = |r| Key::new(3, r).stream(5, Purpose::Sample);
                (at(i), at(i + 1))
            },
            |i| {
                let at = |p| Key::new(3, 4).stream(p, Purpose::Sample);
                (at(i), at(i + 1))
            },
            |i| {
                let at = |p| Key::new(3, 4).stream(i, p);
                (at(Purpose::Accept), at(Purpose::Residual))
            },
        ];
        for pair in neighbours {
            let mut bytes = [0u64; 256];
            for i in 0..20_000 {
                let (mut a, mut b) = pair(i);
                for byte in (a.next_u32() ^ b.next_u32()).to_le_bytes() {
                    bytes[usize::from(byte)] += 1;
                }
            }
            let sigmas = chi_square_sigmas(&bytes);
            assert!(sigmas.abs() < 4.5, "{sigmas}");
        }
        // And the bytes of one stream are uniform.
        let (mut s, mut bytes) = (stream(1), [0u64; 256]);
        for _ in 0..100_000 {
            s.next_u32()
                .to_le_bytes()
                .iter()
                .for_each(|&b| bytes[usize::from(b)] += 1);
        }
        assert!(chi_square_sigmas(&bytes).abs() < 4.5);
    }

    #[test]
    fn uniform_has_its_mean_variance_and_range() {
        let (mut s, n) = (stream(2), 200_000);
        let xs: Vec<f64> = (0..n).map(|_| s.uniform()).collect();
        let mean = xs.iter().sum::<f64>() / f64::from(n);
        let variance = xs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!((mean - 0.5).abs() < 0.003, "{mean}");
        assert!((variance - 1.0 / 12.0).abs() < 0.001, "{variance}");
        assert!(xs.iter().all(|x| (0.0..1.0).contains(x)));
        assert!(kolmogorov_smirnov(xs, |x| x) < 1.95);
        let mut open = (0..n).map(|_| s.uniform_open());
        assert!(open.all(|x| x > 0.0 && x < 1.0));
        // The ends of the open interval are reached without rounding to 0 or 1.
        let largest = (((u64::MAX >> 12) as f64) + 0.5) * 2f64.powi(-52);
        assert!(largest < 1.0 && 1.0 - largest == 2f64.powi(-53));
    }

    #[test]
    fn normal_has_its_moments_and_shape() {
        let (mut s, n) = (stream(3), 100_000);
        let single: Vec<f64> = (0..n).map(|_| s.normal()).collect();
        let mut filled = vec![0f32; n];
        s.fill_normal_f32(&mut filled);
        for xs in [single, filled.into_iter().map(f64::from).collect()] {
            let moment = |k: i32| xs.iter().map(|x| x.powi(k)).sum::<f64>() / n as f64;
            assert!(moment(1).abs() < 0.015, "{}", moment(1));
            assert!((moment(2) - 1.0).abs() < 0.02, "{}", moment(2));
            assert!(moment(3).abs() < 0.06, "{}", moment(3));
            assert!((moment(4) - 3.0).abs() < 0.15, "{}", moment(4));
            // The two of a Box-Muller pair are independent.
            let pairs = xs.chunks(2).map(|p| p[0] * p[1]).sum::<f64>() / (n as f64 / 2.0);
            assert!(pairs.abs() < 0.02, "{pairs}");
            assert!(kolmogorov_smirnov(xs, normal_cdf) < 1.95);
        }
    }

    #[test]
    fn exponential_and_gumbel_have_their_distribution() {
        let mut s = stream(4);
        let exponential = (0..50_000).map(|_| s.exponential()).collect();
        assert!(kolmogorov_smirnov(exponential, |x| 1.0 - (-x).exp()) < 1.95);
        let gumbel = (0..50_000).map(|_| s.gumbel()).collect();
        assert!(kolmogorov_smirnov(gumbel, |x| (-(-x).exp()).exp()) < 1.95);
    }

    #[test]
    fn below_is_unbiased() {
        let mut s = stream(5);
        for n in [1u64, 2, 3, 7, 10, 1000] {
            let mut counts = vec![0u64; n as usize];
            for _ in 0..100_000 {
                counts[s.below(n) as usize] += 1;
            }
            assert!(n == 1 || chi_square_sigmas(&counts).abs() < 4.5, "{n}");
        }
        // Here a plain multiplication would hit the first third twice as often.
        let n = 3 << 62;
        let mut thirds = [0u64; 3];
        for _ in 0..30_000 {
            thirds[(s.below(n) >> 62) as usize] += 1;
        }
        assert!(chi_square_sigmas(&thirds).abs() < 4.5, "{thirds:?}");
        assert_eq!(s.below(0), 0);
    }

    #[test]
    fn shuffle_gives_every_order_equally_often() {
        let (mut s, mut counts) = (stream(6), [0u64; 24]);
        for _ in 0..48_000 {
            let mut items = [0usize, 1, 2, 3];
            s.shuffle(&mut items);
            // Lehmer code of the permutation.
            let rank = (0..4).fold(0, |rank, i| {
                rank * (4 - i) + items[i + 1..].iter().filter(|&&x| x < items[i]).count()
            });
            counts[rank] += 1;
        }
        assert!(chi_square_sigmas(&counts).abs() < 4.5, "{counts:?}");
        s.shuffle::<u8>(&mut []);
    }

    #[test]
    fn filling_uses_one_word_each() {
        let (mut a, mut b) = (stream(7), stream(7));
        let mut xs = [0f32; 5];
        a.fill_uniform_f32(&mut xs);
        for x in xs {
            assert_eq!(x, (b.next_u32() >> 8) as f32 / 16_777_216.0);
        }
        assert_eq!(a.next_u32(), b.next_u32());
    }

    const PROMISED: [u32; 6] = [
        3_857_864_811,
        3_241_114_928,
        55_517_262,
        1_826_801_308,
        2_719_551_262,
        4_237_063_562,
    ];
}
