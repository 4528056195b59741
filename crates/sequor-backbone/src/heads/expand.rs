//! Heads as sources of ranked continuations.

use super::network::{Eagle, Head, Heads};
use crate::CausalLm;
use sequor_kernels::select::{log_sum_exp, top_n};
use sequor_nn::attention::{Attend, Call};
use sequor_nn::kv::KvCache;
use sequor_nn::linear::Linear;
use sequor_nn::mask::additive;
use sequor_nn::{Tensor, tch};
use sequor_sampling::tree::path_to;
use sequor_sampling::{DraftTree, Error, Expander, Result};
use std::collections::HashMap;

/// Rows that one draft may add to the state of an EAGLE layer.
pub(super) const MAX_DRAFT_ROWS: usize = 4096;
/// The only slot of a draft layer's state.
pub(super) const SLOT: usize = 0;

/// For every node its continuations (token, log-probability), best first.
type Continuations = Vec<Vec<(u32, f32)>>;

/// An error of libtorch as one of this workspace's.
pub(super) fn nn(e: tch::TchError) -> sequor_nn::Error {
    e.into()
}

/// The target, whose embedding and output head are shared, and the heads.
#[derive(Clone, Copy)]
pub(super) struct Nets<'a> {
    pub target: &'a CausalLm,
    pub heads: &'a Heads,
}

impl<'a> Nets<'a> {
    /// Embeddings `[tokens, dim]`.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
        Ok(self.target.decoder().embed(&self.index(&ids)?)?)
    }

    fn index(&self, numbers: &[i64]) -> Result<Tensor> {
        let device = self.target.decoder().device();
        Ok(Tensor::f_from_slice(numbers)
            .and_then(|t| t.f_to_device(device))
            .map_err(nn)?)
    }

    /// The output matrix of heads that have none of their own.
    fn output(&self) -> &'a Linear {
        match &self.heads.vocabulary {
            Some(v) => &v.head,
            None => self.target.decoder().head(),
        }
    }

    /// The best `k` tokens of every row of `logits` `[rows, draft vocabulary]`.
    fn rank(&self, logits: &Tensor, k: usize) -> Result<Continuations> {
        let width = logits.size().last().copied().unwrap_or(0).max(1) as usize;
        let scores: Vec<f32> = sequor_kernels::bridge::to_vec(logits)
            .map_err(|e| Error::Backend(format!("scores of draft heads: {e}")))?;
        let tokens = self.heads.draft_tokens();
        let target_id = |draft: usize| match tokens {
            Some(tokens) => tokens.get(draft).copied().unwrap_or_default(),
            None => draft as u32,
        };
        scores
            .chunks_exact(width)
            .map(|row| {
                let total = log_sum_exp(row);
                if !total.is_finite() {
                    let who = format!("the {} heads", self.heads.config().kind.name());
                    let what =
                        format!("gave scores whose sum of exponentials has the logarithm {total}");
                    return Err(Error::contract(who, what));
                }
                let best = top_n(row, k).into_iter();
                Ok(best
                    .map(|(id, score)| (target_id(id), (f64::from(score) - total) as f32))
                    .collect())
            })
            .collect()
    }
}

/// Embeddings of the tokens of one proposal, each looked up once: where the target's table is
/// stored by columns, for the sake of its output head, a lookup is slow.
struct Embeds<'a> {
    nets: Nets<'a>,
    place: HashMap<u32, i64>,
    /// `[known tokens, dim]`.
    rows: Option<Tensor>,
}

impl<'a> Embeds<'a> {
    fn new(nets: Nets<'a>) -> Self {
        Self {
            nets,
            place: HashMap::new(),
            rows: None,
        }
    }

    /// `[tokens, dim]`.
    fn get(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let mut new = Vec::new();
        let mut wanted = Vec::with_capacity(tokens.len());
        for &token in tokens {
            let next = self.place.len() as i64;
            wanted.push(*self.place.entry(token).or_insert_with(|| {
                new.push(token);
                next
            }));
        }
        if !new.is_empty() {
            let found = self.nets.embed(&new)?;
            self.rows = Some(match &self.rows {
                Some(rows) => Tensor::f_cat(&[rows, &found], 0).map_err(nn)?,
                None => found,
            });
        }
        match &self.rows {
            Some(rows) => Ok(rows
                .f_index_select(0, &self.nets.index(&wanted)?)
                .map_err(nn)?),
            None => self.nets.embed(&[]),
        }
    }
}

/// The tokens from the root's child to `node`; none for the root.
fn path(tree: &DraftTree, node: Option<usize>) -> Vec<u32> {
    let nodes = node.map_or(Vec::new(), |n| path_to(tree.parents(), n));
    let token = |n: usize| tree.units().get(n).copied();
    nodes.into_iter().filter_map(token).collect()
}

/// Depth of the continuations of `frontier`: 0 for the root's.
fn depth(tree: &DraftTree, frontier: &[Option<usize>]) -> usize {
    let node = frontier.first().copied().flatten();
    node.map_or(0, |n| path_to(tree.parents(), n).len())
}

/// Medusa: the ranks of each depth are the same under every node.
pub(super) struct MedusaBranches<'a> {
    nets: Nets<'a>,
    heads: &'a [Head],
    state: &'a Tensor,
    /// Scores of all heads `[heads, draft vocabulary]`, once they are made.
    logits: Option<Tensor>,
}

impl<'a> MedusaBranches<'a> {
    /// `state`: `[1, dim]`.
    pub fn new(nets: Nets<'a>, heads: &'a [Head], state: &'a Tensor) -> Self {
        Self {
            nets,
            heads,
            state,
            logits: None,
        }
    }

    /// All heads at once: a shared output matrix is read once for all of them.
    fn logits(&self) -> Result<Tensor> {
        let dim = self.nets.heads.config().hidden_size;
        let states = self.heads.iter().map(|h| h.forward(self.state, dim, 0.0));
        let states: Vec<Tensor> = states.collect::<sequor_nn::Result<_>>()?;
        let own: Vec<&Linear> = self
            .heads
            .iter()
            .filter_map(|h| h.output.as_ref())
            .collect();
        if own.is_empty() {
            let states = Tensor::f_cat(&states, 0).map_err(nn)?;
            return Ok(self.nets.output().forward(&states)?);
        }
        let rows = own.iter().zip(&states).map(|(w, x)| w.forward(x));
        let rows: Vec<Tensor> = rows.collect::<sequor_nn::Result<_>>()?;
        Ok(Tensor::f_cat(&rows, 0).map_err(nn)?)
    }
}

impl Expander for MedusaBranches<'_> {
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Continuations> {
        let depth = depth(tree, frontier);
        if depth >= self.heads.len() {
            return Ok(vec![Vec::new(); frontier.len()]);
        }
        let logits = match &self.logits {
            Some(logits) => logits.shallow_clone(),
            None => {
                let made = self.logits()?;
                self.logits = Some(made.shallow_clone());
                made
            }
        };
        let row = logits.f_narrow(0, depth as i64, 1).map_err(nn)?;
        let list = self.nets.rank(&row, k)?.pop().unwrap_or_default();
        Ok(vec![list; frontier.len()])
    }

    fn max_depth(&self) -> usize {
        self.heads.len()
    }
}

/// Hydra: every node is continued from the state and the tokens of its own path.
pub(super) struct HydraBranches<'a> {
    nets: Nets<'a>,
    heads: &'a [Head],
    state: &'a Tensor,
    root: u32,
    embeds: Embeds<'a>,
}

impl<'a> HydraBranches<'a> {
    /// `state`: `[1, dim]`; `root` is the newest token.
    pub fn new(nets: Nets<'a>, heads: &'a [Head], state: &'a Tensor, root: u32) -> Self {
        Self {
            nets,
            heads,
            state,
            root,
            embeds: Embeds::new(nets),
        }
    }
}

impl Expander for HydraBranches<'_> {
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Continuations> {
        let depth = depth(tree, frontier);
        let Some(head) = self.heads.get(depth) else {
            return Ok(vec![Vec::new(); frontier.len()]);
        };
        let mut tokens = Vec::with_capacity(frontier.len() * (depth + 1));
        for &node in frontier {
            tokens.push(self.root);
            tokens.extend(path(tree, node));
        }
        let (rows, dim) = (frontier.len() as i64, self.nets.heads.config().hidden_size);
        let embeds = self.embeds.get(&tokens)?;
        let embeds = embeds.f_reshape([rows, -1]).map_err(nn)?;
        let states = self.state.f_expand([rows, dim], false).map_err(nn)?;
        let inputs = Tensor::f_cat(&[&states, &embeds], -1).map_err(nn)?;
        let y = head.forward(&inputs, dim, 0.0)?;
        let output = head.output.as_ref().unwrap_or(self.nets.output());
        self.nets.rank(&output.forward(&y)?, k)
    }

    fn max_depth(&self) -> usize {
        self.heads.len()
    }
}

/// EAGLE: every node becomes a row of the draft layer, which sees the committed rows and the
/// node's ancestors, and predicts the state that the node is continued from.
pub(super) struct EagleBranches<'a> {
    nets: Nets<'a>,
    eagle: &'a Eagle,
    cache: &'a mut KvCache,
    /// Committed rows.
    stable: usize,
    /// Position of a child of the root.
    place: usize,
    embeds: Embeds<'a>,
    /// Row of each node that was expanded.
    row_of: HashMap<usize, usize>,
    /// Parents of the rows, as rows.
    parents: Vec<Option<usize>>,
    /// Predicted states `[1 + rows, dim]`, the root's first.
    states: Tensor,
}

impl<'a> EagleBranches<'a> {
    /// `state`: `[1, dim]`, predicted for the newest token, which stands at `place`. Rows are
    /// added to `cache`; the caller removes them.
    pub fn new(
        nets: Nets<'a>,
        eagle: &'a Eagle,
        state: &Tensor,
        cache: &'a mut KvCache,
        place: usize,
    ) -> Self {
        Self {
            nets,
            eagle,
            stable: cache.committed_len(SLOT),
            cache,
            place,
            embeds: Embeds::new(nets),
            row_of: HashMap::new(),
            parents: Vec::new(),
            states: state.shallow_clone(),
        }
    }

    /// Runs new rows of one depth through the layer; gives their predicted states.
    fn run(&mut self, tree: &DraftTree, nodes: &[usize], depth: usize) -> Result<Tensor> {
        let known = self.parents.len();
        let mut tokens = Vec::with_capacity(nodes.len());
        let mut read: Vec<i64> = Vec::with_capacity(nodes.len());
        for (i, &node) in nodes.iter().enumerate() {
            let parent = tree.parents().get(node).copied().flatten();
            let parent = parent.and_then(|p| self.row_of.get(&p).copied());
            read.push(parent.map_or(0, |row| row as i64 + 1));
            tokens.extend(tree.units().get(node));
            self.parents.push(parent);
            self.row_of.insert(node, known + i);
        }
        let device = self.states.device();
        let read = self.nets.index(&read)?;
        let read = self.states.f_index_select(0, &read).map_err(nn)?;
        let x = self.eagle.pairs(&self.embeds.get(&tokens)?, &read)?;

        let lineages: Vec<Vec<usize>> = (known..self.parents.len())
            .map(|row| path_to(&self.parents, row))
            .collect();
        let stable = self.stable;
        let sees = |i: usize, j: usize| {
            j < stable || lineages.get(i).is_some_and(|l| l.contains(&(j - stable)))
        };
        let mask = additive(nodes.len(), stable + self.parents.len(), device, sees)?;
        // Who sees whom is said by the mask: to the cache the rows are a chain.
        let chain: Vec<Option<usize>> = (0..nodes.len()).map(|i| i.checked_sub(1)).collect();
        self.cache.begin(SLOT, &chain)?;
        let positions = vec![(self.place + depth) as i64 - 1; nodes.len()];
        let mut attend = TreeRows {
            cache: self.cache,
            mask,
        };
        let y = self.eagle.layer.forward(&x, &positions, &mut attend, 0.0)?;
        let all: Vec<usize> = (0..nodes.len()).collect();
        self.cache.commit(SLOT, &all)?;
        self.states = Tensor::f_cat(&[&self.states, &y], 0).map_err(nn)?;
        Ok(y)
    }
}

impl Expander for EagleBranches<'_> {
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Continuations> {
        let mut nodes: Vec<usize> = frontier.iter().copied().flatten().collect();
        let states = if nodes.is_empty() {
            self.states.f_narrow(0, 0, 1).map_err(nn)?
        } else {
            let room = MAX_DRAFT_ROWS.saturating_sub(self.parents.len());
            nodes.truncate(room);
            if nodes.is_empty() {
                return Ok(vec![Vec::new(); frontier.len()]);
            }
            self.run(tree, &nodes, depth(tree, frontier))?
        };
        let mut lists = self.nets.rank(&self.nets.output().forward(&states)?, k)?;
        lists.resize(frontier.len(), Vec::new());
        Ok(lists)
    }

    fn max_depth(&self) -> usize {
        usize::MAX
    }
}

/// Rows of a draft tree behind the committed rows of a cache.
struct TreeRows<'a> {
    cache: &'a mut KvCache,
    /// `[rows, committed + rows]`.
    mask: Tensor,
}

impl Attend for TreeRows<'_> {
    fn attend(
        &mut self,
        call: Call,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> sequor_nn::Result<Tensor> {
        self.cache.append(SLOT, call.layer, k, v)?;
        let (keys, values) = self.cache.view(SLOT, call.layer)?;
        let out = Tensor::f_scaled_dot_product_attention(
            &q.f_transpose(0, 1)?.f_unsqueeze(0)?,
            &keys.f_unsqueeze(0)?,
            &values.f_unsqueeze(0)?,
            Some(&self.mask),
            0.0,
            false,
            call.scale,
            q.size().get(1) != k.size().get(1),
        )?;
        let rows = q.size().first().copied().unwrap_or(0);
        Ok(out
            .f_squeeze_dim(0)?
            .f_transpose(0, 1)?
            .f_reshape([rows, -1])?)
    }
}
