//! Keys and values of rows already seen: state that is committed or discarded.
//!
//! A forward appends *pending* rows to a slot, laid out as a chain or a tree. Then
//! [`KvCache::commit`] keeps the rows on one path, in order, and drops the rest;
//! [`KvCache::discard`] drops them all. Rows are kept per layer: a layer that a
//! forward did not run (early exit, routing) simply has no rows for it.
//!
//! A layer may also be lent *scratch* rows ([`KvCache::append_scratch`]): guesses at later
//! rows, seen by each other within the same forward and never part of the sequence.
//!
//! Storage is f32 `[kv_heads, capacity, head_dim]` per slot and layer, written in
//! place and grown by chunks, so that memory follows the text and not the limit.

use crate::{Error, Result};
use sequor_kernels::bridge;
use sequor_kernels::fused::{Cache, Seen};
use tch::{Device, Kind, Tensor};

/// Rows by which storage grows.
const CHUNK: usize = 256;

/// Sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Number of layers with attention.
    pub layers: usize,
    /// Key/value heads per layer.
    pub kv_heads: i64,
    /// Channels per head.
    pub head_dim: i64,
    /// Most rows of one slot.
    pub max_len: usize,
    /// Where the rows are kept.
    pub device: Device,
}

#[derive(Debug)]
struct Layer {
    k: Tensor,
    v: Tensor,
    capacity: usize,
    committed: usize,
    /// The step's nodes that have a row here, in the order of their rows.
    pending: Vec<usize>,
    /// Rows behind the pending ones that will never be committed.
    scratch: usize,
}

/// A row that guesses at what follows a pending row. It sees the committed rows, its node
/// with the ancestors of that, the scratch rows of the same node with smaller offsets, and
/// itself; no other row sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scratch {
    /// The pending row that it hangs on.
    pub node: usize,
    /// How many positions behind that row it stands, at least 1.
    pub offset: usize,
}

#[derive(Debug)]
struct Slot {
    /// Positions of committed rows, then of pending ones.
    positions: Vec<i64>,
    committed: usize,
    parents: Vec<Option<usize>>,
    layers: Vec<Layer>,
}

/// Attention state of several independent sequences ("slots").
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    slots: Vec<Slot>,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// When libtorch cannot make an empty tensor.
    pub fn new(shape: KvShape, slots: usize) -> Result<Self> {
        let slots = (0..slots)
            .map(|_| Self::empty_slot(&shape))
            .collect::<Result<_>>()?;
        Ok(Self { shape, slots })
    }

    fn empty_slot(shape: &KvShape) -> Result<Slot> {
        let layer = || -> Result<Layer> {
            let empty = || {
                Tensor::f_empty(
                    [shape.kv_heads, 0, shape.head_dim],
                    (Kind::Float, shape.device),
                )
            };
            Ok(Layer {
                k: empty()?,
                v: empty()?,
                capacity: 0,
                committed: 0,
                pending: Vec::new(),
                scratch: 0,
            })
        };
        let layers = (0..shape.layers).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Slot {
            positions: Vec::new(),
            committed: 0,
            parents: Vec::new(),
            layers,
        })
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The sizes it was made with.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn slot(&self, slot: usize) -> Result<&Slot> {
        let n = self.slots.len();
        self.slots
            .get(slot)
            .ok_or_else(|| Error::Input(format!("slot {slot} of a state with {n} slots")))
    }

    fn slot_mut(&mut self, slot: usize) -> Result<&mut Slot> {
        let n = self.slots.len();
        self.slots
            .get_mut(slot)
            .ok_or_else(|| Error::Input(format!("slot {slot} of a state with {n} slots")))
    }

    /// Committed rows of a slot (0 for a slot that does not exist).
    pub fn committed_len(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |s| s.committed)
    }

    /// Rows waiting for [`commit`](Self::commit) or [`discard`](Self::discard).
    pub fn pending_len(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |s| s.parents.len())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let row = 2 * 4 * (self.shape.kv_heads * self.shape.head_dim) as usize;
        self.slots
            .iter()
            .flat_map(|s| &s.layers)
            .map(|l| l.capacity * row)
            .sum()
    }

    /// Announces a forward of `parents.len()` rows. `parents[i]` is the earlier row of
    /// this forward that row `i` follows, `None` for the last committed row. Gives the
    /// rows' positions: committed length plus depth.
    ///
    /// # Errors
    /// [`Error::Input`] when rows are still pending or a parent does not come before
    /// its child; [`Error::Limits`] when the slot would outgrow its limit.
    pub fn begin(&mut self, slot: usize, parents: &[Option<usize>]) -> Result<Vec<i64>> {
        let max = self.shape.max_len;
        let s = self.slot_mut(slot)?;
        if !s.parents.is_empty() {
            return Err(Error::Input(format!(
                "slot {slot} has {} pending rows: commit or discard them before the next forward",
                s.parents.len()
            )));
        }
        let start = s.committed as i64;
        let mut positions: Vec<i64> = Vec::with_capacity(parents.len());
        for (i, parent) in parents.iter().enumerate() {
            let position = match *parent {
                None => start,
                Some(p) if p < i => positions[p] + 1,
                Some(p) => {
                    return Err(Error::Input(format!(
                        "row {i} names row {p} as its parent, which does not come before it"
                    )));
                }
            };
            positions.push(position);
        }
        let rows = s.committed + parents.len();
        if rows > max {
            return Err(Error::Limits(format!(
                "{rows} rows do not fit a context of {max}"
            )));
        }
        s.positions.truncate(s.committed);
        s.positions.extend(&positions);
        s.parents = parents.to_vec();
        Ok(positions)
    }

    /// Writes the keys and values (`[rows, kv_heads, head_dim]`) of all pending rows of
    /// one layer.
    ///
    /// # Errors
    /// [`Error::Input`] when the number of rows is not that announced.
    pub fn append(&mut self, slot: usize, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let shape = self.shape;
        let s = self.slot_mut(slot)?;
        let rows = s.parents.len();
        let l = s.layer_mut(layer)?;
        let at = l.committed;
        l.write(at, rows, k, v, &shape)
            .map_err(|e| in_layer(e, layer))?;
        (l.pending, l.scratch) = ((0..rows).collect(), 0);
        Ok(())
    }

    /// As [`append`](Self::append), from host memory.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub(crate) fn append_slices(
        &mut self,
        slot: usize,
        layer: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<()> {
        let shape = self.shape;
        let s = self.slot_mut(slot)?;
        let rows = s.parents.len();
        let l = s.layer_mut(layer)?;
        let (heads, width) = (shape.kv_heads as usize, shape.head_dim as usize);
        if k.len() != rows * heads * width || v.len() != k.len() {
            return Err(Error::Input(format!(
                "layer {layer}: {} keys where {rows} rows of {heads} heads x {width} were announced",
                k.len()
            )));
        }
        let at = l.committed;
        l.grow(at + rows, at, &shape)?;
        let plane = l.capacity * width;
        for (store, new) in [(&mut l.k, k), (&mut l.v, v)] {
            bridge::update(store, |store: &mut [f32]| {
                for (i, head) in new.chunks_exact(width).enumerate() {
                    let to = i % heads * plane + (at + i / heads) * width;
                    store[to..to + width].copy_from_slice(head);
                }
            })?;
        }
        (l.pending, l.scratch) = ((0..rows).collect(), 0);
        Ok(())
    }

    /// Lends the keys and values of one layer, all of its storage.
    ///
    /// # Errors
    /// [`Error::Input`] for a slot or layer that does not exist.
    pub(crate) fn lend<R>(
        &self,
        slot: usize,
        layer: usize,
        f: impl FnOnce(Cache<'_>) -> R,
    ) -> Result<R> {
        let l = self.layer(slot, layer)?;
        bridge::read(&l.k, |keys: &[f32]| {
            bridge::read(&l.v, |values: &[f32]| {
                f(Cache {
                    keys,
                    values,
                    kv_heads: self.shape.kv_heads as usize,
                    head_dim: self.shape.head_dim as usize,
                })
            })
        })?
        .map_err(Error::from)
    }

    /// Has this layer a row for each committed row of the slot?
    pub(crate) fn is_whole(&self, slot: usize, layer: usize) -> Result<bool> {
        Ok(self.layer(slot, layer)?.committed == self.slot(slot)?.committed)
    }

    fn layer(&self, slot: usize, layer: usize) -> Result<&Layer> {
        self.slot(slot)?
            .layers
            .get(layer)
            .ok_or_else(|| Error::Input(format!("no layer {layer} in this state")))
    }

    /// What [`mask`](Self::mask) says, as lists: the columns that each pending row sees.
    ///
    /// # Errors
    /// [`Error::Input`] for a slot that does not exist.
    pub(crate) fn seen(&self, slot: usize, window: Option<i64>) -> Result<Vec<Seen>> {
        let s = self.slot(slot)?;
        let (rows, committed) = (s.parents.len(), s.committed);
        let ancestors = s.ancestors();
        let seen = |i: usize| {
            let own = s.positions[committed + i];
            let far = |p: &i64| window.is_some_and(|w| own - *p >= w);
            let first = s.positions[..committed].partition_point(far);
            let mut seen = Seen {
                first,
                end: committed,
                more: Vec::new(),
            };
            for j in (0..rows).filter(|j| ancestors[i * rows + j]) {
                if far(&s.positions[committed + j]) {
                    continue;
                }
                if seen.is_empty() {
                    (seen.first, seen.end) = (committed + j, committed + j);
                }
                if seen.end == committed + j {
                    seen.end += 1;
                } else {
                    seen.more.push(committed + j);
                }
            }
            seen
        };
        Ok((0..rows).map(seen).collect())
    }

    /// Writes keys and values (`[rows, kv_heads, head_dim]`) of scratch rows of one layer,
    /// behind its pending rows, until the next [`append`](Self::append),
    /// [`commit`](Self::commit) or [`discard`](Self::discard). Who sees them is said by
    /// [`scratch_mask`](Self::scratch_mask).
    ///
    /// # Errors
    /// [`Error::Input`] when the shapes do not fit.
    pub fn append_scratch(
        &mut self,
        slot: usize,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<()> {
        let shape = self.shape;
        let l = self.slot_mut(slot)?.layer_mut(layer)?;
        let rows = k.size().first().copied().unwrap_or(0) as usize;
        l.write(l.committed + l.pending.len(), rows, k, v, &shape)
            .map_err(|e| in_layer(e, layer))?;
        l.scratch = rows;
        Ok(())
    }

    /// Keys and values of one layer, committed, then pending, then scratch rows:
    /// `[kv_heads, rows, head_dim]` each.
    ///
    /// # Errors
    /// [`Error::Input`] for a slot or layer that does not exist.
    pub fn view(&self, slot: usize, layer: usize) -> Result<(Tensor, Tensor)> {
        let l = self.layer(slot, layer)?;
        let rows = (l.committed + l.pending.len() + l.scratch) as i64;
        Ok((l.k.f_narrow(1, 0, rows)?, l.v.f_narrow(1, 0, rows)?))
    }

    /// The additive mask `[pending, committed + pending]`: a pending row sees the committed
    /// rows, its ancestors and itself, all within `window` when there is one. `None` when
    /// nothing is hidden.
    ///
    /// # Errors
    /// [`Error::Limits`] when the mask would be too large.
    pub fn mask(&self, slot: usize, window: Option<i64>) -> Result<Option<Tensor>> {
        let s = self.slot(slot)?;
        let (rows, committed) = (s.parents.len(), s.committed);
        let oldest_hidden = window.is_some_and(|w| s.positions.last().is_some_and(|p| *p >= w));
        if rows <= 1 && !oldest_hidden {
            return Ok(None);
        }
        let ancestors = s.ancestors();
        let positions = &s.positions;
        let allowed = |i: usize, j: usize| {
            let seen = j < committed || ancestors[i * rows + (j - committed)];
            seen && window.is_none_or(|w| positions[committed + i] - positions[j] < w)
        };
        Ok(Some(crate::mask::additive(
            rows,
            committed + rows,
            self.shape.device,
            allowed,
        )?))
    }

    /// The additive mask `[scratch, committed + pending + scratch]` of scratch rows, in the
    /// order of [`append_scratch`](Self::append_scratch); see [`Scratch`] for the rule. `window`
    /// as in [`mask`](Self::mask).
    ///
    /// # Errors
    /// [`Error::Input`] when a row hangs on a node that does not exist; [`Error::Limits`] when
    /// the mask would be too large.
    pub fn scratch_mask(
        &self,
        slot: usize,
        scratch: &[Scratch],
        window: Option<i64>,
    ) -> Result<Tensor> {
        let s = self.slot(slot)?;
        let (pending, committed) = (s.parents.len(), s.committed);
        if let Some(bad) = scratch.iter().find(|r| r.node >= pending) {
            return Err(Error::Input(format!(
                "a scratch row hangs on row {} of {pending} pending rows",
                bad.node
            )));
        }
        let ancestors = s.ancestors();
        let place = |r: &Scratch| s.positions[committed + r.node] + r.offset as i64;
        let places: Vec<i64> = scratch.iter().map(place).collect();
        let allowed = |i: usize, j: usize| {
            let (row, known) = (scratch[i], committed + pending);
            let (seen, position) = if j < committed {
                (true, s.positions[j])
            } else if j < known {
                (
                    ancestors[row.node * pending + (j - committed)],
                    s.positions[j],
                )
            } else {
                let other = scratch[j - known];
                let seen = other.node == row.node && other.offset <= row.offset;
                (seen, places[j - known])
            };
            seen && window.is_none_or(|w| places[i] - position < w)
        };
        crate::mask::additive(
            scratch.len(),
            committed + pending + scratch.len(),
            self.shape.device,
            allowed,
        )
    }

    /// Are the pending rows a plain chain?
    pub fn is_chain(&self, slot: usize) -> bool {
        let chain = |(i, p): (usize, &Option<usize>)| *p == i.checked_sub(1);
        self.slots
            .get(slot)
            .is_none_or(|s| s.parents.iter().enumerate().all(chain))
    }

    /// Keeps the pending rows on `path` (each the parent of the next), in order, and drops
    /// the others.
    ///
    /// # Errors
    /// [`Error::Input`] when `path` is not a path of the pending rows from their root.
    pub fn commit(&mut self, slot: usize, path: &[usize]) -> Result<()> {
        let device = self.shape.device;
        let s = self.slot_mut(slot)?;
        for (depth, &node) in path.iter().enumerate() {
            let expected = depth.checked_sub(1).map(|d| path[d]);
            match s.parents.get(node) {
                Some(parent) if *parent == expected => {}
                Some(parent) => {
                    return Err(Error::Input(format!(
                        "{path:?} is not a path: row {node} follows {parent:?}, not {expected:?}"
                    )));
                }
                None => {
                    return Err(Error::Input(format!(
                        "row {node} of {} pending rows cannot be committed",
                        s.parents.len()
                    )));
                }
            }
        }
        for layer in &mut s.layers {
            layer.commit(path, device)?;
        }
        let kept: Vec<i64> = path.iter().map(|&n| s.positions[s.committed + n]).collect();
        s.positions.truncate(s.committed);
        s.positions.extend(kept);
        s.committed += path.len();
        s.parents.clear();
        Ok(())
    }

    /// Drops the pending rows.
    ///
    /// # Errors
    /// [`Error::Input`] for a slot that does not exist.
    pub fn discard(&mut self, slot: usize) -> Result<()> {
        self.commit(slot, &[])
    }

    /// Drops committed rows beyond the first `len`, and all pending ones.
    ///
    /// # Errors
    /// [`Error::Input`] when fewer rows are committed, or a layer skipped some of them.
    pub fn truncate(&mut self, slot: usize, len: usize) -> Result<()> {
        self.discard(slot)?;
        let s = self.slot_mut(slot)?;
        if len > s.committed {
            return Err(Error::Input(format!(
                "slot {slot} has {} rows and cannot be cut to {len}",
                s.committed
            )));
        }
        if let Some(l) = s
            .layers
            .iter()
            .find(|l| l.committed != s.committed && l.committed != 0)
        {
            return Err(Error::Input(format!(
                "a layer holds {} of {} rows: this state cannot be cut",
                l.committed, s.committed
            )));
        }
        for l in &mut s.layers {
            l.committed = l.committed.min(len);
        }
        s.committed = len;
        s.positions.truncate(len);
        Ok(())
    }

    /// Empties a slot; its storage is kept for the next sequence.
    ///
    /// # Errors
    /// [`Error::Input`] for a slot that does not exist.
    pub fn reset(&mut self, slot: usize) -> Result<()> {
        let s = self.slot_mut(slot)?;
        (s.committed, s.positions, s.parents) = (0, Vec::new(), Vec::new());
        for l in &mut s.layers {
            (l.committed, l.pending, l.scratch) = (0, Vec::new(), 0);
        }
        Ok(())
    }

    /// Copies the committed rows of one slot over another (n samples of one prompt, beams).
    ///
    /// # Errors
    /// [`Error::Input`] for a slot that does not exist.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        let shape = self.shape;
        self.slot(to)?;
        let source = self.slot(from)?;
        let mut copy = Self::empty_slot(&shape)?;
        copy.committed = source.committed;
        copy.positions = source.positions[..source.committed].to_vec();
        for (new, old) in copy.layers.iter_mut().zip(&source.layers) {
            new.grow(old.committed, 0, &shape)?;
            new.committed = old.committed;
            let n = old.committed as i64;
            new.k
                .f_narrow(1, 0, n)?
                .f_copy_(&old.k.f_narrow(1, 0, n)?)?;
            new.v
                .f_narrow(1, 0, n)?
                .f_copy_(&old.v.f_narrow(1, 0, n)?)?;
        }
        *self.slot_mut(to)? = copy;
        Ok(())
    }
}

/// Names the layer in what a caller got wrong.
fn in_layer(e: Error, layer: usize) -> Error {
    match e {
        Error::Input(what) => Error::Input(format!("layer {layer}: {what}")),
        other => other,
    }
}

impl Slot {
    fn layer_mut(&mut self, layer: usize) -> Result<&mut Layer> {
        let layers = self.layers.len();
        self.layers
            .get_mut(layer)
            .ok_or_else(|| Error::Input(format!("layer {layer} of a state with {layers} layers")))
    }

    /// `[i * rows + j]`: is pending row `j` an ancestor of row `i`, or row `i` itself?
    fn ancestors(&self) -> Vec<bool> {
        let rows = self.parents.len();
        let mut ancestors = vec![false; rows * rows];
        for (i, parent) in self.parents.iter().enumerate() {
            if let Some(p) = *parent {
                ancestors.copy_within(p * rows..(p + 1) * rows, i * rows);
            }
            ancestors[i * rows + i] = true;
        }
        ancestors
    }
}

impl Layer {
    /// Writes `rows` rows from row `at` on.
    fn write(
        &mut self,
        at: usize,
        rows: usize,
        k: &Tensor,
        v: &Tensor,
        shape: &KvShape,
    ) -> Result<()> {
        if k.size() != [rows as i64, shape.kv_heads, shape.head_dim] || v.size() != k.size() {
            return Err(Error::Input(format!(
                "keys of shape {:?} where {rows} rows of {} heads x {} were announced",
                k.size(),
                shape.kv_heads,
                shape.head_dim
            )));
        }
        self.grow(at + rows, at, shape)?;
        for (store, new) in [(&self.k, k), (&self.v, v)] {
            store
                .f_narrow(1, at as i64, rows as i64)?
                .f_copy_(&new.f_transpose(0, 1)?)?;
        }
        Ok(())
    }

    /// Makes room for `rows` rows and keeps the first `keep`.
    fn grow(&mut self, rows: usize, keep: usize, shape: &KvShape) -> Result<()> {
        if rows <= self.capacity {
            return Ok(());
        }
        // By chunks at first, then by halves, so that long texts copy rarely.
        let capacity = rows.max(self.capacity + self.capacity / 2).div_ceil(CHUNK) * CHUNK;
        let keep = keep as i64;
        for store in [&mut self.k, &mut self.v] {
            let larger = Tensor::f_zeros(
                [shape.kv_heads, capacity as i64, shape.head_dim],
                (Kind::Float, shape.device),
            )?;
            larger
                .f_narrow(1, 0, keep)?
                .f_copy_(&store.f_narrow(1, 0, keep)?)?;
            *store = larger;
        }
        self.capacity = capacity;
        Ok(())
    }

    fn commit(&mut self, path: &[usize], device: Device) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.scratch = 0;
        let rows: Vec<i64> = path
            .iter()
            .filter_map(|n| pending.iter().position(|p| p == n))
            .map(|row| row as i64)
            .collect();
        let in_place = rows.iter().enumerate().all(|(i, &row)| row == i as i64);
        if !in_place {
            let index = Tensor::f_from_slice(&rows)?.f_to_device(device)?;
            let (at, n) = (self.committed as i64, rows.len() as i64);
            for store in [&self.k, &self.v] {
                let kept = store
                    .f_narrow(1, at, pending.len() as i64)?
                    .f_index_select(1, &index)?;
                store.f_narrow(1, at, n)?.f_copy_(&kept)?;
            }
        }
        self.committed += rows.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> KvCache {
        KvCache::new(
            KvShape {
                layers: 2,
                kv_heads: 1,
                head_dim: 1,
                max_len: 600,
                device: Device::Cpu,
            },
            2,
        )
        .unwrap()
    }

    /// Appends rows whose keys are the given numbers.
    fn feed(
        c: &mut KvCache,
        slot: usize,
        parents: &[Option<usize>],
        keys: &[f32],
        layers: &[usize],
    ) -> Vec<i64> {
        let positions = c.begin(slot, parents).unwrap();
        let k = Tensor::from_slice(keys).reshape([keys.len() as i64, 1, 1]);
        for &l in layers {
            c.append(slot, l, &k, &(&k * 10.0)).unwrap();
        }
        positions
    }

    fn keys(c: &KvCache, slot: usize, layer: usize) -> Vec<f32> {
        Vec::try_from(c.view(slot, layer).unwrap().0.reshape([-1])).unwrap()
    }

    #[test]
    fn a_tree_is_committed_along_a_path() {
        let mut c = cache();
        feed(&mut c, 0, &[None, Some(0)], &[1.0, 2.0], &[0, 1]);
        c.commit(0, &[0, 1]).unwrap();
        // Root with two children, the second of which has a child.
        let tree = [None, Some(0), Some(0), Some(2)];
        assert_eq!(
            feed(&mut c, 0, &tree, &[3.0, 4.0, 5.0, 6.0], &[0, 1]),
            [2, 3, 3, 4]
        );
        assert!(!c.is_chain(0));
        let m = c.mask(0, None).unwrap().unwrap();
        let visible = |i: i64| {
            (0..6)
                .filter(|&j| m.double_value(&[i, j]) == 0.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(visible(1), [0, 1, 2, 3]);
        assert_eq!(visible(3), [0, 1, 2, 4, 5]);
        assert!(c.commit(0, &[0, 3]).is_err(), "3 does not follow 0");
        assert!(c.commit(0, &[2]).is_err(), "2 is no root");
        c.commit(0, &[0, 2, 3]).unwrap();
        assert_eq!(keys(&c, 0, 1), [1.0, 2.0, 3.0, 5.0, 6.0]);
        assert_eq!(
            (c.committed_len(0), c.pending_len(0), c.committed_len(1)),
            (5, 0, 0)
        );
    }

    #[test]
    fn lists_of_columns_say_what_masks_say() {
        let tree = [None, Some(0), Some(0), Some(2), Some(3)];
        let chain = [None, Some(0), Some(1)];
        for parents in [&tree[..], &chain] {
            for committed in [0usize, 1, 5] {
                let mut c = cache();
                let before: Vec<_> = (0..committed).map(|i| i.checked_sub(1)).collect();
                feed(&mut c, 0, &before, &vec![1.0; committed], &[0, 1]);
                c.commit(0, &(0..committed).collect::<Vec<_>>()).unwrap();
                feed(&mut c, 0, parents, &vec![2.0; parents.len()], &[0, 1]);
                for window in [None, Some(1), Some(2), Some(4), Some(100)] {
                    let mask = c.mask(0, window).unwrap();
                    for (i, seen) in c.seen(0, window).unwrap().iter().enumerate() {
                        let listed: Vec<usize> =
                            (seen.first..seen.end).chain(seen.more.clone()).collect();
                        let visible = |j: &usize| {
                            mask.as_ref()
                                .is_none_or(|m| m.double_value(&[i as i64, *j as i64]) == 0.0)
                        };
                        let all = 0..committed + parents.len();
                        assert_eq!(listed, all.filter(visible).collect::<Vec<_>>());
                    }
                }
            }
        }
    }

    #[test]
    fn pending_rows_are_committed_or_discarded_before_the_next_forward() {
        let mut c = cache();
        feed(&mut c, 1, &[None], &[1.0], &[0, 1]);
        assert!(
            c.begin(1, &[None])
                .unwrap_err()
                .to_string()
                .contains("commit or discard")
        );
        c.discard(1).unwrap();
        assert_eq!(c.committed_len(1), 0);
        assert!(
            c.begin(1, &[Some(0)]).is_err(),
            "a row cannot be its own parent"
        );
        assert!(
            c.begin(1, &[None; 601])
                .unwrap_err()
                .to_string()
                .contains("context of 600")
        );
        assert!(c.begin(9, &[None]).is_err());
    }

    #[test]
    fn a_skipped_layer_has_no_rows() {
        let mut c = cache();
        feed(&mut c, 0, &[None, Some(0)], &[1.0, 2.0], &[0]);
        c.commit(0, &[0]).unwrap();
        assert_eq!((keys(&c, 0, 0).len(), keys(&c, 0, 1).len()), (1, 0));
    }

    #[test]
    fn scratch_rows_are_seen_by_their_own_kind_and_never_kept() {
        let mut c = cache();
        feed(&mut c, 0, &[None, Some(0)], &[1.0, 2.0], &[0, 1]);
        c.commit(0, &[0, 1]).unwrap();
        // A root with two children; two scratch rows for each node, by offset.
        feed(
            &mut c,
            0,
            &[None, Some(0), Some(0)],
            &[3.0, 4.0, 5.0],
            &[0, 1],
        );
        let scratch: Vec<Scratch> = [1, 2]
            .into_iter()
            .flat_map(|offset| (0..3).map(move |node| Scratch { node, offset }))
            .collect();
        let k = Tensor::from_slice(&[-1.0f32; 6]).reshape([6, 1, 1]);
        c.append_scratch(0, 1, &k, &k).unwrap();
        assert_eq!((keys(&c, 0, 0).len(), keys(&c, 0, 1).len()), (5, 11));
        let visible = |c: &KvCache, window: Option<i64>| -> Vec<Vec<i64>> {
            let m = c.scratch_mask(0, &scratch, window).unwrap();
            assert_eq!(m.size(), [6, 11]);
            let row = |i: i64| {
                (0..11)
                    .filter(|&j| m.double_value(&[i, j]) == 0.0)
                    .collect()
            };
            (0..6).map(row).collect()
        };
        // Columns: two committed rows, three nodes, offset 1 of each, offset 2 of each.
        let all = vec![
            vec![0, 1, 2, 5],
            vec![0, 1, 2, 3, 6],
            vec![0, 1, 2, 4, 7],
            vec![0, 1, 2, 5, 8],
            vec![0, 1, 2, 3, 6, 9],
            vec![0, 1, 2, 4, 7, 10],
        ];
        assert_eq!(visible(&c, None), all);
        // Positions 0, 1 | 2, 3, 3 | 3, 4, 4 | 4, 5, 5: a window of three hides what lies behind.
        let near = vec![
            vec![1, 2, 5],
            vec![2, 3, 6],
            vec![2, 4, 7],
            vec![2, 5, 8],
            vec![3, 6, 9],
            vec![4, 7, 10],
        ];
        assert_eq!(visible(&c, Some(3)), near);
        let lost = Scratch { node: 3, offset: 1 };
        assert!(c.scratch_mask(0, &[lost], None).is_err());
        c.commit(0, &[0, 2]).unwrap();
        for layer in [0, 1] {
            assert_eq!(keys(&c, 0, layer), [1.0, 2.0, 3.0, 5.0]);
        }
        // Room for scratch rows is made without losing the pending ones.
        let chain: Vec<Option<usize>> = (0..250usize).map(|i| i.checked_sub(1)).collect();
        feed(&mut c, 0, &chain, &[7.0; 250], &[0, 1]);
        let k = Tensor::from_slice(&[-1.0f32; 300]).reshape([300, 1, 1]);
        c.append_scratch(0, 0, &k, &k).unwrap();
        assert_eq!(keys(&c, 0, 0)[3..5], [5.0, 7.0]);
        assert_eq!(keys(&c, 0, 0)[253..255], [7.0, -1.0]);
        c.discard(0).unwrap();
        assert_eq!(keys(&c, 0, 0), [1.0, 2.0, 3.0, 5.0]);
    }

    #[test]
    fn growth_truncation_windows_and_forks_keep_the_rows() {
        let mut c = cache();
        let values: Vec<f32> = (0..300).map(|i| i as f32).collect();
        let chain: Vec<Option<usize>> = (0..300usize).map(|i| i.checked_sub(1)).collect();
        feed(&mut c, 0, &chain, &values, &[0, 1]);
        c.commit(0, &(0..300).collect::<Vec<_>>()).unwrap();
        feed(&mut c, 0, &chain, &values, &[0, 1]);
        c.commit(0, &(0..250).collect::<Vec<_>>()).unwrap();
        assert_eq!(keys(&c, 0, 0)[299..302], [299.0, 0.0, 1.0]);
        c.truncate(0, 5).unwrap();
        c.fork(0, 1).unwrap();
        assert_eq!(keys(&c, 1, 1), [0.0, 1.0, 2.0, 3.0, 4.0]);
        feed(&mut c, 1, &[None], &[9.0], &[0, 1]);
        let m = c.mask(1, Some(2)).unwrap().unwrap();
        assert_eq!(
            (0..6)
                .filter(|&j| m.double_value(&[0, j]) == 0.0)
                .collect::<Vec<_>>(),
            [4, 5]
        );
        assert!(c.mask(1, Some(100)).unwrap().is_none());
        assert!(c.truncate(1, 7).is_err());
        c.reset(1).unwrap();
        assert_eq!(c.committed_len(1), 0);
    }
}
