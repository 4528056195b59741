//! How often guesses are right, counted by depth and rank.

use serde::{Deserialize, Serialize};

/// Ranks that are counted; a static tree has no higher ones.
pub(super) const RANKS: usize = 10;

/// How often one head was right on held-out text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadAccuracy {
    /// Share of positions where the true token was its best guess.
    pub top1: f64,
    /// Where it was among the best three.
    pub top3: f64,
    /// Where it was among the best ten.
    pub top10: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    positions: u64,
    hits: [u64; RANKS],
}

impl Count {
    fn add(&mut self, rank: Option<usize>) {
        self.positions += 1;
        if let Some(hit) = rank.and_then(|r| self.hits.get_mut(r)) {
            *hit += 1;
        }
    }

    fn share(&self, ranks: usize) -> f64 {
        let hits: u64 = self.hits.iter().take(ranks).sum();
        hits as f64 / self.positions.max(1) as f64
    }
}

/// Counts over many positions.
#[derive(Clone, Debug, Default)]
pub(in crate::train) struct Table {
    /// By depth, over all positions.
    all: Vec<Count>,
    /// By depth, where the true token was among the ten best at every depth before: where a
    /// tree may have got that far.
    reached: Vec<Count>,
}

impl Table {
    /// Counts one position: the rank of the true token at each depth.
    pub fn add(&mut self, ranks: impl IntoIterator<Item = Option<usize>>) {
        let mut reached = true;
        for (depth, rank) in ranks.into_iter().enumerate() {
            if self.all.len() <= depth {
                self.all.push(Count::default());
                self.reached.push(Count::default());
            }
            if let Some(count) = self.all.get_mut(depth) {
                count.add(rank);
            }
            if let Some(count) = self.reached.get_mut(depth).filter(|_| reached) {
                count.add(rank);
            }
            reached &= rank.is_some_and(|r| r < RANKS);
        }
    }

    /// Positions that were counted.
    pub fn positions(&self) -> u64 {
        self.all.first().map_or(0, |c| c.positions)
    }

    /// By depth: how often the true token was among the best.
    pub fn heads(&self) -> Vec<HeadAccuracy> {
        let one = |c: &Count| HeadAccuracy {
            top1: c.share(1),
            top3: c.share(3),
            top10: c.share(RANKS),
        };
        self.all.iter().map(one).collect()
    }

    /// By depth and rank: the probability that the guess of this rank is right, given that
    /// the true tokens before it were among the ten best.
    pub fn by_rank(&self) -> Vec<Vec<f64>> {
        let one = |c: &Count| {
            let share = |&n: &u64| n as f64 / c.positions.max(1) as f64;
            c.hits.iter().map(share).collect()
        };
        self.reached.iter().map(one).collect()
    }

    /// Tokens that a chain of best guesses gains per pass of the target, itself included, by
    /// this table: 1 + p1 + p1 p2 + ..
    pub fn chain(&self) -> f64 {
        let mut path = 1.0;
        1.0 + self
            .reached
            .iter()
            .map(|c| {
                path *= c.share(1);
                path
            })
            .sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_counted_by_depth_and_given_the_path() {
        let mut t = Table::default();
        t.add([Some(0), Some(2)]);
        t.add([Some(12), Some(0)]);
        t.add([Some(1), None]);
        t.add([None]);
        assert_eq!(t.positions(), 4);
        let heads = t.heads();
        assert_eq!(
            (heads[0].top1, heads[0].top3, heads[0].top10),
            (0.25, 0.5, 0.5)
        );
        assert_eq!(heads[1].top1, 1.0 / 3.0);
        let table = t.by_rank();
        assert_eq!((table.len(), table[0].len()), (2, RANKS));
        assert_eq!(table[0][..2], [0.25, 0.25]);
        // Only the first and the third position get to depth 1.
        assert_eq!(table[1][..3], [0.0, 0.0, 0.5]);
        assert_eq!(t.chain(), 1.25);
    }
}
