//! Verification of a chain (Leviathan et al. 2023; Chen et al. 2023).
//!
//! Let `x ~ q` be drafted where the target law is `p`. Accept `x` with probability
//! `min(1, p(x)/q(x))`; otherwise emit `y ~ norm([p - q]+)` and stop. The unit that comes
//! out has law `p`, for any `q` that did not see the uniform number of the test:
//!
//! ```text
//! P(out = v) = min(p(v), q(v)) + (1 - sum_w min(p(w), q(w))) [p(v) - q(v)]+ / sum_w [p(w) - q(w)]+
//!            = min(p(v), q(v)) + [p(v) - q(v)]+ = p(v)
//! ```
//!
//! because `sum [p - q]+ = 1 - sum min(p, q)`. The chance of acceptance is
//! `sum min(p, q) = 1 - TV(p, q)`. After the last accepted draft, one more unit is drawn
//! from the law that the same forward pass gave ("bonus").
//!
//! **Sample and match.** For a draft chosen without randomness `q` is a certainty, and
//! the rule reads: accept with probability `p(x)`, else draw from `p` without `x`. Drawing
//! `y ~ p` and accepting exactly when `y = x`, emitting `y` otherwise, is the same thing
//! with one random number, and that number is the one plain sampling would have used at
//! this position: speculative and plain output agree token for token.

use sequor_kernels::rng::Purpose;

use super::{Acceptance, Draws, Verdict};
use crate::distribution::Law;
use crate::tree::{DraftTree, Proposal};
use crate::{Error, Result};

/// Verifies the path of first children of `tree`, for any kind of unit.
///
/// `law(path)` is the target's law after the accepted nodes `path`; `ends` says whether a
/// unit ends the sequence, in which case nothing follows it.
///
/// Of the lossy rules, those that look at nothing but the ratio apply (ensemble and
/// tolerance).
///
/// # Errors
/// Those of `law` and of residual draws; `Unsupported` for a rule that needs more than the
/// ratio.
pub fn chain<L: Law>(
    tree: &DraftTree<L>,
    mut law: impl FnMut(&[usize]) -> Result<L>,
    draws: &Draws,
    acceptance: Acceptance,
    ends: impl Fn(&L::Unit) -> bool,
) -> Result<Verdict<L::Unit>> {
    if matches!(
        acceptance,
        Acceptance::Typical { .. } | Acceptance::Lantern { .. } | Acceptance::Synthetic { .. }
    ) {
        let message = format!("acceptance `{acceptance}` by likelihood ratio alone");
        return Err(Error::Unsupported(message));
    }
    let mut path = Vec::new();
    loop {
        let p = law(&path)?;
        let depth = path.len();
        let Some(node) = tree.children(path.last().copied()).next() else {
            let bonus = p.sample(&mut draws.stream(depth, Purpose::Sample));
            return Ok(Verdict::bonus(path, bonus));
        };
        let (unit, proposal) = tree
            .node(node)
            .ok_or_else(|| Error::contract("the draft tree", "lost a node"))?;
        if let Some(replacement) = replacement(&p, unit, proposal, draws, depth, acceptance)? {
            return Ok(Verdict::replaced(path, replacement));
        }
        path.push(node);
        if ends(unit) {
            return Ok(Verdict::ended(path));
        }
    }
}

/// `None` to accept `unit`, else what is emitted in its place.
fn replacement<L: Law>(
    p: &L,
    unit: &L::Unit,
    proposal: &Proposal<L>,
    draws: &Draws,
    depth: usize,
    acceptance: Acceptance,
) -> Result<Option<L::Unit>> {
    let accept = || draws.stream(depth, Purpose::Accept).uniform();
    match proposal {
        Proposal::OneHot => {
            let y = p.sample(&mut draws.stream(depth, Purpose::Sample));
            let forgiven = || {
                let chance = acceptance.forgiveness(p.density(unit));
                chance > 0.0 && accept() < chance
            };
            Ok(if y == *unit || (!acceptance.is_exact() && forgiven()) {
                None
            } else {
                Some(y)
            })
        }
        Proposal::Law(q) if acceptance.accepts(p.ratio(q, unit), accept()) => Ok(None),
        Proposal::Law(q) => p
            .residual(q, &mut draws.stream(depth, Purpose::Residual))
            .map(Some),
    }
}
