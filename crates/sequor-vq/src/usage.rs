//! How evenly codes are used.

use crate::quantizer::Quantizer;
use crate::rows::Indices;
use crate::search::counts;
use crate::{Error, Result};
use sequor_kernels::bridge;
use sequor_nn::{Kind, Tensor};
use serde::{Deserialize, Serialize};

/// Histograms of indices, one per codebook, gathered over as many batches as one likes.
///
/// A codebook is well used when its [`perplexity`](Self::perplexity) is more than about half
/// its size. Serialisable, and as a tensor ([`to_tensor`](Self::to_tensor)) it can be kept
/// in a safetensors file beside the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    codebook_size: usize,
    /// One after the other, in the order of the indices.
    counts: Vec<u64>,
}

/// Counters of all histograms together: 2 GiB.
const MOST_COUNTERS: i64 = 1 << 28;

impl Usage {
    /// Empty histograms for the codebooks of `quantizer`.
    ///
    /// # Errors
    /// [`Error::Limits`] when it has too many codes to count each.
    pub fn of(quantizer: &dyn Quantizer) -> Result<Self> {
        let books = quantizer.index_shape().iter().product();
        Self::new(books, quantizer.codebook_size())
    }

    /// Empty histograms for `codebooks` codebooks of `codebook_size` codes.
    ///
    /// # Errors
    /// [`Error::Limits`] when there are too many codes to count each, or none.
    pub fn new(codebooks: i64, codebook_size: i64) -> Result<Self> {
        let counters = codebooks.checked_mul(codebook_size);
        let Some(n) = counters.filter(|n| (1..=MOST_COUNTERS).contains(n) && codebooks > 0) else {
            return Err(Error::Limits(format!(
                "{codebooks} codebooks of {codebook_size} codes cannot be counted: histograms \
                 hold 1 to {MOST_COUNTERS} codes"
            )));
        };
        Ok(Self {
            codebook_size: codebook_size as usize,
            counts: vec![0; n as usize],
        })
    }

    /// Number of codebooks.
    pub fn codebooks(&self) -> usize {
        self.counts.len() / self.codebook_size.max(1)
    }

    /// Counts indices: their last dimensions are the codebooks, as the quantiser gave them;
    /// -1 (a level left out) is not counted.
    ///
    /// # Errors
    /// [`Error::Input`] when the indices are not of these codebooks.
    pub fn add(&mut self, indices: &Tensor) -> Result<()> {
        let (books, size) = (self.codebooks() as i64, self.codebook_size as i64);
        let all = Indices::new(indices, &[], -1, size)?.flat;
        let total = all.numel() as i64;
        let shape = indices.size();
        // The trailing dimensions that hold one index of every codebook.
        let mut tail = 1;
        let fits = books == 1
            || shape.iter().rev().any(|d| {
                tail *= d;
                tail == books
            });
        if !fits || total % books != 0 {
            return Err(Error::Input(format!(
                "indices of the shape {shape:?} are not those of {books} codebooks"
            )));
        }
        let columns = all.f_reshape([-1, books])?;
        for (book, histogram) in (0..books).zip(self.counts.chunks_mut(self.codebook_size)) {
            let column = columns.f_select(1, book)?;
            let there = column.f_masked_select(&column.f_ge(0)?)?;
            let found = bridge::to_vec::<f32>(&counts(&there, size)?)?;
            for (sum, n) in histogram.iter_mut().zip(found) {
                *sum = sum.saturating_add(n as u64);
            }
        }
        Ok(())
    }

    /// Adds the counts of `other`.
    ///
    /// # Errors
    /// [`Error::Input`] when it is of other codebooks.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.codebook_size != self.codebook_size || other.counts.len() != self.counts.len() {
            return Err(Error::Input(format!(
                "counts of {} codebooks of {} codes do not belong to {} of {}",
                other.codebooks(),
                other.codebook_size,
                self.codebooks(),
                self.codebook_size
            )));
        }
        for (sum, n) in self.counts.iter_mut().zip(&other.counts) {
            *sum = sum.saturating_add(*n);
        }
        Ok(())
    }

    /// Back to zero.
    pub fn clear(&mut self) {
        self.counts.fill(0);
    }

    /// How often each code of codebook `book` was chosen; empty when there is no such book.
    pub fn histogram(&self, book: usize) -> &[u64] {
        self.counts
            .chunks(self.codebook_size.max(1))
            .nth(book)
            .unwrap_or(&[])
    }

    /// Entropy of each codebook in nats, 0 to the logarithm of its size.
    pub fn entropy(&self) -> Vec<f64> {
        let entropy = |counts: &[u64]| {
            let total: f64 = counts.iter().map(|&n| n as f64).sum();
            let p = counts.iter().filter(|n| **n > 0).map(|&n| n as f64 / total);
            // A sum of nothing is -0.
            p.map(|p| -p * p.ln()).sum::<f64>().max(0.0)
        };
        self.books().map(entropy).collect()
    }

    /// The exponential of the entropy: how many codes would do, were they used evenly. From
    /// 1 to the size of the codebook (1 when nothing was counted).
    pub fn perplexity(&self) -> Vec<f64> {
        self.entropy().into_iter().map(f64::exp).collect()
    }

    /// Share of the codes of each codebook that were chosen at least once, in `[0, 1]`.
    pub fn used(&self) -> Vec<f64> {
        let used = |counts: &[u64]| {
            counts.iter().filter(|n| **n > 0).count() as f64 / self.codebook_size as f64
        };
        self.books().map(used).collect()
    }

    fn books(&self) -> impl Iterator<Item = &[u64]> {
        self.counts.chunks(self.codebook_size.max(1))
    }

    /// The counts as `[codebooks, codebook_size]`, i64.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let counts: Vec<i64> = self
            .counts
            .iter()
            .map(|&n| i64::try_from(n).unwrap_or(i64::MAX))
            .collect();
        let shape = [self.codebooks() as i64, self.codebook_size as i64];
        Ok(bridge::from_slice(&counts, &shape)?)
    }

    /// From what [`to_tensor`](Self::to_tensor) gave.
    ///
    /// # Errors
    /// [`Error::Input`] when it has another shape or type, or a count is negative.
    pub fn from_tensor(counts: &Tensor) -> Result<Self> {
        let wrong = || Error::Input("counts are i64 [codebooks, codebook_size]".into());
        if !counts.defined() || counts.dim() != 2 || counts.f_kind()? != Kind::Int64 {
            return Err(wrong());
        }
        let (books, size) = counts.size2().map_err(|_| wrong())?;
        let mut usage = Self::new(books, size)?;
        let values = bridge::to_vec::<i64>(counts)?;
        for (sum, n) in usage.counts.iter_mut().zip(values) {
            *sum = u64::try_from(n)
                .map_err(|_| Error::Input(format!("a code cannot be chosen {n} times")))?;
        }
        Ok(usage)
    }
}
