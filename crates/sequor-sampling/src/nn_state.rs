//! The key-value cache of `sequor-nn` as a [`SequenceState`].

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

#[cfg(test)]
mod tests {
    use super::*;
    use sequor_nn::kv::KvShape;
    use sequor_nn::{Device, Kind, Tensor};

    /// One layer, one head, one channel: the key of a row is its number.
    fn feed(cache: &mut KvCache, parents: &[Option<usize>], first: i64) -> Vec<i64> {
        let positions = cache.begin(0, parents).unwrap();
        let n = parents.len() as i64;
        let rows = Tensor::f_arange_start(first, first + n, (Kind::Float, Device::Cpu)).unwrap();
        let rows = rows.f_view([n, 1, 1]).unwrap();
        cache.append(0, 0, &rows, &rows).unwrap();
        positions
    }

    fn keys(cache: &KvCache) -> Vec<f32> {
        let (keys, _) = cache.view(0, 0).unwrap();
        Vec::try_from(keys.f_flatten(0, -1).unwrap()).unwrap()
    }

    #[test]
    fn a_path_of_a_tree_is_committed() {
        let shape = KvShape {
            layers: 1,
            kv_heads: 1,
            head_dim: 1,
            max_len: 64,
            device: Device::Cpu,
        };
        let mut cache = KvCache::new(shape, 1).unwrap();
        let state: &mut dyn SequenceState = &mut cache;
        assert_eq!(
            (state.slots(), state.committed_len(0), state.pending_len(0)),
            (1, 0, 0)
        );

        feed(&mut cache, &[None, Some(0)], 10);
        SequenceState::commit(&mut cache, 0, &[0, 1]).unwrap();
        // Root 2, its children 3 and 4, and 5 below 4.
        let positions = feed(&mut cache, &[None, Some(0), Some(0), Some(2)], 20);
        assert_eq!(positions, [2, 3, 3, 4]);
        assert_eq!(SequenceState::pending_len(&cache, 0), 4);
        SequenceState::commit(&mut cache, 0, &[0, 2, 3]).unwrap();
        assert_eq!(keys(&cache), [10.0, 11.0, 20.0, 22.0, 23.0]);
        assert!(SequenceState::commit(&mut cache, 0, &[1]).is_err());

        feed(&mut cache, &[None], 30);
        SequenceState::discard(&mut cache, 0).unwrap();
        SequenceState::truncate(&mut cache, 0, 3).unwrap();
        assert_eq!(keys(&cache), [10.0, 11.0, 20.0]);
        SequenceState::reset(&mut cache, 0).unwrap();
        assert_eq!(SequenceState::committed_len(&cache, 0), 0);
    }
}
