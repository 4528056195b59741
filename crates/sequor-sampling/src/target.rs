//! The model that is sampled from, seen through the narrowest interface that
//! generation needs.

use ndarray::{Array2, ArrayView2};
use sequor_kernels::cost::CostCurve;
use sequor_nn::Tensor;

use crate::state::SequenceState;
use crate::{Error, Result};

/// Work for one slot in one forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The slot of the state that the rows belong to.
    pub slot: usize,
    /// Tokens to evaluate; they follow the committed rows of the slot.
    pub tokens: &'a [u32],
    /// How the tokens hang together.
    pub layout: Layout<'a>,
    /// Which rows of logits are wanted.
    pub logits: LogitRows,
    /// Whether hidden features of every row are wanted.
    pub features: bool,
}

/// How the tokens of a [`Step`] hang together.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// Each token follows the one before it.
    Chain,
    /// `parents[i]` is the index, within this step, of the token that token `i`
    /// follows; `None` stands for the last committed row. Parents come before their
    /// children. A token sees the committed rows, its ancestors and itself, and its
    /// position is the committed length plus its depth.
    Tree(&'a [Option<usize>]),
}

/// Which rows of logits a [`Step`] wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: the rows only fill the state.
    None,
    /// The row of the last token.
    Last,
    /// One row per token.
    All,
}

/// What one [`Step`] gives back.
#[derive(Debug)]
pub struct Output {
    /// The rows of logits that were asked for.
    pub logits: Logits,
    /// Hidden features `[rows, dim]` of every token, if asked for.
    pub features: Option<Tensor>,
}

/// Rows of logits in host memory, `[rows, vocab]`, f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    data: Array2<f32>,
}

impl Logits {
    /// Wraps `data`, which holds rows of `vocab` numbers one after another.
    ///
    /// # Errors
    /// `Contract` when `data` is not a whole number of rows.
    pub fn new(data: Vec<f32>, vocab: usize) -> Result<Self> {
        let numbers = data.len();
        let rows = numbers.checked_div(vocab).unwrap_or(0);
        match Array2::from_shape_vec((rows, vocab), data) {
            Ok(data) => Ok(Self { data }),
            Err(_) => {
                let what = format!("{numbers} numbers are not rows of {vocab} logits");
                Err(Error::contract("the model", what))
            }
        }
    }

    /// No rows.
    #[must_use]
    pub fn none(vocab: usize) -> Self {
        Self {
            data: Array2::zeros((0, vocab)),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.data.nrows()
    }

    /// Length of a row.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.data.ncols()
    }

    /// Row `index`.
    #[must_use]
    pub fn row(&self, index: usize) -> Option<&[f32]> {
        self.data
            .as_slice()?
            .chunks_exact(self.vocab().max(1))
            .nth(index)
    }

    /// All rows as an array `[rows, vocab]`.
    #[must_use]
    pub fn view(&self) -> ArrayView2<'_, f32> {
        self.data.view()
    }
}

/// A model that predicts the next token.
///
/// Rows of one slot must not depend on what the other slots of the same call hold.
pub trait TargetModel {
    /// Its memory.
    type State: SequenceState;

    /// Number of tokens in its vocabulary.
    fn vocab_size(&self) -> usize;

    /// Largest number of tokens in one sequence.
    fn context_len(&self) -> usize;

    /// An empty state for `slots` sequences.
    ///
    /// # Errors
    /// When the state cannot be allocated.
    fn new_state(&self, slots: usize) -> Result<Self::State>;

    /// One forward pass over all `steps` (at most one per slot); one [`Output`] per
    /// step. The rows become pending in their slots; earlier pending rows must have
    /// been committed or discarded.
    ///
    /// # Errors
    /// When the network fails or a step does not fit the state.
    fn forward(&self, steps: &[Step<'_>], state: &mut Self::State) -> Result<Vec<Output>>;

    /// Measured price of a pass over some rows on this machine, if it is known.
    fn cost_curve(&self) -> Option<CostCurve> {
        None
    }
}

impl<M: TargetModel + ?Sized> TargetModel for &M {
    type State = M::State;

    fn vocab_size(&self) -> usize {
        (**self).vocab_size()
    }
    fn context_len(&self) -> usize {
        (**self).context_len()
    }
    fn new_state(&self, slots: usize) -> Result<Self::State> {
        (**self).new_state(slots)
    }
    fn forward(&self, steps: &[Step<'_>], state: &mut Self::State) -> Result<Vec<Output>> {
        (**self).forward(steps, state)
    }
    fn cost_curve(&self) -> Option<CostCurve> {
        (**self).cost_curve()
    }
}
