//! Several requests over one state, one forward pass for all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::options::Options;
use super::report::{FinishReason, Generation};
use super::sequence::{ModelLimits, OnToken, Sequence};
use crate::draft::Drafter;
use crate::state::SequenceState;
use crate::target::{Output, TargetModel};
use crate::verify::Neighbours;
use crate::{Error, Result};

/// One request of a batch.
pub struct Request<'d> {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Its options. Give requests with one seed different numbers
    /// ([`Options::request`]) if their outputs shall differ.
    pub options: Options,
    /// Its drafter.
    pub drafter: Option<Box<dyn Drafter + 'd>>,
    /// Which tokens are near which, for LANTERN.
    pub neighbours: Option<Arc<dyn Neighbours>>,
    /// Is told every token.
    pub on_token: Option<OnToken<'d>>,
}

impl Request<'_> {
    /// A request without drafts or callback.
    #[must_use]
    pub fn new(prompt: Vec<u32>, options: impl Into<Options>) -> Self {
        Self {
            prompt,
            options: options.into(),
            drafter: None,
            neighbours: None,
            on_token: None,
        }
    }
}

/// Generates for all `requests`, whatever their lengths; each gives what it would give
/// alone. A request that cannot begin or that fails on the way has its error in its place
/// and does not disturb the others. `cancel` is looked at before every forward pass.
///
/// # Errors
/// When the state cannot be allocated or a forward pass fails as a whole.
pub fn generate_batch<M: TargetModel>(
    target: &M,
    requests: Vec<Request<'_>>,
    cancel: Option<&AtomicBool>,
) -> Result<Vec<Result<Generation>>> {
    let limits = ModelLimits::of(target);
    let mut state = target.new_state(requests.len())?;
    let mut rows: Vec<Result<Sequence<'_>>> = requests
        .into_iter()
        .enumerate()
        .map(|(slot, request)| {
            let Request {
                prompt,
                options,
                drafter,
                neighbours,
                on_token,
            } = request;
            let sequence =
                Sequence::new(slot, &prompt, 0, &options, &limits, drafter)?.neighbours(neighbours);
            Ok(match on_token {
                Some(on_token) => sequence.on_token(on_token),
                None => sequence,
            })
        })
        .collect();
    while advance(target, &mut rows, &mut state, cancel)? {}
    Ok(rows
        .into_iter()
        .map(|row| row.map(Sequence::into_generation))
        .collect())
}

/// One forward pass over all rows that are not finished; false if there is none.
fn advance<M: TargetModel>(
    target: &M,
    rows: &mut [Result<Sequence<'_>>],
    state: &mut M::State,
    cancel: Option<&AtomicBool>,
) -> Result<bool> {
    let cancelled = cancel.is_some_and(|flag| flag.load(Ordering::Relaxed));
    let mut active = Vec::new();
    for (slot, row) in rows.iter_mut().enumerate() {
        let Ok(sequence) = row else { continue };
        if cancelled {
            sequence.end(FinishReason::Cancelled);
        }
        match sequence.plan() {
            Ok(true) => active.push(slot),
            Ok(false) => {}
            Err(e) => *row = Err(e),
        }
    }
    let sequences = active
        .iter()
        .filter_map(|&slot| rows.get(slot)?.as_ref().ok());
    let steps: Vec<_> = sequences.filter_map(Sequence::step).collect();
    if steps.is_empty() {
        return Ok(false);
    }
    let start = Instant::now();
    let outputs = target.forward(&steps, state)?;
    let seconds = start.elapsed().as_secs_f64();
    if outputs.len() != active.len() {
        let what = format!("gave {} outputs for {} steps", outputs.len(), active.len());
        return Err(Error::contract("the model", what));
    }
    for (slot, output) in active.into_iter().zip(&outputs) {
        if let Some(row) = rows.get_mut(slot) {
            absorb(row, output, seconds, state);
        }
    }
    Ok(true)
}

/// Keeps the error of a failing row in its place.
fn absorb<S: SequenceState>(
    row: &mut Result<Sequence<'_>>,
    output: &Output,
    seconds: f64,
    state: &mut S,
) {
    if let Ok(sequence) = row
        && let Err(e) = sequence.absorb(output, seconds, state)
    {
        *row = Err(e);
    }
}
