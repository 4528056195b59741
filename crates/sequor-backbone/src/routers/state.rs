//! The memory of a model that leaves layers out.

use std::rc::Rc;

use sequor_nn::kv::{KvCache, KvShape};
use sequor_nn::{Error, Result};
use sequor_sampling::SequenceState;

use super::policy::{LayerScore, Policy, Prefill};

/// How the layers of a sequence are found.
#[derive(Debug)]
pub(super) enum Plan {
    /// These, whatever the prompt.
    Fixed(Vec<bool>),
    /// The routers decide.
    Routed(Policy),
}

/// What a slot is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The prompt is being taken in; nothing is decided.
    Prompt,
    /// The layers are chosen.
    Decode,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) phase: Phase,
    /// The chosen layers; in the prompt phase without meaning.
    pub(super) gates: Vec<bool>,
    /// The routers' probabilities for each committed row of the prompt, `[rows][layers]`.
    scores: Vec<Vec<f32>>,
    /// Rows of the prompt, once the layers are chosen.
    prompt: usize,
    pub(super) pending: Pending,
}

/// What the last forward found out, in force once its rows are committed.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Probabilities of the pending rows.
    pub(super) scores: Vec<Vec<f32>>,
    /// Does the prompt end with these rows?
    pub(super) ends: bool,
    /// Gates that were decided on the way.
    pub(super) gates: Option<Vec<bool>>,
}

/// State of a [`RoutedLm`](super::RoutedLm): keys and values of the layers that run, and the
/// choice of layers, per slot.
///
/// With [`Prefill::Full`] the prompt is kept apart until its last row is committed; then the
/// rows of the chosen layers move over and the others are forgotten, so that a layer has the
/// rows of the whole sequence or none.
#[derive(Debug)]
pub struct RoutedState {
    pub(super) main: KvCache,
    pub(super) prompts: KvCache,
    pub(super) slots: Vec<Slot>,
    plan: Rc<Plan>,
    prefill: Prefill,
}

impl RoutedState {
    pub(super) fn new(
        shape: KvShape,
        slots: usize,
        plan: Rc<Plan>,
        prefill: Prefill,
    ) -> Result<Self> {
        let mut state = Self {
            main: KvCache::new(shape, slots)?,
            prompts: KvCache::new(shape, slots)?,
            slots: Vec::new(),
            plan,
            prefill,
        };
        state.slots = (0..slots).map(|_| state.fresh()).collect();
        Ok(state)
    }

    /// A slot at the beginning of a sequence. Fixed layers need no prompt to be known; with
    /// full prefill they wait for its end, unless they are all.
    fn fresh(&self) -> Slot {
        let known = match &*self.plan {
            Plan::Fixed(gates) => {
                (self.prefill == Prefill::Gated || gates.iter().all(|&g| g)).then(|| gates.clone())
            }
            Plan::Routed(_) => None,
        };
        Slot {
            phase: if known.is_some() {
                Phase::Decode
            } else {
                Phase::Prompt
            },
            gates: known.unwrap_or_default(),
            scores: Vec::new(),
            prompt: 0,
            pending: Pending::default(),
        }
    }

    /// The layers that decoding runs in `slot`, lowest first; `None` while the prompt is not
    /// finished.
    pub fn layers(&self, slot: usize) -> Option<Vec<usize>> {
        let slot = self.slots.get(slot).filter(|s| s.phase == Phase::Decode)?;
        let kept = slot.gates.iter().enumerate().filter(|(_, g)| **g);
        Some(kept.map(|(l, _)| l).collect())
    }

    /// What the routers said about the prompt of `slot`, layer by layer; empty without
    /// routers or prompt. With gated prefill the layers behind one that was left out judged
    /// rows that had not gone through it.
    pub fn scores(&self, slot: usize) -> Vec<LayerScore> {
        let rows = self.slots.get(slot).map_or(&[][..], |s| &s.scores[..]);
        scores(rows)
    }

    /// Keys and values of the chosen layers. A layer that is left out has no rows.
    pub fn cache(&self) -> &KvCache {
        &self.main
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.main.bytes() + self.prompts.bytes()
    }

    /// Does the slot keep its rows with the unfinished prompts?
    pub(super) fn apart(&self, slot: usize) -> bool {
        self.prefill == Prefill::Full
            && self
                .slots
                .get(slot)
                .is_some_and(|s| s.phase == Phase::Prompt)
    }

    fn home(&self, slot: usize) -> &KvCache {
        if self.apart(slot) {
            &self.prompts
        } else {
            &self.main
        }
    }

    fn slot_mut(&mut self, slot: usize) -> Result<&mut Slot> {
        let n = self.slots.len();
        self.slots
            .get_mut(slot)
            .ok_or_else(|| Error::Input(format!("slot {slot} of a state with {n} slots")))
    }

    fn keep(&mut self, slot: usize, path: &[usize]) -> Result<()> {
        let apart = self.apart(slot);
        if apart {
            self.prompts.commit(slot, path)?;
        } else {
            self.main.commit(slot, path)?;
        }
        let s = self.slot_mut(slot)?;
        let pending = std::mem::take(&mut s.pending);
        if s.phase == Phase::Decode || path.is_empty() {
            return Ok(());
        }
        let kept = path.iter().filter_map(|&row| pending.scores.get(row));
        s.scores.extend(kept.cloned());
        if !pending.ends {
            return Ok(());
        }
        let gates = match (&*self.plan, pending.gates) {
            (_, Some(gates)) => gates,
            (Plan::Fixed(gates), None) => gates.clone(),
            (Plan::Routed(policy), None) => policy.decide(&self.scores(slot)),
        };
        if apart {
            self.move_over(slot, &gates)?;
        }
        let prompt = self.main.committed_len(slot);
        let s = self.slot_mut(slot)?;
        (s.phase, s.gates, s.prompt) = (Phase::Decode, gates, prompt);
        if self.slots.iter().all(|s| s.phase == Phase::Decode) {
            // Nobody needs the rows of the layers that are left out any more.
            self.prompts = KvCache::new(*self.prompts.shape(), self.slots.len())?;
        }
        Ok(())
    }

    /// Brings the rows of the chosen layers from the prompts to the sequences.
    fn move_over(&mut self, slot: usize, gates: &[bool]) -> Result<()> {
        let rows = self.prompts.committed_len(slot);
        let chain: Vec<Option<usize>> = (0..rows).map(|i: usize| i.checked_sub(1)).collect();
        self.main.begin(slot, &chain)?;
        for (layer, _) in gates.iter().enumerate().filter(|(_, g)| **g) {
            let (k, v) = self.prompts.view(slot, layer)?;
            let (k, v) = (k.f_transpose(0, 1)?, v.f_transpose(0, 1)?);
            self.main.append(slot, layer, &k, &v)?;
        }
        self.main.commit(slot, &(0..rows).collect::<Vec<_>>())?;
        self.prompts.reset(slot)
    }
}

/// Scores of all layers from rows of probabilities.
pub(super) fn scores(rows: &[Vec<f32>]) -> Vec<LayerScore> {
    let layers = rows.first().map_or(0, Vec::len);
    (0..layers)
        .map(|l| LayerScore::of(rows.iter().filter_map(|row| row.get(l).copied())))
        .collect()
}

impl SequenceState for RoutedState {
    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn committed_len(&self, slot: usize) -> usize {
        self.home(slot).committed_len(slot)
    }

    fn pending_len(&self, slot: usize) -> usize {
        self.home(slot).pending_len(slot)
    }

    fn commit(&mut self, slot: usize, path: &[usize]) -> sequor_sampling::Result<()> {
        Ok(self.keep(slot, path)?)
    }

    fn discard(&mut self, slot: usize) -> sequor_sampling::Result<()> {
        Ok(self.keep(slot, &[])?)
    }

    /// As [`SequenceState::truncate`]; a sequence whose layers were chosen by its prompt
    /// cannot be cut within that prompt.
    fn truncate(&mut self, slot: usize, len: usize) -> sequor_sampling::Result<()> {
        self.keep(slot, &[])?;
        let apart = self.apart(slot);
        let s = self.slot_mut(slot)?;
        if len < s.prompt {
            let message = format!(
                "the layers of slot {slot} were chosen by a prompt of {} tokens: it cannot be cut to {len}; reset it",
                s.prompt
            );
            return Err(sequor_sampling::Error::Unsupported(message));
        }
        if apart {
            self.prompts.truncate(slot, len)?;
            self.slot_mut(slot)?.scores.truncate(len);
        } else {
            self.main.truncate(slot, len)?;
        }
        Ok(())
    }

    fn reset(&mut self, slot: usize) -> sequor_sampling::Result<()> {
        let fresh = self.fresh();
        *self.slot_mut(slot)? = fresh;
        self.main.reset(slot)?;
        Ok(self.prompts.reset(slot)?)
    }
}
