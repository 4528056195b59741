//! The forward of training: soft gates that a gradient passes through, or the hard gates of
//! inference.

use sequor_nn::attention::{Attend, Call, Dense};
use sequor_nn::block::Pass;
use sequor_nn::mask::Mask;
use sequor_nn::tch::no_grad;
use sequor_nn::{Error, Kind, Result, Tensor};

use super::Routers;
use super::policy::{LayerScore, Policy, Prefill};
use crate::decoder::{Decoder, Input};

/// How gates enter a [`gated_forward`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gating<'a> {
    /// The mean probability over the prompt mixes a layer's output with its input. Protected
    /// layers (the first two and the last, if asked for) have gate 1.
    Soft {
        /// Are there protected layers?
        protect: bool,
        /// Forward with 0 or 1 (above one half), backward as if soft.
        straight_through: bool,
    },
    /// What inference does. Nothing is learned about the routers.
    Hard(Policy),
    /// These gates, whatever the routers say.
    Fixed(&'a [bool]),
}

/// What a [`gated_forward`] gives.
#[derive(Debug)]
pub struct RoutedPass {
    /// Scores for each token after the prompt, `[targets, vocab]` f32.
    pub logits: Tensor,
    /// The gate of every layer, `[layers]` f32 (before they were made hard, in straight-through
    /// gating).
    pub gates: Tensor,
    /// The routers' probabilities, `[layers, prompt]` f32.
    pub probabilities: Tensor,
}

/// `r * layer(h) + (1 - r) * h`: all of a layer at `r` = 1, nothing of it at 0. `before` and
/// `after` are the layer's input and output; `r` is a scalar or broadcasts over them.
///
/// # Errors
/// When the shapes do not fit.
pub fn soft_layer(before: &Tensor, after: &Tensor, r: &Tensor) -> Result<Tensor> {
    // In this form both ends are exact.
    let kept = r.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?;
    Ok(after.f_mul(r)?.f_add(&before.f_mul(&kept)?)?)
}

/// Predicts the tokens behind a prompt with gated layers: the gates follow from the prompt
/// alone, as they do at inference, and hold for every token behind it. With
/// [`Prefill::Full`] the prompt itself goes through whole layers; soft gating then takes its
/// rows as constants, since neither they nor the routers' inputs depend on a gate.
///
/// # Errors
/// [`Error::Input`] when there is no prompt, nothing behind it, or ids outside the
/// vocabulary; [`Error::Config`] when routers or gates do not fit the decoder.
pub fn gated_forward(
    decoder: &Decoder,
    routers: &Routers,
    tokens: &[u32],
    prompt_len: usize,
    prefill: Prefill,
    gating: Gating<'_>,
) -> Result<RoutedPass> {
    let c = decoder.config();
    check(decoder, routers, tokens, prompt_len, prefill, gating)?;
    let ids = |part: &[u32]| -> Result<Tensor> {
        let ids: Vec<i64> = part.iter().map(|&t| i64::from(t)).collect();
        Ok(Tensor::f_from_slice(&ids)?.f_to_device(decoder.device())?)
    };
    let (prompt, rest) = tokens.split_at(prompt_len);
    let answer = rest.split_last().map_or(&[][..], |(_, fed)| fed);

    // The prompt.
    let positions: Vec<i64> = (0..prompt.len() as i64).collect();
    let mut attend = Prefixed::new(prompt.len());
    let rope = decoder.rotations(&positions)?;
    let mut x = decoder.input_rows(&Input::Ids(&ids(prompt)?), &positions, 0.0)?;
    let constant = prefill == Prefill::Full && matches!(gating, Gating::Soft { .. });
    let (mut probabilities, mut gates) = (Vec::new(), Vec::new());
    for layer in 0..c.layers {
        let said = match gating {
            Gating::Soft { .. } => routers.probabilities(layer, &x)?,
            _ => no_grad(|| routers.probabilities(layer, &x))?,
        };
        let gate = gate(gating, layer, c.layers, &said)?;
        probabilities.push(said);
        let mut block = |x: &Tensor| -> Result<Tensor> {
            let mut pass = Pass {
                attend: &mut attend,
                rope: rope.as_ref(),
                dropout: 0.0,
            };
            Ok(decoder
                .run_layers([layer], x.shallow_clone(), &mut pass, &[])?
                .0)
        };
        match prefill {
            Prefill::Full if constant => x = no_grad(|| block(&x))?,
            Prefill::Full => x = block(&x)?,
            Prefill::Gated => x = apply(&x, &gate, block)?,
        }
        gates.push(gate);
    }
    if let Gating::Hard(policy) = gating
        && policy.keep.is_some()
    {
        let scores = probabilities
            .iter()
            .map(score)
            .collect::<Result<Vec<_>>>()?;
        gates = policy.decide(&scores).into_iter().map(Gate::Hard).collect();
    }
    let last = x.f_narrow(0, prompt.len() as i64 - 1, 1)?;

    // What follows it, as far as it predicts something.
    let rows = if answer.is_empty() {
        last
    } else {
        let from = prompt.len() as i64;
        let positions: Vec<i64> = (from..from + answer.len() as i64).collect();
        attend.follow(answer.len());
        let rope = decoder.rotations(&positions)?;
        let mut x = decoder.input_rows(&Input::Ids(&ids(answer)?), &positions, 0.0)?;
        for (layer, gate) in gates.iter().enumerate() {
            x = apply(&x, gate, |x| {
                let mut pass = Pass {
                    attend: &mut attend,
                    rope: rope.as_ref(),
                    dropout: 0.0,
                };
                Ok(decoder
                    .run_layers([layer], x.shallow_clone(), &mut pass, &[])?
                    .0)
            })?;
        }
        Tensor::f_cat(&[last, x], 0)?
    };
    let gates: Vec<Tensor> = gates
        .iter()
        .map(|g| match g {
            Gate::Hard(on) => Ok(Tensor::f_from_slice(&[f32::from(u8::from(*on))])?),
            Gate::Soft { mean, .. } => Ok(mean.f_reshape([1])?),
        })
        .collect::<Result<_>>()?;
    Ok(RoutedPass {
        logits: decoder.logits(&decoder.finish(&rows)?)?,
        gates: Tensor::f_cat(&gates, 0)?,
        probabilities: Tensor::f_stack(&probabilities, 0)?,
    })
}

/// One layer's gate.
enum Gate {
    Hard(bool),
    /// What the forward multiplies by, and the mean it came from.
    Soft {
        used: Tensor,
        mean: Tensor,
    },
}

fn score(said: &Tensor) -> Result<LayerScore> {
    let said = sequor_kernels::bridge::to_vec::<f32>(&said.f_detach()?)
        .map_err(|e| Error::Input(e.to_string()))?;
    Ok(LayerScore::of(said))
}

/// The gate of a layer by what its router said about the prompt.
fn gate(gating: Gating<'_>, layer: usize, layers: usize, said: &Tensor) -> Result<Gate> {
    Ok(match gating {
        Gating::Fixed(gates) => Gate::Hard(gates.get(layer) == Some(&true)),
        Gating::Hard(policy) => Gate::Hard(policy.gate(layer, layers, score(said)?)),
        Gating::Soft {
            protect,
            straight_through,
        } => {
            let policy = Policy {
                protect,
                ..Policy::default()
            };
            if policy.protects(layer, layers) {
                return Ok(Gate::Hard(true));
            }
            let mean = said.f_mean(Kind::Float)?;
            let used = if straight_through {
                let hard = mean.f_detach()?.f_gt(0.5)?.f_to_kind(Kind::Float)?;
                // The value of `hard` with the gradient of `mean`.
                mean.f_sub(&mean.f_detach()?)?.f_add(&hard)?
            } else {
                mean.shallow_clone()
            };
            Gate::Soft { used, mean }
        }
    })
}

fn apply(
    x: &Tensor,
    gate: &Gate,
    mut layer: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    match gate {
        Gate::Hard(true) => layer(x),
        Gate::Hard(false) => Ok(x.shallow_clone()),
        Gate::Soft { used, .. } => soft_layer(x, &layer(x)?, used),
    }
}

fn check(
    decoder: &Decoder,
    routers: &Routers,
    tokens: &[u32],
    prompt_len: usize,
    prefill: Prefill,
    gating: Gating<'_>,
) -> Result<()> {
    let c = decoder.config();
    if prompt_len == 0 || prompt_len >= tokens.len() {
        return Err(Error::Input(format!(
            "a prompt of {prompt_len} of {} tokens: there must be a prompt and something behind it",
            tokens.len()
        )));
    }
    if tokens.len() > c.context {
        return Err(Error::Limits(format!(
            "a text of {} tokens is longer than the model's context of {}",
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
    if routers.layers() != c.layers || routers.dim() != c.dim {
        return Err(Error::Config(format!(
            "routers for {} layers of width {}, the model has {} of width {}",
            routers.layers(),
            routers.dim(),
            c.layers,
            c.dim
        )));
    }
    match gating {
        Gating::Fixed(gates) if gates.len() != c.layers => Err(Error::Config(format!(
            "{} gates for {} layers",
            gates.len(),
            c.layers
        ))),
        Gating::Hard(policy) => policy.validate(c.layers, prefill),
        _ => Ok(()),
    }
}

/// A sequence in two parts: the keys and values of the first are kept for the second.
struct Prefixed {
    prompt: i64,
    first: Dense,
    /// Rows of the second part, once it began.
    follows: Option<i64>,
    kept: Vec<Option<(Tensor, Tensor)>>,
    masks: Vec<(Option<i64>, bool, Tensor)>,
}

impl Prefixed {
    fn new(prompt: usize) -> Self {
        Self {
            prompt: prompt as i64,
            first: Dense::new(1, prompt as i64, Mask::Causal),
            follows: None,
            kept: Vec::new(),
            masks: Vec::new(),
        }
    }

    /// The second part begins, and has this many rows.
    fn follow(&mut self, rows: usize) {
        self.follows = Some(rows as i64);
    }

    /// Who in the second part sees whom; a layer that left the prompt out has only the second
    /// part's keys.
    fn mask(&mut self, window: Option<i64>, prefix: bool, like: &Tensor) -> Result<Tensor> {
        let known = |m: &&(Option<i64>, bool, Tensor)| (m.0, m.1) == (window, prefix);
        if let Some((.., mask)) = self.masks.iter().find(known) {
            return Ok(mask.shallow_clone());
        }
        let end = self.prompt + self.follows.unwrap_or_default();
        let queries: Vec<i64> = (self.prompt..end).collect();
        let keys: Vec<i64> = (if prefix { 0 } else { self.prompt }..end).collect();
        let rule = match window {
            Some(size) => Mask::Causal & Mask::Window { size },
            None => Mask::Causal,
        };
        let mask = rule.additive(&queries, &keys, like.device())?;
        self.masks.push((window, prefix, mask.shallow_clone()));
        Ok(mask)
    }
}

impl Attend for Prefixed {
    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let Some(rows) = self.follows else {
            if self.kept.len() <= call.layer {
                self.kept.resize_with(call.layer + 1, || None);
            }
            if let Some(place) = self.kept.get_mut(call.layer) {
                *place = Some((k.shallow_clone(), v.shallow_clone()));
            }
            return self.first.attend(call, q, k, v);
        };
        let before = self.kept.get(call.layer).and_then(Option::as_ref);
        let prefix = before.is_some();
        let (keys, values) = match before {
            Some((pk, pv)) => (Tensor::f_cat(&[pk, k], 0)?, Tensor::f_cat(&[pv, v], 0)?),
            None => (k.shallow_clone(), v.shallow_clone()),
        };
        let mask = self.mask(call.window, prefix, q)?;
        let heads = |x: &Tensor| -> Result<Tensor> { Ok(x.f_transpose(0, 1)?.f_unsqueeze(0)?) };
        let out = Tensor::f_scaled_dot_product_attention(
            &heads(q)?,
            &heads(&keys)?,
            &heads(&values)?,
            Some(&mask),
            0.0,
            false,
            call.scale,
            q.size().get(1) != k.size().get(1),
        )?;
        Ok(out
            .f_squeeze_dim(0)?
            .f_transpose(0, 1)?
            .f_reshape([rows, -1])?)
    }
}
