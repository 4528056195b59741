//! How many nodes a draft tree gets.
//!
//! A tree of `n` nodes yields `1 + s expected(n)` tokens, where `expected` is the drafter's
//! own estimate of accepted drafts and `s` is how its estimates turned out so far. It costs
//! `c(n+1)/c(1)` plain steps and the price of a proposal. The best `n` gives the most tokens
//! per plain step.

/// Weight of the past in running averages, per round.
const MEMORY: f64 = 0.9;
/// Drafts that count as accepted as expected at the beginning.
const PRIOR: f64 = 2.0;

/// Most nodes of a draft tree whose size is not fixed.
pub(super) const MAX_NODES: usize = 64;
/// Nodes of a draft tree whose size must not depend on measurements.
pub(super) const STEADY_NODES: usize = 24;

/// How the estimates of a drafter of trees turned out.
#[derive(Debug)]
pub(super) struct TreeExperience {
    /// What the last proposal was expected to give, the target's own token not counted.
    expected: Option<f64>,
    sum_expected: f64,
    sum_accepted: f64,
    draft_seconds: f64,
    proposals: f64,
}

impl Default for TreeExperience {
    fn default() -> Self {
        Self {
            expected: None,
            sum_expected: PRIOR,
            sum_accepted: PRIOR,
            draft_seconds: 0.0,
            proposals: 0.0,
        }
    }
}

impl TreeExperience {
    /// The number of nodes, at most `most`, that gives the most tokens per plain step; 0 if
    /// none beats plain decoding. `cost(n)` is the price of a round with `n` nodes.
    pub fn best(
        &self,
        most: usize,
        cost: impl Fn(usize) -> f64,
        expected: &impl Fn(usize) -> f64,
    ) -> usize {
        let scale = self.sum_accepted / self.sum_expected;
        let mut best = (0, 1.0);
        for nodes in 1..=most {
            let rate = (1.0 + scale * expected(nodes)) / cost(nodes);
            if rate > best.1 {
                best = (nodes, rate);
            }
        }
        best.0
    }

    /// Price of a proposal in plain steps of `plain` seconds.
    pub fn cost(&self, plain: Option<f64>) -> f64 {
        match plain {
            Some(plain) if self.proposals > 0.0 => self.draft_seconds / self.proposals / plain,
            _ => 0.0,
        }
    }

    /// A proposal is made that is expected to have `drafts` accepted.
    pub fn expect(&mut self, drafts: f64) {
        self.expected = Some(drafts);
    }

    /// Lets the next proposal, of which `drafts` are expected, weigh as much as all that is
    /// remembered.
    pub fn forget(&mut self, drafts: f64) {
        let drafts = drafts.max(f64::MIN_POSITIVE);
        self.sum_accepted *= drafts / self.sum_expected;
        self.sum_expected = drafts;
    }

    /// What became of a proposal of `nodes` nodes.
    pub fn record(&mut self, nodes: usize, accepted: usize, draft_seconds: f64) {
        let Some(expected) = self.expected.take() else {
            return;
        };
        self.draft_seconds = self.draft_seconds * MEMORY + draft_seconds;
        self.proposals = self.proposals * MEMORY + 1.0;
        if nodes > 0 {
            self.sum_expected = self.sum_expected * MEMORY + expected;
            self.sum_accepted = self.sum_accepted * MEMORY + accepted as f64;
        }
    }
}
