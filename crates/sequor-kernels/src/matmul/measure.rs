//! How long products take here, beside libtorch's own.

use super::{Format, Isa, MatrixError, Packed, Stored};
use crate::rng::{Key, Purpose};
use std::time::Instant;
use tch::{Kind, Tensor};

/// Weights that are read in turn come to at least this many bytes, so that no cache holds
/// them.
const BEYOND_CACHES: usize = 192 << 20;

/// The product of some rows with one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Rows.
    pub rows: usize,
    /// Bytes of weights that one product reads.
    pub bytes: usize,
    /// Median seconds of one product.
    pub seconds: f64,
    /// Of libtorch's bf16 linear with the same matrix, measured in turn with ours; for bf16
    /// alone.
    pub libtorch: Option<f64>,
}

/// Times products of a random matrix with each of these numbers of rows: the median of
/// `repeats` passes over as many copies of the matrix as no cache holds.
///
/// # Errors
/// As [`Stored::quantise`]; [`MatrixError::Memory`] when the copies do not fit.
pub fn measure(
    format: Format,
    outputs: usize,
    inputs: usize,
    rows: &[usize],
    repeats: usize,
    threads: usize,
) -> Result<Vec<Measured>, MatrixError> {
    let mut stream = Key::new(1, 0).stream(0, Purpose::Test);
    let mut draw =
        |n: usize| -> Vec<f32> { (0..n).map(|_| stream.uniform() as f32 - 0.5).collect() };
    let values = draw(outputs * inputs);
    let stored = Stored::quantise(format, &values, outputs, inputs)?;
    let first = Packed::new(&stored)?;
    let bytes = first.bytes();
    let copies = BEYOND_CACHES.div_ceil(bytes.max(1)).clamp(2, 2048);
    let mut packed = vec![first];
    for _ in 1..copies {
        packed.push(Packed::new(&stored)?);
    }
    let dense = if format == Format::Bf16 {
        plain_copies(&values, outputs, inputs, copies)
    } else {
        None
    };
    let isa = Isa::chosen();
    let mut all = Vec::new();
    for &rows in rows {
        let x = draw(rows * inputs);
        let plain = plain(&x, rows, inputs);
        let mut y = vec![0f32; rows * outputs];
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for repeat in 0..=repeats.max(1) {
            let start = Instant::now();
            for w in &packed {
                w.multiply(&x, rows, &mut y, None, threads, isa)?;
            }
            let our = start.elapsed().as_secs_f64() / copies as f64;
            let start = Instant::now();
            let served = match (&dense, &plain) {
                (Some(dense), Some(x)) => dense.iter().all(|w| libtorch(x, w).is_some()),
                _ => false,
            };
            let their = start.elapsed().as_secs_f64() / copies as f64;
            // The first pass warms up.
            if repeat > 0 {
                ours.push(our);
                theirs.extend(served.then_some(their));
            }
        }
        all.push(Measured {
            rows,
            bytes,
            seconds: median(ours).unwrap_or(f64::NAN),
            libtorch: median(theirs),
        });
    }
    Ok(all)
}

fn plain(values: &[f32], rows: usize, columns: usize) -> Option<Tensor> {
    crate::bridge::from_slice(values, &[rows as i64, columns as i64]).ok()
}

fn plain_copies(
    values: &[f32],
    outputs: usize,
    inputs: usize,
    copies: usize,
) -> Option<Vec<Tensor>> {
    let w = plain(values, outputs, inputs)?
        .f_to_kind(Kind::BFloat16)
        .ok()?;
    (0..copies).map(|_| w.f_detach_copy().ok()).collect()
}

/// What a layer would do without our kernels: rows to bf16, product, back.
fn libtorch(x: &Tensor, w: &Tensor) -> Option<Tensor> {
    let x = x.f_to_kind(Kind::BFloat16).ok()?;
    x.f_linear(w, None::<&Tensor>)
        .ok()?
        .f_to_kind(Kind::Float)
        .ok()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_rows_is_timed() {
        let all = measure(Format::Bf16, 512, 4096, &[1, 3], 1, 2).unwrap();
        assert_eq!(all.iter().map(|m| m.rows).collect::<Vec<_>>(), [1, 3]);
        for m in all {
            assert_eq!(m.bytes, 512 * 4096 * 2);
            assert!(m.seconds > 0.0 && m.libtorch.is_some_and(|s| s > 0.0));
        }
        assert!(measure(Format::Q4K, 16, 32, &[1], 1, 1).is_err());
    }
}
