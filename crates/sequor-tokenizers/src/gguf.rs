//! Vocabularies as GGUF files keep them (`tokenizer.ggml.*`).

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use crate::definition::{AddedToken, Definition, surround};
use crate::load::MAX_ID;
use crate::pieces::byte_token;
use crate::split::Split;
use crate::{Error, Result, Tokenizer};

/// The marker that SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";
/// Longest token, in bytes, that SentencePiece merges are derived for. Its
/// trainer stops at 16 characters unless told otherwise.
const MAX_MERGED_BYTES: usize = 256;

/// The vocabulary of a GGUF file, field by field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama`
    /// (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: the name of the word split, for `gpt2`; see
    /// [`Split`].
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`; the index is the id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: log-probabilities or negative ranks, for
    /// `llama`.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control,
    /// 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`: pairs with a space between, first merge first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; absent: as the kind of vocabulary has it.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; absent: no.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`, for `llama`; absent: yes.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// Token types of GGUF.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl GgufVocab {
    /// The same vocabulary as a `tokenizer.json`.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        self.check()?;
        match self.model.as_str() {
            "gpt2" => self.byte_level(),
            "llama" => self.sentence_piece(),
            other => Err(Error::Unsupported(format!(
                "tokenizer.ggml.model {other:?}; \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE) are"
            ))),
        }
    }

    /// The fields that a GGUF file needs to describe a byte-level BPE tokenizer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for tokenizers of another kind, or whose word split has no name
    /// among those of [`Split`].
    pub fn from_tokenizer(tokenizer: &Tokenizer) -> Result<Self> {
        let unsupported = |what: &str| {
            Error::Unsupported(format!(
                "{what}, which cannot be written into a GGUF file; write safetensors instead"
            ))
        };
        let json: Value = serde_json::from_slice(&tokenizer.to_json_bytes()?)
            .map_err(|e| Error::Config(format!("the tokenizer is not valid JSON: {e}")))?;
        let model = &json["model"];
        if model["type"] != "BPE" || model["byte_fallback"] == true {
            return Err(unsupported("this tokenizer is not byte-level BPE"));
        }
        let split = Split::of(&json["pre_tokenizer"])
            .filter(|s| {
                s.normalizer() == json["normalizer"]
                    && s.ignores_merges() == (model["ignore_merges"] == true)
            })
            .ok_or_else(|| unsupported("this tokenizer splits words in a way of its own"))?;
        let count = tokenizer.vocab_size() as u32;
        // Ids without a token are there to fill the table of embeddings.
        let token = |id| tokenizer.id_to_token(id);
        let names = (0..count).map(|id| token(id).unwrap_or_else(|| format!("[PAD{id}]")));
        let mut types: Vec<i32> = (0..count)
            .map(|id| if token(id).is_some() { 1 } else { 5 })
            .collect();
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let id = added["id"]
                .as_u64()
                .and_then(|id| types.get_mut(id as usize));
            if let Some(kind) = id {
                *kind = if added["special"] == true { 3 } else { 4 };
            }
        }
        let merge = |m: &Value| match m {
            Value::String(pair) => Some(pair.clone()),
            pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
        };
        let merges = model["merges"].as_array().into_iter().flatten();
        let merges = merges.map(merge).collect::<Option<_>>();
        let ends = tokenizer.encode("a", true)?;
        Ok(Self {
            model: "gpt2".to_owned(),
            pre: Some(split.gguf_name().to_owned()),
            tokens: names.collect(),
            scores: None,
            token_types: Some(types),
            merges: merges.ok_or_else(|| Error::Config("a merge is not a pair".to_owned()))?,
            bos: tokenizer.bos(),
            eos: tokenizer.eos(),
            unk: tokenizer.unk(),
            pad: tokenizer.pad(),
            add_bos: Some(tokenizer.bos().is_some() && ends.first().copied() == tokenizer.bos()),
            add_eos: Some(tokenizer.eos().is_some() && ends.last().copied() == tokenizer.eos()),
            add_space_prefix: None,
            chat_template: tokenizer.chat_template().map(|t| t.source().to_owned()),
        })
    }

    fn check(&self) -> Result<()> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(Error::Config("tokenizer.ggml.tokens is empty".to_owned()));
        }
        if count > MAX_ID as usize {
            return Err(Error::Limits(format!(
                "tokenizer.ggml.tokens has {count} entries; {MAX_ID} are allowed"
            )));
        }
        let lengths = [
            ("scores", self.scores.as_ref().map(Vec::len)),
            ("token_type", self.token_types.as_ref().map(Vec::len)),
        ];
        for (key, length) in lengths {
            if let Some(length) = length.filter(|&n| n != count) {
                return Err(Error::Config(format!(
                    "tokenizer.ggml.{key} has {length} entries for {count} tokens"
                )));
            }
        }
        for (key, id) in [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unk),
            ("padding", self.pad),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(Error::Config(format!(
                    "tokenizer.ggml.{key}_token_id is {id}; there are {count} tokens"
                )));
            }
        }
        let mut seen = HashMap::with_capacity(count);
        for (token, id) in self.tokens.iter().zip(0u32..) {
            if let Some(first) = seen.insert(token.as_str(), id) {
                return Err(Error::Config(format!(
                    "tokenizer.ggml.tokens has {token:?} twice, as {first} and {id}"
                )));
            }
        }
        Ok(())
    }

    fn byte_level(&self) -> Result<Vec<u8>> {
        let name = self.pre.as_deref().unwrap_or("default");
        let split = Split::from_gguf_name(name).unwrap_or_else(|| {
            tracing::warn!(
                "unknown word split {name:?} in tokenizer.ggml.pre: text is split as for GPT-2"
            );
            Split::Gpt2
        });
        let mut definition = self.definition(split.starts_with_bos());
        definition.normalizer = split.normalizer();
        definition.pre_tokenizer = split.pre_tokenizer();
        definition.decoder = crate::definition::byte_level(true);
        definition.model.ignore_merges = split.ignores_merges();
        definition.model.merges = self.listed_merges()?;
        definition.to_json()
    }

    /// The merges as pairs, each checked against the vocabulary.
    fn listed_merges(&self) -> Result<Vec<(&str, &str)>> {
        let known: HashMap<&str, u32> = self.ids();
        let mut whole = String::new();
        let pair = |(rank, merge): (usize, &'_ String)| -> Result<()> {
            let (left, right) = split_merge(merge).ok_or_else(|| {
                Error::Config(format!(
                    "tokenizer.ggml.merges[{rank}] is {merge:?}, not a pair"
                ))
            })?;
            whole.clear();
            whole.push_str(left);
            whole.push_str(right);
            match [left, right, &whole]
                .into_iter()
                .find(|t| !known.contains_key(t))
            {
                Some(missing) => Err(Error::Config(format!(
                    "tokenizer.ggml.merges[{rank}] is {merge:?}, but {missing:?} is not a token"
                ))),
                None => Ok(()),
            }
        };
        self.merges.iter().enumerate().try_for_each(pair)?;
        Ok(self.merges.iter().filter_map(|m| split_merge(m)).collect())
    }

    fn sentence_piece(&self) -> Result<Vec<u8>> {
        let scores = self.scores.as_deref().ok_or_else(|| {
            Error::Config(
                "a \"llama\" vocabulary needs tokenizer.ggml.scores, which the file does not have"
                    .to_owned(),
            )
        })?;
        let prefix = self.add_space_prefix.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", SPACE)];
        let mut decoders = vec![
            replace(SPACE, " "),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let mut definition = self.definition(true);
        definition.normalizer = json!({"type": "Sequence", "normalizers": normalizers});
        definition.decoder = json!({"type": "Sequence", "decoders": decoders});
        definition.model.byte_fallback = self.tokens.iter().any(|t| byte_token(t).is_some());
        definition.model.fuse_unk = true;
        definition.model.unk_token = self
            .unk
            .and_then(|id| self.tokens.get(id as usize))
            .map(String::as_str);
        definition.model.merges = self.derived_merges(scores);
        definition.to_json()
    }

    /// Merges that act as SentencePiece does, which joins the neighbours whose
    /// joint token has the best score: every way to cut a token into two, best
    /// token first.
    fn derived_merges(&self, scores: &[f32]) -> Vec<(&str, &str)> {
        let mergeable: HashMap<&str, u32> = self
            .ids()
            .into_iter()
            .filter(|&(token, id)| self.is_merged(token, id))
            .collect();
        // Keys order by falling score, then by id, then by where the cut is.
        let mut merges = BTreeMap::new();
        for (&token, &id) in &mergeable {
            let score = scores
                .get(id as usize)
                .copied()
                .unwrap_or(f32::NEG_INFINITY);
            if token.len() > MAX_MERGED_BYTES {
                continue;
            }
            for (cut, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(cut);
                if mergeable.contains_key(left) && mergeable.contains_key(right) {
                    merges.insert((falling(score), id, cut), (left, right));
                }
            }
        }
        merges.into_values().collect()
    }

    /// What both kinds share: the tokens, the special ones among them, and
    /// what goes at the ends of a text.
    fn definition(&self, bos_by_default: bool) -> Definition<'_> {
        let mut definition = Definition::new(&self.tokens);
        for (token, id) in self.tokens.iter().zip(0u32..) {
            let kind = self.kind(id);
            let matched = match kind {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => !self.is_merged(token, id),
                Kind::Normal | Kind::Unused | Kind::Byte => false,
            };
            if matched && !token.is_empty() {
                definition
                    .added_tokens
                    .push(AddedToken::new(id, token, kind != Kind::UserDefined));
            }
        }
        let end = |wanted: bool, id: Option<u32>| {
            let id = id.filter(|_| wanted)?;
            Some((self.tokens.get(id as usize)?.as_str(), id))
        };
        definition.post_processor = surround(
            end(self.add_bos.unwrap_or(bos_by_default), self.bos),
            end(self.add_eos.unwrap_or(false), self.eos),
        );
        definition
    }

    fn ids(&self) -> HashMap<&str, u32> {
        self.tokens.iter().map(String::as_str).zip(0u32..).collect()
    }

    /// Whether SentencePiece merging can arrive at a token. User-defined runs of
    /// space markers are among them: they cannot be found in the text itself,
    /// where spaces are still spaces.
    fn is_merged(&self, token: &str, id: u32) -> bool {
        match self.kind(id) {
            Kind::Normal => true,
            Kind::UserDefined => self.model == "llama" && token.contains(SPACE),
            Kind::Unknown | Kind::Control | Kind::Unused | Kind::Byte => false,
        }
    }

    /// The type of a token, guessed where the file does not say.
    fn kind(&self, id: u32) -> Kind {
        let stated = self
            .token_types
            .as_ref()
            .and_then(|types| types.get(id as usize));
        match stated {
            Some(2) => Kind::Unknown,
            Some(3) => Kind::Control,
            Some(4) => Kind::UserDefined,
            Some(5) => Kind::Unused,
            Some(6) => Kind::Byte,
            Some(_) => Kind::Normal,
            None if self.unk == Some(id) => Kind::Unknown,
            None if [self.bos, self.eos, self.pad].contains(&Some(id)) => Kind::Control,
            None if self
                .tokens
                .get(id as usize)
                .is_some_and(|t| byte_token(t).is_some()) =>
            {
                Kind::Byte
            }
            None => Kind::Normal,
        }
    }
}

/// The two halves of a merge. The first may begin with a space, which is then
/// not the one between them.
fn split_merge(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let space = first + merge.get(first..)?.find(' ')?;
    let (left, right) = (merge.get(..space)?, merge.get(space + 1..)?);
    (!right.is_empty()).then_some((left, right))
}

/// A key that sorts scores from the best to the worst; no score is the worst.
fn falling(score: f32) -> u32 {
    let score = if score.is_nan() {
        f32::NEG_INFINITY
    } else {
        score
    };
    let bits = score.to_bits();
    // Flipping makes the bit patterns of floats sort as the numbers do.
    let rising = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    !rising
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_sort_from_best_to_worst() {
        let mut scores = [-3.0, 1.5, f32::NAN, 0.0, -0.5, f32::INFINITY, -1e30];
        scores.sort_by_key(|&s| falling(s));
        assert_eq!(scores[..6], [f32::INFINITY, 1.5, 0.0, -0.5, -3.0, -1e30]);
        assert!(scores[6].is_nan());
    }

    #[test]
    fn merges_split_at_the_space_between() {
        assert_eq!(split_merge("a b"), Some(("a", "b")));
        assert_eq!(split_merge("  b"), Some((" ", "b")));
        for bad in ["", "a", "a ", "ab", " "] {
            assert_eq!(split_merge(bad), None, "{bad:?}");
        }
    }
}
