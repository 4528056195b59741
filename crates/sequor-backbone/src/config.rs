//! What a decoder is made of, read from a published `config.json`.
//!
//! A family is nothing but a reading of its config and a map of its tensor names
//! (`keys`): the network itself is one.

use sequor_nn::block::Placement;
use sequor_nn::ffn::Activation;
use sequor_nn::norm::NormKind;
use sequor_nn::rope::{Pairing, Rope, Scaling};
use sequor_nn::{Error, Result};
use serde_json::{Map, Value};

/// Published families that the decoder can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// GPT-2.
    Gpt2,
    /// OPT: learned positions with an offset of two, ReLU.
    Opt,
    /// Llama 1 to 3, SmolLM and the many models that share the layout.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Mixtral: Mistral with experts.
    Mixtral,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: norms on queries and keys.
    Qwen3,
    /// Qwen 3 with experts.
    Qwen3Moe,
}

/// Names of every family, as `architectures` and as `model_type`.
const FAMILIES: [(Family, &str, &str); 8] = [
    (Family::Gpt2, "GPT2LMHeadModel", "gpt2"),
    (Family::Opt, "OPTForCausalLM", "opt"),
    (Family::Llama, "LlamaForCausalLM", "llama"),
    (Family::Mistral, "MistralForCausalLM", "mistral"),
    (Family::Mixtral, "MixtralForCausalLM", "mixtral"),
    (Family::Qwen2, "Qwen2ForCausalLM", "qwen2"),
    (Family::Qwen3, "Qwen3ForCausalLM", "qwen3"),
    (Family::Qwen3Moe, "Qwen3MoeForCausalLM", "qwen3_moe"),
];

impl Family {
    /// The name used in `architectures`.
    pub fn architecture(self) -> &'static str {
        FAMILIES
            .iter()
            .find(|(f, ..)| *f == self)
            .map_or("", |(_, a, _)| a)
    }
}

/// How rows learn their place in the sequence.
#[derive(Clone, Debug)]
pub enum PositionKind {
    /// Rotation of queries and keys.
    Rotary(Rope),
    /// A table of vectors added to the token embeddings; position `p` reads row `p + offset`.
    Learned {
        /// Rows of the table.
        rows: i64,
        /// Rows that precede position 0.
        offset: i64,
    },
}

/// Experts in some of the layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeConfig {
    /// Number of experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Inner width of one expert.
    pub hidden: i64,
    /// Make the chosen weights sum to one.
    pub renormalise: bool,
    /// Which layers have experts.
    pub layers: Vec<bool>,
}

/// A decoder-only transformer.
#[derive(Clone, Debug)]
pub struct DecoderConfig {
    /// The published family.
    pub family: Family,
    /// Number of token ids.
    pub vocab_size: i64,
    /// Width of the rows.
    pub dim: i64,
    /// Width of the token embeddings, where it differs (OPT-350m).
    pub embed_dim: i64,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: i64,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Channels per head.
    pub head_dim: i64,
    /// Inner width of the feed-forward part.
    pub hidden: i64,
    /// Longest sequence.
    pub context: usize,
    /// Positions.
    pub positions: PositionKind,
    /// Which norm.
    pub norm: NormKind,
    /// Its epsilon.
    pub eps: f64,
    /// Where norms stand.
    pub placement: Placement,
    /// Is there a norm after the last block?
    pub final_norm: bool,
    /// The non-linearity.
    pub activation: Activation,
    /// Gated feed-forward part.
    pub gated: bool,
    /// Biases on query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of attention.
    pub out_bias: bool,
    /// Biases in the feed-forward part.
    pub mlp_bias: bool,
    /// RMS norms on queries and keys.
    pub qk_norm: bool,
    /// Divide layer `i`'s scores by `i + 1` as well (an option of GPT-2).
    pub scale_by_layer: bool,
    /// Scale scores by `1/sqrt(head_dim)`.
    pub scale_scores: bool,
    /// Sliding window of each layer.
    pub windows: Vec<Option<i64>>,
    /// Experts.
    pub moe: Option<MoeConfig>,
    /// The head is the transposed token embedding.
    pub tied: bool,
    /// Standard deviation of initial weights.
    pub init_std: f64,
    /// Probability of dropping entries of residual updates in training.
    pub dropout: f64,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Id that begins a text.
    pub bos: Option<u32>,
}

/// Reads fields and says which one is wrong.
struct Reader<'a>(&'a Map<String, Value>);

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn int(&self, key: &str, max: i64) -> Result<Option<i64>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        match v.as_i64() {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(Error::Config(format!(
                "{key} must be a whole number from 1 to {max}, not {v}"
            ))),
        }
    }

    fn need(&self, key: &str, max: i64) -> Result<i64> {
        self.int(key, max)?
            .ok_or_else(|| Error::Config(format!("{key} is missing")))
    }

    fn float(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => match v.as_f64() {
                Some(x) if x.is_finite() => Ok(x),
                _ => Err(Error::Config(format!("{key} must be a number, not {v}"))),
            },
        }
    }

    fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let x = self.float(key, default)?;
        if x > 0.0 {
            Ok(x)
        } else {
            Err(Error::Config(format!("{key} must be positive, not {x}")))
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_bool()
                .ok_or_else(|| Error::Config(format!("{key} must be true or false, not {v}"))),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// One id or a list of ids.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| {
            let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| Error::Config(format!("{key} must be token ids, not {v}")))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(v) => Ok(vec![one(v)?]),
        }
    }

    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let list = self
            .get(key)
            .and_then(Value::as_array)
            .ok_or_else(|| Error::Config(format!("{key} must be a list of numbers")))?;
        list.iter()
            .map(|v| {
                v.as_f64()
                    .ok_or_else(|| Error::Config(format!("{key} must hold numbers, not {v}")))
            })
            .collect()
    }
}

/// Largest sizes that are read as meant. Beyond them a file is damaged or hostile.
mod limit {
    pub const WIDTH: i64 = 1 << 20;
    pub const LAYERS: i64 = 4096;
    pub const VOCAB: i64 = 1 << 24;
    pub const CONTEXT: i64 = 1 << 27;
}

impl DecoderConfig {
    /// Reads a published config.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture that is not a decoder of a known family;
    /// [`Error::Config`] naming the field that is missing or out of range.
    pub fn from_json(json: &Value) -> Result<Self> {
        let map = json
            .as_object()
            .ok_or_else(|| Error::Config("the config is not a JSON object".into()))?;
        let r = Reader(map);
        let family = family(&r)?;
        let mut c = match family {
            Family::Gpt2 => gpt2(&r)?,
            Family::Opt => opt(&r)?,
            _ => llama(&r, family)?,
        };
        c.eos = r.ids("eos_token_id")?;
        c.bos = r.ids("bos_token_id")?.first().copied();
        c.init_std = r.positive("initializer_range", 0.02)?;
        Ok(c)
    }
}

fn family(r: &Reader<'_>) -> Result<Family> {
    let architecture = r
        .get("architectures")
        .and_then(|v| v.get(0))
        .and_then(Value::as_str);
    let model_type = r.text("model_type");
    let by_architecture =
        architecture.and_then(|a| FAMILIES.iter().find(|(_, name, _)| *name == a));
    let by_type = model_type
        .filter(|_| architecture.is_none())
        .and_then(|t| FAMILIES.iter().find(|(.., name)| *name == t));
    by_architecture
        .or(by_type)
        .map(|(f, ..)| *f)
        .ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|(_, a, _)| *a).collect();
            let found = architecture
                .or(model_type)
                .unwrap_or("no architectures and no model_type");
            Error::Unsupported(format!(
                "architecture '{found}' (known decoders: {})",
                known.join(", ")
            ))
        })
}

fn divide(dim: i64, heads: i64) -> Result<i64> {
    if dim % heads == 0 {
        Ok(dim / heads)
    } else {
        Err(Error::Config(format!(
            "a width of {dim} does not divide into {heads} heads"
        )))
    }
}

fn gpt2(r: &Reader<'_>) -> Result<DecoderConfig> {
    let dim = r.need("n_embd", limit::WIDTH)?;
    let heads = r.need("n_head", limit::WIDTH)?;
    let layers = r.need("n_layer", limit::LAYERS)?;
    let rows = r
        .int("n_positions", limit::CONTEXT)?
        .or(r.int("n_ctx", limit::CONTEXT)?)
        .unwrap_or(1024);
    Ok(DecoderConfig {
        family: Family::Gpt2,
        vocab_size: r.need("vocab_size", limit::VOCAB)?,
        dim,
        embed_dim: dim,
        layers: layers as usize,
        heads,
        kv_heads: heads,
        head_dim: divide(dim, heads)?,
        hidden: r.int("n_inner", limit::WIDTH)?.unwrap_or(4 * dim),
        context: rows as usize,
        positions: PositionKind::Learned { rows, offset: 0 },
        norm: NormKind::Layer,
        eps: r.positive("layer_norm_epsilon", 1e-5)?,
        placement: Placement::Pre,
        final_norm: true,
        activation: Activation::parse(r.text("activation_function").unwrap_or("gelu_new"))?,
        gated: false,
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        qk_norm: false,
        scale_by_layer: r.flag("scale_attn_by_inverse_layer_idx", false)?,
        scale_scores: r.flag("scale_attn_weights", true)?,
        windows: vec![None; layers as usize],
        moe: None,
        tied: r.flag("tie_word_embeddings", true)?,
        init_std: 0.02,
        dropout: r.float("resid_pdrop", 0.1)?,
        eos: Vec::new(),
        bos: None,
    })
}

fn opt(r: &Reader<'_>) -> Result<DecoderConfig> {
    let dim = r.need("hidden_size", limit::WIDTH)?;
    let heads = r.need("num_attention_heads", limit::WIDTH)?;
    let layers = r.need("num_hidden_layers", limit::LAYERS)?;
    let context = r
        .int("max_position_embeddings", limit::CONTEXT)?
        .unwrap_or(2048);
    let pre = r.flag("do_layer_norm_before", true)?;
    let bias = r.flag("enable_bias", true)?;
    if !r.flag("layer_norm_elementwise_affine", true)? {
        return Err(Error::Unsupported(
            "OPT without scales in its norms (layer_norm_elementwise_affine = false)".into(),
        ));
    }
    Ok(DecoderConfig {
        family: Family::Opt,
        vocab_size: r.need("vocab_size", limit::VOCAB)?,
        dim,
        embed_dim: r.int("word_embed_proj_dim", limit::WIDTH)?.unwrap_or(dim),
        layers: layers as usize,
        heads,
        kv_heads: heads,
        head_dim: divide(dim, heads)?,
        hidden: r.need("ffn_dim", limit::WIDTH)?,
        context: context as usize,
        positions: PositionKind::Learned {
            rows: context + 2,
            offset: 2,
        },
        norm: NormKind::Layer,
        eps: 1e-5,
        placement: if pre { Placement::Pre } else { Placement::Post },
        final_norm: pre && !r.flag("_remove_final_layer_norm", false)?,
        activation: Activation::parse(r.text("activation_function").unwrap_or("relu"))?,
        gated: false,
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias: bias,
        qk_norm: false,
        scale_by_layer: false,
        scale_scores: true,
        windows: vec![None; layers as usize],
        moe: None,
        tied: r.flag("tie_word_embeddings", true)?,
        init_std: 0.02,
        dropout: r.float("dropout", 0.1)?,
        eos: Vec::new(),
        bos: None,
    })
}

fn llama(r: &Reader<'_>, family: Family) -> Result<DecoderConfig> {
    use Family::{Mistral, Mixtral, Qwen2, Qwen3, Qwen3Moe};
    let dim = r.need("hidden_size", limit::WIDTH)?;
    let heads = r.need("num_attention_heads", limit::WIDTH)?;
    let layers = r.need("num_hidden_layers", limit::LAYERS)? as usize;
    let kv_default = if matches!(family, Mistral | Mixtral) {
        8
    } else {
        heads
    };
    let head_dim = match r.int("head_dim", limit::WIDTH)? {
        Some(d) => d,
        None if family == Qwen3 => 128,
        None => divide(dim, heads)?,
    };
    let context = r
        .int("max_position_embeddings", limit::CONTEXT)?
        .unwrap_or(2048);
    let attention_bias = r.flag("attention_bias", false)?;
    let hidden = r.need("intermediate_size", limit::WIDTH)?;
    let moe = match family {
        Mixtral => Some(MoeConfig {
            experts: r.int("num_local_experts", 4096)?.unwrap_or(8) as usize,
            top_k: r.int("num_experts_per_tok", 4096)?.unwrap_or(2) as usize,
            hidden,
            renormalise: true,
            layers: vec![true; layers],
        }),
        Qwen3Moe => {
            let experts = r
                .int("num_experts", 4096)?
                .or(r.int("num_local_experts", 4096)?)
                .unwrap_or(128) as usize;
            let step = r.int("decoder_sparse_step", limit::LAYERS)?.unwrap_or(1) as usize;
            let dense = r.ids("mlp_only_layers")?;
            Some(MoeConfig {
                experts,
                top_k: r.int("num_experts_per_tok", 4096)?.unwrap_or(8) as usize,
                hidden: r.int("moe_intermediate_size", limit::WIDTH)?.unwrap_or(768),
                renormalise: r.flag("norm_topk_prob", false)?,
                layers: (0..layers)
                    .map(|i| (i + 1) % step == 0 && !dense.contains(&(i as u32)))
                    .collect(),
            })
        }
        _ => None,
    };
    let theta_default = if family == Mixtral { 1e6 } else { 1e4 };
    Ok(DecoderConfig {
        family,
        vocab_size: r.need("vocab_size", limit::VOCAB)?,
        dim,
        embed_dim: dim,
        layers,
        heads,
        kv_heads: r
            .int("num_key_value_heads", limit::WIDTH)?
            .unwrap_or(kv_default),
        head_dim,
        hidden,
        context: context as usize,
        positions: PositionKind::Rotary(rope(r, head_dim, theta_default, context)?),
        norm: NormKind::Rms,
        eps: r.positive("rms_norm_eps", if family == Mixtral { 1e-5 } else { 1e-6 })?,
        placement: Placement::Pre,
        final_norm: true,
        activation: Activation::parse(r.text("hidden_act").unwrap_or("silu"))?,
        gated: true,
        qkv_bias: attention_bias || family == Qwen2,
        out_bias: attention_bias && family != Qwen2,
        mlp_bias: r.flag("mlp_bias", false)?,
        qk_norm: matches!(family, Qwen3 | Qwen3Moe),
        scale_by_layer: false,
        scale_scores: true,
        windows: windows(r, family, layers)?,
        moe,
        tied: r.flag("tie_word_embeddings", false)?,
        init_std: 0.02,
        dropout: r.float("dropout", 0.0)?,
        eos: Vec::new(),
        bos: None,
    })
}

/// The sliding window of each layer.
fn windows(r: &Reader<'_>, family: Family, layers: usize) -> Result<Vec<Option<i64>>> {
    let size = match family {
        // Absent means the publisher's default, an explicit null means none.
        Family::Mistral if !r.0.contains_key("sliding_window") => Some(4096),
        Family::Mistral | Family::Mixtral => r.int("sliding_window", limit::CONTEXT)?,
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe
            if r.flag("use_sliding_window", false)? =>
        {
            Some(r.int("sliding_window", limit::CONTEXT)?.unwrap_or(4096))
        }
        _ => None,
    };
    if let Some(types) = r
        .get("layer_types")
        .and_then(Value::as_array)
        .filter(|_| family != Family::Llama)
    {
        if types.len() != layers {
            return Err(Error::Config(format!(
                "layer_types lists {} layers of {layers}",
                types.len()
            )));
        }
        let one = |v: &Value| match v.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => match r.int("sliding_window", limit::CONTEXT)? {
                Some(w) => Ok(Some(w)),
                None => Err(Error::Config(
                    "layer_types has sliding_attention but sliding_window is missing".into(),
                )),
            },
            _ => Err(Error::Unsupported(format!(
                "layer type {v} (known: full_attention, sliding_attention)"
            ))),
        };
        return types.iter().map(one).collect();
    }
    let from = match family {
        Family::Qwen2 | Family::Qwen3 => r
            .get("max_window_layers")
            .and_then(Value::as_u64)
            .unwrap_or(28) as usize,
        _ => 0,
    };
    Ok((0..layers).map(|i| size.filter(|_| i >= from)).collect())
}

/// Reads rotary options, nested (`rope_parameters`) or in the older split form
/// (`rope_theta` and `rope_scaling`).
fn rope(r: &Reader<'_>, head_dim: i64, theta_default: f64, context: i64) -> Result<Rope> {
    let empty = Map::new();
    let object = |key: &str| r.get(key).and_then(Value::as_object);
    let nested = Reader(
        object("rope_parameters")
            .or(object("rope_scaling"))
            .unwrap_or(&empty),
    );
    let theta = nested.positive("rope_theta", r.positive("rope_theta", theta_default)?)?;
    let partial = nested.positive(
        "partial_rotary_factor",
        r.positive("partial_rotary_factor", 1.0)?,
    )?;
    let dim = (head_dim as f64 * partial) as usize;
    let kind = nested
        .text("rope_type")
        .or(nested.text("type"))
        .unwrap_or("default");
    let context = context as f64;
    // Where the trained context is told: inside, beside, or not at all.
    let original_given = match nested.float("original_max_position_embeddings", 0.0)? {
        0.0 => r.float("original_max_position_embeddings", 0.0)?,
        x => x,
    };
    let original = if original_given > 0.0 {
        original_given
    } else {
        context
    };
    let factor = |default: Option<f64>| match (nested.get("factor"), default) {
        (None, None) => Err(Error::Config(format!(
            "rope scaling '{kind}' needs a factor"
        ))),
        (None, Some(d)) => Ok(d),
        _ => nested.positive("factor", 1.0),
    };
    let attention_factor = |default: f64| nested.positive("attention_factor", default);
    let scaling = match kind {
        "default" => Scaling::None,
        "linear" => Scaling::Linear {
            factor: factor(None)?,
        },
        "dynamic" => Scaling::Dynamic {
            factor: factor(None)?,
            original,
        },
        "llama3" => Scaling::Llama3 {
            factor: factor(None)?,
            low: nested.positive("low_freq_factor", 1.0)?,
            high: nested.positive("high_freq_factor", 4.0)?,
            original: if original_given > 0.0 {
                original_given
            } else {
                8192.0
            },
        },
        "yarn" => {
            let factor = factor(Some(context / original))?;
            let magnitude = |m: f64| {
                if factor > 1.0 {
                    0.1 * m * factor.ln() + 1.0
                } else {
                    1.0
                }
            };
            let (m, all) = (
                nested.float("mscale", 0.0)?,
                nested.float("mscale_all_dim", 0.0)?,
            );
            let default = if m != 0.0 && all != 0.0 {
                magnitude(m) / magnitude(all)
            } else {
                magnitude(1.0)
            };
            Scaling::Yarn {
                factor,
                original,
                beta_fast: nested.positive("beta_fast", 32.0)?,
                beta_slow: nested.positive("beta_slow", 1.0)?,
                truncate: nested.flag("truncate", true)?,
                attention_factor: attention_factor(default)?,
            }
        }
        "longrope" | "su" => {
            let factor = factor(Some(context / original))?;
            let default = if factor <= 1.0 {
                1.0
            } else {
                (1.0 + factor.ln() / original.ln()).sqrt()
            };
            Scaling::LongRope {
                short: nested.numbers("short_factor")?,
                long: nested.numbers("long_factor")?,
                original,
                attention_factor: attention_factor(default)?,
            }
        }
        _ => {
            let known = "default, linear, dynamic, llama3, yarn, longrope";
            return Err(Error::Unsupported(format!(
                "rope scaling '{kind}' (known: {known})"
            )));
        }
    };
    Rope::new(dim, theta, Pairing::Halves, scaling)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
               "intermediate_size": 128, "vocab_size": 256})
    }

    fn with(changes: Value) -> Result<DecoderConfig> {
        let mut c = base();
        for (k, v) in changes.as_object().unwrap() {
            c[k] = v.clone();
        }
        DecoderConfig::from_json(&c)
    }

    #[test]
    fn publisher_defaults_apply() {
        let c = with(json!({})).unwrap();
        assert_eq!(
            (c.kv_heads, c.head_dim, c.tied, c.eps),
            (4, 16, false, 1e-6)
        );
        let c = with(json!({"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}))
            .unwrap();
        assert_eq!(c.windows, [Some(4096); 3]);
        let c =
            with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null})).unwrap();
        assert_eq!(c.windows, [None; 3]);
        let c = with(json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2})).unwrap();
        assert_eq!(c.windows, [None, None, Some(8)]);
        assert!(c.qkv_bias && !c.out_bias);
        let c = with(json!({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2, "mlp_only_layers": [1], "num_experts": 4, "eos_token_id": [5, 6]})).unwrap();
        assert_eq!(c.moe.unwrap().layers, [false, false, false]);
        assert_eq!(c.eos, [5, 6]);
    }

    #[test]
    fn both_forms_of_rope_options_are_read() {
        let old =
            with(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}))
                .unwrap();
        let new = with(
            json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}),
        )
        .unwrap();
        let f = |c: DecoderConfig| match c.positions {
            PositionKind::Rotary(r) => r.frequencies(1.0),
            PositionKind::Learned { .. } => Vec::new(),
        };
        assert_eq!(f(old), f(new));
    }

    #[test]
    fn wrong_fields_are_named() {
        let message = |v| with(v).unwrap_err().to_string();
        assert!(message(json!({"hidden_size": null})).contains("hidden_size is missing"));
        assert!(message(json!({"hidden_size": -3})).contains("hidden_size"));
        assert!(message(json!({"num_hidden_layers": 1e12})).contains("num_hidden_layers"));
        assert!(message(json!({"architectures": ["FooForCausalLM"]})).contains("FooForCausalLM"));
        assert!(message(json!({"hidden_size": 65})).contains("does not divide"));
        assert!(message(json!({"rope_scaling": {"type": "spiral"}})).contains("spiral"));
        assert!(
            message(
                json!({"layer_types": ["full_attention"], "architectures": ["Qwen2ForCausalLM"]})
            )
            .contains("layer_types")
        );
        assert!(DecoderConfig::from_json(&json!([])).is_err());
    }
}
