//! Proofs: is a published claim true here?
//!
//! A [`Proof`] names a system, what is measured and what its paper claims. Arms (the
//! system and what it is compared with) run on the same weights, inputs and seeds, and a
//! [`Recorder`] takes one [`Row`] per arm, unit and repeat. At the end
//!
//! 1. the raw values go to `NN.csv`;
//! 2. that file is read again, and every [`Claim`] is judged from it alone;
//! 3. the judgement goes to `NN.json` with everything that is needed to take it again,
//!    and a picture of the arms to `NN.png`.
//!
//! No earlier result is read, and a claim that does not hold is reported as such.
//!
//! # How a claim is judged
//!
//! A *unit* is what the arms have in common: a prompt, a picture, an utterance. Repeats of
//! a unit are averaged first, so that they do not count as independent. The effect is a
//! ratio or a difference of two arms paired by unit, or the level of one arm. Its 95 %
//! interval is a bootstrap over units, its p-value a sign-flip permutation test of the
//! paired differences from the claimed bound (one-sided, exact for few units). Both are
//! seeded: the same file gives the same verdict. The claim *holds* when the interval lies
//! on the claimed side (for strict claims the p-value must be below 0.05 too), *fails*
//! when it lies on the other side, and is *inconclusive* otherwise, and whenever a value
//! is missing or not finite.
//!
//! ```
//! use sequor_eval::proof::{Claim, Metric, Proof, Recorder, Row, Setup, Verdict};
//!
//! let proof = Proof::new(15, "An example", "Somebody 2025")
//!     .metric(Metric::new("tokens_per_call", "tokens", "tokens per forward pass"))
//!     .claim(Claim::ratio("tokens_per_call", "new", "old").above(1.0).text("new beats old").paper("1.3x"));
//! let mut recorder = Recorder::start(proof, Setup::default())?;
//! for prompt in 0..8 {
//!     for (arm, base) in [("old", 1.0), ("new", 1.5)] {
//!         let value = base + 0.01 * f64::from(prompt);
//!         recorder.push(Row::new(arm, format!("prompt {prompt}")).value("tokens_per_call", value))?;
//!     }
//! }
//! # let dir = std::env::temp_dir().join(format!("sequor-proof-{}", std::process::id()));
//! let outcome = recorder.finish(&dir)?;
//! assert_eq!(outcome.result.claims[0].verdict, Verdict::Holds);
//! # std::fs::remove_dir_all(&dir).map_err(|e| sequor_eval::Error::io(&dir, e))?;
//! # Ok::<(), sequor_eval::Error>(())
//! ```

mod judge;
mod plot;
mod record;
mod resample;
mod table;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

pub use judge::{ArmSummary, Judged, Verdict};
pub use record::{Inputs, Load, Machine, Outcome, ProofResult, Recorder, Setup};
pub use table::{Row, Table};

/// What is to be shown, and with which numbers.
#[derive(Clone, Debug)]
pub struct Proof {
    /// Number of the system; names the files.
    pub system: u32,
    /// What it is called.
    pub title: String,
    /// Where the figures of the claims come from.
    pub paper: String,
    /// What is measured; the columns of the table.
    pub metrics: Vec<Metric>,
    /// Columns of words by which a claim may select rows.
    pub labels: Vec<String>,
    /// What is claimed.
    pub claims: Vec<Claim>,
    /// Metrics that are drawn; the first metric when empty.
    pub plots: Vec<String>,
}

/// Something that is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Name of the column.
    pub name: String,
    /// Unit, as in "tokens" or "s"; empty for plain numbers.
    pub unit: String,
    /// What it is, in a few words.
    pub meaning: String,
    /// Whether larger is better.
    pub higher_is_better: bool,
}

impl Metric {
    /// A metric of which more is better.
    pub fn new(name: &str, unit: &str, meaning: &str) -> Self {
        Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            meaning: meaning.to_owned(),
            higher_is_better: true,
        }
    }

    /// Less is better.
    #[must_use]
    pub fn lower_is_better(mut self) -> Self {
        self.higher_is_better = false;
        self
    }
}

/// Rows of a table: those of an arm, or some of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// The arm.
    pub arm: String,
    /// A label and the value that it must have.
    pub only: Option<(String, String)>,
}

impl Side {
    /// Rows of `arm` whose `label` is `value`.
    pub fn only(arm: &str, label: &str, value: &str) -> Self {
        Self {
            arm: arm.to_owned(),
            only: Some((label.to_owned(), value.to_owned())),
        }
    }

    /// Whether a row belongs to this side.
    fn takes(&self, row: &Row) -> bool {
        let labelled = |(label, value): &(String, String)| row.labels.get(label) == Some(value);
        row.arm == self.arm && self.only.as_ref().is_none_or(labelled)
    }
}

impl From<&str> for Side {
    fn from(arm: &str) -> Self {
        Self {
            arm: arm.to_owned(),
            only: None,
        }
    }
}

impl From<String> for Side {
    fn from(arm: String) -> Self {
        Self { arm, only: None }
    }
}

/// How two sides are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Measured over baseline.
    Ratio,
    /// Measured minus baseline.
    Difference,
    /// One side alone.
    Level,
}

/// How units are summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Center {
    /// Means; a ratio is one of means.
    Mean,
    /// Medians, for times; a ratio is the median of the units' ratios.
    Median,
}

/// What is claimed of an effect.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expect {
    /// More than this.
    Above(f64),
    /// Not less than this: non-inferiority when the bound allows for a margin.
    AtLeast(f64),
    /// Less than this.
    Below(f64),
    /// Not more than this.
    AtMost(f64),
    /// Exactly this in every row.
    Always(f64),
}

impl Expect {
    /// The number it speaks of.
    #[must_use]
    pub fn bound(&self) -> f64 {
        match *self {
            Self::Above(x)
            | Self::AtLeast(x)
            | Self::Below(x)
            | Self::AtMost(x)
            | Self::Always(x) => x,
        }
    }
}

/// A claim about one metric.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The claim in words.
    pub text: String,
    /// The figure of the paper, as it is given there.
    pub paper: Option<String>,
    /// The metric.
    pub metric: String,
    /// Whose value it is.
    pub measured: Side,
    /// What it is compared with.
    pub baseline: Option<Side>,
    /// How.
    pub effect: Effect,
    /// How units are summed up.
    pub center: Center,
    /// What the effect should be.
    pub expect: Expect,
}

impl Claim {
    fn new(metric: &str, measured: Side, baseline: Option<Side>, effect: Effect) -> Self {
        let bound = if effect == Effect::Ratio { 1.0 } else { 0.0 };
        Self {
            text: String::new(),
            paper: None,
            metric: metric.to_owned(),
            measured,
            baseline,
            effect,
            center: Center::Mean,
            expect: Expect::Above(bound),
        }
    }

    /// About `measured` over `baseline`; above 1 unless something else is said.
    pub fn ratio(metric: &str, measured: impl Into<Side>, baseline: impl Into<Side>) -> Self {
        Self::new(
            metric,
            measured.into(),
            Some(baseline.into()),
            Effect::Ratio,
        )
    }

    /// About `measured` minus `baseline`; above 0 unless something else is said.
    pub fn difference(metric: &str, measured: impl Into<Side>, baseline: impl Into<Side>) -> Self {
        Self::new(
            metric,
            measured.into(),
            Some(baseline.into()),
            Effect::Difference,
        )
    }

    /// About the value of one arm; above 0 unless something else is said.
    pub fn level(metric: &str, measured: impl Into<Side>) -> Self {
        Self::new(metric, measured.into(), None, Effect::Level)
    }

    /// Sets the words.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Self {
        self.text = text.into();
        self
    }

    /// Sets the figure of the paper.
    #[must_use]
    pub fn paper(mut self, figure: impl Into<String>) -> Self {
        self.paper = Some(figure.into());
        self
    }

    /// Medians instead of means.
    #[must_use]
    pub fn median(mut self) -> Self {
        self.center = Center::Median;
        self
    }

    /// The effect is more than `bound`.
    #[must_use]
    pub fn above(mut self, bound: f64) -> Self {
        self.expect = Expect::Above(bound);
        self
    }

    /// The effect is not less than `bound`.
    #[must_use]
    pub fn at_least(mut self, bound: f64) -> Self {
        self.expect = Expect::AtLeast(bound);
        self
    }

    /// The effect is less than `bound`.
    #[must_use]
    pub fn below(mut self, bound: f64) -> Self {
        self.expect = Expect::Below(bound);
        self
    }

    /// The effect is not more than `bound`.
    #[must_use]
    pub fn at_most(mut self, bound: f64) -> Self {
        self.expect = Expect::AtMost(bound);
        self
    }

    /// Every row has exactly this value.
    #[must_use]
    pub fn always(mut self, value: f64) -> Self {
        self.expect = Expect::Always(value);
        self
    }
}

impl Proof {
    /// A proof without metrics and claims.
    pub fn new(system: u32, title: &str, paper: &str) -> Self {
        Self {
            system,
            title: title.to_owned(),
            paper: paper.to_owned(),
            metrics: Vec::new(),
            labels: Vec::new(),
            claims: Vec::new(),
            plots: Vec::new(),
        }
    }

    /// Adds a metric.
    #[must_use]
    pub fn metric(mut self, metric: Metric) -> Self {
        self.metrics.push(metric);
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: &str) -> Self {
        self.labels.push(name.to_owned());
        self
    }

    /// Adds a claim.
    #[must_use]
    pub fn claim(mut self, claim: Claim) -> Self {
        self.claims.push(claim);
        self
    }

    /// Draws a metric.
    #[must_use]
    pub fn plot(mut self, metric: &str) -> Self {
        self.plots.push(metric.to_owned());
        self
    }

    /// Checks that columns have different names and that claims and plots speak of them.
    ///
    /// # Errors
    /// [`Error::Input`] naming the column or the claim.
    pub fn validate(&self) -> Result<()> {
        if self.metrics.is_empty() {
            return Err(Error::Input(format!(
                "proof {}: nothing is measured",
                self.system
            )));
        }
        let mut names: Vec<&str> = table::FIXED.to_vec();
        let metrics = self.metrics.iter().map(|m| m.name.as_str());
        for name in self.labels.iter().map(String::as_str).chain(metrics) {
            if name.is_empty() || names.contains(&name) {
                return Err(Error::Input(format!(
                    "proof {}: the column '{name}' is there twice or has no name",
                    self.system
                )));
            }
            names.push(name);
        }
        let known = |metric: &str| self.metrics.iter().any(|m| m.name == metric);
        for claim in &self.claims {
            let what = if !known(&claim.metric) {
                format!(
                    "is about the metric '{}', which is not measured",
                    claim.metric
                )
            } else if !claim.expect.bound().is_finite() {
                "compares with a number that is not finite".to_owned()
            } else if claim.baseline.is_some() == (claim.effect == Effect::Level) {
                "needs a baseline for a ratio or difference, and none for a level".to_owned()
            } else if let Some((label, _)) = [Some(&claim.measured), claim.baseline.as_ref()]
                .into_iter()
                .flatten()
                .filter_map(|side| side.only.as_ref())
                .find(|(label, _)| !self.labels.contains(label))
            {
                format!("selects by the label '{label}', which is not a column")
            } else {
                continue;
            };
            return Err(Error::Input(format!("the claim '{}' {what}", claim.text)));
        }
        match self.plots.iter().find(|p| !known(p)) {
            Some(plot) => Err(Error::Input(format!(
                "the metric '{plot}' is drawn, but not measured"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
