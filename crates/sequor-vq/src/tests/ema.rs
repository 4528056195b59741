//! Codebooks that learn by running means.

use super::*;

fn set(p: &ParamBuilder, name: &str, values: &[f32]) {
    let all = p.params();
    let found = all.iter().find(|q| q.name == name);
    let mut t = found
        .unwrap_or_else(|| panic!("no {name}"))
        .tensor
        .shallow_clone();
    let shape = t.size();
    let _guard = sequor_nn::tch::no_grad_guard();
    t.copy_(&Tensor::from_slice(values).reshape(shape));
}

fn get(p: &ParamBuilder, name: &str) -> Vec<f64> {
    let all = p.params();
    let found = all.iter().find(|q| q.name == name);
    numbers(&found.unwrap_or_else(|| panic!("no {name}")).tensor)
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (x, y) in a.iter().zip(b) {
        assert!((x - y).abs() < 1e-5 * (1.0 + y.abs()), "{a:?} {b:?}");
    }
}

/// Two codes, three numbers, by hand.
#[test]
fn the_update_is_the_one_computed_by_hand() {
    let p = builder(1);
    let config = VqConfig {
        decay: 0.9,
        eps: 0.01,
        ..VqConfig::new(1, 2)
    };
    let mut q = VectorQuantizer::new(&p, &config).unwrap();
    set(&p, "codebook.embed", &[0.0, 10.0]);
    set(&p, "codebook.embed_avg", &[0.0, 40.0]);
    set(&p, "codebook.cluster_size", &[2.0, 4.0]);
    let z = Tensor::from_slice(&[1f32, 3.0, 11.0]).reshape([3, 1]);
    let t = q.train(&z, Key::new(0, 1)).unwrap();
    // The codes of the pass come from the old table.
    assert_eq!(integers(&t.indices), [0, 0, 1]);
    assert_eq!(numbers(&t.quantized), [0.0, 0.0, 10.0]);
    // 0.25 * (1 + 9 + 1) / 3.
    assert!((scalar(&t.loss) - 0.25 * 11.0 / 3.0).abs() < 1e-6);
    let n = [0.9 * 2.0 + 0.1 * 2.0, 0.9 * 4.0 + 0.1];
    let s = [0.1 * 4.0, 0.9 * 40.0 + 0.1 * 11.0];
    close(&get(&p, "codebook.cluster_size"), &n);
    close(&get(&p, "codebook.embed_avg"), &s);
    let total = n[0] + n[1];
    let smooth = |n: f64| (n + 0.01) / (total + 2.0 * 0.01) * total;
    let e = [s[0] / smooth(n[0]), s[1] / smooth(n[1])];
    close(&get(&p, "codebook.embed"), &e);
    // The new table is the one that counts from now on.
    close(
        &numbers(&q.encode(&z).unwrap().quantized),
        &[e[0], e[0], e[1]],
    );
}

#[test]
fn unit_codes_stay_unit_and_sum_unit_vectors() {
    let p = builder(1);
    let config = VqConfig {
        decay: 0.5,
        distance: Distance::Cosine,
        ..VqConfig::new(2, 2)
    };
    let mut q = VectorQuantizer::new(&p, &config).unwrap();
    set(&p, "codebook.embed", &[1.0, 0.0, 0.0, 1.0]);
    set(&p, "codebook.embed_avg", &[2.0, 0.0, 0.0, 2.0]);
    set(&p, "codebook.cluster_size", &[2.0, 2.0]);
    // The length of the input does not matter.
    let z = Tensor::from_slice(&[40f32, 30.0]).reshape([1, 2]);
    q.train(&z, Key::new(0, 1)).unwrap();
    close(&get(&p, "codebook.cluster_size"), &[1.5, 1.0]);
    close(&get(&p, "codebook.embed_avg"), &[1.4, 0.3, 0.0, 1.0]);
    let length = (1.4f64 * 1.4 + 0.09).sqrt();
    close(
        &get(&p, "codebook.embed"),
        &[1.4 / length, 0.3 / length, 0.0, 1.0],
    );
}

#[test]
fn quotients_follow_their_statistics() {
    let p = builder(1);
    let config = VqConfig {
        decay: 0.5,
        average: Average::Floor,
        eps: 0.25,
        ..VqConfig::new(1, 2)
    };
    let mut q = VectorQuantizer::new(&p, &config).unwrap();
    assert_eq!(p.params().len(), 2);
    set(&p, "codebook.embed_avg", &[4.0, 3.0]);
    set(&p, "codebook.cluster_size", &[2.0, 0.1]);
    close(&numbers(&q.codebook().codes().unwrap()), &[2.0, 12.0]);
    let z = Tensor::from_slice(&[3f32]).reshape([1, 1]);
    q.train(&z, Key::new(0, 1)).unwrap();
    close(
        &numbers(&q.codebook().codes().unwrap()),
        &[3.5 / 1.5, 1.5 / 0.25],
    );
}

#[test]
fn first_statistics_stand_for_the_first_codes() {
    let p = builder(1);
    let config = VqConfig::new(3, 4);
    let mut q = VectorQuantizer::new(&p, &config).unwrap();
    let before = get(&p, "codebook.embed");
    // One vector that is a code already changes nothing but its count.
    let z = q.codebook().codes().unwrap().narrow(0, 2, 1);
    q.train(&z, Key::new(0, 1)).unwrap();
    close(&get(&p, "codebook.cluster_size"), &[0.99, 0.99, 1.0, 0.99]);
    for (a, b) in get(&p, "codebook.embed").iter().zip(before) {
        assert!((a - b).abs() < 1e-4);
    }
}

#[test]
fn buffers_are_listed_and_ask_for_no_gradients() {
    let p = builder(1);
    let config = VqConfig {
        kmeans: Some(3),
        codebook_dim: Some(2),
        ..VqConfig::new(3, 4)
    };
    VectorQuantizer::new(&p, &config).unwrap();
    let trained: Vec<String> = p
        .params()
        .into_iter()
        .filter(|p| p.tensor.requires_grad())
        .map(|p| p.name)
        .collect();
    assert_eq!(
        trained,
        [
            "project_in.bias",
            "project_in.weight",
            "project_out.bias",
            "project_out.weight"
        ]
    );
    let names: Vec<String> = p.params().into_iter().map(|p| p.name).collect();
    for name in ["embed", "embed_avg", "cluster_size", "inited"] {
        assert!(names.contains(&format!("codebook.{name}")), "{names:?}");
    }
}

/// Points around `centres` well apart.
fn clustered(centres: i64, rows: i64) -> Tensor {
    let which = Tensor::arange(rows, (Kind::Int64, Device::Cpu)).remainder(centres);
    let centre = normal(50, &[centres, 4]) * 10.0;
    centre.index_select(0, &which) + normal(51, &[rows, 4]) * 0.1
}

#[test]
fn k_means_finds_better_first_codes() {
    let z = clustered(16, 400);
    let loss = |kmeans, learning| {
        let config = VqConfig {
            kmeans,
            learning,
            commitment_weight: 1.0,
            ..VqConfig::new(4, 32)
        };
        let mut q = vector(&config);
        let t = q.train(&z, Key::new(5, 0)).unwrap();
        let e = q.encode(&z).unwrap();
        (
            scalar(t.stages[0].commitment.as_ref().unwrap()),
            apart(&e.quantized, &z),
        )
    };
    for learning in [Learning::Ema, Learning::Gradient] {
        let (random, _) = loss(None, learning);
        let (few, _) = loss(Some(1), learning);
        let (many, far) = loss(Some(20), learning);
        assert!(many <= few && few < random / 2.0, "{many} {few} {random}");
        assert!(far.is_finite());
    }
}

#[test]
fn k_means_is_repeated_from_its_key_and_lowers_its_error() {
    let z = clustered(8, 200);
    let error = |iterations, seed| {
        let c = kmeans(&z, 8, iterations, false, Key::new(seed, 0)).unwrap();
        let near = c.centres.index_select(0, &c.assignment);
        assert_eq!(scalar(&c.sizes.sum(Kind::Float)), 200.0);
        scalar(&(&z - near).square().mean(Kind::Float))
    };
    let mut last = f64::INFINITY;
    for iterations in 0..6 {
        let now = error(iterations, 3);
        assert!(now <= last + 1e-6);
        assert_eq!(now, error(iterations, 3));
        last = now;
    }
    assert_ne!(error(0, 3), error(0, 4));
    // More clusters than vectors: some are drawn twice, all are vectors.
    let few = z.narrow(0, 0, 5);
    let c = kmeans(&few, 9, 3, false, Key::new(1, 0)).unwrap();
    assert_eq!(c.centres.size(), [9, 4]);
    let near = c.centres.index_select(0, &c.assignment);
    assert!(apart(&near, &few) < 1e-6);
    let sphere = kmeans(&z, 8, 5, true, Key::new(1, 0)).unwrap().centres;
    let lengths = numbers(&sphere.square().sum_dim_intlist(-1, false, None));
    let start = numbers(&z.square().sum_dim_intlist(-1, false, None));
    // A centre that never had a vector keeps its start.
    for l in lengths {
        assert!((l - 1.0).abs() < 1e-5 || start.iter().any(|s| (s - l).abs() < 1e-3));
    }
}

#[test]
fn k_means_happens_once_and_is_remembered_in_the_file() {
    let config = VqConfig {
        kmeans: Some(5),
        decay: 0.0,
        ..VqConfig::new(4, 4)
    };
    let p = builder(2);
    let mut q = VectorQuantizer::new(&p, &config).unwrap();
    assert_eq!(get(&p, "codebook.inited"), [0.0]);
    q.train(&clustered(4, 100), Key::new(1, 0)).unwrap();
    assert_eq!(get(&p, "codebook.inited"), [1.0]);
    let before = get(&p, "codebook.embed");
    q.train(&(clustered(4, 100) + 0.5), Key::new(1, 1)).unwrap();
    // Moved along, not begun anew: the same order of clusters.
    for (a, b) in before.iter().zip(get(&p, "codebook.embed")) {
        assert!((a + 0.5 - b).abs() < 0.1, "{a} {b}");
    }
}

#[test]
fn dead_codes_begin_again_at_vectors_of_the_batch() {
    for (average, learning) in [
        (Average::Laplace, Learning::Ema),
        (Average::Floor, Learning::Ema),
        (Average::Laplace, Learning::Gradient),
    ] {
        let p = builder(3);
        let config = VqConfig {
            average,
            learning,
            decay: 0.5,
            restart: Some(Restart {
                threshold: Threshold::MeanFraction(0.1),
                every: 3,
            }),
            ..VqConfig::new(4, 32)
        };
        let mut q = VectorQuantizer::new(&p, &config).unwrap();
        let z = clustered(32, 256) + 100.0;
        let used = |q: &VectorQuantizer| {
            let mut usage = Usage::of(q).unwrap();
            usage.add(&q.encode(&z).unwrap().indices).unwrap();
            usage.used()[0]
        };
        assert!(used(&q) < 0.2);
        let mut moved = Vec::new();
        for step in 1..=24 {
            let t = q.train(&z, Key::new(9, step)).unwrap();
            moved.push(t.restarted);
            assert!(step % 3 == 0 || t.restarted == 0);
        }
        assert!(moved.iter().sum::<usize>() > 16, "{moved:?}");
        assert!(used(&q) > 0.8, "{average:?} {learning:?} {}", used(&q));
        let codes = q.codebook().codes().unwrap();
        assert!(scalar(&codes.min()) > 40.0);
        // The sums agree with what the codes became.
        if let (Some(s), Some(n)) = (q.codebook().sums(), q.codebook().counts()) {
            let mean = s / n.unsqueeze(1);
            assert!(apart(&mean, &codes) < 0.1);
        }
    }
}

#[test]
fn restarts_repeat_from_their_key() {
    let run = |seed| {
        let p = builder(3);
        let config = VqConfig {
            restart: Some(Restart {
                threshold: Threshold::Count(2.0),
                every: 1,
            }),
            ..VqConfig::new(4, 32)
        };
        let mut q = VectorQuantizer::new(&p, &config).unwrap();
        for step in 0..5 {
            q.train(&normal(step, &[64, 4]), Key::new(seed, step))
                .unwrap();
        }
        get(&p, "codebook.embed")
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
