//! Text to token ids and back.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use crate::chat::{ChatOptions, ChatTemplate, Message};
use crate::config::FolderConfig;
use crate::guard::guarded;
use crate::load::{self, Core};
use crate::pieces::Pieces;
use crate::stream::{DecodeStream, Utf8Stream};
use crate::{Error, GgufVocab, Result};

/// A vocabulary with its rules: encodes text to ids and decodes ids to text.
///
/// Cloning is cheap (the vocabulary is shared) and a clone can be used from
/// any thread. Truncation, padding and merge dropout that a file may ask for
/// are left out: they are training devices and would change what is generated.
#[derive(Clone)]
pub struct Tokenizer {
    core: Arc<Core>,
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    pad: Option<u32>,
    /// What a file says about the two ends, where it overrides `tokenizer.json`.
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    /// Chat templates by name; the one used unless asked otherwise is `default`.
    templates: Arc<Vec<(String, ChatTemplate)>>,
}

/// Name of the chat template that is used unless another is asked for.
const DEFAULT_TEMPLATE: &str = "default";

impl Tokenizer {
    /// Reads one `tokenizer.json`. It does not say which tokens begin and end
    /// a text: use [`from_dir`](Self::from_dir), or
    /// [`with_bos`](Self::with_bos) and [`with_eos`](Self::with_eos).
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Definition`] when it is
    /// damaged or contradicts itself, [`Error::Limits`] above 256 MiB.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let advice = "a tokenizer.json of the Hugging Face kind is expected there";
        let json = read_limited(path, load::MAX_BYTES, advice)?;
        Ok(Self::new(load::load(&json, &path.display().to_string())?))
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_json_bytes(json: &[u8]) -> Result<Self> {
        Ok(Self::new(load::load(json, "tokenizer.json (from memory)")?))
    }

    /// Reads a model folder: `tokenizer.json`, and where they exist
    /// `tokenizer_config.json` (special tokens, chat templates),
    /// `special_tokens_map.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file); also [`Error::Definition`] when a
    /// special token is named that the vocabulary does not have.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let advice = "a model folder has a tokenizer.json; vocabularies of other kinds \
                      (a GGUF file, for one) are read with the model itself";
        let json = read_limited(&path, load::MAX_BYTES, advice)?;
        let mut core = load::load(&json, &path.display().to_string())?;
        let config = FolderConfig::read(dir)?;
        config.mark_special(&mut core);

        let mut tokenizer = Self::new(core);
        tokenizer.bos = FolderConfig::id_of("bos_token", config.bos.as_deref(), &tokenizer, dir)?;
        tokenizer.eos = FolderConfig::id_of("eos_token", config.eos.as_deref(), &tokenizer, dir)?;
        tokenizer.unk = FolderConfig::id_of("unk_token", config.unk.as_deref(), &tokenizer, dir)?;
        tokenizer.pad = FolderConfig::id_of("pad_token", config.pad.as_deref(), &tokenizer, dir)?;
        tokenizer.add_bos = config.add_bos;
        tokenizer.add_eos = config.add_eos;
        tokenizer.templates = Arc::new(config.templates);
        Ok(tokenizer)
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an unknown kind of vocabulary,
    /// [`Error::Config`] when its fields contradict one another.
    pub fn from_gguf_vocab(vocab: GgufVocab) -> Result<Self> {
        let core = load::load(&vocab.to_json()?, "the GGUF vocabulary")?;
        let mut tokenizer = Self::new(core);
        (tokenizer.bos, tokenizer.eos) = (vocab.bos, vocab.eos);
        (tokenizer.unk, tokenizer.pad) = (vocab.unk, vocab.pad);
        if let Some(source) = vocab.chat_template {
            tokenizer.templates = Arc::new(vec![(
                DEFAULT_TEMPLATE.to_owned(),
                ChatTemplate::unchecked(source),
            )]);
        }
        Ok(tokenizer)
    }

    fn new(core: Core) -> Self {
        Self {
            core: Arc::new(core),
            bos: None,
            eos: None,
            unk: None,
            pad: None,
            add_bos: None,
            add_eos: None,
            templates: Arc::default(),
        }
    }

    /// Names the token that begins a text.
    ///
    /// # Errors
    /// [`Error::Config`] when the vocabulary does not have it.
    pub fn with_bos(mut self, token: &str) -> Result<Self> {
        self.bos = Some(self.known_id(token)?);
        Ok(self)
    }

    /// Names the token that ends a text.
    ///
    /// # Errors
    /// [`Error::Config`] when the vocabulary does not have it.
    pub fn with_eos(mut self, token: &str) -> Result<Self> {
        self.eos = Some(self.known_id(token)?);
        Ok(self)
    }

    /// Uses `template` for chats unless another is asked for by name.
    #[must_use]
    pub fn with_chat_template(mut self, template: ChatTemplate) -> Self {
        let mut templates = vec![(DEFAULT_TEMPLATE.to_owned(), template)];
        templates.extend(
            self.templates
                .iter()
                .filter(|(name, _)| name != DEFAULT_TEMPLATE)
                .cloned(),
        );
        self.templates = Arc::new(templates);
        self
    }

    fn known_id(&self, token: &str) -> Result<u32> {
        self.token_to_id(token).ok_or_else(|| {
            Error::Config(format!(
                "the vocabulary has no token {token:?}; name one that it has"
            ))
        })
    }

    /// Token ids of `text`. Special tokens spelled out in the text become
    /// those tokens. With `add_special`, the tokens that the model expects at
    /// the ends of a text are put there; a text made by a chat template
    /// already has them.
    ///
    /// # Errors
    /// [`Error::Backend`] when the vocabulary cannot express the text (no
    /// unknown token, for example).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded("encode", || self.core.hf.encode_fast(text, add_special))?;
        let mut ids = encoding.get_ids().to_vec();
        if add_special && (self.add_bos.is_some() || self.add_eos.is_some()) {
            self.settle_ends(&mut ids)?;
        }
        Ok(ids)
    }

    /// Token ids of many texts, on all cores; each as [`encode`](Self::encode).
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_batch(&self, texts: &[&str], add_special: bool) -> Result<Vec<Vec<u32>>> {
        let encodings = guarded("encode", || {
            self.core.hf.encode_batch_fast(texts.to_vec(), add_special)
        })?;
        let mut all: Vec<Vec<u32>> = encodings.iter().map(|e| e.get_ids().to_vec()).collect();
        if add_special && (self.add_bos.is_some() || self.add_eos.is_some()) {
            all.iter_mut().try_for_each(|ids| self.settle_ends(ids))?;
        }
        Ok(all)
    }

    /// Adds or takes away the outer tokens where `tokenizer_config.json`
    /// disagrees with what `tokenizer.json` puts there.
    fn settle_ends(&self, ids: &mut Vec<u32>) -> Result<()> {
        let empty = guarded("encode", || self.core.hf.encode_fast("", true))?;
        let given = empty.get_ids();
        if let (Some(bos), Some(wanted)) = (self.bos, self.add_bos) {
            match (given.first() == Some(&bos), wanted) {
                (false, true) => ids.insert(0, bos),
                (true, false) => drop(ids.drain(..1.min(ids.len()))),
                _ => {}
            }
        }
        if let (Some(eos), Some(wanted)) = (self.eos, self.add_eos) {
            match (given.last() == Some(&eos), wanted) {
                (false, true) => ids.push(eos),
                (true, false) => drop(ids.pop()),
                _ => {}
            }
        }
        Ok(())
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD. With
    /// `skip_special`, special tokens are left out. Ids without a token (holes
    /// of a vocabulary) add nothing.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id beyond the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if self.core.pieces == Pieces::Opaque {
            return self.decode_opaque(ids, skip_special);
        }
        let mut utf8 = Utf8Stream::new(self.core.pieces.strip());
        let mut text = String::with_capacity(4 * ids.len());
        for &id in ids {
            utf8.push(&self.piece(id, skip_special)?, &mut text);
        }
        utf8.finish(&mut text);
        Ok(text)
    }

    /// Decodes with the engine, where a token's text depends on its neighbours.
    pub(crate) fn decode_opaque(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        ids.iter().try_for_each(|&id| self.check(id))?;
        guarded("decode", || self.core.hf.decode(ids, skip_special))
    }

    /// Decodes ids as they arrive, never emitting half a character.
    #[must_use]
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The bytes that a token stands for, part of a character at times; `None`
    /// for holes and for tokenizers whose tokens have no bytes of their own
    /// (WordPiece).
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let known = self.core.pieces != Pieces::Opaque && self.core.hf.id_to_token(id).is_some();
        known.then(|| self.piece(id, false).ok()).flatten()
    }

    pub(crate) fn pieces(&self) -> &Pieces {
        &self.core.pieces
    }

    pub(crate) fn check(&self, id: u32) -> Result<()> {
        let vocab_size = self.core.vocab_size;
        if (id as usize) < vocab_size {
            Ok(())
        } else {
            Err(Error::TokenId { id, vocab_size })
        }
    }

    /// The bytes that `id` adds to a text.
    pub(crate) fn piece(&self, id: u32, skip_special: bool) -> Result<Vec<u8>> {
        self.check(id)?;
        let added = self.core.hf.get_added_vocabulary();
        let known = added.get_added_tokens_decoder().get(&id);
        Ok(match known {
            Some(token) if skip_special && added.is_special_token(&token.content) => Vec::new(),
            Some(token) => self.core.pieces.bytes(&token.content, true),
            None => match self.core.hf.id_to_token(id) {
                Some(token) => self.core.pieces.bytes(&token, false),
                None => Vec::new(),
            },
        })
    }

    /// One more than the largest id: the number of rows that an embedding
    /// needs. (Models often have more, padded to a round number.)
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.core.vocab_size
    }

    /// The id of a token as it is written in the vocabulary.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.core.hf.token_to_id(token)
    }

    /// The token of an id as it is written in the vocabulary; `None` for holes
    /// and beyond the end. For its text see [`token_bytes`](Self::token_bytes).
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.core.hf.id_to_token(id)
    }

    /// Whether `id` is a special token, one that `skip_special` leaves out.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.core.hf.get_added_vocabulary();
        added
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|t| added.is_special_token(&t.content))
    }

    /// The id that begins a text, where it is known.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id that ends a text, where it is known. A model may have more of
    /// them, named in its `generation_config.json`.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The id for what the vocabulary cannot express, where it is known.
    #[must_use]
    pub fn unk(&self) -> Option<u32> {
        self.unk
    }

    /// The id that fills up batches, where it is known.
    #[must_use]
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The chat template that the model came with.
    #[must_use]
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template_named(DEFAULT_TEMPLATE)
    }

    /// A chat template by name (`default`, `tool_use`, `rag`, ...).
    #[must_use]
    pub fn chat_template_named(&self, name: &str) -> Option<&ChatTemplate> {
        self.templates
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, t)| t)
    }

    /// The text that the model expects for a conversation. With
    /// `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Error::Config`] when the model came without a chat template,
    /// otherwise as [`ChatTemplate::render`].
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.chat_template().ok_or_else(|| {
            Error::Config(
                "this model has no chat template; complete plain text instead, or choose one \
                 (ChatTemplate::chatml is the most common)"
                    .to_owned(),
            )
        })?;
        template.render(messages, &self.chat_options(add_generation_prompt))
    }

    /// The token ids of a conversation: [`render_chat`](Self::render_chat),
    /// then [`encode`](Self::encode) without adding anything.
    ///
    /// # Errors
    /// As those two.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        self.encode(&self.render_chat(messages, add_generation_prompt)?, false)
    }

    /// Options for [`ChatTemplate::render`] with this vocabulary's tokens.
    #[must_use]
    pub fn chat_options(&self, add_generation_prompt: bool) -> ChatOptions {
        let text = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        ChatOptions {
            add_generation_prompt,
            bos_token: text(self.bos),
            eos_token: text(self.eos),
            ..ChatOptions::default()
        }
    }

    /// The bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Backend`] when the engine cannot write it.
    pub fn to_json_bytes(&self) -> Result<Vec<u8>> {
        match &self.core.source {
            Some(json) => Ok(json.clone()),
            None => Ok(guarded("write", || self.core.hf.to_string(true))?.into_bytes()),
        }
    }

    /// Writes a `tokenizer.json`. What it cannot hold (which token ends a
    /// text, chat templates) is kept by [`save_dir`](Self::save_dir).
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_whole(path.as_ref(), &self.to_json_bytes()?)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, where there is a
    /// chat template, `chat_template.jinja` into a folder, for
    /// [`from_dir`](Self::from_dir) and other programs to read.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder or a file cannot be written.
    pub fn save_dir(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e, ""))?;
        let token = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        let mut config = serde_json::Map::new();
        config.insert(
            "tokenizer_class".to_owned(),
            "PreTrainedTokenizerFast".into(),
        );
        for (key, id) in [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unk),
            ("pad_token", self.pad),
        ] {
            config.insert(key.to_owned(), token(id).into());
        }
        for (key, value) in [
            ("add_bos_token", self.add_bos),
            ("add_eos_token", self.add_eos),
        ] {
            if let Some(value) = value {
                config.insert(key.to_owned(), value.into());
            }
        }
        let named: Vec<_> = self
            .templates
            .iter()
            .filter(|(name, _)| name != DEFAULT_TEMPLATE)
            .collect();
        if !named.is_empty() {
            let list = self
                .templates
                .iter()
                .map(|(name, t)| serde_json::json!({"name": name, "template": t.source()}));
            config.insert("chat_template".to_owned(), list.collect());
        }
        let json = serde_json::to_vec_pretty(&config)
            .map_err(|e| Error::Config(format!("tokenizer_config.json cannot be written: {e}")))?;
        write_whole(&dir.join("tokenizer_config.json"), &json)?;
        if let Some(template) = self.chat_template() {
            write_whole(
                &dir.join("chat_template.jinja"),
                template.source().as_bytes(),
            )?;
        }
        self.save(dir.join("tokenizer.json"))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field(
                "chat_templates",
                &self
                    .templates
                    .iter()
                    .map(|(name, _)| name)
                    .collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}

/// Reads a file of at most `limit` bytes; `advice` is added when it is missing.
pub(crate) fn read_limited(path: &Path, limit: u64, advice: &str) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e, advice);
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(Error::Limits(format!(
            "{} has more than {limit} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}

/// Writes a file under another name first, so that a reader (or a crash) never
/// sees half of it.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |e| Error::io(path, e, "the folder has to exist");
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = Path::new(&name);
    let written = File::create(temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(temporary, path));
    if written.is_err() {
        // Nothing more can be done about a leftover than what failed already.
        drop(std::fs::remove_file(temporary));
    }
    written.map_err(io)
}
