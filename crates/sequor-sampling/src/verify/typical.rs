//! Typical acceptance (Medusa, Cai et al. 2024). **Lossy.**
//!
//! A drafted token is accepted when the target finds it probable enough for how uncertain
//! it is itself: `p(x) > min(epsilon, delta exp(-H(p)))`, where `H` is the entropy with
//! `log(p + 1e-5)`. No random number is drawn. Of all paths of accepted tokens the longest
//! wins, of equally long ones the one with the largest sum of `log p`; the token after it
//! is the target's best, so that every round adds at least one greedy token.
//!
//! The law of the output is not the target's: probable tokens become more frequent, and
//! everything below the threshold can only come from the greedy token.

use super::Verdict;
use crate::Result;
use crate::distribution::Categorical;
use crate::tree::DraftTree;

/// Keeps the logarithm in the entropy finite.
const SOFTENING: f64 = 1e-5;

/// The smallest probability that is accepted under `p`.
#[must_use]
pub fn typical_threshold(p: &Categorical, epsilon: f64, delta: f64) -> f64 {
    let entropy: f64 = p.iter().map(|(_, p)| -p * (p + SOFTENING).ln()).sum();
    epsilon.min(delta * (-entropy).exp())
}

/// Verifies a tree of tokens, however they were drafted. `law(path)` is the target's law
/// after the nodes `path`, asked for at every node that is reached by accepted ones;
/// `ends` says whether a token ends the sequence.
///
/// # Errors
/// Those of `law`.
pub fn typical(
    tree: &DraftTree,
    mut law: impl FnMut(&[usize]) -> Result<Categorical>,
    (epsilon, delta): (f64, f64),
    ends: impl Fn(u32) -> bool,
) -> Result<Verdict<u32>> {
    /// A path of accepted nodes.
    struct Reached {
        path: Vec<usize>,
        log_prob: f64,
        /// The target's best token after it; `None` if the path ends the sequence.
        best: Option<u32>,
    }
    let better = |a: &Reached, b: &Reached| (a.path.len(), a.log_prob) > (b.path.len(), b.log_prob);
    let mut open = vec![(Vec::new(), 0.0)];
    let mut winner: Option<Reached> = None;
    while let Some((path, log_prob)) = open.pop() {
        let over = path
            .last()
            .is_some_and(|&n| tree.units().get(n).is_some_and(|&t| ends(t)));
        let mut reached = Reached {
            path,
            log_prob,
            best: None,
        };
        if !over {
            let p = law(&reached.path)?;
            reached.best = Some(p.mode().0);
            let mut children = tree.children(reached.path.last().copied()).peekable();
            if children.peek().is_some() {
                let threshold = typical_threshold(&p, epsilon, delta);
                for child in children {
                    let prob = tree.units().get(child).map_or(0.0, |&t| p.prob(t));
                    if prob > threshold {
                        let path = reached.path.iter().copied().chain([child]).collect();
                        open.push((path, reached.log_prob + prob.ln()));
                    }
                }
            }
        }
        if winner.as_ref().is_none_or(|w| better(&reached, w)) {
            winner = Some(reached);
        }
    }
    let (path, emitted) = winner.map(|w| (w.path, w.best)).unwrap_or_default();
    let rejected = emitted.is_some() && tree.children(path.last().copied()).next().is_some();
    Ok(Verdict {
        path,
        emitted,
        rejected,
    })
}

/// The rule on separate paths, as it is published: `laws[i][d]` is the target's law for
/// token `candidates[i][d + 1]`, the first token of every path being given. Gives the
/// index of the winning path (the first of equals) and how many tokens after the first
/// are accepted.
#[must_use]
pub fn typical_paths(
    laws: &[Vec<Categorical>],
    candidates: &[Vec<u32>],
    (epsilon, delta): (f64, f64),
) -> (usize, usize) {
    let mut best = (0, 0, f64::NEG_INFINITY);
    for (i, (laws, tokens)) in laws.iter().zip(candidates).enumerate() {
        let probs = laws.iter().zip(tokens.iter().skip(1)).map_while(|(p, &x)| {
            let prob = p.prob(x);
            (prob > typical_threshold(p, epsilon, delta)).then_some(prob)
        });
        let (length, log_prob) = probs.fold((0, 0.0), |(n, sum), p| (n + 1, sum + p.ln()));
        if (length, log_prob) > (best.1, best.2) {
            best = (i, length, log_prob);
        }
    }
    (best.0, best.1)
}
