//! How deep to draft.
//!
//! A round with `g` drafts yields `(1 - a^(g+1)) / (1 - a)` tokens at acceptance `a` and
//! costs `g d + c(g+1)/c(1)` plain steps, `d` being the price of a drafted token and `c`
//! the price of a forward pass by rows ([`CostCurve::best_depth`]). `a` is a running
//! average with a prior; `c` is what the target measured, or what its passes took so far.
//!
//! [`DepthPolicy::Auto`] keeps a balance of tokens gained minus plain steps spent. It does
//! not draft where the prediction says that it does not pay, except for a probe of depth 1
//! now and then, and whatever the prediction it drafts no deeper than what it can afford to
//! lose. The loss against plain decoding is thereby bounded by two per cent of the
//! generation plus one step, or three for drafters that state their chances.
//!
//! For trees the number of nodes is chosen instead (`nodes.rs`), under the same limits.
//!
//! Measured times may choose the depth because for exact acceptance of drafts without
//! randomness (and for greedy targets) the depth does not change the output. Where it
//! would, the depth is fixed.

use std::collections::BTreeMap;

use sequor_kernels::cost::CostCurve;
use serde::{Deserialize, Serialize};

use super::nodes::{self, TreeExperience};
use crate::{Error, Result};

/// Part of a generation that [`DepthPolicy::Auto`] may lose to drafts that do not pay.
const LOSS_SHARE: f64 = 0.02;
/// Plain steps that it may be behind at any time on top of that.
const CREDIT: f64 = 1.0;
/// The same for drafters that state their chances, which rests on measurements.
const TREE_CREDIT: f64 = 3.0;
/// Steps between two probes while drafting is off.
const PROBE_INTERVAL: usize = 24;
/// Weight of the past in running averages, per round.
const MEMORY: f64 = 0.9;
/// Acceptance assumed at the beginning, and the number of drafts that it counts for.
const PRIOR: (f64, f64) = (0.5, 2.0);

/// How many tokens to draft per round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DepthPolicy {
    /// Always this many.
    Fixed(usize),
    /// As many as pay best, at least 1.
    Adaptive {
        /// At most this many.
        max: usize,
    },
    /// As many as pay best; none while drafting does not pay at all.
    Auto {
        /// At most this many.
        max: usize,
    },
}

impl Default for DepthPolicy {
    fn default() -> Self {
        Self::Auto { max: 8 }
    }
}

impl DepthPolicy {
    /// The deepest draft that the policy allows.
    #[must_use]
    pub fn max(&self) -> usize {
        match *self {
            Self::Fixed(max) | Self::Adaptive { max } | Self::Auto { max } => max,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.max() > CostCurve::MAX_DEPTH {
            return Err(Error::input(
                "depth",
                self.max(),
                format!("at most {}", CostCurve::MAX_DEPTH),
            ));
        }
        Ok(())
    }
}

/// What one step after the prompt took and gave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// Whether a proposal was asked for.
    pub asked: bool,
    /// Rows of the forward pass.
    pub rows: usize,
    /// Drafted nodes.
    pub nodes: usize,
    /// Length of the longest drafted path.
    pub depth: usize,
    /// Accepted drafts.
    pub accepted: usize,
    /// Whether a draft was rejected after them.
    pub rejected: bool,
    /// Tokens added.
    pub emitted: usize,
    pub draft_seconds: f64,
    pub verify_seconds: f64,
}

#[derive(Debug)]
pub(super) struct DepthController {
    policy: DepthPolicy,
    known: Option<CostCurve>,
    /// Rows to (weight, mean seconds) of the passes so far.
    seen: BTreeMap<usize, (f64, f64)>,
    accepted: f64,
    tested: f64,
    draft_seconds: f64,
    draft_tokens: f64,
    balance: f64,
    emitted: f64,
    since_draft: usize,
    /// Whether the output is the same at any depth.
    repeatable: bool,
    tree: TreeExperience,
}

impl DepthController {
    /// `repeatable` says whether the output is the same at any depth.
    pub fn new(policy: DepthPolicy, known: Option<CostCurve>, repeatable: bool) -> Self {
        let policy = if repeatable {
            policy
        } else {
            DepthPolicy::Fixed(policy.max())
        };
        Self {
            policy,
            known,
            seen: BTreeMap::new(),
            accepted: PRIOR.0 * PRIOR.1,
            tested: PRIOR.1,
            draft_seconds: 0.0,
            draft_tokens: 0.0,
            balance: 0.0,
            emitted: 0.0,
            since_draft: 0,
            repeatable,
            tree: TreeExperience::default(),
        }
    }

    /// The deepest draft allowed.
    pub fn max(&self) -> usize {
        self.policy.max()
    }

    /// The depth of the next draft, at most `cap`.
    pub fn choose(&mut self, cap: usize) -> usize {
        let cap = cap.min(self.policy.max());
        match self.policy {
            DepthPolicy::Fixed(_) => cap,
            DepthPolicy::Adaptive { .. } => self.best(cap).max(1).min(cap),
            DepthPolicy::Auto { .. } => self.choose_auto(cap),
        }
    }

    fn choose_auto(&mut self, cap: usize) -> usize {
        // Without a known curve, a plain step comes first: what drafts cost is relative to it.
        if self.known.is_none() && !self.seen.contains_key(&1) {
            return 0;
        }
        let allowed = LOSS_SHARE * self.emitted;
        let affordable = |depth: usize, may_owe: f64| self.balance - self.risk(depth) >= -may_owe;
        let best = self.best(cap);
        if let Some(depth) = (1..=best).rev().find(|&d| affordable(d, allowed + CREDIT)) {
            self.since_draft = 0;
            return depth;
        }
        // The price of a second row is learned once, on credit.
        let unknown = self.known.is_none() && self.seen.len() == 1;
        let due = unknown || self.since_draft >= PROBE_INTERVAL;
        let may_owe = if unknown { CREDIT } else { allowed };
        if cap > 0 && due && affordable(1, may_owe) {
            self.since_draft = 0;
            // Let the probe weigh as much as all that is remembered.
            self.accepted /= self.tested;
            self.tested = 1.0;
            return 1;
        }
        self.since_draft += 1;
        0
    }

    /// Depth and nodes of the next draft tree, paths at most `cap` long and at most `room`
    /// nodes. `chances` are those of [`Drafter::chances`](crate::Drafter::chances).
    pub fn choose_tree(&mut self, cap: usize, room: usize, chances: &[f64]) -> (usize, usize) {
        let depth = cap.min(self.policy.max());
        let most = room.min(nodes::MAX_NODES);
        let mut expected = vec![0.0];
        expected.extend(chances.iter().take(most).scan(0.0, |sum, chance| {
            *sum += chance;
            Some(*sum)
        }));
        // More nodes than the drafter has an opinion of bring nothing.
        let expected = |nodes: usize| expected.get(nodes).or(expected.last()).copied();
        let expected = |nodes: usize| expected(nodes).unwrap_or(0.0);
        let nodes = match self.policy {
            _ if depth == 0 => 0,
            _ if !self.repeatable => most.min(nodes::STEADY_NODES),
            DepthPolicy::Fixed(_) | DepthPolicy::Adaptive { .. } => {
                self.best_tree(most, &expected).max(1).min(most)
            }
            DepthPolicy::Auto { .. } => self.choose_tree_auto(most, &expected),
        };
        if nodes == 0 {
            return (0, 0);
        }
        self.tree.expect(expected(nodes));
        (depth, nodes)
    }

    fn choose_tree_auto(&mut self, most: usize, expected: &impl Fn(usize) -> f64) -> usize {
        if self.known.is_none() && !self.seen.contains_key(&1) {
            return 0;
        }
        let allowed = LOSS_SHARE * self.emitted;
        let affordable =
            |nodes: usize, may_owe: f64| self.balance - (self.tree_cost(nodes) - 1.0) >= -may_owe;
        let best = self.best_tree(most, expected);
        if let Some(nodes) = (1..=best)
            .rev()
            .find(|&n| affordable(n, allowed + TREE_CREDIT))
        {
            self.since_draft = 0;
            return nodes;
        }
        let unknown = self.known.is_none() && self.seen.len() == 1;
        let due = unknown || self.since_draft >= PROBE_INTERVAL;
        let may_owe = if unknown { CREDIT } else { allowed };
        if most > 0 && due && affordable(1, may_owe) {
            self.since_draft = 0;
            self.tree.forget(expected(1));
            return 1;
        }
        self.since_draft += 1;
        0
    }

    fn best_tree(&self, most: usize, expected: &impl Fn(usize) -> f64) -> usize {
        if self.curve().is_none() || (self.known.is_none() && self.seen.len() < 2) {
            return most.min(1);
        }
        self.tree
            .best(most, |nodes| self.tree_cost(nodes), expected)
    }

    /// Price of a round with a tree of `nodes` nodes in plain steps.
    fn tree_cost(&self, nodes: usize) -> f64 {
        self.relative(nodes + 1) + self.tree.cost(self.plain_seconds())
    }

    /// Time of a pass over one row: known, else measured; `None` if there was none.
    pub fn plain_step_seconds(&self) -> Option<f64> {
        let measured = || self.seen.get(&1).map(|&(_, mean)| mean);
        self.known
            .as_ref()
            .map(|curve| curve.at(1))
            .or_else(measured)
    }

    /// Plain steps lost by a round of `depth` drafts if none is accepted.
    fn risk(&self, depth: usize) -> f64 {
        self.relative(depth + 1) - 1.0 + depth as f64 * self.draft_cost()
    }

    fn best(&self, cap: usize) -> usize {
        let Some(curve) = self.curve() else {
            return cap.min(1);
        };
        // One point says nothing about the price of more rows: try two.
        if self.known.is_none() && self.seen.len() < 2 {
            return cap.min(1);
        }
        curve
            .best_depth(self.accepted / self.tested, self.draft_cost(), cap)
            .0
    }

    /// Price of drafting a token in plain steps.
    fn draft_cost(&self) -> f64 {
        match self.plain_seconds() {
            Some(plain) if self.draft_tokens > 0.0 => {
                self.draft_seconds / self.draft_tokens / plain
            }
            _ => 0.0,
        }
    }

    fn plain_seconds(&self) -> Option<f64> {
        self.curve().map(|c| c.at(1))
    }

    fn relative(&self, rows: usize) -> f64 {
        self.curve().map_or(1.0, |c| c.relative(rows))
    }

    fn curve(&self) -> Option<CostCurve> {
        self.known.clone().or_else(|| {
            let (rows, seconds) = self
                .seen
                .iter()
                .map(|(&rows, &(_, mean))| (rows, mean.max(1e-9)))
                .unzip();
            CostCurve::new(rows, seconds)
        })
    }

    pub fn record(&mut self, round: Round) {
        let (weight, mean) = self.seen.entry(round.rows).or_insert((0.0, 0.0));
        *weight = *weight * MEMORY + 1.0;
        *mean += (round.verify_seconds - *mean) / *weight;
        self.emitted += round.emitted as f64;
        if !round.asked {
            return;
        }
        self.tree
            .record(round.nodes, round.accepted, round.draft_seconds);
        self.draft_seconds = self.draft_seconds * MEMORY + round.draft_seconds;
        self.draft_tokens = self.draft_tokens * MEMORY + round.depth as f64;
        if round.depth > 0 {
            self.accepted = self.accepted * MEMORY + round.accepted as f64;
            self.tested =
                self.tested * MEMORY + (round.accepted + usize::from(round.rejected)) as f64;
        }
        let draft = self
            .plain_seconds()
            .map_or(0.0, |plain| round.draft_seconds / plain);
        self.balance += round.emitted as f64 - self.relative(round.rows) - draft;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_curve_it_learns_from_its_own_passes() {
        // Times are made up, so that a busy machine cannot decide the test: every row costs
        // as much as the first, and nothing that is drafted is ever right.
        let mut control = DepthController::new(DepthPolicy::Auto { max: 8 }, None, true);
        let mut drafted = 0;
        for _ in 0..300 {
            let depth = control.choose(8);
            drafted += depth;
            control.record(Round {
                asked: depth > 0,
                rows: depth + 1,
                nodes: depth,
                depth,
                accepted: 0,
                rejected: depth > 0,
                emitted: 1,
                draft_seconds: 0.0,
                verify_seconds: 1e-3 * (depth + 1) as f64,
            });
        }
        assert!(drafted < 20, "{drafted} tokens drafted for nothing");
    }
}
