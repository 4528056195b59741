//! What a request may ask for.

use serde::{Deserialize, Serialize};

use super::depth::DepthPolicy;
use crate::config::GenerationConfig;
use crate::mirostat::{Mirostat, MirostatConfig};
use crate::processors::{Processor, ProcessorList};
use crate::verify::Acceptance;
use crate::{Error, Result};

/// Options of one request. Serialisable, so that a run can be printed and repeated.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Sampling, lengths and end-of-sequence, under the published names.
    pub config: GenerationConfig,
    /// Processors in an order of the user's own instead of those of `config`.
    pub processors: Option<ProcessorList>,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Number of the request: requests with one seed and different numbers are independent.
    pub request: u64,
    /// Further tokens that end the sequence.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at end-of-sequence.
    pub ignore_eos: bool,
    /// How deep to draft.
    pub depth: DepthPolicy,
    /// Most nodes of a draft tree. `None` for as many as pay best where the drafter knows
    /// what they are worth ([`Drafter::chances`]), and else for one per level, which
    /// is a chain.
    ///
    /// [`Drafter::chances`]: crate::Drafter::chances
    pub draft_nodes: Option<usize>,
    /// When a draft is accepted.
    pub acceptance: Acceptance,
    /// Mirostat instead of the truncations of `config`.
    pub mirostat: Option<MirostatConfig>,
    /// Rows of the prompt per forward pass, at least 1. Cancellation is noticed between
    /// passes.
    pub prefill_chunk: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config: GenerationConfig::default(),
            processors: None,
            seed: 0,
            request: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            depth: DepthPolicy::default(),
            draft_nodes: None,
            acceptance: Acceptance::Exact,
            mirostat: None,
            prefill_chunk: 512,
        }
    }
}

impl From<GenerationConfig> for Options {
    fn from(config: GenerationConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Options {
    /// Sets the seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the number of the request.
    #[must_use]
    pub fn request(mut self, request: u64) -> Self {
        self.request = request;
        self
    }

    /// Sets the largest number of new tokens.
    #[must_use]
    pub fn max_new_tokens(mut self, tokens: usize) -> Self {
        self.config.max_new_tokens = Some(tokens);
        self
    }

    /// Fixes the number of nodes of a draft tree.
    #[must_use]
    pub fn draft_nodes(mut self, nodes: usize) -> Self {
        self.draft_nodes = Some(nodes);
        self
    }

    /// Sets the rule of acceptance.
    #[must_use]
    pub fn acceptance(mut self, acceptance: Acceptance) -> Self {
        self.acceptance = acceptance;
        self
    }

    /// Sets the depth policy.
    #[must_use]
    pub fn depth(mut self, depth: DepthPolicy) -> Self {
        self.depth = depth;
        self
    }

    /// Checks everything that can be checked without a prompt.
    ///
    /// # Errors
    /// `Input` or `Config` naming the option; `Unsupported` for guidance, which is the
    /// model's business here.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        self.config.validate(vocab)?;
        self.depth.validate()?;
        if self.prefill_chunk == 0 {
            return Err(Error::input("prefill_chunk", 0, "at least 1"));
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input(
                "stop_token_ids",
                id,
                format!("ids below the vocabulary size {vocab}"),
            ));
        }
        self.acceptance.validate()?;
        if self
            .processor_list()?
            .iter()
            .any(|p| matches!(p, Processor::Guidance { .. }))
        {
            let message =
                "guidance_scale needs a second, unconditional branch, which this loop does not run";
            return Err(Error::Unsupported(message.to_owned()));
        }
        if let Some(config) = self.mirostat {
            Mirostat::new(config)?;
            if matches!(self.acceptance, Acceptance::Typical { .. }) {
                let message = "typical acceptance looks at several continuations at once, \
                               Mirostat's bound follows a single one";
                return Err(Error::Unsupported(message.to_owned()));
            }
            if self.config.is_greedy() {
                let message = "Mirostat chooses among several tokens: set do_sample and a temperature above 0";
                return Err(Error::Config(message.to_owned()));
            }
        }
        Ok(())
    }

    /// The processors that apply.
    pub(super) fn processor_list(&self) -> Result<ProcessorList> {
        let list = match &self.processors {
            Some(list) => list.clone(),
            None => ProcessorList::from_config(&self.config)?,
        };
        Ok(if self.mirostat.is_some() {
            list.without_truncation()
        } else {
            list
        })
    }
}
