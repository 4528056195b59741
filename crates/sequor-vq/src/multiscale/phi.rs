//! The small convolutions after up-sampling, shared by neighbouring scales.

use crate::Result;
use sequor_nn::{Init, Kind, ParamBuilder, Tensor};

/// `phi(h) = (1 - ratio) h + ratio conv3x3(h)`, and which convolution serves which scale.
#[derive(Debug)]
pub(crate) struct Phi {
    convolutions: Vec<(Tensor, Tensor)>,
    of_scale: Vec<usize>,
    ratio: f64,
}

impl Phi {
    pub fn new(
        p: &ParamBuilder,
        dim: i64,
        count: usize,
        scales: usize,
        ratio: f64,
    ) -> Result<Self> {
        // He et al.'s law for a convolution with 9 dim inputs, as libtorch's default.
        let bound = (9.0 * dim as f64).sqrt().recip();
        let convolutions: Result<Vec<_>> = (0..count)
            .map(|i| {
                let p = p.pp(i);
                let weight = p.matrix("weight", &[dim, dim, 3, 3], Init::Uniform(bound))?;
                let bias = p.matrix("bias", &[dim], Init::Uniform(bound))?;
                Ok((weight, bias))
            })
            .collect();
        Ok(Self {
            convolutions: convolutions?,
            of_scale: convolution_of_scale(count, scales),
            ratio,
        })
    }

    /// `h`: `[batch, dim, height, width]` at scale number `scale`.
    pub fn apply(&self, h: &Tensor, scale: usize) -> Result<Tensor> {
        let chosen = self.of_scale.get(scale);
        let Some((weight, bias)) = chosen.and_then(|&i| self.convolutions.get(i)) else {
            return Ok(h.shallow_clone());
        };
        let (weight, bias) = (weight.f_to_kind(Kind::Float)?, bias.f_to_kind(Kind::Float)?);
        let smooth = h.f_conv2d(&weight, Some(&bias), [1], [1], [1], 1)?;
        let kept = h.f_mul_scalar(1.0 - self.ratio)?;
        Ok(kept.f_add(&smooth.f_mul_scalar(self.ratio)?)?)
    }
}

/// Which of `count` convolutions each of `scales` scales uses: the nearest of `count` ticks
/// in `(0, 1)` to `k / (scales - 1)`.
///
/// With 4 convolutions, as published, the table is written down for the published numbers of
/// scales: for 10 of them scales 2 and 7 lie half-way between two ticks, and the last bit of
/// an f64 decides. For other numbers the same arithmetic is repeated in f64.
pub(crate) fn convolution_of_scale(count: usize, scales: usize) -> Vec<usize> {
    if count == 4 {
        let known: Option<&[usize]> = match scales {
            3 => Some(&[0, 2, 3]),
            4 => Some(&[0, 1, 2, 3]),
            5 => Some(&[0, 1, 2, 2, 3]),
            6 => Some(&[0, 0, 1, 2, 3, 3]),
            7 => Some(&[0, 0, 1, 2, 2, 3, 3]),
            10 => Some(&[0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
            _ => None,
        };
        if let Some(table) = known {
            return table.to_vec();
        }
    }
    computed(count, scales)
}

fn computed(count: usize, scales: usize) -> Vec<usize> {
    let n = count as f64;
    // The outermost ticks lie a third of their distance from the ends for 4, half otherwise.
    let first = if count == 4 {
        1.0 / 3.0 / n
    } else {
        1.0 / 2.0 / n
    };
    let last = 1.0 - first;
    let step = (last - first) / (n - 1.0).max(1.0);
    let tick = |i: usize| {
        if i + 1 == count {
            last
        } else {
            i as f64 * step + first
        }
    };
    (0..scales)
        .map(|k| {
            let at = k as f64 / (scales as f64 - 1.0).max(1.0);
            let mut best = 0;
            for i in 1..count {
                if (tick(i) - at).abs() < (tick(best) - at).abs() {
                    best = i;
                }
            }
            best
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_written_table_is_what_the_arithmetic_gives() {
        for scales in [3, 4, 5, 6, 7, 10] {
            assert_eq!(
                convolution_of_scale(4, scales),
                computed(4, scales),
                "{scales} scales"
            );
        }
        assert_eq!(convolution_of_scale(4, 1), [0]);
        assert_eq!(convolution_of_scale(1, 3), [0, 0, 0]);
        assert_eq!(convolution_of_scale(2, 4), [0, 0, 1, 1]);
        assert!(convolution_of_scale(0, 2).iter().all(|&i| i == 0));
    }
}
