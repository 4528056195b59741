//! Damaged and lying model folders: an error that names the file, never a panic.

use sequor_backbone::CausalLm;
use sequor_nn::device::DType;
use sequor_nn::weights::{self, write_safetensors};
use sequor_nn::{Device, Error, Kind, Tensor};
use std::path::Path;

fn copy_case(to: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/llama");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

fn load(dir: &Path) -> Result<CausalLm, Error> {
    CausalLm::load(dir, DType::F32, Device::Cpu)
}

#[test]
fn every_prefix_of_a_weight_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    copy_case(dir.path());
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    load(dir.path()).unwrap();
    for n in (0..whole.len())
        .step_by(whole.len() / 97 + 1)
        .chain([8, 9, whole.len() - 1])
    {
        std::fs::write(&path, &whole[..n]).unwrap();
        let e = load(dir.path())
            .err()
            .unwrap_or_else(|| panic!("a prefix of {n} bytes loaded"));
        assert!(e.to_string().contains("model.safetensors"), "{e}");
    }
}

#[test]
fn bit_flips_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    copy_case(dir.path());
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for i in (0..4096.min(whole.len())).step_by(7) {
        let mut damaged = whole.clone();
        damaged[i] ^= 1 << (i % 8);
        std::fs::write(&path, &damaged).unwrap();
        let _ = load(dir.path()); // an error or a correct load, nothing else
    }
}

#[test]
fn lying_configs_are_refused_before_anything_is_allocated() {
    let dir = tempfile::tempdir().unwrap();
    copy_case(dir.path());
    let config = dir.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        std::fs::write(&config, text.replace(from, to)).unwrap();
        load(dir.path())
            .err()
            .unwrap_or_else(|| panic!("{to} was accepted"))
            .to_string()
    };
    assert!(with("\"hidden_size\": 64", "\"hidden_size\": 1048576").contains("another shape"));
    assert!(with("\"hidden_size\": 64", "\"hidden_size\": 9e18").contains("hidden_size"));
    assert!(with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4000").contains("missing"));
    assert!(with("\"vocab_size\": 256", "\"vocab_size\": 0").contains("vocab_size"));
    assert!(with("LlamaForCausalLM", "EvilForCausalLM").contains("EvilForCausalLM"));
    assert!(
        with("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3")
            .contains("key/value heads")
    );
    assert!(with("{", "").contains("config.json"));
    for n in (0..text.len()).step_by(41) {
        std::fs::write(&config, &text[..n]).unwrap();
        assert!(load(dir.path()).is_err());
    }
}

#[test]
fn one_report_names_all_that_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    copy_case(dir.path());
    let path = dir.path().join("model.safetensors");
    let mut tensors = sequor_tests::load_all(&path).unwrap();
    let norm = tensors.remove("model.norm.weight").unwrap();
    tensors.insert("model.nrom.weight".into(), norm);
    tensors.insert(
        "lm_head.weight".into(),
        Tensor::f_zeros([3, 3], (Kind::Float, Device::Cpu)).unwrap(),
    );
    let list: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    write_safetensors(&path, &list, &Default::default()).unwrap();
    let e = load(dir.path()).unwrap_err().to_string();
    for word in [
        "missing: model.norm.weight (nearest in the file: model.nrom.weight)",
        "unexpected: model.nrom.weight",
        "lm_head.weight is [3, 3]",
    ] {
        assert!(e.contains(word), "{word} is not in: {e}");
    }
}

#[test]
fn shards_that_are_absent_or_elsewhere_are_named() {
    let dir = tempfile::tempdir().unwrap();
    copy_case(dir.path());
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    for (shard, word) in [
        ("model-00001-of-00002.safetensors", "model-00001-of-00002"),
        ("../../etc/passwd", "passwd"),
    ] {
        std::fs::write(
            &index,
            format!("{{\"metadata\":{{}},\"weight_map\":{{\"model.norm.weight\":\"{shard}\"}}}}"),
        )
        .unwrap();
        let e = load(dir.path()).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
}

#[test]
fn a_sharded_bf16_checkpoint_loads() {
    let dir = tempfile::tempdir().unwrap();
    copy_case(dir.path());
    let path = dir.path().join("model.safetensors");
    let tensors = sequor_tests::load_all(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut map = serde_json::Map::new();
    let halves: Vec<(String, Tensor)> = tensors
        .into_iter()
        .map(|(n, t)| (n, t.to_kind(Kind::BFloat16)))
        .collect();
    for (i, half) in halves.chunks(halves.len() / 2 + 1).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        let list: Vec<(&str, &Tensor)> = half.iter().map(|(n, t)| (n.as_str(), t)).collect();
        write_safetensors(&dir.path().join(&name), &list, &Default::default()).unwrap();
        map.extend(half.iter().map(|(n, _)| (n.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(
        dir.path().join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    assert_eq!(
        weights::open(dir.path()).unwrap().names().len(),
        halves.len()
    );
    load(dir.path()).unwrap();
}

#[test]
fn output_that_cannot_be_written_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let t = Tensor::f_zeros([2], (Kind::Float, Device::Cpu)).unwrap();
    assert!(
        write_safetensors(
            &dir.path().join("no/such/folder.safetensors"),
            &[("a", &t)],
            &Default::default()
        )
        .is_err()
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
