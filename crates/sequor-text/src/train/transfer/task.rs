//! Hidden transfer as a task of the training loop.

use std::collections::BTreeMap;

use sequor_backbone::CausalLm;
use sequor_backbone::transfer::HiddenTransfer;
use sequor_kernels::bridge;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::params::Param;
use sequor_nn::tch::{no_grad, no_grad_guard};
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_train::{Error, MicroLoss, Result, StepCtx, Task};
use serde_json::Value;

use super::recipe::TransferRecipe;
use crate::train::conduct::metrics;
use crate::train::distill::DistillCorpus;
use crate::train::heads::{Batch, Judge, Row, Sequences, Table, index};

/// Held-out positions that an evaluation during training looks at, about.
const GLANCE: u64 = 1200;
/// Most tokens of a held-out sequence that are read.
const MEASURE_CONTEXT: usize = 1024;

/// What maps learn from and are measured with.
pub(super) struct Lesson<'a> {
    pub target: &'a CausalLm,
    pub corpus: &'a DistillCorpus,
    pub recipe: TransferRecipe,
    pub judge: Judge<'a>,
    pub held_out: Vec<usize>,
}

/// Maps in training.
pub(super) struct TransferTask<'a> {
    lesson: Lesson<'a>,
    maps: HiddenTransfer,
    builder: ParamBuilder,
    sequences: Sequences,
}

/// What held-out text says about maps.
pub(super) struct Measured {
    pub table: Table,
    /// The training loss, in nats per anchor.
    pub loss: f64,
    /// Kullback-Leibler divergence from the target's law, by offset, in nats.
    pub divergences: Vec<f64>,
}

/// Sums over anchors.
pub(super) struct Guesses {
    /// States of the pseudo rows, by offset, `[anchors, dim]`.
    pub states: Vec<Tensor>,
    /// Divergence from the target's law, by offset: a scalar, summed over the anchors.
    pub divergences: Vec<Tensor>,
}

impl Lesson<'_> {
    /// Offsets.
    fn offsets(&self) -> usize {
        self.recipe.layers.len()
    }

    /// The answers' tokens of a batch of one sequence from which all offsets lie within it.
    fn answers(&self, batch: &Batch) -> Vec<usize> {
        let answers = batch.places(self.offsets() + 1, |row: &Row, n| row.is_answer(n));
        if answers.is_empty() {
            // A part of a long prompt: better than nothing.
            return batch.places(self.offsets() + 1, |_, _| true);
        }
        answers
    }

    /// Those that carry pseudo rows in this step; at least one.
    pub fn anchors(&self, batch: &Batch, seed: u64) -> Vec<usize> {
        let mut random = Key::new(seed, 0).stream(0, Purpose::Data);
        let mut answers = self.answers(batch);
        let share = (answers.len() as f64 * self.recipe.anchors).ceil() as usize;
        random.shuffle(&mut answers);
        answers.truncate(share.max(1));
        answers.sort_unstable();
        answers
    }

    /// Guesses from these tokens of a batch of one sequence.
    pub fn guess(
        &self,
        maps: &HiddenTransfer,
        batch: &Batch,
        anchors: &[usize],
    ) -> Result<Guesses> {
        let tokens: Vec<i64> = bridge::to_vec(&batch.tokens).map_err(Error::task)?;
        let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).collect();
        let reading = maps.read(self.target, &tokens)?;
        let states = maps.guess(self.target, &reading, anchors, self.recipe.linked)?;
        let divergence = |(j, states): (usize, &Tensor)| -> Result<Tensor> {
            // The law behind token n + 1 + j is that of token n + 2 + j.
            let truth = index(anchors.iter().map(|n| n + 1 + j))?;
            let (laws, entropy) = no_grad(|| -> Result<_> {
                let laws = self.judge.laws(&reading.last.f_index_select(0, &truth)?)?;
                let entropy = laws.f_xlogy(&laws)?.f_sum(Kind::Float)?;
                Ok((laws, entropy))
            })?;
            Ok(self.judge.soft_loss(states, &laws)?.f_add(&entropy)?)
        };
        let divergences = states
            .iter()
            .enumerate()
            .map(divergence)
            .collect::<Result<_>>()?;
        Ok(Guesses {
            states,
            divergences,
        })
    }

    /// The loss: a sum over the anchors.
    fn loss(&self, guesses: &Guesses) -> Result<Tensor> {
        let mut total = Tensor::f_zeros([], (Kind::Float, Device::Cpu))?;
        for (divergence, weight) in guesses.divergences.iter().zip(self.recipe.weights()) {
            total = total.f_add(&divergence.f_mul_scalar(weight)?)?;
        }
        Ok(total)
    }

    /// Guesses of `maps` for held-out answers. Stops after about `most` positions.
    pub fn measure(&self, maps: &HiddenTransfer, most: u64) -> Result<Measured> {
        let _no_grad = no_grad_guard();
        let k = self.offsets();
        let context = self.target.config().context.min(MEASURE_CONTEXT);
        let (mut table, mut loss) = (Table::default(), 0.0);
        let mut divergences = vec![0.0; k];
        for &number in &self.held_out {
            let sample = self.corpus.read(number).map_err(Error::task)?;
            let batch = Batch::new(&[(sample, 0)], context)?;
            let anchors = batch.places(k + 1, |row: &Row, n| row.is_answer(n));
            if anchors.is_empty() {
                continue;
            }
            let guesses = self.guess(maps, &batch, &anchors)?;
            loss += self.loss(&guesses)?.f_double_value(&[])?;
            let tokens = batch.tokens.f_reshape([-1])?;
            let mut ranks = vec![Vec::with_capacity(k); anchors.len()];
            let by_offset = guesses.states.iter().zip(&guesses.divergences);
            for (j, ((states, divergence), sum)) in by_offset.zip(&mut divergences).enumerate() {
                *sum += divergence.f_double_value(&[])?;
                let truth = index(anchors.iter().map(|n| n + 2 + j))?;
                let found = self
                    .judge
                    .ranks(states, &tokens.f_index_select(0, &truth)?)?;
                ranks
                    .iter_mut()
                    .zip(found)
                    .for_each(|(r, rank)| r.push(rank));
            }
            ranks.into_iter().for_each(|r| table.add(r));
            if table.positions() >= most {
                break;
            }
        }
        let places = table.positions() as f64;
        if places == 0.0 {
            return Err(Error::Input(format!(
                "the corpus holds out no answer of more than {k} tokens to measure with; make a larger one"
            )));
        }
        divergences.iter_mut().for_each(|d| *d /= places);
        Ok(Measured {
            table,
            loss: loss / places,
            divergences,
        })
    }
}

impl<'a> TransferTask<'a> {
    /// Maps at the beginning of the corpus.
    pub fn new(lesson: Lesson<'a>, maps: HiddenTransfer, builder: ParamBuilder) -> Self {
        Self {
            sequences: Sequences::new(lesson.corpus, lesson.recipe.seed),
            lesson,
            maps,
            builder,
        }
    }

    /// What was learned, and from what.
    pub fn into_parts(self) -> (Lesson<'a>, HiddenTransfer) {
        (self.lesson, self.maps)
    }
}

impl Task for TransferTask<'_> {
    fn params(&self) -> Vec<Param> {
        self.builder.params()
    }

    fn loss(&mut self, ctx: &StepCtx) -> Result<MicroLoss> {
        let lesson = &self.lesson;
        let least = lesson.offsets() + 2;
        let context = lesson.recipe.context;
        let batch = self
            .sequences
            .next_batch(lesson.corpus, 1, context, least)?;
        let anchors = lesson.anchors(&batch, ctx.seed);
        let guesses = lesson.guess(&self.maps, &batch, &anchors)?;
        Ok(MicroLoss {
            sum: lesson.loss(&guesses)?,
            targets: anchors.len(),
        })
    }

    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        let measured = self.lesson.measure(&self.maps, GLANCE)?;
        let mut metrics = metrics(&measured.table, measured.loss);
        for (j, divergence) in measured.divergences.iter().enumerate() {
            metrics.insert(format!("divergence_{}", j + 1), *divergence);
        }
        Ok(metrics)
    }

    fn cursor(&self) -> Value {
        self.sequences.cursor()
    }

    fn set_cursor(&mut self, cursor: &Value) -> Result<()> {
        self.sequences.seek(cursor)
    }

    fn epoch(&self) -> f64 {
        self.sequences.epochs()
    }
}
