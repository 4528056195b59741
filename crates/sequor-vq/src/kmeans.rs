//! Lloyd's algorithm: first codes from data, clusters of a codebook.

use crate::math::unit;
use crate::rows::Rows;
use crate::search::{Search, counts, sums};
use crate::{Error, Result};
use sequor_kernels::rng::{Key, Purpose, Stream};
use sequor_nn::Tensor;
use sequor_nn::tch::no_grad_guard;

/// What [`kmeans`] gives.
#[derive(Debug)]
pub struct Clusters {
    /// The centres, `[clusters, dim]`, f32.
    pub centres: Tensor,
    /// The nearest centre of each vector, `[vectors]`, i64.
    pub assignment: Tensor,
    /// How many vectors each centre has, `[clusters]`, f32.
    pub sizes: Tensor,
}

/// Groups the vectors `x` `[vectors, dim]`: starts at vectors drawn from `key` (each at most
/// once, as long as there are enough), then moves every centre to the mean of its vectors
/// `iterations` times. A centre without vectors stays. With `on_sphere` the centres are
/// scaled to length 1 (spherical k-means; `x` should have unit rows).
///
/// # Errors
/// [`Error::Input`] when `x` is not `[vectors, dim]`, empty or not finite, or `clusters` is
/// not positive.
pub fn kmeans(
    x: &Tensor,
    clusters: i64,
    iterations: u32,
    on_sphere: bool,
    key: Key,
) -> Result<Clusters> {
    let _no_grad = no_grad_guard();
    let dim = match (x.defined(), clusters >= 1) {
        (true, true) if x.dim() == 2 => x.size().get(1).copied().unwrap_or(0),
        _ => {
            return Err(Error::Input(
                "k-means needs vectors [vectors, dim] and at least one cluster".into(),
            ));
        }
    };
    let x = Rows::new(x, dim)?.flat.f_detach()?;
    let vectors = x.size().first().copied().unwrap_or(0);
    let mut stream = key.stream(0, Purpose::Init);
    let start = draw_rows(&mut stream, vectors, clusters);
    let start = Tensor::f_from_slice(&start)?.f_to_device(x.device())?;
    let mut centres = x.f_index_select(0, &start)?;
    for _ in 0..iterations {
        let index = Search::new(&centres)?.nearest(&x)?;
        let sizes = counts(&index, clusters)?.f_unsqueeze(1)?;
        let mut means = sums(&x, &index, clusters)?.f_div(&sizes.f_clamp_min(1.0)?)?;
        if on_sphere {
            means = unit(&means)?;
        }
        centres = means.f_where_self(&sizes.f_gt(0.0)?, &centres)?;
    }
    let assignment = Search::new(&centres)?.nearest(&x)?;
    let sizes = counts(&assignment, clusters)?;
    Ok(Clusters {
        centres,
        assignment,
        sizes,
    })
}

/// `count` numbers of `0..rows` in random order: all different as long as there are enough.
pub(crate) fn draw_rows(stream: &mut Stream, rows: i64, count: i64) -> Vec<i64> {
    let mut all: Vec<i64> = (0..rows).collect();
    let mut drawn = Vec::new();
    for i in 0..count.max(0) as usize {
        // The first `count` steps of a Fisher-Yates shuffle.
        let left = all.len().saturating_sub(i);
        let other = if left > 0 {
            i + stream.below(left as u64) as usize
        } else {
            stream.below(rows.max(1) as u64) as usize
        };
        if left > 0 {
            all.swap(i, other);
        }
        let at = if left > 0 { i } else { other };
        drawn.push(all.get(at).copied().unwrap_or(0));
    }
    drawn
}
