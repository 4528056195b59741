//! A `tokenizer.json` written from parts: what the vocabularies of this crate
//! (GGUF, bytes, characters) become before they are loaded like any other.

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::{Error, Result};

/// The nine fields of a `tokenizer.json`, of which two are always null here.
#[derive(Serialize)]
pub(crate) struct Definition<'a> {
    version: &'static str,
    truncation: Value,
    padding: Value,
    pub added_tokens: Vec<AddedToken<'a>>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub post_processor: Value,
    pub decoder: Value,
    pub model: BpeModel<'a>,
}

/// A token that is found in the text before anything else happens to it.
#[derive(Serialize)]
pub(crate) struct AddedToken<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl<'a> AddedToken<'a> {
    /// A token matched as it stands; `special` ones can be left out of decoded text.
    pub fn new(id: u32, content: &'a str, special: bool) -> Self {
        Self {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special,
        }
    }
}

/// A byte-pair-encoding model.
#[derive(Serialize)]
pub(crate) struct BpeModel<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    pub unk_token: Option<&'a str>,
    pub fuse_unk: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
    #[serde(serialize_with = "vocabulary")]
    pub vocab: &'a [String],
    pub merges: Vec<(&'a str, &'a str)>,
}

fn vocabulary<S: Serializer>(tokens: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(tokens.iter().zip(0u32..))
}

impl<'a> Definition<'a> {
    /// A BPE tokenizer with `vocab` (index = id), no merges and nothing around it.
    pub fn new(vocab: &'a [String]) -> Self {
        Self {
            version: "1.0",
            truncation: Value::Null,
            padding: Value::Null,
            added_tokens: Vec::new(),
            normalizer: Value::Null,
            pre_tokenizer: Value::Null,
            post_processor: Value::Null,
            decoder: Value::Null,
            model: BpeModel {
                kind: "BPE",
                unk_token: None,
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: false,
                vocab,
                merges: Vec::new(),
            },
        }
    }

    /// The bytes of the `tokenizer.json`.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|e| Error::Config(format!("this vocabulary cannot be written as JSON: {e}")))
    }
}

/// Byte-level coding of what a pre-tokenizer left; its own splitting is optional.
pub(crate) fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// Puts `before` in front of and `after` behind the text's tokens.
pub(crate) fn surround(before: Option<(&str, u32)>, after: Option<(&str, u32)>) -> Value {
    if before.is_none() && after.is_none() {
        return Value::Null;
    }
    let special = |(text, _): (&str, u32), type_id: u32| json!({"SpecialToken": {"id": text, "type_id": type_id}});
    let part = |name: &str, type_id: u32| {
        let mut pieces: Vec<Value> = before.iter().map(|t| special(*t, type_id)).collect();
        pieces.push(json!({"Sequence": {"id": name, "type_id": type_id}}));
        pieces.extend(after.iter().map(|t| special(*t, type_id)));
        pieces
    };
    let tokens: serde_json::Map<String, Value> = before
        .iter()
        .chain(after.iter())
        .map(|(text, id)| {
            (
                (*text).to_owned(),
                json!({"id": text, "ids": [id], "tokens": [text]}),
            )
        })
        .collect();
    let mut pair = part("A", 0);
    pair.extend(part("B", 1));
    json!({"type": "TemplateProcessing", "single": part("A", 0), "pair": pair, "special_tokens": tokens})
}
