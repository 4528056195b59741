//! Growing a draft tree from a source of ranked continuations.
//!
//! * **Chain**: the best continuation of the best continuation, and so on.
//! * **Static** (Medusa, Cai et al. 2024): a fixed list of ranks, [`StaticTree`].
//! * **Dynamic** (EAGLE-2, Li et al. 2024): the score of a node is the sum of the draft's
//!   log-probabilities along its path. Level by level the best `top_k` nodes are expanded
//!   into their best `top_k` continuations each; of everything proposed on the way the
//!   best nodes make the tree. A parent scores at least as much as its child and comes
//!   before it, so that the best nodes always form a tree.
//!
//! All continuations are chosen by rank, that is without randomness: their proposals are
//! [`Proposal::OneHot`], whatever law the ranks came from.

use serde::{Deserialize, Serialize};

use super::Budget;
pub use super::static_tree::StaticTree;
use crate::tree::{DraftTree, Proposal};
use crate::{Error, Result};

/// Nodes up to which the worth of a dynamic tree is estimated.
const WORTH_NODES: usize = 64;
/// Largest `top_k` of a dynamic tree.
const MAX_TOP_K: usize = 64;

/// A source of ranked continuations for the nodes of a growing tree: heads, draft layers,
/// tables.
pub trait Expander {
    /// For every node of `frontier` (`None` is the root, the newest token) its best `k`
    /// continuations as (token, log-probability), best first; fewer when there are no more.
    ///
    /// Each node is asked at most once, and after its parent; all nodes of one call have
    /// the same depth. `tree` only grows between the calls for one proposal, so that its
    /// node indices can be used as keys.
    ///
    /// # Errors
    /// Its own.
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>>;

    /// Length of the longest path it can propose (the number of heads); `usize::MAX` for
    /// autoregressive ones.
    fn max_depth(&self) -> usize;
}

/// The shape of a draft.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// One path.
    #[default]
    Chain,
    /// A tree of fixed shape, as much of it as the budget allows.
    Static(StaticTree),
    /// A tree that follows the draft's confidence; number of nodes and depth come from
    /// the [`Budget`].
    Dynamic {
        /// Nodes expanded per level, and continuations of each, `1..=64`.
        top_k: usize,
    },
}

impl Topology {
    /// Checks the options.
    ///
    /// # Errors
    /// `Input` when `top_k` is not in `1..=64`.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Dynamic { top_k } if !(1..=MAX_TOP_K).contains(top_k) => {
                Err(Error::input("top_k", top_k, "a number in 1..=64"))
            }
            _ => Ok(()),
        }
    }

    /// A tree whose [`expected_tokens`](StaticTree::expected_tokens) say what a draft of
    /// this shape is worth: itself where the shape is fixed, and the best fixed one for
    /// `accuracies` (`[depth][rank]`, see [`StaticTree::search`]) where it follows the draft's
    /// confidence, which does no worse. `None` for chains, and where nothing is known.
    #[must_use]
    pub fn worth(&self, accuracies: &[Vec<f64>]) -> Option<StaticTree> {
        match self {
            Self::Chain => None,
            Self::Static(tree) => Some(tree.clone()),
            Self::Dynamic { .. } => {
                let tree = StaticTree::search(accuracies, WORTH_NODES);
                (!tree.is_empty()).then_some(tree)
            }
        }
    }
}

/// Grows a tree of shape `topology` within `budget`; nodes come by depth.
///
/// # Errors
/// Those of `expander`; `Contract` when it gives another number of lists than nodes or a
/// log-probability that is not a number; `Input` from [`Topology::validate`].
pub fn grow(expander: &mut dyn Expander, topology: &Topology, budget: Budget) -> Result<DraftTree> {
    topology.validate()?;
    let depth = budget.depth.min(budget.nodes).min(expander.max_depth());
    match topology {
        Topology::Chain => chain(expander, depth),
        Topology::Static(shape) => fixed(expander, shape, depth, budget.nodes),
        Topology::Dynamic { top_k } => {
            dynamic(expander, (*top_k).min(budget.nodes), depth, budget.nodes)
        }
    }
}

/// The expander's answer, checked.
fn ask(
    expander: &mut dyn Expander,
    tree: &DraftTree,
    frontier: &[Option<usize>],
    k: usize,
) -> Result<Vec<Vec<(u32, f32)>>> {
    let mut lists = expander.expand(tree, frontier, k)?;
    if lists.len() != frontier.len() {
        let what = format!("gave {} lists for {} nodes", lists.len(), frontier.len());
        return Err(Error::contract("the expander", what));
    }
    for list in &mut lists {
        list.truncate(k);
        if list.iter().any(|(_, log_prob)| log_prob.is_nan()) {
            let what = "gave a log-probability that is not a number";
            return Err(Error::contract("the expander", what));
        }
    }
    Ok(lists)
}

fn chain(expander: &mut dyn Expander, depth: usize) -> Result<DraftTree> {
    let mut tree = DraftTree::new();
    let mut parent = None;
    while tree.len() < depth {
        let lists = ask(expander, &tree, &[parent], 1)?;
        let Some(&(token, _)) = lists.first().and_then(|list| list.first()) else {
            break;
        };
        parent = Some(tree.push(parent, token, Proposal::OneHot)?);
    }
    Ok(tree)
}

fn fixed(
    expander: &mut dyn Expander,
    shape: &StaticTree,
    depth: usize,
    nodes: usize,
) -> Result<DraftTree> {
    // Children of the root and of every node of the shape, as (rank, index), by depth.
    let nodes = nodes.min(shape.len());
    let mut children: Vec<Vec<(usize, usize)>> = vec![Vec::new(); nodes + 1];
    let listed = shape.paths().iter().zip(shape.parents()).take(nodes);
    for (index, (path, parent)) in listed.enumerate() {
        let of_parent = children.get_mut(parent.map_or(0, |p| p + 1));
        if let (Some(of_parent), Some(&rank)) =
            (of_parent.filter(|_| path.len() <= depth), path.last())
        {
            of_parent.push((rank, index));
        }
    }
    let children_of = |shape_node: Option<usize>| {
        let index = shape_node.map_or(0, |n| n + 1);
        children.get(index).map(Vec::as_slice).unwrap_or_default()
    };

    let mut tree = DraftTree::new();
    // Nodes of one depth that have children: (node of the shape, node of the tree).
    let mut level: Vec<(Option<usize>, Option<usize>)> = vec![(None, None)];
    level.retain(|&(shape_node, _)| !children_of(shape_node).is_empty());
    while !level.is_empty() {
        let frontier: Vec<Option<usize>> = level.iter().map(|&(_, node)| node).collect();
        let ranks = level
            .iter()
            .flat_map(|&(shape_node, _)| children_of(shape_node));
        let k = ranks.map(|&(rank, _)| rank + 1).max().unwrap_or(0);
        let lists = ask(expander, &tree, &frontier, k)?;
        let mut next = Vec::new();
        for (&(shape_node, node), list) in level.iter().zip(&lists) {
            for &(rank, index) in children_of(shape_node) {
                // Where the list is too short, the branch does not exist.
                let Some(&(token, _)) = list.get(rank) else {
                    continue;
                };
                let child = tree.push(node, token, Proposal::OneHot)?;
                if !children_of(Some(index)).is_empty() {
                    next.push((Some(index), Some(child)));
                }
            }
        }
        level = next;
    }
    Ok(tree)
}

fn dynamic(
    expander: &mut dyn Expander,
    top_k: usize,
    depth: usize,
    nodes: usize,
) -> Result<DraftTree> {
    // Everything that was proposed, with the score of each node.
    let mut seen = DraftTree::new();
    let mut scores: Vec<f32> = Vec::new();
    let mut frontier: Vec<Option<usize>> = vec![None];
    for _ in 0..depth {
        let lists = ask(expander, &seen, &frontier, top_k)?;
        let first = seen.len();
        for (&node, list) in frontier.iter().zip(&lists) {
            let above = node.and_then(|n| scores.get(n)).copied().unwrap_or(0.0);
            for &(token, log_prob) in list {
                // What the draft rules out is not worth a row.
                if log_prob > f32::NEG_INFINITY {
                    seen.push(node, token, Proposal::OneHot)?;
                    // Rounding must not let a child score more than its parent.
                    scores.push(above + log_prob.min(0.0));
                }
            }
        }
        let level = best(&scores, first..seen.len(), top_k);
        let best_score = level.first().and_then(|&n| scores.get(n)).copied();
        // What a node can still lead to scores no more than itself and comes later: once
        // `nodes` others are as good as the whole frontier, nothing new can enter.
        let bar = best(&scores, 0..seen.len(), nodes)
            .get(nodes.saturating_sub(1))
            .and_then(|&n| scores.get(n).copied());
        if best_score.is_none() || bar.is_some_and(|bar| best_score <= Some(bar)) {
            break;
        }
        frontier = level.into_iter().map(Some).collect();
    }
    select(&seen, best(&scores, 0..seen.len(), nodes))
}

/// Indices of the best `n` scores within `range`, best first, the earlier of equals first.
fn best(scores: &[f32], range: std::ops::Range<usize>, n: usize) -> Vec<usize> {
    let score = |i: &usize| scores.get(*i).copied().unwrap_or(f32::NEG_INFINITY);
    let mut order: Vec<usize> = range.collect();
    order.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
    order.truncate(n);
    order
}

/// The nodes `kept` of `tree`, in their old order.
fn select(tree: &DraftTree, mut kept: Vec<usize>) -> Result<DraftTree> {
    kept.sort_unstable();
    let mut out = DraftTree::new();
    let mut new_index = vec![None; tree.len()];
    for node in kept {
        if let (Some((&token, proposal)), Some(parent)) =
            (tree.node(node), tree.parents().get(node))
        {
            let parent = parent.and_then(|p| new_index.get(p).copied().flatten());
            let index = out.push(parent, token, proposal.clone())?;
            if let Some(slot) = new_index.get_mut(node) {
                *slot = Some(index);
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::path_to;

    /// Log-probabilities that depend on the path; notes who was asked.
    struct Toy {
        max_depth: usize,
        asked: Vec<(Vec<Option<usize>>, usize)>,
        vocab: u32,
    }

    impl Toy {
        fn new(max_depth: usize) -> Self {
            Self {
                max_depth,
                asked: Vec::new(),
                vocab: 20,
            }
        }

        fn ranked(&self, path: &[u32]) -> Vec<(u32, f32)> {
            let seed = path
                .iter()
                .fold(7_u32, |s, &t| s.wrapping_mul(31).wrapping_add(t + 1));
            let weight = |t: u32| (seed.wrapping_mul(t * 2 + 3) >> 16) % 1000 + 1;
            let total: u32 = (0..self.vocab).map(weight).sum();
            let mut list: Vec<(u32, f32)> = (0..self.vocab)
                .map(|t| (t, (weight(t) as f32 / total as f32).ln()))
                .collect();
            list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            list
        }
    }

    impl Expander for Toy {
        fn expand(
            &mut self,
            tree: &DraftTree,
            frontier: &[Option<usize>],
            k: usize,
        ) -> Result<Vec<Vec<(u32, f32)>>> {
            for (nodes, _) in &self.asked {
                assert!(nodes.iter().all(|n| !frontier.contains(n)), "asked twice");
            }
            let depths = tree.depths();
            let depth = |n: &Option<usize>| n.map_or(0, |n| depths[n] + 1);
            assert!(frontier.iter().all(|n| depth(n) == depth(&frontier[0])));
            assert!(depth(&frontier[0]) < self.max_depth);
            self.asked.push((frontier.to_vec(), k));
            let list = |node: &Option<usize>| {
                let path = node.map_or(Vec::new(), |n| path_to(tree.parents(), n));
                let tokens: Vec<u32> = path.into_iter().map(|n| tree.units()[n]).collect();
                let mut list = self.ranked(&tokens);
                list.truncate(k);
                list
            };
            Ok(frontier.iter().map(list).collect())
        }
        fn max_depth(&self) -> usize {
            self.max_depth
        }
    }

    fn paths_of(tree: &DraftTree) -> Vec<Vec<u32>> {
        (0..tree.len())
            .map(|n| {
                path_to(tree.parents(), n)
                    .into_iter()
                    .map(|n| tree.units()[n])
                    .collect()
            })
            .collect()
    }

    #[test]
    fn a_chain_follows_the_best() {
        let mut toy = Toy::new(usize::MAX);
        let tree = grow(&mut toy, &Topology::Chain, Budget { depth: 5, nodes: 3 }).unwrap();
        assert!(tree.is_chain() && tree.len() == 3);
        let mut tokens = Vec::new();
        for &token in tree.units() {
            assert_eq!(token, toy.ranked(&tokens)[0].0);
            tokens.push(token);
        }
        let mut heads = Toy::new(2);
        let tree = grow(&mut heads, &Topology::Chain, Budget::chain(9)).unwrap();
        assert_eq!(tree.len(), 2);
        assert!(
            grow(&mut heads, &Topology::Chain, Budget::chain(0))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_static_tree_asks_no_more_than_it_needs() {
        let shape = vec![
            vec![0],
            vec![2],
            vec![0, 1],
            vec![0, 0],
            vec![0, 1, 4],
            vec![5],
        ];
        let shape = Topology::Static(StaticTree::new(shape).unwrap());
        let mut toy = Toy::new(usize::MAX);
        let tree = grow(&mut toy, &shape, Budget { depth: 9, nodes: 9 }).unwrap();
        // Root, then the best child, then its second child.
        let asked = [(vec![None], 6), (vec![Some(0)], 2), (vec![Some(3)], 5)];
        assert_eq!(toy.asked, asked);
        let t = |path: &[u32], rank: usize| toy.ranked(path)[rank].0;
        let (a, b, c) = (t(&[], 0), t(&[], 2), t(&[], 5));
        let d = t(&[a], 1);
        let expected = vec![
            vec![a],
            vec![b],
            vec![c],
            vec![a, d],
            vec![a, t(&[a], 0)],
            vec![a, d, t(&[a, d], 4)],
        ];
        assert_eq!(paths_of(&tree), expected);
        // Cut by nodes, by depth, by the number of heads, and by a short vocabulary.
        let grown = |mut toy: Toy, depth, nodes| {
            grow(&mut toy, &shape, Budget { depth, nodes })
                .unwrap()
                .len()
        };
        assert_eq!(grown(Toy::new(9), 9, 3), 3);
        assert_eq!(grown(Toy::new(9), 1, 9), 3);
        assert_eq!(grown(Toy::new(2), 9, 9), 5);
        assert_eq!(grown(Toy::new(9), 9, 0), 0);
        let small = Toy {
            vocab: 2,
            ..Toy::new(9)
        };
        assert_eq!(grown(small, 9, 9), 3);
    }

    /// The best `nodes` of everything that the frontier rule proposes, without stopping
    /// early.
    fn by_hand(toy: &Toy, k: usize, depth: usize, nodes: usize) -> Vec<Vec<u32>> {
        let mut all: Vec<(Vec<u32>, f32)> = Vec::new();
        let mut frontier = vec![(Vec::new(), 0.0)];
        for _ in 0..depth {
            let mut level = Vec::new();
            for (path, score) in &frontier {
                for (token, log_prob) in toy.ranked(path).into_iter().take(k) {
                    let path: Vec<u32> = path.iter().copied().chain([token]).collect();
                    level.push((path, score + log_prob));
                }
            }
            all.extend(level.clone());
            level.sort_by(|a, b| b.1.total_cmp(&a.1));
            level.truncate(k);
            frontier = level;
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(nodes);
        all.into_iter().map(|(path, _)| path).collect()
    }

    #[test]
    fn a_dynamic_tree_keeps_the_best_of_all_candidates() {
        for (top_k, depth, nodes) in [
            (1, 4, 9),
            (2, 3, 5),
            (4, 5, 12),
            (10, 6, 59),
            (10, 5, 3),
            (3, 2, 100),
        ] {
            let mut toy = Toy::new(usize::MAX);
            let budget = Budget { depth, nodes };
            let tree = grow(&mut toy, &Topology::Dynamic { top_k }, budget).unwrap();
            let mut found = paths_of(&tree);
            assert!(found.iter().map(Vec::len).is_sorted(), "breadth first");
            let mut expected = by_hand(&toy, top_k, depth, nodes);
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "{top_k} {depth} {nodes}");
            assert!(
                toy.asked
                    .iter()
                    .all(|(nodes, k)| nodes.len() <= top_k && *k <= top_k)
            );
        }
    }

    /// Gives what it is told.
    struct Says(Vec<Vec<(u32, f32)>>);

    impl Expander for Says {
        fn expand(
            &mut self,
            _: &DraftTree,
            _: &[Option<usize>],
            _: usize,
        ) -> Result<Vec<Vec<(u32, f32)>>> {
            Ok(self.0.clone())
        }
        fn max_depth(&self) -> usize {
            usize::MAX
        }
    }

    #[test]
    fn odd_answers_are_handled() {
        let dynamic = Topology::Dynamic { top_k: 2 };
        let budget = Budget { depth: 3, nodes: 6 };
        for topology in [Topology::Chain, dynamic.clone()] {
            let nothing = grow(&mut Says(vec![vec![]]), &topology, budget).unwrap();
            assert!(nothing.is_empty());
            let nan = Says(vec![vec![(1, f32::NAN)]]);
            for mut broken in [Says(vec![]), nan] {
                let error = grow(&mut broken, &topology, budget).unwrap_err();
                assert!(matches!(error, Error::Contract { .. }), "{error}");
            }
        }
        // Impossible continuations take no rows; certain ones keep parents in front.
        let mut sure = Says(vec![vec![(1, 1e-6), (2, f32::NEG_INFINITY)]]);
        let tree = grow(&mut sure, &dynamic, budget).unwrap();
        assert_eq!((tree.units(), tree.is_chain()), (&[1, 1, 1][..], true));
        for top_k in [0, 65] {
            let topology = Topology::Dynamic { top_k };
            assert!(grow(&mut sure, &topology, budget).is_err());
        }
        let json = serde_json::to_string(&dynamic).unwrap();
        assert_eq!(serde_json::from_str::<Topology>(&json).unwrap(), dynamic);
        // A huge budget costs what the tree costs.
        let huge = Budget {
            depth: usize::MAX,
            nodes: usize::MAX,
        };
        let mut toy = Toy::new(3);
        assert_eq!(grow(&mut toy, &dynamic, huge).unwrap().len(), 2 + 4 + 4);
    }
}
