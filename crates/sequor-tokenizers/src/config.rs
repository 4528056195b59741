//! The files beside a `tokenizer.json`: which tokens are special, what goes at
//! the ends of a text, and the chat templates.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::chat::ChatTemplate;
use crate::load::Core;
use crate::tokenizer::{Tokenizer, read_limited};
use crate::{Error, Result};

/// Largest of these files that is read, in bytes: 64 MiB (some repeat all
/// added tokens).
const MAX_BYTES: u64 = 64 << 20;

/// What `tokenizer_config.json`, `special_tokens_map.json` and
/// `chat_template.jinja` say together; the first of them to name a token wins.
#[derive(Default)]
pub(crate) struct FolderConfig {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub unk: Option<String>,
    pub pad: Option<String>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub templates: Vec<(String, ChatTemplate)>,
}

#[derive(Default, Deserialize)]
struct ConfigFile {
    #[serde(flatten)]
    tokens: SpecialTokens,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<TemplateField>,
}

#[derive(Default, Deserialize)]
struct SpecialTokens {
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    pad_token: Option<TokenField>,
}

/// A token is written as its text or as an object with its `content`.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenField {
    Text(String),
    Object { content: String },
}

impl From<TokenField> for String {
    fn from(field: TokenField) -> Self {
        match field {
            TokenField::Text(text) | TokenField::Object { content: text } => text,
        }
    }
}

/// Templates are written as one text or as a list of named ones.
#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl FolderConfig {
    pub fn read(dir: &Path) -> Result<Self> {
        let config: ConfigFile = read_json(&dir.join("tokenizer_config.json"))?;
        let map: SpecialTokens = read_json(&dir.join("special_tokens_map.json"))?;
        let first = |a: Option<TokenField>, b: Option<TokenField>| a.or(b).map(String::from);
        let mut templates: Vec<(String, ChatTemplate)> = match config.chat_template {
            None => Vec::new(),
            Some(TemplateField::One(source)) => {
                vec![("default".to_owned(), ChatTemplate::unchecked(source))]
            }
            Some(TemplateField::Named(list)) => list
                .into_iter()
                .map(|t| (t.name, ChatTemplate::unchecked(t.template)))
                .collect(),
        };
        // The file of its own is the newer convention and wins.
        if let Some(bytes) = read_if_there(&dir.join("chat_template.jinja"))? {
            let source = String::from_utf8(bytes).map_err(|e| {
                let path = dir.join("chat_template.jinja");
                Error::definition(
                    &path.display().to_string(),
                    format!("it is not UTF-8 ({e})"),
                )
            })?;
            templates.retain(|(name, _)| name != "default");
            templates.insert(0, ("default".to_owned(), ChatTemplate::unchecked(source)));
        }
        Ok(Self {
            bos: first(config.tokens.bos_token, map.bos_token),
            eos: first(config.tokens.eos_token, map.eos_token),
            unk: first(config.tokens.unk_token, map.unk_token),
            pad: first(config.tokens.pad_token, map.pad_token),
            add_bos: config.add_bos_token,
            add_eos: config.add_eos_token,
            templates,
        })
    }

    /// Makes sure that the tokens named here are found in text and can be left
    /// out of it, where `tokenizer.json` has them as plain tokens only.
    pub fn mark_special(&self, core: &mut Core) {
        let named = [&self.bos, &self.eos, &self.unk, &self.pad];
        let tokens: Vec<tokenizers::AddedToken> = named
            .into_iter()
            .flatten()
            .filter(|t| core.hf.token_to_id(t).is_some())
            .filter(|t| !core.hf.get_added_vocabulary().is_special_token(t))
            .map(|t| tokenizers::AddedToken::from(t.as_str(), true))
            .collect();
        if !tokens.is_empty() {
            core.hf.add_special_tokens(&tokens);
        }
    }

    /// The id of a token that was named under `key`.
    pub fn id_of(
        key: &str,
        token: Option<&str>,
        tokenizer: &Tokenizer,
        dir: &Path,
    ) -> Result<Option<u32>> {
        let Some(token) = token else { return Ok(None) };
        match tokenizer.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => Err(Error::definition(
                &dir.join("tokenizer_config.json").display().to_string(),
                format!("{key} is {token:?}, which the vocabulary in tokenizer.json does not have"),
            )),
        }
    }
}

/// The file's contents, or the default when there is no such file.
fn read_json<T: Default + DeserializeOwned>(path: &Path) -> Result<T> {
    let Some(bytes) = read_if_there(path)? else {
        return Ok(T::default());
    };
    let origin = path.display().to_string();
    let object: Value =
        serde_json::from_slice(&bytes).map_err(|e| Error::definition(&origin, e.to_string()))?;
    serde_json::from_value(object).map_err(|e| Error::definition(&origin, e.to_string()))
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match read_limited(path, MAX_BYTES, "") {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
