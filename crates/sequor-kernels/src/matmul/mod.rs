//! Products of a few rows with a matrix that is read from memory once:
//! `y[m, n] = x[m, k] W^T`, the arithmetic of generation.
//!
//! With few rows the price is that of reading `W`, so `W` is kept small
//! ([`Format`]) and laid out once, at load, in the order in which it is read
//! ([`Packed`]): panels of 16 or 32 outputs, so that one pass over a panel serves up to
//! a dozen rows out of registers and the second row costs nearly nothing.
//!
//! | format | bits | weights are | rows are taken as |
//! |---|---|---|---|
//! | `bf16` | 16 | as they are | bf16, sums in f32 |
//! | `int8` | 8.25 | `scale q`, a bf16 scale for each 64 of a row | 8 bits in blocks of 32 |
//! | `q8_0` | 8.5 | `d q` in blocks of 32 | 8 bits in blocks of 32 |
//! | `q4_0` | 4.5 | `d (q - 8)` in blocks of 32 | 8 bits in blocks of 32 |
//! | `q4_1` | 5 | `d q + m` in blocks of 32 | 8 bits in blocks of 32 |
//! | `q4_k` | 4.5 | `d s q - dmin t`, blocks of 32 in 256 | 8 bits in blocks of 32 |
//!
//! The `q` formats are ggml's, and hold exactly the bits of the file in another order.
//!
//! # One order of every sum
//!
//! An output is one chain of operations in the order of the inputs: for bf16 over pairs
//! (the second of a pair first, as the processor's instruction has it), for the others
//! over blocks, each an exact integer. It does not depend on the number of rows, on the
//! threads, or on the instruction set ([`Isa`]): a row gives the same bits alone, in a
//! batch and in a tree, and every set gives those of the portable code. (One exception:
//! AVX-512's bf16 product takes numbers below 1e-38 as zero.)
//!
//! Numbers that are not finite give what IEEE arithmetic gives. A row that holds one
//! cannot be taken as 8 bits; it goes through the expanded weights instead.

mod arena;
mod bf16;
mod isa;
mod layout;
pub mod measure;
mod quantised;
mod rows;

#[cfg(test)]
mod tests;

pub(crate) use arena::Region;
pub use isa::Isa;
pub use layout::{Format, MatrixError, Packed, Stored};

use crate::team;
use std::ops::Range;

/// Most rows that one pass over a panel serves.
const TILE: usize = 12;

/// Fewer bytes than this are not worth a thread of their own.
const GRAIN_BYTES: usize = 24 << 10;

/// Where outputs are written: threads write different columns of one slice.
#[derive(Clone, Copy)]
struct Out {
    start: *mut f32,
    /// Elements from one row to the next.
    stride: usize,
}

// SAFETY: `multiply` gives each thread panels of its own, whose columns no other
// thread touches, and returns before the slice it borrowed is used again.
unsafe impl Sync for Out {}

/// A slice in parts of equal length, which threads write each on its own.
pub(crate) struct Parts {
    start: *mut f32,
    length: usize,
    count: usize,
}

// SAFETY: parts do not overlap, and `part` asks its caller to take each once.
unsafe impl Sync for Parts {}

impl Parts {
    pub fn new(slice: &mut [f32], length: usize) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            length,
            count: slice.len() / length.max(1),
        }
    }

    /// These parts, as one slice.
    ///
    /// # Safety
    /// The slice given to `new` is not used meanwhile, and nobody else holds these parts.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn parts(&self, parts: Range<usize>) -> &mut [f32] {
        assert!(parts.start <= parts.end && parts.end <= self.count);
        // SAFETY: inside the slice, as just checked; not aliased, as promised by the caller.
        unsafe {
            let start = self.start.add(parts.start * self.length);
            std::slice::from_raw_parts_mut(start, parts.len() * self.length)
        }
    }
}

impl Packed {
    /// `y[i, j] = sum_l x[i, l] W[j, l] (+ bias[j])` for `rows` rows.
    ///
    /// `x` is `[rows, inputs]` and `y` `[rows, outputs]`, both row-major. `threads` is the
    /// most threads to use, `isa` the instructions ([`Isa::chosen`]); neither changes a bit
    /// of the result.
    ///
    /// # Errors
    /// [`MatrixError::Length`] when a length does not fit, [`MatrixError::Isa`] when the
    /// processor lacks these instructions.
    pub fn multiply(
        &self,
        x: &[f32],
        rows: usize,
        y: &mut [f32],
        bias: Option<&[f32]>,
        threads: usize,
        isa: Isa,
    ) -> Result<(), MatrixError> {
        let (n, k) = (self.outputs(), self.inputs());
        let expect = |what, expected: Option<usize>, found| match expected {
            Some(e) if e == found => Ok(()),
            _ => Err(MatrixError::Length {
                what,
                expected: expected.unwrap_or(usize::MAX),
                found,
            }),
        };
        expect("x", rows.checked_mul(k), x.len())?;
        expect("y", rows.checked_mul(n), y.len())?;
        if let Some(b) = bias {
            expect("bias", Some(n), b.len())?;
        }
        if !isa.available() {
            return Err(MatrixError::Isa { isa });
        }
        if rows == 0 || n == 0 {
            return Ok(());
        }
        let isa = isa.serving(self.format());
        let out = Out {
            start: y.as_mut_ptr(),
            stride: n,
        };
        let grain = GRAIN_BYTES.div_ceil(self.stride().max(1) * rows.div_ceil(TILE));
        let prepared = rows::Prepared::new(self.format(), x, rows, k, threads, isa);
        team::share(self.panels(), grain, threads, |panels| {
            // The whole struct, not its pointer, is what may be shared.
            let out = &out;
            for panel in panels {
                match &prepared {
                    rows::Prepared::Bf16(x) => bf16::panel(self, panel, x, rows, out, isa),
                    rows::Prepared::Int8(x) => quantised::panel(self, panel, x, rows, out, isa),
                }
                if let rows::Prepared::Int8(x) = &prepared {
                    x.unusual(|row, x| exact(self, panel, row, x, out));
                }
                if let Some(bias) = bias {
                    add_bias(self, panel, rows, bias, out);
                }
            }
        });
        Ok(())
    }
}

/// One row of one panel from the expanded weights.
fn exact(w: &Packed, panel: usize, row: usize, x: &[f32], out: &Out) {
    let width = w.format().panel();
    let mut weights = vec![0f32; w.inputs()];
    for output in panel * width..w.outputs().min((panel + 1) * width) {
        w.expand_row(output, &mut weights);
        let sum: f64 = x
            .iter()
            .zip(&weights)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum();
        // SAFETY: `row` and `output` are in range, and the column is this panel's.
        unsafe { out.start.add(row * out.stride + output).write(sum as f32) };
    }
}

fn add_bias(w: &Packed, panel: usize, rows: usize, bias: &[f32], out: &Out) {
    let first = panel * w.format().panel();
    for (output, b) in bias.iter().enumerate().skip(first).take(w.format().panel()) {
        for row in 0..rows {
            // SAFETY: in range, a column of this panel, and written before.
            unsafe { *out.start.add(row * out.stride + output) += b };
        }
    }
}

/// `rows` in tiles of at most `most`, as even as can be: a last tile of one row would cost
/// nearly as much as a full one.
fn tiles(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(most);
    let mut start = 0;
    (0..count).map(move |i| {
        let size = (rows - start).div_ceil(count - i);
        start += size;
        (start - size, size)
    })
}

/// Runs a body with the run-time number `$m` as a constant, for each of the numbers given.
macro_rules! by_count {
    ($m:expr, [$($n:literal)*], $constant:ident => $body:expr) => {
        match $m {
            $($n => {
                const $constant: usize = $n;
                $body
            })*
            m => unreachable!("a tile of {m} rows"),
        }
    };
}
use by_count;
