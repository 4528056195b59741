//! A decoder with some of its layers left out, as a draft of itself.
//!
//! Leaving the last layers out is an early exit: the final norm and the head read the rows
//! of an earlier layer (self-speculation by early exit, Elhoushi et al., 2024). Leaving out
//! layers in the middle keeps the last ones, which the head is used to (self-speculative
//! decoding, Zhang et al., 2024). Both cost no parameters, and any model can draft for
//! itself. How good the drafts are depends on the model: one that was not trained for it
//! rarely says what it means before its last layers.
//!
//! A [`Subnetwork`] is a [`TargetModel`] like any other. Behind a
//! [`DraftModel`](sequor_sampling::draft::DraftModel) it drafts chains; its state holds rows
//! for its own layers alone.
//!
//! The rows of the first layers of an early exit are what the target computes again when it
//! checks the draft. Sharing them would save the target's pass those layers for the drafted
//! rows: with `E` of `L` layers at most `E / L` of the layers' part of a checking pass, whose
//! price hardly depends on the number of rows where weights are read from memory once for
//! all of them. That is little against keeping two states apart, so they are apart.

use crate::CausalLm;
use crate::causal_lm::or_discard;
use sequor_nn::{Error, KvCache, Result};
use sequor_sampling::{Output, Step, TargetModel};

/// Some layers of a model with its embeddings, final norm and head.
#[derive(Debug)]
pub struct Subnetwork<'m> {
    model: &'m CausalLm,
    layers: Vec<usize>,
}

impl<'m> Subnetwork<'m> {
    /// The layers `layers` of `model`, counted from 0 and in ascending order.
    ///
    /// # Errors
    /// [`Error::Input`] when there is none, one does not exist, or they do not ascend.
    pub fn new(model: &'m CausalLm, layers: Vec<usize>) -> Result<Self> {
        let all = model.config().layers;
        let ascending = layers.is_sorted_by(|a, b| a < b);
        if !ascending || layers.last().is_none_or(|&last| last >= all) {
            return Err(Error::Input(format!(
                "a sub-network is made of layers from 0 to {} in ascending order, not {layers:?}",
                all.saturating_sub(1)
            )));
        }
        Ok(Self { model, layers })
    }

    /// The first `layers` layers: an early exit.
    ///
    /// # Errors
    /// [`Error::Input`] when `layers` is 0 or more than there are.
    pub fn early_exit(model: &'m CausalLm, layers: usize) -> Result<Self> {
        let all = model.config().layers;
        if layers == 0 || layers > all {
            return Err(Error::Input(format!(
                "an early exit lies after 1 to {all} layers, not after {layers}"
            )));
        }
        Self::new(model, (0..layers).collect())
    }

    /// All layers but those in `skipped`.
    ///
    /// # Errors
    /// [`Error::Input`] when one does not exist or nothing is left.
    pub fn without(model: &'m CausalLm, skipped: &[usize]) -> Result<Self> {
        let all = model.config().layers;
        if let Some(bad) = skipped.iter().find(|&&l| l >= all) {
            return Err(Error::Input(format!(
                "layer {bad} cannot be skipped: the network has {all} layers"
            )));
        }
        Self::new(model, (0..all).filter(|l| !skipped.contains(l)).collect())
    }

    /// The layers that run.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }
}

impl TargetModel for Subnetwork<'_> {
    type State = KvCache;

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_len(&self) -> usize {
        self.model.context_len()
    }

    fn new_state(&self, slots: usize) -> sequor_sampling::Result<KvCache> {
        // A layer that does not run takes no memory.
        self.model.new_state(slots)
    }

    fn forward(
        &self,
        steps: &[Step<'_>],
        state: &mut KvCache,
    ) -> sequor_sampling::Result<Vec<Output>> {
        let layers = self.layers.iter().copied();
        or_discard(self.model.run_layers(layers, steps, state), steps, state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::Input;
    use crate::tests::{assert_close, configs, dense, feed, model, text};
    use sequor_nn::attention::Dense;
    use sequor_nn::block::Pass;
    use sequor_nn::mask::Mask;
    use sequor_nn::{Tensor, tch};
    use sequor_sampling::draft::{DraftMode, DraftModel};
    use sequor_sampling::generate::{DepthPolicy, Generator, Options};
    use sequor_sampling::{GenerationConfig, SequenceState};
    use std::ops::ControlFlow;

    /// Logits of some layers over all tokens at once, without state.
    fn stateless(m: &CausalLm, layers: &[usize], tokens: &[u32]) -> Vec<Vec<f32>> {
        let _no_grad = tch::no_grad_guard();
        let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
        let positions: Vec<i64> = (0..tokens.len() as i64).collect();
        let d = m.decoder();
        let ids = Tensor::from_slice(&ids);
        let x = d.input_rows(&Input::Ids(&ids), &positions, 0.0).unwrap();
        let rope = d.rotations(&positions).unwrap();
        let mut pass = Pass {
            attend: &mut Dense::new(1, tokens.len() as i64, Mask::Causal),
            rope: rope.as_ref(),
            dropout: 0.0,
        };
        let (x, _) = d.run_layers(layers.to_vec(), x, &mut pass, &[]).unwrap();
        let y = d.logits(&d.finish(&x).unwrap()).unwrap();
        (0..tokens.len())
            .map(|i| Vec::try_from(y.get(i as i64)).unwrap())
            .collect()
    }

    #[test]
    fn a_forward_may_be_cut_anywhere() {
        for config in configs() {
            let m = model(&config);
            let (d, tokens) = (m.decoder(), text(9));
            let _no_grad = tch::no_grad_guard();
            let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
            let positions: Vec<i64> = (0..9).collect();
            let ids = Tensor::from_slice(&ids);
            let mut attend = Dense::new(1, 9, Mask::Causal);
            let all: Vec<usize> = (0..m.config().layers).collect();
            let whole = d
                .forward(&Input::Ids(&ids), &positions, &mut attend, 0.0, &all)
                .unwrap();
            let x = d.input_rows(&Input::Ids(&ids), &positions, 0.0).unwrap();
            for layer in 0..=all.len() {
                let from = layer.checked_sub(1).map_or(&x, |l| &whole.taps[l]);
                let rest = d
                    .forward_from(layer, from, &positions, &mut attend, &all[layer..])
                    .unwrap();
                assert_eq!(rest.last, whole.last, "{config} from layer {layer}");
                assert_eq!(rest.taps.len(), all.len() - layer);
            }
            let beyond = d.forward_from(all.len() + 1, &x, &positions, &mut attend, &[]);
            assert!(beyond.unwrap_err().to_string().contains("layer"));
            let early = d.forward_from(1, &x, &positions, &mut attend, &[0]);
            assert!(early.unwrap_err().to_string().contains("tap"));
        }
    }

    #[test]
    fn a_part_of_the_layers_has_a_state_of_its_own() {
        for config in configs() {
            let m = model(&config);
            let tokens = text(12);
            let last = m.config().layers - 1;
            for part in [vec![0], vec![last], (0..=last).collect()] {
                let want = stateless(&m, &part, &tokens);
                let sub = Subnetwork::new(&m, part.clone()).unwrap();
                let mut state = sub.new_state(1).unwrap();
                let mut got = feed(&sub, &mut state, 0, &tokens[..7]);
                got.extend(feed(&sub, &mut state, 0, &tokens[7..9]));
                SequenceState::truncate(&mut state, 0, 5).unwrap();
                got.truncate(5);
                got.extend(feed(&sub, &mut state, 0, &tokens[5..]));
                for (i, (a, b)) in want.iter().zip(&got).enumerate() {
                    assert_close(a, b, &format!("{config} layers {part:?} row {i}"));
                }
                for layer in 0..=last {
                    let rows = state.view(0, layer).unwrap().0.size()[1];
                    assert_eq!(rows, if part.contains(&layer) { 12 } else { 0 });
                }
            }
            let whole = Subnetwork::early_exit(&m, last + 1).unwrap();
            let mut state = whole.new_state(1).unwrap();
            let got = feed(&whole, &mut state, 0, &tokens);
            assert_close(&dense(&m, &tokens)[11], &got[11], "all layers");
        }
    }

    #[test]
    fn a_model_drafts_for_itself_without_changing_its_text() {
        let m = model(&configs()[4]);
        let options = Options {
            depth: DepthPolicy::Fixed(3),
            ignore_eos: true,
            ..Options::from(GenerationConfig::default()).max_new_tokens(20)
        };
        let generator = Generator::new(&m, options).unwrap();
        let go = |_| ControlFlow::Continue(());
        let plain = generator.generate(&text(6), None, go).unwrap();
        let mut accepted = Vec::new();
        for layers in [vec![0], vec![0, 2], vec![0, 1, 2]] {
            let sub = Subnetwork::new(&m, layers).unwrap();
            let drafter = DraftModel::new(sub, DraftMode::Greedy).unwrap();
            let run = generator
                .generate(&text(6), Some(Box::new(drafter)), go)
                .unwrap();
            assert_eq!(run.tokens, plain.tokens);
            accepted.push(run.report.acceptance_rate());
        }
        assert_eq!(
            accepted[2], 1.0,
            "all layers draft what they say: {accepted:?}"
        );
        assert!(accepted[0] < 1.0);
    }

    #[test]
    fn layers_are_checked() {
        let m = model(&configs()[4]);
        assert_eq!(Subnetwork::without(&m, &[1]).unwrap().layers(), [0, 2]);
        assert_eq!(Subnetwork::early_exit(&m, 2).unwrap().layers(), [0, 1]);
        for bad in [vec![], vec![3], vec![1, 0], vec![1, 1]] {
            let e = Subnetwork::new(&m, bad).unwrap_err().to_string();
            assert!(e.contains("layers"), "{e}");
        }
        for bad in [0, 4] {
            assert!(Subnetwork::early_exit(&m, bad).is_err());
        }
        assert!(Subnetwork::without(&m, &[3]).is_err());
        assert!(Subnetwork::without(&m, &[0, 1, 2]).is_err());
    }
}
