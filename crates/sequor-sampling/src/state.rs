//! The memory of a model while it generates.
//!
//! A forward pass leaves its rows **pending**. Each pending row is then either
//! committed or discarded; nothing else may happen in between. `commit` takes
//! the path of rows that became part of the sequence, so that the same call
//! serves append-only key-value caches (gather the rows), recurrent states
//! (replay the path) and mixtures of both.

use crate::Result;

/// State of a model for a fixed number of independent sequences ("slots").
pub trait SequenceState {
    /// Number of slots.
    fn slots(&self) -> usize;

    /// Number of rows that are part of the sequence in `slot`.
    fn committed_len(&self, slot: usize) -> usize;

    /// Number of rows of the last forward pass that wait for a decision.
    fn pending_len(&self, slot: usize) -> usize;

    /// Makes the pending rows `path` part of the sequence, in that order, and drops
    /// the others. `path` holds indices into the pending rows, each an ancestor of
    /// the next. An empty path is the same as [`discard`](Self::discard).
    ///
    /// # Errors
    /// When `slot` or an index of `path` does not exist.
    fn commit(&mut self, slot: usize, path: &[usize]) -> Result<()>;

    /// Drops all pending rows of `slot`.
    ///
    /// # Errors
    /// When `slot` does not exist.
    fn discard(&mut self, slot: usize) -> Result<()>;

    /// Shortens the committed sequence to `len` rows. Used between generations
    /// (a chat turn that was edited) and by draft models; never by the verification
    /// of a target.
    ///
    /// # Errors
    /// `Unsupported` for states that cannot go back, `Input` when `len` is more than
    /// the committed length.
    fn truncate(&mut self, slot: usize, len: usize) -> Result<()>;

    /// Empties `slot`.
    ///
    /// # Errors
    /// When `slot` does not exist.
    fn reset(&mut self, slot: usize) -> Result<()>;
}

impl<S: SequenceState + ?Sized> SequenceState for &mut S {
    fn slots(&self) -> usize {
        (**self).slots()
    }
    fn committed_len(&self, slot: usize) -> usize {
        (**self).committed_len(slot)
    }
    fn pending_len(&self, slot: usize) -> usize {
        (**self).pending_len(slot)
    }
    fn commit(&mut self, slot: usize, path: &[usize]) -> Result<()> {
        (**self).commit(slot, path)
    }
    fn discard(&mut self, slot: usize) -> Result<()> {
        (**self).discard(slot)
    }
    fn truncate(&mut self, slot: usize, len: usize) -> Result<()> {
        (**self).truncate(slot, len)
    }
    fn reset(&mut self, slot: usize) -> Result<()> {
        (**self).reset(slot)
    }
}
