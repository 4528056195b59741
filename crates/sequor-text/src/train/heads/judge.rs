//! What the heads are held to: the frozen target's own laws over the drafted tokens.

use sequor_backbone::CausalLm;
use sequor_kernels::bridge;
use sequor_nn::linear::Linear;
use sequor_nn::tch::{Reduction, no_grad};
use sequor_nn::{Kind, Tensor};
use sequor_train::{Error, Result};

/// Stands for tokens that are not drafted.
const NOT_DRAFTED: i64 = -100;

/// The target's output head, cut to the drafted tokens.
#[derive(Debug)]
pub(in crate::train) struct Judge<'a> {
    target: &'a CausalLm,
    cut: Option<Linear>,
    /// Draft id of each target id.
    draft_ids: Vec<i64>,
}

impl<'a> Judge<'a> {
    /// Judges guesses among `tokens` (target ids), or among all when `None`.
    pub fn new(target: &'a CausalLm, tokens: Option<&[u32]>) -> sequor_nn::Result<Self> {
        let vocab = target.config().vocab_size as usize;
        let (cut, draft_ids) = match tokens {
            None => (None, (0..vocab as i64).collect()),
            Some(tokens) => {
                let cut = target.decoder().head().select_outputs(tokens)?;
                let mut ids = vec![NOT_DRAFTED; vocab];
                for (draft, &token) in tokens.iter().enumerate() {
                    if let Some(id) = ids.get_mut(token as usize) {
                        *id = draft as i64;
                    }
                }
                (Some(cut), ids)
            }
        };
        Ok(Self {
            target,
            cut,
            draft_ids,
        })
    }

    /// A judge of fewer tokens: the `frequent` first draft ids and those of `tokens` (target
    /// ids, any shape). Most of a law lies on them, at a fraction of the price.
    pub fn among(&self, tokens: &Tensor, frequent: usize) -> Result<Self> {
        let all = self.draft_ids.iter().filter(|&&id| id >= 0).count();
        let mut wanted: Vec<bool> = (0..all).map(|id| id < frequent).collect();
        for id in to_vec(&self.draft_ids(&tokens.f_reshape([-1])?)?)? {
            if let Some(wanted) = usize::try_from(id).ok().and_then(|id| wanted.get_mut(id)) {
                *wanted = true;
            }
        }
        let mut chosen = Vec::new();
        let mut new_id = vec![NOT_DRAFTED; all];
        for (id, _) in wanted.iter().enumerate().filter(|(_, w)| **w) {
            if let Some(new) = new_id.get_mut(id) {
                *new = chosen.len() as i64;
            }
            chosen.push(id as u32);
        }
        let cut = match &self.cut {
            Some(cut) => cut.select_outputs(&chosen)?,
            None => self.target.decoder().head().select_outputs(&chosen)?,
        };
        let renumbered = |&id: &i64| {
            let new = usize::try_from(id).ok().and_then(|id| new_id.get(id));
            new.copied().unwrap_or(NOT_DRAFTED)
        };
        Ok(Self {
            target: self.target,
            cut: Some(cut),
            draft_ids: self.draft_ids.iter().map(renumbered).collect(),
        })
    }

    /// Scores of the drafted tokens, `[rows, drafted]`, for states `[rows, dim]`.
    pub fn scores(&self, states: &Tensor) -> Result<Tensor> {
        Ok(match &self.cut {
            Some(cut) => cut.forward(states)?,
            None => self.target.decoder().logits(states)?,
        })
    }

    /// The target's laws after `features` `[rows, dim]`, among the drafted tokens.
    pub fn laws(&self, features: &Tensor) -> Result<Tensor> {
        no_grad(|| Ok(self.scores(features)?.f_softmax(-1, Kind::Float)?))
    }

    /// Sum over the rows of the cross-entropy between `laws` `[rows, drafted]` and the law of
    /// `states` `[rows, dim]`.
    pub fn soft_loss(&self, states: &Tensor, laws: &Tensor) -> Result<Tensor> {
        Ok(self.scores(states)?.f_cross_entropy_loss::<Tensor>(
            laws,
            None,
            Reduction::Sum,
            NOT_DRAFTED,
            0.0,
        )?)
    }

    /// Sum over the rows of the surprise at `tokens` (target ids, `[rows]`); rows whose token
    /// is not drafted count nothing.
    pub fn hard_loss(&self, states: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.scores(states)?.f_cross_entropy_loss::<Tensor>(
            &self.draft_ids(tokens)?,
            None,
            Reduction::Sum,
            NOT_DRAFTED,
            0.0,
        )?)
    }

    /// Rank of the true token among the guesses of each row, 0 for the best; `None` when it
    /// is not drafted. A tie counts against the guess.
    pub fn ranks(&self, states: &Tensor, tokens: &Tensor) -> Result<Vec<Option<usize>>> {
        let ids = self.draft_ids(tokens)?;
        let scores = self.scores(states)?;
        let own = scores.f_gather(1, &ids.f_clamp_min(0)?.f_unsqueeze(1)?, false)?;
        let above =
            scores
                .f_ge_tensor(&own)?
                .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Int64)?;
        let (above, ids) = (to_vec(&above)?, to_vec(&ids)?);
        Ok(above
            .into_iter()
            .zip(ids)
            // A row of NaN is above nothing, not even itself.
            .map(|(n, id)| (id >= 0 && n > 0).then(|| n as usize - 1))
            .collect())
    }

    fn draft_ids(&self, tokens: &Tensor) -> Result<Tensor> {
        let outside = |t: i64| {
            Error::Input(format!(
                "token {t} of the corpus lies outside the model's vocabulary of {}: it was made by another model",
                self.draft_ids.len()
            ))
        };
        let ids = to_vec(tokens)?
            .into_iter()
            .map(|t| {
                let id = usize::try_from(t).ok().and_then(|t| self.draft_ids.get(t));
                id.copied().ok_or_else(|| outside(t))
            })
            .collect::<Result<Vec<i64>>>()?;
        bridge::from_slice(&ids, &[ids.len() as i64]).map_err(Error::task)
    }
}

fn to_vec(t: &Tensor) -> Result<Vec<i64>> {
    bridge::to_vec(&t.f_contiguous()?).map_err(Error::task)
}
