//! Greedy verification.
//!
//! The target law is a certainty, its argmax. Walk down the tree: at each node move to
//! the child that holds the argmax, and stop where there is none; the argmax that has no
//! child is emitted. The output equals plain greedy decoding token for token wherever
//! the model's rows do not depend on how many of them are computed together.
//!
//! With draws from the target's laws in place of best units, the same walk is "sample and
//! walk", exact for drafts that were chosen without randomness (see [`tree`](super::tree())).

use super::Verdict;
use crate::Result;
use crate::distribution::Law;
use crate::tree::DraftTree;

/// Walks along the best units. `best(path)` is the target's best unit (or a draw from its
/// law) after the accepted nodes `path`; `ends` says whether a unit ends the sequence.
///
/// # Errors
/// Those of `best`.
pub fn greedy<L: Law>(
    tree: &DraftTree<L>,
    mut best: impl FnMut(&[usize]) -> Result<L::Unit>,
    ends: impl Fn(&L::Unit) -> bool,
) -> Result<Verdict<L::Unit>> {
    let mut path = Vec::new();
    loop {
        let unit = best(&path)?;
        let mut children = tree.children(path.last().copied()).peekable();
        let rejected = children.peek().is_some();
        match children.find(|&c| tree.node(c).is_some_and(|(drafted, _)| *drafted == unit)) {
            Some(child) => path.push(child),
            None => {
                return Ok(Verdict {
                    path,
                    emitted: Some(unit),
                    rejected,
                });
            }
        }
        if ends(&unit) {
            return Ok(Verdict::ended(path));
        }
    }
}
