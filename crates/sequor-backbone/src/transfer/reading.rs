//! Whole texts at once: what training and measuring need.

use super::attend::{Over, Recorder};
use super::maps::{Climb, HiddenTransfer};
use crate::CausalLm;
use crate::decoder::Input;
use sequor_nn::block::Pass;
use sequor_nn::{Error, Result, Tensor};

/// What one pass of the model itself over a text left behind. Nothing in it has a gradient.
#[derive(Debug)]
pub struct Reading {
    /// States of all tokens after the final norm, `[tokens, dim]`.
    pub last: Tensor,
    /// States behind the layer of each map, `[tokens, dim]`.
    sources: Vec<Tensor>,
    /// Keys and values of the layers above the first map.
    kept: Vec<(Tensor, Tensor)>,
}

impl HiddenTransfer {
    /// The layer that the first pseudo rows enter.
    fn first_layer(&self) -> usize {
        let layers = &self.config().transfer_layers;
        layers.first().copied().unwrap_or(0)
    }

    /// Lets the model read a text.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty text or tokens outside the vocabulary, [`Error::Limits`]
    /// for a text longer than the context.
    pub fn read(&self, model: &CausalLm, tokens: &[u32]) -> Result<Reading> {
        let _no_grad = sequor_nn::tch::no_grad_guard();
        let (decoder, c) = (model.decoder(), model.config());
        if tokens.is_empty() || tokens.len() > c.context {
            return Err(Error::Limits(format!(
                "a text of {} tokens cannot be read with a context of {}",
                tokens.len(),
                c.context
            )));
        }
        if let Some(bad) = tokens.iter().find(|&&t| i64::from(t) >= c.vocab_size) {
            return Err(Error::Input(format!(
                "token id {bad} lies outside the vocabulary of {}",
                c.vocab_size
            )));
        }
        let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(decoder.device())?;
        let positions: Vec<i64> = (0..tokens.len() as i64).collect();
        let rows = decoder.input_rows(&Input::Ids(&ids), &positions, 0.0)?;
        let rope = decoder.rotations(&positions)?;
        let mut recorder = Recorder::new(tokens.len(), self.first_layer());
        let mut pass = Pass {
            attend: &mut recorder,
            rope: rope.as_ref(),
            dropout: 0.0,
        };
        // Behind `t` layers means behind block `t - 1`.
        let layers = self.config().transfer_layers.iter();
        let taps: Vec<usize> = layers.map(|t| t.saturating_sub(1)).collect();
        let (rows, sources) = decoder.run_layers(0..c.layers, rows, &mut pass, &taps)?;
        Ok(Reading {
            last: decoder.finish(&rows)?,
            sources,
            kept: recorder.kept,
        })
    }

    /// Pseudo states of the tokens `anchors` of a text that was read, after the final norm:
    /// one tensor `[anchors, dim]` per offset. Entry `j` for token `n` guesses token
    /// `n + j + 2`, and shall equal the state of token `n + j + 1`. The maps receive
    /// gradients. With `linked` false, pseudo rows do not see each other, which only an
    /// ablation wants.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no anchor or one is no token of the text.
    pub fn guess(
        &self,
        model: &CausalLm,
        reading: &Reading,
        anchors: &[usize],
        linked: bool,
    ) -> Result<Vec<Tensor>> {
        let tokens = reading.last.size().first().copied().unwrap_or(0);
        if anchors.is_empty() || anchors.iter().any(|&a| a as i64 >= tokens) {
            return Err(Error::Input(format!(
                "pseudo rows need tokens of a text of {tokens} to hang on, not {anchors:?}"
            )));
        }
        let at: Vec<i64> = anchors.iter().map(|&a| a as i64).collect();
        let index = Tensor::f_from_slice(&at)?.f_to_device(reading.last.device())?;
        let mut attend = Over {
            kept: &reading.kept,
            first: self.first_layer(),
            anchors,
            linked,
            masks: Vec::new(),
        };
        let climb = Climb {
            rows: None,
            positions: &[],
            anchors: &at,
            attend: &mut attend,
        };
        let last = self.climb(model.decoder(), climb, &|j, _| {
            let source = reading
                .sources
                .get(j)
                .ok_or_else(|| Error::Input("a text that was read with other maps".into()))?;
            Ok(source.f_index_select(0, &index)?)
        })?;
        Ok(last.f_chunk(self.config().offsets() as i64, 0)?)
    }
}
