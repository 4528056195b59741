//! Verification of tokens drafted in parallel by the model that checks them (ASSD, Guo and
//! Ermon 2025).
//!
//! A model that can fill positions in any order drafts `k` of them at once, each from its
//! law given what is decided; a second pass gives the laws of the same positions *in
//! order*, each given the drafts before it. The chain rule makes the result exact: accept
//! `x_i` with probability `min(1, p_i(x_i) / q_i(x_i))`, at the first rejection draw from
//! `norm([p_i - q_i]+)` and stop.
//!
//! For the first position the two laws are the same one, so that its draft is always
//! accepted: a round of two passes writes at least two tokens, and there are never more
//! passes than tokens. A pass that covers one position more gives a further token when all
//! drafts are accepted.

use sequor_kernels::rng::Purpose;

use super::Draws;
use crate::distribution::{Categorical, Law};
use crate::{Error, Result};

/// Outcome of [`any_order`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnyOrderVerdict {
    /// Number of accepted drafts.
    pub accepted: usize,
    /// Tokens to write, in the order of the positions: the accepted drafts and, after a
    /// rejection or from the further law, one more.
    pub tokens: Vec<u32>,
}

/// Verifies `drafts`, drawn from `q`, against `p`: as many laws as drafts, or one more for
/// a further token. Draws are keyed by the order of the positions, `draws` standing at the
/// first. A `tolerance` above 0 is added to every ratio and makes the rule **lossy**.
///
/// When a single position is left, its draft law is the target's: pass no `p`.
///
/// # Errors
/// `Input` when lengths do not fit or `tolerance` is not in `[0, 1]`.
pub fn any_order(
    drafts: &[u32],
    q: &[Categorical],
    p: &[Categorical],
    draws: &Draws,
    tolerance: f64,
) -> Result<AnyOrderVerdict> {
    let n = drafts.len();
    if !(0.0..=1.0).contains(&tolerance) {
        return Err(Error::input("tolerance", tolerance, "a number in [0, 1]"));
    }
    if n == 1 && p.is_empty() {
        return Ok(AnyOrderVerdict {
            accepted: 1,
            tokens: drafts.to_vec(),
        });
    }
    check_lengths(n, q.len(), p.len())?;
    let mut tokens = Vec::with_capacity(n + 1);
    for (i, ((x, q), p)) in drafts.iter().zip(q).zip(p).enumerate() {
        let ratio = p.ratio(q, x) + tolerance;
        let u = draws.stream(i, Purpose::Accept).uniform();
        if ratio > 0.0 && u <= ratio {
            tokens.push(*x);
            continue;
        }
        tokens.push(p.residual(q, &mut draws.stream(i, Purpose::Residual))?);
        return Ok(AnyOrderVerdict {
            accepted: i,
            tokens,
        });
    }
    if let Some(further) = p.get(n) {
        tokens.push(further.sample(&mut draws.stream(n, Purpose::Sample)));
    }
    Ok(AnyOrderVerdict {
        accepted: n,
        tokens,
    })
}

/// The rule in its published form, with the uniform numbers passed in: rows `q` and `p` of
/// weights that need not sum to one (the mask token is set to 0 without renormalising), a
/// draft accepted on `u < p(x) / q(x)`, a replacement drawn by inverse CDF as the number of
/// entries whose cumulative share is below `redraw`. Rows of one length each, as many as
/// drafts.
///
/// # Errors
/// `Input` when lengths do not fit.
pub fn any_order_published(
    drafts: &[u32],
    q: &[Vec<f64>],
    p: &[Vec<f64>],
    accept: &[f64],
    redraw: f64,
) -> Result<AnyOrderVerdict> {
    check_lengths(drafts.len(), q.len(), p.len())?;
    if accept.len() < drafts.len() {
        let found = format!("{} numbers", accept.len());
        return Err(Error::input(
            "accept",
            found,
            format!("one for each of {}", drafts.len()),
        ));
    }
    let mut tokens = Vec::with_capacity(drafts.len());
    for (i, (((&x, q), p), u)) in drafts.iter().zip(q).zip(p).zip(accept).enumerate() {
        let at = |row: &[f64]| row.get(x as usize).copied().unwrap_or(0.0);
        if *u < at(p) / at(q) {
            tokens.push(x);
            continue;
        }
        let residual: Vec<f64> = p.iter().zip(q).map(|(p, q)| (p - q).max(0.0)).collect();
        let total: f64 = residual.iter().sum();
        let row = if total > 0.0 { &residual } else { p };
        let total: f64 = row.iter().sum();
        let below = row.iter().scan(0.0, |sum, w| {
            *sum += w;
            Some(*sum / total)
        });
        let drawn = below.take_while(|share| *share < redraw).count();
        tokens.push(drawn.min(row.len().saturating_sub(1)) as u32);
        return Ok(AnyOrderVerdict {
            accepted: i,
            tokens,
        });
    }
    Ok(AnyOrderVerdict {
        accepted: drafts.len(),
        tokens,
    })
}

fn check_lengths(drafts: usize, q: usize, p: usize) -> Result<()> {
    if q != drafts {
        return Err(Error::input(
            "q",
            format!("{q} laws"),
            format!("{drafts}, one per draft"),
        ));
    }
    if p != drafts && p != drafts + 1 {
        let expected = format!(
            "{drafts} or {}, one per draft and at most one more",
            drafts + 1
        );
        return Err(Error::input("p", format!("{p} laws"), expected));
    }
    Ok(())
}
