//! What followed each pair of tokens, and how often.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::{Error, Result};

/// Most pairs of a table.
pub(super) const MAX_ROWS: usize = 1 << 22;
/// Most successors that are kept for a pair.
pub(super) const MAX_ROW: usize = 64;

/// Tells tables of different tokenizers apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// Number of tokens.
    pub size: u32,
    /// A hash of the tokenizer, for instance SHA-256 of its file.
    pub hash: [u8; 32],
}

impl Default for Vocabulary {
    /// Any token, no tokenizer in particular.
    fn default() -> Self {
        Self {
            size: u32::MAX,
            hash: [0; 32],
        }
    }
}

/// Successors of a pair with their weights, heaviest first.
pub(super) type Row = Vec<(u32, f32)>;

/// Weights of the token `c` after the tokens `a, b`, and after `b` whatever came before.
///
/// Counted rows sum to one; weights that were learned on the way may grow beyond that.
#[derive(Clone, Debug, Default)]
pub struct TrigramTable {
    vocabulary: Vocabulary,
    pub(super) pairs: Rows,
    pub(super) singles: Rows,
}

impl TrigramTable {
    /// A table that knows nothing yet.
    #[must_use]
    pub fn new(vocabulary: Vocabulary) -> Self {
        Self {
            vocabulary,
            ..Self::default()
        }
    }

    /// Counts the trigrams of `tokens` and keeps the `topn` heaviest successors per row.
    ///
    /// # Errors
    /// `Input` for a token outside the vocabulary, `Limits` for more than 4,194,304
    /// different pairs.
    pub fn from_tokens(tokens: &[u32], vocabulary: Vocabulary, topn: usize) -> Result<Self> {
        if let Some(id) = tokens.iter().find(|&&t| t >= vocabulary.size) {
            let expected = format!("ids below {}", vocabulary.size);
            return Err(Error::input("tokens", format!("token {id}"), expected));
        }
        let mut table = Self::new(vocabulary);
        let triples = tokens.windows(3).filter_map(|w| match *w {
            [a, b, c] => Some((key(a, b), c)),
            _ => None,
        });
        table.pairs.count(triples.collect(), topn)?;
        let pairs = tokens.windows(2).filter_map(|w| match *w {
            [b, c] => Some((u64::from(b), c)),
            _ => None,
        });
        table.singles.count(pairs.collect(), topn)?;
        Ok(table)
    }

    /// The vocabulary that it is for.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Number of pairs with successors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pairs.rows.len()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pairs.rows.is_empty() && self.singles.rows.is_empty()
    }

    /// Successors of `a, b` with their weights, heaviest first.
    #[must_use]
    pub fn after_pair(&self, a: u32, b: u32) -> &[(u32, f32)] {
        self.pairs.get(key(a, b))
    }

    /// Successors of `b` with their weights, heaviest first.
    #[must_use]
    pub fn after(&self, b: u32) -> &[(u32, f32)] {
        self.singles.get(u64::from(b))
    }

    /// Adds `delta` to the weight of every trigram (and pair) of `tokens`, never beyond
    /// `cap`. A full table learns nothing about new pairs, a full row forgets its lightest
    /// successor.
    pub fn learn(&mut self, tokens: &[u32], delta: f32, cap: f32) {
        for w in tokens.windows(3) {
            if let [a, b, c] = *w {
                self.pairs.add(key(a, b), c, delta, cap);
            }
        }
        for w in tokens.windows(2) {
            if let [b, c] = *w {
                self.singles.add(u64::from(b), c, delta, cap);
            }
        }
    }

    /// Keeps the `topn` heaviest successors of every row.
    pub fn truncate(&mut self, topn: usize) {
        for row in self.pairs.rows.iter_mut().chain(&mut self.singles.rows) {
            row.truncate(topn.max(1));
        }
    }
}

/// Two tokens as one key.
pub(super) fn key(a: u32, b: u32) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

/// Rows by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    index: HashMap<u64, u32, BuildHasherDefault<Mix>>,
    rows: Vec<Row>,
}

impl Rows {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn get(&self, key: u64) -> &[(u32, f32)] {
        let row = self
            .index
            .get(&key)
            .and_then(|&i| self.rows.get(i as usize));
        row.map(Vec::as_slice).unwrap_or_default()
    }

    /// Keys with their rows, keys ascending.
    pub fn sorted(&self) -> Vec<(u64, &Row)> {
        let row = |(&key, &i): (&u64, &u32)| Some((key, self.rows.get(i as usize)?));
        let mut all: Vec<_> = self.index.iter().filter_map(row).collect();
        all.sort_unstable_by_key(|&(key, _)| key);
        all
    }

    /// A new row; the key must be new too.
    pub fn insert(&mut self, key: u64, row: Row) {
        self.index.insert(key, self.rows.len() as u32);
        self.rows.push(row);
    }

    /// Turns occurrences of (key, successor) into rows that sum to one.
    fn count(&mut self, mut seen: Vec<(u64, u32)>, topn: usize) -> Result<()> {
        seen.sort_unstable();
        for run in seen.chunk_by(|x, y| x.0 == y.0) {
            let Some(&(key, _)) = run.first() else {
                continue;
            };
            if self.rows.len() >= MAX_ROWS {
                return Err(Error::Limits {
                    what: "the number of different token pairs",
                    found: seen.chunk_by(|x, y| x.0 == y.0).count(),
                    limit: MAX_ROWS,
                    advice: "build the table from less text",
                });
            }
            let successors = run.chunk_by(|x, y| x.1 == y.1);
            let mut row: Row = successors
                .filter_map(|s| Some((s.first()?.1, s.len() as f32 / run.len() as f32)))
                .collect();
            row.sort_by(|x, y| y.1.total_cmp(&x.1));
            row.truncate(topn.clamp(1, MAX_ROW));
            self.insert(key, row);
        }
        Ok(())
    }

    fn add(&mut self, key: u64, token: u32, delta: f32, cap: f32) {
        let row = match self.index.get(&key) {
            Some(&i) => self.rows.get_mut(i as usize),
            None if self.rows.len() >= MAX_ROWS => None,
            None => {
                self.insert(key, Row::new());
                self.rows.last_mut()
            }
        };
        let Some(row) = row else { return };
        let found = row.iter().position(|&(t, _)| t == token);
        let mut at = found.unwrap_or_else(|| {
            row.truncate(MAX_ROW - 1);
            row.push((token, 0.0));
            row.len() - 1
        });
        if let Some((_, weight)) = row.get_mut(at) {
            *weight = (*weight + delta).min(cap.max(*weight));
        }
        while let (Some(above), Some(here)) =
            (at.checked_sub(1).and_then(|i| row.get(i)), row.get(at))
        {
            if above.1 >= here.1 {
                break;
            }
            row.swap(at - 1, at);
            at -= 1;
        }
    }
}

/// Hashes the integers that are used as keys: the finaliser of SplitMix64.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 << 8 | u64::from(byte));
        }
    }
    fn write_u64(&mut self, key: u64) {
        let z = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = z ^ (z >> 31);
    }
}
