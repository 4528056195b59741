//! Tokens that may stand in for each other (LANTERN, Jang et al. 2025). **Lossy.**
//!
//! Codes of an image codec come in clusters that look alike, so that the probability of a
//! single one says little. LANTERN lends a drafted token `x` the mass of its nearest
//! neighbours: of the `k` nearest, the largest prefix whose mass is at most `delta` (for
//! `delta > 1`: at most `(delta - 1) p(x)`). The draft is accepted with probability
//! `min(1, (p(x) + mass) / q(x))`. After a rejection in which mass was lent, `x` and the
//! `k` neighbours are out of the question. With `k = 0` or `delta = 0` nothing is lent and
//! the rule is the exact one, number by number.

use std::cmp::Ordering;

use crate::distribution::Categorical;
use crate::{Error, Result};

/// Most tokens of a [`NeighbourTable`].
const MAX_TOKENS: usize = 1 << 17;
/// Most entries of a [`NeighbourTable`].
const MAX_ENTRIES: usize = 1 << 26;

/// Which tokens are near which.
pub trait Neighbours {
    /// At most `k` other tokens, the nearest first.
    fn nearest(&self, token: u32, k: usize) -> &[u32];
}

/// Neighbours that were computed beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeighbourTable(Vec<Vec<u32>>);

impl NeighbourTable {
    /// `lists[t]`: neighbours of token `t`, the nearest first, without `t` itself.
    #[must_use]
    pub fn new(lists: Vec<Vec<u32>>) -> Self {
        Self(lists)
    }

    /// The `k` nearest by squared Euclidean distance of `vectors`, `[tokens, dim]` row by
    /// row; the lower id of equals first.
    ///
    /// # Errors
    /// `Input` when `vectors` is not a whole number of rows or not finite; `Limits` for
    /// more than 131,072 tokens or more than 2^26 neighbours in all.
    pub fn from_vectors(vectors: &[f32], dim: usize, k: usize) -> Result<Self> {
        let rows = rows(vectors, dim)?;
        let k = k.min(rows.len().saturating_sub(1));
        for (what, found, limit) in [
            (
                "the number of tokens with neighbours",
                rows.len(),
                MAX_TOKENS,
            ),
            ("the number of neighbours", rows.len() * k, MAX_ENTRIES),
        ] {
            if found > limit {
                return Err(Error::Limits {
                    what,
                    found,
                    limit,
                    advice: "ask for fewer neighbours or a part of the vocabulary",
                });
            }
        }
        let mut near: Vec<(f32, u32)> = Vec::with_capacity(rows.len());
        let mut nearest = |(token, row): (usize, &&[f32])| {
            near.clear();
            let others = (0_u32..)
                .zip(&rows)
                .filter(|&(other, _)| other as usize != token);
            near.extend(others.map(|(other, r)| (squared_distance(row, r), other)));
            let order = |a: &(f32, u32), b: &(f32, u32)| -> Ordering {
                a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
            };
            if k < near.len() {
                near.select_nth_unstable_by(k, order);
                near.truncate(k);
            }
            near.sort_unstable_by(order);
            near.iter().map(|&(_, other)| other).collect()
        };
        Ok(Self(rows.iter().enumerate().map(&mut nearest).collect()))
    }
}

impl Neighbours for NeighbourTable {
    fn nearest(&self, token: u32, k: usize) -> &[u32] {
        let list = self
            .0
            .get(token as usize)
            .map(Vec::as_slice)
            .unwrap_or_default();
        list.get(..k).unwrap_or(list)
    }
}

/// Squared Euclidean distances of all pairs of `vectors`, `[tokens, dim]` row by row, as
/// rows `[tokens, tokens]`.
///
/// # Errors
/// As [`NeighbourTable::from_vectors`].
pub fn squared_distances(vectors: &[f32], dim: usize) -> Result<Vec<Vec<f32>>> {
    let rows = rows(vectors, dim)?;
    let found = rows.len().saturating_mul(rows.len());
    if found > MAX_ENTRIES {
        return Err(Error::Limits {
            what: "the number of distances",
            found,
            limit: MAX_ENTRIES,
            advice: "take a part of the vocabulary",
        });
    }
    let row = |a: &&[f32]| rows.iter().map(|b| squared_distance(a, b)).collect();
    Ok(rows.iter().map(row).collect())
}

fn rows(vectors: &[f32], dim: usize) -> Result<Vec<&[f32]>> {
    if dim == 0 || !vectors.len().is_multiple_of(dim) {
        let found = format!("{} numbers", vectors.len());
        return Err(Error::input(
            "vectors",
            found,
            format!("whole rows of {dim} (at least 1)"),
        ));
    }
    if let Some(bad) = vectors.iter().find(|v| !v.is_finite()) {
        return Err(Error::input("vectors", bad, "finite numbers"));
    }
    Ok(vectors.chunks_exact(dim).collect())
}

fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}

/// The mass that the neighbours of `token` lend to it under `p`.
pub(super) fn lent(
    p: impl Fn(u32) -> f64,
    neighbours: &dyn Neighbours,
    token: u32,
    k: usize,
    delta: f64,
) -> f64 {
    let most = if delta > 1.0 {
        (delta - 1.0) * p(token)
    } else {
        delta
    };
    let mut mass = 0.0;
    for &other in neighbours.nearest(token, k) {
        let more = mass + p(other);
        if more > most {
            break;
        }
        mass = more;
    }
    mass
}

/// `p` without `token` and its neighbours; `None` if that leaves nothing.
pub(super) fn without_cluster(
    p: &Categorical,
    neighbours: &dyn Neighbours,
    token: u32,
    k: usize,
) -> Option<Categorical> {
    let mut gone = neighbours.nearest(token, k).to_vec();
    gone.push(token);
    gone.sort_unstable();
    p.without_any(|id| gone.binary_search(&id).is_ok())
}
