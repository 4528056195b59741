//! Llama-type models in GGUF files: the metadata read as a published config.
//! (Their tensors get canonical names from `sequor_nn::weights`.)

use crate::config::DecoderConfig;
use sequor_nn::weights::{Gguf, TensorSource};
use sequor_nn::{Error, Result};
use serde_json::{Map, Value, json};

/// GGUF architectures and the published ones they correspond to.
const ARCHITECTURES: [(&str, &str); 3] = [
    ("llama", "LlamaForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
];

/// The metadata as a published config.
///
/// # Errors
/// [`Error::Unsupported`] for other architectures, [`Error::Config`] for missing fields.
pub fn to_json(file: &Gguf) -> Result<Value> {
    let meta = |key: &str| file.value(key);
    let arch = meta("general.architecture").and_then(|v| v.as_str().map(str::to_owned));
    let arch = arch.ok_or_else(|| Error::Config("general.architecture is missing".into()))?;
    let architecture = ARCHITECTURES
        .iter()
        .find(|(a, _)| *a == arch)
        .map(|(_, b)| *b)
        .ok_or_else(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|(a, _)| *a).collect();
            Error::Unsupported(format!(
                "GGUF architecture '{arch}' (known: {})",
                known.join(", ")
            ))
        })?;
    let mut c = Map::new();
    c.insert("architectures".into(), json!([architecture]));
    // GGUF calls these architectures as `model_type` does.
    c.insert("model_type".into(), json!(arch));
    let ints = [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
    ];
    for (from, to) in ints {
        if let Some(n) = meta(&format!("{arch}.{from}")).and_then(|v| v.as_u64()) {
            c.insert(to.into(), n.into());
        }
    }
    let floats = [
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("rope.freq_base", "rope_theta"),
    ];
    for (from, to) in floats {
        if let Some(x) = meta(&format!("{arch}.{from}")).and_then(|v| v.as_f64()) {
            c.insert(to.into(), x.into());
        }
    }
    let scaling = |key: &str| meta(&format!("{arch}.rope.scaling.{key}"));
    if let Some(kind) = scaling("type")
        .and_then(|v| v.as_str())
        .filter(|k| *k != "none")
    {
        let factor = scaling("factor").and_then(|v| v.as_f64());
        let original = scaling("original_context_length").and_then(|v| v.as_u64());
        c.insert(
            "rope_scaling".into(),
            json!({"type": kind, "factor": factor, "original_max_position_embeddings": original}),
        );
    }
    let rows = file
        .info("token_embd.weight")
        .and_then(|i| i.shape.first().copied());
    let vocab =
        rows.ok_or_else(|| Error::Config("the tensor token_embd.weight is missing".into()))?;
    c.insert("vocab_size".into(), vocab.into());
    c.insert(
        "tie_word_embeddings".into(),
        file.info("output.weight").is_none().into(),
    );
    c.insert(
        "attention_bias".into(),
        (arch == "llama" && file.info("blk.0.attn_q.bias").is_some()).into(),
    );
    for (from, to) in [
        ("tokenizer.ggml.eos_token_id", "eos_token_id"),
        ("tokenizer.ggml.bos_token_id", "bos_token_id"),
    ] {
        if let Some(id) = meta(from).and_then(|v| v.as_u64()) {
            c.insert(to.into(), id.into());
        }
    }
    Ok(Value::Object(c))
}

/// The metadata as a decoder's config.
///
/// # Errors
/// As [`to_json`], and as [`DecoderConfig::from_json`].
pub fn config(file: &Gguf) -> Result<DecoderConfig> {
    if file.info("rope_freqs.weight").is_some() {
        return Err(Error::Unsupported("rotary frequencies stored as a tensor (rope_freqs.weight); use the safetensors form of this model".into()));
    }
    DecoderConfig::from_json(&to_json(file)?)
}
