//! Tests over all quantisers, and what they need.

mod bad_input;
mod configs;
mod ema;
mod files;
mod gradients;
mod invariants;
mod multiscale;
mod residual;
mod scalar;
mod usage;

use crate::*;
use sequor_kernels::rng::Purpose;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};

/// Standard normals of a seed.
fn normal(seed: u64, shape: &[i64]) -> Tensor {
    let n = shape.iter().product::<i64>() as usize;
    let mut values = vec![0f32; n];
    Key::new(seed, 7)
        .stream(0, Purpose::Test)
        .fill_normal_f32(&mut values);
    Tensor::from_slice(&values).reshape(shape)
}

fn builder(seed: u64) -> ParamBuilder {
    ParamBuilder::init(seed, Kind::Float, Device::Cpu)
}

/// All entries as f64.
fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.detach().to_kind(Kind::Double).contiguous().reshape([-1])).unwrap()
}

fn integers(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.contiguous().reshape([-1])).unwrap()
}

fn scalar(t: &Tensor) -> f64 {
    t.double_value(&[])
}

/// Largest difference of two tensors of one shape.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[])
}

/// A leaf that wants gradients.
fn leaf(t: &Tensor) -> Tensor {
    t.copy().set_requires_grad(true)
}

fn vector(config: &VqConfig) -> VectorQuantizer {
    VectorQuantizer::new(&builder(3), config).unwrap()
}

/// One of each kind, over vectors of length 6 (a map of 4 x 4 for the last).
fn zoo() -> Vec<(&'static str, Box<dyn Quantizer>)> {
    let vq = VqConfig::new(6, 16);
    let cosine = VqConfig {
        distance: Distance::Cosine,
        ..vq.clone()
    };
    let factorised = VqConfig {
        codebook_dim: Some(3),
        distance: Distance::Direction,
        learning: Learning::Gradient,
        ..vq.clone()
    };
    let floor = VqConfig {
        average: Average::Floor,
        ..vq.clone()
    };
    let outer = ResidualVqConfig {
        dim: Some(6),
        ..ResidualVqConfig::new(3, VqConfig::new(4, 16))
    };
    let shared = ResidualVqConfig {
        shared_codebook: true,
        ..ResidualVqConfig::new(3, vq.clone())
    };
    let group = ResidualVqConfig::new(2, VqConfig::new(3, 16));
    let projected = FsqConfig {
        dim: Some(6),
        ..FsqConfig::new(&[8, 5, 4])
    };
    let lfq = LfqConfig {
        dim: Some(6),
        ..LfqConfig::new(32)
    };
    let p = |i: u64| builder(100 + i);
    let residual = |i, c: &ResidualVqConfig| ResidualVq::new(&p(i), c).unwrap();
    vec![
        ("vq", Box::new(vector(&vq))),
        ("cosine", Box::new(vector(&cosine))),
        ("factorised", Box::new(vector(&factorised))),
        ("floor", Box::new(vector(&floor))),
        (
            "fsq",
            Box::new(Fsq::new(&p(1), &FsqConfig::new(&[3, 4, 5, 8, 2, 7])).unwrap()),
        ),
        (
            "fsq projected",
            Box::new(Fsq::new(&p(2), &projected).unwrap()),
        ),
        (
            "lfq",
            Box::new(Lfq::new(&p(3), &LfqConfig::new(64)).unwrap()),
        ),
        ("lfq projected", Box::new(Lfq::new(&p(4), &lfq).unwrap())),
        ("rvq", Box::new(residual(5, &ResidualVqConfig::new(3, vq)))),
        ("rvq outer", Box::new(residual(6, &outer))),
        ("rvq shared", Box::new(residual(7, &shared))),
        (
            "rvq factorised",
            Box::new(residual(8, &ResidualVqConfig::new(3, factorised))),
        ),
        (
            "rvq cosine",
            Box::new(residual(9, &ResidualVqConfig::new(3, cosine))),
        ),
        (
            "grouped",
            Box::new(
                GroupedResidualVq::new(&p(10), &GroupedResidualVqConfig::new(2, group)).unwrap(),
            ),
        ),
        (
            "rfsq",
            Box::new(
                ResidualFsq::new(&p(11), &ResidualFsqConfig::new(3, &[3, 4, 5, 3, 2, 6])).unwrap(),
            ),
        ),
        (
            "scales",
            Box::new(
                MultiScaleVq::new(&p(12), &MultiScaleVqConfig::new(6, 16, &[1, 2, 3, 4])).unwrap(),
            ),
        ),
    ]
}
