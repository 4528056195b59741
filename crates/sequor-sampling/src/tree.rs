//! Draft trees: several continuations of one sequence, checked in one forward pass.
//!
//! The root is the last token of the sequence and is not part of the tree; `None` as a
//! parent means it. Every parent has a smaller index than its children, so that a
//! chain is the tree `[None, Some(0), Some(1), ...]`. The depth of a child of the root
//! is 0.

use std::sync::Arc;

use ndarray::Array2;

use crate::distribution::{Categorical, Law};
use crate::{Error, Result};

/// Where a drafted unit came from.
#[derive(Debug, PartialEq)]
pub enum Proposal<L = Categorical> {
    /// Chosen without randomness: found, looked up, the best of a head.
    OneHot,
    /// Drawn from this law. Siblings share it.
    Law(Arc<L>),
}

// Not derived: that would ask for `L: Clone`.
impl<L> Clone for Proposal<L> {
    fn clone(&self) -> Self {
        match self {
            Self::OneHot => Self::OneHot,
            Self::Law(law) => Self::Law(Arc::clone(law)),
        }
    }
}

/// How several children of one node were drawn from their common law.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Draw {
    /// Independently; the same unit may occur twice.
    #[default]
    WithReplacement,
    /// Each from what the earlier ones left.
    WithoutReplacement,
}

/// Drafted units with their parents and the laws they were drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftTree<L: Law = Categorical> {
    units: Vec<L::Unit>,
    proposals: Vec<Proposal<L>>,
    parents: Vec<Option<usize>>,
    draw: Draw,
}

impl<L: Law> Default for DraftTree<L> {
    fn default() -> Self {
        Self {
            units: Vec::new(),
            proposals: Vec::new(),
            parents: Vec::new(),
            draw: Draw::default(),
        }
    }
}

impl<L: Law> DraftTree<L> {
    /// No drafts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A chain of units that were chosen without randomness.
    #[must_use]
    pub fn chain(units: impl IntoIterator<Item = L::Unit>) -> Self {
        let units: Vec<_> = units.into_iter().collect();
        let parents = (0..units.len()).map(|i| i.checked_sub(1)).collect();
        let proposals = units.iter().map(|_| Proposal::OneHot).collect();
        Self {
            units,
            proposals,
            parents,
            draw: Draw::default(),
        }
    }

    /// A tree of units that were chosen without randomness.
    ///
    /// # Errors
    /// `Contract` when the lengths differ or a parent does not come before its child.
    pub fn tree(units: Vec<L::Unit>, parents: &[Option<usize>]) -> Result<Self> {
        if units.len() != parents.len() {
            let what = format!("{} units with {} parents", units.len(), parents.len());
            return Err(Error::contract("the draft tree", what));
        }
        let mut tree = Self::new();
        for (unit, &parent) in units.into_iter().zip(parents) {
            tree.push(parent, unit, Proposal::OneHot)?;
        }
        Ok(tree)
    }

    /// Says how siblings were drawn.
    #[must_use]
    pub fn drawn(mut self, draw: Draw) -> Self {
        self.draw = draw;
        self
    }

    /// Adds a node and gives its index.
    ///
    /// # Errors
    /// `Contract` when the parent does not exist yet.
    pub fn push(
        &mut self,
        parent: Option<usize>,
        unit: L::Unit,
        proposal: Proposal<L>,
    ) -> Result<usize> {
        let node = self.units.len();
        if let Some(p) = parent.filter(|&p| p >= node) {
            return Err(Error::contract(
                "the draft tree",
                format!("node {node} has the later node {p} as parent"),
            ));
        }
        self.units.push(unit);
        self.proposals.push(proposal);
        self.parents.push(parent);
        Ok(node)
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// Whether nothing was drafted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// The units, in node order.
    #[must_use]
    pub fn units(&self) -> &[L::Unit] {
        &self.units
    }

    /// Parents, in node order.
    #[must_use]
    pub fn parents(&self) -> &[Option<usize>] {
        &self.parents
    }

    /// How siblings were drawn.
    #[must_use]
    pub fn draw(&self) -> Draw {
        self.draw
    }

    /// A unit and where it came from.
    #[must_use]
    pub fn node(&self, node: usize) -> Option<(&L::Unit, &Proposal<L>)> {
        self.units.get(node).zip(self.proposals.get(node))
    }

    /// Children of a node (of the root for `None`), in the order they were added.
    pub fn children(&self, node: Option<usize>) -> impl Iterator<Item = usize> + '_ {
        let first = node.map_or(0, |n| n + 1);
        (first..self.len()).filter(move |&i| self.parents.get(i) == Some(&node))
    }

    /// Whether every node follows the one before it.
    #[must_use]
    pub fn is_chain(&self) -> bool {
        self.parents
            .iter()
            .enumerate()
            .all(|(i, &parent)| parent == i.checked_sub(1))
    }

    /// Whether every unit was chosen without randomness.
    #[must_use]
    pub fn is_one_hot(&self) -> bool {
        self.proposals.iter().all(|p| matches!(p, Proposal::OneHot))
    }

    /// Depth of every node; children of the root have depth 0.
    #[must_use]
    pub fn depths(&self) -> Vec<usize> {
        depths(&self.parents)
    }

    /// The part of the tree that fits: no path longer than `depth`, no more than the first
    /// `nodes` nodes of those.
    #[must_use]
    pub fn cut(&self, depth: usize, nodes: usize) -> Self {
        let mut kept = Self {
            draw: self.draw,
            ..Self::default()
        };
        let mut new_index = Vec::with_capacity(self.len());
        for (i, d) in self.depths().into_iter().enumerate() {
            new_index.push(kept.len());
            if d < depth
                && kept.len() < nodes
                && let (Some((unit, proposal)), Some(parent)) = (self.node(i), self.parents.get(i))
            {
                kept.units.push(unit.clone());
                kept.proposals.push(proposal.clone());
                kept.parents
                    .push(parent.and_then(|p| new_index.get(p).copied()));
            }
        }
        kept
    }
}

/// Checks that every parent comes before its child.
///
/// # Errors
/// `Contract` naming the first node that does not.
pub fn validate(parents: &[Option<usize>]) -> Result<()> {
    match parents
        .iter()
        .enumerate()
        .find(|&(i, parent)| parent.is_some_and(|p| p >= i))
    {
        Some((i, _)) => Err(Error::contract(
            "the draft tree",
            format!("node {i} comes before its parent"),
        )),
        None => Ok(()),
    }
}

/// Depth of every node. A parent that does not come first counts as the root.
#[must_use]
pub fn depths(parents: &[Option<usize>]) -> Vec<usize> {
    let mut depths: Vec<usize> = Vec::with_capacity(parents.len());
    for parent in parents {
        let depth = parent.and_then(|p| depths.get(p)).map_or(0, |d| d + 1);
        depths.push(depth);
    }
    depths
}

/// `mask[[i, j]]` is true where node `j` is node `i` or an ancestor of it,
/// `[nodes, nodes]`.
#[must_use]
pub fn ancestor_mask(parents: &[Option<usize>]) -> Array2<bool> {
    let n = parents.len();
    let mut mask = Array2::from_elem((n, n), false);
    for (i, parent) in parents.iter().enumerate() {
        if let Some(p) = parent.filter(|&p| p < i) {
            // What the parent sees, its child sees.
            for j in 0..=p {
                mask[[i, j]] = mask[[p, j]];
            }
        }
        mask[[i, i]] = true;
    }
    mask
}

/// One path of node indices per leaf, from a child of the root to the leaf.
#[must_use]
pub fn paths(parents: &[Option<usize>]) -> Vec<Vec<usize>> {
    let mut is_leaf = vec![true; parents.len()];
    for p in parents.iter().flatten() {
        if let Some(leaf) = is_leaf.get_mut(*p) {
            *leaf = false;
        }
    }
    let leaves = is_leaf
        .iter()
        .enumerate()
        .filter_map(|(i, &leaf)| leaf.then_some(i));
    leaves.map(|leaf| path_to(parents, leaf)).collect()
}

/// Node indices from a child of the root down to `node`.
#[must_use]
pub fn path_to(parents: &[Option<usize>], node: usize) -> Vec<usize> {
    let up = |&n: &usize| parents.get(n).copied().flatten().filter(|&p| p < n);
    let mut path: Vec<usize> = std::iter::successors(Some(node), up).collect();
    path.reverse();
    path
}

/// Order in which to visit the nodes so that they come by depth (breadth first),
/// siblings and cousins keeping their order.
#[must_use]
pub fn breadth_first(parents: &[Option<usize>]) -> Vec<usize> {
    let depths = depths(parents);
    let mut order: Vec<usize> = (0..parents.len()).collect();
    order.sort_by_key(|&i| depths.get(i).copied());
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ```text
    ///        root
    ///       0    1
    ///      2 3   4
    ///          5
    /// ```
    const PARENTS: [Option<usize>; 6] = [None, None, Some(0), Some(0), Some(1), Some(3)];

    #[test]
    fn shape_of_a_tree() {
        assert_eq!(depths(&PARENTS), [0, 0, 1, 1, 1, 2]);
        assert_eq!(paths(&PARENTS), [vec![0, 2], vec![1, 4], vec![0, 3, 5]]);
        let mask = ancestor_mask(&PARENTS);
        for i in 0..6 {
            let seen: Vec<usize> = (0..6).filter(|&j| mask[[i, j]]).collect();
            assert_eq!(seen, path_to(&PARENTS, i), "node {i}");
        }
        let tree = DraftTree::<Categorical>::tree(vec![1, 2, 3, 4, 5, 6], &PARENTS).unwrap();
        assert_eq!(tree.children(None).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(tree.children(Some(0)).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(tree.children(Some(5)).count(), 0);
        assert!(!tree.is_chain());
        assert!(DraftTree::<Categorical>::chain([1, 2, 3]).is_chain());
    }

    #[test]
    fn order_by_depth() {
        // Depth first on input.
        let parents = [None, Some(0), Some(1), None, Some(3)];
        assert_eq!(breadth_first(&parents), [0, 3, 1, 4, 2]);
    }

    #[test]
    fn cutting_keeps_parents_right() {
        // Depth first, so that indices shift.
        let parents = [None, Some(0), Some(1), None, Some(3), Some(4)];
        let tree = DraftTree::<Categorical>::tree(vec![10, 11, 12, 13, 14, 15], &parents).unwrap();
        let cut = tree.cut(2, 9);
        assert_eq!(cut.units(), [10, 11, 13, 14]);
        assert_eq!(cut.parents(), [None, Some(0), None, Some(2)]);
        assert_eq!(tree.cut(9, 3).units(), [10, 11, 12]);
        assert!(tree.cut(0, 9).is_empty());
        assert_eq!(tree.cut(9, 9), tree);
    }

    #[test]
    fn parents_must_come_first() {
        assert!(validate(&PARENTS).is_ok());
        assert!(validate(&[Some(0)]).is_err());
        assert!(validate(&[None, Some(2), None]).is_err());
        assert!(DraftTree::<Categorical>::tree(vec![1, 2], &[None, Some(1)]).is_err());
        assert!(DraftTree::<Categorical>::tree(vec![1, 2], &[None]).is_err());
    }
}
