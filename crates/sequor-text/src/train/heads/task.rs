//! Draft heads as a task of the training loop.

use std::collections::BTreeMap;

use sequor_backbone::CausalLm;
use sequor_backbone::heads::{Heads, HeadsKind};
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::params::Param;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_train::{Error, MicroLoss, Result, StepCtx, Task};
use serde_json::Value;

use super::accuracy::Table;
use super::data::{Batch, Row, Sequences, index};
use super::eagle;
use super::judge::Judge;
use super::recipe::{HeadsRecipe, Labels};
use crate::train::conduct::metrics;
use crate::train::distill::DistillCorpus;

/// The held-out metric that training brings down, in the unit of the training loss.
pub(in crate::train) const HELD_OUT_LOSS: &str = "held_out_loss";
/// Held-out share of right best guesses of the first head.
pub const TOP1: &str = "top1";

/// Held-out positions that an evaluation during training looks at, about.
const GLANCE: u64 = 2500;
/// Sequences per forward of an evaluation, and most positions of each.
const MEASURE_BATCH: usize = 4;
const MEASURE_CONTEXT: usize = 1024;

/// What heads learn from and are measured with.
pub(super) struct Lesson<'a> {
    pub target: &'a CausalLm,
    pub corpus: &'a DistillCorpus,
    pub recipe: &'a HeadsRecipe,
    pub judge: Judge<'a>,
    pub held_out: Vec<usize>,
}

/// Heads in training.
pub(super) struct HeadsTask<'a> {
    lesson: Lesson<'a>,
    heads: Heads,
    builder: ParamBuilder,
    sequences: Sequences,
}

impl Lesson<'_> {
    /// The input embeddings of a batch, `[batch, time, dim]`.
    pub fn embeds(&self, batch: &Batch) -> Result<Tensor> {
        Ok(self.target.decoder().embed(&batch.tokens)?)
    }

    /// Weight of depth `i` of `n`; they sum to 1.
    pub fn weight(&self, i: usize, n: usize) -> f64 {
        let power = |i: usize| self.recipe.decay.powi(i as i32);
        power(i) / (0..n).map(power).sum::<f64>()
    }

    /// Positions of a batch that are learned from: all of the answers and a part of the
    /// prompts. Each has one or more positions after it.
    fn places(&self, batch: &Batch, seed: u64) -> Vec<usize> {
        let mut random = Key::new(seed, 0).stream(0, Purpose::Data);
        let share = self.recipe.prompt_share;
        let wanted = |row: &Row, n: usize| {
            // One number for each, so that the draw does not depend on the kind of position.
            let chosen = random.uniform() < share;
            row.is_regular(n) && (row.is_answer(n) || chosen)
        };
        let places = batch.places(1, wanted);
        if places.is_empty() {
            return batch.places(1, |_, _| true);
        }
        places
    }

    /// The loss of `heads` at these places of a batch, each with one or more positions after
    /// it: a sum over the places. `seed` is that of noise; `None` without noise and dropout.
    pub fn loss(
        &self,
        heads: &Heads,
        batch: &Batch,
        places: &[usize],
        seed: Option<u64>,
    ) -> Result<Tensor> {
        if heads.config().kind == HeadsKind::Eagle {
            return eagle::loss(self, heads, batch, places, seed);
        }
        let dropout = seed.map_or(0.0, |_| self.recipe.dropout);
        let states = heads.train_forward(&batch.features, &self.embeds(batch)?, dropout)?;
        let teacher = Teacher::new(self, batch, places, states.len(), seed.is_some())?;
        let mut total = Tensor::f_zeros([], (Kind::Float, Device::Cpu))?;
        for (i, states) in states.iter().enumerate() {
            let chosen: Vec<usize> = places
                .iter()
                .copied()
                .filter(|&p| batch.left(p) > i)
                .collect();
            if chosen.is_empty() {
                continue;
            }
            let loss = teacher.loss(states, &chosen, i)?;
            total = total.f_add(&loss.f_mul_scalar(self.weight(i, self.recipe.depth))?)?;
        }
        Ok(total)
    }

    /// Guesses of `heads` for held-out answers against the text: counts, mean loss. Stops
    /// after about `most` answered positions (of which EAGLE's chains count a part).
    pub fn measure(&self, heads: &Heads, most: u64) -> Result<(Table, f64)> {
        let _no_grad = no_grad_guard();
        let (mut table, mut loss, mut places) = (Table::default(), 0.0, 0);
        for numbers in self.held_out.chunks(MEASURE_BATCH) {
            let parts = numbers
                .iter()
                .map(|&i| Ok((self.corpus.read(i).map_err(Error::task)?, 0)));
            let batch = Batch::new(&parts.collect::<Result<Vec<_>>>()?, MEASURE_CONTEXT)?;
            let answers = batch.places(1, Row::is_answer);
            if answers.is_empty() {
                continue;
            }
            loss += self
                .loss(heads, &batch, &answers, None)?
                .f_double_value(&[])?;
            places += answers.len();
            if heads.config().kind == HeadsKind::Eagle {
                eagle::measure(self, heads, &batch, &mut table)?;
            } else {
                self.count(heads, &batch, &mut table)?;
            }
            if places as u64 >= most {
                break;
            }
        }
        if places == 0 {
            return Err(Error::Input(
                "the corpus holds out no answer to measure with; make a larger one".into(),
            ));
        }
        Ok((table, loss / places as f64))
    }

    /// Counts the ranks of the true tokens at the answers of a batch.
    fn count(&self, heads: &Heads, batch: &Batch, table: &mut Table) -> Result<()> {
        let places = batch.places(2, Row::is_answer);
        let states = heads.train_forward(&batch.features, &self.embeds(batch)?, 0.0)?;
        let mut ranks: Vec<Vec<Option<usize>>> = vec![Vec::new(); places.len()];
        for (i, states) in states.iter().enumerate() {
            let chosen = places.iter().copied().filter(|&p| batch.left(p) >= i + 2);
            let chosen: Vec<usize> = chosen.collect();
            let found = self.ranks(batch, states, &chosen, i)?;
            // Places with fewer tokens after them are done.
            let open = places
                .iter()
                .zip(&mut ranks)
                .filter(|(p, _)| batch.left(**p) >= i + 2);
            open.zip(found).for_each(|((_, r), rank)| r.push(rank));
        }
        ranks.into_iter().for_each(|r| table.add(r));
        Ok(())
    }

    /// Ranks of the tokens `2 + ahead` after these places, by `states` `[batch, time, dim]`
    /// there.
    pub fn ranks(
        &self,
        batch: &Batch,
        states: &Tensor,
        places: &[usize],
        ahead: usize,
    ) -> Result<Vec<Option<usize>>> {
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let states = rows(states)?.f_index_select(0, &index(places.iter().copied())?)?;
        let tokens = places.iter().map(|p| p + 2 + ahead);
        let tokens = batch
            .tokens
            .f_reshape([-1])?
            .f_index_select(0, &index(tokens)?)?;
        self.judge.ranks(&states, &tokens)
    }
}

/// A judge of all drafted tokens, or of few.
enum Part<'b> {
    All(&'b Judge<'b>),
    Few(Judge<'b>),
}

impl<'b> Part<'b> {
    fn get(&self) -> &Judge<'b> {
        match self {
            Self::All(judge) => judge,
            Self::Few(judge) => judge,
        }
    }
}

/// The target's laws where they are needed, each computed once.
pub(super) struct Teacher<'b> {
    batch: &'b Batch,
    /// Says how likely tokens are; in training among a part of them.
    judge: Part<'b>,
    /// Row of `laws` of each place; unused ones have none.
    row: Vec<Option<usize>>,
    laws: Option<Tensor>,
}

impl<'b> Teacher<'b> {
    /// Laws that guesses from `places` up to `depth` ahead are compared with.
    pub fn new(
        lesson: &'b Lesson<'_>,
        batch: &'b Batch,
        places: &[usize],
        depth: usize,
        training: bool,
    ) -> Result<Self> {
        let judge = match lesson.recipe.sampled_vocab {
            n if training && n > 0 => Part::Few(lesson.judge.among(&batch.tokens, n)?),
            _ => Part::All(&lesson.judge),
        };
        let mut needed = vec![false; batch.rows.len() * batch.time()];
        for &p in places {
            let reach = batch.left(p).min(depth);
            needed
                .iter_mut()
                .skip(p + 1)
                .take(reach)
                .for_each(|n| *n = true);
        }
        let mut count = 0;
        let row: Vec<Option<usize>> = needed
            .iter()
            .map(|&n| {
                n.then(|| {
                    count += 1;
                    count - 1
                })
            })
            .collect();
        let laws = match lesson.recipe.labels {
            Labels::Tokens => None,
            Labels::Laws => {
                let needed = (0..needed.len()).filter(|&p| needed.get(p) == Some(&true));
                let features = rows(&batch.features)?.f_index_select(0, &index(needed)?)?;
                Some(judge.get().laws(&features)?)
            }
        };
        Ok(Self {
            batch,
            judge,
            row,
            laws,
        })
    }

    /// Sum over `places` of the loss of guesses `ahead` (0 for the token after the newest),
    /// by `states` `[batch, time, dim]` there. The law at place `p + 1 + ahead` is that of
    /// token `p + 2 + ahead`.
    pub fn loss(&self, states: &Tensor, places: &[usize], ahead: usize) -> Result<Tensor> {
        let states = rows(states)?.f_index_select(0, &index(places.iter().copied())?)?;
        match &self.laws {
            Some(laws) => {
                let row = |p: &usize| self.row.get(p + 1 + ahead).copied().flatten();
                let at: Option<Vec<usize>> = places.iter().map(row).collect();
                let at = at.ok_or_else(|| {
                    Error::Input("a guess reaches beyond the end of its sequence".into())
                })?;
                let all = laws.size().first() == Some(&(at.len() as i64));
                let laws = if all {
                    laws.shallow_clone()
                } else {
                    laws.f_index_select(0, &index(at)?)?
                };
                self.judge.get().soft_loss(&states, &laws)
            }
            None => {
                // The last of a sequence has no token to compare with.
                let tokens = places.iter().map(|&p| {
                    let there = self.batch.left(p) >= ahead + 2;
                    there.then_some(p + 2 + ahead)
                });
                let known: Vec<(i64, usize)> = tokens
                    .enumerate()
                    .filter_map(|(i, t)| t.map(|t| (i as i64, t)))
                    .collect();
                let own = index(known.iter().map(|(i, _)| *i as usize))?;
                let tokens = index(known.iter().map(|(_, t)| *t))?;
                let tokens = self
                    .batch
                    .tokens
                    .f_reshape([-1])?
                    .f_index_select(0, &tokens)?;
                self.judge
                    .get()
                    .hard_loss(&states.f_index_select(0, &own)?, &tokens)
            }
        }
    }
}

/// `[batch, time, dim]` as `[batch * time, dim]`.
pub(super) fn rows(x: &Tensor) -> Result<Tensor> {
    let dim = x.size().last().copied().unwrap_or(1);
    Ok(x.f_reshape([-1, dim])?)
}

impl<'a> HeadsTask<'a> {
    /// Heads with initial weights, at the beginning of the corpus.
    pub fn new(lesson: Lesson<'a>, heads: Heads, builder: ParamBuilder) -> Self {
        Self {
            sequences: Sequences::new(lesson.corpus, lesson.recipe.seed),
            lesson,
            heads,
            builder,
        }
    }

    /// What they learn from.
    pub fn lesson(&self) -> &Lesson<'a> {
        &self.lesson
    }

    /// The heads.
    pub fn heads(&self) -> &Heads {
        &self.heads
    }
}

impl Task for HeadsTask<'_> {
    fn params(&self) -> Vec<Param> {
        self.builder.params()
    }

    fn loss(&mut self, ctx: &StepCtx) -> Result<MicroLoss> {
        let lesson = &self.lesson;
        let recipe = lesson.recipe;
        let batch = self
            .sequences
            .next_batch(lesson.corpus, recipe.batch, recipe.context, 2)?;
        let places = lesson.places(&batch, ctx.seed);
        Ok(MicroLoss {
            sum: lesson.loss(&self.heads, &batch, &places, Some(ctx.seed))?,
            targets: places.len(),
        })
    }

    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        let (table, loss) = self.lesson.measure(&self.heads, GLANCE)?;
        Ok(metrics(&table, loss))
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
