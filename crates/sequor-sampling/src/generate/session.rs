//! One request, driven step by step.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::options::Options;
use super::report::{FinishReason, Generation, Report};
use super::sequence::{ModelLimits, Sequence};
use crate::draft::Drafter;
use crate::state::SequenceState;
use crate::target::TargetModel;
use crate::verify::Neighbours;
use crate::{Error, Result};

/// The slot of a session's state.
const SLOT: usize = 0;

/// A model with options: the beginning of every generation. The model is given as anything
/// that can be copied for every session, such as a reference.
pub struct Generator<M: TargetModel + Clone> {
    target: M,
    options: Options,
    neighbours: Option<Arc<dyn Neighbours>>,
    cancel: Option<Arc<AtomicBool>>,
}

impl<M: TargetModel + Clone> fmt::Debug for Generator<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What happened in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A part of the prompt was taken in.
    Prefill {
        /// Tokens of the prompt done.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// New tokens, at least one.
    Tokens(Vec<u32>),
    /// The sequence has ended; every further step says so again.
    Finished(FinishReason),
}

impl<M: TargetModel + Clone> Generator<M> {
    /// Checks the options against the model.
    ///
    /// # Errors
    /// `Input` or `Config` naming the option.
    pub fn new(target: M, options: impl Into<Options>) -> Result<Self> {
        let options = options.into();
        options.validate(target.vocab_size())?;
        Ok(Self {
            target,
            options,
            neighbours: None,
            cancel: None,
        })
    }

    /// Stops generations when `flag` becomes true; it is looked at before every forward
    /// pass.
    #[must_use]
    pub fn cancelled_by(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = Some(flag);
        self
    }

    /// Says which tokens are near which, for [`Acceptance::Lantern`].
    ///
    /// [`Acceptance::Lantern`]: crate::Acceptance::Lantern
    #[must_use]
    pub fn with_neighbours(mut self, neighbours: Arc<dyn Neighbours>) -> Self {
        self.neighbours = Some(neighbours);
        self
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Begins a sequence with a fresh state.
    ///
    /// # Errors
    /// `Input` for an empty prompt or tokens outside the vocabulary; `Limits` when the
    /// prompt is longer than the context.
    pub fn session<'d>(
        &self,
        prompt: &[u32],
        drafter: Option<Box<dyn Drafter + 'd>>,
    ) -> Result<Session<'d, M>> {
        self.resume(self.target.new_state(1)?, prompt, drafter)
    }

    /// Begins a sequence with a state whose committed rows are the first tokens of
    /// `prompt` (from [`Session::into_parts`]): a chat does not take in its history again.
    ///
    /// # Errors
    /// As [`session`](Self::session), and when the state cannot be shortened to leave
    /// one token of the prompt to evaluate.
    pub fn resume<'d>(
        &self,
        state: M::State,
        prompt: &[u32],
        drafter: Option<Box<dyn Drafter + 'd>>,
    ) -> Result<Session<'d, M>> {
        let session = Session::resume(self.target.clone(), state, &self.options, prompt, drafter)?
            .with_neighbours(self.neighbours.clone());
        Ok(match &self.cancel {
            Some(flag) => session.cancelled_by(flag.clone()),
            None => session,
        })
    }

    /// Generates to the end. `on_token` is told every token in order; `Break` ends the
    /// generation after it.
    ///
    /// # Errors
    /// As [`session`](Self::session), and those of the model and the drafter.
    pub fn generate<'d>(
        &self,
        prompt: &[u32],
        drafter: Option<Box<dyn Drafter + 'd>>,
        on_token: impl FnMut(u32) -> ControlFlow<()> + 'd,
    ) -> Result<Generation> {
        let mut session = self.session(prompt, drafter)?.on_token(on_token);
        while !matches!(session.step()?, Event::Finished(_)) {}
        Ok(session.into_parts().0)
    }
}

/// One sequence in progress.
///
/// As an iterator it gives token after token. Dropping it at any time is fine.
pub struct Session<'d, M: TargetModel> {
    target: M,
    state: M::State,
    sequence: Sequence<'d>,
    cancel: Option<Arc<AtomicBool>>,
    /// Tokens that the iterator has given.
    given: usize,
}

impl<'d, M: TargetModel> Session<'d, M> {
    /// One sequence of a model that is given away or borrowed, with a fresh state.
    ///
    /// # Errors
    /// As [`Generator::new`] and [`Generator::session`].
    pub fn new(
        target: M,
        options: &Options,
        prompt: &[u32],
        drafter: Option<Box<dyn Drafter + 'd>>,
    ) -> Result<Self> {
        let state = target.new_state(1)?;
        Self::resume(target, state, options, prompt, drafter)
    }

    fn resume(
        target: M,
        mut state: M::State,
        options: &Options,
        prompt: &[u32],
        drafter: Option<Box<dyn Drafter + 'd>>,
    ) -> Result<Self> {
        state.discard(SLOT)?;
        let keep = prompt.len().saturating_sub(1);
        if state.committed_len(SLOT) > keep {
            state.truncate(SLOT, keep)?;
        }
        let cached = state.committed_len(SLOT);
        let limits = ModelLimits::of(&target);
        let sequence = Sequence::new(SLOT, prompt, cached, options, &limits, drafter)?;
        Ok(Self {
            target,
            state,
            sequence,
            cancel: None,
            given: 0,
        })
    }

    /// Ends the sequence when `flag` becomes true; it is looked at before every forward pass.
    #[must_use]
    pub fn cancelled_by(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = Some(flag);
        self
    }

    /// Says which tokens are near which, for [`Acceptance::Lantern`].
    ///
    /// [`Acceptance::Lantern`]: crate::Acceptance::Lantern
    #[must_use]
    pub fn with_neighbours(mut self, neighbours: Option<Arc<dyn Neighbours>>) -> Self {
        self.sequence = self.sequence.neighbours(neighbours);
        self
    }

    /// Tells `on_token` every token in order; `Break` ends the sequence after it.
    #[must_use]
    pub fn on_token(mut self, on_token: impl FnMut(u32) -> ControlFlow<()> + 'd) -> Self {
        self.sequence = self.sequence.on_token(Box::new(on_token));
        self
    }

    /// One forward pass and what follows from it.
    ///
    /// # Errors
    /// Those of the model, the drafter and rows that cannot be sampled from. The sequence
    /// is then finished; its state stays valid and has nothing pending.
    pub fn step(&mut self) -> Result<Event> {
        if self
            .cancel
            .as_ref()
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
        {
            self.sequence.end(FinishReason::Cancelled);
        }
        if let Some(reason) = self.sequence.finish() {
            return Ok(Event::Finished(reason));
        }
        let planned = self.sequence.plan()?;
        let Some(step) = self.sequence.step().filter(|_| planned) else {
            return Ok(Event::Finished(
                self.sequence.finish().unwrap_or(FinishReason::Length),
            ));
        };
        let start = Instant::now();
        let output = self.target.forward(&[step], &mut self.state).and_then(only);
        let seconds = start.elapsed().as_secs_f64();
        let output = match output {
            Ok(output) => output,
            Err(e) => {
                self.sequence.fail();
                self.state.discard(SLOT)?;
                return Err(e);
            }
        };
        let added = self.sequence.absorb(&output, seconds, &mut self.state)?;
        if added == 0 {
            let total = self.sequence.tokens().len();
            return Ok(Event::Prefill {
                done: self.sequence.cached(),
                total,
            });
        }
        let generated = self.sequence.generated();
        Ok(Event::Tokens(
            generated
                .get(generated.len() - added..)
                .unwrap_or_default()
                .to_vec(),
        ))
    }

    /// Ends the sequence; an earlier reason stays.
    pub fn end(&mut self, reason: FinishReason) {
        self.sequence.end(reason);
    }

    /// Prompt and generated tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        self.sequence.tokens()
    }

    /// The tokens after the prompt.
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        self.sequence.generated()
    }

    /// Why the sequence ended, once it has.
    #[must_use]
    pub fn finish(&self) -> Option<FinishReason> {
        self.sequence.finish()
    }

    /// What it took so far.
    #[must_use]
    pub fn report(&self) -> &Report {
        self.sequence.report()
    }

    /// The state of the model. It holds every token but the newest.
    #[must_use]
    pub fn state(&self) -> &M::State {
        &self.state
    }

    /// The result so far and the state, for [`Generator::resume`].
    #[must_use]
    pub fn into_parts(self) -> (Generation, M::State) {
        (self.sequence.into_generation(), self.state)
    }
}

impl<M: TargetModel> Iterator for Session<'_, M> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(&token) = self.sequence.generated().get(self.given) {
                self.given += 1;
                return Some(Ok(token));
            }
            match self.step() {
                Ok(Event::Finished(_)) => return None,
                Ok(_) => {}
                Err(e) => return Some(Err(e)),
            }
        }
    }
}

/// The output of a forward pass with one step.
fn only<T>(mut outputs: Vec<T>) -> Result<T> {
    match (outputs.pop(), outputs.is_empty()) {
        (Some(output), true) => Ok(output),
        (_, _) => Err(Error::contract(
            "the model",
            "gave another number of outputs than steps",
        )),
    }
}
