//! Verification of a tree of tokens.
//!
//! **Sample and walk.** Where the children of a node were chosen without randomness, draw
//! `y ~ p` and move to the child that holds `y`; if none does, `y` itself is emitted.
//! Every node thus contributes one plain draw from its law, and the drafts only decide
//! whether the next law is already at hand. (Drawing again after a mismatch would give
//! the children a second chance and is biased.)
//!
//! **Multi-round rejection** (SpecInfer, Miao et al. 2024) where children `c_1, c_2, ...`
//! were drawn from `q`. Start with `P = p`, `Q = q`. For each child in the order it was
//! drawn: accept with probability `min(1, P(c)/Q(c))` and descend; else replace `P` by
//! `norm([P - Q]+)`. After `k` rejections `P` is the law that the output must still have
//! given those rejections, so the argument of the chain applies again. What the next
//! child's law `Q` is depends on how it was drawn: unchanged with replacement; without
//! replacement, `Q` without the rejected child and renormalised. Using the wrong one
//! biases the output. If no child is accepted, emit `y ~ P`.
//!
//! Children without randomness among drawn ones take part as `Q` = certainty.

use sequor_kernels::rng::Purpose;

use super::{Acceptance, Draws, Verdict};
use crate::Result;
use crate::distribution::{Categorical, Law};
use crate::tree::{DraftTree, Draw, Proposal};

/// Verifies a tree of tokens. `law(path)` is the target's law after the accepted nodes
/// `path`; `ends` says whether a token ends the sequence.
///
/// # Errors
/// Those of `law`.
pub fn tree(
    tree: &DraftTree,
    mut law: impl FnMut(&[usize]) -> Result<Categorical>,
    draws: &Draws,
    ends: impl Fn(u32) -> bool,
) -> Result<Verdict<u32>> {
    let mut path = Vec::new();
    loop {
        let p = law(&path)?;
        let depth = path.len();
        let children = children(tree, path.last().copied());
        let plain = |p: &Categorical| p.sample(&mut draws.stream(depth, Purpose::Sample));
        if children.is_empty() {
            let bonus = plain(&p);
            return Ok(Verdict::bonus(path, bonus));
        }
        let drawn = children
            .iter()
            .any(|c| matches!(c.proposal, Proposal::Law(_)));
        let next = if drawn {
            multi_round(p, &children, tree.draw(), draws, depth)
        } else {
            let y = plain(&p);
            children
                .iter()
                .find(|c| c.token == y)
                .map_or(Next::Emit(y), |c| Next::Descend(c.node, y))
        };
        match next {
            Next::Emit(y) => return Ok(Verdict::replaced(path, y)),
            Next::Descend(node, token) => {
                path.push(node);
                if ends(token) {
                    return Ok(Verdict::ended(path));
                }
            }
        }
    }
}

struct Child<'a> {
    node: usize,
    token: u32,
    proposal: &'a Proposal,
}

enum Next {
    Descend(usize, u32),
    Emit(u32),
}

fn children(tree: &DraftTree, node: Option<usize>) -> Vec<Child<'_>> {
    let child = |node| {
        tree.node(node).map(|(&token, proposal)| Child {
            node,
            token,
            proposal,
        })
    };
    tree.children(node).filter_map(child).collect()
}

fn multi_round(
    p: Categorical,
    children: &[Child<'_>],
    draw: Draw,
    draws: &Draws,
    depth: usize,
) -> Next {
    let mut accept = draws.stream(depth, Purpose::Accept);
    let mut p = p;
    // What the drawn siblings that were rejected have left of their common law.
    let mut left: Option<Categorical> = None;
    for child in children {
        let u = accept.uniform();
        let exact = Acceptance::Exact;
        match child.proposal {
            Proposal::OneHot => {
                if exact.accepts(p.prob(child.token), u) {
                    return Next::Descend(child.node, child.token);
                }
                p = p.without(child.token).unwrap_or(p);
            }
            Proposal::Law(common) => {
                let q = left.take().unwrap_or_else(|| common.as_ref().clone());
                if exact.accepts(p.ratio(&q, &child.token), u) {
                    return Next::Descend(child.node, child.token);
                }
                // Equal laws are rejected with probability 0 up to rounding.
                p = p.residual_law(&q).unwrap_or(p);
                left = Some(match draw {
                    Draw::WithReplacement => q,
                    Draw::WithoutReplacement => match q.without(child.token) {
                        Some(rest) => rest,
                        // The law is used up; nothing else can have been drawn from it.
                        None => break,
                    },
                });
            }
        }
    }
    Next::Emit(p.sample(&mut draws.stream(depth, Purpose::Residual)))
}
