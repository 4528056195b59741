//! How text is cut into words before byte-level merging, by the names that
//! published models use for it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::definition::byte_level;

/// A published way of cutting text into words, inside which merges happen.
///
/// Every variant codes the words as bytes, so any text can be encoded and
/// decodes to itself (with [`Split::Qwen2`]: to its composed form, NFC).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Split {
    /// GPT-2: English contractions; letters, numbers and symbols apart, each
    /// with the space before it; the last space of a run goes to the next word.
    #[default]
    Gpt2,
    /// SmolLM, StarCoder: every digit alone, then as GPT-2.
    SmolLm,
    /// Llama 3: as GPT-2, but numbers in groups of up to three digits, line
    /// ends together, and one leading symbol may join the letters after it.
    Llama3,
    /// Qwen 2: as Llama 3 with every digit alone, after composing (NFC).
    Qwen2,
}

/// Llama 3's pattern; Qwen 2's differs in the count of digits.
macro_rules! llama3_pattern {
    ($digits:literal) => {
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

impl Split {
    /// The split that a GGUF file names in `tokenizer.ggml.pre`, if it is one
    /// of these.
    #[must_use]
    pub fn from_gguf_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt2" | "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "jina-es"
            | "jina-de" => Self::Gpt2,
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => Self::SmolLm,
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => Self::Llama3,
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Self::Qwen2,
            _ => return None,
        })
    }

    /// Its name in `tokenizer.ggml.pre`.
    #[must_use]
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt-2",
            Self::SmolLm => "smollm",
            Self::Llama3 => "llama-bpe",
            Self::Qwen2 => "qwen2",
        }
    }

    /// The split that the `pre_tokenizer` of a `tokenizer.json` is, if it is one of these.
    pub(crate) fn of(pre_tokenizer: &Value) -> Option<Self> {
        let all = [Self::Gpt2, Self::SmolLm, Self::Llama3, Self::Qwen2];
        let wanted = with_defaults(pre_tokenizer);
        all.into_iter()
            .find(|split| with_defaults(&split.pre_tokenizer()) == wanted)
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(crate) fn pre_tokenizer(self) -> Value {
        let sequence = |first: Value, use_regex| json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]});
        let pattern = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        match self {
            Self::Gpt2 => byte_level(true),
            Self::SmolLm => sequence(json!({"type": "Digits", "individual_digits": true}), true),
            Self::Llama3 => sequence(pattern(llama3_pattern!(r"\p{N}{1,3}")), false),
            Self::Qwen2 => sequence(pattern(llama3_pattern!(r"\p{N}")), false),
        }
    }

    /// The `normalizer` of a `tokenizer.json`.
    pub(crate) fn normalizer(self) -> Value {
        match self {
            Self::Qwen2 => json!({"type": "NFC"}),
            _ => Value::Null,
        }
    }

    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub(crate) fn ignores_merges(self) -> bool {
        self == Self::Llama3
    }

    /// Whether models with this split expect a token in front of every text
    /// when their file does not say.
    pub(crate) fn starts_with_bos(self) -> bool {
        self == Self::Llama3
    }
}

/// A `pre_tokenizer` with what files may leave out, and without what changes no token.
fn with_defaults(pre_tokenizer: &Value) -> Value {
    let mut full = pre_tokenizer.clone();
    if let Some(parts) = full.get_mut("pretokenizers").and_then(Value::as_array_mut) {
        for part in parts {
            *part = with_defaults(part);
        }
    }
    let byte_level = full["type"] == "ByteLevel";
    if let Some(fields) = full.as_object_mut() {
        fields.remove("trim_offsets");
        if byte_level {
            fields.entry("use_regex").or_insert(true.into());
        }
    }
    full.sort_all_objects();
    full
}
