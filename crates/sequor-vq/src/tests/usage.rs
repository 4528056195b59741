//! Histograms of codes.

use super::*;

#[test]
fn perplexity_is_the_exponential_of_the_entropy() {
    let mut u = Usage::new(1, 4).unwrap();
    assert_eq!((u.perplexity(), u.used()), (vec![1.0], vec![0.0]));
    u.add(&Tensor::from_slice(&[0i64, 0, 1, 3])).unwrap();
    assert_eq!(u.histogram(0), [2, 1, 0, 1]);
    let entropy = 0.5 * 2f64.ln() + 0.5 * 4f64.ln();
    assert!((u.entropy()[0] - entropy).abs() < 1e-12);
    assert!((u.perplexity()[0] - entropy.exp()).abs() < 1e-12);
    assert_eq!(u.used(), [0.75]);
    u.add(&Tensor::from_slice(&[1i64, 2, 2, 3])).unwrap();
    assert!((u.perplexity()[0] - 4.0).abs() < 1e-12);
    u.clear();
    assert_eq!(u.used(), [0.0]);
    assert!(u.histogram(1).is_empty());
}

#[test]
fn every_codebook_is_counted_apart() {
    for (name, q) in zoo() {
        let mut u = Usage::of(q.as_ref()).unwrap();
        let books = q.index_shape().iter().product::<i64>() as usize;
        assert_eq!(u.codebooks(), books.max(1), "{name}");
        let e = q.encode(&normal(1, &[2, 4, 4, 6])).unwrap();
        u.add(&e.indices).unwrap();
        let index = integers(&e.indices);
        for book in 0..u.codebooks() {
            let n: u64 = u.histogram(book).iter().sum();
            assert_eq!(n as usize, index.len() / u.codebooks(), "{name}");
            for (i, &code) in index.iter().enumerate() {
                if i % u.codebooks() == book {
                    assert!(u.histogram(book)[code as usize] > 0);
                }
            }
        }
    }
}

#[test]
fn left_out_levels_are_not_counted_and_counts_merge() {
    let mut a = Usage::new(2, 3).unwrap();
    a.add(&Tensor::from_slice(&[0i64, -1, 2, 1]).reshape([2, 2]))
        .unwrap();
    assert_eq!(
        (a.histogram(0), a.histogram(1)),
        (&[1, 0, 1][..], &[0, 1, 0][..])
    );
    let mut b = a.clone();
    b.merge(&a).unwrap();
    assert_eq!(b.histogram(0), [2, 0, 2]);
    assert!(b.merge(&Usage::new(1, 6).unwrap()).is_err());
    assert!(a.add(&Tensor::from_slice(&[0i64, 1, 2])).is_err());
    assert!(a.add(&Tensor::from_slice(&[0i64, 3])).is_err());
    assert!(a.add(&Tensor::from_slice(&[0i64, -2])).is_err());
}

#[test]
fn counts_are_kept_in_files() {
    let mut u = Usage::new(2, 5).unwrap();
    u.add(&Tensor::from_slice(&[0i64, 4, 3, 4]).reshape([2, 2]))
        .unwrap();
    let json = serde_json::to_string(&u).unwrap();
    assert_eq!(serde_json::from_str::<Usage>(&json).unwrap(), u);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("usage.safetensors");
    let t = u.to_tensor().unwrap();
    sequor_nn::weights::write_safetensors(&path, &[("usage", &t)], &Default::default()).unwrap();
    let read = sequor_nn::weights::open(&path)
        .unwrap()
        .load("usage")
        .unwrap();
    assert_eq!(Usage::from_tensor(&read).unwrap(), u);
    for bad in [
        Tensor::from_slice(&[1i64, 2]),
        Tensor::from_slice(&[1i64, -2]).reshape([1, 2]),
        Tensor::from_slice(&[1f32, 2.0]).reshape([1, 2]),
        Tensor::zeros([0, 3], (Kind::Int64, Device::Cpu)),
    ] {
        assert!(Usage::from_tensor(&bad).is_err());
    }
    for (books, size) in [(0, 4), (4, 0), (-1, 4), (1 << 40, 1 << 40), (2, 1 << 28)] {
        assert!(Usage::new(books, size).is_err());
    }
}
