//! Acceptance at a chosen rate. **Lossy; for measurements only.**
//!
//! Every draft is accepted with the same probability, whatever the target says. The text
//! is worthless; the time is what a draft with that acceptance would take on this engine,
//! so that speed can be measured before a draft is trained.

use sequor_kernels::rng::Purpose;

use super::{Draws, Verdict};
use crate::Result;
use crate::tree::DraftTree;

/// Accepts the first child of a node with probability `rate`, node after node. `own(path)`
/// is the target's own choice after `path`, computed (as any verifier would) at every node
/// that is reached, and emitted at the end; `ends` says whether a token ends the sequence.
///
/// # Errors
/// Those of `own`.
pub fn synthetic(
    tree: &DraftTree,
    mut own: impl FnMut(&[usize]) -> Result<u32>,
    draws: &Draws,
    rate: f64,
    ends: impl Fn(u32) -> bool,
) -> Result<Verdict<u32>> {
    let mut path = Vec::new();
    loop {
        let token = own(&path)?;
        let Some(child) = tree.children(path.last().copied()).next() else {
            return Ok(Verdict::bonus(path, token));
        };
        if draws.stream(path.len(), Purpose::Accept).uniform() >= rate {
            return Ok(Verdict::replaced(path, token));
        }
        path.push(child);
        if tree.units().get(child).is_some_and(|&t| ends(t)) {
            return Ok(Verdict::ended(path));
        }
    }
}
