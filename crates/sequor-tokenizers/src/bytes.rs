//! The two smallest vocabularies: bytes, and the characters of a text.

use std::collections::BTreeSet;

use serde_json::json;

use crate::definition::{AddedToken, Definition, byte_level};
use crate::pieces::char_of_byte;
use crate::{Error, Result, Tokenizer};

/// The token for characters that are not in a character vocabulary.
const UNKNOWN: &str = "<unk>";

impl Tokenizer {
    /// A tokenizer whose ids 0 to 255 are the bytes of UTF-8 text, followed by
    /// `special_tokens` from 256 on. It can encode any text.
    ///
    /// # Errors
    /// [`Error::Config`] when a special token is empty or named twice.
    pub fn bytes(special_tokens: &[&str]) -> Result<Self> {
        let mut tokens: Vec<String> = (0..=u8::MAX).map(|b| char_of_byte(b).to_string()).collect();
        tokens.extend(special_tokens.iter().map(|&t| t.to_owned()));
        let mut definition = Definition::new(&tokens);
        definition.added_tokens = special(special_tokens, 256)?;
        definition.pre_tokenizer = byte_level(false);
        definition.decoder = byte_level(false);
        Self::built(&tokens, &definition)
    }

    /// A tokenizer whose ids are `special_tokens` (from 0), then `<unk>`, then
    /// the distinct characters of `text` by code point. Characters that `text`
    /// does not have become `<unk>`, each its own.
    ///
    /// # Errors
    /// [`Error::Config`] when a special token is empty, named twice, `<unk>`,
    /// or a single character of the text.
    pub fn characters(text: &str, special_tokens: &[&str]) -> Result<Self> {
        let special_tokens: Vec<&str> = special_tokens.iter().copied().chain([UNKNOWN]).collect();
        let alphabet: BTreeSet<char> = text.chars().collect();
        let mut tokens: Vec<String> = special_tokens.iter().map(|&t| t.to_owned()).collect();
        tokens.extend(alphabet.iter().map(char::to_string));
        let mut definition = Definition::new(&tokens);
        definition.added_tokens = special(&special_tokens, 0)?;
        definition.decoder = json!({"type": "Fuse"});
        definition.model.unk_token = Some(UNKNOWN);
        Self::built(&tokens, &definition)
    }

    fn built(tokens: &[String], definition: &Definition<'_>) -> Result<Self> {
        let mut seen = BTreeSet::new();
        if let Some(twice) = tokens.iter().find(|t| !seen.insert(t.as_str())) {
            return Err(Error::Config(format!(
                "the token {twice:?} is there already; name another special token"
            )));
        }
        Self::from_json_bytes(&definition.to_json()?)
    }
}

/// Special tokens with ids from `first` on.
pub(crate) fn special<'a>(tokens: &[&'a str], first: u32) -> Result<Vec<AddedToken<'a>>> {
    if tokens.iter().any(|t| t.is_empty()) {
        return Err(Error::Config(
            "a special token is empty; give it a name such as \"<|endoftext|>\"".to_owned(),
        ));
    }
    Ok(tokens
        .iter()
        .zip(first..)
        .map(|(text, id)| AddedToken::new(id, text, true))
        .collect())
}
