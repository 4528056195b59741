//! Sequences of the corpus as batches.

use sequor_kernels::bridge;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::{Device, Kind, Tensor};
use sequor_train::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::train::distill::{DistillCorpus, Sample};

/// Every such sequence is held out, to measure with. Temperatures and kinds of tasks take
/// turns in the corpus by small numbers; this one has no factor in common with them.
const HELD_OUT_EVERY: usize = 19;
/// Sequences that are shuffled among themselves: about a shard of the corpus, which is read
/// once for all of them.
const BLOCK: usize = 64;
/// First positions of a sequence, which are passed over: attention parks there, and their
/// states are unlike all others.
const SINK: usize = 4;

/// One row of a batch: a part of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::train) struct Row {
    /// Place in its sequence of the first position.
    pub first: usize,
    /// Number of positions; what follows in the row is padding.
    pub len: usize,
    /// Tokens of the sequence's prompt.
    pub prompt_len: usize,
}

/// Parts of several sequences, padded at their ends.
#[derive(Debug)]
pub(in crate::train) struct Batch {
    /// `[batch, time]` int64; 0 in the padding.
    pub tokens: Tensor,
    /// The target's states after its final norm, `[batch, time, dim]` f32; 0 in the padding.
    pub features: Tensor,
    /// What lies in each row.
    pub rows: Vec<Row>,
}

impl Batch {
    /// Lays parts of sequences side by side: of each at most `context` positions from `first`.
    pub fn new(parts: &[(Sample, usize)], context: usize) -> Result<Self> {
        let rows: Vec<Row> = parts
            .iter()
            .map(|(s, first)| Row {
                first: *first,
                len: s.tokens.len().saturating_sub(*first).min(context),
                prompt_len: s.prompt_len,
            })
            .collect();
        let time = rows.iter().map(|r| r.len).max().unwrap_or(0);
        let mut tokens = Vec::with_capacity(rows.len() * time);
        let mut features = Vec::with_capacity(rows.len());
        for ((sample, _), row) in parts.iter().zip(&rows) {
            let part = sample.tokens.iter().skip(row.first).take(row.len);
            tokens.extend(part.map(|&t| i64::from(t)));
            tokens.resize(tokens.len() + time - row.len, 0);
            let part = sample
                .features
                .f_narrow(0, row.first as i64, row.len as i64)?;
            features.push(part.f_constant_pad_nd([0, 0, 0, (time - row.len) as i64])?);
        }
        let shape = [rows.len() as i64, time as i64];
        let tokens = bridge::from_slice(&tokens, &shape).map_err(Error::task)?;
        Ok(Self {
            tokens,
            features: Tensor::f_stack(&features, 0)?,
            rows,
        })
    }

    /// Positions per row, padding included.
    pub fn time(&self) -> usize {
        self.rows.iter().map(|r| r.len).max().unwrap_or(0)
    }

    /// Places `row * time + n` of the positions that are `ahead` or more before the end of
    /// their row and that `keep` wants.
    pub fn places(&self, ahead: usize, mut keep: impl FnMut(&Row, usize) -> bool) -> Vec<usize> {
        let time = self.time();
        let mut places = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            let end = row.len.saturating_sub(ahead);
            places.extend((0..end).filter(|&n| keep(row, n)).map(|n| i * time + n));
        }
        places
    }

    /// How many positions follow `place` in its row.
    pub fn left(&self, place: usize) -> usize {
        let time = self.time().max(1);
        let len = self.rows.get(place / time).map_or(0, |r| r.len);
        len.saturating_sub(place % time + 1)
    }
}

impl Row {
    /// Is this position one from which a generation would draft? Its next token was chosen by
    /// the model, not by the prompt.
    pub fn is_answer(&self, n: usize) -> bool {
        self.first + n + 1 >= self.prompt_len
    }

    /// Is this position among those that are learned from at all?
    pub fn is_regular(&self, n: usize) -> bool {
        self.first + n >= SINK
    }
}

/// Numbers of the held-out sequences.
pub(in crate::train) fn held_out(corpus: &DistillCorpus) -> Vec<usize> {
    // A small corpus has one, too: its last.
    let every = HELD_OUT_EVERY.min(corpus.sequences());
    (0..corpus.sequences())
        .filter(|i| (i + 1).is_multiple_of(every))
        .collect()
}

/// A place in the order of [`Sequences`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    epoch: u64,
    index: usize,
}

/// The sequences to learn from, without end, in an order that depends on seed and epoch
/// alone. Near ones stay near, so that reading them is cheap.
#[derive(Debug)]
pub(in crate::train) struct Sequences {
    seed: u64,
    blocks: Vec<Vec<usize>>,
    epoch: u64,
    index: usize,
    order: Vec<usize>,
}

impl Sequences {
    /// All sequences of the corpus but the held-out ones.
    pub fn new(corpus: &DistillCorpus, seed: u64) -> Self {
        let held = held_out(corpus);
        let mut blocks: Vec<Vec<usize>> = Vec::new();
        for i in (0..corpus.sequences()).filter(|i| held.binary_search(i).is_err()) {
            match blocks.last_mut() {
                Some(block) if block.first().is_some_and(|f| f / BLOCK == i / BLOCK) => {
                    block.push(i);
                }
                _ => blocks.push(vec![i]),
            }
        }
        let mut sequences = Self {
            seed,
            blocks,
            epoch: 0,
            index: 0,
            order: Vec::new(),
        };
        sequences.order = sequences.order(0);
        sequences
    }

    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut random = Key::new(self.seed, epoch).stream(0, Purpose::Data);
        let mut blocks = self.blocks.clone();
        random.shuffle(&mut blocks);
        blocks.iter_mut().for_each(|block| random.shuffle(block));
        blocks.concat()
    }

    /// Sequences in an epoch.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Passes over all sequences so far.
    pub fn epochs(&self) -> f64 {
        self.epoch as f64 + self.index as f64 / self.len().max(1) as f64
    }

    /// Where the next sequence comes from.
    pub fn cursor(&self) -> serde_json::Value {
        let place = Place {
            epoch: self.epoch,
            index: self.index,
        };
        serde_json::to_value(place).unwrap_or_default()
    }

    /// Goes to a place that [`cursor`](Self::cursor) gave.
    pub fn seek(&mut self, cursor: &serde_json::Value) -> Result<()> {
        let place: Place = serde_json::from_value(cursor.clone()).map_err(Error::task)?;
        let order = self.order(place.epoch);
        if place.index > order.len() {
            return Err(Error::Input(format!(
                "the stored place is sequence {} of an epoch of {}: the corpus is another one",
                place.index,
                order.len()
            )));
        }
        (self.epoch, self.index, self.order) = (place.epoch, place.index, order);
        Ok(())
    }

    /// The next sequences, `count` of them, of each a part of at most `context` positions at
    /// a random place. Those shorter than `least` positions are passed over.
    pub fn next_batch(
        &mut self,
        corpus: &DistillCorpus,
        count: usize,
        context: usize,
        least: usize,
    ) -> Result<Batch> {
        let mut parts = Vec::with_capacity(count);
        let mut tried = 0;
        while parts.len() < count {
            if self.index >= self.order.len() {
                self.epoch += 1;
                self.order = self.order(self.epoch);
                self.index = 0;
            }
            let number = self.order.get(self.index).copied();
            tried += 1;
            let Some(number) = number.filter(|_| tried <= count + self.order.len()) else {
                return Err(Error::Input(format!(
                    "the corpus has no sequence of {least} or more tokens to learn from; make a larger one"
                )));
            };
            self.index += 1;
            let sample = corpus.read(number).map_err(Error::task)?;
            if sample.tokens.len() < least {
                continue;
            }
            let slack = sample.tokens.len().saturating_sub(context);
            let mut random =
                Key::new(self.seed, self.epoch).stream(number as u64 + 1, Purpose::Data);
            let first = random.below(slack as u64 + 1) as usize;
            parts.push((sample, first));
        }
        Batch::new(&parts, context)
    }
}

/// Places as an index tensor.
pub(in crate::train) fn index(places: impl IntoIterator<Item = usize>) -> Result<Tensor> {
    let places: Vec<i64> = places.into_iter().map(|p| p as i64).collect();
    if places.is_empty() {
        return Ok(Tensor::f_zeros([0], (Kind::Int64, Device::Cpu))?);
    }
    Ok(Tensor::f_from_slice(&places)?)
}
