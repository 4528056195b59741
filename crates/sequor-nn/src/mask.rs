//! Which query row may look at which key row.
//!
//! A mask is a rule over positions, composable with `&` and `|`; the tensor that
//! attention needs is made from the rule in one place.

use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// A rule over the positions of a query and a key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mask {
    /// Everything is visible.
    Full,
    /// Keys at or before the query.
    Causal,
    /// The newest `size` keys at or before the query, the query's own included.
    Window {
        /// How many keys are visible, at least 1.
        size: i64,
    },
    /// Keys before position `len`.
    Prefix {
        /// Length of the prefix.
        len: i64,
    },
    /// Both rules allow it.
    And(Box<Mask>, Box<Mask>),
    /// Either rule allows it.
    Or(Box<Mask>, Box<Mask>),
}

impl std::ops::BitAnd for Mask {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self::And(Box::new(self), Box::new(other))
    }
}

impl std::ops::BitOr for Mask {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self::Or(Box::new(self), Box::new(other))
    }
}

impl Mask {
    /// May the query at position `q` see the key at position `k`?
    pub fn allows(&self, q: i64, k: i64) -> bool {
        match self {
            Self::Full => true,
            Self::Causal => k <= q,
            Self::Window { size } => k <= q && q - k < *size,
            Self::Prefix { len } => k < *len,
            Self::And(a, b) => a.allows(q, k) && b.allows(q, k),
            Self::Or(a, b) => a.allows(q, k) || b.allows(q, k),
        }
    }

    /// The additive mask `[queries, keys]` (0 or -inf, f32) for rows at these positions.
    ///
    /// # Errors
    /// [`Error::Limits`] when it would hold more than 2^30 numbers.
    pub fn additive(&self, queries: &[i64], keys: &[i64], device: Device) -> Result<Tensor> {
        additive(queries.len(), keys.len(), device, |i, j| {
            self.allows(queries[i], keys[j])
        })
    }
}

/// The additive mask `[rows, cols]` of any rule over row and column numbers.
///
/// # Errors
/// [`Error::Limits`] when it would hold more than 2^30 numbers.
pub fn additive(
    rows: usize,
    cols: usize,
    device: Device,
    allowed: impl Fn(usize, usize) -> bool,
) -> Result<Tensor> {
    let n = rows.checked_mul(cols).filter(|&n| n <= 1 << 30);
    let n = n.ok_or_else(|| {
        Error::Limits(format!(
            "an attention mask of {rows} x {cols} is too large; use shorter inputs"
        ))
    })?;
    let mut values = Vec::with_capacity(n);
    for i in 0..rows {
        values.extend((0..cols).map(|j| {
            if allowed(i, j) {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        }));
    }
    let t = Tensor::f_from_slice(&values)?
        .f_to_kind(Kind::Float)?
        .f_reshape([rows as i64, cols as i64])?;
    Ok(t.f_to_device(device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_compose_as_written() {
        let rule = (Mask::Causal & Mask::Window { size: 2 }) | Mask::Prefix { len: 1 };
        let positions = [0, 1, 2, 3];
        let t = rule.additive(&positions, &positions, Device::Cpu).unwrap();
        for q in 0..4 {
            for k in 0..4 {
                let expected = k == 0 || (k <= q && q - k < 2);
                assert_eq!(rule.allows(q, k), expected, "{q} {k}");
                assert_eq!(t.double_value(&[q, k]) == 0.0, expected);
            }
        }
        assert!(Mask::Full.allows(0, 9) && !Mask::Causal.allows(0, 9));
    }
}
