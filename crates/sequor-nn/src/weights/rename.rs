//! Presents a source under other names, with the small rearrangements that
//! separate one published layout from another.

use std::collections::BTreeMap;
use std::path::Path;

use sequor_kernels::matmul::Stored;
use tch::Tensor;

use super::source::{TensorInfo, TensorSource, absent};
use crate::error::{Error, Result};

/// A tensor that a [`Renamed`] source offers, made of one old tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// The new name.
    pub name: String,
    /// What is done to the old tensor, in this order; nothing when empty.
    pub steps: Vec<Transform>,
}

impl NewTensor {
    /// The old tensor itself, under `name`.
    #[must_use]
    pub fn renamed(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            steps: Vec::new(),
        }
    }
}

/// A rearrangement of elements; none of them computes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transform {
    /// Swaps the two dimensions of a matrix.
    Transpose,
    /// Keeps `len` indices of dimension `dim` from `start`: one part of a fused
    /// tensor, such as the queries of a joint QKV projection.
    Slice {
        /// Dimension, from 0.
        dim: usize,
        /// First index kept.
        start: i64,
        /// Number of indices kept.
        len: i64,
    },
    /// The same elements in row-major order under another shape (no `-1`).
    Reshape(Vec<i64>),
    /// Rows of a Q or K projection from neighbouring to half-split RoPE pairs.
    ///
    /// With `d` the head dimension, a checkpoint whose rotation pairs channels
    /// `(i, i + d/2)` is converted to one that pairs `(2i, 2i + 1)` by
    /// `view(heads, 2, d/2, ..).transpose(1, 2)`. This is the inverse,
    /// `view(heads, d/2, 2, ..).transpose(1, 2)`: row `2i + j` of a head becomes
    /// row `j * d/2 + i`.
    UnpermuteRope {
        /// Heads in this projection (KV heads for K).
        heads: i64,
    },
    /// The other way round: row `j * d/2 + i` of a head becomes row `2i + j`.
    PermuteRope {
        /// Heads in this projection (KV heads for K).
        heads: i64,
    },
}

impl Transform {
    /// The shape after this step, or what does not fit.
    fn shape(&self, old: &[i64]) -> Result<Vec<i64>, String> {
        match self {
            Self::Transpose => match old {
                [a, b] => Ok(vec![*b, *a]),
                _ => Err("only a matrix can be transposed".to_owned()),
            },
            Self::Slice { dim, start, len } => {
                let mut new = old.to_vec();
                let size = new
                    .get_mut(*dim)
                    .ok_or(format!("there is no dimension {dim}"))?;
                let fits = *start >= 0
                    && *len >= 0
                    && start.checked_add(*len).is_some_and(|end| end <= *size);
                if !fits {
                    return Err(format!(
                        "{len} indices from {start} do not fit dimension {dim}"
                    ));
                }
                *size = *len;
                Ok(new)
            }
            Self::Reshape(new) => {
                let count = |shape: &[i64]| {
                    shape
                        .iter()
                        .try_fold(1i64, |n, &d| n.checked_mul(d).filter(|_| d >= 0))
                };
                if count(new).is_none() || count(new) != count(old) {
                    return Err(format!("shape {new:?} has another number of elements"));
                }
                Ok(new.clone())
            }
            Self::UnpermuteRope { heads } | Self::PermuteRope { heads } => match old.first() {
                Some(&rows)
                    if *heads > 0
                        && rows >= *heads
                        && rows % heads == 0
                        && rows / heads % 2 == 0 =>
                {
                    Ok(old.to_vec())
                }
                _ => Err(format!("the rows are not {heads} heads of even size")),
            },
        }
    }

    /// The rows of a matrix of `rows` rows after this step, if all it does is choose and
    /// order them.
    fn rows(&self, rows: usize) -> Option<Vec<usize>> {
        match self {
            Self::Slice { dim: 0, start, len } => {
                let start = usize::try_from(*start).ok()?;
                Some((start..start + usize::try_from(*len).ok()?).collect())
            }
            Self::UnpermuteRope { heads } => {
                let heads = usize::try_from(*heads).ok().filter(|&h| h > 0)?;
                let half = rows / (2 * heads);
                let head = |h: usize| {
                    (0..2).flat_map(move |j| (0..half).map(move |i| (2 * h * half) + 2 * i + j))
                };
                Some((0..heads).flat_map(head).collect())
            }
            Self::PermuteRope { heads } => {
                let heads = usize::try_from(*heads).ok().filter(|&h| h > 0)?;
                let half = rows / (2 * heads);
                let head = |h: usize| {
                    (0..half).flat_map(move |i| (0..2).map(move |j| (2 * h + j) * half + i))
                };
                Some((0..heads).flat_map(head).collect())
            }
            Self::Slice { .. } | Self::Transpose | Self::Reshape(_) => None,
        }
    }

    fn apply(&self, t: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Transpose => t.f_transpose(0, 1)?,
            Self::Slice { dim, start, len } => {
                // A copy, so that the part does not keep the whole alive.
                t.f_narrow_copy(*dim as i64, *start, *len)?
            }
            Self::Reshape(shape) => t.f_reshape(shape.as_slice())?,
            Self::UnpermuteRope { heads } => {
                let old = t.size();
                let half = old.first().copied().unwrap_or(0) / (2 * heads);
                let mut split = vec![*heads, half, 2];
                split.extend(old.iter().skip(1));
                t.f_reshape(split)?.f_transpose(1, 2)?.f_reshape(old)?
            }
            Self::PermuteRope { heads } => {
                let old = t.size();
                let half = old.first().copied().unwrap_or(0) / (2 * heads);
                let mut split = vec![*heads, 2, half];
                split.extend(old.iter().skip(1));
                t.f_reshape(split)?.f_transpose(1, 2)?.f_reshape(old)?
            }
        })
    }
}

/// Another source under new names.
#[derive(Debug)]
pub struct Renamed<S> {
    source: S,
    table: BTreeMap<String, Origin>,
}

#[derive(Debug)]
struct Origin {
    old: String,
    steps: Vec<Transform>,
    info: TensorInfo,
}

impl<S: TensorSource> Renamed<S> {
    /// Renames by a function that gets each old name with its description and
    /// returns what becomes of it: one tensor, several parts, or nothing.
    ///
    /// # Errors
    /// Two tensors get the same new name, or a step does not fit a shape.
    pub fn new(
        source: S,
        mut rename: impl FnMut(&str, &TensorInfo) -> Vec<NewTensor>,
    ) -> Result<Self> {
        let mut table: BTreeMap<String, Origin> = BTreeMap::new();
        for old in source.names() {
            let Some(info) = source.info(&old) else {
                continue;
            };
            for NewTensor { name, steps } in rename(&old, &info) {
                let info = transformed(&source, &old, &name, &info, &steps)?;
                if let Some(other) = table.get(&name) {
                    return Err(Error::weights(
                        source.path(),
                        format!("tensors '{}' and '{old}' both become '{name}'", other.old),
                    ));
                }
                table.insert(
                    name,
                    Origin {
                        old: old.clone(),
                        steps,
                        info,
                    },
                );
            }
        }
        Ok(Self { source, table })
    }

    /// Renames by a table of new name to `(old name, steps)`; old tensors that
    /// the table does not mention are left out.
    ///
    /// # Errors
    /// An old name is not in the source, or a step does not fit a shape.
    pub fn from_table(
        source: S,
        table: impl IntoIterator<Item = (String, (String, Vec<Transform>))>,
    ) -> Result<Self> {
        let mut by_old: BTreeMap<String, Vec<NewTensor>> = BTreeMap::new();
        for (name, (old, steps)) in table {
            if source.info(&old).is_none() {
                return Err(absent(source.path(), &old));
            }
            by_old
                .entry(old)
                .or_default()
                .push(NewTensor { name, steps });
        }
        Self::new(source, |old, _| by_old.remove(old).unwrap_or_default())
    }

    /// Keeps the tensors whose name starts with `prefix`, without it; for
    /// wrappers such as `module.`, `_orig_mod.` or `ema_model.`.
    ///
    /// # Errors
    /// No tensor has the prefix.
    pub fn strip_prefix(source: S, prefix: &str) -> Result<Self> {
        let renamed = Self::new(source, |old, _| {
            old.strip_prefix(prefix)
                .map(NewTensor::renamed)
                .into_iter()
                .collect()
        })?;
        if renamed.table.is_empty() {
            return Err(Error::weights(
                renamed.source.path(),
                format!("no tensor name starts with '{prefix}'"),
            ));
        }
        Ok(renamed)
    }

    /// The source underneath.
    pub fn inner(&self) -> &S {
        &self.source
    }
}

/// The description of a tensor after `steps`.
fn transformed(
    source: &impl TensorSource,
    old: &str,
    new: &str,
    info: &TensorInfo,
    steps: &[Transform],
) -> Result<TensorInfo> {
    let mut shape = info.shape.clone();
    for step in steps {
        shape = step.shape(&shape).map_err(|what| {
            Error::weights(
                source.path(),
                format!("tensor '{old}' of shape {shape:?} cannot become '{new}': {what}"),
            )
        })?;
    }
    Ok(TensorInfo {
        shape,
        ..info.clone()
    })
}

impl<S: TensorSource> TensorSource for Renamed<S> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn names(&self) -> Vec<String> {
        self.table.keys().cloned().collect()
    }

    /// Shape after the steps; dtype, bytes and file of the old tensor.
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.table.get(name).map(|origin| origin.info.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let origin = self
            .table
            .get(name)
            .ok_or_else(|| absent(self.path(), name))?;
        let mut tensor = self.source.load(&origin.old)?;
        for step in &origin.steps {
            tensor = step.apply(&tensor)?;
        }
        Ok(tensor.f_contiguous()?)
    }

    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        let origin = self
            .table
            .get(name)
            .ok_or_else(|| absent(self.path(), name))?;
        let Some(mut matrix) = self.source.stored(&origin.old)? else {
            return Ok(None);
        };
        for step in &origin.steps {
            match step.rows(matrix.outputs()) {
                Some(rows) => matrix = matrix.select(rows)?,
                // It would take blocks apart.
                None => return Ok(None),
            }
        }
        Ok(Some(matrix))
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        self.source.metadata()
    }
}
