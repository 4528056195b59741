//! Who sees whom while pseudo rows are about.
//!
//! Real rows attend exactly as they do without pseudo rows, in a call of their own: the
//! losslessness of hidden transfer is that these calls are the same.

use sequor_nn::attention::{Attend, Cached, Call, Dense, over};
use sequor_nn::kv::Scratch;
use sequor_nn::mask::{Mask, additive};
use sequor_nn::{Error, Result, Tensor};

/// The pseudo rows of one slot: one per node and offset.
#[derive(Debug)]
pub(super) struct Anchors {
    pub slot: usize,
    /// Pending rows of the slot that carry pseudo rows.
    pub nodes: Vec<usize>,
}

/// Rows of several cached slots, then pseudo rows: offset by offset, and within an offset
/// slot by slot.
pub(super) struct WithPseudo<'a> {
    real: Cached<'a>,
    real_rows: i64,
    anchors: &'a [Anchors],
    /// Masks already made: entry of `anchors`, offsets, window.
    masks: Vec<(usize, usize, Option<i64>, Tensor)>,
}

impl<'a> WithPseudo<'a> {
    /// `real_rows` rows are those of `real`.
    pub fn new(real: Cached<'a>, real_rows: usize, anchors: &'a [Anchors]) -> Self {
        Self {
            real,
            real_rows: real_rows as i64,
            anchors,
            masks: Vec::new(),
        }
    }

    fn mask(&mut self, entry: usize, offsets: usize, window: Option<i64>) -> Result<Tensor> {
        let known = |(e, o, w, _): &&(usize, usize, Option<i64>, Tensor)| {
            (*e, *o, *w) == (entry, offsets, window)
        };
        if let Some((.., mask)) = self.masks.iter().find(known) {
            return Ok(mask.shallow_clone());
        }
        let anchors = &self.anchors[entry];
        let scratch: Vec<Scratch> = (1..=offsets)
            .flat_map(|offset| {
                anchors
                    .nodes
                    .iter()
                    .map(move |&node| Scratch { node, offset })
            })
            .collect();
        let mask = self
            .real
            .cache()
            .scratch_mask(anchors.slot, &scratch, window)?;
        self.masks
            .push((entry, offsets, window, mask.shallow_clone()));
        Ok(mask)
    }
}

impl Attend for WithPseudo<'_> {
    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let n = self.real_rows;
        let head = |x: &Tensor| x.f_narrow(0, 0, n);
        let real = self.real.attend(call, &head(q)?, &head(k)?, &head(v)?)?;
        let pseudo = q.size().first().copied().unwrap_or(0) - n;
        let per_offset: i64 = self.anchors.iter().map(|a| a.nodes.len() as i64).sum();
        if pseudo <= 0 || per_offset == 0 {
            return Ok(real);
        }
        let offsets = pseudo / per_offset;
        let mut outs = vec![real];
        // One output per offset and slot, to be put into the order of the rows.
        let mut parts: Vec<Vec<Tensor>> = (0..offsets).map(|_| Vec::new()).collect();
        let mut start = 0;
        for entry in 0..self.anchors.len() {
            let (slot, rows) = (
                self.anchors[entry].slot,
                self.anchors[entry].nodes.len() as i64,
            );
            let of_slot = |x: &Tensor| -> Result<Tensor> {
                let part = |j: i64| x.f_narrow(0, n + j * per_offset + start, rows);
                if rows == per_offset {
                    return Ok(x.f_narrow(0, n, pseudo)?);
                }
                let parts: std::result::Result<Vec<_>, _> = (0..offsets).map(part).collect();
                Ok(Tensor::f_cat(&parts?, 0)?)
            };
            let mask = self.mask(entry, offsets as usize, call.window)?;
            let cache = self.real.cache();
            cache.append_scratch(slot, call.layer, &of_slot(k)?, &of_slot(v)?)?;
            let (keys, values) = cache.view(slot, call.layer)?;
            let out = over(&of_slot(q)?, &keys, &values, Some(&mask), false, call)?;
            for (j, part) in parts.iter_mut().enumerate() {
                part.push(out.f_narrow(0, j as i64 * rows, rows)?);
            }
            start += rows;
        }
        outs.extend(parts.into_iter().flatten());
        Ok(Tensor::f_cat(&outs, 0)?)
    }
}

/// A whole text at once that keeps the keys and values of its upper layers.
pub(super) struct Recorder {
    dense: Dense,
    first: usize,
    /// Keys and values of layer `first` and later ones, `[rows, kv_heads, head_dim]`.
    pub kept: Vec<(Tensor, Tensor)>,
}

impl Recorder {
    /// For a text of `rows` tokens; keeps layers from `first` on.
    pub fn new(rows: usize, first: usize) -> Self {
        Self {
            dense: Dense::new(1, rows as i64, Mask::Causal),
            first,
            kept: Vec::new(),
        }
    }
}

impl Attend for Recorder {
    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if call.layer >= self.first {
            self.kept.push((k.shallow_clone(), v.shallow_clone()));
        }
        self.dense.attend(call, q, k, v)
    }
}

/// Pseudo rows alone, over the recorded keys and values of the real rows.
pub(super) struct Over<'a> {
    /// What [`Recorder`] kept, and the layer it begins with.
    pub kept: &'a [(Tensor, Tensor)],
    pub first: usize,
    /// Rows that carry pseudo rows.
    pub anchors: &'a [usize],
    /// Do pseudo rows see those of smaller offsets?
    pub linked: bool,
    /// Masks already made: offsets, window.
    pub masks: Vec<(usize, Option<i64>, Tensor)>,
}

impl Over<'_> {
    fn mask(&mut self, real: usize, offsets: usize, like: &Tensor, call: Call) -> Result<Tensor> {
        let key = (offsets, call.window);
        if let Some((.., mask)) = self.masks.iter().find(|(o, w, _)| (*o, *w) == key) {
            return Ok(mask.shallow_clone());
        }
        let (n, linked) = (self.anchors.len(), self.linked);
        let place = |i: usize| self.anchors[i % n] + i / n + 1;
        let allowed = |i: usize, j: usize| {
            let (seen, position) = if j < real {
                (j <= self.anchors[i % n], j)
            } else {
                let other = j - real;
                let before = other / n == i / n || (linked && other / n < i / n);
                (other % n == i % n && before, place(other))
            };
            seen && call
                .window
                .is_none_or(|w| place(i) as i64 - (position as i64) < w)
        };
        let rows = n * offsets;
        let mask = additive(rows, real + rows, like.device(), allowed)?;
        self.masks
            .push((offsets, call.window, mask.shallow_clone()));
        Ok(mask)
    }
}

impl Attend for Over<'_> {
    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let kept = call
            .layer
            .checked_sub(self.first)
            .and_then(|i| self.kept.get(i));
        let (keys, values) =
            kept.ok_or_else(|| Error::Input(format!("layer {} was not recorded", call.layer)))?;
        let (rows, real) = (q.size()[0] as usize, keys.size()[0] as usize);
        let mask = self.mask(real, rows / self.anchors.len().max(1), q, call)?;
        let join = |real: &Tensor, pseudo: &Tensor| -> Result<Tensor> {
            Ok(Tensor::f_cat(&[real, pseudo], 0)?.f_transpose(0, 1)?)
        };
        over(
            q,
            &join(keys, k)?,
            &join(values, v)?,
            Some(&mask),
            false,
            call,
        )
    }
}
