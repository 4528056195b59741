//! Levels: identities of the residual, prefixes, dropout, shared codebooks.

use super::*;
use proptest::prelude::*;

fn rvq(levels: i64, config: VqConfig) -> ResidualVq {
    ResidualVq::new(&builder(11), &ResidualVqConfig::new(levels, config)).unwrap()
}

#[test]
fn each_level_quantises_what_the_levels_before_left() {
    let q = rvq(5, VqConfig::new(4, 12));
    let z = normal(1, &[60, 4]);
    let e = q.encode(&z).unwrap();
    let codes = q.lookup(&e.indices).unwrap();
    let tables: Vec<Vec<f64>> = q
        .stages()
        .iter()
        .map(|s| numbers(&s.codebook().codes().unwrap()))
        .collect();
    let index = integers(&e.indices);
    let (mut before, mut after) = (0.0, 0.0);
    for (row, z) in numbers(&z).chunks(4).enumerate() {
        let mut rest = z.to_vec();
        before += rest.iter().map(|r| r * r).sum::<f64>();
        for (level, table) in tables.iter().enumerate() {
            let far = |e: &[f64]| -> f64 { rest.iter().zip(e).map(|(a, b)| (a - b).powi(2)).sum() };
            let chosen = index[row * 5 + level] as usize;
            let best = table.chunks(4).map(far).fold(f64::INFINITY, f64::min);
            let code = &table[chosen * 4..chosen * 4 + 4];
            assert!(far(code) <= best + 1e-5);
            rest.iter_mut().zip(code).for_each(|(r, c)| *r -= c);
        }
        after += rest.iter().map(|r| r * r).sum::<f64>();
    }
    // On average, levels help even with random codes.
    assert!(after < before);
    // z = sum of q + the rest: the output is the sum of the looked-up codes.
    let sum = codes.sum_dim_intlist(-2, false, None);
    assert!(apart(&sum, &e.quantized) < 1e-5);
}

#[test]
fn prefixes_of_levels_are_those_of_all() {
    let z = normal(2, &[3, 7, 6]);
    let group = ResidualVqConfig::new(4, VqConfig::new(3, 12));
    let grouped =
        GroupedResidualVq::new(&builder(1), &GroupedResidualVqConfig::new(2, group)).unwrap();
    let plain = rvq(4, VqConfig::new(6, 12));
    let grid = ResidualFsq::new(&builder(1), &ResidualFsqConfig::new(4, &[5; 6])).unwrap();
    type Prefix<'a> = Box<dyn Fn(i64) -> Encoded + 'a>;
    let all: Vec<(&dyn Quantizer, Prefix)> = vec![
        (&plain, Box::new(|n| plain.encode_levels(&z, n).unwrap())),
        (
            &grouped,
            Box::new(|n| grouped.encode_levels(&z, n).unwrap()),
        ),
        (&grid, Box::new(|n| grid.encode_levels(&z, n).unwrap())),
    ];
    for (q, prefix) in &all {
        let full = q.encode(&z).unwrap();
        for n in 1..=4 {
            let part = prefix(n);
            assert_eq!(part.indices, full.indices.narrow(-1, 0, n));
            assert_eq!(q.decode(&part.indices).unwrap(), part.quantized);
            // A level left out by -1 is a level that is not there.
            let masked = full.indices.copy();
            if n < 4 {
                let _ = masked.narrow(-1, n, 4 - n).fill_(-1);
            }
            assert_eq!(q.decode(&masked).unwrap(), part.quantized);
        }
    }
    for n in [0, 5, -1] {
        assert!(plain.encode_levels(&z, n).is_err());
        assert!(grouped.encode_levels(&z, n).is_err());
        assert!(grid.encode_levels(&z, n).is_err());
    }
}

#[test]
fn dropout_leaves_out_the_last_levels_of_some_items() {
    for grid in [false, true] {
        let mut q: Box<dyn Quantizer> = if grid {
            Box::new(
                ResidualFsq::new(
                    &builder(1),
                    &ResidualFsqConfig {
                        quantizer_dropout: 0.5,
                        ..ResidualFsqConfig::new(4, &[5; 6])
                    },
                )
                .unwrap(),
            )
        } else {
            let config = ResidualVqConfig {
                quantizer_dropout: 0.5,
                ..ResidualVqConfig::new(4, VqConfig::new(6, 16))
            };
            Box::new(ResidualVq::new(&builder(1), &config).unwrap())
        };
        let mut seen = [0; 5];
        for step in 0..40 {
            let z = normal(step, &[8, 3, 6]);
            let full = q.encode(&z).unwrap();
            let t = q.train(&z, Key::new(4, step)).unwrap();
            let (got, all) = (integers(&t.indices), integers(&full.indices));
            for (item, (got, all)) in got.chunks(12).zip(all.chunks(12)).enumerate() {
                let kept = got[..4].iter().filter(|i| **i >= 0).count();
                seen[kept] += 1;
                assert!(kept >= 1 && (item < 4 || kept == 4));
                for (got, all) in got.chunks(4).zip(all.chunks(4)) {
                    assert_eq!(got[..kept], all[..kept]);
                    assert!(got[kept..].iter().all(|i| *i == -1));
                }
            }
            // What comes out is what the kept levels stand for (by the old tables).
            if grid {
                assert!(apart(&q.decode(&t.indices).unwrap(), &t.quantized) < 1e-6);
            }
        }
        assert!(seen[1..4].iter().all(|n| *n > 20), "{seen:?}");
        assert_eq!(seen[0], 0);
        // Encoding drops nothing.
        let e = q.encode(&normal(1, &[8, 6])).unwrap();
        assert!(integers(&e.indices).iter().all(|i| *i >= 0));
    }
}

#[test]
fn dropout_weighs_losses_by_the_share_of_items() {
    // All items keep one level: with two levels, the second has no items.
    let config = ResidualVqConfig {
        quantizer_dropout: 1.0,
        ..ResidualVqConfig::new(2, VqConfig::new(6, 16))
    };
    for step in 0..20 {
        let mut q = ResidualVq::new(&builder(1), &config).unwrap();
        let z = normal(1, &[4, 5, 6]);
        let t = q.train(&z, Key::new(1, step)).unwrap();
        let active: Vec<i64> = integers(&t.indices)
            .chunks(10)
            .enumerate()
            .filter(|(_, i)| i[1] >= 0)
            .map(|(item, _)| item as i64)
            .collect();
        let second = &t.stages[1];
        if active.is_empty() {
            assert!(second.commitment.is_none());
            continue;
        }
        // By hand: mean over the active items times their share.
        let q = ResidualVq::new(&builder(1), &config).unwrap();
        let full = q.encode(&z).unwrap();
        let codes = q.lookup(&full.indices).unwrap();
        let rest = &z - codes.select(-2, 0);
        let d = (rest - codes.select(-2, 1)).square();
        let picked = d.index_select(0, &Tensor::from_slice(&active));
        let want = 0.25 * scalar(&picked.sum(Kind::Float)) / z.numel() as f64;
        let found = scalar(second.commitment.as_ref().unwrap());
        assert!((found - want).abs() < 1e-6, "{found} {want}");
        // Only they entered the running counts of the second level.
        let counts = numbers(&q.codebook_counts_after(&config, &z, step));
        let sum: f64 = counts.iter().sum();
        let expected = 0.99 * 16.0 + 0.01 * (active.len() * 5) as f64;
        assert!((sum - expected).abs() < 1e-4);
    }
}

impl ResidualVq {
    /// Running counts of the second level after one step of a fresh quantiser.
    fn codebook_counts_after(&self, config: &ResidualVqConfig, z: &Tensor, step: u64) -> Tensor {
        let mut q = ResidualVq::new(&builder(1), config).unwrap();
        q.train(z, Key::new(1, step)).unwrap();
        q.stages()[1].codebook().counts().unwrap().copy()
    }
}

#[test]
fn groups_drop_the_same_levels() {
    let residual = ResidualVqConfig {
        quantizer_dropout: 1.0,
        ..ResidualVqConfig::new(4, VqConfig::new(3, 16))
    };
    let config = GroupedResidualVqConfig::new(2, residual);
    let mut q = GroupedResidualVq::new(&builder(1), &config).unwrap();
    let t = q.train(&normal(1, &[16, 6]), Key::new(1, 0)).unwrap();
    let kept = |row: &[i64]| row.iter().filter(|i| **i >= 0).count();
    for item in integers(&t.indices).chunks(8) {
        assert_eq!(kept(&item[..4]), kept(&item[4..]));
    }
    assert_eq!(t.stages.len(), 8);
}

#[test]
fn groups_are_residual_quantisers_of_their_channels() {
    let residual = ResidualVqConfig::new(2, VqConfig::new(3, 8));
    let q =
        GroupedResidualVq::new(&builder(1), &GroupedResidualVqConfig::new(2, residual)).unwrap();
    let z = normal(1, &[5, 6]);
    let e = q.encode(&z).unwrap();
    for (g, group) in q.groups().iter().enumerate() {
        let part = group.encode(&z.narrow(1, 3 * g as i64, 3)).unwrap();
        assert_eq!(e.indices.select(1, g as i64), part.indices);
        assert_eq!(e.quantized.narrow(1, 3 * g as i64, 3), part.quantized);
    }
    assert_ne!(
        q.groups()[0].stages()[0].codebook().codes().unwrap(),
        q.groups()[1].stages()[0].codebook().codes().unwrap()
    );
}

#[test]
fn a_shared_codebook_learns_from_all_levels_at_once() {
    let p = builder(1);
    let config = ResidualVqConfig {
        shared_codebook: true,
        ..ResidualVqConfig::new(
            3,
            VqConfig {
                decay: 0.5,
                ..VqConfig::new(4, 8)
            },
        )
    };
    let mut q = ResidualVq::new(&p, &config).unwrap();
    assert_eq!((q.stages().len(), p.params().len()), (1, 3));
    let z = normal(2, &[20, 4]);
    // All levels of the pass use the old table.
    let e = q.encode(&z).unwrap();
    let t = q.train(&z, Key::new(0, 1)).unwrap();
    assert_eq!(t.indices, e.indices);
    let mut want = [0.5f64; 8];
    for i in integers(&t.indices) {
        want[i as usize] += 0.5;
    }
    let found = numbers(q.stages()[0].codebook().counts().unwrap());
    assert_eq!(found, want);
}

#[test]
fn training_lowers_the_error_level_by_level() {
    let stage = VqConfig {
        kmeans: Some(10),
        decay: 0.8,
        restart: Some(Restart::default()),
        ..VqConfig::new(4, 16)
    };
    let mut q = rvq(3, stage);
    let z = normal(1, &[512, 4]);
    for step in 0..20 {
        q.train(&z, Key::new(1, step)).unwrap();
    }
    let mut last = scalar(&z.square().mean(Kind::Float));
    for n in 1..=3 {
        let part = q.encode_levels(&z, n).unwrap();
        let now = scalar(&(&part.quantized - &z).square().mean(Kind::Float));
        assert!(now < 0.6 * last, "level {n}: {now} of {last}");
        last = now;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_indices_decode_to_the_sum_of_their_codes(
        seed in 0u64..100, index in prop::collection::vec(-1i64..9, 12),
    ) {
        let config = ResidualVqConfig::new(4, VqConfig::new(5, 9));
        let q = ResidualVq::new(&builder(seed), &config).unwrap();
        let index = Tensor::from_slice(&index).reshape([3, 4]);
        let sum = q.lookup(&index).unwrap().sum_dim_intlist(-2, false, None);
        prop_assert!(apart(&sum, &q.decode(&index).unwrap()) < 1e-6);
    }
}
