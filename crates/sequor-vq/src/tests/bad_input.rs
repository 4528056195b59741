//! Nothing that is passed in may panic; every refusal says what is wrong.

use super::*;
use proptest::prelude::*;

fn message<T>(result: Result<T>) -> String {
    match result {
        Err(e @ (Error::Input(_) | Error::Limits(_))) => e.to_string(),
        Err(e) => panic!("another kind of error: {e}"),
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn vectors_that_cannot_be_quantised_are_refused() {
    for (name, mut q) in zoo() {
        let good = normal(1, &[2, 4, 4, 6]);
        let spoilt = |x: f64| {
            let t = good.copy();
            let _ = t.get(1).get(2).get(3).get(4).fill_(x);
            t
        };
        let options = (Kind::Float, Device::Cpu);
        let cases = [
            (normal(1, &[2, 4, 4, 5]), "last dimension must be 6"),
            (Tensor::zeros([0, 4, 4, 6], options), "no vector"),
            (Tensor::zeros([2, 0, 6], options), "no vector"),
            (Tensor::from(1.0f32), "last dimension"),
            (
                Tensor::zeros([2, 4, 4, 6], (Kind::Int64, Device::Cpu)),
                "floating",
            ),
            (
                Tensor::zeros([2, 4, 4, 6], (Kind::ComplexFloat, Device::Cpu)),
                "floating",
            ),
            (Tensor::new(), "undefined"),
            (spoilt(f64::NAN), "NaN"),
            (spoilt(f64::INFINITY), "NaN"),
            (good.to_kind(Kind::Double) * 1e300, "NaN"),
        ];
        for (z, what) in cases {
            for found in [message(q.encode(&z)), message(q.train(&z, Key::new(0, 0)))] {
                assert!(found.contains(what), "{name}: {found}, expected {what}");
            }
        }
        // A refused pass has left nothing behind.
        let e = q.encode(&good).unwrap();
        assert_eq!(q.train(&good, Key::new(0, 1)).unwrap().indices, e.indices);
    }
    let (_, maps) = zoo().pop().unwrap();
    let error = message(maps.encode(&normal(1, &[2, 6, 4, 6])));
    assert!(error.contains("[batch, 4, 4, 6]"), "{error}");
    assert!(message(maps.encode(&normal(1, &[4, 6]))).contains("expected"));
}

#[test]
fn indices_that_do_not_exist_are_refused() {
    for (name, q) in zoo() {
        let good = q.encode(&normal(1, &[2, 4, 4, 6])).unwrap().indices;
        let last = good.size().len() as i64 - 1;
        let mut cases = vec![
            (&good + q.codebook_size(), "does not exist"),
            (&good - q.codebook_size() - 1, "does not exist"),
            (good.to_kind(Kind::Float), "integers"),
            (Tensor::zeros([0], (Kind::Int64, Device::Cpu)), ""),
            (Tensor::new(), ""),
            (Tensor::from(-7i64), ""),
        ];
        if !q.index_shape().is_empty() {
            let twice = Tensor::cat(&[&good, &good], last);
            cases.push((twice, "levels"));
            cases.push((good.narrow(last, 0, 0), "levels"));
        }
        for (i, what) in cases {
            for found in [message(q.decode(&i)), message(q.lookup(&i))] {
                assert!(found.contains(what), "{name}: {found}, expected {what}");
            }
        }
    }
    // Only residual quantisers know of missing levels.
    let q = vector(&VqConfig::new(3, 4));
    assert!(message(q.decode(&Tensor::from_slice(&[-1i64]))).contains("-1"));
    let (_, maps) = zoo().pop().unwrap();
    let odd = Tensor::zeros([2, 6], (Kind::Int64, Device::Cpu));
    assert!(message(maps.decode(&odd)).contains("30 in all"));
}

#[test]
fn k_means_and_estimators_refuse_what_does_not_fit() {
    let key = Key::new(0, 0);
    let x = normal(1, &[4, 3]);
    for (x, clusters) in [
        (&x, 0),
        (&x, -2),
        (&normal(1, &[4]), 2),
        (&Tensor::new(), 2),
        (&Tensor::zeros([0, 3], (Kind::Float, Device::Cpu)), 2),
        (&(&x / 0.0), 2),
    ] {
        assert!(kmeans(x, clusters, 2, false, key).is_err());
    }
    for estimator in [Estimator::StraightThrough, Estimator::Rotation] {
        assert!(estimator.apply(&x, &normal(1, &[4, 2])).is_err());
    }
}

#[test]
fn an_entropy_term_that_would_fill_the_memory_is_refused() {
    let config = VqConfig {
        entropy: Some(Entropy::default()),
        ..VqConfig::new(1, 1 << 16)
    };
    let mut q = vector(&config);
    let z = Tensor::zeros([5000, 1], (Kind::Float, Device::Cpu));
    let error = message(q.train(&z, Key::new(0, 0)));
    assert!(error.contains("smaller batches"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Tensors of any shape, kind and content: an answer or an error.
    #[test]
    fn nothing_panics(
        which in 0usize..16, shape in prop::collection::vec(0i64..7, 0..5), kind in 0usize..6,
        scale in prop::sample::select(vec![0.0, 1.0, 1e30, f64::NAN]), seed in 0u64..50,
    ) {
        let (_, mut q) = zoo().swap_remove(which);
        let kinds = [
            Kind::Float, Kind::Half, Kind::Int64, Kind::Bool, Kind::Double, Kind::Uint8,
        ];
        let t = (normal(seed, &shape) * scale).to_kind(kinds[kind]);
        let _ = q.encode(&t);
        let _ = q.train(&t, Key::new(seed, seed));
        let _ = q.decode(&t);
        let _ = q.lookup(&t);
        let _ = Usage::of(q.as_ref()).map(|mut u| u.add(&t));
    }
}
