//! Where heads begin: the best linear guess.
//!
//! Learning by gradient alone spends most of its time on what a linear map could say: how the
//! target's next states follow from its present one and from the tokens in between. That map
//! has a closed form. For `v` = (state `h_n`, embeddings of `x_{n+1}, .., x_{n+1+i}`), head `i`
//! begins at the ridge regression of `h_{n+1+i} - h_n` on `v`, cut to the rank of its residual
//! matrices by the largest directions of what it predicts (reduced-rank regression, Izenman
//! 1975); EAGLE's projection at the regression of `h_{n+1}` on (embedding of `x_{n+1}`,
//! `h_n`). The nonlinear parts begin at zero as before. One pass over the corpus gives all
//! second moments. (Our own choice; the papers train for days instead.)

use std::collections::BTreeMap;

use sequor_backbone::heads::HeadsKind;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Device, Kind, Tensor};
use sequor_train::{Error, Result, Task};

use super::data::{Batch, Row, index};
use super::task::{HeadsTask, Lesson, rows};

/// Positions that the moments come from, about.
const POSITIONS: usize = 120_000;
/// Sequences per batch, and most positions of each.
const BATCH: usize = 16;
const CONTEXT: usize = 1024;
/// Ridge, as a share of the mean second moment.
const RIDGE: f64 = 1e-3;

/// Second moments, all f64: of the inputs with a one behind them, and with every target.
struct Moments {
    /// `[inputs + 1, inputs + 1]`.
    inputs: Tensor,
    /// For each depth `[inputs + 1, dim]`.
    targets: Vec<Tensor>,
}

/// Sets the linear parts of the heads in training.
///
/// # Errors
/// When the corpus cannot be read or its moments are not finite.
pub(super) fn begin(task: &HeadsTask<'_>) -> Result<()> {
    let _no_grad = no_grad_guard();
    let lesson = task.lesson();
    let config = task.heads().config();
    let (dim, kind) = (config.hidden_size, config.kind);
    let params: BTreeMap<String, Tensor> = task
        .params()
        .into_iter()
        .map(|p| (p.name, p.tensor))
        .collect();
    let set = |name: String, value: &Tensor| -> Result<()> {
        let param = params.get(&name);
        let param = param.ok_or_else(|| Error::Input(format!("heads without {name}")))?;
        param.shallow_clone().f_copy_(value)?;
        Ok(())
    };
    if kind == HeadsKind::Eagle {
        let moments = moments(lesson, 1, 1)?;
        let (map, bias) = moments.solve(0, dim * 2)?;
        // The projection reads the embedding first.
        let turned = map.f_roll([dim].as_slice(), [0i64].as_slice())?;
        set("fc.weight".into(), &turned.f_t_copy()?)?;
        if params.contains_key("fc.bias") {
            set("fc.bias".into(), &bias)?;
        }
        return Ok(());
    }
    let Some(rank) = config.rank else {
        return Ok(());
    };
    let path = if kind == HeadsKind::Medusa {
        0
    } else {
        config.heads
    };
    let moments = moments(lesson, path, config.heads)?;
    for i in 0..config.heads {
        let inputs = if path == 0 { dim } else { dim * (i as i64 + 2) };
        let (map, bias) = moments.solve(i, inputs)?;
        let (down, up) = moments.cut(&map, rank)?;
        let name = |part: &str| format!("heads.{i}.blocks.0.{part}");
        set(name("residual_down.weight"), &down)?;
        set(name("residual_up.weight"), &up)?;
        set(name("residual_up.bias"), &bias)?;
    }
    Ok(())
}

/// Moments of (state, embeddings of the next `path` tokens) with the next `depth` states. For
/// heads these are differences to the present state, for EAGLE (`depth` and `path` 1) the
/// states themselves.
fn moments(lesson: &Lesson<'_>, path: usize, depth: usize) -> Result<Moments> {
    let eagle = lesson.recipe.kind == HeadsKind::Eagle;
    let ahead = path.max(depth);
    let (mut inputs, mut targets, mut seen) = (None, Vec::new(), 0);
    let learned: Vec<usize> = (0..lesson.corpus.sequences())
        .filter(|i| lesson.held_out.binary_search(i).is_err())
        .collect();
    for numbers in learned.chunks(BATCH) {
        let parts = numbers
            .iter()
            .map(|&i| Ok((lesson.corpus.read(i).map_err(Error::task)?, 0)));
        let batch = Batch::new(&parts.collect::<Result<Vec<_>>>()?, CONTEXT)?;
        let wanted = |row: &Row, n: usize| row.is_regular(n) && row.is_answer(n);
        let places = batch.places(ahead, wanted);
        if places.is_empty() {
            continue;
        }
        let at = |x: &Tensor, ahead: usize| -> Result<Tensor> {
            Ok(rows(x)?.f_index_select(0, &index(places.iter().map(|p| p + ahead))?)?)
        };
        let state = at(&batch.features, 0)?;
        let embeds = lesson.embeds(&batch)?;
        let mut columns = vec![state.shallow_clone()];
        for i in 1..=path {
            columns.push(at(&embeds, i)?);
        }
        columns.push(Tensor::f_ones(
            [places.len() as i64, 1],
            (Kind::Float, Device::Cpu),
        )?);
        let v = Tensor::f_cat(&columns, 1)?;
        let turned = v.f_t_copy()?;
        let add = |sum: Option<Tensor>, part: Tensor| -> Result<Tensor> {
            let part = part.f_to_kind(Kind::Double)?;
            Ok(match sum {
                Some(sum) => sum.f_add(&part)?,
                None => part,
            })
        };
        inputs = Some(add(inputs, turned.f_matmul(&v)?)?);
        for i in 0..depth {
            let next = at(&batch.features, i + 1)?;
            let y = if eagle { next } else { next.f_sub(&state)? };
            let sum = if i < targets.len() {
                Some(targets.remove(i))
            } else {
                None
            };
            targets.insert(i, add(sum, turned.f_matmul(&y)?)?);
        }
        seen += places.len();
        if seen >= POSITIONS {
            break;
        }
    }
    let inputs: Option<Tensor> = inputs;
    match inputs {
        Some(inputs) if inputs.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0 => {
            Ok(Moments { inputs, targets })
        }
        Some(_) => Err(Error::Input(
            "the corpus has states that are not finite numbers; make it again".into(),
        )),
        None => Err(Error::Input(
            "the corpus has no answer long enough to learn from; make a larger one".into(),
        )),
    }
}

impl Moments {
    /// The ridge regression of target `depth` on the first `inputs` inputs: a map
    /// `[inputs, dim]` and a bias `[dim]`, f64.
    fn solve(&self, depth: usize, inputs: i64) -> Result<(Tensor, Tensor)> {
        let all = self.inputs.size().first().copied().unwrap_or(1);
        let chosen: Vec<i64> = (0..inputs).chain([all - 1]).collect();
        let chosen = Tensor::f_from_slice(&chosen)?;
        let a = self
            .inputs
            .f_index_select(0, &chosen)?
            .f_index_select(1, &chosen)?;
        let target = self.targets.get(depth);
        let target = target.ok_or_else(|| Error::Input(format!("no moments at depth {depth}")))?;
        let ridge = a
            .f_diagonal(0, 0, 1)?
            .f_mean(Kind::Double)?
            .f_double_value(&[])?
            * RIDGE;
        let eye = Tensor::f_eye(inputs + 1, (Kind::Double, Device::Cpu))?;
        let a = a.f_add(&eye.f_mul_scalar(ridge.max(1e-12))?)?;
        let solved = Tensor::f_linalg_solve(&a, &target.f_index_select(0, &chosen)?, true)?;
        Ok((solved.f_narrow(0, 0, inputs)?, solved.f_select(0, inputs)?))
    }

    /// `map` `[inputs, dim]` as a product of rank `rank`, with the least loss in what it
    /// predicts: `[rank, inputs]` and `[dim, rank]`, the factors of its transpose.
    fn cut(&self, map: &Tensor, rank: i64) -> Result<(Tensor, Tensor)> {
        let inputs = map.size().first().copied().unwrap_or(0);
        let moments = self.inputs.f_narrow(0, 0, inputs)?.f_narrow(1, 0, inputs)?;
        let predicted = map.f_t_copy()?.f_matmul(&moments)?.f_matmul(map)?;
        // Ascending: the last directions carry most.
        let (_, directions) = predicted.f_linalg_eigh("L")?;
        let dim = directions.size().last().copied().unwrap_or(0);
        let kept = rank.min(dim);
        let up = directions.f_narrow(1, dim - kept, kept)?;
        let down = map.f_matmul(&up)?.f_t_copy()?;
        // A rank above the width leaves rows over.
        let spare = rank - kept;
        Ok((
            down.f_constant_pad_nd([0, 0, 0, spare])?,
            up.f_constant_pad_nd([0, spare])?,
        ))
    }
}
