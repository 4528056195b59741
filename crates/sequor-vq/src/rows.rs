//! The checks that every pass begins with.

use crate::{Error, Result};
use sequor_nn::{Kind, Tensor};

/// The vectors of a tensor as rows, and how to get back.
#[derive(Debug)]
pub(crate) struct Rows {
    /// `[rows, dim]`, f32, connected to the input's gradients.
    pub flat: Tensor,
    lead: Vec<i64>,
    kind: Kind,
}

impl Rows {
    /// Takes `z` `[.., dim]` apart.
    pub fn new(z: &Tensor, dim: i64) -> Result<Self> {
        let shape = shape_of(z, "z")?;
        let kind = z.f_kind()?;
        if !matches!(
            kind,
            Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16
        ) {
            return Err(Error::Input(format!(
                "z holds {kind:?}: vectors are floating-point numbers"
            )));
        }
        let Some((&last, lead)) = shape.split_last().filter(|(d, _)| **d == dim) else {
            return Err(Error::Input(format!(
                "z has the shape {shape:?}: its last dimension must be {dim} (channels_last \
                 brings the second dimension there)"
            )));
        };
        if shape.contains(&0) {
            return Err(Error::Input(format!(
                "z has the shape {shape:?}: there is no vector to quantise"
            )));
        }
        let flat = z.f_reshape([-1, last])?.f_to_kind(Kind::Float)?;
        let finite = flat.f_detach()?.f_isfinite()?.f_all()?;
        if finite.f_int64_value(&[])? == 0 {
            return Err(Error::Input(
                "z has entries that are NaN or beyond the range of f32: look at the encoder, or \
                 lower the learning rate"
                    .into(),
            ));
        }
        Ok(Self {
            flat,
            lead: lead.to_vec(),
            kind,
        })
    }

    /// `[rows, ..]` to the leading dimensions of `z`.
    pub fn restore(&self, t: &Tensor) -> Result<Tensor> {
        let mut shape = self.lead.clone();
        shape.extend(t.size().iter().skip(1));
        Ok(t.f_reshape(shape)?)
    }

    /// As [`restore`](Self::restore), in the number format of `z`.
    pub fn vectors(&self, t: &Tensor) -> Result<Tensor> {
        Ok(self.restore(t)?.f_to_kind(self.kind)?)
    }
}

fn shape_of(t: &Tensor, name: &str) -> Result<Vec<i64>> {
    if !t.defined() {
        return Err(Error::Input(format!("{name} is an undefined tensor")));
    }
    Ok(t.size())
}

/// Indices as `[rows, tail..]`, i64, and the dimensions before.
#[derive(Debug)]
pub(crate) struct Indices {
    pub flat: Tensor,
    lead: Vec<i64>,
}

impl Indices {
    /// Takes `[.., tail..]` apart; entries lie in `least..size`, where `least` is -1 when a
    /// missing index is allowed.
    pub fn new(indices: &Tensor, tail: &[i64], least: i64, size: i64) -> Result<Self> {
        let shape = shape_of(indices, "the tensor of indices")?;
        let kind = indices.f_kind()?;
        if !matches!(
            kind,
            Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8
        ) {
            return Err(Error::Input(format!(
                "the indices are {kind:?}: they must be integers"
            )));
        }
        let lead = shape.len().checked_sub(tail.len());
        let parts = lead.and_then(|n| shape.split_at_checked(n));
        let Some((lead, _)) = parts.filter(|(_, end)| *end == tail) else {
            return Err(Error::Input(format!(
                "the indices have the shape {shape:?}: it must end in {tail:?}"
            )));
        };
        if shape.contains(&0) {
            return Err(Error::Input(format!(
                "the indices have the shape {shape:?}: there is none to look up"
            )));
        }
        let (low, high) = indices.f_aminmax(None, false)?;
        let (low, high) = (low.f_int64_value(&[])?, high.f_int64_value(&[])?);
        if low < least || high >= size {
            let bad = if low < least { low } else { high };
            return Err(Error::Input(format!(
                "index {bad} does not exist: the codebook has the codes 0 to {}",
                size - 1
            )));
        }
        let mut flat = vec![-1];
        flat.extend(tail);
        Ok(Self {
            flat: indices.f_to_kind(Kind::Int64)?.f_reshape(flat)?,
            lead: lead.to_vec(),
        })
    }

    /// `[rows, ..]` to the leading dimensions of the indices.
    pub fn restore(&self, t: &Tensor) -> Result<Tensor> {
        let mut shape = self.lead.clone();
        shape.extend(t.size().iter().skip(1));
        Ok(t.f_reshape(shape)?)
    }
}
