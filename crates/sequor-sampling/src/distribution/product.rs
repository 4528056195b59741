//! A law over columns of codes whose entries are independent given the past.

use sequor_kernels::rng::Stream;

use super::{Categorical, Law};
use crate::{Error, Result};

/// Law of a column of `K` codes, one [`Categorical`] per codebook, independent of one
/// another given the past: a frame of a residual codec predicted by parallel heads.
///
/// Its residual `[p - q]+` is not a product, so that residual draws use the
/// acceptance-rejection loop of [`Law::residual`], which is exact.
#[derive(Clone, Debug, PartialEq)]
pub struct ProductCategorical {
    books: Vec<Categorical>,
}

impl ProductCategorical {
    /// One law per codebook.
    ///
    /// # Errors
    /// `Input` when there is none.
    pub fn new(books: Vec<Categorical>) -> Result<Self> {
        if books.is_empty() {
            return Err(Error::input("books", "empty", "at least one codebook"));
        }
        Ok(Self { books })
    }

    /// The laws of the codebooks.
    #[must_use]
    pub fn books(&self) -> &[Categorical] {
        &self.books
    }
}

impl Law for ProductCategorical {
    type Unit = Vec<u32>;

    fn sample(&self, stream: &mut Stream) -> Vec<u32> {
        self.books.iter().map(|book| book.sample(stream)).collect()
    }

    /// A column of the wrong height is impossible.
    fn log_density(&self, unit: &Vec<u32>) -> f64 {
        if unit.len() != self.books.len() {
            return f64::NEG_INFINITY;
        }
        self.books
            .iter()
            .zip(unit)
            .map(|(book, code)| book.log_density(code))
            .sum()
    }
}
