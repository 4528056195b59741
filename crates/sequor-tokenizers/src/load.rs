//! From the bytes of a `tokenizer.json` to a checked vocabulary.
//!
//! A file is believed only after it has been looked at: its ids must be
//! distinct and of a sane size, added tokens must get the ids they claim, and
//! the chain of text transformations must not be able to blow text up.

use serde::Deserialize;
use serde_json::Value;

use crate::guard::guarded;
use crate::pieces::Pieces;
use crate::{Error, Result};

/// Largest `tokenizer.json` that is read: 256 MiB, ten times the largest published.
pub(crate) const MAX_BYTES: u64 = 256 << 20;
/// Ids must be below this: 16.7 million, sixty times the largest published.
pub(crate) const MAX_ID: u32 = 1 << 24;
/// Largest number of bytes that the transformations may make of one byte of text.
const MAX_GROWTH: f64 = 65_536.0;

/// A tokenizer that has passed all checks.
pub(crate) struct Core {
    pub hf: tokenizers::Tokenizer,
    pub pieces: Pieces,
    /// One more than the largest id.
    pub vocab_size: usize,
    /// The file's bytes, kept only where the engine cannot write them back.
    pub source: Option<Vec<u8>>,
}

/// The parts of a `tokenizer.json` that are checked before the engine sees it.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    model: ModelOutline,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct ModelOutline {
    #[serde(default)]
    dropout: Option<f64>,
}

/// Reads, checks and builds. `origin` names the source in errors.
pub(crate) fn load(json: &[u8], origin: &str) -> Result<Core> {
    if json.len() as u64 > MAX_BYTES {
        return Err(Error::Limits(format!(
            "{origin} has {} bytes; a tokenizer.json may have {MAX_BYTES}",
            json.len()
        )));
    }
    let text = std::str::from_utf8(json).map_err(|e| {
        Error::definition(
            origin,
            format!("not a tokenizer.json: it is not UTF-8 ({e})"),
        )
    })?;
    let outline: Outline = serde_json::from_str(text).map_err(|e| {
        Error::definition(
            origin,
            format!("not a tokenizer.json, or a damaged one: {e}"),
        )
    })?;
    check_growth(&outline, origin)?;

    let mut hf = build(json, origin)?;
    let misplaced = misplaced_tokens(&outline, &hf);
    if !misplaced.is_empty() || outline.model.dropout.is_some_and(|p| p > 0.0) {
        let repaired = repair(text, &misplaced, origin)?;
        hf = build(&repaired, origin)?;
        if let Some(token) = misplaced_tokens(&outline, &hf).first() {
            return Err(Error::definition(
                origin,
                format!(
                    "the added token {:?} cannot have the id {} that it claims",
                    token.content, token.id
                ),
            ));
        }
    }

    let (vocab_size, has_holes) = check_vocabulary(&hf, origin)?;
    // Length is the caller's business: a generator must never lose or gain
    // tokens because a training set was once cut or padded.
    hf.with_padding(None);
    guarded("remove truncation", || hf.with_truncation(None).map(|_| ()))?;
    let pieces = Pieces::from_decoder(&outline.decoder);
    Ok(Core {
        hf,
        pieces,
        vocab_size,
        source: has_holes.then(|| json.to_vec()),
    })
}

fn build(json: &[u8], origin: &str) -> Result<tokenizers::Tokenizer> {
    guarded("build", || tokenizers::Tokenizer::from_bytes(json)).map_err(|e| match e {
        Error::Backend { message, .. } => Error::definition(origin, message),
        other => other,
    })
}

/// Added tokens that the engine put elsewhere than the file says: it counts
/// ids on from the size of the vocabulary, so a gap in front of them shifts all.
fn misplaced_tokens<'a>(outline: &'a Outline, hf: &tokenizers::Tokenizer) -> Vec<&'a AddedToken> {
    outline
        .added_tokens
        .iter()
        .filter(|t| hf.token_to_id(&t.content) != Some(t.id))
        .collect()
}

/// Writes misplaced added tokens into the model's vocabulary, where ids are
/// explicit, and turns merge dropout (a training device that makes encoding
/// random) off.
fn repair(text: &str, misplaced: &[&AddedToken], origin: &str) -> Result<Vec<u8>> {
    let mut root: Value =
        serde_json::from_str(text).map_err(|e| Error::definition(origin, e.to_string()))?;
    let model = root.get_mut("model").and_then(Value::as_object_mut);
    let model = model.ok_or_else(|| Error::definition(origin, "\"model\" is not an object"))?;
    if let Some(dropout) = model.get_mut("dropout") {
        *dropout = Value::Null;
    }
    for token in misplaced {
        let vocab = model.get_mut("vocab").and_then(Value::as_object_mut);
        let free = vocab.filter(|v| !v.contains_key(&token.content));
        let Some(vocab) = free else {
            return Err(Error::definition(
                origin,
                format!(
                    "the added token {:?} claims the id {}, which is not where the vocabulary has room for it",
                    token.content, token.id
                ),
            ));
        };
        vocab.insert(token.content.clone(), token.id.into());
    }
    serde_json::to_vec(&root).map_err(|e| Error::definition(origin, e.to_string()))
}

/// One more than the largest id, and whether ids are missing below it.
fn check_vocabulary(hf: &tokenizers::Tokenizer, origin: &str) -> Result<(usize, bool)> {
    let mut tokens: Vec<(u32, String)> = hf
        .get_vocab(true)
        .into_iter()
        .map(|(t, id)| (id, t))
        .collect();
    tokens.sort_unstable();
    let Some(&(last, _)) = tokens.last() else {
        return Err(Error::definition(origin, "the vocabulary is empty"));
    };
    if last >= MAX_ID {
        return Err(Error::definition(
            origin,
            format!("the token id {last} is not below {MAX_ID}"),
        ));
    }
    for pair in tokens.windows(2) {
        if let [(a, first), (b, second)] = pair
            && a == b
        {
            return Err(Error::definition(
                origin,
                format!("the id {a} is given to two tokens, {first:?} and {second:?}"),
            ));
        }
    }
    let size = last as usize + 1;
    Ok((size, size != tokens.len()))
}

fn check_growth(outline: &Outline, origin: &str) -> Result<()> {
    let encoding = growth(&outline.normalizer) * growth(&outline.pre_tokenizer);
    let decoding = growth(&outline.decoder);
    for (what, factor) in [
        ("normalizer and pre_tokenizer", encoding),
        ("decoder", decoding),
    ] {
        if factor > MAX_GROWTH {
            return Err(Error::definition(
                origin,
                format!(
                    "its {what} could make text {factor:.0} times as long; at most {MAX_GROWTH} is allowed"
                ),
            ));
        }
    }
    Ok(())
}

/// An upper bound on bytes out per byte in of one transformation. The numbers
/// for Unicode forms round up the worst character of each.
fn growth(node: &Value) -> f64 {
    let size = |key: &str| {
        node.get(key)
            .and_then(Value::as_str)
            .map_or(0.0, |s| s.len() as f64)
    };
    match node.get("type").and_then(Value::as_str) {
        Some("Sequence") => ["normalizers", "pretokenizers", "decoders"]
            .iter()
            .filter_map(|key| node.get(key).and_then(Value::as_array))
            .flatten()
            .map(growth)
            .product(),
        Some("Replace") => match node.pointer("/pattern/String").and_then(Value::as_str) {
            Some(pattern) => (size("content") / pattern.len().max(1) as f64).max(1.0),
            None => 1.0 + size("content"),
        },
        Some("Prepend") => 1.0 + size("prepend"),
        Some("ByteLevel" | "Lowercase") => 3.0,
        Some("Metaspace") => 4.0,
        Some("BertNormalizer") => 8.0,
        Some("NFC" | "NFD" | "NFKC" | "NFKD" | "Precompiled") => 12.0,
        _ => 1.0,
    }
}
