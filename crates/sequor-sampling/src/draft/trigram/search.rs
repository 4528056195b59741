//! Monte-Carlo tree search for a draft tree.
//!
//! Each iteration walks down by the largest
//!
//! ```text
//! S/n + (c1 + ln((N + c2 + 1) / c2)) prior sqrt(N) / (1 + n)
//! ```
//!
//! (`S` and `n`: score and visits of the child, `N`: visits of the parent, `prior`: the
//! weight of the transition), adds the successors of the node where it arrives, goes on at
//! random to the length limit, and gives the score `1 + sum of the weights on the way` to
//! every node it passed. The prefixes with the most visits become the draft.

use sequor_kernels::rng::Stream;
use serde::{Deserialize, Serialize};

use crate::tree::{DraftTree, Proposal};
use crate::{Error, Result};

/// Weight of the exploration term.
const C1: f32 = 32.0;
/// Visits at which it begins to grow.
const C2: f32 = 8.0;

/// Options of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TreeSearch {
    /// Walks per proposal, `1..=10_000`.
    pub iterations: usize,
    /// Longest walk, `1..=64`.
    pub path_len: usize,
    /// Prefixes that are taken, each with its most probable extension, at least 1.
    pub paths: usize,
    /// Most nodes of the draft, at least 1.
    pub nodes: usize,
    /// Gives every walk the score 1, which is what the published program comes down to:
    /// it looks its weights up under the wrong token and hardly ever finds one.
    pub compat_score: bool,
}

impl Default for TreeSearch {
    fn default() -> Self {
        Self {
            iterations: 150,
            path_len: 4,
            paths: 24,
            nodes: 64,
            compat_score: false,
        }
    }
}

impl TreeSearch {
    /// Checks the options.
    ///
    /// # Errors
    /// `Input` naming the option.
    pub fn validate(&self) -> Result<()> {
        for (name, value, max) in [
            ("iterations", self.iterations, 10_000),
            ("path_len", self.path_len, 64),
            ("paths", self.paths, 4096),
            ("nodes", self.nodes, 4096),
        ] {
            if !(1..=max).contains(&value) {
                return Err(Error::input(name, value, format!("a number in 1..={max}")));
            }
        }
        Ok(())
    }

    /// Searches behind `root`, the last two tokens. `successors(a, b)` gives what may
    /// follow a pair with its weight, heaviest first; it decides as well what follows the
    /// root. At most `nodes` nodes, none deeper than `depth`.
    ///
    /// # Errors
    /// None that depends on the input.
    pub fn tree<'t>(
        &self,
        root: (u32, u32),
        successors: impl Fn(u32, u32) -> &'t [(u32, f32)],
        stream: &mut Stream,
        depth: usize,
        nodes: usize,
    ) -> Result<DraftTree> {
        let mut arena = Arena::new(root);
        for _ in 0..self.iterations {
            if !arena.walk(self, &successors, stream) {
                break;
            }
        }
        arena.draft(self.paths, &successors, depth, nodes.min(self.nodes))
    }
}

/// A node of the search. Children of a node lie next to each other.
#[derive(Clone, Copy, Debug)]
struct Node {
    parent: usize,
    /// Token before it, and its own.
    pair: (u32, u32),
    depth: usize,
    first_child: usize,
    children: usize,
    prior: f32,
    visits: f32,
    score: f32,
}

#[derive(Debug)]
struct Arena(Vec<Node>);

impl Arena {
    fn new(pair: (u32, u32)) -> Self {
        let mut nodes = Vec::with_capacity(2048);
        nodes.push(Node {
            parent: 0,
            pair,
            depth: 0,
            first_child: 0,
            children: 0,
            prior: 0.0,
            visits: 0.0,
            score: 0.0,
        });
        Self(nodes)
    }

    fn children(&self, node: &Node) -> &[Node] {
        let range = node.first_child..node.first_child + node.children;
        self.0.get(range).unwrap_or_default()
    }

    /// One iteration; false when there is nothing to search.
    fn walk<'t>(
        &mut self,
        options: &TreeSearch,
        successors: &impl Fn(u32, u32) -> &'t [(u32, f32)],
        stream: &mut Stream,
    ) -> bool {
        let mut at = 0;
        let mut weights = 0.0;
        let Some(mut node) = self.0.first().copied() else {
            return false;
        };
        while node.depth < options.path_len {
            let expanded = node.children > 0;
            if !expanded && !self.expand(at, successors(node.pair.0, node.pair.1)) {
                break;
            }
            at = self.best_child(at);
            match self.0.get(at) {
                Some(child) => node = *child,
                None => break,
            }
            weights += node.prior;
            if !expanded {
                break;
            }
        }
        if at == 0 {
            return false;
        }
        let (mut pair, mut depth) = (node.pair, node.depth);
        while depth < options.path_len {
            let Some((token, weight)) = draw(successors(pair.0, pair.1), stream) else {
                break;
            };
            weights += weight;
            pair = (pair.1, token);
            depth += 1;
        }
        let score = if options.compat_score {
            1.0
        } else {
            1.0 + weights
        };
        while let Some(node) = self.0.get_mut(at) {
            node.visits += 1.0;
            node.score += score;
            if at == 0 {
                break;
            }
            at = node.parent;
        }
        true
    }

    fn expand(&mut self, at: usize, row: &[(u32, f32)]) -> bool {
        let first_child = self.0.len();
        let Some(node) = self.0.get_mut(at) else {
            return false;
        };
        (node.first_child, node.children) = (first_child, row.len());
        let (pair, depth) = (node.pair, node.depth + 1);
        self.0.extend(row.iter().map(|&(token, prior)| Node {
            parent: at,
            pair: (pair.1, token),
            depth,
            first_child: 0,
            children: 0,
            prior,
            visits: 0.0,
            score: 0.0,
        }));
        !row.is_empty()
    }

    /// The child to go to: the first that was never visited, else the largest bound.
    fn best_child(&self, at: usize) -> usize {
        let Some(node) = self.0.get(at) else {
            return at;
        };
        let explore = (C1 + ((node.visits + C2 + 1.0) / C2).ln()) * node.visits.sqrt();
        let mut best = (node.first_child, f32::NEG_INFINITY);
        for (i, child) in self.children(node).iter().enumerate() {
            if child.visits == 0.0 {
                return node.first_child + i;
            }
            let mean = child.score / child.visits;
            let bound = mean + explore * child.prior / (1.0 + child.visits);
            if bound > best.1 {
                best = (node.first_child + i, bound);
            }
        }
        best.0
    }

    /// The most visited prefixes, then the best extension of each.
    fn draft<'t>(
        &self,
        paths: usize,
        successors: &impl Fn(u32, u32) -> &'t [(u32, f32)],
        depth: usize,
        nodes: usize,
    ) -> Result<DraftTree> {
        // A parent has at least its child's visits and comes first.
        let mut order: Vec<(usize, &Node)> = self
            .0
            .iter()
            .enumerate()
            .skip(1)
            .filter(|(_, n)| n.visits > 0.0 && n.depth <= depth)
            .collect();
        order.sort_by(|(i, a), (j, b)| b.visits.total_cmp(&a.visits).then(i.cmp(j)));
        order.truncate(paths.min(nodes));
        let mut tree = DraftTree::new();
        let mut place = vec![None; self.0.len()];
        for &(i, node) in &order {
            let parent = place.get(node.parent).copied().flatten();
            let drafted = tree.push(parent, node.pair.1, Proposal::OneHot)?;
            if let Some(place) = place.get_mut(i) {
                *place = Some(drafted);
            }
        }
        for (i, node) in order {
            let parent = place.get(i).copied().flatten();
            if tree.len() >= nodes || node.depth >= depth {
                continue;
            }
            if let Some(&(token, _)) = successors(node.pair.0, node.pair.1).first()
                && !tree
                    .children(parent)
                    .any(|c| tree.units().get(c) == Some(&token))
            {
                tree.push(parent, token, Proposal::OneHot)?;
            }
        }
        Ok(tree)
    }
}

/// A successor at random, in proportion to the weights.
fn draw(row: &[(u32, f32)], stream: &mut Stream) -> Option<(u32, f32)> {
    let total: f32 = row.iter().map(|&(_, w)| w).sum();
    let mut left = stream.uniform() as f32 * total;
    let drawn = row.iter().find(|(_, w)| {
        left -= w;
        left < 0.0
    });
    drawn.or(row.last()).copied()
}

#[cfg(test)]
mod tests {
    use sequor_kernels::rng::{Key, Purpose};

    use super::*;
    use crate::tree::path_to;

    /// Ten tokens; the successors of a pair are three tokens of falling weight.
    fn row(a: u32, b: u32) -> Vec<(u32, f32)> {
        let first = (a * 3 + b * 7 + 1) % 10;
        vec![
            (first, 0.6),
            ((first + 1) % 10, 0.3),
            ((first + 4) % 10, 0.1),
        ]
    }

    #[test]
    fn visits_add_up_and_prefer_what_is_heavy() {
        let rows: Vec<Vec<(u32, f32)>> = (0..100).map(|i| row(i / 10, i % 10)).collect();
        let successors = |a: u32, b: u32| rows[(a * 10 + b) as usize].as_slice();
        let mut arena = Arena::new((1, 2));
        let options = TreeSearch::default();
        let mut stream = Key::new(1, 1).stream(0, Purpose::Draft);
        for _ in 0..150 {
            assert!(arena.walk(&options, &successors, &mut stream));
        }
        let root = arena.0[0];
        assert_eq!(root.visits, 150.0);
        let children: Vec<f32> = arena.children(&root).iter().map(|n| n.visits).collect();
        assert_eq!(children.iter().sum::<f32>(), 150.0);
        assert!(children.is_sorted_by(|a, b| a > b), "{children:?}");
        assert!(arena.0.iter().all(|n| n.depth <= 4));
        // The score of a walk is one and the weights on the way, at most four of them.
        assert!(root.score > 150.0 && root.score < 150.0 * 3.4);

        let draft = |depth, nodes| {
            let mut stream = Key::new(1, 1).stream(0, Purpose::Draft);
            options
                .tree((1, 2), successors, &mut stream, depth, nodes)
                .unwrap()
        };
        let tree = draft(9, 64);
        assert!((24..=48).contains(&tree.len()), "{}", tree.len());
        assert_eq!(tree, draft(9, 64), "the same from the same seed");
        for node in 0..tree.len() {
            let path = path_to(tree.parents(), node);
            assert!(path.len() <= 5);
            let mut pair = (1, 2);
            for n in path {
                let token = tree.units()[n];
                assert!(successors(pair.0, pair.1).iter().any(|&(t, _)| t == token));
                pair = (pair.1, token);
            }
        }
        assert!(draft(2, 64).depths().iter().all(|&d| d < 2));
        assert_eq!(
            (draft(9, 7).len(), draft(9, 0).len(), draft(0, 9).len()),
            (7, 0, 0)
        );
    }

    #[test]
    fn nothing_to_search() {
        let mut stream = Key::new(1, 1).stream(0, Purpose::Draft);
        let tree = TreeSearch::default()
            .tree((1, 2), |_, _| &[], &mut stream, 9, 9)
            .unwrap();
        assert!(tree.is_empty());
        // A dead end after one step, and a score that is always one.
        let row = [(5, 1.0)];
        let once = |a: u32, _: u32| if a == 1 { &row[..] } else { &[] };
        let options = TreeSearch {
            compat_score: true,
            ..TreeSearch::default()
        };
        let tree = options.tree((1, 2), once, &mut stream, 9, 9).unwrap();
        assert_eq!(tree.units(), [5]);
        let refused = TreeSearch {
            iterations: 0,
            ..options
        };
        assert!(refused.validate().is_err() && options.validate().is_ok());
    }
}
