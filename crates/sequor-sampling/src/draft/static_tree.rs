//! Trees of fixed shape: which ranks are tried under which.
//!
//! A node is a path of ranks: `[0, 2]` is the third best continuation of the best
//! continuation of the newest token. A list of such paths is what Medusa (Cai et al. 2024)
//! and Hydra (Ankner et al. 2024) publish as "choices".
//!
//! If the guess of rank `r` at depth `d` is right with probability `a[d][r]` given that
//! those above it were, a node is accepted with the product along its path, and a tree
//! yields one token plus the sum over its nodes. A child never has a larger product than
//! its parent, so that taking the best node next, over and over, gives the best tree of
//! every size at once.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Most nodes of a static tree.
const MAX_NODES: usize = 4096;
/// Longest path.
const MAX_DEPTH: usize = 256;
/// Ranks are below this.
const MAX_RANK: usize = 1024;

/// A tree of ranks, ordered so that its first `n` nodes are the best tree of `n` nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Listed", into = "Listed")]
pub struct StaticTree {
    paths: Vec<Vec<usize>>,
    /// Parent of each path, by index; always smaller.
    parents: Vec<Option<usize>>,
    /// Probability that each node is accepted.
    chances: Vec<f64>,
}

/// The form that is written down.
#[derive(Serialize, Deserialize)]
struct Listed {
    paths: Vec<Vec<usize>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    chances: Vec<f64>,
}

impl StaticTree {
    /// A tree from its paths, most valuable first; parents that come late are moved in
    /// front of their first child. Until accuracies are measured, every rank is taken to
    /// be right half as often as the one before it.
    ///
    /// # Errors
    /// `Input` for an empty or repeated path, one without its parent, ranks from 1024 up,
    /// paths longer than 256, or more than 4096 of them.
    pub fn new(paths: Vec<Vec<usize>>) -> Result<Self> {
        let refuse = |what: String, expected: &str| Err(Error::input("tree", what, expected));
        if paths.len() > MAX_NODES {
            return refuse(format!("{} paths", paths.len()), "at most 4096 paths");
        }
        let mut known = HashSet::new();
        for path in &paths {
            if path.is_empty() || path.len() > MAX_DEPTH {
                return refuse(format!("a path of {} ranks", path.len()), "1 to 256 ranks");
            }
            if path.iter().any(|&rank| rank >= MAX_RANK) {
                return refuse(format!("path {path:?}"), "ranks below 1024");
            }
            if !known.insert(path.as_slice()) {
                return refuse(format!("path {path:?} twice"), "every path once");
            }
        }
        let orphan = paths.iter().find(|p| {
            p.split_last()
                .is_some_and(|(_, up)| !up.is_empty() && !known.contains(up))
        });
        if let Some(path) = orphan {
            return refuse(
                format!("path {path:?} without its parent"),
                "every path with all its beginnings",
            );
        }
        let halved = |path: &[usize]| path.iter().map(|&r| 0.5_f64.powi(r as i32 + 1)).product();
        let mut tree = Self::empty();
        let mut index = HashMap::new();
        for path in &paths {
            for end in 1..=path.len() {
                if let Some(part) = path.get(..end) {
                    tree.add(part, halved(part), &mut index);
                }
            }
        }
        Ok(tree)
    }

    /// The best tree of at most `nodes` nodes (and at most 4096) for `accuracies[d][r]`,
    /// the probability that the guess of rank `r` at depth `d` is right given that those
    /// above it were. What is never right is left out, as is a number that is not a
    /// probability.
    #[must_use]
    pub fn search(accuracies: &[Vec<f64>], nodes: usize) -> Self {
        let mut tree = Self::empty();
        let mut index = HashMap::new();
        let mut open = BinaryHeap::new();
        push_children(&mut open, accuracies, &[], 1.0);
        while tree.len() < nodes.min(MAX_NODES) {
            let Some(Candidate { chance, path }) = open.pop() else {
                break;
            };
            push_children(&mut open, accuracies, &path, chance);
            tree.add(&path, chance, &mut index);
        }
        tree
    }

    fn empty() -> Self {
        Self {
            paths: Vec::new(),
            parents: Vec::new(),
            chances: Vec::new(),
        }
    }

    fn add(&mut self, path: &[usize], chance: f64, index: &mut HashMap<Vec<usize>, usize>) {
        if index.contains_key(path) {
            return;
        }
        let parent = path.split_last().and_then(|(_, up)| index.get(up).copied());
        index.insert(path.to_vec(), self.paths.len());
        self.paths.push(path.to_vec());
        self.parents.push(parent);
        self.chances.push(chance);
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    /// Whether there is no node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The nodes as paths of ranks, most valuable first.
    #[must_use]
    pub fn paths(&self) -> &[Vec<usize>] {
        &self.paths
    }

    /// Parents in the order of [`paths`](Self::paths).
    #[must_use]
    pub fn parents(&self) -> &[Option<usize>] {
        &self.parents
    }

    /// Length of the longest path.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.paths.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Probability that each of [`paths`](Self::paths) is accepted.
    #[must_use]
    pub fn chances(&self) -> &[f64] {
        &self.chances
    }

    /// Tokens that a round with the first `nodes` nodes yields on average, the target's
    /// own token included.
    #[must_use]
    pub fn expected_tokens(&self, nodes: usize) -> f64 {
        1.0 + self.chances.iter().take(nodes).sum::<f64>()
    }
}

/// A node that may be added next.
#[derive(PartialEq)]
struct Candidate {
    chance: f64,
    path: Vec<usize>,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    /// By chance; of equals the shorter and then the smaller path counts as better.
    fn cmp(&self, other: &Self) -> Ordering {
        (self.chance.total_cmp(&other.chance))
            .then_with(|| other.path.len().cmp(&self.path.len()))
            .then_with(|| other.path.cmp(&self.path))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

fn push_children(
    open: &mut BinaryHeap<Candidate>,
    accuracies: &[Vec<f64>],
    path: &[usize],
    chance: f64,
) {
    let ranks = accuracies
        .get(path.len())
        .filter(|_| path.len() < MAX_DEPTH);
    for (rank, &accuracy) in ranks.into_iter().flatten().enumerate().take(MAX_RANK) {
        if accuracy > 0.0 {
            let path = path.iter().copied().chain([rank]).collect();
            open.push(Candidate {
                chance: chance * accuracy.min(1.0),
                path,
            });
        }
    }
}

impl TryFrom<Listed> for StaticTree {
    type Error = Error;

    fn try_from(listed: Listed) -> Result<Self> {
        let paths = listed.paths.len();
        let mut tree = Self::new(listed.paths)?;
        if !listed.chances.is_empty() {
            let valid = listed.chances.iter().all(|c| (0.0..=1.0).contains(c));
            if listed.chances.len() != paths || !valid {
                let found = format!("{} numbers", listed.chances.len());
                let expected = format!("{paths} probabilities, one per path");
                return Err(Error::input("tree.chances", found, expected));
            }
            tree.chances = listed.chances;
        }
        Ok(tree)
    }
}

impl From<StaticTree> for Listed {
    fn from(tree: StaticTree) -> Self {
        Self {
            paths: tree.paths,
            chances: tree.chances,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_checked() {
        let tree = StaticTree::new(vec![vec![0], vec![0, 0], vec![1], vec![0, 2]]).unwrap();
        assert_eq!(tree.parents(), [None, Some(0), None, Some(0)]);
        assert_eq!((tree.len(), tree.depth()), (4, 2));
        // A parent that comes late.
        let late = StaticTree::new(vec![vec![3, 1], vec![3]]).unwrap();
        assert_eq!(late.paths(), [vec![3], vec![3, 1]]);
        for bad in [
            vec![vec![]],
            vec![vec![0], vec![0]],
            vec![vec![0, 0]],
            vec![vec![usize::MAX]],
            vec![vec![0; 300]],
            (0..5000).map(|i| vec![i % 1000, i / 1000]).collect(),
        ] {
            assert!(StaticTree::new(bad).is_err());
        }
        assert!(StaticTree::new(vec![]).unwrap().is_empty());
    }

    #[test]
    fn search_is_optimal_for_every_size() {
        let accuracies = vec![vec![0.6, 0.2, 0.1], vec![0.5, 0.05, 0.3], vec![0.4, 0.2]];
        let tree = StaticTree::search(&accuracies, 100);
        // 3 + 3 * 3 + 9 * 2 paths exist.
        assert_eq!(tree.len(), 30);
        let chance = |p: &Vec<usize>| -> f64 {
            p.iter()
                .enumerate()
                .map(|(d, &r)| accuracies[d][r])
                .product()
        };
        let mut all: Vec<f64> = tree.paths().iter().map(chance).collect();
        assert!(all.is_sorted_by(|a, b| a >= b), "{all:?}");
        all.truncate(7);
        let best: f64 = all.iter().sum();
        let seven = StaticTree::search(&accuracies, 7);
        assert!((seven.expected_tokens(7) - 1.0 - best).abs() < 1e-12);
        assert!((tree.expected_tokens(7) - seven.expected_tokens(99)).abs() < 1e-12);
        assert_eq!(tree.expected_tokens(0), 1.0);
        // Whatever is no probability is never tried.
        let odd = StaticTree::search(&[vec![f64::NAN, -1.0, 7.0, 0.0]], 9);
        assert_eq!(odd.paths(), [vec![2]]);
        assert_eq!(odd.expected_tokens(1), 2.0);
        assert!(StaticTree::search(&[], 9).is_empty());
    }

    #[test]
    fn written_down_and_read_back() {
        let tree = StaticTree::search(&[vec![0.5, 0.25], vec![0.5]], 4);
        let json = serde_json::to_string(&tree).unwrap();
        assert_eq!(serde_json::from_str::<StaticTree>(&json).unwrap(), tree);
        let plain: StaticTree = serde_json::from_str(r#"{"paths":[[0],[1]]}"#).unwrap();
        assert_eq!(plain.expected_tokens(2), 1.75);
        for bad in [
            r#"{"paths":[[0,1]]}"#,
            r#"{"paths":[[0]],"chances":[0.5,0.1]}"#,
            r#"{"paths":[[0]],"chances":[1.5]}"#,
        ] {
            assert!(serde_json::from_str::<StaticTree>(bad).is_err(), "{bad}");
        }
    }
}
