//! Drafts from a table of trigrams that learns while it is used (ADED, Liu et al. 2025).
//!
//! The table holds what followed each pair of tokens. It may be counted from a text
//! beforehand or start empty; before every proposal the last tokens of the sequence, the
//! prompt's included, are added to it, and a tree search finds the continuations that are
//! worth checking. Nothing is trained, and nothing but the table is kept: carry the
//! drafter over to the next request and it knows what it has read.
//!
//! The search is random, but what it finds is *chosen*, not drawn from a law that the
//! verifier would have to know: any tree is exact, and the output does not depend on it.

mod file;
mod search;
mod table;

use sequor_kernels::rng::Purpose;
use serde::{Deserialize, Serialize};

pub use search::TreeSearch;
pub use table::{TrigramTable, Vocabulary};

use super::grow::{Expander, StaticTree, Topology, grow};
use super::{Budget, DraftContext, Drafter};
use crate::tree::DraftTree;
use crate::{Error, Result};

/// How the table learns.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaptiveTrigram {
    /// Added to the weight of a trigram each time it is seen, above 0.
    pub delta: f32,
    /// Largest weight, above 0.
    pub cap: f32,
    /// Tokens at the end of the sequence that are learned from before every proposal, at
    /// least 3. A trigram is seen again as long as it is among them, so that what is recent
    /// weighs more.
    pub window: usize,
}

impl Default for AdaptiveTrigram {
    fn default() -> Self {
        Self {
            delta: 0.04,
            cap: 3.0,
            window: 16,
        }
    }
}

/// Options of [`Trigram`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrigramOptions {
    /// Learns while it is used; `None` leaves the table as it is.
    pub adapt: Option<AdaptiveTrigram>,
    /// Searches the table; `None` takes the continuations of the largest product of
    /// weights.
    pub search: Option<TreeSearch>,
    /// Successors per pair that are kept of a table that is given, `1..=64`.
    pub topn: usize,
}

impl Default for TrigramOptions {
    fn default() -> Self {
        Self {
            adapt: Some(AdaptiveTrigram::default()),
            search: Some(TreeSearch::default()),
            topn: 12,
        }
    }
}

impl TrigramOptions {
    /// Checks the options.
    ///
    /// # Errors
    /// `Input` naming the option.
    pub fn validate(&self) -> Result<()> {
        if let Some(adapt) = self.adapt {
            for (name, value) in [("delta", adapt.delta), ("cap", adapt.cap)] {
                if !(value.is_finite() && value > 0.0) {
                    return Err(Error::input(name, value, "a finite number > 0"));
                }
            }
            if adapt.window < 3 {
                return Err(Error::input("window", adapt.window, "at least 3"));
            }
        }
        if !(1..=table::MAX_ROW).contains(&self.topn) {
            return Err(Error::input("topn", self.topn, "a number in 1..=64"));
        }
        self.search.map_or(Ok(()), |search| search.validate())
    }
}

/// Drafts from a table of trigrams.
#[derive(Clone, Debug)]
pub struct Trigram {
    options: TrigramOptions,
    table: TrigramTable,
    /// The sequence as it was when the table last learned from it.
    seen: Vec<u32>,
    /// What a tree of some size is expected to be worth.
    shape: StaticTree,
}

impl Trigram {
    /// A drafter with an empty table.
    ///
    /// # Errors
    /// `Input` naming an option that is out of range.
    pub fn new(options: TrigramOptions) -> Result<Self> {
        options.validate()?;
        // Only the form of the curve matters; the loop scales it by what it sees.
        let ranks: Vec<f64> = (0..options.topn)
            .map(|r| 0.4 / f64::powi(r as f64 + 1.0, 2))
            .collect();
        let nodes = options.search.map_or(64, |s| s.nodes);
        Ok(Self {
            options,
            table: TrigramTable::default(),
            seen: Vec::new(),
            shape: StaticTree::search(&vec![ranks; 5], nodes),
        })
    }

    /// Starts from `table`, of which the heaviest `topn` successors per pair are kept.
    #[must_use]
    pub fn with_table(mut self, mut table: TrigramTable) -> Self {
        table.truncate(self.options.topn);
        self.table = table;
        self.seen.clear();
        self
    }

    /// The table as it is now.
    #[must_use]
    pub fn table(&self) -> &TrigramTable {
        &self.table
    }

    /// The table, to be kept.
    #[must_use]
    pub fn into_table(self) -> TrigramTable {
        self.table
    }

    /// Learns what is new in `tokens`, and the last tokens again.
    fn learn(&mut self, tokens: &[u32]) {
        let Some(adapt) = self.options.adapt else {
            return;
        };
        let common = (self.seen.iter().zip(tokens))
            .take_while(|(a, b)| a == b)
            .count();
        // The first new trigram begins two tokens earlier.
        let fresh = if common == 0 {
            0
        } else {
            common.saturating_sub(2)
        };
        let from = fresh.min(tokens.len().saturating_sub(adapt.window));
        self.table.learn(
            tokens.get(from..).unwrap_or_default(),
            adapt.delta,
            adapt.cap,
        );
        self.seen.truncate(common);
        self.seen
            .extend_from_slice(tokens.get(common..).unwrap_or_default());
    }
}

impl Drafter for Trigram {
    fn name(&self) -> &str {
        "trigram"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        self.learn(ctx.tokens);
        let Some((&newest, before)) = ctx.tokens.split_last() else {
            return Ok(DraftTree::new());
        };
        // Any token will do in front of the first: its pairs are unknown.
        let root = (before.last().copied().unwrap_or(u32::MAX), newest);
        let root_row = match self.table.after_pair(root.0, root.1) {
            [] => self.table.after(newest),
            row => row,
        };
        let successors = |a: u32, b: u32| -> &[(u32, f32)] {
            match () {
                () if (a, b) == root => root_row,
                () if ctx.eos.contains(&b) => &[],
                () => self.table.after_pair(a, b),
            }
        };
        match &self.options.search {
            Some(search) => {
                let mut stream = ctx.key.stream(ctx.tokens.len() as u64, Purpose::Draft);
                search.tree(root, successors, &mut stream, budget.depth, budget.nodes)
            }
            None => {
                let mut expander = ByWeight { root, successors };
                let topology = Topology::Dynamic {
                    top_k: self.options.topn,
                };
                grow(&mut expander, &topology, budget)
            }
        }
    }

    fn reset(&mut self) {
        self.seen.clear();
    }

    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        Some(self.shape.chances().to_vec())
    }
}

/// Ranks successors by their share of the row's weight.
struct ByWeight<F> {
    root: (u32, u32),
    successors: F,
}

impl<'t, F: Fn(u32, u32) -> &'t [(u32, f32)]> Expander for ByWeight<F> {
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let token = |node: usize| tree.units().get(node).copied();
        let pair = |node: &Option<usize>| -> Option<(u32, u32)> {
            let Some(node) = *node else {
                return Some(self.root);
            };
            let parent = tree.parents().get(node).copied()?;
            Some((parent.map_or(Some(self.root.1), token)?, token(node)?))
        };
        let list = |node: &Option<usize>| {
            let row = pair(node).map_or(&[][..], |(a, b)| (self.successors)(a, b));
            let total: f32 = row.iter().map(|&(_, w)| w).sum();
            row.iter()
                .take(k)
                .map(|&(t, w)| (t, (w / total).ln()))
                .collect()
        };
        Ok(frontier.iter().map(list).collect())
    }

    fn max_depth(&self) -> usize {
        usize::MAX
    }
}
