//! Numbers with several digits of different bases: how the levels of the channels of a
//! finite scalar quantiser make one index.

use crate::{Error, Result};
use sequor_nn::{Kind, Tensor};

/// Levels per channel beyond which f32 can no longer count them with halves between.
const MOST_LEVELS: i64 = 1 << 22;

/// Levels `L_0, L_1, ..` with the place values `1, L_0, L_0 L_1, ..`: the first channel is
/// the lowest digit.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    pub each: Vec<i64>,
    places: Vec<i64>,
    /// Their product, the number of codes.
    pub product: i64,
}

impl Levels {
    pub fn new(levels: &[i64]) -> Result<Self> {
        let fail = |advice: String| Err(Error::config("levels", levels, advice));
        if levels.is_empty() {
            return fail("give at least one channel, for example [8, 5, 5, 5]".into());
        }
        if let Some(l) = levels.iter().find(|&&l| !(2..=MOST_LEVELS).contains(&l)) {
            return fail(format!(
                "a channel of {l} levels is not possible: use 2 to {MOST_LEVELS}"
            ));
        }
        let mut places = Vec::new();
        let mut product = 1i64;
        for &l in levels {
            places.push(product);
            let Some(next) = product.checked_mul(l) else {
                return fail(
                    "their product does not fit an index of 63 bits: use fewer channels or levels"
                        .into(),
                );
            };
            product = next;
        }
        Ok(Self {
            each: levels.to_vec(),
            places,
            product,
        })
    }

    /// Number of channels.
    pub fn channels(&self) -> i64 {
        self.each.len() as i64
    }

    /// `[channels]` f32 of a number per level, beside `like`.
    pub fn per_channel(&self, like: &Tensor, f: impl Fn(f64) -> f64) -> Result<Tensor> {
        let values: Vec<f32> = self.each.iter().map(|&l| f(l as f64) as f32).collect();
        Ok(Tensor::f_from_slice(&values)?.f_to_device(like.device())?)
    }

    /// Digits `[.., channels]`, whole numbers in f32, to indices `[..]`.
    pub fn index(&self, digits: &Tensor) -> Result<Tensor> {
        let places = Tensor::f_from_slice(&self.places)?.f_to_device(digits.device())?;
        let digits = digits.f_to_kind(Kind::Int64)?;
        Ok(digits
            .f_mul(&places)?
            .f_sum_dim_intlist(-1, false, Kind::Int64)?)
    }

    /// Indices `[..]` to digits `[.., channels]` in f32.
    pub fn digits(&self, index: &Tensor) -> Result<Tensor> {
        let beside = |v: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(v)?.f_to_device(index.device())?)
        };
        let quotient = index
            .f_unsqueeze(-1)?
            .f_div_tensor_mode(&beside(&self.places)?, "floor")?;
        let digits = quotient.f_remainder_tensor(&beside(&self.each)?)?;
        Ok(digits.f_to_kind(Kind::Float)?)
    }
}
