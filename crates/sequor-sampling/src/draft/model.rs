//! A small model that drafts a chain.

use std::sync::Arc;

use sequor_kernels::rng::Purpose;

use super::{Budget, DraftContext, Drafter};
use crate::distribution::{Categorical, Law};
use crate::processors::{Context, LogitsProcessor, ProcessorList};
use crate::state::SequenceState;
use crate::target::{Layout, LogitRows, Step, TargetModel};
use crate::tree::{DraftTree, Proposal};
use crate::{Error, Result};

/// Rows per forward pass while the draft model catches up with the sequence.
const CHUNK: usize = 512;
/// The only slot of the draft model's state.
const SLOT: usize = 0;

/// How a draft model chooses its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftMode {
    /// The best token each time. Suits greedy and sampled targets; with a sampled
    /// target the output equals plain sampling token for token.
    #[default]
    Greedy,
    /// Drawn from the draft model's processed law, which is stored with the draft.
    /// Accepted more often by a sampled target.
    Sampled,
}

/// A small model that shares the target's vocabulary and drafts a chain of tokens.
///
/// It keeps a state of its own in step with the sequence: before drafting it drops what
/// was rejected and takes in what it has not seen, which after full acceptance includes
/// its own last draft.
pub struct DraftModel<M: TargetModel> {
    model: M,
    state: M::State,
    /// Tokens behind the committed rows of `state`.
    seen: Vec<u32>,
    mode: DraftMode,
    processors: ProcessorList,
    min_confidence: f64,
}

impl<M: TargetModel> DraftModel<M> {
    /// A drafter around `model`.
    ///
    /// # Errors
    /// When the state cannot be allocated.
    pub fn new(model: M, mode: DraftMode) -> Result<Self> {
        let state = model.new_state(1)?;
        let processors = ProcessorList::default();
        Ok(Self {
            model,
            state,
            seen: Vec::new(),
            mode,
            processors,
            min_confidence: 0.0,
        })
    }

    /// Shapes the draft law. Those of the target are a good choice; any others only
    /// change how many drafts are accepted.
    #[must_use]
    pub fn with_processors(mut self, processors: ProcessorList) -> Self {
        self.processors = processors;
        self
    }

    /// Stops a draft before a token whose largest probability is below `min`.
    ///
    /// # Errors
    /// `Input` when `min` is not in `[0, 1]`.
    pub fn with_min_confidence(mut self, min: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&min) {
            return Err(Error::input("min_confidence", min, "a number in [0, 1]"));
        }
        self.min_confidence = min;
        Ok(self)
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Feeds what the state has not seen of `tokens`; gives the logits after the last.
    fn catch_up(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        if self.state.committed_len(SLOT) != self.seen.len() {
            self.reset_state()?;
        }
        let common = self
            .seen
            .iter()
            .zip(tokens)
            .take_while(|(a, b)| a == b)
            .count();
        // At least one token has to be fed to obtain logits.
        let keep = common.min(tokens.len().saturating_sub(1));
        if keep < self.seen.len() {
            match self.state.truncate(SLOT, keep) {
                Ok(()) => self.seen.truncate(keep),
                // A recurrent state cannot go back: start over.
                Err(Error::Unsupported(_)) => self.reset_state()?,
                Err(e) => return Err(e),
            }
        }
        let fresh = tokens.get(self.seen.len()..).unwrap_or_default();
        let mut logits = Vec::new();
        for chunk in fresh.chunks(CHUNK) {
            logits = self.feed(chunk)?;
        }
        Ok(logits)
    }

    /// Feeds and commits `tokens`; gives the logits after the last.
    fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let step = Step {
            slot: SLOT,
            tokens,
            layout: Layout::Chain,
            logits: LogitRows::Last,
            features: false,
        };
        let output = self.model.forward(&[step], &mut self.state)?.pop();
        let path: Vec<usize> = (0..tokens.len()).collect();
        self.state.commit(SLOT, &path)?;
        self.seen.extend_from_slice(tokens);
        let row = output.as_ref().and_then(|o| o.logits.row(0));
        row.map(<[f32]>::to_vec)
            .ok_or_else(|| Error::contract("the draft model", "gave no logits"))
    }

    fn reset_state(&mut self) -> Result<()> {
        self.seen.clear();
        self.state.reset(SLOT)
    }

    /// Drafts behind `tokens`, which grows by what is drafted.
    fn draft(
        &mut self,
        ctx: &DraftContext<'_>,
        tokens: &mut Vec<u32>,
        depth: usize,
    ) -> Result<DraftTree> {
        let mut tree = DraftTree::new();
        let mut logits = self.catch_up(tokens)?;
        loop {
            let around = Context {
                tokens: tokens.as_slice(),
                prompt_len: ctx.prompt_len,
                unconditional: None,
                max_length: Some(ctx.max_length),
            };
            self.processors.process(&around, &mut logits)?;
            let law = Categorical::from_scores(logits).map_err(|e| e.at_position(tokens.len()))?;
            let (best, confidence) = law.mode();
            if confidence < self.min_confidence {
                return Ok(tree);
            }
            let parent = tree.len().checked_sub(1);
            let token = match self.mode {
                DraftMode::Greedy => {
                    tree.push(parent, best, Proposal::OneHot)?;
                    best
                }
                DraftMode::Sampled => {
                    let token =
                        law.sample(&mut ctx.key.stream(tokens.len() as u64, Purpose::Draft));
                    tree.push(parent, token, Proposal::Law(Arc::new(law)))?;
                    token
                }
            };
            tokens.push(token);
            if tree.len() >= depth || ctx.eos.contains(&token) {
                return Ok(tree);
            }
            logits = self.feed(&[token])?;
        }
    }
}

impl<M: TargetModel> Drafter for DraftModel<M> {
    fn name(&self) -> &str {
        "draft-model"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        // The last draft is not fed, so `room` rows allow one more draft.
        let room = (self.model.context_len() + 1).saturating_sub(ctx.tokens.len());
        let depth = budget.depth.min(budget.nodes).min(room);
        if depth == 0 || ctx.tokens.is_empty() {
            return Ok(DraftTree::new());
        }
        let drafted = self.draft(ctx, &mut ctx.tokens.to_vec(), depth);
        if drafted.is_err() {
            // Whatever failed, the next call starts from a clean state.
            self.state.discard(SLOT)?;
            self.reset_state()?;
        }
        drafted
    }

    fn reset(&mut self) {
        self.seen.clear();
        // Should this fail, `catch_up` notices that rows are left and reports it.
        let _ = self.state.reset(SLOT);
    }

    fn is_random(&self) -> bool {
        self.mode == DraftMode::Sampled
    }
}
