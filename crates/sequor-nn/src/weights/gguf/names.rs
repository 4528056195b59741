//! Presents a GGUF model as the Hugging Face checkpoint it was converted from.

use super::Gguf;
use crate::error::{Error, Result};
use crate::weights::{NewTensor, Renamed, TensorSource, Transform};

/// Renames llama.cpp's tensors to Hugging Face's and undoes the row permutation
/// that the conversion of `llama` models applies to Q and K
/// ([`Transform::UnpermuteRope`]). Architectures `llama` (also Mistral and
/// SmolLM2), `qwen2` and `qwen3`. Tensors without a counterpart keep their name,
/// so that a loader reports them.
///
/// A model with tied embeddings has no `lm_head.weight`, as in the original.
///
/// # Errors
/// Another architecture, a missing head count, or shapes that do not fit it.
pub fn hugging_face_names(gguf: Gguf) -> Result<Renamed<Gguf>> {
    let permuted = match gguf.architecture()? {
        "llama" => true,
        "qwen2" | "qwen3" => false,
        other => {
            return Err(Error::Unsupported(format!(
                "{}: GGUF architecture '{other}'; llama, qwen2 and qwen3 are known",
                gguf.path().display()
            )));
        }
    };
    let count = |key: &str| {
        let value = gguf.model_value(key);
        value.map(|v| {
            v.as_i64().ok_or_else(|| {
                Error::weights(
                    gguf.path(),
                    format!("metadata '{key}' is {v}, expected a number"),
                )
            })
        })
    };
    let (heads, kv_heads) = if permuted {
        let heads = count("attention.head_count").ok_or_else(|| {
            Error::weights(gguf.path(), "metadata 'attention.head_count' is missing")
        })??;
        // Absent when every query head has its own key head.
        (
            heads,
            count("attention.head_count_kv").unwrap_or(Ok(heads))?,
        )
    } else {
        (0, 0)
    };
    Renamed::new(gguf, |old, _| {
        let Some((new, role)) = hugging_face_name(old) else {
            return vec![NewTensor::renamed(old)];
        };
        let steps = match role {
            Role::Query if permuted => vec![Transform::UnpermuteRope { heads }],
            Role::Key if permuted => vec![Transform::UnpermuteRope { heads: kv_heads }],
            _ => Vec::new(),
        };
        vec![NewTensor { name: new, steps }]
    })
}

/// Presents a checkpoint under canonical (Hugging Face) names as llama.cpp names and lays it
/// out: the other way round of [`hugging_face_names`]. `rotated` says how many query and key
/// heads to permute, for architecture `llama`.
///
/// # Errors
/// [`Error::Unsupported`] for tensors that llama.cpp's architecture has no name for; shapes
/// that do not fit the heads.
pub fn ggml_names<S: TensorSource>(source: S, rotated: Option<(i64, i64)>) -> Result<Renamed<S>> {
    let unknown = source.names().into_iter().find(|n| ggml_name(n).is_none());
    if let Some(name) = unknown {
        return Err(Error::Unsupported(format!(
            "{}: GGUF has no name for tensor '{name}' of this architecture; write safetensors",
            source.path().display()
        )));
    }
    Renamed::new(source, |old, _| {
        let Some((new, role)) = ggml_name(old) else {
            return vec![];
        };
        let steps = match (role, rotated) {
            (Role::Query, Some((heads, _))) => vec![Transform::PermuteRope { heads }],
            (Role::Key, Some((_, heads))) => vec![Transform::PermuteRope { heads }],
            _ => Vec::new(),
        };
        vec![NewTensor { name: new, steps }]
    })
}

#[derive(Clone, Copy)]
enum Role {
    Query,
    Key,
    Other,
}

/// Tensors outside the layers: GGUF's name, Hugging Face's.
const TOP: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Modules of a layer: GGUF's name, Hugging Face's.
const PARTS: [(&str, &str, Role); 11] = [
    ("attn_q", "self_attn.q_proj", Role::Query),
    ("attn_k", "self_attn.k_proj", Role::Key),
    ("attn_v", "self_attn.v_proj", Role::Other),
    ("attn_output", "self_attn.o_proj", Role::Other),
    ("attn_q_norm", "self_attn.q_norm", Role::Other),
    ("attn_k_norm", "self_attn.k_norm", Role::Other),
    ("attn_norm", "input_layernorm", Role::Other),
    ("ffn_norm", "post_attention_layernorm", Role::Other),
    ("ffn_gate", "mlp.gate_proj", Role::Other),
    ("ffn_up", "mlp.up_proj", Role::Other),
    ("ffn_down", "mlp.down_proj", Role::Other),
];

fn hugging_face_name(old: &str) -> Option<(String, Role)> {
    if let Some((_, new)) = TOP.iter().find(|(gguf, _)| *gguf == old) {
        return Some(((*new).to_owned(), Role::Other));
    }
    let (layer, part) = old.strip_prefix("blk.")?.split_once('.')?;
    let (part, suffix) = part.rsplit_once('.')?;
    let (_, new, role) = PARTS.iter().find(|(gguf, ..)| *gguf == part)?;
    Some((format!("model.layers.{layer}.{new}.{suffix}"), *role))
}

fn ggml_name(old: &str) -> Option<(String, Role)> {
    if let Some((new, _)) = TOP.iter().find(|(_, canonical)| *canonical == old) {
        return Some(((*new).to_owned(), Role::Other));
    }
    let (layer, part) = old.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, suffix) = part.rsplit_once('.')?;
    let (new, _, role) = PARTS.iter().find(|(_, canonical, _)| *canonical == part)?;
    Some((format!("blk.{layer}.{new}.{suffix}"), *role))
}
