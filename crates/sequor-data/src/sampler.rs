//! Token documents as one stream, and training windows from it in an order that
//! depends on the seed alone and can be taken up again at any point.

use std::sync::Arc;

use sequor_kernels::rng::{Key, Purpose, Stream};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Documents of token ids, laid end to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenStream {
    ids: Vec<u32>,
    fingerprint: u64,
}

impl TokenStream {
    /// Joins documents, with `separator` after each when there is one (usually
    /// the end-of-text token).
    pub fn from_documents<D: AsRef<[u32]>>(
        documents: impl IntoIterator<Item = D>,
        separator: Option<u32>,
    ) -> Self {
        let mut ids = Vec::new();
        for document in documents {
            ids.extend_from_slice(document.as_ref());
            ids.extend(separator);
        }
        let mut hasher = Sha256::new();
        ids.iter().for_each(|id| hasher.update(id.to_le_bytes()));
        Self {
            ids,
            fingerprint: first_bytes(hasher),
        }
    }

    /// All ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// A hash of the ids: equal streams have equal ones.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Windows for measuring, in order: each predicts up to `window` ids from the
    /// ones before, so it holds one id more; neighbours share one id, and every
    /// id but the first is predicted exactly once. A `window` of 0 counts as 1.
    pub fn windows(&self, window: usize) -> impl Iterator<Item = &[u32]> {
        let window = window.max(1);
        let last = self.ids.len().saturating_sub(1);
        (0..last)
            .step_by(window)
            .map(move |start| &self.ids[start..=(start + window).min(last)])
    }
}

/// A place in the order of a [`WindowSampler`], to be stored with a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Windows of this pass that were handed out.
    pub index: u64,
    /// Identifies data, window and seed.
    pub fingerprint: u64,
}

/// Training windows without end: each epoch cuts the stream into windows at
/// another offset and hands them out in another order. Both are a function of
/// (seed, epoch) alone, so that a run goes on from a [`Cursor`] as if it had never
/// stopped.
///
/// ```
/// # fn main() -> sequor_data::Result<()> {
/// use sequor_data::sampler::{TokenStream, WindowSampler};
/// let stream = TokenStream::from_documents([(0..100).collect::<Vec<u32>>()], None);
/// let mut sampler = WindowSampler::new(stream.into(), 8, 42)?;
/// let first = sampler.next_window().to_vec();
/// assert_eq!(first.len(), 9); // 8 inputs and, one further on, 8 targets
/// let cursor = sampler.cursor();
/// let expected = sampler.next_batch(3).concat();
/// sampler.seek(cursor)?;
/// assert_eq!(sampler.next_batch(3).concat(), expected);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct WindowSampler {
    stream: Arc<TokenStream>,
    window: usize,
    seed: u64,
    fingerprint: u64,
    epoch: u64,
    index: usize,
    /// First id of each window of this epoch, in the order they are handed out.
    starts: Vec<usize>,
}

impl WindowSampler {
    /// Windows of `window` inputs (and one id more) over a stream.
    ///
    /// # Errors
    /// [`Error::Input`] when `window` is 0 or the stream is too short for one.
    pub fn new(stream: Arc<TokenStream>, window: usize, seed: u64) -> Result<Self> {
        if window == 0 {
            return Err(Error::Input(
                "the window length is 0; it must be at least 1".into(),
            ));
        }
        if stream.len() <= window {
            return Err(Error::Input(format!(
                "the data hold {} tokens, and one window of {window} needs {}; take more data or a shorter window",
                stream.len(),
                window.saturating_add(1)
            )));
        }
        let hasher = [stream.fingerprint, window as u64, seed]
            .iter()
            .fold(Sha256::new(), |h, n| h.chain_update(n.to_le_bytes()));
        let mut sampler = Self {
            stream,
            window,
            seed,
            fingerprint: first_bytes(hasher),
            epoch: 0,
            index: 0,
            starts: Vec::new(),
        };
        sampler.starts = sampler.order(0);
        Ok(sampler)
    }

    /// The windows of an epoch, by their first id.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut random: Stream = Key::new(self.seed, epoch).stream(0, Purpose::Data);
        let predicted = self.stream.len() - 1;
        // With a single window only the slack can be moved into.
        let largest = match predicted / self.window {
            1 => predicted % self.window,
            _ => self.window - 1,
        };
        let offset = random.below(largest as u64 + 1) as usize;
        let count = (predicted - offset) / self.window;
        let mut starts: Vec<usize> = (0..count).map(|i| offset + i * self.window).collect();
        random.shuffle(&mut starts);
        starts
    }

    /// Windows in the current epoch. Epochs differ by at most one.
    pub fn windows_in_epoch(&self) -> usize {
        self.starts.len()
    }

    /// Where the next window comes from.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            epoch: self.epoch,
            index: self.index as u64,
            fingerprint: self.fingerprint,
        }
    }

    /// Goes to a place in the order.
    ///
    /// # Errors
    /// [`Error::Input`] when the cursor was taken with other data, another window
    /// or another seed.
    pub fn seek(&mut self, cursor: Cursor) -> Result<()> {
        if cursor.fingerprint != self.fingerprint {
            return Err(Error::Input(
                "the stored place belongs to other data, another window length or another seed, so training cannot go on from it; restore these, or start afresh".into(),
            ));
        }
        let starts = self.order(cursor.epoch);
        let index = usize::try_from(cursor.index)
            .ok()
            .filter(|i| *i <= starts.len())
            .ok_or_else(|| {
                Error::Input(format!(
                    "the stored place is window {} of an epoch of {}",
                    cursor.index,
                    starts.len()
                ))
            })?;
        (self.epoch, self.index, self.starts) = (cursor.epoch, index, starts);
        Ok(())
    }

    fn next_start(&mut self) -> usize {
        if self.index >= self.starts.len() {
            self.epoch = self.epoch.wrapping_add(1);
            self.starts = self.order(self.epoch);
            self.index = 0;
        }
        let start = self.starts[self.index];
        self.index += 1;
        start
    }

    /// The next window, `window + 1` ids.
    pub fn next_window(&mut self) -> &[u32] {
        let start = self.next_start();
        &self.stream.ids[start..=start + self.window]
    }

    /// The next `n` windows, each `window + 1` ids. A batch may span two epochs.
    pub fn next_batch(&mut self, n: usize) -> Vec<&[u32]> {
        let starts: Vec<usize> = (0..n).map(|_| self.next_start()).collect();
        starts
            .into_iter()
            .map(|s| &self.stream.ids[s..=s + self.window])
            .collect()
    }
}

fn first_bytes(hasher: Sha256) -> u64 {
    hasher
        .finalize()
        .iter()
        .take(8)
        .fold(0, |n, &b| n << 8 | u64::from(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(n: u32) -> Arc<TokenStream> {
        Arc::new(TokenStream::from_documents(
            [(0..n).collect::<Vec<_>>()],
            None,
        ))
    }

    #[test]
    fn documents_are_joined_with_a_separator() {
        let stream = TokenStream::from_documents([vec![1, 2], vec![], vec![3]], Some(9));
        assert_eq!(stream.ids(), [1, 2, 9, 9, 3, 9]);
        assert_ne!(
            stream.fingerprint(),
            TokenStream::from_documents([[1, 2]], None).fingerprint()
        );
    }

    #[test]
    fn measuring_predicts_every_id_once() {
        for n in 0..12 {
            for window in [1, 2, 3, 5, 100] {
                let stream = counting(n);
                let mut predicted: Vec<u32> = Vec::new();
                for w in stream.windows(window) {
                    assert!((2..=window + 1).contains(&w.len()));
                    predicted.extend(&w[1..]);
                }
                assert_eq!(predicted, (1..n).collect::<Vec<_>>(), "{n} {window}");
            }
        }
    }

    #[test]
    fn an_epoch_hands_out_disjoint_targets_and_all_but_the_edges() {
        for (n, window) in [(100, 8), (9, 8), (10, 8), (17, 8), (18, 8), (50, 1), (2, 1)] {
            let mut s = WindowSampler::new(counting(n), window, 7).unwrap();
            for _ in 0..5 {
                let count = s.windows_in_epoch();
                assert!(count >= 1 && count + 1 >= (n as usize - 1) / window);
                let mut targets: Vec<u32> = Vec::new();
                for w in s.next_batch(count) {
                    assert_eq!(w.len(), window + 1);
                    assert!(w.windows(2).all(|p| p[1] == p[0] + 1));
                    targets.extend(&w[1..]);
                }
                targets.sort_unstable();
                assert_eq!(targets.len(), count * window);
                assert!(
                    targets.windows(2).all(|p| p[1] == p[0] + 1),
                    "no gaps, nothing twice"
                );
                // Into the next epoch.
                let epoch = s.cursor().epoch;
                s.next_start();
                assert_eq!(s.cursor().epoch, epoch + 1);
                s.index = 0;
            }
        }
    }

    #[test]
    fn seeds_and_epochs_differ_and_repeat() {
        let take = |seed| {
            WindowSampler::new(counting(1000), 4, seed)
                .unwrap()
                .next_batch(600)
                .concat()
        };
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
        let all = take(1);
        assert_ne!(all[..500], all[1245..1745]);
    }

    #[test]
    fn from_every_cursor_the_run_goes_on_as_before() {
        let mut straight = WindowSampler::new(counting(100), 8, 3).unwrap();
        for _ in 0..40 {
            let text = serde_json::to_string(&straight.cursor()).unwrap();
            let mut resumed = WindowSampler::new(counting(100), 8, 3).unwrap();
            resumed.seek(serde_json::from_str(&text).unwrap()).unwrap();
            let mut ahead = straight.clone();
            assert_eq!(resumed.next_batch(15), ahead.next_batch(15));
            straight.next_window();
        }
    }

    #[test]
    fn bad_settings_and_foreign_cursors_are_refused() {
        assert!(WindowSampler::new(counting(8), 0, 0).is_err());
        assert!(WindowSampler::new(counting(8), 8, 0).is_err());
        assert!(WindowSampler::new(counting(8), usize::MAX, 0).is_err());
        let mut s = WindowSampler::new(counting(9), 8, 0).unwrap();
        let here = s.cursor();
        for other in [
            (counting(10), 8, 0),
            (counting(9), 7, 0),
            (counting(9), 8, 1),
        ] {
            let foreign = WindowSampler::new(other.0, other.1, other.2)
                .unwrap()
                .cursor();
            assert!(s.seek(foreign).is_err());
        }
        assert!(
            s.seek(Cursor {
                index: 1000,
                ..here
            })
            .is_err()
        );
        assert!(
            s.seek(Cursor {
                index: u64::MAX,
                epoch: u64::MAX,
                ..here
            })
            .is_err()
        );
        s.seek(Cursor {
            epoch: u64::MAX,
            ..here
        })
        .unwrap();
        s.next_batch(3);
    }
}
