//! Finite scalars and signs: bijections, plain twins, entropies.

use super::*;
use proptest::prelude::*;

fn fsq(levels: &[i64]) -> Fsq {
    Fsq::new(&builder(1), &FsqConfig::new(levels)).unwrap()
}

#[test]
fn every_index_of_a_grid_is_its_own_and_has_its_own_vector() {
    for levels in [&[8, 5, 5, 5][..], &[2], &[3, 2, 7], &[8, 8, 8, 5, 5, 5]] {
        let q = fsq(levels);
        let size: i64 = levels.iter().product();
        assert_eq!(q.codebook_size(), size);
        let all = Tensor::arange(size, (Kind::Int64, Device::Cpu));
        let codes = q.decode(&all).unwrap();
        // In [-1, 1], on the grid.
        assert!(scalar(&codes.abs().max()) <= 1.0);
        // Undo the squashing: atanh of the code's place, and quantise again.
        let mut z = numbers(&codes);
        for (i, z) in z.iter_mut().enumerate() {
            let l = levels[i % levels.len()] as f64;
            let half = (l - 1.0) * 1.001 / 2.0;
            let offset = if l % 2.0 == 0.0 { 0.5 } else { 0.0 };
            let at = *z * (l / 2.0).floor();
            *z = ((at + offset) / half).atanh() - (offset / half).atanh();
        }
        let z = Tensor::from_slice(&z).reshape(codes.size());
        let e = q.encode(&z).unwrap();
        assert_eq!(e.indices, all);
        assert_eq!(e.quantized.to_kind(Kind::Float), codes);
    }
}

#[test]
fn every_index_of_signs_and_residual_grids_round_trips() {
    let q = Lfq::new(&builder(1), &LfqConfig::new(1 << 10)).unwrap();
    let all = Tensor::arange(1 << 10, (Kind::Int64, Device::Cpu));
    assert_eq!(q.encode(&q.decode(&all).unwrap()).unwrap().indices, all);
    // The first channel is the highest bit.
    let one = q.decode(&Tensor::from_slice(&[512i64])).unwrap();
    assert_eq!(numbers(&one)[..2], [1.0, -1.0]);
    // Zero is not positive.
    let zeros = Tensor::zeros([1, 10], (Kind::Float, Device::Cpu));
    assert_eq!(integers(&q.encode(&zeros).unwrap().indices), [0]);
    // Codes of 62 bits.
    let wide = LfqConfig {
        entropy_loss_weight: 0.0,
        ..LfqConfig::new(1 << 62)
    };
    let q = Lfq::new(&builder(1), &wide).unwrap();
    let big = Tensor::from_slice(&[0i64, 1, (1 << 62) - 1, 0x2aaa_5555_0000_ffff]);
    assert_eq!(q.encode(&q.decode(&big).unwrap()).unwrap().indices, big);

    // One stage of the residual grid, undone by atanh.
    let config = ResidualFsqConfig::new(1, &[5, 4, 3]);
    let q = ResidualFsq::new(&builder(1), &config).unwrap();
    let all = Tensor::arange(60, (Kind::Int64, Device::Cpu)).reshape([60, 1]);
    let codes = q.decode(&all).unwrap();
    let c = Tensor::from_slice(&[1.25f32, 4.0 / 3.0, 1.5]);
    let z = (&codes / &c).atanh() * &c;
    assert_eq!(q.encode(&z).unwrap().indices, all);
}

/// The whole of finite scalar quantisation in plain numbers.
fn plain_fsq(z: &[f64], levels: &[i64]) -> (i64, Vec<f64>) {
    let (mut index, mut place, mut codes) = (0, 1, Vec::new());
    for (z, &l) in z.iter().zip(levels) {
        let half = (l as f64 - 1.0) * 1.001 / 2.0;
        let offset = if l % 2 == 0 { 0.5 } else { 0.0 };
        let h = (z + (offset / half).atanh()).tanh() * half - offset;
        let rounded = h.round_ties_even();
        index += (rounded as i64 + l / 2) * place;
        place *= l;
        codes.push(rounded / (l / 2) as f64);
    }
    (index, codes)
}

/// Residual grids in plain numbers.
fn plain_residual(z: &[f64], levels: &[i64], stages: i32) -> (Vec<i64>, Vec<f64>) {
    let squashed: Vec<f64> = z
        .iter()
        .zip(levels)
        .map(|(z, &l)| {
            let c = 1.0 + 1.0 / (l as f64 - 1.0);
            c * (z / c).tanh()
        })
        .collect();
    let mut rest = squashed.clone();
    let mut indices = Vec::new();
    for q in 0..stages {
        let (mut index, mut place) = (0, 1);
        for (r, &l) in rest.iter_mut().zip(levels) {
            let (lf, scale) = (l as f64, (l as f64).powi(q));
            let u = (*r * scale).clamp(-1.0, 1.0);
            let i = ((lf - 1.0) * (u + 1.0) / 2.0 + 0.5).floor();
            *r -= (2.0 * i / (lf - 1.0) - 1.0) / scale;
            index += i as i64 * place;
            place *= l;
        }
        indices.push(index);
    }
    let sum = squashed.iter().zip(rest).map(|(s, r)| s - r).collect();
    (indices, sum)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn grids_equal_their_plain_twins(
        seed in 0u64..10_000, levels in prop::collection::vec(2i64..12, 1..6),
        scale in 0.1f64..4.0, stages in 1i64..4,
    ) {
        let dim = levels.len();
        let z = normal(seed, &[16, dim as i64]) * scale;
        let e = fsq(&levels).encode(&z).unwrap();
        let config = ResidualFsqConfig::new(stages, &levels);
        let r = ResidualFsq::new(&builder(1), &config).unwrap().encode(&z).unwrap();
        let (ei, ri) = (integers(&e.indices), integers(&r.indices));
        let (eq, rq) = (numbers(&e.quantized), numbers(&r.quantized));
        for (row, z) in numbers(&z).chunks(dim).enumerate() {
            let (index, codes) = plain_fsq(z, &levels);
            let found = &eq[row * dim..(row + 1) * dim];
            // Within rounding of a border either neighbour may be right: then so are both.
            let near = codes.iter().zip(found).all(|(a, b)| (a - b).abs() < 1e-5);
            prop_assert!(!near || ei[row] == index);
            prop_assert!(near || on_border(z, &levels));
            let (indices, sum) = plain_residual(z, &levels, stages as i32);
            let found = &rq[row * dim..(row + 1) * dim];
            let near = sum.iter().zip(found).all(|(a, b)| (a - b).abs() < 1e-5);
            let n = stages as usize;
            let same = ri[row * n..(row + 1) * n] == indices[..];
            prop_assert!(near || !same);
            // Where f32 crosses a border, a later stage makes up for most of it.
            let finest = levels.iter().map(|&l| (l as f64).powi(1 - stages as i32));
            let step = finest.fold(0.0, f64::max);
            prop_assert!(sum.iter().zip(found).all(|(a, b)| (a - b).abs() <= 2.0 * step));
        }
    }

    #[test]
    fn indices_of_grids_round_trip(
        levels in prop::collection::vec(2i64..40, 1..10), pick in any::<u64>(),
    ) {
        let q = fsq(&levels);
        let index = (pick % q.codebook_size() as u64) as i64;
        let t = Tensor::from_slice(&[index]);
        // The digits, read back by place value.
        let code = numbers(&q.lookup(&t).unwrap());
        let (mut sum, mut place) = (0, 1);
        for (c, &l) in code.iter().zip(&levels) {
            let half = l / 2;
            sum += ((c * half as f64).round() as i64 + half) * place;
            place *= l;
        }
        prop_assert_eq!(sum, index);
    }
}

fn on_border(z: &[f64], levels: &[i64]) -> bool {
    z.iter().zip(levels).any(|(z, &l)| {
        let half = (l as f64 - 1.0) * 1.001 / 2.0;
        let offset = if l % 2 == 0 { 0.5 } else { 0.0 };
        let h = (z + (offset / half).atanh()).tanh() * half - offset;
        (h - h.floor() - 0.5).abs() < 1e-4
    })
}

#[test]
fn zero_is_the_middle_and_large_numbers_the_ends() {
    let q = fsq(&[8, 5, 2]);
    let z = Tensor::from_slice(&[0f32, 0.0, 0.0, 30.0, 30.0, 30.0, -30.0, -30.0, -30.0]);
    let e = q.encode(&z.reshape([3, 3])).unwrap();
    assert_eq!(
        numbers(&e.quantized),
        [0.0, 0.0, 0.0, 0.75, 1.0, 0.0, -1.0, -1.0, -1.0]
    );
}

#[test]
fn the_loss_of_signs_is_its_definition() {
    let config = LfqConfig {
        entropy_loss_weight: 0.7,
        diversity_gamma: 1.3,
        commitment_loss_weight: 0.2,
        inv_temperature: 0.8,
        ..LfqConfig::new(32)
    };
    let mut q = Lfq::new(&builder(1), &config).unwrap();
    let z = leaf(&normal(1, &[9, 5]));
    let t = q.train(&z, Key::new(0, 0)).unwrap();
    let codes = numbers(
        &q.decode(&Tensor::arange(32, (Kind::Int64, Device::Cpu)))
            .unwrap(),
    );
    let entropy = |p: &[f64]| -> f64 { p.iter().map(|p| -p * p.ln()).sum() };
    let (mut each, mut commit, mut mean) = (0.0, 0.0, vec![0.0; 32]);
    for z in numbers(&z).chunks(5) {
        // softmax over all codes of 2 * inv_temperature * z.c
        let dot = |c: &[f64]| z.iter().zip(c).map(|(a, b)| a * b).sum::<f64>();
        let e: Vec<f64> = codes
            .chunks(5)
            .map(|c| (2.0 * 0.8 * dot(c)).exp())
            .collect();
        let total: f64 = e.iter().sum();
        let p: Vec<f64> = e.iter().map(|e| e / total).collect();
        each += entropy(&p) / 9.0;
        mean.iter_mut().zip(&p).for_each(|(m, p)| *m += p / 9.0);
        commit += z.iter().map(|z| (z.abs() - 1.0).powi(2)).sum::<f64>() / 45.0;
    }
    let want = 0.7 * (each - 1.3 * entropy(&mean)) + 0.2 * commit;
    assert!((scalar(&t.loss) - want).abs() < 1e-5, "{want}");
    let g = Tensor::run_backward(&[&t.loss], &[&z], false, false);
    assert_eq!(g[0].isfinite().all().int64_value(&[]), 1);
    assert!(scalar(&g[0].abs().max()) > 0.0);
}

#[test]
fn sharp_signs_have_finite_losses_and_gradients() {
    // 2^18 codes: the law of the batch is made of two halves of 512.
    let mut q = Lfq::new(&builder(1), &LfqConfig::new(1 << 18)).unwrap();
    let z = leaf(&(normal(1, &[64, 18]) * 100.0));
    let t = q.train(&z, Key::new(0, 0)).unwrap();
    // Almost certain choices, 64 of them, all different: the batch has ln 64.
    let entropy = scalar(t.stages[0].entropy.as_ref().unwrap()) / 0.1;
    assert!((entropy + 64f64.ln()).abs() < 0.2, "{entropy}");
    let g = Tensor::run_backward(&[&t.loss], &[&z], false, false);
    assert_eq!(g[0].isfinite().all().int64_value(&[]), 1);
}
