//! Codebooks in files: kept, resumed, renamed, refused.

use super::*;
use sequor_nn::weights::{self, TensorSource, write_safetensors};
use std::path::Path;

fn save(p: &ParamBuilder, path: &Path) {
    let params = p.params();
    let list: Vec<(&str, &Tensor)> = params
        .iter()
        .map(|p| (p.name.as_str(), &p.tensor))
        .collect();
    write_safetensors(path, &list, &Default::default()).unwrap();
}

fn write(path: &Path, tensors: &[(&str, Tensor)]) {
    let list: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    write_safetensors(path, &list, &Default::default()).unwrap();
}

fn open(path: &Path) -> Box<dyn TensorSource> {
    weights::open(path).unwrap()
}

fn configs() -> Vec<ResidualVqConfig> {
    let vq = VqConfig {
        kmeans: Some(4),
        restart: Some(Restart::default()),
        ..VqConfig::new(4, 8)
    };
    let floor = VqConfig {
        average: Average::Floor,
        ..vq.clone()
    };
    let gradient = VqConfig {
        learning: Learning::Gradient,
        codebook_dim: Some(2),
        ..vq.clone()
    };
    [vq, floor, gradient]
        .into_iter()
        .map(|stage| ResidualVqConfig {
            quantizer_dropout: 0.5,
            dim: Some(6),
            ..ResidualVqConfig::new(3, stage)
        })
        .collect()
}

#[test]
fn training_resumes_to_the_bit_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let batch = |step| normal(step, &[8, 5, 6]);
    for config in configs() {
        let p = builder(1);
        let mut q = ResidualVq::new(&p, &config).unwrap();
        for step in 0..4 {
            q.train(&batch(step), Key::new(2, step)).unwrap();
        }
        save(&p, &path);
        let tuned = ParamBuilder::tune(open(&path), Kind::Float, Device::Cpu);
        let mut again = ResidualVq::new(&tuned, &config).unwrap();
        tuned.finish().unwrap();
        for step in 4..12 {
            let a = q.train(&batch(step), Key::new(2, step)).unwrap();
            let b = again.train(&batch(step), Key::new(2, step)).unwrap();
            assert_eq!(a.indices, b.indices);
            assert_eq!(a.quantized, b.quantized);
            assert_eq!(a.restarted, b.restarted);
        }
        for (a, b) in p.params().iter().zip(tuned.params()) {
            assert_eq!((&a.name, &a.tensor), (&b.name, &b.tensor));
        }
        // For inference, too, and through a dry run that reads nothing.
        save(&p, &path);
        let infer = ParamBuilder::load(open(&path), Kind::Float, Device::Cpu);
        ResidualVq::new(&infer.dry_run(), &config).unwrap();
        let quiet = ResidualVq::new(&infer, &config).unwrap();
        infer.finish().unwrap();
        let z = batch(99);
        for _ in 0..2 {
            let (a, b) = (q.encode(&z).unwrap(), quiet.encode(&z).unwrap());
            assert_eq!((a.indices, a.quantized), (b.indices, b.quantized));
        }
    }
}

#[test]
fn a_quantiser_loaded_for_inference_follows_its_own_updates() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let p = builder(1);
    let config = VqConfig {
        decay: 0.2,
        ..VqConfig::new(4, 8)
    };
    VectorQuantizer::new(&p, &config)
        .unwrap()
        .train(&normal(1, &[50, 4]), Key::new(0, 1))
        .unwrap();
    save(&p, &path);
    let load = || {
        let p = ParamBuilder::load(open(&path), Kind::Float, Device::Cpu);
        VectorQuantizer::new(&p, &config).unwrap()
    };
    // One has searched before the update, the other has not.
    let (mut a, mut b) = (load(), load());
    let z = normal(2, &[50, 4]);
    a.encode(&z).unwrap();
    a.train(&(&z * 2.0), Key::new(0, 2)).unwrap();
    b.train(&(&z * 2.0), Key::new(0, 2)).unwrap();
    assert_eq!(a.encode(&z).unwrap().indices, b.encode(&z).unwrap().indices);
    assert_eq!(
        a.encode(&z).unwrap().quantized,
        b.encode(&z).unwrap().quantized
    );
}

#[test]
fn statistics_may_be_absent_for_inference_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.safetensors");
    write(&path, &[("codebook.embed", normal(1, &[8, 4]))]);
    let config = VqConfig {
        kmeans: Some(3),
        ..VqConfig::new(4, 8)
    };
    let p = ParamBuilder::load(open(&path), Kind::Float, Device::Cpu);
    let mut q = VectorQuantizer::new(&p, &config).unwrap();
    p.finish().unwrap();
    let z = normal(2, &[5, 4]);
    q.encode(&z).unwrap();
    let error = q.train(&z, Key::new(0, 0)).unwrap_err().to_string();
    assert!(error.contains("embed_avg"), "{error}");
}

#[test]
fn a_codebook_of_another_size_is_reported_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.safetensors");
    write(
        &path,
        &[
            ("codebook.weight", normal(1, &[8, 4])),
            ("stray", normal(1, &[1])),
        ],
    );
    let config = VqConfig {
        learning: Learning::Gradient,
        ..VqConfig::new(4, 16)
    };
    for p in [
        ParamBuilder::load(open(&path), Kind::Float, Device::Cpu),
        ParamBuilder::load(open(&path), Kind::Float, Device::Cpu).dry_run(),
        ParamBuilder::tune(open(&path), Kind::Float, Device::Cpu),
    ] {
        VectorQuantizer::new(&p, &config).unwrap();
        let error = p.finish().unwrap_err().to_string();
        assert!(
            error.contains("codebook.weight is [8, 4] in the file, the model needs [16, 4]"),
            "{error}"
        );
        assert!(error.contains("stray"), "{error}");
    }
}

#[test]
fn damaged_codes_are_refused_when_they_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.safetensors");
    let table = Tensor::from_slice(&[1f32, f32::NAN, 2.0, 3.0]).reshape([2, 2]);
    write(&path, &[("codebook.weight", table)]);
    let config = VqConfig {
        learning: Learning::Gradient,
        ..VqConfig::new(2, 2)
    };
    let p = ParamBuilder::load(open(&path), Kind::Float, Device::Cpu);
    let q = VectorQuantizer::new(&p, &config).unwrap();
    let error = q.encode(&normal(1, &[3, 2])).unwrap_err().to_string();
    assert!(error.contains("codebook"), "{error}");
}

/// The layouts of the publishers that `names` knows, each a file of its own.
#[test]
fn published_layouts_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("published.safetensors");
    let table = normal(1, &[8, 4]);
    let (sums, counts) = (
        &table * 3.0,
        Tensor::full([8], 3.0, (Kind::Float, Device::Cpu)),
    );
    let flag = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let read = |tensors: &[(&str, Tensor)]| {
        write(&path, tensors);
        let file = names::from_published(open(&path)).unwrap();
        ParamBuilder::load(Box::new(file), Kind::Float, Device::Cpu)
    };
    let same = |q: &Codebook| assert!(apart(&q.codes().unwrap(), &table) < 1e-6);

    let package = read(&[
        ("_codebook.embed", table.unsqueeze(0)),
        ("_codebook.embed_avg", sums.unsqueeze(0)),
        ("_codebook.cluster_size", counts.unsqueeze(0)),
        ("_codebook.initted", flag(&[]).to_kind(Kind::Bool)),
    ]);
    let q = VectorQuantizer::new(&package, &VqConfig::new(4, 8)).unwrap();
    package.finish().unwrap();
    same(q.codebook());

    let gradient = VqConfig {
        learning: Learning::Gradient,
        ..VqConfig::new(4, 8)
    };
    let taming = read(&[
        ("embedding.weight", table.copy()),
        ("codebook_used", flag(&[65536])),
    ]);
    let q = VectorQuantizer::new(&taming, &gradient).unwrap();
    taming.finish().unwrap();
    same(q.codebook());

    let encodec = read(&[
        ("layers.0.codebook.embed", table.copy()),
        ("layers.0.codebook.embed_avg", sums.copy()),
        ("layers.0.codebook.cluster_size", counts.copy()),
        ("layers.0.codebook.inited", flag(&[1])),
    ]);
    let config = ResidualVqConfig::new(1, VqConfig::new(4, 8));
    let q = ResidualVq::new(&encodec, &config).unwrap();
    encodec.finish().unwrap();
    same(q.stages()[0].codebook());

    // DAC: convolutions of size 1 around every codebook.
    let (inwards, outwards) = (normal(2, &[4, 10, 1]), normal(3, &[10, 4, 1]));
    let dac = read(&[
        ("quantizers.0.codebook.weight", table.copy()),
        ("quantizers.0.in_proj.weight", inwards.copy()),
        ("quantizers.0.in_proj.bias", normal(4, &[4])),
        ("quantizers.0.out_proj.weight", outwards.copy()),
        ("quantizers.0.out_proj.bias", normal(5, &[10])),
    ]);
    let stage = VqConfig {
        dim: 10,
        codebook_dim: Some(4),
        distance: Distance::Direction,
        ..gradient
    };
    let q = ResidualVq::new(&dac, &ResidualVqConfig::new(1, stage)).unwrap();
    dac.finish().unwrap();
    let z = normal(6, &[2, 10, 7]);
    let e = q.encode(&channels_last(&z).unwrap()).unwrap();
    let inner = z.conv1d(&inwards, Some(normal(4, &[4])), 1, 0, 1, 1);
    let unit = |t: &Tensor, dim: i64| t / t.norm_scalaropt_dim(2, [dim], true);
    let near = unit(&table, 1).matmul(&unit(&inner, 1)).argmax(1, false);
    assert_eq!(e.indices.reshape([2, 7]), near);
    let code = table
        .index_select(0, &near.reshape([-1]))
        .reshape([2, 7, 4]);
    let want = channels_first(&code)
        .unwrap()
        .conv1d(&outwards, Some(normal(5, &[10])), 1, 0, 1, 1);
    assert!(apart(&channels_first(&e.quantized).unwrap(), &want) < 1e-5);

    // Mimi: codes are a quotient, one pair of projections around all levels.
    let mimi = read(&[
        ("input_proj.weight", inwards.copy()),
        ("output_proj.weight", outwards.copy()),
        ("layers.0.codebook.embed_sum", sums.copy()),
        ("layers.0.codebook.cluster_usage", counts.copy()),
        ("layers.0.codebook.initialized", flag(&[1])),
    ]);
    let stage = VqConfig {
        average: Average::Floor,
        projection_bias: false,
        ..VqConfig::new(4, 8)
    };
    let config = ResidualVqConfig {
        dim: Some(10),
        ..ResidualVqConfig::new(1, stage)
    };
    let q = ResidualVq::new(&mimi, &config).unwrap();
    mimi.finish().unwrap();
    same(q.stages()[0].codebook());
    let found = q
        .lookup(&Tensor::from_slice(&[3i64]).reshape([1, 1]))
        .unwrap();
    assert!(apart(&found.reshape([4]), &table.get(3)) < 1e-6);

    let mut var = vec![
        ("embedding.weight", table.copy()),
        ("ema_vocab_hit_SV", flag(&[3, 8])),
    ];
    let phi = [
        "quant_resi.qresi_ls.0",
        "quant_resi.qresi_ls.1",
        "quant_resi.qresi_ls.2",
        "quant_resi.qresi_ls.3",
    ];
    let parts: Vec<[String; 2]> = phi
        .iter()
        .map(|p| [format!("{p}.weight"), format!("{p}.bias")])
        .collect();
    for [w, b] in &parts {
        var.push((w, normal(1, &[4, 4, 3, 3])));
        var.push((b, normal(1, &[4])));
    }
    let var = read(&var);
    let q = MultiScaleVq::new(&var, &MultiScaleVqConfig::new(4, 8, &[1, 2, 4])).unwrap();
    var.finish().unwrap();
    same(q.codebook());
}
