use super::*;
use crate::linear::{Joined, Linear};
use crate::weights;
use crate::{Init, ParamBuilder};
use sequor_kernels::rng::{Key, Purpose};
use tch::Device;

const CPU: Device = Device::Cpu;

/// Numbers of this seed alone: libtorch's own generator is shared by all tests that run.
fn random(seed: i64, shape: [i64; 2]) -> Tensor {
    let mut values = vec![0.0_f32; (shape[0] * shape[1]) as usize];
    let mut stream = Key::new(seed as u64, 0).stream(0, Purpose::Test);
    stream.fill_normal_f32(&mut values);
    Tensor::from_slice(&values).reshape(shape)
}

fn lora(seed: i64, input: i64, output: i64) -> Lora {
    Lora::new(
        random(seed, [2, input]),
        random(seed + 1, [output, 2]),
        0.5,
        0.0,
    )
    .unwrap()
}

fn worst(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

fn config() -> LoraConfig {
    LoraConfig {
        rank: 2,
        alpha: 6.0,
        dropout: 0.0,
        targets: vec!["q_proj".into(), "v_proj".into()],
    }
}

#[test]
fn an_attached_update_is_the_formula_and_merging_is_undone_exactly() {
    let x = random(9, [3, 5]);
    for kind in [Kind::Float, Kind::BFloat16] {
        for packed in [false, true] {
            let p = ParamBuilder::init(3, kind, CPU);
            let mut layer = Linear::new(&p, 5, 7, true, Init::Normal(1.0)).unwrap();
            let _no_grad = tch::no_grad_guard();
            if packed {
                layer = layer.pack().unwrap();
            }
            let plain = layer.forward(&x).unwrap();
            let update = lora(1, 5, 7);
            let (a, b) = (update.a.shallow_clone(), update.b.shallow_clone());
            layer.attach(0, update).unwrap();
            let expected = &plain + x.matmul(&a.tr()).matmul(&b.tr()) * 0.5;
            assert!(worst(&layer.forward(&x).unwrap(), &expected) < 1e-5);
            layer.merge().unwrap();
            // A 16-bit matrix rounds the sum: half a unit of its 8 bits per entry.
            let bound = if kind == Kind::Float { 1e-5 } else { 0.2 };
            assert!(worst(&layer.forward(&x).unwrap(), &expected) < bound);
            assert!(layer.attach(0, lora(1, 5, 7)).is_err(), "merged");
            layer.merge().unwrap();
            layer.unmerge().unwrap();
            layer.unmerge().unwrap();
            assert!(worst(&layer.forward(&x).unwrap(), &expected) < 1e-5);
            layer.detach().unwrap();
            assert!(layer.forward(&x).unwrap().equal(&plain), "restored exactly");
            assert!(layer.attach(0, lora(1, 4, 7)).is_err());
            assert!(layer.attach(1, lora(1, 5, 7)).is_err());
        }
    }
}

/// The parameters of a builder as a file.
fn saved(dir: &Path, p: &ParamBuilder) -> PathBuf {
    let path = dir.join("model.safetensors");
    let params = p.params();
    let list: Vec<(&str, &Tensor)> = params
        .iter()
        .map(|p| (p.name.as_str(), &p.tensor))
        .collect();
    weights::write_safetensors(&path, &list, &BTreeMap::new()).unwrap();
    path
}

#[test]
fn joined_layers_adapt_as_separate_ones() {
    let _no_grad = tch::no_grad_guard();
    let x = random(9, [3, 5]);
    let train = ParamBuilder::init(3, Kind::Float, CPU);
    let parts = || -> Vec<Linear> {
        [4, 2, 3]
            .iter()
            .enumerate()
            .map(|(i, &n)| Linear::new(&train.pp(i), 5, n, false, Init::Normal(1.0)).unwrap())
            .collect()
    };
    let mut apart = Joined::new(parts(), &train).unwrap();
    for part in [0, 2] {
        apart
            .attach(part, lora(part as i64, 5, [4, 2, 3][part]))
            .unwrap();
    }
    assert!(apart.attach(1, lora(0, 5, 4)).is_err());
    assert!(apart.attach(3, lora(0, 5, 4)).is_err());
    let expected = apart.forward(&x).unwrap();
    assert!(
        worst(
            &expected,
            &Joined::new(parts(), &train).unwrap().forward(&x).unwrap()
        ) > 0.1
    );

    // Attached after joining.
    let one_matrix = || {
        let dir = tempfile::tempdir().unwrap();
        let source = weights::open(&saved(dir.path(), &train)).unwrap();
        let p = ParamBuilder::load(source, Kind::Float, CPU);
        let layer = |i: usize, n| Linear::new(&p.pp(i), 5, n, false, Init::Zeros).unwrap();
        Joined::new(vec![layer(0, 4), layer(1, 2), layer(2, 3)], &p).unwrap()
    };
    let mut infer = one_matrix();
    let plain = infer.forward(&x).unwrap();
    for part in [0, 2] {
        infer
            .attach(part, lora(part as i64, 5, [4, 2, 3][part]))
            .unwrap();
    }
    assert!(worst(&infer.forward(&x).unwrap(), &expected) < 1e-5);
    infer.merge().unwrap();
    assert!(worst(&infer.forward(&x).unwrap(), &expected) < 1e-5);
    infer.unmerge().unwrap();
    infer.detach().unwrap();
    assert!(infer.forward(&x).unwrap().equal(&plain));

    // Attached before joining.
    let mut early = parts();
    for part in [0, 2] {
        early[part]
            .attach(0, lora(part as i64, 5, [4, 2, 3][part]))
            .unwrap();
    }
    assert!(
        early[0].select_outputs(&[1]).is_err(),
        "attached, not merged"
    );
    let joined = Linear::join(&early).unwrap();
    assert!(worst(&joined.forward(&x).unwrap(), &expected) < 1e-5);
    early[0].merge().unwrap();
    assert!(early[0].select_outputs(&[1]).is_ok());
    assert!(
        worst(
            &Linear::join(&early).unwrap().forward(&x).unwrap(),
            &expected
        ) < 1e-5
    );
}

/// A checkpoint of three layers, and a model over it.
fn checkpoint(dir: &Path) -> PathBuf {
    let path = dir.join("model.safetensors");
    let tensors = [
        ("m.q_proj.weight", random(1, [4, 5])),
        ("m.k_proj.weight", random(2, [2, 5])),
        ("m.v_proj.weight", random(3, [2, 5])),
    ];
    let list: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    weights::write_safetensors(&path, &list, &BTreeMap::new()).unwrap();
    path
}

fn model(p: &ParamBuilder) -> Joined {
    let layer = |name: &str, n| Linear::new(&p.pp("m").pp(name), 5, n, false, Init::Zeros).unwrap();
    Joined::new(
        vec![layer("q_proj", 4), layer("k_proj", 2), layer("v_proj", 2)],
        p,
    )
    .unwrap()
}

#[test]
fn a_trained_adapter_is_written_read_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let x = random(9, [3, 5]);
    let load = |source: Box<dyn TensorSource>| ParamBuilder::load(source, Kind::Float, CPU);
    let plain = model(&load(weights::open(&path).unwrap()))
        .forward(&x)
        .unwrap();

    let p = load(weights::open(&path).unwrap())
        .with_lora(config(), 4)
        .unwrap();
    let trained = model(&p);
    p.finish().unwrap();
    let params = p.params();
    let names: Vec<&str> = params.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "m.q_proj.lora_A.weight",
            "m.q_proj.lora_B.weight",
            "m.v_proj.lora_A.weight",
            "m.v_proj.lora_B.weight"
        ]
    );
    assert!(
        trained.forward(&x).unwrap().equal(&plain),
        "B begins at zero"
    );
    trained
        .forward(&x)
        .unwrap()
        .square()
        .sum(Kind::Float)
        .backward();
    assert!(params[1].tensor.grad().abs().max().double_value(&[]) > 0.0);
    tch::no_grad(|| {
        for p in &params {
            let _ = p.tensor.shallow_clone().normal_(0.0, 1.0);
        }
    });
    let _no_grad = tch::no_grad_guard();
    let adapted = trained.forward(&x).unwrap();
    assert!(worst(&adapted, &plain) > 0.1);

    Adapter::write(dir.path(), &config(), &params, Kind::Float, "tiny").unwrap();
    let adapter = Adapter::open(dir.path()).unwrap();
    assert_eq!(adapter.config(), &config());
    assert_eq!(adapter.modules().len(), 2);
    let source = LoraMerged::new(weights::open(&path).unwrap(), adapter).unwrap();
    let p = load(Box::new(source));
    let merged = model(&p);
    p.finish().unwrap();
    assert!(worst(&merged.forward(&x).unwrap(), &adapted) < 1e-5);
    assert_eq!(merged.bytes(), 4 * 8 * 5, "nothing is added to a pass");

    // The update enters with alpha / r.
    let w = weights::open(&path)
        .unwrap()
        .load("m.q_proj.weight")
        .unwrap();
    let q = w + params[1].tensor.matmul(&params[0].tensor) * 3.0;
    let first = merged.forward(&x).unwrap().narrow(-1, 0, 4);
    assert!(worst(&first, &x.matmul(&q.tr())) < 1e-4);
}

#[test]
fn dropout_acts_in_training_alone() {
    let a = random(1, [2, 50]).set_requires_grad(true);
    let update = Lora::new(a, random(2, [3, 2]), 1.0, 0.5).unwrap();
    let x = random(3, [4, 50]);
    let one = update.forward(&x).unwrap();
    assert!(worst(&one, &update.forward(&x).unwrap()) > 1e-3);
    let _no_grad = tch::no_grad_guard();
    let one = update.forward(&x).unwrap();
    assert!(one.equal(&update.forward(&x).unwrap()));
}

#[test]
fn everything_wrong_is_listed_in_one_error() {
    let dir = tempfile::tempdir().unwrap();
    let put = |tensors: &[(&str, [i64; 2])], config: Value| {
        let tensors: Vec<(String, Tensor)> = tensors
            .iter()
            .map(|(n, s)| (format!("base_model.model.{n}"), random(0, *s)))
            .collect();
        let list: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        weights::write_safetensors(&dir.path().join(WEIGHTS_FILE), &list, &BTreeMap::new())
            .unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
    };
    put(
        &[
            ("m.q_proj.lora_A.weight", [2, 5]),
            ("m.v_proj.lora_A.weight", [3, 5]),
            ("m.v_proj.lora_B.weight", [2, 3]),
            ("m.embed.lora_embedding_A", [2, 3]),
        ],
        json!({"r": 0, "lora_alpha": -1, "use_dora": true, "bias": "all"}),
    );
    let text = Adapter::open(dir.path()).unwrap_err().to_string();
    for part in [
        "7 problems",
        "r is 0",
        "lora_alpha",
        "use_dora",
        "bias",
        "q_proj: .lora_B.weight is missing",
        "v_proj: lora_A is [3, 5]",
        "lora_embedding_A",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }

    // A good adapter for another model.
    put(
        &[
            ("m.q_proj.lora_A.weight", [2, 6]),
            ("m.q_proj.lora_B.weight", [4, 2]),
            ("m.x_proj.lora_A.weight", [2, 5]),
            ("m.x_proj.lora_B.weight", [4, 2]),
        ],
        json!({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "x_proj"]}),
    );
    let adapter = Adapter::open(dir.path()).unwrap();
    let source = weights::open(&checkpoint(dir.path())).unwrap();
    let text = LoraMerged::new(source, adapter).unwrap_err().to_string();
    assert!(
        text.contains("q_proj: the model's matrix is [4, 5], the adapter's [4, 6]"),
        "{text}"
    );
    assert!(
        text.contains("x_proj: the model has no such module"),
        "{text}"
    );
    assert!(Adapter::open(Path::new("/nonexistent")).is_err());

    let mut c = config();
    c.rank = 0;
    assert!(c.validate().is_err());
    assert!(config().targets("model.layers.0.self_attn.q_proj"));
    assert!(!config().targets("model.layers.0.self_attn.eq_proj"));
    assert!(Adapter::write(dir.path(), &config(), &[], Kind::Float, "x").is_err());
}
