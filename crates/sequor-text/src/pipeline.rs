//! The text pipeline: a model with its tokenizer.

use crate::drafting::{self, DraftHeads};
use crate::options::{HeadKind, Layers, LoadOptions, Speculate, TextOptions};
use crate::stream::{Generation, Run, TextStream};
use crate::{Error, Result};
use sequor_backbone::routers::{LayerSelection, Prefill, RoutedLm, RouterFolder, load_adapted};
use sequor_backbone::transfer::TransferLm;
use sequor_backbone::{CausalLm, causal_lm};
use sequor_data::Resolver;
use sequor_nn::weights::Gguf;
use sequor_sampling::verify::{Acceptance, Neighbours};
use sequor_sampling::{Drafter, Options, Session, TargetModel};
use sequor_tokenizers::{GgufVocab, Message, Tokenizer};
use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;

/// A language model that takes and gives text.
pub struct TextPipeline {
    model: CausalLm,
    tokenizer: Tokenizer,
    draft: Option<CausalLm>,
    heads: Vec<DraftHeads>,
    routers: Option<RouterFolder>,
    eos: Vec<u32>,
    neighbours: OnceCell<Arc<dyn Neighbours>>,
}

impl std::fmt::Debug for TextPipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextPipeline")
            .field("model", &self.model.source())
            .finish_non_exhaustive()
    }
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
        let model = CausalLm::load(path, options.weights, options.device)?;
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
            heads: Vec::new(),
            routers: None,
            eos,
            neighbours: OnceCell::new(),
        })
    }

    /// Loads a small model that drafts for this one ([`Speculate::Draft`]).
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`Error::Input`] when the vocabularies differ.
    pub fn load_draft(&mut self, path: &Path, options: &LoadOptions) -> Result<()> {
        let tokenizer = load_tokenizer(path)?;
        let draft = CausalLm::load(path, options.weights, options.device)?;
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

    /// Loads heads that draft for this model ([`Speculate::Heads`]); heads of the same kind
    /// are replaced.
    ///
    /// # Errors
    /// When a file is absent or damaged, or the heads were made for another model.
    pub fn load_heads(&mut self, folder: &Path, options: &LoadOptions) -> Result<HeadKind> {
        let heads = DraftHeads::load(folder, options, &self.model)?;
        let kind = heads.kind();
        self.heads.retain(|h| h.kind() != kind);
        self.heads.push(heads);
        Ok(kind)
    }

    /// Loads routers that choose layers of this model ([`Layers::Router`]). Where they were
    /// trained with an adapter, the model is loaded again with it.
    ///
    /// # Errors
    /// As [`load_heads`](Self::load_heads).
    pub fn load_routers(&mut self, folder: &Path, options: &LoadOptions) -> Result<()> {
        let routers = RouterFolder::open(folder)?;
        routers.check(&self.model)?;
        if let Some(adapter) = routers.adapter() {
            let source = self.model.source().to_path_buf();
            self.model = load_adapted(&source, adapter, options.weights, options.device)?;
            self.heads.clear();
        }
        self.routers = Some(routers);
        Ok(())
    }

    /// Loads everything that `options` need and this pipeline does not have: the draft
    /// model, heads or routers, looked up by the model's fingerprint beside the models that
    /// `resolver` knows, or in the folder `heads`.
    ///
    /// # Errors
    /// When nothing suitable is found (the message says how to train it) or loading fails.
    pub fn prepare(
        &mut self,
        options: &TextOptions,
        load: &LoadOptions,
        resolver: &Resolver,
        heads: Option<&Path>,
    ) -> Result<()> {
        if let Some(draft) = options.speculate.draft_model()
            && self.draft.is_none()
        {
            self.load_draft(&resolver.resolve_model(draft)?.path, load)?;
        }
        if options.layers == Layers::Router && self.routers.is_none() {
            let folder = drafting::find(resolver, heads, "router", &self.model)?;
            self.load_routers(&folder, load)?;
        }
        if let Some(kind) = options.speculate.heads()
            && self.heads(kind).is_none()
        {
            let folder = drafting::find(resolver, heads, kind.name(), &self.model)?;
            let found = self.load_heads(&folder, load)?;
            if found != kind {
                return Err(Error::Input(format!(
                    "{}: these are {} heads, and --speculate asks for {}",
                    folder.display(),
                    found.name(),
                    kind.name()
                )));
            }
        }
        // Heads make the best automatic choice where there are any.
        if options.speculate == Speculate::Auto && self.heads.is_empty() {
            for kind in drafting::PREFERRED {
                if let Ok(folder) = drafting::find(resolver, heads, kind.name(), &self.model) {
                    self.load_heads(&folder, load)?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// The loaded heads of a kind.
    pub fn heads(&self, kind: HeadKind) -> Option<&DraftHeads> {
        self.heads.iter().find(|h| h.kind() == kind)
    }

    /// The loaded draft model.
    pub fn draft(&self) -> Option<&CausalLm> {
        self.draft.as_ref()
    }

    /// The loaded routers.
    pub fn routers(&self) -> Option<&RouterFolder> {
        self.routers.as_ref()
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
        let mut sampling = options.to_sampling(&self.eos);
        let drafter = drafting::drafter(self, options, &mut sampling)?;
        let session = self.session(prompt, options, &sampling, drafter)?;
        TextStream::new(session, &self.tokenizer, &self.eos, prompt.len(), options)
    }

    /// A session of the target as `options` want it.
    fn session<'p>(
        &'p self,
        prompt: &[u32],
        options: &TextOptions,
        sampling: &Options,
        drafter: Option<Box<dyn Drafter + 'p>>,
    ) -> Result<Box<dyn Run + 'p>> {
        let selection = match options.layers {
            Layers::All => None,
            Layers::Even(n) => Some((LayerSelection::EvenlySpaced(n), None)),
            Layers::Router => {
                let folder = self.routers.as_ref().ok_or_else(|| {
                    Error::Input("no routers have been loaded: call load_routers first".into())
                })?;
                let policy = LayerSelection::Routed(folder.config.policy());
                Some((policy, Some(folder.routers.clone())))
            }
        };
        if let Some((selection, routers)) = selection {
            if options.speculate.heads() == Some(HeadKind::HiddenTransfer) {
                return Err(Error::Unsupported(
                    "hidden transfer runs through all layers: leave out --layers".into(),
                ));
            }
            let target = RoutedLm::new(&self.model, routers, &selection, Prefill::Full)?;
            return self.begin(target, prompt, options, sampling, drafter);
        }
        if let Some(DraftHeads::Transfer(transfer)) =
            options.speculate.heads().and_then(|kind| self.heads(kind))
        {
            let target = TransferLm::new(&self.model, transfer)?;
            return self.begin(target, prompt, options, sampling, drafter);
        }
        self.begin(&self.model, prompt, options, sampling, drafter)
    }

    fn begin<'p, M: TargetModel + 'p>(
        &'p self,
        target: M,
        prompt: &[u32],
        options: &TextOptions,
        sampling: &Options,
        drafter: Option<Box<dyn Drafter + 'p>>,
    ) -> Result<Box<dyn Run + 'p>> {
        let mut session = Session::new(target, sampling, prompt, drafter)?;
        if let Acceptance::Lantern { k, .. } = options.acceptance {
            if self.neighbours.get().is_none() {
                let made = drafting::EmbeddingNeighbours::new(&self.model, k)?;
                let _ = self.neighbours.set(Arc::new(made));
            }
            session = session.with_neighbours(self.neighbours.get().cloned());
        }
        Ok(Box::new(match &options.cancel {
            Some(flag) => session.cancelled_by(flag.clone()),
            None => session,
        }))
    }
}

pub(crate) fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
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
