//! Published tensor names mapped onto the decoder's own, which are those of
//! `LlamaForCausalLM`. One table per layout, no second network.

use crate::config::{DecoderConfig, Family};
use sequor_nn::Result;
use sequor_nn::weights::{NewTensor, Renamed, TensorSource, Transform};

/// Presents a checkpoint of any known layout under canonical names. Tensors that no
/// rule covers keep their names, so that they are reported as unexpected.
///
/// # Errors
/// When a tensor does not have the shape that its rule cuts up.
pub fn canonical(
    source: Box<dyn TensorSource>,
    config: &DecoderConfig,
) -> Result<Box<dyn TensorSource>> {
    let rename = |name: &str| match config.family {
        Family::Gpt2 => gpt2(name, config),
        Family::Opt => opt(name),
        _ => llama(name, config),
    };
    if source
        .names()
        .iter()
        .all(|n| rename(n) == [NewTensor::renamed(n)])
    {
        return Ok(source);
    }
    Ok(Box::new(Renamed::new(source, |name, _| rename(name))?))
}

fn part(name: String, steps: Vec<Transform>) -> NewTensor {
    NewTensor { name, steps }
}

/// `h.3.rest` to `(3, "rest")`.
fn layer<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let (number, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    number
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then_some((number, rest))
}

/// GPT-2: matrices are stored `[in, out]`, queries, keys and values side by side along
/// `out`; the hub's own file lacks the `transformer.` prefix.
fn gpt2(name: &str, c: &DecoderConfig) -> Vec<NewTensor> {
    let short = name.strip_prefix("transformer.").unwrap_or(name);
    let direct = match short {
        "wte.weight" => "model.embed_tokens.weight",
        "wpe.weight" => "model.embed_positions.weight",
        "ln_f.weight" => "model.norm.weight",
        "ln_f.bias" => "model.norm.bias",
        _ => "",
    };
    if !direct.is_empty() {
        return vec![NewTensor::renamed(direct)];
    }
    let Some((i, rest)) = layer(short, "h.") else {
        return vec![NewTensor::renamed(name)];
    };
    let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let to = |target: &str| format!("model.layers.{i}.{target}.{kind}");
    let matrix = kind == "weight";
    let transposed = || {
        if matrix {
            vec![Transform::Transpose]
        } else {
            vec![]
        }
    };
    match module {
        "ln_1" => vec![part(to("input_layernorm"), vec![])],
        "ln_2" => vec![part(to("post_attention_layernorm"), vec![])],
        "attn.c_attn" => (0..3)
            .zip(["q_proj", "k_proj", "v_proj"])
            .map(|(n, target)| {
                let slice = Transform::Slice {
                    dim: usize::from(matrix),
                    start: n * c.dim,
                    len: c.dim,
                };
                part(
                    to(&format!("self_attn.{target}")),
                    std::iter::once(slice).chain(transposed()).collect(),
                )
            })
            .collect(),
        "attn.c_proj" => vec![part(to("self_attn.o_proj"), transposed())],
        "mlp.c_fc" => vec![part(to("mlp.up_proj"), transposed())],
        "mlp.c_proj" => vec![part(to("mlp.down_proj"), transposed())],
        // The causal mask, stored as a buffer by old files.
        "attn" => vec![],
        _ => vec![NewTensor::renamed(name)],
    }
}

/// OPT: the same parts under other names.
fn opt(name: &str) -> Vec<NewTensor> {
    let short = name.strip_prefix("model.").unwrap_or(name);
    let Some(short) = short.strip_prefix("decoder.") else {
        return vec![NewTensor::renamed(name)];
    };
    let to = match layer(short, "layers.") {
        Some((i, rest)) => {
            let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
            let target = match module {
                "self_attn_layer_norm" => "input_layernorm",
                "final_layer_norm" => "post_attention_layernorm",
                "self_attn.out_proj" => "self_attn.o_proj",
                "fc1" => "mlp.up_proj",
                "fc2" => "mlp.down_proj",
                other => other,
            };
            format!("model.layers.{i}.{target}.{kind}")
        }
        None => format!("model.{}", short.replace("final_layer_norm", "norm")),
    };
    vec![NewTensor::renamed(to)]
}

/// Llama and its relatives: canonical already, but for experts and missing prefixes.
fn llama(name: &str, c: &DecoderConfig) -> Vec<NewTensor> {
    // A file of the bare network, without the head, lacks the prefix.
    let bare = ["embed_tokens.", "layers.", "norm."]
        .iter()
        .any(|p| name.starts_with(p));
    let full = if bare {
        format!("model.{name}")
    } else {
        name.to_owned()
    };
    let full = full.replace(".block_sparse_moe.", ".mlp.");
    let Some(m) = &c.moe else {
        return vec![NewTensor::renamed(full)];
    };
    let one = |e: usize| Transform::Slice {
        dim: 0,
        start: e as i64,
        len: 1,
    };
    // Newer files stack all experts: [experts, 2 * hidden, dim] and [experts, dim, hidden].
    if let Some(prefix) = full.strip_suffix("experts.gate_up_proj") {
        let half = |e: usize, n: i64, target: &str| {
            let slice = Transform::Slice {
                dim: 1,
                start: n * m.hidden,
                len: m.hidden,
            };
            let steps = vec![one(e), slice, Transform::Reshape(vec![m.hidden, c.dim])];
            part(format!("{prefix}experts.{e}.{target}.weight"), steps)
        };
        return (0..m.experts)
            .flat_map(|e| [half(e, 0, "gate_proj"), half(e, 1, "up_proj")])
            .collect();
    }
    if let Some(prefix) = full.strip_suffix("experts.down_proj") {
        let whole = |e: usize| {
            part(
                format!("{prefix}experts.{e}.down_proj.weight"),
                vec![one(e), Transform::Reshape(vec![c.dim, m.hidden])],
            )
        };
        return (0..m.experts).map(whole).collect();
    }
    let expert = full.contains(".experts.");
    let renamed = [
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
    ];
    vec![NewTensor::renamed(
        renamed
            .iter()
            .filter(|_| expert)
            .fold(full.clone(), |full, (old, new)| full.replace(old, new)),
    )]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn names(list: Vec<NewTensor>) -> Vec<String> {
        list.into_iter().map(|t| t.name).collect()
    }

    #[test]
    fn every_layout_reaches_canonical_names() {
        let c = json!({"architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 4});
        let c = DecoderConfig::from_json(&c).unwrap();
        assert_eq!(
            names(gpt2("h.0.mlp.c_fc.weight", &c)),
            ["model.layers.0.mlp.up_proj.weight"]
        );
        let qkv = gpt2("transformer.h.0.attn.c_attn.bias", &c);
        assert_eq!(
            qkv[1].steps,
            [Transform::Slice {
                dim: 0,
                start: 8,
                len: 8
            }]
        );
        assert_eq!(qkv[2].name, "model.layers.0.self_attn.v_proj.bias");
        assert!(gpt2("h.0.attn.bias", &c).is_empty());
        assert_eq!(
            names(opt("model.decoder.layers.3.final_layer_norm.bias")),
            ["model.layers.3.post_attention_layernorm.bias"]
        );
        assert_eq!(
            names(opt("model.decoder.final_layer_norm.weight")),
            ["model.norm.weight"]
        );
        let c = json!({"architectures": ["MixtralForCausalLM"], "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
                       "num_hidden_layers": 1, "intermediate_size": 6, "vocab_size": 4, "num_local_experts": 2});
        let c = DecoderConfig::from_json(&c).unwrap();
        assert_eq!(
            names(llama(
                "model.layers.0.block_sparse_moe.experts.1.w3.weight",
                &c
            )),
            ["model.layers.0.mlp.experts.1.up_proj.weight"]
        );
        assert_eq!(
            llama("model.layers.0.mlp.experts.gate_up_proj", &c).len(),
            4
        );
        assert_eq!(names(llama("norm.weight", &c)), ["model.norm.weight"]);
    }
}
