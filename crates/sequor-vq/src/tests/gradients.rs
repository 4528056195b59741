//! Gradients past the choice of a code, and those of the losses.

use super::*;

/// Gradient of `sum(weights * y)` with respect to `x`.
fn gradient(y: &Tensor, weights: &Tensor, x: &Tensor) -> Tensor {
    let loss = (y * weights).sum(Kind::Float);
    let found = Tensor::run_backward(&[loss], &[x], true, false);
    found[0].copy()
}

#[test]
fn straight_through_copies_value_and_gradient_exactly() {
    let x = leaf(&normal(1, &[5, 4]));
    let (code, weights) = (normal(2, &[5, 4]), normal(3, &[5, 4]));
    let y = straight_through(&x, &code).unwrap();
    assert_eq!(y, code);
    assert_eq!(gradient(&y, &weights, &x), weights);
}

#[test]
fn every_quantiser_without_projections_passes_the_gradient_on() {
    let q = VqConfig::new(6, 16);
    let rvq = ResidualVqConfig::new(4, q.clone());
    let group = ResidualVqConfig::new(2, VqConfig::new(3, 16));
    let mut all: Vec<Box<dyn Quantizer>> = vec![
        Box::new(vector(&q)),
        Box::new(vector(&VqConfig {
            distance: Distance::Direction,
            learning: Learning::Gradient,
            ..q
        })),
        Box::new(ResidualVq::new(&builder(1), &rvq).unwrap()),
        Box::new(
            GroupedResidualVq::new(&builder(2), &GroupedResidualVqConfig::new(2, group)).unwrap(),
        ),
        Box::new(Lfq::new(&builder(3), &LfqConfig::new(64)).unwrap()),
        Box::new(
            MultiScaleVq::new(&builder(4), &MultiScaleVqConfig::new(6, 16, &[1, 2, 4])).unwrap(),
        ),
    ];
    for q in &mut all {
        let z = leaf(&normal(5, &[2, 4, 4, 6]));
        let weights = normal(6, &[2, 4, 4, 6]);
        let t = q.train(&z, Key::new(0, 1)).unwrap();
        // Once, also through several levels.
        assert_eq!(gradient(&t.quantized, &weights, &z), weights);
    }
}

#[test]
fn squashed_channels_have_the_gradient_of_the_squashing() {
    let levels = [8i64, 5, 2];
    let mut q = Fsq::new(&builder(1), &FsqConfig::new(&levels)).unwrap();
    let z = leaf(&normal(1, &[20, 3]));
    let weights = normal(2, &[20, 3]);
    let t = q.train(&z, Key::new(0, 0)).unwrap();
    let found = numbers(&gradient(&t.quantized, &weights, &z));
    let wanted = numbers(&z).into_iter().zip(numbers(&weights)).enumerate();
    for ((i, (z, w)), found) in wanted.zip(found) {
        let l = levels[i % 3] as f64;
        let half = (l - 1.0) * 1.001 / 2.0;
        let offset = if l % 2.0 == 0.0 { 0.5 } else { 0.0 };
        let tanh = (z + (offset / half).atanh()).tanh();
        let d = w * half * (1.0 - tanh * tanh) / (l / 2.0).floor();
        assert!((found - d).abs() < 1e-5, "{found} {d}");
    }
    // Residual grids: c tanh(x / c).
    let config = ResidualFsqConfig::new(2, &[5, 3]);
    let mut q = ResidualFsq::new(&builder(1), &config).unwrap();
    let z = leaf(&normal(3, &[20, 2]));
    let t = q.train(&z, Key::new(0, 0)).unwrap();
    let found = numbers(&gradient(&t.quantized, &z.ones_like(), &z));
    for ((i, z), found) in numbers(&z).into_iter().enumerate().zip(found) {
        let c = [1.25, 1.5][i % 2];
        let d = 1.0 - (z / c).tanh().powi(2);
        assert!((found - d).abs() < 1e-5, "{found} {d}");
    }
}

/// The matrix of the rotation trick, entry by entry.
fn rotation_matrix(x: &[f64], q: &[f64]) -> Vec<Vec<f64>> {
    let n = x.len();
    let length = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>().sqrt();
    let unit = |v: &[f64]| -> Vec<f64> { v.iter().map(|a| a / length(v)).collect() };
    let (xh, qh) = (unit(x), unit(q));
    let r = unit(&xh.iter().zip(&qh).map(|(a, b)| a + b).collect::<Vec<_>>());
    let ratio = length(q) / length(x);
    (0..n)
        .map(|i| {
            (0..n)
                .map(|j| {
                    let same = if i == j { 1.0 } else { 0.0 };
                    ratio * (same - 2.0 * r[i] * r[j] + 2.0 * qh[i] * xh[j])
                })
                .collect()
        })
        .collect()
}

#[test]
fn the_rotation_has_the_gradient_of_its_matrix() {
    let (rows, dim) = (7, 4);
    let x = leaf(&normal(1, &[rows, dim]));
    let (code, weights) = (normal(2, &[rows, dim]), normal(3, &[rows, dim]));
    let y = rotate(&x, &code).unwrap();
    assert_eq!(y, code);
    let found = numbers(&gradient(&y, &weights, &x));
    let d = dim as usize;
    let (xs, qs, ws) = (numbers(&x), numbers(&code), numbers(&weights));
    for row in 0..rows as usize {
        let part = |v: &Vec<f64>| v[row * d..(row + 1) * d].to_vec();
        let (x, q, w) = (part(&xs), part(&qs), part(&ws));
        let m = rotation_matrix(&x, &q);
        // The matrix takes the vector to its code ...
        for i in 0..d {
            let moved: f64 = (0..d).map(|j| m[i][j] * x[j]).sum();
            assert!((moved - q[i]).abs() < 1e-6);
        }
        // ... and its transpose the gradient back.
        for j in 0..d {
            let back: f64 = (0..d).map(|i| m[i][j] * w[i]).sum();
            assert!((found[row * d + j] - back).abs() < 1e-4);
        }
    }
}

#[test]
fn the_rotation_survives_vectors_without_direction() {
    let x = leaf(&Tensor::from_slice(&[0f32, 0.0, 1.0, 2.0, 1.0, 2.0]).reshape([3, 2]));
    let code = Tensor::from_slice(&[3f32, 4.0, 0.0, 0.0, -2.0, -4.0]).reshape([3, 2]);
    let y = rotate(&x, &code).unwrap();
    assert_eq!(y, code);
    let g = gradient(&y, &x.ones_like(), &x);
    assert_eq!(g.isfinite().all().int64_value(&[]), 1);
    // Copied where there is nothing to turn.
    assert_eq!(numbers(&g.narrow(0, 0, 2)), [1.0; 4]);
}

#[test]
fn a_quantiser_with_rotation_gives_codes_and_other_gradients() {
    let config = VqConfig {
        estimator: Estimator::Rotation,
        ..VqConfig::new(4, 16)
    };
    let mut q = vector(&config);
    let z = leaf(&normal(1, &[30, 4]));
    let weights = normal(2, &[30, 4]);
    let e = q.encode(&z).unwrap();
    let t = q.train(&z, Key::new(0, 1)).unwrap();
    assert_eq!(t.quantized, e.quantized);
    let g = gradient(&t.quantized, &weights, &z);
    let wanted = gradient(&rotate(&z, &e.quantized).unwrap(), &weights, &z);
    assert!(apart(&g, &wanted) < 1e-6 && apart(&g, &weights) > 0.1);
}

#[test]
fn losses_draw_both_sides_with_their_weights() {
    for (commitment, codebook) in [(0.25, 1.0), (1.0, 0.25)] {
        // The second pair is the reversed ("legacy") placement of beta.
        let config = VqConfig {
            learning: Learning::Gradient,
            commitment_weight: commitment,
            codebook_weight: codebook,
            ..VqConfig::new(3, 8)
        };
        let p = builder(1);
        let mut q = VectorQuantizer::new(&p, &config).unwrap();
        let z = leaf(&normal(2, &[10, 3]));
        let t = q.train(&z, Key::new(0, 0)).unwrap();
        let table = p.params()[0].tensor.shallow_clone();
        assert!(table.requires_grad());
        let (zs, es) = (numbers(&z), numbers(&table));
        let index = integers(&t.indices);
        let mut d_z = vec![0.0; zs.len()];
        let mut d_e = vec![0.0; es.len()];
        let mut square = 0.0;
        for (i, z) in zs.iter().enumerate() {
            let at = index[i / 3] as usize * 3 + i % 3;
            let d = z - es[at];
            square += d * d / 30.0;
            d_z[i] += commitment * 2.0 * d / 30.0;
            d_e[at] -= codebook * 2.0 * d / 30.0;
        }
        assert!((scalar(&t.loss) - (commitment + codebook) * square).abs() < 1e-5);
        let found = Tensor::run_backward(&[&t.loss], &[&z, &table], true, false);
        for (found, want) in [(&found[0], d_z), (&found[1], d_e)] {
            for (a, b) in numbers(found).iter().zip(want) {
                assert!((a - b).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn cosine_losses_compare_unit_vectors() {
    let config = VqConfig {
        distance: Distance::Cosine,
        commitment_weight: 1.0,
        ..VqConfig::new(3, 8)
    };
    let mut q = vector(&config);
    let z = normal(2, &[10, 3]) * 5.0;
    let t = q.train(&z, Key::new(0, 0)).unwrap();
    let (zs, cs) = (numbers(&z), numbers(&t.quantized));
    let mut want = 0.0;
    for (z, c) in zs.chunks(3).zip(cs.chunks(3)) {
        let length = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>().sqrt();
        assert!((length(c) - 1.0).abs() < 1e-6);
        let n = length(z);
        let d = z.iter().zip(c).map(|(z, c)| (z / n - c).powi(2));
        want += d.sum::<f64>() / 30.0;
    }
    assert!((scalar(&t.loss) - want).abs() < 1e-6);
}

#[test]
fn directions_are_searched_but_stored_codes_are_used() {
    let config = VqConfig {
        distance: Distance::Direction,
        learning: Learning::Gradient,
        ..VqConfig::new(3, 12)
    };
    let q = vector(&config);
    let z = normal(4, &[40, 3]);
    let e = q.encode(&z).unwrap();
    let table = numbers(&q.codebook().codes().unwrap());
    let cosine = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let found = integers(&e.indices);
    for ((z, q), index) in numbers(&z)
        .chunks(3)
        .zip(numbers(&e.quantized).chunks(3))
        .zip(found)
    {
        let codes: Vec<&[f64]> = table.chunks(3).collect();
        assert_eq!(q, codes[index as usize]);
        let best = codes.iter().map(|c| cosine(z, c)).fold(-1.0, f64::max);
        assert!(cosine(z, q) > best - 1e-6);
    }
}

#[test]
fn the_entropy_term_is_its_definition_and_has_gradients() {
    for (distance, learning, restart) in [
        (Distance::Euclidean, Learning::Gradient, None),
        (Distance::Euclidean, Learning::Ema, None),
        (
            Distance::Cosine,
            Learning::Gradient,
            Some(Restart::default()),
        ),
        (Distance::Cosine, Learning::Ema, Some(Restart::default())),
    ] {
        let (weight, temperature) = (0.3, 0.5);
        let config = VqConfig {
            distance,
            learning,
            restart,
            commitment_weight: 0.0,
            codebook_weight: 0.0,
            entropy: Some(Entropy {
                weight,
                temperature,
            }),
            ..VqConfig::new(3, 5)
        };
        let mut q = vector(&config);
        let z = leaf(&normal(6, &[4, 3]));
        let table = numbers(&q.codebook().codes().unwrap());
        let t = q.train(&z, Key::new(0, 0)).unwrap();
        let unit = |v: &[f64]| -> Vec<f64> {
            let n = if distance == Distance::Cosine {
                v.iter().map(|a| a * a).sum::<f64>().sqrt()
            } else {
                1.0
            };
            v.iter().map(|a| a / n).collect()
        };
        let entropy = |p: &[f64]| -> f64 { p.iter().map(|p| -p * p.max(1e-300).ln()).sum() };
        let (mut each, mut mean) = (0.0, vec![0.0; 5]);
        for z in numbers(&z).chunks(3) {
            let z = unit(z);
            let far = |e: &[f64]| z.iter().zip(e).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            let e: Vec<f64> = table
                .chunks(3)
                .map(|e| (-far(e) / temperature).exp())
                .collect();
            let total: f64 = e.iter().sum();
            let p: Vec<f64> = e.iter().map(|e| e / total).collect();
            each += entropy(&p) / 4.0;
            mean.iter_mut().zip(&p).for_each(|(m, p)| *m += p / 4.0);
        }
        let want = weight * (each - entropy(&mean));
        assert!((scalar(&t.loss) - want).abs() < 1e-5);
        // The table has changed since; the gradient must not notice.
        let g = Tensor::run_backward(&[&t.loss], &[&z], false, false);
        assert!(scalar(&g[0].abs().max()) > 0.0);
    }
}

#[test]
fn later_levels_reach_the_encoder_with_their_commitment() {
    let config = ResidualVqConfig::new(3, VqConfig::new(4, 8));
    let mut q = ResidualVq::new(&builder(1), &config).unwrap();
    let z = leaf(&normal(1, &[20, 4]));
    let t = q.train(&z, Key::new(0, 1)).unwrap();
    for stage in &t.stages {
        let loss = stage.commitment.as_ref().unwrap();
        let g = Tensor::run_backward(&[loss], &[&z], true, false);
        assert!(scalar(&g[0].abs().max()) > 1e-4);
    }
}

#[test]
fn projections_of_every_level_get_gradients() {
    let stage = VqConfig {
        codebook_dim: Some(3),
        distance: Distance::Direction,
        learning: Learning::Gradient,
        ..VqConfig::new(8, 16)
    };
    let p = builder(1);
    let mut q = ResidualVq::new(&p, &ResidualVqConfig::new(3, stage)).unwrap();
    let z = leaf(&normal(1, &[20, 8]));
    let t = q.train(&z, Key::new(0, 1)).unwrap();
    let loss = t.loss + t.quantized.square().sum(Kind::Float);
    let params = p.params();
    assert_eq!(params.len(), 15);
    let tensors: Vec<&Tensor> = params.iter().map(|p| &p.tensor).collect();
    let found = Tensor::run_backward(&[loss], &tensors, false, false);
    for (p, g) in params.iter().zip(found) {
        assert!(scalar(&g.abs().max()) > 0.0, "{}", p.name);
    }
}
