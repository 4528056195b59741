//! Rules that accept more than the exact one, along one walk. **Lossy.**
//!
//! Where children were chosen without randomness the exact rule tries them in order: the
//! first is accepted with probability `P(c)`; after a rejection `P` loses `c` and is
//! renormalised, and the next is tried. Drawing `y ~ p` once and looking which child holds
//! it is the same thing ("sample and walk"). A relaxed rule accepts `c` with a larger
//! probability `a(c)`. Given that `y` is not `c`, that is *forgiven* with probability
//! `(a(c) - P(c)) / (1 - P(c))`:
//!
//! | rule | `a(c)` | output |
//! |---|---|---|
//! | [`Acceptance::Ensemble`] | `w P(c) + 1 - w` | the target's law mixed with the draft |
//! | [`Acceptance::Tolerance`] | `P(c) + r` | nearer to the draft by at most `r` per test |
//! | [`Acceptance::Lantern`] | `P(c)` and the mass of its neighbours | mass moves within neighbourhoods |
//!
//! Where LANTERN would leave nothing of `P`, only `c` goes. What is not forgiven leaves the random numbers of the exact rule untouched: with
//! weight 1, tolerance 0, `k = 0` or `delta = 0` all outputs are equal number by number.
//!
//! A single child that was drawn from a law `q` is accepted with `min(1, a(c) / q(c))`, the
//! replacement coming from `norm([P - q]+)`. For several drawn children no relaxed rule is
//! published, and none is made up here.

use sequor_kernels::rng::Purpose;

use super::lantern::{Neighbours, lent, without_cluster};
use super::{Acceptance, Draws, Verdict};
use crate::distribution::{Categorical, Law};
use crate::tree::{DraftTree, Proposal};
use crate::{Error, Result};

/// Verifies a tree of tokens by the ensemble, tolerance or LANTERN rule. `law(path)` is
/// the target's law after the accepted nodes `path`; `ends` says whether a token ends the
/// sequence.
///
/// # Errors
/// Those of `law`; `Config` for LANTERN without neighbours; `Unsupported` for a node with
/// several children of which one was drawn, and for the other rules.
pub fn relaxed(
    tree: &DraftTree,
    mut law: impl FnMut(&[usize]) -> Result<Categorical>,
    draws: &Draws,
    acceptance: Acceptance,
    neighbours: Option<&dyn Neighbours>,
    ends: impl Fn(u32) -> bool,
) -> Result<Verdict<u32>> {
    let rule = Rule::new(acceptance, neighbours)?;
    check_relaxed(tree)?;
    let mut path = Vec::new();
    loop {
        let p = law(&path)?;
        let depth = path.len();
        let children: Vec<usize> = tree.children(path.last().copied()).collect();
        if children.is_empty() {
            let bonus = p.sample(&mut draws.stream(depth, Purpose::Sample));
            return Ok(Verdict::bonus(path, bonus));
        }
        match rule.step(tree, &children, p, draws, depth)? {
            Step::Emit(token) => return Ok(Verdict::replaced(path, token)),
            Step::Descend(node, token) => {
                path.push(node);
                if ends(token) {
                    return Ok(Verdict::ended(path));
                }
            }
        }
    }
}

/// Checks that relaxed rules are defined for `tree`.
///
/// # Errors
/// `Unsupported` when a node has several children of which one was drawn from a law.
pub(crate) fn check_relaxed(tree: &DraftTree) -> Result<()> {
    let mut seen = std::collections::HashMap::new();
    for (node, parent) in tree.parents().iter().enumerate() {
        let drawn = matches!(tree.node(node), Some((_, Proposal::Law(_))));
        let (children, any_drawn) = seen.entry(parent).or_insert((0, false));
        *children += 1;
        *any_drawn |= drawn;
        if *children > 1 && *any_drawn {
            return Err(Error::Unsupported(
                "lossy acceptance of several drawn continuations of one token: draft a chain, \
                 or choose continuations by rank"
                    .to_owned(),
            ));
        }
    }
    Ok(())
}

enum Step {
    Descend(usize, u32),
    Emit(u32),
}

/// The rule with what it needs.
struct Rule<'a> {
    acceptance: Acceptance,
    lantern: Option<(&'a dyn Neighbours, usize, f64)>,
}

impl<'a> Rule<'a> {
    fn new(acceptance: Acceptance, neighbours: Option<&'a dyn Neighbours>) -> Result<Self> {
        let lantern = match acceptance {
            Acceptance::Exact | Acceptance::Ensemble { .. } | Acceptance::Tolerance { .. } => None,
            Acceptance::Lantern { k, delta } if k == 0 || delta == 0.0 => None,
            Acceptance::Lantern { k, delta } => {
                let Some(neighbours) = neighbours else {
                    return Err(Error::Config(
                        "acceptance `lantern` needs to know which tokens are neighbours: give \
                         the generator a table of them"
                            .to_owned(),
                    ));
                };
                Some((neighbours, k, delta))
            }
            Acceptance::Typical { .. } | Acceptance::Synthetic { .. } => {
                return Err(Error::Unsupported(format!(
                    "acceptance `{acceptance}` is not a rule of this walk"
                )));
            }
        };
        Ok(Self {
            acceptance,
            lantern,
        })
    }

    fn step(
        &self,
        tree: &DraftTree,
        children: &[usize],
        p: Categorical,
        draws: &Draws,
        depth: usize,
    ) -> Result<Step> {
        if let [child] = children
            && let Some((&token, Proposal::Law(q))) = tree.node(*child)
        {
            return self.drawn(*child, token, q, p, draws, depth);
        }
        let mut p = p;
        let mut y = p.sample(&mut draws.stream(depth, Purpose::Sample));
        let mut accept = draws.stream(depth, Purpose::Accept);
        let mut redraw = draws.stream(depth, Purpose::Residual);
        // Mass of the children that were rejected, none of which `y` can be.
        let mut gone = 0.0_f64;
        let mut tried: Vec<u32> = Vec::new();
        for &child in children {
            let Some(&token) = tree.units().get(child) else {
                continue;
            };
            if y == token {
                return Ok(Step::Descend(child, token));
            }
            let left = (1.0 - gone).max(f64::MIN_POSITIVE);
            let now = |t: u32| {
                if tried.contains(&t) {
                    0.0
                } else {
                    p.prob(t) / left
                }
            };
            let chance = now(token).min(1.0);
            let lent = self
                .lantern
                .map_or(0.0, |(near, k, delta)| lent(now, near, token, k, delta));
            let more = self
                .acceptance
                .forgiveness(chance)
                .max(lent / (1.0 - chance));
            if more > 0.0 && accept.uniform() < more {
                return Ok(Step::Descend(child, token));
            }
            let cluster = self
                .lantern
                .filter(|_| lent > 0.0)
                .and_then(|(near, k, _)| {
                    let rest = p.without_any(|id| tried.contains(&id));
                    without_cluster(rest.as_ref().unwrap_or(&p), near, token, k)
                });
            if let Some(rest) = cluster {
                p = rest;
                (gone, tried) = (0.0, Vec::new());
                // What is left of the draw's law given that it is not in the cluster.
                if p.prob(y) == 0.0 {
                    y = p.sample(&mut redraw);
                }
            } else if !tried.contains(&token) {
                gone += p.prob(token);
                tried.push(token);
            }
        }
        Ok(Step::Emit(y))
    }

    /// One child that was drawn from `q`.
    fn drawn(
        &self,
        child: usize,
        token: u32,
        q: &Categorical,
        p: Categorical,
        draws: &Draws,
        depth: usize,
    ) -> Result<Step> {
        let u = draws.stream(depth, Purpose::Accept).uniform();
        let lent = self.lantern.map_or(0.0, |(near, k, delta)| {
            lent(|t| p.prob(t), near, token, k, delta)
        });
        let ratio = p.ratio(q, &token)
            + if lent > 0.0 {
                lent / q.prob(token)
            } else {
                0.0
            };
        if self.acceptance.accepts(ratio, u) {
            return Ok(Step::Descend(child, token));
        }
        let cluster = self.lantern.filter(|_| lent > 0.0);
        let rest = cluster.and_then(|(near, k, _)| without_cluster(&p, near, token, k));
        let p = rest.unwrap_or(p);
        p.residual(q, &mut draws.stream(depth, Purpose::Residual))
            .map(Step::Emit)
    }
}
