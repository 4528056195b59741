//! The text pipeline: a model with its tokenizer.

use crate::options::{LoadOptions, Speculate, TextOptions};
use crate::stream::{Generation, TextStream};
use crate::{Error, Result};
use sequor_backbone::{CausalLm, causal_lm};
use sequor_data::Resolver;
use sequor_nn::weights::Gguf;
use sequor_sampling::draft::{DraftMode, Drafter};
use sequor_sampling::{DraftModel, Generator, PromptLookup, TargetModel};
use sequor_tokenizers::{GgufVocab, Message, Tokenizer};
use std::path::Path;

/// A language model that takes and gives text.
#[derive(Debug)]
pub struct TextPipeline {
    model: CausalLm,
    tokenizer: Tokenizer,
    draft: Option<CausalLm>,
    eos: Vec<u32>,
}

impl TextPipeline {
    /// Loads a model by name (`smollm2`, `bible-lm`), path (folder or GGUF file) or
    /// `hf:owner/name`, fetching it when needed, in f32 on the CPU.
    ///
    /// # Errors
    /// When it cannot be found, fetched or loaded; the message says what to do.
    pub fn from_pretrained(name: &str) -> Result<Self> {
        Self::load(
            &Resolver::from_env().resolve_model(name)?.path,
            &LoadOptions::default(),
        )
    }

    /// Loads a model folder or GGUF file.
    ///
    /// # Errors
    /// When a file is absent, damaged, or does not fit its config.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self> {
        sequor_kernels::threads::set(
            options
                .threads
                .unwrap_or_else(sequor_kernels::threads::default_count),
        );
        let tokenizer = load_tokenizer(path)?;
        let model = CausalLm::load(path, options.dtype, options.device)?;
        let mut eos = model.config().eos.clone();
        eos.extend(extra_eos(path)?);
        eos.extend(tokenizer.eos());
        eos.sort_unstable();
        eos.dedup();
        eos.retain(|&id| (id as usize) < model.vocab_size());
        if tokenizer.vocab_size() > model.vocab_size() {
            return Err(Error::Config(format!(
                "{}: the tokenizer has {} tokens and the model only {}: they do not belong together",
                path.display(),
                tokenizer.vocab_size(),
                model.vocab_size()
            )));
        }
        Ok(Self {
            model,
            tokenizer,
            draft: None,
            eos,
        })
    }

    /// Loads a small model that drafts for this one ([`Speculate::Draft`]).
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`Error::Input`] when the vocabularies differ.
    pub fn load_draft(&mut self, path: &Path, options: &LoadOptions) -> Result<()> {
        let tokenizer = load_tokenizer(path)?;
        let draft = CausalLm::load(path, options.dtype, options.device)?;
        let (ours, theirs) = (self.model.vocab_size(), draft.vocab_size());
        let same = |id: u32| tokenizer.id_to_token(id) == self.tokenizer.id_to_token(id);
        let differs = (0..self.tokenizer.vocab_size().max(tokenizer.vocab_size()) as u32)
            .find(|&id| !same(id));
        if ours != theirs || differs.is_some() {
            let what = differs.map_or_else(
                || format!("sizes {ours} and {theirs}"),
                |id| {
                    format!(
                        "token {id} is {:?} and {:?}",
                        self.tokenizer.id_to_token(id),
                        tokenizer.id_to_token(id)
                    )
                },
            );
            return Err(Error::Input(format!(
                "{}: a draft model must share the target's vocabulary ({what}); choose a smaller model of the same family",
                path.display()
            )));
        }
        self.draft = Some(draft);
        Ok(())
    }

    /// The network.
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Ids that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Text to tokens, with the special tokens that the model expects at the beginning.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty text when the tokenizer adds nothing of its own.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, true)?;
        if ids.is_empty() {
            return Err(Error::Input(
                "the prompt is empty: give the text to continue".into(),
            ));
        }
        Ok(ids)
    }

    /// A conversation in the model's chat template, ready for the answer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the model has no template.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        if self.tokenizer.chat_template().is_none() {
            let what = "this model has no chat template; generate without --chat, or choose an instruction-tuned model";
            return Err(Error::Unsupported(what.into()));
        }
        Ok(self.tokenizer.encode_chat(messages, true)?)
    }

    /// Generates a text to its end.
    ///
    /// # Errors
    /// For impossible options, and when the model fails.
    pub fn generate(&self, prompt: &str, options: &TextOptions) -> Result<Generation> {
        self.stream(prompt, options)?.collect_all()
    }

    /// Generates a text piece by piece: an iterator over strings.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn stream(&self, prompt: &str, options: &TextOptions) -> Result<TextStream<'_>> {
        options.validate()?;
        self.stream_tokens(&self.encode(prompt)?, options)
    }

    /// As [`stream`](Self::stream), from tokens.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn stream_tokens(&self, prompt: &[u32], options: &TextOptions) -> Result<TextStream<'_>> {
        options.validate()?;
        let sampling = options.to_sampling(&self.eos);
        let drafter: Option<Box<dyn Drafter + '_>> = match (&options.speculate, &self.draft) {
            (Speculate::Off, _) => None,
            (Speculate::Draft(_), Some(draft)) => {
                Some(Box::new(DraftModel::new(draft, DraftMode::Greedy)?))
            }
            (Speculate::Draft(name), None) => {
                return Err(Error::Input(format!(
                    "the draft model '{name}' has not been loaded: call load_draft first"
                )));
            }
            (Speculate::Auto | Speculate::PromptLookup, _) => {
                Some(Box::new(PromptLookup::default()))
            }
        };
        let mut generator = Generator::new(&self.model, sampling)?;
        if let Some(flag) = &options.cancel {
            generator = generator.cancelled_by(flag.clone());
        }
        let session = generator.session(prompt, drafter)?;
        TextStream::new(session, &self.tokenizer, &self.eos, prompt.len(), options)
    }
}

fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() {
        return Ok(Tokenizer::from_dir(path)?);
    }
    let file = Gguf::open(path)?;
    let f = file.vocab_fields()?.ok_or_else(|| {
        Error::Unsupported(format!("{}: the file carries no tokenizer", path.display()))
    })?;
    Ok(Tokenizer::from_gguf_vocab(GgufVocab {
        model: f.model,
        pre: f.pre,
        tokens: f.tokens,
        scores: f.scores,
        token_types: f.token_types,
        merges: f.merges,
        bos: f.bos,
        eos: f.eos,
        unk: f.unk,
        pad: f.pad,
        add_bos: f.add_bos,
        add_eos: f.add_eos,
        add_space_prefix: f.add_space_prefix,
        chat_template: f.chat_template,
    })?)
}

/// End-of-text ids that only `generation_config.json` names.
fn extra_eos(path: &Path) -> Result<Vec<u32>> {
    let file = path.join("generation_config.json");
    if !file.is_file() {
        return Ok(Vec::new());
    }
    let json = causal_lm::read_json(&file)?;
    let config = sequor_sampling::GenerationConfig::from_json(&json.to_string())
        .map_err(|e| Error::Config(format!("{}: {e}", file.display())))?;
    Ok(config
        .eos_token_id
        .map(|ids| ids.as_slice().to_vec())
        .unwrap_or_default())
}
