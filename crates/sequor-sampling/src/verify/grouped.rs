//! Acceptance of groups (GSD, So et al. 2025), for units of which many are as good as each
//! other.
//!
//! [`grouped`] is the published rule. **Lossy.** A group `C` around the drafted token is
//! accepted with probability `min(1, p(C) / q(C))`, and the *drafted* token is kept; after
//! a rejection a token comes from `norm([p - q]+)`. If the groups form a partition, the
//! output law is
//!
//! ```text
//! P(x) = q(x) min(1, p(C)/q(C)) + b [p(x) - q(x)]+ / sum [p - q]+,   b = 1 - sum_C min(p(C), q(C))
//! ```
//!
//! and no draft is accepted less often than token by token. [`GroupRule`] centres a window
//! on the token, which is no partition. Groups of one token are the exact rule.
//!
//! [`grouped_exact`] shows what keeping the draft costs: it accepts the group and draws the
//! token anew *inside* it from `p`, on rejection draws the group from `norm([p(C) - q(C)]+)`
//! and the token from `p` inside. The output law is exactly `p`, but the token may differ
//! from the draft, so that what was drafted behind it is void.

use serde::{Deserialize, Serialize};

use crate::distribution::Categorical;
use crate::{Error, Result};

/// What is close to a drafted token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupRule {
    /// Tokens of the window that are less probable for the target.
    pub below: usize,
    /// Tokens of the window that are more probable.
    pub above: usize,
    /// Probabilities differ by less than this.
    pub p_threshold: f64,
    /// Squared distances are less than this.
    pub distance_threshold: f64,
    /// Whether a token with fewer than `below` less probable ones stays alone, as in the
    /// published program; otherwise the window is moved so that it has its full size.
    pub alone_at_the_bottom: bool,
}

impl Default for GroupRule {
    fn default() -> Self {
        Self {
            below: 7,
            above: 6,
            p_threshold: 0.15,
            distance_threshold: 0.5,
            alone_at_the_bottom: false,
        }
    }
}

impl GroupRule {
    /// The group of `token` under the target's probabilities `p`, ids ascending; the token
    /// itself is always in it.
    #[must_use]
    pub fn group(&self, p: &[f64], token: u32, distance: impl Fn(u32) -> f64) -> Vec<u32> {
        let Some(&own) = p.get(token as usize) else {
            return vec![token];
        };
        let mut order: Vec<(f64, u32)> = p.iter().copied().zip(0_u32..).collect();
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let rank = order.iter().position(|&(_, id)| id == token).unwrap_or(0);
        let size = self
            .below
            .saturating_add(self.above)
            .saturating_add(1)
            .min(order.len());
        let start = match rank.checked_sub(self.below) {
            Some(start) if self.alone_at_the_bottom => start,
            None if self.alone_at_the_bottom => return vec![token],
            start => start.unwrap_or(0).min(order.len() - size),
        };
        let window = order.iter().skip(start).take(size);
        let close = |&&(prob, id): &&(f64, u32)| {
            id == token
                || ((prob - own).abs() < self.p_threshold && distance(id) < self.distance_threshold)
        };
        let mut group: Vec<u32> = window.filter(close).map(|&(_, id)| id).collect();
        group.sort_unstable();
        group
    }
}

/// Probability with which a draft whose group is `group` is accepted: `p(C) / q(C)`, at
/// most 1; 0 where `p(C)` is 0.
#[must_use]
pub fn group_acceptance(p: &Categorical, q: &Categorical, group: &[u32]) -> f64 {
    let mass = |law: &Categorical| group.iter().map(|&t| law.prob(t)).sum::<f64>();
    let target = mass(p);
    if target > 0.0 {
        (target / mass(q)).min(1.0)
    } else {
        0.0
    }
}

/// What a verifier of single units decided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decided {
    /// The token.
    pub token: u32,
    /// Whether the draft, or its group, was accepted.
    pub accepted: bool,
}

/// The published rule for one draft `token ~ q` with its `group`. `uniforms` in `[0, 1)`
/// are for the test and for the replacement.
#[must_use]
pub fn grouped(
    p: &Categorical,
    q: &Categorical,
    token: u32,
    group: &[u32],
    [accept, redraw]: [f64; 2],
) -> Decided {
    if accept < group_acceptance(p, q, group) {
        return Decided {
            token,
            accepted: true,
        };
    }
    let law = p.residual_law(q);
    Decided {
        token: law.as_ref().unwrap_or(p).quantile(redraw),
        accepted: false,
    }
}

/// Outcome of [`grouped_window`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowVerdict {
    /// The window's tokens after verification.
    pub tokens: Vec<u32>,
    /// First slot whose draft was rejected; the number of slots if none was.
    pub first_rejected: usize,
}

/// Verifies a window of speculative Jacobi decoding: the draft in slot `i >= 1` came from
/// `q[i]` and is tested against `p[i - 1]`, with `groups[i - 1]`. `fresh[i]` was drawn from
/// `p[i]`. Slot `i - 1` of the result is the accepted draft of slot `i`, at the first
/// rejection the replacement, and after it the fresh draw. `accept[i]` is the uniform
/// number of slot `i`, `redraw` that of the replacement.
///
/// # Errors
/// `Input` when the lengths do not fit.
pub fn grouped_window(
    drafts: &[u32],
    fresh: &[u32],
    (p, q): (&[Categorical], &[Categorical]),
    groups: &[Vec<u32>],
    accept: &[f64],
    redraw: f64,
) -> Result<WindowVerdict> {
    let n = drafts.len();
    for (name, found, expected) in [
        ("fresh", fresh.len(), n),
        ("p", p.len(), n),
        ("q", q.len(), n),
        ("groups", groups.len(), n.saturating_sub(1)),
        ("accept", accept.len(), n),
    ] {
        if found != expected {
            let expected = format!("{expected} for a window of {n}");
            return Err(Error::input(name, format!("{found} items"), expected));
        }
    }
    let mut tokens = fresh.to_vec();
    let tests = drafts
        .iter()
        .zip(q)
        .zip(accept)
        .skip(1)
        .zip(p.iter().zip(groups));
    let mut first_rejected = n;
    for (slot, (((&draft, q), &u), (p, group))) in tests.enumerate() {
        let decided = grouped(p, q, draft, group, [u, redraw]);
        if let Some(token) = tokens.get_mut(slot) {
            *token = decided.token;
        }
        if !decided.accepted {
            first_rejected = slot + 1;
            break;
        }
    }
    Ok(WindowVerdict {
        tokens,
        first_rejected,
    })
}

/// The lossless rule for one draft `token ~ q`. `groups[t]` is the group of token `t`: a
/// partition. `uniforms` in `[0, 1)` are for the test, the group of a replacement, and the
/// token inside the group.
///
/// # Errors
/// `Input` when `groups` does not name a group for every token.
pub fn grouped_exact(
    p: &Categorical,
    q: &Categorical,
    token: u32,
    groups: &[u32],
    [accept, pick, inside]: [f64; 3],
) -> Result<Decided> {
    let Some(&own) = groups
        .get(token as usize)
        .filter(|_| groups.len() == p.vocab())
    else {
        let found = format!("{} groups", groups.len());
        return Err(Error::input(
            "groups",
            found,
            format!("one for each of {} tokens", p.vocab()),
        ));
    };
    let count = groups.iter().max().map_or(0, |&g| g as usize + 1);
    if count > groups.len() {
        return Err(Error::input(
            "groups",
            count - 1,
            format!("numbers below {}", groups.len()),
        ));
    }
    let masses = |law: &Categorical| -> Result<Categorical> {
        let mut mass = vec![0.0_f64; count];
        for (id, prob) in law.iter() {
            let group = groups
                .get(id as usize)
                .and_then(|&g| mass.get_mut(g as usize));
            group.into_iter().for_each(|m| *m += prob);
        }
        Categorical::from_weights(mass.into_iter().map(|m| m as f32).collect())
    };
    let (pc, qc) = (masses(p)?, masses(q)?);
    let ratio = if pc.prob(own) > 0.0 {
        pc.prob(own) / qc.prob(own)
    } else {
        0.0
    };
    let accepted = accept < ratio;
    let group = match pc.residual_law(&qc).filter(|_| !accepted) {
        Some(residual) => residual.quantile(pick),
        None => own,
    };
    let within = p.without_any(|id| groups.get(id as usize) != Some(&group));
    Ok(Decided {
        token: within.as_ref().unwrap_or(p).quantile(inside),
        accepted,
    })
}
