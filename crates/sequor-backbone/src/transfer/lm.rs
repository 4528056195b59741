//! The decoder with pseudo rows, as a target of generation.

use super::attend::{Anchors, WithPseudo};
use super::maps::{Climb, HiddenTransfer};
use crate::CausalLm;
use crate::causal_lm::or_discard;
use crate::decoder::Input;
use sequor_kernels::cost::CostCurve;
use sequor_nn::attention::Cached;
use sequor_nn::{Error, Kind, KvCache, Result, Tensor};
use sequor_sampling::{LogitRows, Output, Step, TargetModel};

/// A model whose features are guesses at later tokens.
///
/// Logits and state are those of the model itself. The features of a row, when they are
/// asked for, are its `k` pseudo states after the final norm, one after the other:
/// `[rows, k * dim]`. Rows without pseudo rows have zeros: all but the last where only the
/// last row's logits are wanted (the prompt), and nodes beyond [`with_nodes`](Self::with_nodes).
#[derive(Debug)]
pub struct TransferLm<'m> {
    model: &'m CausalLm,
    transfer: &'m HiddenTransfer,
    nodes: usize,
}

impl<'m> TransferLm<'m> {
    /// `model` with the pseudo rows of `transfer`.
    ///
    /// # Errors
    /// [`Error::Config`] when the maps were made for a model of another shape.
    pub fn new(model: &'m CausalLm, transfer: &'m HiddenTransfer) -> Result<Self> {
        transfer.config().validate(model.config())?;
        Ok(Self {
            model,
            transfer,
            nodes: usize::MAX,
        })
    }

    /// Gives pseudo rows to the first `nodes` rows of a draft tree only, at least to the
    /// root. Where a later node is accepted, the next round has no draft.
    #[must_use]
    pub fn with_nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes.max(1);
        self
    }

    /// The model.
    pub fn model(&self) -> &'m CausalLm {
        self.model
    }

    /// The rows of a step that carry pseudo rows.
    fn anchors(&self, step: &Step<'_>) -> Vec<usize> {
        let rows = step.tokens.len();
        match step.logits {
            _ if !step.features => Vec::new(),
            LogitRows::None => Vec::new(),
            LogitRows::Last => (rows.saturating_sub(1)..rows).collect(),
            LogitRows::All => (0..rows.min(self.nodes)).collect(),
        }
    }

    fn run(&self, steps: &[Step<'_>], state: &mut KvCache) -> Result<Vec<Output>> {
        if !steps.iter().any(|s| s.features) {
            return self.model.run(steps, state);
        }
        let _no_grad = sequor_nn::tch::no_grad_guard();
        let decoder = self.model.decoder();
        let (ids, positions) = self.model.announce(steps, state)?;
        let rows = decoder.input_rows(&Input::Ids(&ids), &positions, 0.0)?;

        let (mut anchors, mut places, mut start) = (Vec::new(), Vec::new(), 0);
        for step in steps {
            let nodes = self.anchors(step);
            places.extend(nodes.iter().map(|n| start + n));
            start += step.tokens.len();
            if !nodes.is_empty() {
                let slot = step.slot;
                anchors.push(Anchors { slot, nodes });
            }
        }
        let at: Vec<i64> = places
            .iter()
            .filter_map(|&p| positions.get(p).copied())
            .collect();
        let real = positions.len();
        let slots: Vec<usize> = steps.iter().map(|s| s.slot).collect();
        let mut attend = WithPseudo::new(Cached::new(state, &slots), real, &anchors);
        if places.is_empty() {
            let last = decoder
                .forward_from(0, &rows, &positions, &mut attend, &[])?
                .last;
            let none = self.features(real as i64, &last)?;
            return self.outputs(steps, &last, &none);
        }
        let places: Vec<i64> = places.into_iter().map(|p| p as i64).collect();
        let places = Tensor::f_from_slice(&places)?.f_to_device(decoder.device())?;
        let climb = Climb {
            rows: Some(rows),
            positions: &positions,
            anchors: &at,
            attend: &mut attend,
        };
        let last = self.transfer.climb(decoder, climb, &|_, rows| {
            let rows = rows.ok_or_else(|| Error::Input("no rows to transfer from".into()))?;
            Ok(rows.f_index_select(0, &places)?)
        })?;
        let (k, n) = (self.transfer.config().offsets() as i64, at.len() as i64);
        let pseudo = last
            .f_narrow(0, real as i64, k * n)?
            .f_reshape([k, n, -1])?
            .f_transpose(0, 1)?
            .f_reshape([n, -1])?;
        let last = last.f_narrow(0, 0, real as i64)?;
        let features = if n == real as i64 {
            pseudo
        } else {
            let mut all = self.features(real as i64, &last)?;
            all.f_index_copy_(0, &places, &pseudo)?
        };
        self.outputs(steps, &last, &features)
    }

    /// Features of rows that carry no pseudo rows.
    fn features(&self, rows: i64, like: &Tensor) -> Result<Tensor> {
        let width = like.size().last().copied().unwrap_or(0);
        let k = self.transfer.config().offsets() as i64;
        Ok(Tensor::f_zeros(
            [rows, k * width],
            (Kind::Float, like.device()),
        )?)
    }

    /// The model's own outputs, with other features.
    fn outputs(&self, steps: &[Step<'_>], last: &Tensor, features: &Tensor) -> Result<Vec<Output>> {
        let plain: Vec<Step<'_>> = steps
            .iter()
            .map(|s| Step {
                features: false,
                ..*s
            })
            .collect();
        let mut outputs = self.model.outputs(&plain, last)?;
        let mut start = 0;
        for (step, output) in steps.iter().zip(&mut outputs) {
            let rows = step.tokens.len() as i64;
            if step.features {
                output.features = Some(features.f_narrow(0, start, rows)?);
            }
            start += rows;
        }
        Ok(outputs)
    }
}

impl TargetModel for TransferLm<'_> {
    type State = KvCache;

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_len(&self) -> usize {
        self.model.context_len()
    }

    fn new_state(&self, slots: usize) -> sequor_sampling::Result<KvCache> {
        self.model.new_state(slots)
    }

    fn forward(
        &self,
        steps: &[Step<'_>],
        state: &mut KvCache,
    ) -> sequor_sampling::Result<Vec<Output>> {
        or_discard(self.run(steps, state), steps, state)
    }

    fn cost_curve(&self) -> Option<CostCurve> {
        None // that of the model does not know the pseudo rows
    }
}
