//! The chain rule in the form of Hugging Face's assisted generation, with the uniform
//! numbers passed in, for comparison number by number.
//!
//! All accept tests are made first; `n` is the index of the first that fails. The next
//! token is drawn from `norm([p_n - q_n]+)` by inverse CDF, or from `p` after the last
//! draft if none failed. This is the rule of [`chain`](super::chain()) with another source
//! of randomness.

use super::Acceptance;
use crate::distribution::{Categorical, Law};
use crate::{Error, Result};

/// Outcome of [`speculative_sampling`].
#[derive(Clone, Debug, PartialEq)]
pub struct HfVerdict {
    /// Number of accepted candidates.
    pub n_matches: usize,
    /// The accepted candidates and the next token.
    pub tokens: Vec<u32>,
    /// The law the next token was drawn from.
    pub next: Categorical,
}

/// Verifies `candidates` drawn from `q` against the target laws `p` (one more than
/// candidates). One uniform number in `[0, 1)` per candidate, one for the next token.
///
/// # Errors
/// `Input` when the lengths do not fit.
pub fn speculative_sampling(
    candidates: &[u32],
    q: &[Categorical],
    p: &[Categorical],
    accept_uniforms: &[f64],
    draw_uniform: f64,
    acceptance: Acceptance,
) -> Result<HfVerdict> {
    let n = candidates.len();
    for (name, found, expected) in [
        ("q", q.len(), n),
        ("p", p.len(), n + 1),
        ("accept_uniforms", accept_uniforms.len(), n),
    ] {
        if found != expected {
            return Err(Error::input(
                name,
                format!("{found} items"),
                format!("{expected} for {n} candidates"),
            ));
        }
    }
    let rounds = candidates.iter().zip(q).zip(p).zip(accept_uniforms);
    let n_matches = rounds
        .take_while(|(((x, q), p), u)| acceptance.accepts(p.ratio(q, x), **u))
        .count();
    let next = match (p.get(n_matches), q.get(n_matches)) {
        (Some(p), Some(q)) => p.residual_law(q).unwrap_or_else(|| p.clone()),
        (Some(p), None) => p.clone(),
        (None, _) => {
            return Err(Error::input(
                "p",
                "too short",
                "one law more than candidates",
            ));
        }
    };
    let mut tokens = candidates.get(..n_matches).unwrap_or_default().to_vec();
    tokens.push(next.quantile(draw_uniform));
    Ok(HfVerdict {
        n_matches,
        tokens,
        next,
    })
}
