//! Draft trees from pseudo states.

use super::maps::HiddenTransfer;
use crate::CausalLm;
use sequor_kernels::bridge;
use sequor_nn::linear::Linear;
use sequor_nn::{Kind, Tensor};
use sequor_sampling::draft::{Budget, DraftContext, Drafter, StaticTree};
use sequor_sampling::{DraftTree, Error, Expander, Result, Topology, grow};

/// Drafts from the features of a [`TransferLm`](super::TransferLm): offset `j` gives one
/// ranked list for depth `j`, whatever the path, as Medusa heads do.
#[derive(Debug)]
pub struct TransferDrafter<'m> {
    model: &'m CausalLm,
    transfer: &'m HiddenTransfer,
    /// The model's head cut to the draft tokens.
    head: Option<Linear>,
    topology: Topology,
    /// What trees of some size are worth by the measured accuracies; none for chains.
    worth: Option<StaticTree>,
}

impl<'m> TransferDrafter<'m> {
    /// A drafter of trees of this shape.
    ///
    /// # Errors
    /// When the model's head cannot be cut to the draft tokens, or the shape is out of range.
    pub fn new(
        model: &'m CausalLm,
        transfer: &'m HiddenTransfer,
        topology: Topology,
    ) -> Result<Self> {
        topology.validate()?;
        let head = match transfer.draft_tokens() {
            Some(tokens) => Some(model.decoder().head().select_outputs(tokens)?),
            None => None,
        };
        let worth = topology.worth(&transfer.config().accuracies);
        Ok(Self {
            model,
            transfer,
            head,
            topology,
            worth,
        })
    }

    /// Log-probabilities `[depth, draft vocabulary]` from the newest features; `None` when
    /// they hold no guess.
    fn laws(&self, features: &Tensor, depth: usize) -> Result<Option<Tensor>> {
        let offsets = self.transfer.config().offsets() as i64;
        let width = self.model.config().embed_dim;
        let [rows, found] = features.size()[..] else {
            return Err(self.unfit(features));
        };
        if rows == 0 || found != offsets * width {
            return Err(self.unfit(features));
        }
        let states = || -> sequor_nn::Result<Option<Tensor>> {
            let newest = features.f_narrow(0, rows - 1, 1)?;
            if newest.f_abs()?.f_max()?.f_double_value(&[])? == 0.0 {
                return Ok(None);
            }
            let states = newest.f_reshape([offsets, width])?;
            let states = states.f_narrow(0, 0, offsets.min(depth as i64))?;
            let scores = match &self.head {
                Some(head) => head.forward(&states)?,
                None => self.model.decoder().logits(&states)?,
            };
            Ok(Some(scores.f_log_softmax(-1, Kind::Float)?))
        };
        Ok(states()?)
    }

    fn unfit(&self, features: &Tensor) -> Error {
        Error::contract(
            "the target",
            format!(
                "gave features of shape {:?}, and hidden transfer needs rows of {} x {}: generate with `TransferLm`",
                features.size(),
                self.transfer.config().offsets(),
                self.model.config().embed_dim
            ),
        )
    }
}

/// One ranked list per depth.
struct Ranks<'a> {
    laws: Tensor,
    depth: usize,
    tokens: Option<&'a [u32]>,
}

impl Ranks<'_> {
    fn list(&self, depth: usize, k: usize) -> Result<Vec<(u32, f32)>> {
        let best = || -> sequor_nn::Result<(Tensor, Tensor)> {
            let law = self.laws.f_select(0, depth as i64)?;
            let k = (k as i64).min(law.size().first().copied().unwrap_or(0));
            Ok(law.f_topk(k, 0, true, true)?)
        };
        let (chances, ids) = best()?;
        let unread = |e: bridge::BridgeError| Error::contract("libtorch", e.to_string());
        let chances: Vec<f32> = bridge::to_vec(&chances).map_err(unread)?;
        let ids: Vec<i64> = bridge::to_vec(&ids).map_err(unread)?;
        let token = |id: i64| match self.tokens {
            Some(tokens) => tokens.get(id as usize).copied(),
            None => u32::try_from(id).ok(),
        };
        let pairs = ids.into_iter().zip(chances);
        Ok(pairs.filter_map(|(id, p)| Some((token(id)?, p))).collect())
    }
}

impl Expander for Ranks<'_> {
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let mut depth = 0;
        let mut node = frontier.first().copied().flatten();
        while let Some(n) = node {
            depth += 1;
            node = tree.parents().get(n).copied().flatten();
        }
        let list = self.list(depth, k)?;
        Ok(vec![list; frontier.len()])
    }

    fn max_depth(&self) -> usize {
        self.depth
    }
}

impl Drafter for TransferDrafter<'_> {
    fn name(&self) -> &str {
        "hidden-transfer"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let Some(features) = ctx.features else {
            return Ok(DraftTree::new());
        };
        let depth = budget.depth.min(self.transfer.config().offsets());
        let laws = match self.laws(features, depth)? {
            Some(laws) if depth > 0 => laws,
            _ => return Ok(DraftTree::new()),
        };
        let mut ranks = Ranks {
            laws,
            depth,
            tokens: self.transfer.draft_tokens(),
        };
        grow(&mut ranks, &self.topology, budget)
    }

    fn reset(&mut self) {}

    fn wants_features(&self) -> bool {
        true
    }

    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        self.worth.as_ref().map(|tree| tree.chances().to_vec())
    }
}
