//! Tests of distributions: does a sampler follow the law it claims?

use std::f64::consts::PI;

/// Cells with a smaller expected count are pooled before a chi-square test.
const SMALLEST_EXPECTED: f64 = 5.0;
/// Terms or iterations after which the incomplete gamma function is accurate.
const GAMMA_ITERATIONS: usize = 10_000;

/// Result of a chi-square test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChiSquare {
    /// `sum (observed - expected)^2 / expected` over the cells after pooling.
    pub statistic: f64,
    /// Cells after pooling minus one.
    pub degrees_of_freedom: usize,
    /// Chance of a statistic at least as large if the law holds.
    pub p_value: f64,
}

/// Tests counts against the probabilities of a law (Pearson). Cells that expect fewer than
/// five counts are pooled into one. A count where the law has no mass gives p = 0.
///
/// `probs` need not be normalised. Fewer than two cells leave nothing to test: p = 1.
#[must_use]
pub fn chi_square(observed: &[u64], probs: &[f64]) -> ChiSquare {
    let n: f64 = observed.iter().map(|&o| o as f64).sum();
    let total: f64 = probs.iter().sum();
    let mut statistic = 0.0;
    let mut cells = 0_usize;
    let mut pool = (0.0, 0.0);
    let mut impossible = observed.len() > probs.len();
    let mut count = |o: f64, e: f64| {
        statistic += (o - e).powi(2) / e;
        cells += 1;
    };
    for (&o, &p) in observed.iter().zip(probs) {
        let (o, e) = (o as f64, n * p / total);
        impossible |= e <= 0.0 && o > 0.0;
        if e >= SMALLEST_EXPECTED {
            count(o, e);
        } else {
            pool = (pool.0 + o, pool.1 + e);
        }
    }
    if pool.1 > 0.0 {
        count(pool.0, pool.1);
    }
    let degrees_of_freedom = cells.saturating_sub(1);
    let p_value = match degrees_of_freedom {
        _ if impossible => 0.0,
        0 => 1.0,
        d => gamma_q(d as f64 / 2.0, statistic / 2.0),
    };
    ChiSquare {
        statistic,
        degrees_of_freedom,
        p_value,
    }
}

/// Total variation distance between counts and the probabilities of a law.
#[must_use]
pub fn total_variation(observed: &[u64], probs: &[f64]) -> f64 {
    let n: f64 = observed.iter().map(|&o| o as f64).sum();
    let total: f64 = probs.iter().sum();
    observed
        .iter()
        .zip(probs)
        .map(|(&o, p)| (o as f64 / n - p / total).abs())
        .sum::<f64>()
        / 2.0
}

/// Result of a Kolmogorov-Smirnov test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KolmogorovSmirnov {
    /// Largest distance between the two distribution functions.
    pub statistic: f64,
    /// Chance of a distance at least as large if the law holds (asymptotic, good from
    /// some tens of samples on).
    pub p_value: f64,
}

/// Tests samples against a continuous distribution function.
#[must_use]
pub fn kolmogorov_smirnov(samples: &[f64], cdf: impl Fn(f64) -> f64) -> KolmogorovSmirnov {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len() as f64;
    let gap = |(i, &x): (usize, &f64)| {
        let f = cdf(x);
        (f - i as f64 / n).max((i + 1) as f64 / n - f)
    };
    let statistic = sorted.iter().enumerate().map(gap).fold(0.0, f64::max);
    // Stephens' small-sample form of the argument.
    let p_value = kolmogorov_tail((n.sqrt() + 0.12 + 0.11 / n.sqrt()) * statistic);
    KolmogorovSmirnov { statistic, p_value }
}

/// `2 sum_{k>=1} (-1)^(k-1) exp(-2 k^2 x^2)`, the tail of Kolmogorov's distribution.
fn kolmogorov_tail(x: f64) -> f64 {
    if x < 0.2 {
        return 1.0;
    }
    let term = |k: i32| {
        f64::from(if k % 2 == 1 { 2 } else { -2 }) * (-2.0 * f64::from(k * k) * x * x).exp()
    };
    (1..=100).map(term).sum::<f64>().clamp(0.0, 1.0)
}

/// Distribution function of the standard normal law.
#[must_use]
pub fn normal_cdf(x: f64) -> f64 {
    let tail = gamma_q(0.5, x * x / 2.0) / 2.0;
    if x > 0.0 { 1.0 - tail } else { tail }
}

/// Regularised upper incomplete gamma function `Q(a, x)` for `a > 0`, `x >= 0`: series
/// below `a + 1`, Lentz' continued fraction above.
#[must_use]
pub fn gamma_q(a: f64, x: f64) -> f64 {
    if !(a > 0.0 && x >= 0.0) {
        return f64::NAN;
    }
    if x == 0.0 {
        return 1.0;
    }
    if x.is_infinite() {
        return 0.0;
    }
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 {
        let mut term = 1.0 / a;
        let mut sum = term;
        for i in 1..GAMMA_ITERATIONS {
            term *= x / (a + i as f64);
            sum += term;
            if term < sum * f64::EPSILON {
                break;
            }
        }
        return (1.0 - front * sum).clamp(0.0, 1.0);
    }
    let tiny = f64::MIN_POSITIVE / f64::EPSILON;
    let mut b = x + 1.0 - a;
    let mut c = 1.0 / tiny;
    let mut d = 1.0 / b;
    let mut fraction = d;
    for i in 1..GAMMA_ITERATIONS {
        let i = i as f64;
        let an = -i * (i - a);
        b += 2.0;
        d = an * d + b;
        d = 1.0 / if d.abs() < tiny { tiny } else { d };
        c = b + an / c;
        c = if c.abs() < tiny { tiny } else { c };
        let step = d * c;
        fraction *= step;
        if (step - 1.0).abs() < f64::EPSILON {
            break;
        }
    }
    (front * fraction).clamp(0.0, 1.0)
}

/// Logarithm of the gamma function for `x > 0` (Lanczos, g = 7, nine terms).
fn ln_gamma(x: f64) -> f64 {
    const COEFFICIENTS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        // Reflection.
        return (PI / (PI * x).sin()).ln() - ln_gamma(1.0 - x);
    }
    let x = x - 1.0;
    let series = |(i, c): (usize, &f64)| c / (x + i as f64 + 1.0);
    let sum = 0.999_999_999_999_809_9 + COEFFICIENTS.iter().enumerate().map(series).sum::<f64>();
    let t = x + 7.5;
    0.5 * (2.0 * PI).ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9 * b.abs().max(1e-3), "{a} != {b}");
    }

    #[test]
    fn known_values() {
        close(ln_gamma(5.0), 24_f64.ln());
        close(ln_gamma(0.5), PI.sqrt().ln());
        close(ln_gamma(0.1), 2.252_712_651_734_206);
        // Q(1, x) = exp(-x); Q(1/2, x) = erfc(sqrt x).
        for x in [1e-6, 0.3, 1.9, 2.1, 30.0] {
            close(gamma_q(1.0, x), (-x).exp());
        }
        close(normal_cdf(1.96), 0.975_002_104_851_779_5);
        close(normal_cdf(-1.0), 0.158_655_253_931_457_05);
        close(normal_cdf(0.0), 0.5);
        // Quantiles of chi-square tables.
        close(gamma_q(0.5, 3.841_458_820_694_124 / 2.0), 0.05);
        close(gamma_q(50.0, 124.342_113_404_004_06 / 2.0), 0.05);
        close(gamma_q(5.0, 29.588_298_445_074_42 / 2.0), 0.001);
        assert!(gamma_q(-1.0, 1.0).is_nan());
    }

    #[test]
    fn chi_square_by_hand() {
        let test = chi_square(&[44, 56], &[0.5, 0.5]);
        close(test.statistic, 1.44);
        assert_eq!(test.degrees_of_freedom, 1);
        close(test.p_value, 0.230_139_340_443_415_8);
        // Two cells expecting 2 each are pooled.
        let pooled = chi_square(&[96, 3, 1], &[0.96, 0.02, 0.02]);
        assert_eq!(pooled.degrees_of_freedom, 1);
        assert!(pooled.p_value > 0.99);
        assert_eq!(chi_square(&[1, 99], &[0.0, 1.0]).p_value, 0.0);
        assert_eq!(chi_square(&[100], &[1.0]).p_value, 1.0);
        close(total_variation(&[44, 56], &[1.0, 1.0]), 0.06);
    }

    #[test]
    fn kolmogorov_smirnov_tells_laws_apart() {
        // A regular grid fits its law perfectly, and not a shifted one.
        let grid: Vec<f64> = (0..1000).map(|i| (f64::from(i) + 0.5) / 1000.0).collect();
        assert!(kolmogorov_smirnov(&grid, |x| x).p_value > 0.999);
        assert!(kolmogorov_smirnov(&grid, |x| x.powf(1.2)).p_value < 1e-3);
        // Critical value of the limit law at 5 %.
        assert!((kolmogorov_tail(1.358) - 0.05).abs() < 2e-4);
    }
}
