//! Drafting with heads: from the target's states to a tree of tokens.

use super::expand::{EagleBranches, HydraBranches, MAX_DRAFT_ROWS, MedusaBranches, Nets, SLOT, nn};
use super::network::{Heads, Network};
use crate::CausalLm;
use sequor_nn::attention::Cached;
use sequor_nn::kv::{KvCache, KvShape};
use sequor_nn::{Kind, Tensor, tch};
use sequor_sampling::draft::{Budget, DraftContext, Drafter, StaticTree};
use sequor_sampling::{DraftTree, Error, Result, TargetModel, Topology, grow};

/// Rows per pass while a draft layer takes in a long prompt.
const CHUNK: usize = 512;

/// Drafts with heads beside the target that they were made for.
///
/// It reads the target's states ([`Drafter::wants_features`]) and keeps what follows from
/// them: the last state, and for Hydra++ and EAGLE the keys and values of their own layer,
/// which has only ever seen committed tokens. It notices by the tokens when it is carried to
/// another sequence. In a sequence whose beginning it has not seen (a resumed chat) the draft
/// layer starts with the states that it is given.
pub struct HeadDrafter<'m> {
    target: &'m CausalLm,
    heads: &'m Heads,
    topology: Topology,
    /// What trees of some size are worth by the heads' accuracies; none for chains.
    worth: Option<StaticTree>,
    memory: Memory,
}

/// What a drafter knows of its sequence.
#[derive(Default)]
struct Memory {
    /// The sequence at the last call.
    seen: Vec<u32>,
    /// What heads start from, `[1, dim]`: the target's last state, the prefix layer's, or
    /// EAGLE's guess at the state of the newest token.
    state: Option<Tensor>,
    /// Keys and values of the draft layer.
    cache: Option<KvCache>,
}

impl<'m> HeadDrafter<'m> {
    /// A drafter that grows trees of this shape; the budget of a proposal cuts them.
    ///
    /// # Errors
    /// `Config` when the heads do not fit `target` or lack the list of their draft tokens,
    /// `Input` when the topology is out of range.
    pub fn new(target: &'m CausalLm, heads: &'m Heads, topology: Topology) -> Result<Self> {
        topology.validate()?;
        let (c, t) = (heads.config(), target.config());
        if (c.hidden_size, c.vocab_size) != (t.embed_dim, t.vocab_size) {
            return Err(Error::Config(format!(
                "{} heads for states of {} and {} tokens do not fit a model with states of {} and {} tokens",
                c.kind.name(),
                c.hidden_size,
                c.vocab_size,
                t.embed_dim,
                t.vocab_size
            )));
        }
        if c.draft_vocab_size.is_some() && heads.vocabulary.is_none() {
            return Err(Error::Config(
                "these heads draft a part of the vocabulary and were not told which: call set_draft_tokens".into(),
            ));
        }
        let worth = topology.worth(&c.accuracies);
        Ok(Self {
            target,
            heads,
            topology,
            worth,
            memory: Memory::default(),
        })
    }

    /// The shape of its trees.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Takes in what the target has seen since the last call. False when nothing is known of
    /// the newest state.
    fn catch_up(&mut self, ctx: &DraftContext<'_>) -> Result<bool> {
        let dim = self.heads.config().hidden_size;
        let rows = match ctx.features.map(|f| f.size()) {
            None => 0,
            Some(size) => match size[..] {
                [rows, width] if width == dim && (rows as usize) < ctx.tokens.len() => {
                    rows as usize
                }
                _ => {
                    let what = format!(
                        "gave features {size:?} for a sequence of {} tokens and states of {dim}",
                        ctx.tokens.len()
                    );
                    return Err(Error::contract("the target", what));
                }
            },
        };
        // An error leaves an empty memory behind.
        let mut memory = std::mem::take(&mut self.memory);
        let follows = !memory.seen.is_empty()
            && memory.seen.len() + rows == ctx.tokens.len()
            && ctx.tokens.starts_with(&memory.seen);
        if !follows {
            (memory.state, memory.seen) = (None, Vec::new());
            if let Some(cache) = &mut memory.cache {
                cache.reset(SLOT)?;
            }
        }
        if let (Some(features), true) = (ctx.features, rows > 0) {
            let features = features.f_to_kind(Kind::Float).map_err(nn)?;
            self.take_in(&mut memory, &features, ctx.tokens)?;
        }
        let known = memory.state.is_some();
        if known {
            let common = memory.seen.len();
            memory
                .seen
                .extend(ctx.tokens.get(common..).unwrap_or_default());
            self.memory = memory;
        } else {
            self.memory.cache = memory.cache; // its storage serves the next sequence
        }
        Ok(known)
    }

    /// `features` `[rows, dim]` of the tokens before the newest one.
    fn take_in(&self, memory: &mut Memory, features: &Tensor, tokens: &[u32]) -> Result<()> {
        let rows = features.size().first().copied().unwrap_or(0) as usize;
        let newest = |x: &Tensor| -> Result<Tensor> {
            let n = x.size().first().copied().unwrap_or(0);
            Ok(x.f_narrow(0, n - 1, 1).map_err(nn)?)
        };
        let layer = match &self.heads.network {
            Network::Medusa(_) | Network::Hydra { prefix: None, .. } => {
                memory.state = Some(newest(features)?);
                return Ok(());
            }
            Network::Hydra {
                prefix: Some(layer),
                ..
            } => layer,
            Network::Eagle(eagle) => &eagle.layer,
        };
        let cache = match &mut memory.cache {
            Some(cache) => cache,
            none => none.insert(self.new_cache()?),
        };
        // Row `i` belongs to token `first + i`; EAGLE pairs it with the token after.
        let first = tokens.len() - 1 - rows;
        for start in (0..rows).step_by(CHUNK) {
            let n = CHUNK.min(rows - start);
            let place = first + start;
            let states = features.f_narrow(0, start as i64, n as i64).map_err(nn)?;
            let x = match &self.heads.network {
                Network::Eagle(eagle) => {
                    let next = tokens.get(place + 1..=place + n).unwrap_or_default();
                    eagle.pairs(&self.nets().embed(next)?, &states)?
                }
                _ => states,
            };
            let chain: Vec<Option<usize>> = (0..n).map(|i: usize| i.checked_sub(1)).collect();
            let positions: Vec<i64> = (place..place + n).map(|p| p as i64).collect();
            cache.begin(SLOT, &chain)?;
            let y = layer.forward(&x, &positions, &mut Cached::new(cache, &[SLOT]), 0.0)?;
            cache.commit(SLOT, &(0..n).collect::<Vec<_>>())?;
            memory.state = Some(newest(&y)?);
        }
        Ok(())
    }

    fn nets(&self) -> Nets<'m> {
        Nets {
            target: self.target,
            heads: self.heads,
        }
    }

    fn new_cache(&self) -> Result<KvCache> {
        let layer = self.heads.config().layer.as_ref();
        let layer = layer.ok_or_else(|| Error::Config("layer is missing".into()))?;
        let shape = KvShape {
            layers: 1,
            kv_heads: layer.kv_heads,
            head_dim: layer.head_dim,
            max_len: self.target.context_len().saturating_add(MAX_DRAFT_ROWS),
            device: self.target.decoder().device(),
        };
        Ok(KvCache::new(shape, 1)?)
    }
}

impl Drafter for HeadDrafter<'_> {
    fn name(&self) -> &str {
        self.heads.config().kind.name()
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let _no_grad = tch::no_grad_guard();
        let Some((&root, before)) = ctx.tokens.split_last() else {
            return Ok(DraftTree::new());
        };
        if !self.catch_up(ctx)? {
            return Ok(DraftTree::new());
        }
        let nets = self.nets();
        let limit = self.heads.config().heads.min(budget.depth);
        let Memory { state, cache, .. } = &mut self.memory;
        let Some(state) = state else {
            return Ok(DraftTree::new());
        };
        match (&self.heads.network, cache) {
            (Network::Medusa(heads), _) => {
                let heads = heads.get(..limit).unwrap_or_default();
                let mut branches = MedusaBranches::new(nets, heads, state);
                grow(&mut branches, &self.topology, budget)
            }
            (Network::Hydra { heads, .. }, _) => {
                let heads = heads.get(..limit).unwrap_or_default();
                let mut branches = HydraBranches::new(nets, heads, state, root);
                grow(&mut branches, &self.topology, budget)
            }
            (Network::Eagle(eagle), Some(cache)) => {
                let stable = cache.committed_len(SLOT);
                let mut branches = EagleBranches::new(nets, eagle, state, cache, before.len());
                let tree = grow(&mut branches, &self.topology, budget);
                // The layer's own guesses must not stay among what the target said.
                cache.truncate(SLOT, stable)?;
                tree
            }
            (Network::Eagle(_), None) => Ok(DraftTree::new()),
        }
    }

    fn reset(&mut self) {
        self.memory = Memory::default();
    }

    fn wants_features(&self) -> bool {
        true
    }

    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        self.worth.as_ref().map(|tree| tree.chances().to_vec())
    }
}
