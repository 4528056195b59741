//! Two drafters in one tree.
//!
//! Drafters fail at different places: heads guess well where the text is ordinary, a copy is
//! right where the text repeats. A [`Joined`] drafter gives the next row to whichever of the
//! two says it has the better chance ([`Drafter::chances`], scaled by how its words turned out
//! so far), and checks both proposals in one pass. What both propose takes one row.

use super::{Budget, DraftContext, Drafter, Feedback};
use crate::tree::DraftTree;
use crate::{Error, Result};

/// Chance of each further node of a drafter that says nothing of its chances, relative to the
/// node before.
const UNKNOWN: f64 = 0.5;
/// Weight of the past in the running sums, per round.
const MEMORY: f64 = 0.9;
/// Drafts that count as accepted as expected at the beginning.
const PRIOR: f64 = 2.0;
/// Share of its record that a drafter is forgiven in a round without a row of its own.
const FORGIVENESS: f64 = 0.02;

/// What two drafters propose, as one tree.
#[derive(Debug)]
pub struct Joined<A, B> {
    first: A,
    second: B,
    name: String,
    parts: [Part; 2],
}

/// What one of the two proposed, and how its proposals fared.
#[derive(Debug)]
struct Part {
    tree: DraftTree,
    /// Where its nodes are in the joined tree.
    places: Vec<usize>,
    /// Accepted drafts that its chances promised for this proposal.
    promised: f64,
    sum_promised: f64,
    sum_accepted: f64,
}

impl Default for Part {
    fn default() -> Self {
        Self {
            tree: DraftTree::new(),
            places: Vec::new(),
            promised: 0.0,
            sum_promised: PRIOR,
            sum_accepted: PRIOR,
        }
    }
}

impl<A: Drafter, B: Drafter> Joined<A, B> {
    /// Joins two drafters that choose without randomness. Where both have the same chance,
    /// `first` gets the row.
    ///
    /// # Errors
    /// `Input` when one of them draws its proposals at random: a unit found by the other
    /// would no longer be distributed as the law it is said to come from.
    pub fn new(first: A, second: B) -> Result<Self> {
        for drafter in [&first as &dyn Drafter, &second] {
            if drafter.is_random() {
                let expected = "drafters without randomness";
                return Err(Error::input("drafter", drafter.name(), expected));
            }
        }
        Ok(Self {
            name: format!("{}+{}", first.name(), second.name()),
            first,
            second,
            parts: Default::default(),
        })
    }

    /// The chances that both state.
    fn stated(&mut self, ctx: &DraftContext<'_>) -> [Vec<f64>; 2] {
        let unknown = || {
            let halves = std::iter::successors(Some(UNKNOWN), |c| Some(c * UNKNOWN));
            halves.take(8).collect()
        };
        [
            self.first.chances(ctx).unwrap_or_else(unknown),
            self.second.chances(ctx).unwrap_or_else(unknown),
        ]
    }

    /// The chances of both, as far as they can be believed.
    fn both(&mut self, ctx: &DraftContext<'_>) -> [Vec<f64>; 2] {
        let mut both = self.stated(ctx);
        for (chances, part) in both.iter_mut().zip(&self.parts) {
            let scale = part.sum_accepted / part.sum_promised;
            chances
                .iter_mut()
                .for_each(|chance| *chance = (*chance * scale).min(1.0));
        }
        both
    }

    /// How many of `nodes` nodes go to each.
    fn shares(&mut self, ctx: &DraftContext<'_>, nodes: usize) -> [usize; 2] {
        let [a, b] = self.both(ctx);
        let mut taken = [0, 0];
        while taken.iter().sum::<usize>() < nodes {
            match (a.get(taken[0]), b.get(taken[1])) {
                (Some(x), Some(y)) if y > x => taken[1] += 1,
                (Some(_), _) => taken[0] += 1,
                (None, Some(_)) => taken[1] += 1,
                (None, None) => break,
            }
        }
        taken
    }
}

/// Adds what is not there yet of `part` to `tree`; gives the node of each of its nodes.
fn merge(tree: &mut DraftTree, part: &DraftTree) -> Result<Vec<usize>> {
    let mut places: Vec<usize> = Vec::with_capacity(part.len());
    for (index, parent) in part.parents().iter().enumerate() {
        let Some((&unit, proposal)) = part.node(index) else {
            continue;
        };
        let parent = parent.and_then(|p| places.get(p).copied());
        let units = tree.units();
        let there = tree
            .children(parent)
            .find(|&child| units.get(child) == Some(&unit));
        places.push(match there {
            Some(child) => child,
            None => tree.push(parent, unit, proposal.clone())?,
        });
    }
    Ok(places)
}

impl<A: Drafter, B: Drafter> Drafter for Joined<A, B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let [a, b] = self.shares(ctx, budget.nodes);
        let within = |nodes| Budget {
            depth: budget.depth.min(nodes),
            nodes,
        };
        // Both are asked even for nothing: they may have to take in the target's states.
        let first = self.first.propose(ctx, within(a))?.cut(budget.depth, a);
        let second = self.second.propose(ctx, within(b))?.cut(budget.depth, b);
        let mut tree = DraftTree::new();
        let places = [merge(&mut tree, &first)?, merge(&mut tree, &second)?];
        let stated = self.stated(ctx);
        let proposed = [first, second].into_iter().zip(places).zip(stated);
        for (part, ((tree, places), chances)) in self.parts.iter_mut().zip(proposed) {
            part.promised = chances.iter().take(tree.len()).sum();
            (part.tree, part.places) = (tree, places);
        }
        Ok(tree)
    }

    fn observe(&mut self, feedback: &Feedback<'_>) {
        let [first, second] = &mut self.parts;
        tell(&mut self.first, first, feedback);
        tell(&mut self.second, second, feedback);
    }

    fn reset(&mut self) {
        self.first.reset();
        self.second.reset();
        self.parts = Default::default();
    }

    fn wants_features(&self) -> bool {
        self.first.wants_features() || self.second.wants_features()
    }

    fn wants_best(&self) -> bool {
        self.first.wants_best() || self.second.wants_best()
    }

    fn chances(&mut self, ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        let mut chances = self.both(ctx).concat();
        chances.sort_by(|a, b| b.total_cmp(a));
        Some(chances)
    }
}

/// Tells a drafter what became of its own part.
fn tell(drafter: &mut impl Drafter, part: &mut Part, feedback: &Feedback<'_>) {
    let (tree, places) = (&part.tree, &part.places);
    if tree.is_empty() {
        // What was not asked for long deserves another try.
        part.sum_promised += FORGIVENESS * (PRIOR - part.sum_promised);
        part.sum_accepted += FORGIVENESS * (PRIOR - part.sum_accepted);
        return;
    }
    // Along the accepted path, as far as the part follows it.
    let path: Vec<usize> = feedback
        .path
        .iter()
        .map_while(|node| places.iter().position(|place| place == node))
        .collect();
    let best: Option<Vec<u32>> = feedback.best.map(|best| {
        let rows = std::iter::once(0).chain(places.iter().map(|place| place + 1));
        rows.map(|row| best.get(row).copied().unwrap_or(0))
            .collect()
    });
    drafter.observe(&Feedback {
        tree,
        path: &path,
        added: feedback.added,
        best: best.as_deref(),
    });
    part.sum_promised = part.sum_promised * MEMORY + part.promised;
    part.sum_accepted = part.sum_accepted * MEMORY + path.len() as f64;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draft::StaticTree;
    use crate::draft::{DraftMode, DraftModel};
    use crate::tests::toy::Markov;
    use crate::{Key, Proposal};

    /// Proposes a fixed tree and remembers what it hears.
    struct Fixed {
        tree: DraftTree,
        chances: Vec<f64>,
        heard: Vec<(usize, Vec<usize>, Option<Vec<u32>>)>,
    }

    impl Fixed {
        fn new(units: &[u32], parents: &[Option<usize>], chances: &[f64]) -> Self {
            Self {
                tree: DraftTree::tree(units.to_vec(), parents).unwrap(),
                chances: chances.to_vec(),
                heard: Vec::new(),
            }
        }
    }

    impl Drafter for Fixed {
        fn name(&self) -> &str {
            "fixed"
        }
        fn propose(&mut self, _ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
            Ok(self.tree.cut(budget.depth, budget.nodes))
        }
        fn observe(&mut self, feedback: &Feedback<'_>) {
            self.heard.push((
                feedback.tree.len(),
                feedback.path.to_vec(),
                feedback.best.map(<[u32]>::to_vec),
            ));
        }
        fn reset(&mut self) {}
        fn wants_best(&self) -> bool {
            true
        }
        fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
            Some(self.chances.clone())
        }
    }

    const CTX: DraftContext<'static> = DraftContext {
        tokens: &[1],
        prompt_len: 1,
        max_length: 99,
        eos: &[],
        key: Key::new(0, 0),
        features: None,
    };

    #[test]
    fn rows_go_where_the_chances_are_and_common_guesses_take_one() {
        let tree = Fixed::new(&[5, 6, 7], &[None, None, Some(0)], &[0.6, 0.3, 0.2]);
        let chain = Fixed::new(&[5, 8, 9], &[None, Some(0), Some(1)], &[0.5, 0.4, 0.35]);
        let mut joined = Joined::new(tree, chain).unwrap();
        assert_eq!(
            joined.chances(&CTX).unwrap(),
            [0.6, 0.5, 0.4, 0.35, 0.3, 0.2]
        );
        assert_eq!(joined.shares(&CTX, 4), [1, 3]);
        assert_eq!(joined.shares(&CTX, 99), [3, 3]);
        let all = Budget { depth: 9, nodes: 9 };
        let tree = joined.propose(&CTX, all).unwrap();
        assert_eq!(tree.units(), [5, 6, 7, 8, 9]);
        assert_eq!(tree.parents(), [None, None, Some(0), Some(0), Some(3)]);
        // The chain's first two are right: that is the tree's first too.
        let best = [5, 8, 60, 70, 90, 99];
        joined.observe(&Feedback {
            tree: &tree,
            path: &[0, 3],
            added: &[5, 8, 4],
            best: Some(&best),
        });
        assert_eq!(joined.first.heard, [(3, vec![0], Some(vec![5, 8, 60, 70]))]);
        assert_eq!(
            joined.second.heard,
            [(3, vec![0, 1], Some(vec![5, 8, 90, 99]))]
        );
        // Depth and nodes are kept to.
        let small = joined.propose(&CTX, Budget { depth: 2, nodes: 3 }).unwrap();
        assert_eq!(small.units(), [5, 8]);
        let none = joined.propose(&CTX, Budget { depth: 0, nodes: 0 }).unwrap();
        assert!(none.is_empty());
    }

    #[test]
    fn promises_that_are_not_kept_count_less() {
        let never = Fixed::new(&[5], &[None], &[0.8]);
        let always = Fixed::new(&[6], &[None], &[0.4]);
        let mut joined = Joined::new(never, always).unwrap();
        assert_eq!(joined.shares(&CTX, 1), [1, 0]);
        for _ in 0..30 {
            let tree = joined.propose(&CTX, Budget { depth: 1, nodes: 2 }).unwrap();
            assert_eq!(tree.units(), [5, 6]);
            joined.observe(&Feedback {
                tree: &tree,
                path: &[1],
                added: &[6, 1],
                best: None,
            });
        }
        assert_eq!(joined.shares(&CTX, 1), [0, 1]);
        let chances = joined.chances(&CTX).unwrap();
        assert!(chances[0] > 0.9 && chances[1] < 0.1, "{chances:?}");
    }

    #[test]
    fn drawn_proposals_are_refused() {
        let model = Markov::new(8, 0, 1.0, 2);
        let drawn = DraftModel::new(&model, DraftMode::Sampled).unwrap();
        let fixed = Fixed::new(&[], &[], &[]);
        assert!(Joined::new(fixed, drawn).is_err());
        let shape = StaticTree::search(&[vec![0.5]], 1);
        assert_eq!(shape.chances(), [0.5]);
        let mut tree = DraftTree::new();
        tree.push(None, 3, Proposal::OneHot).unwrap();
        assert_eq!(merge(&mut DraftTree::new(), &tree).unwrap(), [0]);
    }
}
