//! Top-p with the ties of `transformers`.
//!
//! The kept set is the smallest one with the mass asked for. Where several tokens with
//! one and the same score compete for its last places, all choices give the same
//! distribution up to names; `transformers` keeps those that PyTorch's sort happens to
//! put last, and that sort is not stable. So that masks agree too, libtorch is asked for
//! its order in exactly this case.

use sequor_kernels::select::Nucleus;
use sequor_nn::Tensor;

use crate::Result;

/// Removes what is outside the best tokens that hold `mass` of the probability.
pub(super) fn keep(scores: &mut [f32], mass: f64) -> Result<()> {
    let Some(Nucleus::UpTo { score: last, index }) = Nucleus::of(scores, mass, 1) else {
        return Ok(());
    };
    let cut = scores.len().min(index.saturating_add(1));
    let (early, late) = scores.split_at_mut(cut);
    let below = |scores: &mut [f32]| {
        for score in scores {
            *score = if *score < last {
                f32::NEG_INFINITY
            } else {
                *score
            };
        }
    };
    if !late.contains(&last) {
        below(early);
        below(late);
        return Ok(());
    }
    // Ascending, so that the places go to the last of the equals.
    let places = early.iter().filter(|&&s| s == last).count();
    let order = ascending(scores)?;
    let equal: Vec<usize> = order
        .into_iter()
        .rev()
        .filter(|&i| scores.get(i) == Some(&last))
        .collect();
    below(scores);
    for i in equal.into_iter().skip(places) {
        if let Some(score) = scores.get_mut(i) {
            *score = f32::NEG_INFINITY;
        }
    }
    Ok(())
}

fn ascending(scores: &[f32]) -> Result<Vec<usize>> {
    let sort = || -> Result<Vec<i64>, sequor_nn::tch::TchError> {
        let (_, order) = Tensor::f_from_slice(scores)?.f_sort(-1, false)?;
        Vec::<i64>::try_from(order)
    };
    Ok(sort()
        .map_err(sequor_nn::Error::from)?
        .into_iter()
        .map(|i| i as usize)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GONE: f32 = f32::NEG_INFINITY;

    #[test]
    fn ties_keep_the_number_that_the_mass_needs() {
        // One token of e^2 and nine of 1: 0.451 and 0.061 each.
        let mut row = vec![0.0; 10];
        row[4] = 2.0;
        for (mass, kept) in [(0.3, 1), (0.5, 2), (0.7, 6), (0.99, 10)] {
            let mut scores = row.clone();
            keep(&mut scores, mass).unwrap();
            assert_eq!(scores.iter().filter(|s| **s > GONE).count(), kept, "{mass}");
            assert_eq!(scores[4], 2.0);
            let mut again = row.clone();
            keep(&mut again, mass).unwrap();
            assert_eq!(again, scores, "the same every time");
        }
    }

    #[test]
    fn removed_tokens_are_not_ties() {
        let mut scores = [1.0, GONE, 1.5, GONE];
        keep(&mut scores, 0.5).unwrap();
        assert_eq!(scores, [GONE, GONE, 1.5, GONE]);
        let mut bad = [f32::NAN, 1.0];
        keep(&mut bad, 0.5).unwrap();
        assert!(bad[0].is_nan());
    }
}
