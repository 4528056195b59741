//! Lookahead decoding (Fu et al. 2024): a Jacobi window in two dimensions and a pool of
//! n-grams that it finds.
//!
//! ```text
//! newest token
//! |-- pooled n-grams that begin with it                  (checked)
//! `-- a0 -- a1 -- a2 -- ...            oldest iterate, one column per position
//!     |     |     |
//!     b0    b1    b2                   next iterate, one position further
//!     |     |     |
//!     c0    c1    c2                   newest iterate
//! ```
//!
//! The row after `c0` says what follows `a0 b0 c0`: the n-gram goes into the pool, and the
//! tokens behind the newest iterate form the next one while the oldest is dropped. All of
//! it is one draft tree, so that the branches do not see each other and any part of the
//! window that turns out right is accepted as well.

use std::collections::{HashMap, VecDeque};

use sequor_kernels::rng::Purpose;
use serde::{Deserialize, Serialize};

use super::{Budget, DraftContext, Drafter, Feedback};
use crate::tree::{DraftTree, Proposal};
use crate::{Error, Result};

/// Keys after which the pool is emptied.
const MAX_KEYS: usize = 1 << 18;

/// Options of [`Lookahead`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LookaheadOptions {
    /// Columns of the window, `1..=64`.
    pub window: usize,
    /// Length of the n-grams, `2..=16`.
    pub ngram: usize,
    /// N-grams kept per first token, `1..=64`.
    pub pool: usize,
    /// Fills the pool from the prompt and the output as well.
    pub pool_from_text: bool,
}

impl Default for LookaheadOptions {
    fn default() -> Self {
        Self {
            window: 7,
            ngram: 5,
            pool: 7,
            pool_from_text: true,
        }
    }
}

impl LookaheadOptions {
    /// Checks the options.
    ///
    /// # Errors
    /// `Input` naming the option.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("window", self.window, 1..=64),
            ("ngram", self.ngram, 2..=16),
            ("pool", self.pool, 1..=64),
        ] {
            if !range.contains(&value) {
                return Err(Error::input(name, value, format!("a number in {range:?}")));
            }
        }
        Ok(())
    }

    /// Nodes of a full draft: the window and as many n-grams as the pool may hold.
    #[must_use]
    pub fn nodes(&self) -> usize {
        (self.window + self.pool) * (self.ngram - 1)
    }

    /// Length of the longest path of a full draft.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.window + self.ngram - 2
    }
}

/// Drafts pooled n-grams and a window that finds new ones.
#[derive(Clone, Debug)]
pub struct Lookahead {
    options: LookaheadOptions,
    /// Continuations of a token, newest last.
    pool: HashMap<u32, VecDeque<Vec<u32>>>,
    /// `levels[k][j]`: the guess of iterate `k` in column `j`, oldest iterate first.
    levels: Vec<Vec<u32>>,
    /// The node of the newest iterate in each column that was proposed.
    tips: Vec<usize>,
    /// The sequence as far as its n-grams are in the pool.
    seen: Vec<u32>,
}

impl Lookahead {
    /// An empty pool.
    ///
    /// # Errors
    /// `Input` naming an option that is out of range.
    pub fn new(options: LookaheadOptions) -> Result<Self> {
        options.validate()?;
        Ok(Self {
            options,
            pool: HashMap::new(),
            levels: Vec::new(),
            tips: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &LookaheadOptions {
        &self.options
    }

    fn keep(&mut self, key: u32, tail: Vec<u32>) {
        if self.pool.len() >= MAX_KEYS && !self.pool.contains_key(&key) {
            self.pool.clear();
        }
        let tails = self.pool.entry(key).or_default();
        tails.retain(|known| *known != tail);
        tails.push_back(tail);
        if tails.len() > self.options.pool {
            tails.pop_front();
        }
    }

    fn read(&mut self, tokens: &[u32]) {
        let common = (self.seen.iter().zip(tokens))
            .take_while(|(a, b)| a == b)
            .count();
        let from = (common + 1).saturating_sub(self.options.ngram);
        let fresh = tokens.get(from..).unwrap_or_default();
        for gram in fresh.windows(self.options.ngram) {
            if let Some((&key, tail)) = gram.split_first() {
                self.keep(key, tail.to_vec());
            }
        }
        self.seen.truncate(common);
        self.seen
            .extend_from_slice(tokens.get(common..).unwrap_or_default());
    }

    /// Adds a path below the root, sharing what is there already.
    fn insert(tree: &mut DraftTree, path: &[u32], room: usize) -> Result<()> {
        let mut parent = None;
        for &token in path {
            let known = tree
                .children(parent)
                .find(|&c| tree.units().get(c) == Some(&token));
            parent = match known {
                Some(node) => Some(node),
                None if tree.len() >= room => break,
                None => Some(tree.push(parent, token, Proposal::OneHot)?),
            };
        }
        Ok(())
    }
}

impl Drafter for Lookahead {
    fn name(&self) -> &str {
        "lookahead"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        self.tips.clear();
        let mut tree = DraftTree::new();
        let Some(&newest) = ctx.tokens.last() else {
            return Ok(tree);
        };
        if self.options.pool_from_text {
            self.read(ctx.tokens);
        }
        let levels = self.options.ngram - 1;
        if self.levels.is_empty() {
            let mut stream = ctx.key.stream(ctx.tokens.len() as u64, Purpose::Draft);
            let mut any = || {
                let at = stream.below(ctx.tokens.len() as u64) as usize;
                ctx.tokens.get(at).copied().unwrap_or(newest)
            };
            self.levels = (0..levels)
                .map(|_| (0..self.options.window).map(|_| any()).collect())
                .collect();
        }
        // Window and pool share a small budget as they share a full one; only columns that
        // fit whole are drafted.
        let (window, pool) = (self.options.window, self.options.pool);
        let columns = window
            .min(budget.nodes.saturating_mul(window) / (window + pool) / levels)
            .min((budget.depth + 1).saturating_sub(levels));
        let room = budget.nodes - columns * levels;
        for tail in self.pool.get(&newest).into_iter().flatten().rev() {
            let tail = tail.get(..tail.len().min(budget.depth)).unwrap_or_default();
            Self::insert(&mut tree, tail, room)?;
        }
        let mut column_parent = None;
        for column in 0..columns {
            let cells = self
                .levels
                .iter()
                .filter_map(|level| level.get(column).copied());
            let mut parent = column_parent;
            for (level, token) in cells.enumerate() {
                let node = tree.push(parent, token, Proposal::OneHot)?;
                if level == 0 {
                    column_parent = Some(node);
                }
                parent = Some(node);
            }
            self.tips.extend(parent);
        }
        Ok(tree)
    }

    fn observe(&mut self, feedback: &Feedback<'_>) {
        let Some(best) = feedback.best else { return };
        let found: Vec<u32> = self
            .tips
            .iter()
            .map_while(|&tip| best.get(tip + 1).copied())
            .collect();
        if found.is_empty() || found.len() < self.tips.len() {
            return;
        }
        for (column, &last) in found.iter().enumerate() {
            let cells = self
                .levels
                .iter()
                .filter_map(|level| level.get(column).copied());
            let gram: Vec<u32> = cells.chain([last]).collect();
            if let Some((&key, tail)) = gram.split_first() {
                self.keep(key, tail.to_vec());
            }
        }
        // One token further, the next iterate's columns are in place; for every token
        // beyond that they move on by one.
        let width = self.options.window;
        let skip = feedback.added.len().saturating_sub(1) % width;
        let newest: Vec<u32> = found.iter().copied().cycle().take(width).collect();
        self.levels.remove(0);
        self.levels.push(newest);
        self.levels
            .iter_mut()
            .for_each(|level| level.rotate_left(skip));
    }

    fn reset(&mut self) {
        self.pool.clear();
        self.levels.clear();
        self.tips.clear();
        self.seen.clear();
    }

    fn wants_best(&self) -> bool {
        true
    }

    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        // The window pays later, through the pool: every row counts the same.
        let full = self.options.nodes();
        Some(vec![0.7 / full.max(1) as f64; full])
    }
}
