//! Classifier-free guidance (Ho and Salimans 2022; Sanchez et al. 2023 for text).

use sequor_kernels::select;
use serde::{Deserialize, Serialize};

use super::Context;
use crate::{Error, Result};

/// In what the two branches are mixed. The results differ by a constant per row, which
/// matters only to processors that are not invariant to it (repetition penalty).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuidanceSpace {
    /// Log-probabilities, as in Hugging Face.
    #[default]
    LogProbabilities,
    /// Raw logits, as most code for images.
    Logits,
}

pub(super) fn mix(
    ctx: &Context<'_>,
    scores: &mut [f32],
    scale: f32,
    space: GuidanceSpace,
) -> Result<()> {
    let Some(unconditional) = ctx.unconditional else {
        let message =
            "guidance_scale needs the logits of an unconditional branch, and this model gives none";
        return Err(Error::Unsupported(message.to_owned()));
    };
    if unconditional.len() != scores.len() {
        let what = format!(
            "{} unconditional logits for {} conditional ones",
            unconditional.len(),
            scores.len()
        );
        return Err(Error::contract("the model", what));
    }
    let mut unconditional = unconditional.to_vec();
    if space == GuidanceSpace::LogProbabilities {
        select::log_softmax_in_place(scores);
        select::log_softmax_in_place(&mut unconditional);
    }
    for (c, u) in scores.iter_mut().zip(unconditional) {
        // -inf in both branches would give NaN; such a token stays removed.
        if *c > f32::NEG_INFINITY {
            *c = u + scale * (*c - u);
        }
    }
    Ok(())
}
