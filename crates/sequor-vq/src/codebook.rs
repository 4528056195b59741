//! A table of codes: where it is kept, what an index stands for, and how it learns.
//!
//! Parameters (f32, whatever the format of the model's matrices):
//!
//! | learning | average | tensors |
//! |---|---|---|
//! | gradient | | `weight` `[codes, dim]`, trainable |
//! | EMA | Laplace | `embed` `[codes, dim]`, `embed_avg` (running sums) `[codes, dim]`, `cluster_size` (running counts) `[codes]` |
//! | EMA | floor | `embed_avg`, `cluster_size` |
//!
//! With k-means also `inited` `[1]`, and with restart of a gradient codebook
//! `cluster_size`. What is not trained by gradients is listed by
//! [`ParamBuilder::params`] nevertheless, so that it is saved with the model; such tensors do
//! not require gradients, and an optimizer leaves them out. A file for inference may lack
//! `embed_avg`, `cluster_size` and `inited` where they are not needed for codes.

use crate::config::{Average, Distance, Learning, Threshold};
use crate::kmeans::{draw_rows, kmeans};
use crate::math::unit;
use crate::search::{Search, counts, sums};
use crate::vector::VqConfig;
use crate::{Error, Result};
use sequor_kernels::bridge;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Init, ParamBuilder, Tensor};
use std::cell::RefCell;

/// A table of codes.
#[derive(Debug)]
pub struct Codebook {
    config: VqConfig,
    /// The codes as stored, unless they are a quotient of the statistics.
    table: Option<Tensor>,
    sums: Option<Tensor>,
    counts: Option<Tensor>,
    inited: Option<Tensor>,
    /// Have the statistics been looked at, and do the codes come from data or a file?
    ready: bool,
    /// The arranged table, kept between calls where only this type can change it.
    search: RefCell<Option<Search>>,
    keeps_search: bool,
}

impl Codebook {
    /// `config` has been validated; of it the codebook's own fields are used.
    pub(crate) fn new(p: &ParamBuilder, config: &VqConfig) -> Result<Self> {
        let (size, dim) = (config.codebook_size, config.code_dim());
        let matrix = [size, dim];
        let buffer = |name: &str, shape: &[i64], init: Init| -> Result<Tensor> {
            // The builder's own handle of the tensor stops asking for gradients as well.
            Ok(p.vector(name, shape, init)?.f_set_requires_grad(false)?)
        };
        // Statistics are for training; a published file may come without.
        let inference = p.may_join();
        let wanted = |name: &str| !inference || p.has(name);
        let law = Init::Normal((dim as f64).sqrt().recip());
        let ema = config.learning == Learning::Ema;
        let quotient = ema && config.average == Average::Floor;
        let table = match config.learning {
            Learning::Gradient => Some(p.vector("weight", &matrix, law)?),
            Learning::Ema if quotient => None,
            Learning::Ema => Some(buffer("embed", &matrix, law)?),
        };
        let sums = match ema {
            true if quotient => Some(buffer("embed_avg", &matrix, law)?),
            true if wanted("embed_avg") => Some(buffer("embed_avg", &matrix, Init::Zeros)?),
            _ => None,
        };
        let counts = match ema || config.restart.is_some() {
            true if quotient => Some(buffer("cluster_size", &[size], Init::Ones)?),
            true if wanted("cluster_size") => Some(buffer("cluster_size", &[size], Init::Zeros)?),
            _ => None,
        };
        let inited = if config.kmeans.is_some() && wanted("inited") {
            Some(buffer("inited", &[1], Init::Zeros)?)
        } else {
            // Some publishers store the flag whether or not it is used.
            p.ignore("inited");
            None
        };
        Ok(Self {
            config: config.clone(),
            table,
            sums,
            counts,
            inited,
            ready: false,
            search: RefCell::new(None),
            keeps_search: inference,
        })
    }

    /// Number of codes.
    pub fn size(&self) -> i64 {
        self.config.codebook_size
    }

    /// Length of the codes.
    pub fn dim(&self) -> i64 {
        self.config.code_dim()
    }

    /// The vectors that the indices stand for, `[codes, dim]`: unit ones with
    /// [`Distance::Cosine`]. Differentiable where the codebook learns by gradient.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn codes(&self) -> Result<Tensor> {
        self.meant(&match (&self.table, &self.sums, &self.counts) {
            (Some(table), _, _) => table.shallow_clone(),
            (None, Some(sums), Some(counts)) => self.quotient(sums, counts)?,
            _ => return Err(incomplete("codes")),
        })
    }

    /// Running counts of the vectors that chose each code, `[codes]`, per training step;
    /// `None` where none are kept.
    pub fn counts(&self) -> Option<&Tensor> {
        self.counts.as_ref()
    }

    /// Running sums of the vectors that chose each code, `[codes, dim]`; `None` where none
    /// are kept.
    pub fn sums(&self) -> Option<&Tensor> {
        self.sums.as_ref()
    }

    /// The codes of `index` `[rows]`: `[rows, dim]`, differentiable as
    /// [`codes`](Self::codes). `index` must lie within the codebook.
    pub(crate) fn rows(&self, index: &Tensor) -> Result<Tensor> {
        let pick = |t: &Tensor| t.f_index_select(0, index);
        self.meant(&match (&self.table, &self.sums, &self.counts) {
            (Some(table), _, _) => pick(table)?,
            (None, Some(sums), Some(counts)) => self.quotient(&pick(sums)?, &pick(counts)?)?,
            _ => return Err(incomplete("codes")),
        })
    }

    fn meant(&self, stored: &Tensor) -> Result<Tensor> {
        match self.config.distance {
            Distance::Cosine => unit(stored),
            Distance::Euclidean | Distance::Direction => Ok(stored.shallow_clone()),
        }
    }

    fn quotient(&self, sums: &Tensor, counts: &Tensor) -> Result<Tensor> {
        let counts = counts.f_clamp_min(self.config.eps)?.f_unsqueeze(1)?;
        Ok(sums.f_div(&counts)?)
    }

    /// `x` `[rows, dim]` as codes are compared with it: unit rows with
    /// [`Distance::Cosine`].
    pub(crate) fn comparable(&self, x: &Tensor) -> Result<Tensor> {
        self.meant(x)
    }

    /// The nearest codes of `x` `[rows, dim]`, which is [`comparable`](Self::comparable).
    pub(crate) fn nearest(&self, x: &Tensor) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let directed = self.config.distance == Distance::Direction;
        let x = if directed {
            unit(&x.f_detach()?)?
        } else {
            x.f_detach()?
        };
        let kept = self.search.borrow_mut().take();
        let search = match kept {
            Some(search) => search,
            None if directed => Search::new(&unit(&self.codes()?)?)?,
            None => Search::new(&self.codes()?)?,
        };
        let index = search.nearest(&x);
        if self.keeps_search {
            *self.search.borrow_mut() = Some(search);
        }
        index
    }

    /// What must be done once before the codes of a training pass over `x`
    /// ([`comparable`](Self::comparable) rows) are chosen: first codes by k-means, or first
    /// statistics for codes that came without. Gives whether the codes were made here.
    pub(crate) fn prepare(&mut self, x: &Tensor, key: Key) -> Result<bool> {
        if self.ready {
            return Ok(false);
        }
        let _no_grad = no_grad_guard();
        self.complete()?;
        let fresh = match (&mut self.inited, self.config.kmeans) {
            (Some(inited), Some(iterations)) if inited.f_double_value(&[0])? == 0.0 => {
                let sphere = self.config.distance == Distance::Cosine;
                let found = kmeans(x, self.config.codebook_size, iterations, sphere, key)?;
                if let Some(table) = &mut self.table {
                    table.f_copy_(&found.centres)?;
                }
                if let Some(counts) = &mut self.counts {
                    // A quotient needs a count even for a centre without vectors.
                    let least = if self.table.is_none() { 1.0 } else { 0.0 };
                    counts.f_copy_(&found.sizes.f_clamp_min(least)?)?;
                }
                if let (Some(sums), Some(counts)) = (&mut self.sums, &self.counts) {
                    sums.f_copy_(&found.centres.f_mul(&counts.f_unsqueeze(1)?)?)?;
                }
                let _ = inited.f_fill_(1.0)?;
                true
            }
            _ => {
                self.seed_statistics()?;
                false
            }
        };
        self.forget_search();
        self.ready = true;
        Ok(fresh)
    }

    /// Are the statistics there that training needs?
    fn complete(&self) -> Result<()> {
        let ema = self.config.learning == Learning::Ema;
        if ema && self.sums.is_none() {
            return Err(incomplete("embed_avg"));
        }
        if (ema || self.config.restart.is_some()) && self.counts.is_none() {
            return Err(incomplete("cluster_size"));
        }
        Ok(())
    }

    /// Codes without statistics are given one vector each, namely themselves.
    fn seed_statistics(&mut self) -> Result<()> {
        let (Some(table), Some(counts)) = (&self.table, &mut self.counts) else {
            return Ok(());
        };
        if counts.f_sum(None)?.f_double_value(&[])? != 0.0 {
            return Ok(());
        }
        let _ = counts.f_fill_(1.0)?;
        if let Some(sums) = &mut self.sums {
            sums.f_copy_(table)?;
        }
        Ok(())
    }

    /// Takes in a pass: `x` `[rows, dim]` ([`comparable`](Self::comparable)) chose `index`.
    ///
    /// `n <- d n + (1-d) count`, `s <- d s + (1-d) sum`, and the codes from both.
    pub(crate) fn update(&mut self, x: &Tensor, index: &Tensor) -> Result<()> {
        let _no_grad = no_grad_guard();
        let (size, decay) = (self.config.codebook_size, self.config.decay);
        let x = x.f_detach()?;
        let running = |old: &mut Tensor, new: Tensor| -> Result<()> {
            let _ = old.f_mul_scalar_(decay)?;
            let _ = old.f_add_(&new.f_mul_scalar(1.0 - decay)?)?;
            Ok(())
        };
        let Some(n) = &mut self.counts else {
            return Ok(());
        };
        running(n, counts(index, size)?)?;
        if let Some(s) = &mut self.sums {
            running(s, sums(&x, index, size)?)?;
            if let Some(table) = &mut self.table {
                let eps = self.config.eps;
                let total = n.f_sum(None)?;
                let share = n
                    .f_add_scalar(eps)?
                    .f_div(&total.f_add_scalar(size as f64 * eps)?)?;
                let smooth = share.f_mul(&total)?.f_unsqueeze(1)?;
                let mut codes = s.f_div(&smooth)?;
                if self.config.distance == Distance::Cosine {
                    codes = unit(&codes)?;
                }
                table.f_copy_(&codes)?;
            }
        }
        self.forget_search();
        Ok(())
    }

    /// Moves dead codes to random rows of `x`, when this step is one to look at. Gives how
    /// many were moved.
    pub(crate) fn restart(&mut self, x: &Tensor, key: Key) -> Result<usize> {
        let Some(restart) = self.config.restart else {
            return Ok(0);
        };
        let Some(n) = &mut self.counts else {
            return Ok(0);
        };
        if !key.request.is_multiple_of(restart.every.max(1)) {
            return Ok(0);
        }
        let _no_grad = no_grad_guard();
        let mean = n.f_mean(None)?.f_double_value(&[])?;
        let least = match restart.threshold {
            Threshold::MeanFraction(f) => f * mean,
            Threshold::Count(c) => c,
        };
        let dead = n.f_lt(least)?.f_nonzero()?.f_flatten(0, -1)?;
        let moved = dead.numel();
        if moved == 0 {
            return Ok(0);
        }
        let x = x.f_detach()?;
        let rows = x.size().first().copied().unwrap_or(0);
        let mut stream = key.stream(0, Purpose::Data);
        let chosen = draw_rows(&mut stream, rows, moved as i64);
        let chosen = bridge::from_slice(&chosen, &[moved as i64])?.f_to_device(x.device())?;
        let codes = x.f_index_select(0, &chosen)?;
        let count = mean.max(least);
        let _ = n.f_index_fill_(0, &dead, count)?;
        if let Some(s) = &mut self.sums {
            let _ = s.f_index_copy_(0, &dead, &codes.f_mul_scalar(count)?)?;
        }
        if let Some(table) = &mut self.table {
            let _ = table.f_index_copy_(0, &dead, &codes)?;
        }
        self.forget_search();
        Ok(moved)
    }

    fn forget_search(&mut self) {
        *self.search.get_mut() = None;
    }
}

fn incomplete(what: &str) -> Error {
    Error::Input(format!(
        "the codebook was loaded from a file without `{what}`, which training needs: load a \
         training checkpoint, or set `learning` to gradient without restart"
    ))
}
