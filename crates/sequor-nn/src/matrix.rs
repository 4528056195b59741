//! The matrix of a linear layer or an embedding, however its numbers are kept.

use std::sync::Arc;

use sequor_kernels::bridge::{self, BridgeError};
use sequor_kernels::matmul::{Format, Isa, MatrixError, Packed, Stored};
use sequor_kernels::threads;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// A matrix `[output, input]`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Matrix {
    /// Plain numbers in f32, f16 or bf16: libtorch computes with them.
    Dense(Tensor),
    /// Plain f32 stored as `[input, output]`: the same numbers in the order that libtorch's
    /// f32 product reads nearly twice as fast when there are more outputs than inputs and
    /// few rows (docs/benchmarks.md).
    Transposed(Tensor),
    /// Rows in one of our formats, as a file has them: for look-ups, and on the way to
    /// `Packed`.
    Stored(Stored),
    /// In the order that our own kernels read ([`sequor_kernels::matmul`]). For inference.
    Packed(Arc<Packed>),
}

impl Matrix {
    /// Length of the output rows.
    #[must_use]
    pub fn output(&self) -> i64 {
        match self {
            Self::Dense(w) => w.size().first().copied().unwrap_or(0),
            Self::Transposed(w) => w.size().get(1).copied().unwrap_or(0),
            Self::Stored(w) => w.outputs() as i64,
            Self::Packed(w) => w.outputs() as i64,
        }
    }

    /// Length of the input rows.
    #[must_use]
    pub fn input(&self) -> i64 {
        match self {
            Self::Dense(w) => w.size().get(1).copied().unwrap_or(0),
            Self::Transposed(w) => w.size().first().copied().unwrap_or(0),
            Self::Stored(w) => w.inputs() as i64,
            Self::Packed(w) => w.inputs() as i64,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(w) | Self::Transposed(w) => w.device(),
            Self::Stored(_) | Self::Packed(_) => Device::Cpu,
        }
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(w) | Self::Transposed(w) => w.numel() * w.kind().elt_size_in_bytes(),
            Self::Stored(w) => w.bytes().len(),
            Self::Packed(w) => w.bytes(),
        }
    }

    /// `x W^T + bias`; `x`: `[.., input]` f32; gives `[.., output]` f32.
    ///
    /// Our kernels have no gradients: where `x` needs one, the numbers of the matrix are
    /// expanded for libtorch.
    ///
    /// # Errors
    /// When the last dimension is not `input`.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Dense(w) if w.kind() == Kind::Float => Ok(x.f_linear(w, bias)?),
            Self::Dense(w) => Ok(x
                .f_to_kind(w.kind())?
                .f_linear(w, bias)?
                .f_to_kind(Kind::Float)?),
            Self::Transposed(w) => {
                let y = x.f_matmul(w)?;
                match bias {
                    Some(b) => Ok(y.f_add(b)?),
                    None => Ok(y),
                }
            }
            Self::Packed(w) if !x.requires_grad() => packed_product(w, x, bias),
            Self::Stored(_) | Self::Packed(_) => {
                let bias = bias.map(|b| b.f_to_kind(Kind::Float)).transpose()?;
                Ok(x.f_linear(&self.expand()?, bias.as_ref())?)
            }
        }
    }

    /// The rows with these numbers (any shape, int64): `[.., input]` f32.
    ///
    /// # Errors
    /// When a number lies outside the matrix.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => {
                Ok(Tensor::f_embedding(w, ids, -1, false, false)?.f_to_kind(Kind::Float)?)
            }
            Self::Transposed(w) => {
                // A head reads the whole table for every token, a lookup one column of it.
                let mut shape = ids.size();
                shape.push(self.input());
                let columns = w.f_index_select(1, &ids.f_reshape([-1])?)?;
                Ok(columns.f_t_copy()?.f_reshape(shape)?)
            }
            Self::Stored(w) => look_up(ids, w.outputs(), w.inputs(), |row, out| {
                w.expand_row(row, out);
            }),
            Self::Packed(w) => look_up(ids, w.outputs(), w.inputs(), |row, out| {
                w.expand_row(row, out);
            }),
        }
    }

    /// All numbers, `[output, input]` f32.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub fn expand(&self) -> Result<Tensor> {
        match self {
            Self::Dense(w) => Ok(w.f_to_kind(Kind::Float)?),
            Self::Transposed(w) => Ok(w.f_transpose(0, 1)?),
            Self::Stored(w) => expand(w),
            Self::Packed(w) => expand(&w.stored()),
        }
    }

    /// Only these outputs, in this order. The rows are copied.
    ///
    /// # Errors
    /// [`Error::Input`] for an output that does not exist.
    pub fn select(&self, outputs: &[u32]) -> Result<Self> {
        if let Some(bad) = outputs.iter().find(|&&o| i64::from(o) >= self.output()) {
            return Err(Error::Input(format!(
                "output {bad} of a linear layer with {} outputs",
                self.output()
            )));
        }
        let index = || -> Result<Tensor> {
            let index: Vec<i64> = outputs.iter().map(|&o| i64::from(o)).collect();
            Ok(Tensor::f_from_slice(&index)?.f_to_device(self.device())?)
        };
        let rows = || outputs.iter().map(|&o| o as usize);
        Ok(match self {
            Self::Dense(w) => Self::Dense(w.f_index_select(0, &index()?)?),
            Self::Transposed(w) => {
                Self::Transposed(w.f_index_select(1, &index()?)?.f_contiguous()?)
            }
            Self::Stored(w) => Self::Stored(w.select(rows())?),
            Self::Packed(w) => Self::packed(&w.stored().select(rows())?)?,
        })
    }

    /// Are these matrices kept in one way, by rows, so that [`join`](Self::join) takes them?
    #[must_use]
    pub fn may_join(parts: &[&Self]) -> bool {
        let dense = |m: &&Self| matches!(m, Self::Dense(_));
        let format = |m: &&Self| match m {
            Self::Stored(w) => Some(w.format()),
            _ => None,
        };
        let first = parts.first().and_then(format);
        parts.iter().all(dense) || (first.is_some() && parts.iter().all(|m| format(m) == first))
    }

    /// Matrices over the same input on top of each other, `None` when they are kept in
    /// different ways or packed already.
    ///
    /// # Errors
    /// When there is no memory for the copy.
    pub fn join(parts: &[&Self]) -> Result<Option<Self>> {
        let dense = parts.iter().map(|m| match m {
            Self::Dense(w) => Some(w),
            _ => None,
        });
        if let Some(all) = dense.collect::<Option<Vec<&Tensor>>>() {
            return Ok(Some(Self::Dense(Tensor::f_cat(&all, 0)?)));
        }
        let stored = parts.iter().map(|m| match m {
            Self::Stored(w) => Some(w),
            _ => None,
        });
        match stored.collect::<Option<Vec<&Stored>>>().as_deref() {
            Some(all) => match Stored::join(all) {
                Ok(joined) => Ok(Some(Self::Stored(joined))),
                Err(MatrixError::Join) => Ok(None),
                Err(e) => Err(e.into()),
            },
            None => Ok(None),
        }
    }

    /// Puts the matrix into the order that suits this machine.
    ///
    /// # Errors
    /// When there is no memory for the copy.
    pub fn pack(self) -> Result<Self> {
        match self {
            Self::Dense(w) if prefers_transposed(&w) => {
                Ok(Self::Transposed(w.f_t_copy()?.f_contiguous()?))
            }
            Self::Dense(w) if prefers_kernels(&w) => {
                let [outputs, inputs] = w.size()[..] else {
                    return Ok(Self::Dense(w));
                };
                let (outputs, inputs) = (outputs as usize, inputs as usize);
                let packed = bridge::read_bytes(&w.f_contiguous()?, |rows| {
                    Packed::from_rows(Format::Bf16, outputs, inputs, rows)
                })??;
                Ok(Self::Packed(Arc::new(packed)))
            }
            Self::Stored(w) => Self::packed(&w),
            other => Ok(other),
        }
    }

    fn packed(w: &Stored) -> Result<Self> {
        Ok(Self::Packed(Arc::new(Packed::new(w)?)))
    }

    /// The same numbers, with `change` done to them in f32 `[output, input]` and the result
    /// rounded once to how they are kept.
    ///
    /// # Errors
    /// When there is no memory for the copy; [`Error::Input`] when the format cannot keep the
    /// result.
    pub fn changed(&self, change: impl FnOnce(&Tensor) -> Result<()>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let sum = self.expand()?.f_detach_copy()?;
        change(&sum)?;
        Ok(match self {
            Self::Dense(w) => Self::Dense(sum.f_to_kind(w.kind())?),
            Self::Transposed(_) => Self::Transposed(sum.f_transpose(0, 1)?.f_contiguous()?),
            Self::Stored(w) => Self::Stored(quantise(w.format(), &sum)?),
            Self::Packed(w) => Self::packed(&quantise(w.format(), &sum)?)?,
        })
    }

    /// Another handle on the same matrix: memory is shared, but for rows in a format of ours
    /// that are not packed.
    #[must_use]
    pub fn share(&self) -> Self {
        match self {
            Self::Dense(w) => Self::Dense(w.shallow_clone()),
            Self::Transposed(w) => Self::Transposed(w.shallow_clone()),
            Self::Stored(w) => Self::Stored(w.clone()),
            Self::Packed(w) => Self::Packed(w.clone()),
        }
    }
}

/// Numbers of a matrix in one of our formats.
///
/// # Errors
/// [`Error::Input`] when the format cannot keep them.
pub(crate) fn quantise(format: Format, w: &Tensor) -> Result<Stored> {
    let [outputs, inputs] = w.size()[..] else {
        return Err(Error::Input(format!(
            "a matrix is needed, and this tensor is {:?}",
            w.size()
        )));
    };
    let (outputs, inputs) = (outputs as usize, inputs as usize);
    let plain = w
        .f_detach()?
        .f_to_device(Device::Cpu)?
        .f_to_kind(Kind::Float)?
        .f_contiguous()?;
    Ok(bridge::read(&plain, |values: &[f32]| {
        Stored::quantise(format, values, outputs, inputs)
    })??)
}

fn packed_product(w: &Packed, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut shape = x.size();
    match shape.last_mut() {
        Some(last) if *last == w.inputs() as i64 => *last = w.outputs() as i64,
        _ => {
            return Err(Error::Input(format!(
                "a linear layer of {} inputs was given rows of shape {:?}",
                w.inputs(),
                x.size()
            )));
        }
    }
    let rows = shape.iter().rev().skip(1).product::<i64>() as usize;
    let x = x.f_to_kind(Kind::Float)?.f_contiguous()?;
    let multiply = |bias: Option<&[f32]>| {
        bridge::read(&x, |x: &[f32]| {
            bridge::build(&shape, |y: &mut [f32]| {
                w.multiply(x, rows, y, bias, threads::get(), Isa::chosen())
            })
        })
    };
    let (y, outcome) = match bias {
        None => multiply(None)??,
        Some(b) => {
            let b = b.f_to_kind(Kind::Float)?.f_contiguous()?;
            bridge::read(&b, |b: &[f32]| multiply(Some(b)))???
        }
    };
    outcome?;
    Ok(y)
}

fn look_up(
    ids: &Tensor,
    rows: usize,
    width: usize,
    row: impl Fn(usize, &mut [f32]),
) -> Result<Tensor> {
    let mut shape = ids.size();
    shape.push(width as i64);
    let ids: Vec<i64> = bridge::to_vec(&ids.f_to_kind(Kind::Int64)?)?;
    if let Some(bad) = ids.iter().find(|&&i| i < 0 || i as usize >= rows) {
        return Err(Error::Input(format!("row {bad} of a table of {rows} rows")));
    }
    let (table, ()) = bridge::build(&shape, |out: &mut [f32]| {
        for (out, &id) in out.chunks_exact_mut(width.max(1)).zip(&ids) {
            row(id as usize, out);
        }
    })?;
    Ok(table)
}

fn expand(w: &Stored) -> Result<Tensor> {
    let shape = [w.outputs() as i64, w.inputs() as i64];
    Ok(bridge::from_slice(&w.expand(), &shape)?)
}

/// Is this matrix `[out, in]` read faster transposed? Measured on CPUs with AVX-512 and f32:
/// at one row 1.4 to 1.8 times where there are more outputs than inputs, and slower
/// elsewhere; 16-bit formats never gain.
pub(crate) fn prefers_transposed(w: &Tensor) -> bool {
    matches!(w.size()[..], [out, input] if out > input)
        && w.kind() == Kind::Float
        && w.device() == Device::Cpu
}

/// Do our own kernels compute with this matrix? Those for bf16 are faster than libtorch's
/// where there are vector instructions for them, at every number of rows
/// (docs/benchmarks.md).
pub(crate) fn prefers_kernels(w: &Tensor) -> bool {
    w.dim() == 2 && w.kind() == Kind::BFloat16 && w.device() == Device::Cpu && Isa::serve()
}

/// Do our kernels compute with these rows? They have no gradients.
pub(crate) fn kernels_take(x: &Tensor) -> bool {
    Isa::serve() && x.device() == Device::Cpu && x.kind() == Kind::Float && !x.requires_grad()
}

impl From<BridgeError> for Error {
    fn from(e: BridgeError) -> Self {
        Self::Input(e.to_string())
    }
}

impl From<MatrixError> for Error {
    fn from(e: MatrixError) -> Self {
        match e {
            MatrixError::Memory { .. } => Self::Limits(e.to_string()),
            MatrixError::Isa { .. } => Self::Unsupported(e.to_string()),
            other => Self::Input(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sequor_kernels::rng::{Key, Purpose};

    fn tensor(seed: u64, shape: &[i64]) -> Tensor {
        let mut stream = Key::new(seed, 0).stream(0, Purpose::Test);
        let n = shape.iter().product::<i64>();
        let x: Vec<f32> = (0..n).map(|_| stream.uniform() as f32 - 0.5).collect();
        Tensor::from_slice(&x).reshape(shape)
    }

    fn all(shape: &[i64]) -> Vec<Matrix> {
        let w = tensor(1, shape);
        let formats = Format::ALL.into_iter();
        let stored = |f| Matrix::Stored(quantise(f, &w).unwrap());
        let packed = Format::ALL.into_iter().map(|f| stored(f).pack().unwrap());
        [
            Matrix::Dense(w.shallow_clone()),
            Matrix::Dense(w.to_kind(Kind::BFloat16)),
            Matrix::Transposed(w.transpose(0, 1).contiguous()),
        ]
        .into_iter()
        .chain(formats.map(stored))
        .chain(packed)
        .collect()
    }

    /// Largest difference, relative to the largest number of `b`.
    fn off(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.size(), b.size());
        let most = |t: &Tensor| t.abs().max().double_value(&[]);
        most(&(a - b)) / most(b)
    }

    #[test]
    fn all_ways_to_keep_a_matrix_are_the_same_matrix() {
        let x = tensor(2, &[2, 3, 256]);
        let bias = tensor(3, &[20]);
        let exact = Matrix::Dense(tensor(1, &[20, 256]));
        let expected = exact.product(&x, Some(&bias)).unwrap();
        let ids = Tensor::from_slice(&[4i64, 0, 19, 4]).reshape([2, 2]);
        for m in all(&[20, 256]) {
            let near = match &m {
                Matrix::Stored(w) if w.format() >= Format::Q4_0 => 0.2,
                Matrix::Packed(w) if w.format() >= Format::Q4_0 => 0.2,
                _ => 0.02,
            };
            assert_eq!((m.output(), m.input()), (20, 256));
            let bias = match &m {
                Matrix::Dense(w) => bias.to_kind(w.kind()),
                _ => bias.shallow_clone(),
            };
            let y = m.product(&x, Some(&bias)).unwrap();
            assert!(off(&y, &expected) < near, "{m:?}");
            // What is done to rows is done to the numbers that it has.
            let numbers = m.expand().unwrap();
            assert_eq!(
                off(
                    &m.rows(&ids).unwrap(),
                    &numbers
                        .index_select(0, &ids.reshape([-1]))
                        .reshape([2, 2, 256])
                ),
                0.0
            );
            let some = m.select(&[19, 0, 7]).unwrap();
            let index = Tensor::from_slice(&[19i64, 0, 7]);
            assert_eq!(
                off(&some.expand().unwrap(), &numbers.index_select(0, &index)),
                0.0
            );
            assert!(m.select(&[20]).is_err());
            let doubled = m.changed(|w| {
                let _ = w.shallow_clone().g_mul_scalar_(2.0);
                Ok(())
            });
            let again = doubled.unwrap().expand().unwrap() / 2.0;
            assert!(off(&again, &numbers) < 0.07, "{m:?}");
            assert_eq!(off(&m.share().expand().unwrap(), &numbers), 0.0);
            assert!(m.product(&tensor(4, &[2, 255]), None).is_err(), "{m:?}");
            assert!(m.rows(&Tensor::from_slice(&[20i64])).is_err(), "{m:?}");
        }
    }

    #[test]
    fn gradients_flow_through_packed_matrices() {
        let m = Matrix::Stored(quantise(Format::Q8_0, &tensor(1, &[8, 64])).unwrap());
        let m = m.pack().unwrap();
        let x = tensor(5, &[3, 64]).set_requires_grad(true);
        m.product(&x, None).unwrap().sum(Kind::Float).backward();
        let expected = m
            .expand()
            .unwrap()
            .sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        assert!(off(&x.grad().get(1), &expected) < 1e-6);
    }

    #[test]
    fn only_alike_matrices_are_joined() {
        let matrices = all(&[20, 256]);
        for a in &matrices {
            for b in &matrices {
                let joined = Matrix::join(&[a, b]).unwrap();
                let alike = match (a, b) {
                    (Matrix::Dense(_), Matrix::Dense(_)) => true,
                    (Matrix::Stored(a), Matrix::Stored(b)) => a.format() == b.format(),
                    _ => false,
                };
                assert_eq!(joined.is_some(), alike);
                if let Some(joined) = joined {
                    assert_eq!((joined.output(), joined.input()), (40, 256));
                }
            }
        }
    }
}
