//! Text to tokens: what is learned from, and what is held out.

use std::path::Path;
use std::sync::Arc;

use sequor_data::Resolver;
use sequor_data::bible::Bible;
use sequor_data::sampler::TokenStream;
use sequor_data::text::{Document, HoldOut, TextLimits, read_text};
use sequor_data::{Kind, catalog};
use sequor_tokenizers::{BpeOptions, Tokenizer, train_bpe};

use super::recipe::{HeldOutRecipe, LmRecipe};
use crate::{Error, Result};

/// The token that begins and ends every document.
pub(crate) const END: &str = "<|endoftext|>";

/// Held-out text of one book or file.
#[derive(Debug)]
pub struct HeldOut {
    /// Its name.
    pub name: String,
    /// Its documents, each between two end-of-text tokens.
    pub tokens: Vec<u32>,
    /// Bytes of text in them.
    pub bytes: usize,
}

/// Everything a language model is trained on and measured with.
#[derive(Debug)]
pub struct Corpus {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Id of the end-of-text token.
    pub end: u32,
    /// The training documents, each followed by the end-of-text token.
    pub train: Arc<TokenStream>,
    /// Bytes of training text.
    pub train_bytes: usize,
    /// What is measured with, book by book.
    pub held_out: Vec<HeldOut>,
    /// What the model's card says about the data.
    pub origin: Origin,
}

/// Where data came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// What it is.
    pub description: String,
    /// Its licence.
    pub licence: String,
    /// Whom to name.
    pub attribution: String,
    /// Where it is published.
    pub homepage: String,
}

impl Corpus {
    /// Finds the data of a recipe, divides it, and turns it into tokens.
    ///
    /// # Errors
    /// When the data cannot be found or read, nothing is left on one side, or the
    /// tokenizer lacks the end-of-text token.
    pub fn new(recipe: &LmRecipe, resolver: &Resolver) -> Result<Self> {
        let (documents, origin) = documents(recipe, resolver)?;
        let (train, held) = hold_out(recipe, &documents).split(documents)?;
        let tokenizer = tokenizer(recipe, &train)?;
        let end = tokenizer.token_to_id(END).ok_or_else(|| {
            Error::Config(format!(
                "the tokenizer has no token {END}, which must stand between documents"
            ))
        })?;
        let tokens = encode(&tokenizer, &train)?;
        let mut held_out: Vec<HeldOut> = Vec::new();
        for (document, ids) in held.iter().zip(encode(&tokenizer, &held)?) {
            if held_out.last().is_none_or(|h| h.name != document.group) {
                held_out.push(HeldOut {
                    name: document.group.clone(),
                    tokens: vec![end],
                    bytes: 0,
                });
            }
            if let Some(book) = held_out.last_mut() {
                book.tokens.extend(ids);
                book.tokens.push(end);
                book.bytes += document.text.len();
            }
        }
        Ok(Self {
            end,
            train_bytes: train.iter().map(|d| d.text.len()).sum(),
            train: Arc::new(TokenStream::from_documents(tokens, Some(end))),
            held_out,
            tokenizer,
            origin,
        })
    }

    /// Bytes of held-out text.
    pub fn held_out_bytes(&self) -> usize {
        self.held_out.iter().map(|h| h.bytes).sum()
    }
}

fn documents(recipe: &LmRecipe, resolver: &Resolver) -> Result<(Vec<Document>, Origin)> {
    let source = &recipe.data.source;
    let local = recipe.resolve(Path::new(source));
    let path = if local.exists() {
        local
    } else {
        resolver.resolve_data(source)?.path
    };
    let origin = match catalog::find(Kind::Dataset, source) {
        Some(entry) => Origin {
            description: entry.description.to_owned(),
            licence: entry.licence.to_owned(),
            attribution: entry.attribution.to_owned(),
            homepage: entry.homepage.to_owned(),
        },
        None => Origin {
            description: format!("the text of `{source}`"),
            licence: "that of the text".into(),
            attribution: String::new(),
            homepage: String::new(),
        },
    };
    let is_bible = path.join("ot.bzv").exists() || path.join("nt.bzv").exists();
    let documents = if is_bible {
        bible(&path)?
    } else {
        read_text(&path, &TextLimits::default())?
    };
    Ok((documents, origin))
}

/// A document for every chapter, one verse to the line, and one for the books beyond the
/// sixty-six.
fn bible(path: &Path) -> Result<Vec<Document>> {
    let bible = Bible::open(path)?;
    let mut documents = bible.documents("\n")?;
    if !bible.other().is_empty() {
        let name = "Deuterocanon".to_owned();
        documents.push(Document {
            group: name.clone(),
            name,
            text: bible.other().join("\n"),
        });
    }
    Ok(documents)
}

fn hold_out(recipe: &LmRecipe, documents: &[Document]) -> HoldOut {
    match &recipe.data.held_out {
        HeldOutRecipe::Names(names) => HoldOut::Groups(names.clone()),
        HeldOutRecipe::Fraction(f) if documents.len() == 1 => HoldOut::Tail(*f),
        HeldOutRecipe::Fraction(f) => HoldOut::Fraction {
            fraction: *f,
            seed: recipe.train.seed,
        },
    }
}

fn tokenizer(recipe: &LmRecipe, train: &[Document]) -> Result<Tokenizer> {
    if let Some(path) = &recipe.tokenizer.path {
        let path = recipe.resolve(path);
        return Ok(if path.is_dir() {
            Tokenizer::from_dir(&path)?
        } else {
            Tokenizer::from_file(&path)?
        });
    }
    let options = BpeOptions {
        vocab_size: recipe.tokenizer.vocab_size.unwrap_or_default(),
        special_tokens: vec![END.to_owned()],
        bos_token: Some(END.to_owned()),
        eos_token: Some(END.to_owned()),
        ..BpeOptions::default()
    };
    Ok(train_bpe(train.iter().map(|d| d.text.clone()), &options)?)
}

fn encode(tokenizer: &Tokenizer, documents: &[Document]) -> Result<Vec<Vec<u32>>> {
    let texts: Vec<&str> = documents.iter().map(|d| d.text.as_str()).collect();
    Ok(tokenizer.encode_batch(&texts, false)?)
}
