//! Small exact targets.

use std::cell::RefCell;
use std::sync::Arc;

use sequor_kernels::cost::CostCurve;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::Tensor;

use crate::draft::{Budget, DraftContext, Drafter, Expander, Feedback, Topology};
use crate::state::SequenceState;
use crate::target::{Layout, LogitRows, Logits, Output, Step, TargetModel};
use crate::tree::{DraftTree, Draw, Proposal, path_to};
use crate::{Categorical, Error, Law, Result};

/// Laws over a small vocabulary given the last `order` tokens, at random but fixed by
/// `seed`; `peak` is the standard deviation of the logits.
#[derive(Clone, Debug)]
pub struct Markov {
    pub vocab: usize,
    pub order: usize,
    pub peak: f32,
    pub seed: u64,
    pub context: usize,
    pub curve: Option<CostCurve>,
    /// A token after which every logit is NaN.
    pub poison: Option<u32>,
    /// Steps of every forward pass so far: (slot, rows).
    pub calls: RefCell<Vec<(usize, usize)>>,
}

impl Markov {
    pub fn new(vocab: usize, order: usize, peak: f32, seed: u64) -> Self {
        let calls = RefCell::default();
        Self {
            vocab,
            order,
            peak,
            seed,
            context: 1 << 20,
            curve: None,
            poison: None,
            calls,
        }
    }

    /// Logits after `history`.
    pub fn logits(&self, history: &[u32]) -> Vec<f32> {
        if self.poison.is_some() && history.last() == self.poison.as_ref() {
            return vec![f32::NAN; self.vocab];
        }
        let recent = &history[history.len().saturating_sub(self.order)..];
        let prefix = recent.iter().fold(1_u64, |code, &t| {
            code * (self.vocab as u64 + 1) + u64::from(t)
        });
        let mut stream = Key::new(self.seed, prefix).stream(0, Purpose::Test);
        (0..self.vocab)
            .map(|_| self.peak * stream.normal() as f32)
            .collect()
    }

    pub fn law(&self, history: &[u32]) -> Categorical {
        Categorical::from_scores(self.logits(history)).unwrap()
    }
}

/// Committed tokens, and tokens and parents of the rows that wait.
type ToySlot = (Vec<u32>, Vec<(u32, Option<usize>)>);

/// The slots of a toy.
#[derive(Debug)]
pub struct ToyState {
    slots: Vec<ToySlot>,
}

impl ToyState {
    pub fn committed(&self, slot: usize) -> &[u32] {
        &self.slots[slot].0
    }
}

impl SequenceState for ToyState {
    fn slots(&self) -> usize {
        self.slots.len()
    }
    fn committed_len(&self, slot: usize) -> usize {
        self.slots[slot].0.len()
    }
    fn pending_len(&self, slot: usize) -> usize {
        self.slots[slot].1.len()
    }
    fn commit(&mut self, slot: usize, path: &[usize]) -> Result<()> {
        let (committed, pending) = &mut self.slots[slot];
        let mut parent = None;
        for &row in path {
            let (token, above) = pending[row];
            assert_eq!(above, parent, "{path:?} is not a path");
            committed.push(token);
            parent = Some(row);
        }
        pending.clear();
        Ok(())
    }
    fn discard(&mut self, slot: usize) -> Result<()> {
        self.slots[slot].1.clear();
        Ok(())
    }
    fn truncate(&mut self, slot: usize, len: usize) -> Result<()> {
        assert!(len <= self.slots[slot].0.len());
        self.slots[slot].0.truncate(len);
        Ok(())
    }
    fn reset(&mut self, slot: usize) -> Result<()> {
        self.slots[slot] = Default::default();
        Ok(())
    }
}

impl TargetModel for Markov {
    type State = ToyState;

    fn vocab_size(&self) -> usize {
        self.vocab
    }
    fn context_len(&self) -> usize {
        self.context
    }
    fn new_state(&self, slots: usize) -> Result<ToyState> {
        Ok(ToyState {
            slots: vec![Default::default(); slots],
        })
    }
    fn cost_curve(&self) -> Option<CostCurve> {
        self.curve.clone()
    }

    fn forward(&self, steps: &[Step<'_>], state: &mut ToyState) -> Result<Vec<Output>> {
        let run = |step: &Step<'_>| {
            self.calls.borrow_mut().push((step.slot, step.tokens.len()));
            let (committed, pending) = &mut state.slots[step.slot];
            assert!(pending.is_empty(), "rows are still pending");
            assert!(
                committed.len() + step.tokens.len() <= self.context,
                "beyond the context"
            );
            if let Some(bad) = step.tokens.iter().find(|&&t| t as usize >= self.vocab) {
                return Err(Error::Backend(format!(
                    "token {bad} is outside the vocabulary"
                )));
            }
            let parents: Vec<Option<usize>> = match step.layout {
                Layout::Chain => (0..step.tokens.len()).map(|i| i.checked_sub(1)).collect(),
                Layout::Tree(parents) => parents.to_vec(),
            };
            *pending = step
                .tokens
                .iter()
                .copied()
                .zip(parents.iter().copied())
                .collect();
            let wanted = match step.logits {
                LogitRows::None => 0..0,
                LogitRows::Last => step.tokens.len() - 1..step.tokens.len(),
                LogitRows::All => 0..step.tokens.len(),
            };
            let row = |node: usize| {
                let path = path_to(&parents, node).into_iter().map(|n| step.tokens[n]);
                self.logits(&committed.iter().copied().chain(path).collect::<Vec<_>>())
            };
            let logits = Logits::new(wanted.flat_map(row).collect(), self.vocab)?;
            let features = step.features.then(|| {
                let tokens: Vec<i64> = step.tokens.iter().map(|&t| i64::from(t)).collect();
                Tensor::f_from_slice(&tokens)
                    .unwrap()
                    .f_unsqueeze(1)
                    .unwrap()
            });
            Ok(Output { logits, features })
        };
        steps.iter().map(run).collect()
    }
}

/// Proposes trees whose nodes are ranks of another law: deterministic.
pub struct RankTree {
    pub guess: Markov,
    pub width: usize,
}

impl Drafter for RankTree {
    fn name(&self) -> &str {
        "rank-tree"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        grow(ctx, budget, |history, children| {
            let mut ranked: Vec<(u32, f64)> = self.guess.law(history).iter().collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            children.extend(
                ranked
                    .iter()
                    .take(self.width)
                    .map(|&(t, _)| (t, Proposal::OneHot)),
            );
        })
    }
    fn reset(&mut self) {}
}

/// Grows trees of any topology from another law: deterministic.
pub struct Grown {
    pub guess: Markov,
    pub topology: Topology,
}

/// Ranks what a law says after a sequence and a path.
struct Ranks<'a>(&'a Markov, &'a [u32]);

impl Expander for Ranks<'_> {
    fn expand(
        &mut self,
        tree: &DraftTree,
        frontier: &[Option<usize>],
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let list = |node: &Option<usize>| {
            let path = node.map_or(Vec::new(), |n| path_to(tree.parents(), n));
            let drafted = path.into_iter().map(|n| tree.units()[n]);
            let history: Vec<u32> = self.1.iter().copied().chain(drafted).collect();
            let law = self.0.law(&history);
            let mut ranked: Vec<(u32, f32)> = law.iter().map(|(t, p)| (t, p.ln() as f32)).collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            ranked.truncate(k);
            ranked
        };
        Ok(frontier.iter().map(list).collect())
    }
    fn max_depth(&self) -> usize {
        usize::MAX
    }
}

impl Drafter for Grown {
    fn name(&self) -> &str {
        "grown"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        crate::grow(&mut Ranks(&self.guess, ctx.tokens), &self.topology, budget)
    }
    fn reset(&mut self) {}
    fn chances(&mut self, _ctx: &DraftContext<'_>) -> Option<Vec<f64>> {
        match &self.topology {
            Topology::Static(shape) => Some(shape.chances().to_vec()),
            _ => None,
        }
    }
}

/// Proposes trees whose nodes are drawn from another law.
pub struct DrawnTree {
    pub guess: Markov,
    pub width: usize,
    pub draw: Draw,
    /// Heard outcomes: (drafted, accepted, added).
    pub heard: Vec<(usize, usize, usize)>,
}

impl Drafter for DrawnTree {
    fn name(&self) -> &str {
        "drawn-tree"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let (width, draw) = (self.width, self.draw);
        let tree = grow(ctx, budget, |history, children| {
            let q = Arc::new(self.guess.law(history));
            let mut stream = ctx.key.stream(history.len() as u64, Purpose::Draft);
            let drawn = draw_children(&q, width, draw, &mut stream);
            children.extend(
                drawn
                    .into_iter()
                    .map(|t| (t, Proposal::Law(Arc::clone(&q)))),
            );
        })?;
        Ok(tree.drawn(draw))
    }
    fn observe(&mut self, feedback: &Feedback<'_>) {
        self.heard.push((
            feedback.tree.len(),
            feedback.path.len(),
            feedback.added.len(),
        ));
    }
    fn reset(&mut self) {}
    fn is_random(&self) -> bool {
        true
    }
}

pub fn draw_children(
    q: &Categorical,
    width: usize,
    draw: Draw,
    stream: &mut crate::Stream,
) -> Vec<u32> {
    let mut left = Some(q.clone());
    let mut drawn = Vec::new();
    for _ in 0..width {
        let Some(law) = left.clone() else { break };
        let token = law.sample(stream);
        drawn.push(token);
        if draw == Draw::WithoutReplacement {
            left = law.without(token);
        }
    }
    drawn
}

/// Grows a tree breadth first. Only the first child of a node is expanded further, so
/// that the keyed draft streams of one position are used once.
fn grow(
    ctx: &DraftContext<'_>,
    budget: Budget,
    mut expand: impl FnMut(&[u32], &mut Vec<(u32, Proposal)>),
) -> Result<DraftTree> {
    let mut tree = DraftTree::new();
    let mut history = ctx.tokens.to_vec();
    let mut parent = None;
    for _ in 0..budget.depth {
        let mut children = Vec::new();
        expand(&history, &mut children);
        let mut first = None;
        for (token, proposal) in children {
            let node = tree.push(parent, token, proposal)?;
            first.get_or_insert((node, token));
        }
        let Some((node, token)) = first else { break };
        history.push(token);
        parent = Some(node);
    }
    Ok(tree)
}
