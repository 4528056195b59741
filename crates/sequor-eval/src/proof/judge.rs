//! From a table to verdicts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::resample::{bootstrap, mean, median, sign_flip, signed_ranks, stream};
use super::table::{Row, Table};
use super::{Center, Claim, Effect, Expect, Proof, Side};

/// Fewest units that a claim can be decided on.
const FEWEST: usize = 5;
/// Largest p-value of a strict claim that holds.
const LEVEL: f64 = 0.05;
/// Tests of the arms' intervals are numbered from here, those of claims from 0.
const ARMS: u64 = 1 << 32;

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The values show it.
    Holds,
    /// The values show the opposite.
    Fails,
    /// The values do not decide.
    Inconclusive,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Holds => "holds",
            Self::Fails => "fails",
            Self::Inconclusive => "inconclusive",
        })
    }
}

/// A claim with what was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// The claim in words.
    pub text: String,
    /// The figure of the paper.
    pub paper: Option<String>,
    /// The metric.
    pub metric: String,
    /// Its unit.
    pub unit: String,
    /// Arm that is measured.
    pub arm: String,
    /// Arm that it is compared with.
    pub baseline_arm: Option<String>,
    /// Mean or median of the arm over units.
    pub measured: Option<f64>,
    /// That of the baseline.
    pub baseline: Option<f64>,
    /// How they are compared.
    pub effect: Effect,
    /// How units were summed up.
    pub center: Center,
    /// The effect; for a level the same as `measured`.
    pub value: Option<f64>,
    /// Its 95 % interval.
    pub ci95: Option<[f64; 2]>,
    /// What was expected of the effect.
    pub expect: Expect,
    /// One-sided p-value against the bound.
    pub p_value: Option<f64>,
    /// Units.
    pub n: usize,
    /// What became of it.
    pub verdict: Verdict,
    /// Why it could not be decided.
    pub reason: Option<String>,
}

/// An arm's values of a metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmSummary {
    /// The arm.
    pub arm: String,
    /// The metric.
    pub metric: String,
    /// Mean over units.
    pub mean: f64,
    /// Median over units.
    pub median: f64,
    /// 95 % interval of the mean.
    pub ci95: Option<[f64; 2]>,
    /// Units.
    pub n: usize,
    /// Mean by kind of unit.
    pub by_group: BTreeMap<String, f64>,
}

/// Judges every claim of `proof` by `table`.
pub(super) fn judge(proof: &Proof, table: &Table) -> Vec<Judged> {
    let judged = proof.claims.iter().zip(0..);
    judged
        .map(|(claim, number)| one(proof, claim, table, number))
        .collect()
}

/// Sums up every arm for every metric that it has finite values of.
pub(super) fn summaries(proof: &Proof, table: &Table) -> Vec<ArmSummary> {
    let mut all = Vec::new();
    for metric in &proof.metrics {
        for arm in table.arms() {
            let units = by_unit(table.rows().iter().filter(|r| r.arm == arm), &metric.name);
            let values: Vec<f64> = units.iter().map(|(_, v)| mean(v)).collect();
            if values.is_empty() || values.iter().any(|v| !v.is_finite()) {
                continue;
            }
            let of = |chosen: &[usize]| mean(&pick(&values, chosen));
            let random = stream(proof.system.into(), ARMS + all.len() as u64);
            let mut groups: BTreeMap<String, Vec<f64>> = BTreeMap::new();
            for row in table
                .rows()
                .iter()
                .filter(|r| r.arm == arm && !r.group.is_empty())
            {
                let values = groups.entry(row.group.clone()).or_default();
                values.extend(row.values.get(&metric.name));
            }
            groups.retain(|_, values| !values.is_empty());
            all.push(ArmSummary {
                arm: arm.to_owned(),
                metric: metric.name.clone(),
                mean: mean(&values),
                median: median(&values),
                ci95: bootstrap(values.len(), random, of),
                n: values.len(),
                by_group: groups.iter().map(|(g, v)| (g.clone(), mean(v))).collect(),
            });
        }
    }
    all
}

/// Values by unit, in the order the units came. Rows without the metric are left out.
fn by_unit<'a>(rows: impl Iterator<Item = &'a Row>, metric: &str) -> Vec<(&'a str, Vec<f64>)> {
    let mut units: Vec<(&str, Vec<f64>)> = Vec::new();
    let mut index: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows {
        let Some(&value) = row.values.get(metric) else {
            continue;
        };
        let at = *index.entry(&row.unit).or_insert(units.len());
        match units.get_mut(at) {
            Some((_, values)) => values.push(value),
            None => units.push((&row.unit, vec![value])),
        }
    }
    units
}

fn pick(values: &[f64], chosen: &[usize]) -> Vec<f64> {
    chosen
        .iter()
        .map(|&i| values.get(i).copied().unwrap_or(f64::NAN))
        .collect()
}

/// The rows of a side; its values by unit, all finite.
fn values(table: &Table, side: &Side, claim: &Claim) -> Result<Vec<(String, f64)>, String> {
    let name = match &side.only {
        Some((label, value)) => format!("'{}' with {label} = {value}", side.arm),
        None => format!("'{}'", side.arm),
    };
    let rows: Vec<&Row> = table.rows().iter().filter(|r| side.takes(r)).collect();
    if rows.is_empty() {
        return Err(format!("there are no rows of {name}"));
    }
    if let Some(row) = rows.iter().find(|r| !r.values.contains_key(&claim.metric)) {
        return Err(format!("{name} has no {} on '{}'", claim.metric, row.unit));
    }
    let bad = |row: &&&Row| row.values.get(&claim.metric).is_none_or(|v| !v.is_finite());
    if let Some(row) = rows.iter().find(bad) {
        return Err(format!(
            "{name} has a {} that is not a finite number on '{}'",
            claim.metric, row.unit
        ));
    }
    let units = by_unit(rows.into_iter(), &claim.metric);
    let center = |v: &[f64]| match claim.center {
        Center::Mean => mean(v),
        Center::Median => median(v),
    };
    Ok(units
        .into_iter()
        .map(|(unit, v)| (unit.to_owned(), center(&v)))
        .collect())
}

/// The values of both sides, unit by unit.
fn pairs(table: &Table, claim: &Claim) -> Result<(Vec<f64>, Option<Vec<f64>>), String> {
    let a = values(table, &claim.measured, claim)?;
    let Some(side) = &claim.baseline else {
        return Ok((a.into_iter().map(|(_, v)| v).collect(), None));
    };
    let b: BTreeMap<String, f64> = values(table, side, claim)?.into_iter().collect();
    let alone = a.iter().find(|(unit, _)| !b.contains_key(unit));
    if alone.is_some() || a.len() != b.len() {
        return Err(format!(
            "'{}' and '{}' have not run on the same units",
            claim.measured.arm, side.arm
        ));
    }
    let both = a
        .iter()
        .map(|(unit, v)| (*v, b.get(unit).copied().unwrap_or(f64::NAN)));
    let (a, b) = both.unzip();
    Ok((a, Some(b)))
}

fn one(proof: &Proof, claim: &Claim, table: &Table, number: u64) -> Judged {
    let metric = proof.metrics.iter().find(|m| m.name == claim.metric);
    let mut judged = Judged {
        text: claim.text.clone(),
        paper: claim.paper.clone(),
        metric: claim.metric.clone(),
        unit: metric.map(|m| m.unit.clone()).unwrap_or_default(),
        arm: claim.measured.arm.clone(),
        baseline_arm: claim.baseline.as_ref().map(|b| b.arm.clone()),
        measured: None,
        baseline: None,
        effect: claim.effect,
        center: claim.center,
        value: None,
        ci95: None,
        expect: claim.expect,
        p_value: None,
        n: 0,
        verdict: Verdict::Inconclusive,
        reason: None,
    };
    let (a, b) = match pairs(table, claim) {
        Ok(pairs) => pairs,
        Err(reason) => {
            judged.reason = Some(reason);
            return judged;
        }
    };
    let center = |v: &[f64]| match claim.center {
        Center::Mean => mean(v),
        Center::Median => median(v),
    };
    let zip = |f: fn(f64, f64) -> f64, a: &[f64], b: &[f64]| -> Vec<f64> {
        a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()
    };
    let effect = |chosen: &[usize]| {
        let a = pick(&a, chosen);
        match (&b, claim.effect, claim.center) {
            (Some(b), Effect::Ratio, Center::Mean) => mean(&a) / mean(&pick(b, chosen)),
            (Some(b), Effect::Ratio, Center::Median) => {
                median(&zip(|a, b| a / b, &a, &pick(b, chosen)))
            }
            (Some(b), _, _) => center(&zip(|a, b| a - b, &a, &pick(b, chosen))),
            (None, _, _) => center(&a),
        }
    };
    judged.n = a.len();
    judged.measured = Some(center(&a));
    judged.baseline = b.as_deref().map(center);
    let all: Vec<usize> = (0..a.len()).collect();
    judged.value = Some(effect(&all)).filter(|v| v.is_finite());
    if judged.value.is_none() {
        judged.reason = Some("the baseline is zero".to_owned());
        return judged;
    }
    if let Expect::Always(value) = claim.expect {
        // Not of averages: of every row.
        let each = table.rows().iter().filter(|r| claim.measured.takes(r));
        let each = each.filter_map(|r| r.values.get(&claim.metric));
        let same = claim.effect == Effect::Level && each.into_iter().all(|v| *v == value);
        judged.verdict = if same { Verdict::Holds } else { Verdict::Fails };
        return judged;
    }
    judged.ci95 = bootstrap(a.len(), stream(proof.system.into(), 2 * number), effect);
    let Some([low, high]) = judged.ci95 else {
        judged.reason = Some("the baseline is zero for some units".to_owned());
        return judged;
    };
    // Differences from what the bound would give, positive where the claim is true.
    let bound = claim.expect.bound();
    let upwards = matches!(claim.expect, Expect::Above(_) | Expect::AtLeast(_));
    let mut deltas: Vec<f64> = match (&b, claim.effect) {
        (Some(b), Effect::Ratio) => a.iter().zip(b).map(|(a, b)| a - bound * b).collect(),
        (Some(b), _) => a.iter().zip(b).map(|(a, b)| a - b - bound).collect(),
        (None, _) => a.iter().map(|a| a - bound).collect(),
    };
    if !upwards {
        deltas.iter_mut().for_each(|d| *d = -*d);
    }
    if claim.center == Center::Median {
        deltas = signed_ranks(&deltas);
    }
    let p = sign_flip(&deltas, stream(proof.system.into(), 2 * number + 1));
    judged.p_value = Some(p);
    if a.len() < FEWEST {
        judged.reason = Some(format!(
            "{} units are too few: at least {FEWEST} are needed",
            a.len()
        ));
        return judged;
    }
    let (holds, fails) = match claim.expect {
        Expect::Above(x) => (low > x && p < LEVEL, high <= x),
        Expect::AtLeast(x) => (low >= x, high < x),
        Expect::Below(x) => (high < x && p < LEVEL, low >= x),
        Expect::AtMost(x) => (high <= x, low > x),
        Expect::Always(_) => (false, false),
    };
    judged.verdict = match (holds, fails) {
        (true, _) => Verdict::Holds,
        (_, true) => Verdict::Fails,
        _ => {
            judged.reason = Some("the interval contains the bound".to_owned());
            Verdict::Inconclusive
        }
    };
    if judged.verdict == Verdict::Inconclusive && (low > bound) == upwards && low != bound {
        judged.reason = Some(format!("p = {p:.3} is not below {LEVEL}"));
    }
    judged
}
