//! What holds for every quantiser.

use super::*;
use proptest::prelude::*;

/// Input of the right shape for `name`: `[2, 4, 4, 6]`.
fn input(seed: u64) -> Tensor {
    normal(seed, &[2, 4, 4, 6])
}

#[test]
fn indices_stand_for_the_quantised_vectors() {
    for (name, q) in zoo() {
        let z = input(1);
        let e = q.encode(&z).unwrap();
        assert_eq!(e.quantized.size(), z.size(), "{name}");
        assert_eq!(e.indices.kind(), Kind::Int64, "{name}");
        let (low, high) = (e.indices.min(), e.indices.max());
        assert!(low.int64_value(&[]) >= 0, "{name}");
        assert!(high.int64_value(&[]) < q.codebook_size(), "{name}");
        if name == "scales" {
            assert_eq!(e.indices.size(), [2, 30]);
        } else {
            let mut shape = vec![2, 4, 4];
            shape.extend(q.index_shape());
            assert_eq!(e.indices.size(), shape, "{name}");
        }
        // The same operations in the same order: not nearly, but exactly.
        assert_eq!(q.decode(&e.indices).unwrap(), e.quantized, "{name}");
        let again = q.encode(&z).unwrap();
        assert_eq!(again.indices, e.indices, "{name}");
        assert!(!e.quantized.requires_grad(), "{name}");
        // The codes are not all one.
        let kinds = integers(&e.indices)
            .into_iter()
            .collect::<std::collections::BTreeSet<_>>();
        assert!(kinds.len() > 2, "{name}");
    }
}

#[test]
fn lookups_have_one_vector_per_index() {
    for (name, q) in zoo() {
        let e = q.encode(&input(2)).unwrap();
        let found = q.lookup(&e.indices).unwrap();
        let mut shape = e.indices.size();
        shape.push(*found.size().last().unwrap());
        assert_eq!(found.size(), shape, "{name}");
        assert_eq!(found.kind(), Kind::Float, "{name}");
    }
}

#[test]
fn a_batch_gives_what_its_items_give_alone() {
    for (name, q) in zoo() {
        let z = input(3);
        let all = q.encode(&z).unwrap();
        for item in 0..2 {
            let one = q.encode(&z.narrow(0, item, 1)).unwrap();
            assert_eq!(one.indices, all.indices.narrow(0, item, 1), "{name}");
            let far = apart(&one.quantized, &all.quantized.narrow(0, item, 1));
            assert!(far < 1e-6, "{name}: {far}");
        }
        if name == "scales" {
            continue; // maps only
        }
        let lone = z.get(1).get(2).get(3);
        let one = q.encode(&lone).unwrap();
        assert_eq!(one.quantized.size(), [6], "{name}");
        assert_eq!(one.indices, all.indices.get(1).get(2).get(3), "{name}");
    }
}

#[test]
fn training_uses_the_codes_that_encoding_uses() {
    for (name, mut q) in zoo() {
        let z = input(4);
        let e = q.encode(&z).unwrap();
        let t = q.train(&z, Key::new(1, 0)).unwrap();
        assert_eq!(t.indices, e.indices, "{name}");
        assert!(apart(&t.quantized, &e.quantized) < 1e-6, "{name}");
        let mut sum = 0.0;
        for stage in &t.stages {
            sum += stage.total().unwrap().map_or(0.0, |t| scalar(&t));
        }
        assert!((scalar(&t.loss) - sum).abs() < 1e-5, "{name}");
        assert!(scalar(&t.loss).is_finite(), "{name}");
    }
}

#[test]
fn a_training_step_is_repeated_from_its_key() {
    let run = |seed| {
        let mut all = Vec::new();
        for (_, mut q) in zoo() {
            for step in 0..6 {
                let t = q.train(&input(step), Key::new(seed, step)).unwrap();
                all.push(t.indices);
            }
        }
        all
    };
    assert_eq!(run(1), run(1));
}

#[test]
fn other_number_formats_go_in_and_come_out() {
    for (name, mut q) in zoo() {
        for kind in [Kind::Half, Kind::BFloat16, Kind::Double] {
            let z = input(5).to_kind(kind);
            let e = q.encode(&z).unwrap();
            assert_eq!(e.quantized.kind(), kind, "{name}");
            let wide = q.encode(&z.to_kind(Kind::Float)).unwrap();
            assert_eq!(wide.indices, e.indices, "{name}");
            let t = q.train(&z, Key::new(0, 1)).unwrap();
            assert_eq!(t.quantized.kind(), kind, "{name}");
        }
        let z = q.encode(&input(5)).unwrap();
        let narrow = z.indices.to_kind(Kind::Int);
        assert_eq!(
            q.decode(&narrow).unwrap(),
            q.decode(&z.indices).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn views_are_read_in_their_own_order() {
    for (name, q) in zoo() {
        let z = input(6);
        let strided = z.permute([3, 2, 0, 1]).contiguous().permute([2, 3, 1, 0]);
        assert!(!strided.is_contiguous());
        let (a, b) = (q.encode(&z).unwrap(), q.encode(&strided).unwrap());
        assert_eq!(a.indices, b.indices, "{name}");
    }
}

#[test]
fn codes_are_quantised_to_themselves() {
    // Where it holds: tables without projections, and signs. (The squashing of finite
    // scalars and the greedy choice of residual levels move codes.)
    for distance in [Distance::Euclidean, Distance::Cosine, Distance::Direction] {
        let q = vector(&VqConfig {
            distance,
            ..VqConfig::new(6, 40)
        });
        let e = q.encode(&normal(7, &[100, 6])).unwrap();
        let again = q.encode(&e.quantized).unwrap();
        assert_eq!(again.indices, e.indices, "{distance:?}");
        assert!(apart(&again.quantized, &e.quantized) < 1e-6);
    }
    let q = Lfq::new(&builder(1), &LfqConfig::new(64)).unwrap();
    let e = q.encode(&normal(7, &[100, 6])).unwrap();
    let again = q.encode(&e.quantized).unwrap();
    assert_eq!((again.indices, again.quantized), (e.indices, e.quantized));
}

#[test]
fn channels_move_and_come_back() {
    let x = normal(1, &[2, 3, 4, 5]);
    let last = channels_last(&x).unwrap();
    assert_eq!(last.size(), [2, 4, 5, 3]);
    assert_eq!(channels_first(&last).unwrap(), x);
    assert!(channels_last(&normal(1, &[3])).is_err());
    assert!(channels_first(&Tensor::new()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The nearest code by the plain definition, in f64.
    #[test]
    fn the_nearest_code_is_the_nearest(
        seed in 0u64..1000, rows in 1i64..40, codes in 1i64..60, dim in 1i64..20,
        scale in prop::sample::select(vec![1e-3, 1.0, 50.0]), shift in -20.0f64..20.0,
    ) {
        let config = VqConfig { learning: Learning::Gradient, ..VqConfig::new(dim, codes) };
        let q = VectorQuantizer::new(&builder(seed), &config).unwrap();
        let z = normal(seed, &[rows, dim]) * scale + shift;
        let found = integers(&q.encode(&z).unwrap().indices);
        let (z, e) = (numbers(&z), numbers(&q.codebook().codes().unwrap()));
        let dim = dim as usize;
        for (z, found) in z.chunks(dim).zip(found) {
            let far: Vec<f64> = e
                .chunks(dim)
                .map(|e| z.iter().zip(e).map(|(a, b)| (a - b).powi(2)).sum())
                .collect();
            let best = far.iter().enumerate().fold(0, |b, (i, d)| if *d < far[b] { i } else { b });
            prop_assert_eq!(found, best as i64);
        }
    }

    /// Vectors of any size and rank give indices of the same leading shape, and back.
    #[test]
    fn shapes_are_kept(seed in 0u64..100, lead in prop::collection::vec(1i64..4, 0..4)) {
        let q = vector(&VqConfig::new(5, 9));
        let mut shape = lead.clone();
        shape.push(5);
        let z = normal(seed, &shape);
        let e = q.encode(&z).unwrap();
        prop_assert_eq!(e.indices.size(), lead);
        prop_assert_eq!(q.decode(&e.indices).unwrap().size(), shape);
    }
}
