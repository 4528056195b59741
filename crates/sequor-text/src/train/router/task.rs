//! Routers, then their adapter, as tasks of the training loop.

use std::collections::{BTreeMap, BTreeSet};

use sequor_backbone::CausalLm;
use sequor_backbone::routers::{Gating, Policy, RoutedPass, Routers, gated_forward};
use sequor_kernels::bridge;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::params::Param;
use sequor_nn::tch::{Reduction, no_grad_guard};
use sequor_nn::{Kind, ParamBuilder, Tensor};
use sequor_train::{Error, MicroLoss, Result, StepCtx, Task};
use serde_json::Value;

use super::recipe::RouterRecipe;
use super::{HELD_OUT_LOSS, cursor};
use crate::train::distill::DistillCorpus;

/// Fewest tokens behind a prompt.
const LEAST: usize = 8;
/// Most texts that are read.
const MOST: usize = 4096;

/// A prompt with the model's own continuation.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
}

impl Text {
    /// Number of tokens to predict.
    pub fn targets(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }
}

/// What is learned from, and what is measured with.
pub(super) struct Lesson {
    pub texts: Vec<Text>,
    pub held_out: Vec<Text>,
    seed: u64,
}

impl Lesson {
    /// Takes texts whose prompt leaves room for an answer within the context; every
    /// so-manieth is held out.
    pub fn new(
        corpus: &DistillCorpus,
        recipe: &RouterRecipe,
        model: &CausalLm,
    ) -> crate::Result<Self> {
        let context = recipe.context.min(model.config().context);
        let vocab = model.config().vocab_size;
        let mut texts = Vec::new();
        for i in 0..corpus.sequences().min(MOST) {
            let sample = corpus.read(i)?;
            if let Some(bad) = sample.tokens.iter().find(|&&t| i64::from(t) >= vocab) {
                return Err(crate::Error::Input(format!(
                    "the corpus has token {bad} and the model a vocabulary of {vocab}: it was made by another model; make one with `sequor train corpus`"
                )));
            }
            let mut text = Text {
                tokens: sample.tokens,
                prompt_len: sample.prompt_len,
            };
            text.tokens.truncate(context);
            if text.prompt_len > 0 && text.tokens.len() >= text.prompt_len + LEAST {
                texts.push(text);
            }
        }
        Self::split(texts, recipe)
    }

    pub fn split(texts: Vec<Text>, recipe: &RouterRecipe) -> crate::Result<Self> {
        let all = texts.len();
        let every = (all / recipe.held_out.min(all / 4).max(1)).max(2);
        let mut lesson = Self {
            texts: Vec::new(),
            held_out: Vec::new(),
            seed: recipe.seed,
        };
        for (i, text) in texts.into_iter().enumerate() {
            if i % every == every - 1 && lesson.held_out.len() < recipe.held_out {
                lesson.held_out.push(text);
            } else {
                lesson.texts.push(text);
            }
        }
        if lesson.texts.is_empty() || lesson.held_out.is_empty() {
            return Err(crate::Error::Input(format!(
                "the corpus has {all} texts whose prompt leaves room for {LEAST} tokens of answer within {} tokens; raise context, or make a larger corpus",
                recipe.context
            )));
        }
        Ok(lesson)
    }

    /// Identity of the texts.
    pub fn fingerprint(&self) -> String {
        let tokens = self.texts.iter().chain(&self.held_out);
        let hash = tokens
            .flat_map(|t| t.tokens.iter().copied().chain([t.prompt_len as u32]))
            .fold(0xcbf2_9ce4_8422_2325u64, |h, t| {
                (h ^ u64::from(t)).wrapping_mul(0x0100_0000_01b3)
            });
        format!("{hash:016x}")
    }

    /// Text number `n` of all passes over the data, each in an order of its own.
    fn at(&self, n: u64) -> Result<&Text> {
        let size = self.texts.len().max(1) as u64;
        let mut order: Vec<usize> = (0..self.texts.len()).collect();
        Key::new(self.seed, n / size)
            .stream(0, Purpose::Data)
            .shuffle(&mut order);
        order
            .get((n % size) as usize)
            .and_then(|&i| self.texts.get(i))
            .ok_or_else(|| Error::Input("there are no texts to learn from".into()))
    }
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Routers,
    Adapter,
}

/// One phase.
pub(super) struct RouterTask<'a> {
    pub model: &'a CausalLm,
    pub routers: &'a Routers,
    /// Holds what is trained.
    pub builder: &'a ParamBuilder,
    pub recipe: &'a RouterRecipe,
    pub policy: Policy,
    pub lesson: &'a Lesson,
    pub phase: Phase,
    pub steps: u64,
    /// Texts trained on.
    pub next: u64,
}

/// What hard gates do to held-out text.
pub(super) struct Measured {
    /// Nats per token.
    pub loss: f64,
    /// Mean number of layers that ran.
    pub layers: f64,
    /// Different sets of layers.
    pub choices: usize,
}

impl RouterTask<'_> {
    fn pass(&self, text: &Text, gating: Gating<'_>) -> Result<RoutedPass> {
        Ok(gated_forward(
            self.model.decoder(),
            self.routers,
            &text.tokens,
            text.prompt_len,
            self.recipe.prefill,
            gating,
        )?)
    }

    /// Measures texts with the hard gates of inference.
    pub fn measure(&self, texts: &[Text]) -> Result<Measured> {
        let _no_grad = no_grad_guard();
        let (mut nats, mut targets, mut kept) = (0.0, 0, 0.0);
        let mut choices = BTreeSet::new();
        for text in texts {
            let pass = self.pass(text, Gating::Hard(self.policy))?;
            nats += cross_entropy(&pass.logits, text)?.f_double_value(&[])?;
            targets += text.targets();
            let gates = numbers(&pass.gates)?;
            kept += gates.iter().map(|&g| f64::from(g)).sum::<f64>();
            choices.insert(gates.iter().map(|&g| g > 0.5).collect::<Vec<_>>());
        }
        Ok(Measured {
            loss: nats / targets.max(1) as f64,
            layers: kept / texts.len().max(1) as f64,
            choices: choices.len(),
        })
    }

    /// Nats per token with the same layers for every text.
    pub fn fixed_loss(&self, texts: &[Text], gates: &[bool]) -> Result<f64> {
        let _no_grad = no_grad_guard();
        let (mut nats, mut targets) = (0.0, 0);
        for text in texts {
            let pass = self.pass(text, Gating::Fixed(gates))?;
            nats += cross_entropy(&pass.logits, text)?.f_double_value(&[])?;
            targets += text.targets();
        }
        Ok(nats / targets.max(1) as f64)
    }

    /// What the routers say about a prompt: the mean probability of each layer.
    pub fn prompt_scores(&self, text: &Text) -> Result<Vec<f64>> {
        let prompt = Text {
            tokens: text
                .tokens
                .iter()
                .take(text.prompt_len + 1)
                .copied()
                .collect(),
            prompt_len: text.prompt_len,
        };
        let pass = self.pass(&prompt, Gating::Hard(self.policy))?;
        let mean = pass
            .probabilities
            .f_mean_dim([1i64].as_slice(), false, Kind::Float)?;
        Ok(numbers(&mean)?.into_iter().map(f64::from).collect())
    }

    /// What the first phase adds to the cross-entropy, per token.
    pub fn pressure(&self, pass: &RoutedPass, step: u64) -> Result<Tensor> {
        let r = self.recipe;
        let layers = pass.gates.size().first().copied().unwrap_or_default();
        let free: Vec<i64> = (0..layers)
            .filter(|&l| !self.policy.protects(l as usize, layers as usize))
            .collect();
        let free = Tensor::f_from_slice(&free)?.f_to_device(pass.gates.device())?;
        let p = pass.probabilities.f_index_select(0, &free)?;
        let ramp = (2.0 * step as f64 / self.steps.max(1) as f64).min(1.0);
        let open = p.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?.f_mul(&p)?;
        let budget = pass
            .gates
            .f_mean(Kind::Float)?
            .f_add_scalar(-r.kept)?
            .f_square()?;
        Ok(p.f_mean(Kind::Float)?
            .f_mul_scalar(r.sum_weight)?
            .f_add(&budget.f_mul_scalar(r.budget_weight)?)?
            .f_add(
                &open
                    .f_mean(Kind::Float)?
                    .f_mul_scalar(r.binary_weight * ramp)?,
            )?)
    }
}

impl Task for RouterTask<'_> {
    fn params(&self) -> Vec<Param> {
        self.builder.params()
    }

    fn loss(&mut self, ctx: &StepCtx) -> Result<MicroLoss> {
        let text = self.lesson.at(self.next)?;
        self.next += 1;
        let gating = match self.phase {
            Phase::Routers => Gating::Soft {
                protect: self.recipe.protect,
                straight_through: ctx.step * 3 >= self.steps * 2,
            },
            Phase::Adapter => Gating::Hard(self.policy),
        };
        let pass = self.pass(text, gating)?;
        let targets = text.targets();
        let mut sum = cross_entropy(&pass.logits, text)?;
        if self.phase == Phase::Routers {
            let pressure = self.pressure(&pass, ctx.step)?;
            sum = sum.f_add(&pressure.f_mul_scalar(targets as f64)?)?;
        }
        Ok(MicroLoss { sum, targets })
    }

    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        let measured = self.measure(&self.lesson.held_out)?;
        Ok(BTreeMap::from([
            (HELD_OUT_LOSS.to_owned(), measured.loss),
            ("layers".to_owned(), measured.layers),
            ("choices".to_owned(), measured.choices as f64),
        ]))
    }

    fn cursor(&self) -> Value {
        cursor(self.next)
    }

    fn set_cursor(&mut self, cursor: &Value) -> Result<()> {
        let next = cursor.get("next").and_then(Value::as_u64);
        self.next =
            next.ok_or_else(|| Error::Input(format!("{cursor} is no place in the data")))?;
        Ok(())
    }

    fn epoch(&self) -> f64 {
        self.next as f64 / self.lesson.texts.len().max(1) as f64
    }
}

/// The sum over the tokens behind the prompt.
fn cross_entropy(logits: &Tensor, text: &Text) -> Result<Tensor> {
    let targets: Vec<i64> = text
        .tokens
        .iter()
        .skip(text.prompt_len)
        .map(|&t| i64::from(t))
        .collect();
    let targets = Tensor::f_from_slice(&targets)?.f_to_device(logits.device())?;
    Ok(logits.f_cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, -100, 0.0)?)
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    bridge::to_vec(t).map_err(Error::task)
}
