//! The attention state of `sequor-nn` as a [`SequenceState`].

use sequor_nn::KvCache;

use crate::Result;
use crate::state::SequenceState;

impl SequenceState for KvCache {
    fn slots(&self) -> usize {
        KvCache::slots(self)
    }
    fn committed_len(&self, slot: usize) -> usize {
        KvCache::committed_len(self, slot)
    }
    fn pending_len(&self, slot: usize) -> usize {
        KvCache::pending_len(self, slot)
    }
    fn commit(&mut self, slot: usize, path: &[usize]) -> Result<()> {
        Ok(KvCache::commit(self, slot, path)?)
    }
    fn discard(&mut self, slot: usize) -> Result<()> {
        Ok(KvCache::discard(self, slot)?)
    }
    fn truncate(&mut self, slot: usize, len: usize) -> Result<()> {
        Ok(KvCache::truncate(self, slot, len)?)
    }
    fn reset(&mut self, slot: usize) -> Result<()> {
        Ok(KvCache::reset(self, slot)?)
    }
}
