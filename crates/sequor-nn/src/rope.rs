//! Rotary position embedding (Su et al., 2021) with every published scaling.
//!
//! One engine serves text and, through the map from frequencies to axes, pictures
//! and clips: each frequency turns with the position along its own axis. Tables
//! are computed in f32 from explicit positions, once per forward for all layers.

use crate::matrix::kernels_take;
use crate::{Error, Result};
use sequor_kernels::bridge;
use sequor_kernels::fused::{Pairs, rotate};
use sequor_kernels::matmul::Isa;
use tch::{Device, Tensor};

/// Which two channels form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Channel `j` with channel `j + dim/2` (the layout of Hugging Face files).
    Halves,
    /// Channels `2j` and `2j + 1`.
    Neighbours,
}

/// How frequencies are changed to reach beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Unchanged.
    None,
    /// Positions divided by `factor` (Chen et al., 2023).
    Linear {
        /// Ratio of the new context to the trained one.
        factor: f64,
    },
    /// The base grows with the sequence once it is longer than `original` ("NTK-aware").
    Dynamic {
        /// Ratio of the new context to the trained one.
        factor: f64,
        /// Trained context length.
        original: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Trained context length.
        original: f64,
    },
    /// YaRN (Peng et al., 2023), equation 17 and following.
    Yarn {
        /// Ratio of the new context to the trained one.
        factor: f64,
        /// Trained context length.
        original: f64,
        /// Number of turns above which a frequency is kept (32).
        beta_fast: f64,
        /// Number of turns below which a frequency is divided (1).
        beta_slow: f64,
        /// Round the ends of the ramp to whole channels.
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// LongRoPE (Ding et al., 2024): one divisor per frequency.
    LongRope {
        /// Divisors up to the trained context.
        short: Vec<f64>,
        /// Divisors beyond it.
        long: Vec<f64>,
        /// Trained context length.
        original: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
}

/// A rotary embedding.
#[derive(Clone, Debug)]
pub struct Rope {
    dim: usize,
    theta: f64,
    pairing: Pairing,
    scaling: Scaling,
    /// For each frequency, the axis whose position turns it.
    axes: Vec<usize>,
}

impl Rope {
    /// The base of the frequencies.
    #[must_use]
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// What is done to positions or frequencies for longer texts.
    #[must_use]
    pub fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    /// Rotates the first `dim` channels of each head, along one axis.
    ///
    /// # Errors
    /// [`Error::Config`] when `dim` is odd or zero, `theta` is not positive, or a
    /// scaling has impossible numbers.
    pub fn new(dim: usize, theta: f64, pairing: Pairing, scaling: Scaling) -> Result<Self> {
        if dim == 0 || !dim.is_multiple_of(2) {
            return Err(Error::Config(format!(
                "rotary embedding needs an even number of channels, not {dim}"
            )));
        }
        if !(theta.is_finite() && theta > 0.0) {
            return Err(Error::Config(format!(
                "rope_theta must be positive, not {theta}"
            )));
        }
        check(&scaling, dim)?;
        Ok(Self {
            dim,
            theta,
            pairing,
            scaling,
            axes: vec![0; dim / 2],
        })
    }

    /// Gives each frequency an axis of its own choosing (`axes[j]` for frequency `j`).
    ///
    /// # Errors
    /// [`Error::Config`] when there is not one axis per frequency.
    pub fn with_axes(mut self, axes: Vec<usize>) -> Result<Self> {
        if axes.len() != self.dim / 2 {
            return Err(Error::Config(format!(
                "{} axes for {} rotary frequencies",
                axes.len(),
                self.dim / 2
            )));
        }
        self.axes = axes;
        Ok(self)
    }

    /// Number of rotated channels.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Frequencies (radians per position) for a sequence of `len` positions.
    pub fn frequencies(&self, len: f64) -> Vec<f32> {
        let dim = self.dim as f64;
        let plain =
            |theta: f64| (0..self.dim / 2).map(move |j| theta.powf(-(2.0 * j as f64) / dim));
        let f: Vec<f64> = match &self.scaling {
            Scaling::None => plain(self.theta).collect(),
            Scaling::Linear { factor } => plain(self.theta).map(|f| f / factor).collect(),
            Scaling::Dynamic { factor, original } => {
                let len = len.max(*original);
                let stretch = (factor * len / original) - (factor - 1.0);
                plain(self.theta * stretch.powf(dim / (dim - 2.0))).collect()
            }
            Scaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => plain(self.theta)
                .map(|f| {
                    let turns = original * f / std::f64::consts::TAU;
                    if turns < *low {
                        f / factor
                    } else if turns > *high {
                        f
                    } else {
                        let smooth = (turns - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
            Scaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                // The channel at which a frequency makes `n` turns over the trained context.
                let channel = |n: f64| {
                    dim * (original / (n * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (channel(*beta_fast), channel(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                plain(self.theta)
                    .enumerate()
                    .map(|(j, f)| {
                        let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * ramp + f * (1.0 - ramp)
                    })
                    .collect()
            }
            Scaling::LongRope {
                short,
                long,
                original,
                ..
            } => {
                let divisors = if len > *original { long } else { short };
                plain(self.theta)
                    .zip(divisors)
                    .map(|(f, d)| f / d)
                    .collect()
            }
        };
        f.into_iter().map(|f| f as f32).collect()
    }

    fn magnitude(&self) -> f32 {
        match self.scaling {
            Scaling::Yarn {
                attention_factor, ..
            }
            | Scaling::LongRope {
                attention_factor, ..
            } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Cosines and sines for rows at `positions[axis][row]`.
    ///
    /// # Errors
    /// [`Error::Input`] when an axis is missing or axes differ in length.
    pub fn tables(&self, positions: &[&[f32]], device: Device) -> Result<RopeTables> {
        let rows = positions.first().map_or(0, |p| p.len());
        let needed = self.axes.iter().max().map_or(0, |a| a + 1);
        if positions.len() < needed || positions.iter().any(|p| p.len() != rows) {
            return Err(Error::Input(format!(
                "rotary positions must give {needed} axes of equal length"
            )));
        }
        let len = positions
            .iter()
            .flat_map(|p| p.iter())
            .fold(0f32, |m, &p| m.max(p))
            + 1.0;
        let freqs = self.frequencies(f64::from(len));
        let magnitude = self.magnitude();
        let half = self.dim / 2;
        let (mut cos, mut sin) = (vec![0f32; rows * self.dim], vec![0f32; rows * self.dim]);
        for (row, (cos, sin)) in cos
            .chunks_exact_mut(self.dim)
            .zip(sin.chunks_exact_mut(self.dim))
            .enumerate()
        {
            for (j, (&f, &axis)) in freqs.iter().zip(&self.axes).enumerate() {
                let angle = positions[axis][row] * f;
                let (s, c) = (
                    f64::from(angle).sin() as f32 * magnitude,
                    f64::from(angle).cos() as f32 * magnitude,
                );
                let (a, b) = match self.pairing {
                    Pairing::Halves => (j, j + half),
                    Pairing::Neighbours => (2 * j, 2 * j + 1),
                };
                // The sign of the rotation is folded into the table: the first
                // channel of a pair takes -sin times its partner.
                (cos[a], cos[b]) = (c, c);
                (sin[a], sin[b]) = (-s, s);
            }
        }
        let shape = [rows as i64, 1, self.dim as i64];
        let tensor = |v: &[f32]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(v)?
                .f_reshape(shape)?
                .f_to_device(device)?)
        };
        Ok(RopeTables {
            cos: tensor(&cos)?,
            sin: tensor(&sin)?,
            host: (cos, sin),
            dim: self.dim as i64,
            pairing: self.pairing,
        })
    }
}

fn check(scaling: &Scaling, dim: usize) -> Result<()> {
    let bad = |what: &str, v: f64| {
        Err(Error::Config(format!(
            "rope scaling: {what} must be a positive number, not {v}"
        )))
    };
    let positive = |v: f64| v.is_finite() && v > 0.0;
    match scaling {
        Scaling::None => {}
        Scaling::Linear { factor }
        | Scaling::Dynamic { factor, .. }
        | Scaling::Llama3 { factor, .. }
        | Scaling::Yarn { factor, .. }
            if !positive(*factor) =>
        {
            return bad("factor", *factor);
        }
        Scaling::Llama3 { low, high, .. }
            if low.partial_cmp(high) != Some(std::cmp::Ordering::Less) =>
        {
            return Err(Error::Config(format!(
                "rope scaling: low_freq_factor {low} must be below high_freq_factor {high}"
            )));
        }
        Scaling::Dynamic { original, .. }
        | Scaling::Llama3 { original, .. }
        | Scaling::Yarn { original, .. }
        | Scaling::LongRope { original, .. }
            if !positive(*original) =>
        {
            return bad("original_max_position_embeddings", *original);
        }
        Scaling::Dynamic { .. } if dim <= 2 => {
            return Err(Error::Config(
                "dynamic rope scaling needs more than 2 rotated channels".into(),
            ));
        }
        Scaling::LongRope { short, long, .. } => {
            for (name, list) in [("short_factor", short), ("long_factor", long)] {
                if list.len() != dim / 2 || list.iter().any(|&d| !positive(d)) {
                    return Err(Error::Config(format!(
                        "rope scaling: {name} must hold {} positive numbers, and holds {}",
                        dim / 2,
                        list.len()
                    )));
                }
            }
        }
        _ => {}
    }
    Ok(())
}

/// Cosines and sines of one forward, shared by all its layers.
#[derive(Debug)]
pub struct RopeTables {
    cos: Tensor, // [rows, 1, dim]
    sin: Tensor,
    /// The same numbers for our own kernels.
    host: (Vec<f32>, Vec<f32>),
    dim: i64,
    pairing: Pairing,
}

impl RopeTables {
    /// The tables of several groups of rows, one after the other. Not the same as tables made
    /// of all positions at once where frequencies depend on the longest sequence: each group
    /// keeps its own.
    ///
    /// # Errors
    /// [`Error::Input`] when there is none or they come from different embeddings.
    pub fn cat(parts: &[&Self]) -> Result<Self> {
        let (dim, pairing) = match parts.first() {
            Some(first) => (first.dim, first.pairing),
            None => return Err(Error::Input("no rotary tables to join".into())),
        };
        if parts.iter().any(|p| p.dim != dim || p.pairing != pairing) {
            return Err(Error::Input(
                "rotary tables of different embeddings cannot be joined".into(),
            ));
        }
        let cat = |f: fn(&Self) -> &Tensor| -> Result<Tensor> {
            let all: Vec<&Tensor> = parts.iter().map(|p| f(p)).collect();
            Ok(Tensor::f_cat(&all, 0)?)
        };
        Ok(Self {
            cos: cat(|p| &p.cos)?,
            sin: cat(|p| &p.sin)?,
            host: (
                parts
                    .iter()
                    .flat_map(|p| p.host.0.iter().copied())
                    .collect(),
                parts
                    .iter()
                    .flat_map(|p| p.host.1.iter().copied())
                    .collect(),
            ),
            dim,
            pairing,
        })
    }

    /// Rotates the heads of row `row`, one after the other in `x`, in place.
    pub(crate) fn rotate_row(&self, row: usize, x: &mut [f32], head_dim: usize) {
        let dim = self.dim as usize;
        let table = |t: &'_ [f32]| row * dim..((row + 1) * dim).min(t.len());
        let (cos, sin) = (&self.host.0, &self.host.1);
        let pairs = match self.pairing {
            Pairing::Halves => Pairs::Halves,
            Pairing::Neighbours => Pairs::Neighbours,
        };
        rotate(
            x,
            head_dim,
            &cos[table(cos)],
            &sin[table(sin)],
            pairs,
            Isa::chosen(),
        );
    }

    /// Number of rows that it has angles for, and of channels that it turns.
    pub(crate) fn size(&self) -> (usize, usize) {
        let dim = self.dim as usize;
        (self.host.0.len() / dim.max(1), dim)
    }

    /// Rotates `x`: `[rows, heads, head_dim]`; channels beyond the rotary ones pass through.
    ///
    /// # Errors
    /// When the shape does not fit the tables.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let head_dim = x.size().last().copied().unwrap_or(0);
        let (rows, dim) = self.size();
        if kernels_take(x)
            && let [n, heads, width] = x.size()[..]
            && (n as usize, dim <= width as usize) == (rows, true)
        {
            let x = x.f_contiguous()?;
            let row = (heads * width) as usize;
            let (y, ()) = bridge::read(&x, |x: &[f32]| {
                bridge::build(&[n, heads, width], |y: &mut [f32]| {
                    y.copy_from_slice(x);
                    for (i, y) in y.chunks_exact_mut(row.max(1)).enumerate() {
                        self.rotate_row(i, y, width as usize);
                    }
                })
            })??;
            return Ok(y);
        }
        if head_dim == self.dim {
            return self.rotate(x);
        }
        let rotated = self.rotate(&x.f_narrow(-1, 0, self.dim)?)?;
        Ok(Tensor::f_cat(
            &[rotated, x.f_narrow(-1, self.dim, head_dim - self.dim)?],
            -1,
        )?)
    }

    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let partner = match self.pairing {
            Pairing::Halves => x.f_roll([self.dim / 2].as_slice(), [-1i64].as_slice())?,
            Pairing::Neighbours => x
                .f_unflatten(-1, [self.dim / 2, 2].as_slice())?
                .f_flip([-1i64].as_slice())?
                .f_flatten(-2, -1)?,
        };
        Ok(x.f_mul(&self.cos)?.f_addcmul(&partner, &self.sin)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    fn rotated(rope: &Rope, positions: &[&[f32]], x: &Tensor) -> Vec<f32> {
        let y = rope
            .tables(positions, Device::Cpu)
            .unwrap()
            .apply(x)
            .unwrap();
        Vec::try_from(y.reshape([-1])).unwrap()
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn products_depend_on_the_distance_alone_and_norms_are_kept() {
        let q = Tensor::from_slice(&[0.3f32, -1.0, 0.7, 2.0, 0.1, 0.9]).reshape([1, 1, 6]);
        let k = Tensor::from_slice(&[1.3f32, 0.2, -0.4, 0.5, -1.1, 0.6]).reshape([1, 1, 6]);
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            let rope = Rope::new(6, 10_000.0, pairing, Scaling::None).unwrap();
            let product =
                |m: f32, n: f32| dot(&rotated(&rope, &[&[m]], &q), &rotated(&rope, &[&[n]], &k));
            assert!((product(7.0, 3.0) - product(104.0, 100.0)).abs() < 1e-4);
            assert!((product(7.0, 3.0) - product(3.0, 7.0)).abs() > 1e-3);
            let r = rotated(&rope, &[&[55.0]], &q);
            let plain: Vec<f32> = Vec::try_from(q.reshape([-1])).unwrap();
            assert!((dot(&r, &r) - dot(&plain, &plain)).abs() < 1e-4);
        }
    }

    #[test]
    fn the_two_pairings_are_one_rotation_up_to_channel_order() {
        let halves = Rope::new(4, 100.0, Pairing::Halves, Scaling::None).unwrap();
        let neighbours = Rope::new(4, 100.0, Pairing::Neighbours, Scaling::None).unwrap();
        let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).reshape([1, 1, 4]);
        let swapped = Tensor::from_slice(&[1.0f32, 3.0, 2.0, 4.0]).reshape([1, 1, 4]);
        let a = rotated(&halves, &[&[5.0]], &x);
        let b = rotated(&neighbours, &[&[5.0]], &swapped);
        for (i, j) in [(0, 0), (1, 2), (2, 1), (3, 3)] {
            assert!((a[i] - b[j]).abs() < 1e-6);
        }
    }

    #[test]
    fn an_inactive_axis_does_not_turn_and_extra_channels_pass() {
        let rope = Rope::new(4, 100.0, Pairing::Halves, Scaling::None)
            .unwrap()
            .with_axes(vec![0, 1])
            .unwrap();
        let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 9.0]).reshape([1, 1, 5]);
        let y = rotated(&rope, &[&[3.0], &[0.0]], &x);
        assert_eq!((y[1], y[3], y[4]), (2.0, 4.0, 9.0));
        assert!((y[0] - 1.0).abs() > 0.1);
        assert!(rope.tables(&[&[1.0]], Device::Cpu).is_err());
    }

    #[test]
    fn scalings_reduce_to_plain_and_keep_their_ends() {
        let plain = Rope::new(64, 500_000.0, Pairing::Halves, Scaling::None)
            .unwrap()
            .frequencies(10.0);
        let with = |s| Rope::new(64, 500_000.0, Pairing::Halves, s).unwrap();
        let llama = with(Scaling::Llama3 {
            factor: 8.0,
            low: 1.0,
            high: 4.0,
            original: 8192.0,
        })
        .frequencies(10.0);
        assert_eq!(llama[0], plain[0]);
        assert!((llama[31] - plain[31] / 8.0).abs() < 1e-12);
        assert!(llama.windows(2).all(|w| w[0] > w[1]));
        let dynamic = with(Scaling::Dynamic {
            factor: 2.0,
            original: 128.0,
        });
        assert_eq!(dynamic.frequencies(100.0), plain);
        assert!(dynamic.frequencies(500.0)[31] < plain[31]);
        let yarn = with(Scaling::Yarn {
            factor: 4.0,
            original: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.1,
        });
        assert_eq!(yarn.frequencies(1.0)[0], plain[0]);
        assert!((yarn.frequencies(1.0)[31] - plain[31] / 4.0).abs() < 1e-12);
        let long = with(Scaling::LongRope {
            short: vec![1.0; 32],
            long: vec![2.0; 32],
            original: 64.0,
            attention_factor: 1.0,
        });
        assert_eq!(long.frequencies(64.0), plain);
        assert_eq!(long.frequencies(65.0)[3], plain[3] / 2.0);
    }

    #[test]
    fn impossible_numbers_are_refused() {
        let new = |dim, theta, s| Rope::new(dim, theta, Pairing::Halves, s);
        assert!(new(5, 1e4, Scaling::None).is_err());
        assert!(new(4, f64::NAN, Scaling::None).is_err());
        assert!(new(4, 1e4, Scaling::Linear { factor: 0.0 }).is_err());
        assert!(
            new(
                4,
                1e4,
                Scaling::LongRope {
                    short: vec![1.0],
                    long: vec![1.0],
                    original: 4.0,
                    attention_factor: 1.0
                }
            )
            .is_err()
        );
        assert_eq!(Tensor::ones([1], (Kind::Float, Device::Cpu)).size(), [1]);
    }
}
