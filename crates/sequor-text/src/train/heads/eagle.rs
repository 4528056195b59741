//! EAGLE reads its own predictions when it drafts deeper than one token, so it is trained and
//! measured on them too.
//!
//! Pass 0 reads true states everywhere. Then chains begin at some positions: after a chain's
//! first position `s`, pass 1 reads at `s + 1` what pass 0 predicted there, pass 2 reads in
//! addition at `s + 2` what pass 1 predicted, and so on. One pass serves many chains; their
//! context is the true states, but for the few positions of earlier chains. (The idea of
//! training on own predictions is EAGLE-3's, Li et al. 2025; this way of doing it in plain
//! causal passes is our own.)

use sequor_backbone::heads::Heads;
use sequor_kernels::bridge;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::Tensor;
use sequor_nn::tch::Reduction;
use sequor_train::{Error, Result};

use super::accuracy::Table;
use super::data::{Batch, Row, index};
use super::task::{Lesson, Teacher, rows};

/// Part of the positions where a chain begins in training.
const CHAINS: f64 = 0.5;
/// Distance of chains when accuracies are measured.
const SPACING: usize = 16;

/// States after each pass, `[batch, time, dim]`: entry `t` of pass `j` predicts the state at
/// `t + 1`, having read its own predictions at the `j` positions up to `t` where a chain
/// began at `t - j`.
fn unroll(
    heads: &Heads,
    input: &Tensor,
    embeds: &Tensor,
    batch: &Batch,
    starts: &[bool],
    passes: usize,
    dropout: f64,
) -> Result<Vec<Tensor>> {
    let time = batch.time();
    let shape = [batch.rows.len() as i64, time as i64, 1];
    let mut input = input.shallow_clone();
    let mut states = Vec::with_capacity(passes);
    for pass in 0..passes {
        if pass > 0 {
            let own: Vec<bool> = (0..starts.len())
                .map(|p| p % time >= pass && starts.get(p - pass) == Some(&true))
                .collect();
            let own = bridge::from_slice(&own, &shape).map_err(Error::task)?;
            let predicted: &Tensor = states.last().unwrap_or(&input);
            let predicted = predicted.f_roll([1i64].as_slice(), [1i64].as_slice())?;
            input = predicted.f_where_self(&own, &input)?;
        }
        let out = heads.train_forward(&input, embeds, dropout)?;
        let out = out.into_iter().next();
        states.push(out.ok_or_else(|| Error::Input("these heads are not EAGLE's".into()))?);
    }
    Ok(states)
}

/// Places of `places` where pass `pass` reads the end of a chain.
fn ends(batch: &Batch, places: &[usize], starts: &[bool], pass: usize) -> Vec<usize> {
    let time = batch.time().max(1);
    let begun = |p: usize| pass == 0 || (p % time >= pass && starts.get(p - pass) == Some(&true));
    places.iter().copied().filter(|&p| begun(p)).collect()
}

/// Root mean square of states, which differs between models by orders of magnitude.
fn size_of(states: &Tensor) -> Result<f64> {
    let square = states.f_square()?.f_mean(states.kind())?;
    Ok(square.f_double_value(&[])?.sqrt().max(1e-6))
}

/// Distance to the true states plus cross-entropy with the target's laws, a sum over
/// `places`; deeper passes are scaled to the same number of places.
pub(super) fn loss(
    lesson: &Lesson<'_>,
    heads: &Heads,
    batch: &Batch,
    places: &[usize],
    seed: Option<u64>,
) -> Result<Tensor> {
    let recipe = lesson.recipe;
    let features = &batch.features;
    let mut random = Key::new(seed.unwrap_or_default(), 1).stream(0, Purpose::Data);
    let starts: Vec<bool> = (0..batch.rows.len() * batch.time())
        .map(|_| random.uniform() < CHAINS)
        .collect();
    let truth = index(places.iter().map(|p| p + 1))?;
    let size = size_of(&rows(features)?.f_index_select(0, &truth)?)?;
    let noisy = match seed {
        Some(_) if recipe.noise > 0.0 => {
            let noise = features.f_rand_like()?.f_sub_scalar(0.5)?;
            features.f_add(&noise.f_mul_scalar(recipe.noise * size)?)?
        }
        _ => features.shallow_clone(),
    };
    let dropout = seed.map_or(0.0, |_| recipe.dropout);
    let embeds = lesson.embeds(batch)?;
    let passes = unroll(
        heads,
        &noisy,
        &embeds,
        batch,
        &starts,
        recipe.unroll,
        dropout,
    )?;
    let teacher = Teacher::new(lesson, batch, places, 1, seed.is_some())?;
    let mut total = Tensor::f_zeros([], (features.kind(), features.device()))?;
    let dim = features.size().last().copied().unwrap_or(1).max(1) as f64;
    for (pass, states) in passes.iter().enumerate() {
        let chosen = ends(batch, places, &starts, pass);
        if chosen.is_empty() {
            continue;
        }
        let scale = places.len() as f64 / chosen.len() as f64 * lesson.weight(pass, recipe.unroll);
        let mut loss = teacher.loss(states, &chosen, 0)?;
        if recipe.state_weight > 0.0 {
            let own = rows(states)?.f_index_select(0, &index(chosen.iter().copied())?)?;
            let truth = index(chosen.iter().map(|p| p + 1))?;
            let truth = rows(features)?.f_index_select(0, &truth)?;
            let distance = own.f_smooth_l1_loss(&truth, Reduction::Sum, size)?;
            // In units of the size, and a mean over the channels.
            loss = loss.f_add(&distance.f_mul_scalar(recipe.state_weight / (size * dim))?)?;
        }
        total = total.f_add(&loss.f_mul_scalar(scale)?)?;
    }
    Ok(total)
}

/// Counts the ranks of the true tokens along chains of own predictions that begin at answers
/// of the batch, two in [`SPACING`]: every pass over a batch serves one of them.
pub(super) fn measure(
    lesson: &Lesson<'_>,
    heads: &Heads,
    batch: &Batch,
    table: &mut Table,
) -> Result<()> {
    let depth = lesson.recipe.depth;
    let time = batch.time().max(1);
    let embeds = lesson.embeds(batch)?;
    for offset in [0, SPACING / 2] {
        let chain = |p: usize| (p % time) % SPACING == offset;
        let mut begins = batch.places(2, Row::is_answer);
        begins.retain(|&p| chain(p));
        let mut starts = vec![false; batch.rows.len() * time];
        for &p in &begins {
            if let Some(start) = starts.get_mut(p) {
                *start = true;
            }
        }
        let passes = unroll(heads, &batch.features, &embeds, batch, &starts, depth, 0.0)?;
        let mut ranks: Vec<Vec<Option<usize>>> = vec![Vec::new(); begins.len()];
        for (pass, states) in passes.iter().enumerate() {
            let there = |p: &usize| batch.left(*p) >= pass + 2;
            let ends: Vec<usize> = begins
                .iter()
                .filter(|p| there(p))
                .map(|p| p + pass)
                .collect();
            let found = lesson.ranks(batch, states, &ends, 0)?;
            let open = begins.iter().zip(&mut ranks).filter(|(p, _)| there(p));
            open.zip(found).for_each(|((_, r), rank)| r.push(rank));
        }
        ranks.into_iter().for_each(|r| table.add(r));
    }
    Ok(())
}
