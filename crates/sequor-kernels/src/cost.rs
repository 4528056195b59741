//! The measured price of a forward pass as a function of its rows, and the depth
//! of speculation that it pays for.
//!
//! Verifying k drafted tokens costs one forward pass over k + 1 rows. Whether that
//! is cheaper than k + 1 passes over one row depends on the kernels and on the
//! machine, so it is measured.

use std::time::Instant;

/// Seconds of a forward pass at a few row counts, with straight lines between.
#[derive(Clone, Debug, PartialEq)]
pub struct CostCurve {
    rows: Vec<usize>,
    seconds: Vec<f64>,
}

impl CostCurve {
    /// The deepest draft that [`CostCurve::best_depth`] considers.
    pub const MAX_DEPTH: usize = 256;

    /// A curve through (rows, seconds). `None` unless there is at least one point,
    /// as many seconds as rows, rows from 1 up in rising order, and seconds
    /// positive and finite.
    #[must_use]
    pub fn new(rows: Vec<usize>, seconds: Vec<f64>) -> Option<Self> {
        let valid = rows.first().is_some_and(|&first| first >= 1)
            && rows.len() == seconds.len()
            && rows.is_sorted_by(|a, b| a < b)
            && seconds.iter().all(|&s| s > 0.0 && s.is_finite());
        valid.then_some(Self { rows, seconds })
    }

    /// The measured row counts, rising.
    #[must_use]
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Seconds at each of [`CostCurve::rows`].
    #[must_use]
    pub fn seconds(&self) -> &[f64] {
        &self.seconds
    }

    /// Seconds of a pass over `rows` rows.
    ///
    /// Between measured points by straight lines. Below the first point its value,
    /// for a pass has a fixed price. Above the last along the last line, or in
    /// proportion to the rows if there is one point only. 0 for 0 rows.
    #[must_use]
    pub fn at(&self, rows: usize) -> f64 {
        if rows == 0 {
            return 0.0;
        }
        let n = self.rows.len();
        let point = |i: usize| (self.rows[i] as f64, self.seconds[i]);
        match self.rows.partition_point(|&r| r < rows) {
            0 => self.seconds[0],
            above if n == 1 => self.seconds[above - 1] * rows as f64 / self.rows[0] as f64,
            above => {
                let right = above.min(n - 1);
                let ((x0, y0), (x1, y1)) = (point(right - 1), point(right));
                let slope = (y1 - y0) / (x1 - x0);
                // Noise may make the last line fall; more rows never cost less.
                let slope = if above == n { slope.max(0.0) } else { slope };
                y1 + slope * (rows as f64 - x1)
            }
        }
    }

    /// Price of a pass over `rows` rows in units of a pass over one.
    #[must_use]
    pub fn relative(&self, rows: usize) -> f64 {
        self.at(rows) / self.at(1)
    }

    /// The draft depth that gives the most tokens per unit of time, and how many
    /// times faster than plain decoding it is; (0, 1.0) if nothing is faster.
    ///
    /// `accept` is the chance that a drafted token is accepted given that those
    /// before it were; `draft_cost` the price of drafting one token in units of a
    /// one-row pass of the target. With g drafted tokens a round yields
    /// `(1 - accept^(g+1)) / (1 - accept)` tokens on average and costs
    /// `g draft_cost + c(g+1) / c(1)`.
    ///
    /// Source: Leviathan, Kalman and Matias, "Fast inference from transformers via
    /// speculative decoding" (2023), with their constant price of the target pass
    /// replaced by the measured curve.
    #[must_use]
    pub fn best_depth(&self, accept: f64, draft_cost: f64, max_depth: usize) -> (usize, f64) {
        // A NaN of either becomes the value that does not pay.
        let accept = if accept > 0.0 { accept.min(1.0) } else { 0.0 };
        let draft_cost = if draft_cost >= 0.0 {
            draft_cost
        } else {
            f64::INFINITY
        };
        let mut best = (0, 1.0);
        let (mut tokens, mut chance) = (1.0, 1.0);
        for depth in 1..=max_depth.min(Self::MAX_DEPTH) {
            chance *= accept;
            tokens += chance;
            let cost = depth as f64 * draft_cost + self.relative(depth + 1);
            let speedup = tokens / cost;
            if speedup > best.1 {
                best = (depth, speedup);
            }
        }
        best
    }
}

/// Measures a curve: `pass(rows)` runs one forward pass over that many rows.
///
/// Each row count is run once unmeasured, so that caches and compiled kernels are
/// warm, then `repeats` times (at least once) in turn with the others, so that a
/// disturbance hits all of them; the medians are kept. Zero and repeated row counts
/// are left out; with none left, one row is measured.
///
/// # Errors
///
/// The first error of `pass`.
pub fn measure<E>(
    rows: &[usize],
    repeats: usize,
    mut pass: impl FnMut(usize) -> Result<(), E>,
) -> Result<CostCurve, E> {
    let mut rows: Vec<usize> = rows.iter().copied().filter(|&r| r > 0).collect();
    rows.sort_unstable();
    rows.dedup();
    if rows.is_empty() {
        rows.push(1);
    }
    for &r in &rows {
        pass(r)?;
    }
    let mut times = vec![Vec::new(); rows.len()];
    for _ in 0..repeats.max(1) {
        for (&r, times) in rows.iter().zip(&mut times) {
            let start = Instant::now();
            pass(r)?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    // A clock that did not move still gives a positive price.
    let seconds = times
        .into_iter()
        .map(|times| median(times).max(1e-9))
        .collect();
    Ok(CostCurve { rows, seconds })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let upper = times.len() / 2;
    let lower = times.len().saturating_sub(1) / 2;
    match (times.get(lower), times.get(upper)) {
        (Some(a), Some(b)) => (a + b) / 2.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn curve(points: &[(usize, f64)]) -> CostCurve {
        let (rows, seconds) = points.iter().copied().unzip();
        CostCurve::new(rows, seconds).unwrap()
    }

    #[test]
    fn lines_between_and_beyond() {
        let c = curve(&[(1, 2.0), (4, 5.0), (8, 7.0)]);
        let expected = [
            (0, 0.0),
            (1, 2.0),
            (2, 3.0),
            (4, 5.0),
            (6, 6.0),
            (8, 7.0),
            (10, 8.0),
        ];
        for (rows, seconds) in expected {
            assert!(
                (c.at(rows) - seconds).abs() < 1e-12,
                "{rows}: {}",
                c.at(rows)
            );
        }
        assert!((c.relative(4) - 2.5).abs() < 1e-12);
        // One point: fixed price below, proportional above.
        let one = curve(&[(2, 3.0)]);
        assert_eq!((one.at(1), one.at(2), one.at(6)), (3.0, 3.0, 9.0));
        // A falling end does not fall for ever.
        assert_eq!(curve(&[(1, 2.0), (2, 1.5)]).at(1000), 1.5);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(CostCurve::new(vec![], vec![]).is_none());
        for (rows, seconds) in [
            (vec![1], vec![]),
            (vec![0], vec![1.0]),
            (vec![2, 1], vec![1.0, 1.0]),
            (vec![1, 1], vec![1.0, 1.0]),
            (vec![1], vec![0.0]),
            (vec![1], vec![f64::NAN]),
            (vec![1], vec![f64::INFINITY]),
        ] {
            assert!(CostCurve::new(rows, seconds).is_none());
        }
    }

    #[test]
    fn measure_takes_medians_in_turn() {
        let mut order = Vec::new();
        let c = measure(&[4, 1, 0, 4], 3, |rows| {
            order.push(rows);
            std::thread::sleep(Duration::from_millis(2 * rows as u64));
            Ok::<(), ()>(())
        })
        .unwrap();
        assert_eq!(order, [1, 4, 1, 4, 1, 4, 1, 4]);
        assert_eq!(c.rows(), [1, 4]);
        assert!(c.seconds()[0] >= 0.002 && c.seconds()[1] >= 0.008);
        assert_eq!(measure(&[], 0, |_| Ok::<(), ()>(())).unwrap().rows(), [1]);
        assert_eq!(measure(&[1, 2], 9, Err::<(), _>), Err(1));
        assert_eq!(median(vec![3.0, 1.0, 2.0, 10.0]), 2.5);
    }

    #[test]
    fn depth_follows_acceptance_and_price() {
        let flat = curve(&[(1, 1.0), (64, 1.0)]);
        let linear = curve(&[(1, 1.0), (64, 64.0)]);
        // Free drafts, free verification: as deep as allowed; certain acceptance
        // yields depth + 1 tokens for the price of one.
        let (depth, speedup) = flat.best_depth(1.0, 0.0, 7);
        assert_eq!(depth, 7);
        assert!((speedup - 8.0).abs() < 1e-12);
        // Where every row costs a full pass, nothing pays.
        assert_eq!(linear.best_depth(0.99, 0.01, 16), (0, 1.0));
        assert_eq!(flat.best_depth(0.0, 0.1, 8), (0, 1.0));
        assert_eq!(flat.best_depth(0.9, 0.0, 0), (0, 1.0));
        // A case by hand: a = 0.8, draft price 0.1, flat verification.
        let gain = |g: i32| (1.0 - 0.8f64.powi(g + 1)) / 0.2 / (0.1 * f64::from(g) + 1.0);
        let by_hand = (1..=20)
            .max_by(|&a, &b| gain(a).total_cmp(&gain(b)))
            .unwrap();
        let (depth, speedup) = flat.best_depth(0.8, 0.1, 20);
        assert_eq!(depth, by_hand as usize);
        assert!((speedup - gain(by_hand)).abs() < 1e-9);
        // Bad numbers mean "does not pay", and a huge depth does not hang.
        assert_eq!(flat.best_depth(f64::NAN, 0.1, 8), (0, 1.0));
        assert_eq!(flat.best_depth(0.8, f64::NAN, 8), (0, 1.0));
        assert_eq!(
            flat.best_depth(1.0, 0.0, usize::MAX).0,
            CostCurve::MAX_DEPTH
        );
    }
}
