//! A model that decodes with some of its layers.

use std::rc::Rc;

use sequor_nn::attention::{Attend, Cached, Call, JointRows};
use sequor_nn::block::Pass;
use sequor_nn::{Error, Result, Tensor};
use sequor_sampling::{LogitRows, Output, Step, TargetModel};

use super::Routers;
use super::policy::{LayerScore, LayerSelection, Prefill};
use super::state::{Pending, Phase, Plan, RoutedState};
use crate::CausalLm;
use crate::decoder::Input;

/// A [`CausalLm`] that decodes with the layers of a [`LayerSelection`].
///
/// The prompt ends with the first pass that asks for logits. Its layers are chosen then and
/// stay for the sequence; what is said later, also by a user in the next turn of a chat, goes
/// through the chosen layers. Positions are those of the tokens, whatever is left out.
///
/// With [`Prefill::Full`] a prompt may come in parts. With [`Prefill::Gated`] and routers it
/// must come in one pass, because a layer is chosen before it runs.
///
/// Rows of a batch may run through different layers: each layer runs on the rows of the slots
/// that keep it.
#[derive(Debug)]
pub struct RoutedLm<'m> {
    model: &'m CausalLm,
    routers: Option<Routers>,
    plan: Rc<Plan>,
    prefill: Prefill,
}

impl<'m> RoutedLm<'m> {
    /// `routers` are needed for [`LayerSelection::Routed`], and otherwise give the scores for
    /// reports.
    ///
    /// # Errors
    /// [`Error::Config`] when routers are missing or of another model, or the selection does
    /// not fit the number of layers.
    pub fn new(
        model: &'m CausalLm,
        routers: Option<Routers>,
        selection: &LayerSelection,
        prefill: Prefill,
    ) -> Result<Self> {
        let c = model.config();
        if let Some(r) = &routers
            && (r.layers() != c.layers || r.dim() != c.dim)
        {
            return Err(Error::Config(format!(
                "routers for {} layers of width {}, the model has {} of width {}",
                r.layers(),
                r.dim(),
                c.layers,
                c.dim
            )));
        }
        let plan = match (selection, selection.gates(c.layers)?) {
            (_, Some(gates)) => Plan::Fixed(gates),
            (LayerSelection::Routed(policy), None) => {
                policy.validate(c.layers, prefill)?;
                if routers.is_none() {
                    return Err(Error::Config(
                        "layers are to be chosen by routers, and none were given".into(),
                    ));
                }
                Plan::Routed(*policy)
            }
            (other, None) => {
                return Err(Error::Config(format!("{other:?} names no layers")));
            }
        };
        Ok(Self {
            model,
            routers,
            plan: Rc::new(plan),
            prefill,
        })
    }

    /// The model.
    pub fn base(&self) -> &'m CausalLm {
        self.model
    }

    fn run(&self, steps: &[Step<'_>], state: &mut RoutedState) -> Result<Vec<Output>> {
        let _no_grad = sequor_nn::tch::no_grad_guard();
        let mut parts = self.announce(steps, state)?;
        let decoder = self.model.decoder();
        let ids: Vec<&Tensor> = parts.ids.iter().collect();
        let ids = Tensor::f_cat(&ids, 0)?;
        let mut rows = decoder.input_rows(&Input::Ids(&ids), &parts.positions, 0.0)?;
        let layers = self.model.config().layers;
        let scored = parts.spans.iter().any(|s| s.scored);
        let mut layer = 0;
        while layer < layers {
            if scored {
                self.score(layer, &rows, &mut parts.spans)?;
            }
            let active = parts.active(layer);
            let mut run = vec![layer];
            layer += 1;
            if active.is_empty() {
                continue;
            }
            // Layers that run for the same rows run together.
            while !scored && layer < layers {
                let next = parts.active(layer);
                if !next.is_empty() && next != active {
                    break;
                }
                run.extend((!next.is_empty()).then_some(layer));
                layer += 1;
            }
            rows = self.layers(&run, &active, rows, &parts, state)?;
        }
        let mut hidden = decoder.finish(&rows)?;
        if let Some(index) = parts.back()? {
            hidden = hidden.f_index_select(0, &index.f_to_device(hidden.device())?)?;
        }
        let outputs = self.model.outputs(steps, &hidden)?;
        for span in parts.spans {
            if let Some(slot) = state.slots.get_mut(span.slot) {
                slot.pending = span.pending;
            }
        }
        Ok(outputs)
    }

    /// Makes the rows of all steps pending, those of unfinished prompts first.
    fn announce(&self, steps: &[Step<'_>], state: &mut RoutedState) -> Result<Parts> {
        let layers = self.model.config().layers;
        let (apart, rest): (Vec<usize>, Vec<usize>) =
            (0..steps.len()).partition(|&i| steps.get(i).is_some_and(|s| state.apart(s.slot)));
        let mut parts = Parts {
            apart: apart.len(),
            ids: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
        };
        for (group, prompts) in [(&apart, true), (&rest, false)] {
            let group: Vec<Step<'_>> = group
                .iter()
                .filter_map(|&i| steps.get(i))
                .copied()
                .collect();
            if group.is_empty() && !steps.is_empty() {
                continue;
            }
            let cache = if prompts {
                &mut state.prompts
            } else {
                &mut state.main
            };
            let (ids, positions) = self.model.announce(&group, cache)?;
            parts.ids.push(ids);
            parts.positions.extend(positions);
        }
        let mut start = 0;
        for index in apart.into_iter().chain(rest) {
            let Some(step) = steps.get(index) else {
                continue;
            };
            let rows = step.tokens.len();
            let slot = state.slots.get(step.slot);
            let prompt = slot.is_some_and(|s| s.phase == Phase::Prompt);
            let ends = prompt && step.logits != LogitRows::None;
            let gated = self.prefill == Prefill::Gated && prompt;
            if gated && !(ends && state.main.committed_len(step.slot) == 0) {
                return Err(Error::Config(
                    "gated prefill needs the whole prompt in one pass: raise prefill_chunk to its length, or use full prefill".into(),
                ));
            }
            let scored = prompt && self.routers.is_some();
            let gates = match slot {
                Some(slot) if slot.phase == Phase::Decode => slot.gates.clone(),
                _ => vec![true; layers],
            };
            parts.spans.push(Span {
                index,
                slot: step.slot,
                start,
                rows,
                gates,
                scored,
                gated,
                pending: Pending {
                    scores: if scored {
                        vec![Vec::with_capacity(layers); rows]
                    } else {
                        Vec::new()
                    },
                    ends,
                    gates: None,
                },
            });
            start += rows;
        }
        Ok(parts)
    }

    /// Asks the router of `layer` about the rows of unfinished prompts.
    fn score(&self, layer: usize, rows: &Tensor, spans: &mut [Span]) -> Result<()> {
        let Some(routers) = &self.routers else {
            return Ok(());
        };
        let layers = routers.layers();
        for span in spans.iter_mut().filter(|s| s.scored) {
            let own = rows.f_narrow(0, span.start as i64, span.rows as i64)?;
            let said = sequor_kernels::bridge::to_vec::<f32>(&routers.probabilities(layer, &own)?)
                .map_err(|e| Error::Input(e.to_string()))?;
            let gate = match &*self.plan {
                Plan::Routed(policy) if span.gated => {
                    policy.gate(layer, layers, LayerScore::of(said.iter().copied()))
                }
                _ => true,
            };
            if let Some(g) = span.gates.get_mut(layer) {
                *g = gate;
            }
            for (row, p) in span.pending.scores.iter_mut().zip(said) {
                row.push(p);
            }
            if span.gated && layer + 1 == layers {
                span.pending.gates = Some(span.gates.clone());
            }
        }
        Ok(())
    }

    /// Runs some layers over the rows of the spans `active`; the other rows pass by.
    fn layers(
        &self,
        run: &[usize],
        active: &[usize],
        rows: Tensor,
        parts: &Parts,
        state: &mut RoutedState,
    ) -> Result<Tensor> {
        let decoder = self.model.decoder();
        let chosen: Vec<&Span> = active.iter().filter_map(|&i| parts.spans.get(i)).collect();
        let apart = active.iter().filter(|&&i| i < parts.apart).count();
        let (prompts, others) = chosen.split_at(apart);
        let slots = |spans: &[&Span]| -> Vec<usize> { spans.iter().map(|s| s.slot).collect() };
        let mut attend = Split {
            rows: prompts.iter().map(|s| s.rows as i64).sum(),
            prompts: (!prompts.is_empty())
                .then(|| Cached::new(&mut state.prompts, &slots(prompts))),
            main: (!others.is_empty()).then(|| Cached::new(&mut state.main, &slots(others))),
        };
        let all = active.len() == parts.spans.len();
        let index: Vec<usize> = chosen
            .iter()
            .flat_map(|s| s.start..s.start + s.rows)
            .collect();
        let positions: Vec<i64> = index
            .iter()
            .filter_map(|&i| parts.positions.get(i).copied())
            .collect();
        let rope = decoder.rotations(&positions)?;
        let mut pass = Pass {
            attend: &mut attend,
            rope: rope.as_ref(),
            dropout: 0.0,
        };
        let layers = run.iter().copied();
        if all {
            return Ok(decoder.run_layers(layers, rows, &mut pass, &[])?.0);
        }
        let index: Vec<i64> = index.into_iter().map(|i| i as i64).collect();
        let index = Tensor::f_from_slice(&index)?.f_to_device(rows.device())?;
        let own = rows.f_index_select(0, &index)?;
        let (changed, _) = decoder.run_layers(layers, own, &mut pass, &[])?;
        Ok(rows.f_index_copy(0, &index, &changed)?)
    }
}

/// The rows of one step.
struct Span {
    /// Number of the step in the caller's order.
    index: usize,
    slot: usize,
    /// First row, in the order of the spans.
    start: usize,
    rows: usize,
    /// Layers that run on these rows.
    gates: Vec<bool>,
    /// Do the routers look at them?
    scored: bool,
    /// Do the routers' words hold at once?
    gated: bool,
    pending: Pending,
}

/// One forward's rows: spans of unfinished prompts that are kept apart, then the others.
struct Parts {
    /// How many spans are prompts kept apart.
    apart: usize,
    ids: Vec<Tensor>,
    positions: Vec<i64>,
    spans: Vec<Span>,
}

impl Parts {
    /// The spans that `layer` runs on.
    fn active(&self, layer: usize) -> Vec<usize> {
        let runs = |(_, s): &(usize, &Span)| s.gates.get(layer) == Some(&true);
        self.spans
            .iter()
            .enumerate()
            .filter(runs)
            .map(|(i, _)| i)
            .collect()
    }

    /// The row of each row in the caller's order; `None` when that is the order here.
    fn back(&self) -> Result<Option<Tensor>> {
        let mut order: Vec<&Span> = self.spans.iter().collect();
        order.sort_by_key(|s| s.index);
        let rows: Vec<i64> = order
            .iter()
            .flat_map(|s| s.start as i64..(s.start + s.rows) as i64)
            .collect();
        if rows.is_sorted() {
            return Ok(None);
        }
        Ok(Some(Tensor::f_from_slice(&rows)?))
    }
}

/// Rows of prompts that are kept apart, then rows of sequences.
struct Split<'a> {
    rows: i64,
    prompts: Option<Cached<'a>>,
    main: Option<Cached<'a>>,
}

impl Attend for Split<'_> {
    fn attend_jointly(&mut self, call: Call, rows: &JointRows<'_>) -> Result<Option<Tensor>> {
        match (&mut self.prompts, &mut self.main) {
            (Some(one), None) | (None, Some(one)) => one.attend_jointly(call, rows),
            _ => Ok(None),
        }
    }

    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let total = q.size().first().copied().unwrap_or_default();
        let rows = self.rows;
        match (&mut self.prompts, &mut self.main) {
            (Some(one), None) | (None, Some(one)) => one.attend(call, q, k, v),
            (Some(prompts), Some(main)) => {
                let part = |attend: &mut Cached<'_>, from: i64, n: i64| -> Result<Tensor> {
                    let cut = |x: &Tensor| x.f_narrow(0, from, n);
                    attend.attend(call, &cut(q)?, &cut(k)?, &cut(v)?)
                };
                let first = part(prompts, 0, rows)?;
                let second = part(main, rows, total - rows)?;
                Ok(Tensor::f_cat(&[first, second], 0)?)
            }
            (None, None) => Err(Error::Input("a layer ran on no rows".into())),
        }
    }
}

impl TargetModel for RoutedLm<'_> {
    type State = RoutedState;

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_len(&self) -> usize {
        self.model.context_len()
    }

    fn new_state(&self, slots: usize) -> sequor_sampling::Result<RoutedState> {
        let shape = self.model.kv_shape();
        Ok(RoutedState::new(
            shape,
            slots,
            self.plan.clone(),
            self.prefill,
        )?)
    }

    fn forward(
        &self,
        steps: &[Step<'_>],
        state: &mut RoutedState,
    ) -> sequor_sampling::Result<Vec<Output>> {
        let outputs = self.run(steps, state);
        if outputs.is_err() {
            // A failed forward leaves nothing pending behind.
            for step in steps.iter().filter(|s| s.slot < state.slots.len()) {
                state.prompts.discard(step.slot)?;
                state.main.discard(step.slot)?;
            }
        }
        Ok(outputs?)
    }
}
