//! The nearest code of every vector.
//!
//! `|z - e|^2 = |z|^2 - 2 z.e + |e|^2`, so the nearest code has the largest
//! `z.e - |e|^2/2`: one matrix product for all vectors and codes. That form is fast and it
//! cancels: two codes whose scores differ by less than the rounding of the product cannot be
//! told apart by it, and which of them wins would depend on how libtorch splits the product,
//! hence on the size of the batch, the number of threads and the device. So the product only
//! screens. Where the best two scores lie within the bound of its rounding error, the
//! candidates are measured again in f64, one vector at a time in a fixed order. The index
//! is thus that of the smallest distance, the lowest one among equals, and a function of the
//! vector and the table alone.
//!
//! The bound holds for f32 products; if TF32 products are switched on for CUDA, the screen is
//! coarser than the bound assumes.

use crate::math::norms;
use crate::{Error, Result};
use sequor_kernels::bridge;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Device, Kind, Tensor};

/// Scores that are held at once: 16 MiB.
const SCORES: i64 = 1 << 22;

/// A table of codes, arranged for the search.
#[derive(Debug)]
pub(crate) struct Search {
    /// `[codes, dim]`, f32.
    codes: Tensor,
    /// `[dim, codes]`.
    across: Tensor,
    /// `-|e|^2 / 2`, `[codes]`.
    offset: Tensor,
    /// The largest `|e|`.
    reach: f64,
}

impl Search {
    /// Over `codes` `[codes, dim]`, f32.
    pub fn new(codes: &Tensor) -> Result<Self> {
        let _no_grad = no_grad_guard();
        let codes = codes.f_detach()?.f_contiguous()?;
        let squares = codes.f_square()?.f_sum_dim_intlist(-1, false, None)?;
        let reach = squares.f_max()?.f_double_value(&[])?.sqrt();
        if !reach.is_finite() {
            return Err(Error::Input(
                "the codebook has entries that are NaN or too large: its training diverged, or \
                 its file is damaged"
                    .into(),
            ));
        }
        Ok(Self {
            across: codes.f_transpose(0, 1)?,
            offset: squares.f_mul_scalar(-0.5)?,
            codes,
            reach,
        })
    }

    /// `[vectors]` i64: the nearest code of each row of `x` `[vectors, dim]`, f32.
    pub fn nearest(&self, x: &Tensor) -> Result<Tensor> {
        self.nearest_by(x, SCORES)
    }

    /// As [`nearest`](Self::nearest), with at most `scores` scores at once (and at least
    /// those of one vector).
    fn nearest_by(&self, x: &Tensor, scores: i64) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let x = x.f_detach()?;
        let (count, codes) = (first(&x), first(&self.codes).max(1));
        let rows = (scores / codes).max(1);
        let mut exact = Exact::new(&self.codes);
        let mut found = Vec::new();
        let mut start = 0;
        while start < count {
            let part = x.f_narrow(0, start, rows.min(count - start))?;
            found.push(self.screen(&part, &mut exact)?);
            start += rows;
        }
        Ok(Tensor::f_cat(&found, 0)?)
    }

    fn screen(&self, x: &Tensor, exact: &mut Exact) -> Result<Tensor> {
        let mut scores = self.offset.f_addmm(x, &self.across)?;
        let (best, index) = scores.f_max_dim(1, true)?;
        let _ = scores.f_scatter_value_(1, &index, f64::NEG_INFINITY)?;
        let second = scores.f_amax([1], true)?;
        // A sum of `dim` products is off by at most `dim u |z||e|` with `u = 2^-24`, the
        // offset by about as much of `|e|^2/2`; both of the two scores may be.
        let dim = self.codes.size().get(1).copied().unwrap_or(0);
        let unit = 2.0 * (dim as f64 + 4.0) * 2f64.powi(-24);
        let slack = norms(x)?
            .f_mul_scalar(unit * self.reach)?
            .f_add_scalar(unit * self.reach * self.reach / 2.0)?;
        let limit = best.f_sub(&slack)?;
        // Written so that an overflow (infinite minus infinite) counts as unclear.
        let unclear = second.f_lt_tensor(&limit)?.f_logical_not()?;
        let unclear = unclear.f_flatten(0, -1)?.f_nonzero()?.f_flatten(0, -1)?;
        let mut index = index.f_flatten(0, -1)?;
        if unclear.numel() > 0 {
            let _ = scores.f_scatter_(1, &index.f_unsqueeze(1)?, &best)?;
            let pick = |t: &Tensor| t.f_index_select(0, &unclear);
            let below = pick(&scores)?.f_lt_tensor(&pick(&limit)?)?;
            let candidates = below.f_logical_not()?.f_nonzero()?;
            let decided = exact.decide(&pick(x)?, &candidates)?;
            let decided = Tensor::f_from_slice(&decided)?.f_to_device(index.device())?;
            let _ = index.f_index_copy_(0, &unclear, &decided)?;
        }
        Ok(index)
    }
}

fn first(t: &Tensor) -> i64 {
    t.size().first().copied().unwrap_or(0)
}

/// The second look, on the host; the table is copied when it is first needed.
struct Exact<'a> {
    codes: &'a Tensor,
    host: Option<Tensor>,
}

impl<'a> Exact<'a> {
    fn new(codes: &'a Tensor) -> Self {
        Self { codes, host: None }
    }

    /// For each row of `x`, the nearest of its candidates `[.., (row, code)]`, which come row
    /// by row and in the order of the codes: the lowest index among equals.
    fn decide(&mut self, x: &Tensor, candidates: &Tensor) -> Result<Vec<i64>> {
        let host = match self.host.take() {
            Some(host) => host,
            None => self.codes.f_to_device(Device::Cpu)?.f_contiguous()?,
        };
        let rows = first(x) as usize;
        let x = bridge::to_vec::<f32>(x)?;
        let pairs = bridge::to_vec::<i64>(candidates)?;
        let dim = (x.len() / rows.max(1)).max(1);
        let mut best = vec![(f64::INFINITY, 0); rows];
        bridge::read(&host, |table: &[f32]| {
            for pair in pairs.chunks(2) {
                let &[row, code] = pair else { continue };
                let place = |i: i64| i as usize * dim..(i as usize + 1) * dim;
                let (vector, code_at) = (x.get(place(row)), table.get(place(code)));
                let (Some(a), Some(b), Some(best)) = (vector, code_at, best.get_mut(row as usize))
                else {
                    continue;
                };
                let distance = distance(a, b);
                if distance < best.0 {
                    *best = (distance, code);
                }
            }
        })?;
        self.host = Some(host);
        if best.iter().any(|(d, _)| !d.is_finite()) {
            return Err(Error::Input(
                "vectors became NaN or infinite before the search: look at the projection in \
                 front of the codebook, or at the scale of z"
                    .into(),
            ));
        }
        Ok(best.into_iter().map(|(_, code)| code).collect())
    }
}

/// `|a - b|^2`, summed in the order of the channels.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| {
            let d = f64::from(a) - f64::from(b);
            d * d
        })
        .sum()
}

/// How many vectors chose each code: `[codes]`, f32.
pub(crate) fn counts(index: &Tensor, codes: i64) -> Result<Tensor> {
    let counts = index.f_bincount(None::<Tensor>, codes)?;
    Ok(counts.f_to_kind(Kind::Float)?)
}

/// The sum of the vectors that chose each code: `[codes, dim]`.
pub(crate) fn sums(x: &Tensor, index: &Tensor, codes: i64) -> Result<Tensor> {
    let dim = x.size().get(1).copied().unwrap_or(0);
    let mut sums = Tensor::f_zeros([codes, dim], (Kind::Float, x.device()))?;
    Ok(sums.f_index_add_(0, index, x)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sequor_kernels::rng::{Key, Purpose};

    /// Normals of a seed, `[rows, dim]`.
    fn normal(seed: u64, rows: i64, dim: i64) -> (Vec<f32>, Tensor) {
        let mut v = vec![0f32; (rows * dim) as usize];
        Key::new(seed, 0)
            .stream(0, Purpose::Test)
            .fill_normal_f32(&mut v);
        let t = Tensor::from_slice(&v).reshape([rows, dim]);
        (v, t)
    }

    fn brute(x: &[f32], table: &[f32], dim: usize) -> Vec<i64> {
        let far = |a: &[f32], b: &[f32]| -> f64 {
            let d = a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b));
            d.map(|d| d * d).sum()
        };
        x.chunks(dim)
            .map(|x| {
                let mut best = 0;
                let codes: Vec<&[f32]> = table.chunks(dim).collect();
                for (j, c) in codes.iter().enumerate() {
                    if far(x, c) < far(x, codes[best]) {
                        best = j;
                    }
                }
                best as i64
            })
            .collect()
    }

    fn indices(t: &Tensor) -> Vec<i64> {
        Vec::try_from(t).unwrap()
    }

    #[test]
    fn equals_the_plain_loop_in_chunks_of_any_size() {
        for (rows, codes, dim) in [(37, 19, 5), (1, 1, 1), (64, 100, 1), (5, 300, 64)] {
            let (x, xt) = normal(1, rows, dim);
            let (e, et) = normal(2, codes, dim);
            let want = brute(&x, &e, dim as usize);
            let search = Search::new(&et).unwrap();
            for scores in [1, 7 * codes, SCORES] {
                assert_eq!(indices(&search.nearest_by(&xt, scores).unwrap()), want);
            }
            // One at a time gives what all at once give.
            for (i, w) in want.iter().enumerate() {
                let one = xt.narrow(0, i as i64, 1);
                assert_eq!(indices(&search.nearest(&one).unwrap()), [*w]);
            }
        }
    }

    #[test]
    fn equal_codes_are_decided_to_the_lowest_index() {
        let (x, xt) = normal(3, 50, 24);
        let (e, _) = normal(4, 33, 24);
        let twice = [&e[..], &e, &e].concat();
        let table = Tensor::from_slice(&twice).reshape([99, 24]);
        let found = indices(&Search::new(&table).unwrap().nearest(&xt).unwrap());
        assert_eq!(found, brute(&x, &e, 24));
        let zeros = Tensor::zeros([40, 24], (Kind::Float, Device::Cpu));
        let found = Search::new(&zeros).unwrap().nearest(&xt).unwrap();
        assert_eq!(indices(&found), [0; 50]);
    }

    #[test]
    fn codes_closer_than_the_rounding_of_the_product_are_told_apart() {
        // Far from the origin `|e|^2` swallows what distinguishes these codes.
        let dim = 16;
        let (mut x, _) = normal(5, 200, dim);
        let (mut e, _) = normal(6, 50, dim);
        x.iter_mut().for_each(|v| *v = 3000.0 + *v * 0.05);
        e.iter_mut().for_each(|v| *v = 3000.0 + *v * 0.05);
        let table = Tensor::from_slice(&e).reshape([50, dim]);
        let search = Search::new(&table).unwrap();
        let found = search
            .nearest(&Tensor::from_slice(&x).reshape([200, dim]))
            .unwrap();
        assert_eq!(indices(&found), brute(&x, &e, dim as usize));
    }

    #[test]
    fn squares_beyond_f32_do_not_mislead() {
        let e = Tensor::from_slice(&[-1e18f32, 1e18, 2e18]).reshape([3, 1]);
        let x = Tensor::from_slice(&[3e30f32, -3e30, 1.4e18]).reshape([3, 1]);
        let found = Search::new(&e).unwrap().nearest(&x).unwrap();
        assert_eq!(indices(&found), [2, 0, 1]);
        let lost = Tensor::from_slice(&[1f32, f32::NAN]).reshape([2, 1]);
        assert!(Search::new(&e).unwrap().nearest(&lost).is_err());
        let nan = Tensor::from_slice(&[f32::NAN, 0.0]).reshape([2, 1]);
        let error = Search::new(&nan).unwrap_err().to_string();
        assert!(error.contains("codebook"), "{error}");
    }

    #[test]
    fn counts_and_sums_are_of_the_assigned() {
        let x = Tensor::from_slice(&[1f32, 2.0, 10.0, 20.0, 5.0, 5.0]).reshape([3, 2]);
        let index = Tensor::from_slice(&[2i64, 0, 2]);
        let c = Vec::<f32>::try_from(counts(&index, 4).unwrap()).unwrap();
        assert_eq!(c, [1.0, 0.0, 2.0, 0.0]);
        let s = sums(&x, &index, 4).unwrap().reshape([-1]);
        let s = Vec::<f32>::try_from(s).unwrap();
        assert_eq!(s, [10.0, 20.0, 0.0, 0.0, 6.0, 7.0, 0.0, 0.0]);
    }
}
