//! The tokenizer that a GGUF file carries, as plain fields.

use super::{Gguf, GgufArray, GgufValue};
use crate::error::{Error, Result};
use crate::weights::TensorSource;

/// The `tokenizer.*` metadata of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct GgufTokenizerFields {
    /// Kind of tokenizer: `gpt2` (byte-level BPE), `llama` (SentencePiece), ...
    pub model: String,
    /// Name of the pre-tokenization rule, e.g. `smollm`.
    pub pre: Option<String>,
    /// Token texts by id.
    pub tokens: Vec<String>,
    /// Score by id (SentencePiece).
    pub scores: Option<Vec<f32>>,
    /// Type by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused,
    /// 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// Merge rules, `"left right"`, best first; empty when there are none.
    pub merges: Vec<String>,
    /// Id of the beginning-of-sequence token.
    pub bos: Option<u32>,
    /// Id of the end-of-sequence token.
    pub eos: Option<u32>,
    /// Id of the unknown token.
    pub unk: Option<u32>,
    /// Id of the padding token.
    pub pad: Option<u32>,
    /// Whether encoding starts with `bos`.
    pub add_bos: Option<bool>,
    /// Whether encoding ends with `eos`.
    pub add_eos: Option<bool>,
    /// Whether a space is put before the text.
    pub add_space_prefix: Option<bool>,
    /// Chat template (Jinja).
    pub chat_template: Option<String>,
}

impl Gguf {
    /// The tokenizer in this file, or `None` when it carries none.
    ///
    /// # Errors
    /// A field has the wrong type, a list has not one entry per token, or a
    /// special id is not a token.
    pub fn vocab_fields(&self) -> Result<Option<GgufTokenizerFields>> {
        let fields = Fields { gguf: self };
        let Some(model) = fields.text("tokenizer.ggml.model")? else {
            return Ok(None);
        };
        let Some(tokens) = fields.texts("tokenizer.ggml.tokens")? else {
            return Ok(None);
        };
        let n = tokens.len();
        Ok(Some(GgufTokenizerFields {
            model,
            pre: fields.text("tokenizer.ggml.pre")?,
            scores: fields.scores("tokenizer.ggml.scores", n)?,
            token_types: fields.types("tokenizer.ggml.token_type", n)?,
            merges: fields.texts("tokenizer.ggml.merges")?.unwrap_or_default(),
            bos: fields.id("tokenizer.ggml.bos_token_id", n)?,
            eos: fields.id("tokenizer.ggml.eos_token_id", n)?,
            unk: fields.id("tokenizer.ggml.unknown_token_id", n)?,
            pad: fields.id("tokenizer.ggml.padding_token_id", n)?,
            add_bos: fields.flag("tokenizer.ggml.add_bos_token")?,
            add_eos: fields.flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: fields.flag("tokenizer.ggml.add_space_prefix")?,
            chat_template: fields.text("tokenizer.chat_template")?,
            tokens,
        }))
    }
}

/// Reads optional metadata while insisting on its type.
struct Fields<'a> {
    gguf: &'a Gguf,
}

impl Fields<'_> {
    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&GgufValue) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.gguf.value(key) else {
            return Ok(None);
        };
        read(value).map(Some).ok_or_else(|| {
            Error::weights(
                self.gguf.path(),
                format!("{key} is {value}, expected {expected}"),
            )
        })
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        self.get(key, "a text", |v| v.as_str().map(str::to_owned))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", GgufValue::as_bool)
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.get(key, "a list of texts", |v| {
            v.as_array()?.as_strings().map(<[String]>::to_vec)
        })
    }

    fn scores(&self, key: &str, n: usize) -> Result<Option<Vec<f32>>> {
        self.get(key, &format!("{n} floats"), |v| {
            v.as_array()?
                .as_f32s()
                .filter(|v| v.len() == n)
                .map(<[f32]>::to_vec)
        })
    }

    fn types(&self, key: &str, n: usize) -> Result<Option<Vec<i32>>> {
        self.get(key, &format!("{n} small integers"), |v| {
            let types = v.as_array().and_then(GgufArray::to_i64s)?;
            let types: Option<Vec<i32>> = types.into_iter().map(|t| t.try_into().ok()).collect();
            types.filter(|t| t.len() == n)
        })
    }

    fn id(&self, key: &str, n: usize) -> Result<Option<u32>> {
        self.get(key, &format!("a token id below {n}"), |v| {
            v.as_u64()
                .filter(|&id| id < n as u64)
                .and_then(|id| id.try_into().ok())
        })
    }
}
