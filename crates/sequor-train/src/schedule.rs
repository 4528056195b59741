//! Learning rates over the steps of a run.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Shape {
    /// The peak to the end.
    Constant,
    /// Half a cosine from the peak to `min_ratio` of it (Loshchilov and Hutter, 2017).
    Cosine {
        /// Last rate over peak rate, in `[0, 1]`.
        min_ratio: f64,
    },
    /// Warm-up, stable, decay: the peak, then a straight line to `min_ratio` of it in
    /// the last `decay` steps.
    Wsd {
        /// Length of the decay in steps.
        decay: u64,
        /// Last rate over peak rate, in `[0, 1]`.
        min_ratio: f64,
    },
}

/// A linear warm-up to a peak, then a [`Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Highest learning rate, positive.
    pub peak: f64,
    /// Steps until the peak is reached.
    pub warmup: u64,
    /// Length of the run in steps, warm-up included.
    pub steps: u64,
    /// What follows the warm-up.
    pub shape: Shape,
}

impl Schedule {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let fail = |what: String| Err(Error::Config(what));
        if !(self.peak > 0.0 && self.peak.is_finite()) {
            return fail(format!("learning rate {} must be positive", self.peak));
        }
        if self.warmup > self.steps {
            return fail(format!(
                "a warm-up of {} steps is longer than the run of {}",
                self.warmup, self.steps
            ));
        }
        if let Shape::Wsd { decay, .. } = self.shape
            && decay > self.steps - self.warmup
        {
            return fail(format!(
                "a decay of {decay} steps does not fit between warm-up and end ({} steps)",
                self.steps - self.warmup
            ));
        }
        match self.shape {
            Shape::Cosine { min_ratio } | Shape::Wsd { min_ratio, .. }
                if !(0.0..=1.0).contains(&min_ratio) =>
            {
                fail(format!("min_ratio = {min_ratio} must lie in [0, 1]"))
            }
            _ => Ok(()),
        }
    }

    /// The learning rate of `step`, counted from 0. Past the end it stays at the last one.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        match self.shape {
            Shape::Constant => self.peak,
            Shape::Cosine { min_ratio } => {
                let share = progress(step, self.warmup, self.steps);
                self.peak
                    * (min_ratio
                        + (1.0 - min_ratio) * 0.5 * (1.0 + (std::f64::consts::PI * share).cos()))
            }
            Shape::Wsd { decay, min_ratio } => {
                let share = progress(step, self.steps.saturating_sub(decay), self.steps);
                self.peak * (1.0 - (1.0 - min_ratio) * share)
            }
        }
    }
}

/// How far `step` is on the way from `from` to `to`, in `[0, 1]`.
fn progress(step: u64, from: u64, to: u64) -> f64 {
    let length = to.saturating_sub(from).max(1);
    (step.saturating_sub(from) as f64 / length as f64).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule {
            peak: 2.0,
            warmup: 4,
            steps: 24,
            shape,
        }
    }

    #[test]
    fn rates_follow_their_shapes() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        for shape in [
            Shape::Constant,
            Shape::Cosine { min_ratio: 0.1 },
            Shape::Wsd {
                decay: 10,
                min_ratio: 0.0,
            },
        ] {
            let s = schedule(shape);
            s.validate().unwrap();
            close(s.at(0), 0.5);
            close(s.at(3), 2.0);
            close(s.at(4), 2.0);
        }
        let s = schedule(Shape::Cosine { min_ratio: 0.1 });
        close(s.at(14), 1.1);
        close(s.at(24), 0.2);
        close(s.at(1000), 0.2);
        let s = schedule(Shape::Wsd {
            decay: 10,
            min_ratio: 0.0,
        });
        close(s.at(14), 2.0);
        close(s.at(19), 1.0);
        close(s.at(24), 0.0);
        let one = Schedule {
            peak: 1.0,
            warmup: 0,
            steps: 0,
            shape: Shape::Cosine { min_ratio: 0.5 },
        };
        assert!(one.at(0).is_finite());
    }

    #[test]
    fn contradictions_are_named() {
        let check = |s: Schedule| s.validate().unwrap_err().to_string();
        assert!(
            check(Schedule {
                warmup: 25,
                ..schedule(Shape::Constant)
            })
            .contains("warm-up of 25")
        );
        assert!(
            check(schedule(Shape::Wsd {
                decay: 21,
                min_ratio: 0.0
            }))
            .contains("decay of 21")
        );
        assert!(check(schedule(Shape::Cosine { min_ratio: 2.0 })).contains("min_ratio = 2"));
        assert!(
            check(Schedule {
                peak: f64::INFINITY,
                ..schedule(Shape::Constant)
            })
            .contains("learning rate")
        );
    }
}
