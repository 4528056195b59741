//! Byte-level BPE training.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Trainer,
};

use crate::guard::guarded;
use crate::load::MAX_ID;
use crate::pieces::char_of_byte;
use crate::split::Split;
use crate::{Error, Result, Tokenizer};

/// Words are counted in pieces of at most this many characters (one per byte):
/// merging takes time quadratic in the length of a word, and a text without
/// spaces is one word.
const MAX_WORD_CHARS: usize = 256;
/// The engine counts pairs in 32 bits with a sign.
const MAX_TEXT_BYTES: u64 = i32::MAX as u64;

/// How [`train_bpe`] trains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BpeOptions {
    /// Tokens to end up with, special ones and the 256 bytes among them; fewer
    /// when the text has no more pairs to merge. Default 8192.
    pub vocab_size: usize,
    /// How often a pair must occur to be merged. Default 2.
    pub min_frequency: u64,
    /// Tokens that get the first ids and are never split or merged. Default
    /// `<|endoftext|>`.
    pub special_tokens: Vec<String>,
    /// The special token that begins a text, if any. Default none.
    pub bos_token: Option<String>,
    /// The special token that ends a text, if any. Default `<|endoftext|>`.
    pub eos_token: Option<String>,
    /// Longest token, in bytes; no limit if absent (the default).
    pub max_token_length: Option<usize>,
    /// How text is cut into words. Default [`Split::Gpt2`].
    pub split: Split,
}

impl Default for BpeOptions {
    fn default() -> Self {
        let end = "<|endoftext|>".to_owned();
        Self {
            vocab_size: 8192,
            min_frequency: 2,
            special_tokens: vec![end.clone()],
            bos_token: None,
            eos_token: Some(end),
            max_token_length: None,
            split: Split::default(),
        }
    }
}

impl BpeOptions {
    fn check(&self) -> Result<()> {
        let fixed = self.special_tokens.len() + 256;
        if self.vocab_size < fixed || self.vocab_size > MAX_ID as usize {
            return Err(Error::Config(format!(
                "vocab_size is {}; it must be from {fixed} (256 bytes and {} special tokens) to {MAX_ID}",
                self.vocab_size,
                self.special_tokens.len()
            )));
        }
        if let Some(length @ 0..=1) = self.max_token_length {
            return Err(Error::Config(format!(
                "max_token_length is {length}; merging begins at 2 bytes"
            )));
        }
        let bytes: BTreeSet<String> = (0..=u8::MAX).map(|b| char_of_byte(b).to_string()).collect();
        let mut seen = BTreeSet::new();
        for token in &self.special_tokens {
            if token.is_empty() || bytes.contains(token) || !seen.insert(token) {
                return Err(Error::Config(format!(
                    "special token {token:?} is empty, a single byte, or named twice; use a name such as \"<|pad|>\""
                )));
            }
        }
        for (option, token) in [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
        ] {
            if let Some(token) = token.as_ref().filter(|t| !self.special_tokens.contains(t)) {
                return Err(Error::Config(format!(
                    "{option} is {token:?}, which is not among special_tokens"
                )));
            }
        }
        Ok(())
    }
}

/// Learns a byte-level BPE vocabulary from texts.
///
/// Ids are given to the special tokens first, then to the 256 bytes, then to
/// merges in the order they were learned; of pairs that are equally frequent
/// the one with the smaller ids is merged first. The same texts and options
/// give the same vocabulary, in any number of threads.
///
/// Special tokens in the texts are not treated as such: leave them out.
///
/// # Errors
/// [`Error::Config`] for options that contradict one another, [`Error::Limits`]
/// above 2 GiB of text.
///
/// ```
/// # use sequor_tokenizers::{BpeOptions, train_bpe};
/// let texts = ["low lower lowest", "new newer newest"].map(String::from);
/// let options = BpeOptions { vocab_size: 270, ..BpeOptions::default() };
/// let tokenizer = train_bpe(texts.into_iter(), &options)?;
/// assert!(tokenizer.encode("lowest", false)?.len() < 6);
/// # Ok::<(), sequor_tokenizers::Error>(())
/// ```
pub fn train_bpe(
    texts: impl Iterator<Item = String> + Send,
    options: &BpeOptions,
) -> Result<Tokenizer> {
    options.check()?;
    let special: Vec<AddedToken> = options
        .special_tokens
        .iter()
        .map(|t| AddedToken::from(t.as_str(), true))
        .collect();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(options.vocab_size)
        .min_frequency(options.min_frequency)
        .special_tokens(special.clone())
        .initial_alphabet((0..=u8::MAX).map(char_of_byte).collect())
        // The engine's limit is the length that is already too long.
        .max_token_length(options.max_token_length.map(|n| n.saturating_add(1)))
        .build();

    let words = Words::new(options.split)?;
    let total = AtomicU64::new(0);
    guarded("count words", || {
        trainer.feed(texts, |text| {
            let before = total.fetch_add(text.len() as u64, Ordering::Relaxed);
            if before + text.len() as u64 > MAX_TEXT_BYTES {
                // Counting on would overflow; the total tells the caller why.
                return Ok(Vec::new());
            }
            words.of(text)
        })
    })?;
    let total = total.into_inner();
    if total > MAX_TEXT_BYTES {
        return Err(Error::Limits(format!(
            "{total} bytes of text to learn a vocabulary from; at most {MAX_TEXT_BYTES} are counted: pass a sample"
        )));
    }
    let mut model = BPE::default();
    guarded("learn merges", || trainer.train(&mut model))?;

    let mut hf = tokenizers::Tokenizer::new(model);
    hf.with_normalizer(words.normalizer);
    hf.with_pre_tokenizer(Some(words.splitter));
    hf.with_decoder(Some(part::<DecoderWrapper>(
        crate::definition::byte_level(true),
    )?));
    hf.add_special_tokens(&special);
    let json = guarded("write", || hf.to_string(false))?;
    let mut tokenizer = Tokenizer::from_json_bytes(json.as_bytes())?;
    if let Some(token) = &options.bos_token {
        tokenizer = tokenizer.with_bos(token)?;
    }
    if let Some(token) = &options.eos_token {
        tokenizer = tokenizer.with_eos(token)?;
    }
    Ok(tokenizer)
}

/// A text cut into byte-coded words.
struct Words {
    normalizer: Option<NormalizerWrapper>,
    splitter: PreTokenizerWrapper,
}

impl Words {
    fn new(split: Split) -> Result<Self> {
        Ok(Self {
            normalizer: part(split.normalizer())?,
            splitter: part(split.pre_tokenizer())?,
        })
    }

    fn of(&self, text: &str) -> tokenizers::Result<Vec<String>> {
        use tokenizers::Normalizer;
        let mut normalized = tokenizers::NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer {
            normalizer.normalize(&mut normalized)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        self.splitter.pre_tokenize(&mut pieces)?;
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits
            .into_iter()
            .flat_map(|(word, _, _)| chunks(word))
            .collect())
    }
}

/// Parts of a word of at most [`MAX_WORD_CHARS`] characters.
fn chunks(word: &str) -> Vec<String> {
    if word.len() <= MAX_WORD_CHARS {
        return vec![word.to_owned()];
    }
    let characters: Vec<char> = word.chars().collect();
    characters
        .chunks(MAX_WORD_CHARS)
        .map(|chunk| chunk.iter().collect())
        .collect()
}

/// A part of the engine from its description.
fn part<T: serde::de::DeserializeOwned>(description: serde_json::Value) -> Result<T> {
    guarded("build", || Ok(serde_json::from_value(description)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_every_split() {
        let text = "I'LL it's 12345  x\n\n  y...\tAb1½!?\r\n é";
        let expected: [(Split, &[&str]); 4] = [
            (
                Split::Gpt2,
                &[
                    "I", "'", "LL", "Ġit", "'s", "Ġ12345", "Ġ", "Ġx", "ĊĊĠ", "Ġy", "...", "ĉ",
                    "Ab", "1Â½", "!?", "čĊ", "ĠÃ©",
                ],
            ),
            (
                Split::SmolLm,
                &[
                    "I", "'", "LL", "Ġit", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx", "ĊĊĠ",
                    "Ġy", "...", "ĉ", "Ab", "1", "Â½", "!?", "čĊ", "ĠÃ©",
                ],
            ),
            (
                Split::Llama3,
                &[
                    "I", "'LL", "Ġit", "'s", "Ġ", "123", "45", "Ġ", "Ġx", "ĊĊ", "Ġ", "Ġy", "...",
                    "ĉAb", "1Â½", "!?čĊ", "ĠÃ©",
                ],
            ),
            (
                Split::Qwen2,
                &[
                    "I", "'LL", "Ġit", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx", "ĊĊ", "Ġ",
                    "Ġy", "...", "ĉAb", "1", "Â½", "!?čĊ", "ĠÃ©",
                ],
            ),
        ];
        for (split, words) in expected {
            assert_eq!(
                Words::new(split).unwrap().of(text).unwrap(),
                words,
                "{split:?}"
            );
        }
    }

    #[test]
    fn long_words_are_cut() {
        let parts = chunks(&"é".repeat(600));
        assert_eq!(
            parts.iter().map(|p| p.chars().count()).collect::<Vec<_>>(),
            [256, 256, 88]
        );
        assert_eq!(chunks("ab"), ["ab"]);
    }
}
