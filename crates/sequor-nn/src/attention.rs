//! Self-attention, and the ways its rows may see each other.
//!
//! [`SelfAttention`] projects rows to queries, keys and values. Who sees whom, and
//! where earlier rows are kept, is the business of an [`Attend`]: a dense batch for
//! training, cached slots for generation. The layer does not know which.

use crate::kv::KvCache;
use crate::linear::{Joined, Linear};
use crate::mask::Mask;
use crate::matrix::kernels_take;
use crate::norm::{Norm, NormKind};
use crate::rope::RopeTables;
use crate::{Error, Init, ParamBuilder, Result};
use sequor_kernels::fused::{self, Seen};
use sequor_kernels::matmul::Isa;
use sequor_kernels::{bridge, threads};
use tch::{Device, Kind, Tensor};

/// Sizes and options of a self-attention layer.
#[derive(Clone, Debug)]
pub struct AttentionConfig {
    /// Width of the rows.
    pub dim: i64,
    /// Query heads.
    pub heads: i64,
    /// Key/value heads; divides `heads` (grouped-query attention).
    pub kv_heads: i64,
    /// Channels per head.
    pub head_dim: i64,
    /// Do the query, key and value projections have biases?
    pub qkv_bias: bool,
    /// Does the output projection have a bias?
    pub out_bias: bool,
    /// RMS norm over each head's query and key before rotation, with this epsilon.
    pub qk_norm: Option<f64>,
    /// Sliding window: how many keys a row sees, itself included.
    pub window: Option<i64>,
    /// Factor on the scores; `1/sqrt(head_dim)` when absent.
    pub scale: Option<f64>,
    /// Law of the input projections.
    pub init: Init,
    /// Law of the output projection.
    pub out_init: Init,
}

/// What an [`Attend`] is told about the layer that calls it.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Number of the layer, for its own rows of the state.
    pub layer: usize,
    /// Sliding window.
    pub window: Option<i64>,
    /// Factor on the scores.
    pub scale: f64,
}

/// Decides which rows see which, and keeps earlier rows.
pub trait Attend {
    /// `q`: `[rows, heads, head_dim]`, `k`, `v`: `[rows, kv_heads, head_dim]`, all f32 and
    /// rotated; gives `[rows, heads * head_dim]`.
    ///
    /// # Errors
    /// When the rows do not fit what was announced.
    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// Rotation, keeping of keys and values, and attention in one step, from the joint
    /// projections; gives `[rows, heads * head_dim]`, or `None` where there is no such step, and
    /// then has done nothing.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    fn attend_jointly(&mut self, call: Call, rows: &JointRows<'_>) -> Result<Option<Tensor>> {
        let _ = (call, rows);
        Ok(None)
    }
}

/// Queries, keys and values as they come out of the joint projection.
#[derive(Clone, Copy, Debug)]
pub struct JointRows<'a> {
    /// `[rows, (heads + 2 kv_heads) * head_dim]` f32: queries, keys, values; not rotated.
    pub qkv: &'a Tensor,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// How queries and keys are rotated, when the network does that.
    pub rope: Option<&'a RopeTables>,
}

/// A dense batch of equally long sequences without state: training and reference runs.
#[derive(Debug)]
pub struct Dense {
    batch: i64,
    time: i64,
    mask: Mask,
    window: Option<(i64, Tensor)>,
    plain: Option<Tensor>,
}

impl Dense {
    /// Rows are `batch` sequences of `time` rows each, one after the other, seeing each
    /// other by `mask`.
    pub fn new(batch: i64, time: i64, mask: Mask) -> Self {
        Self {
            batch,
            time,
            mask,
            window: None,
            plain: None,
        }
    }

    fn additive(&mut self, window: Option<i64>, like: &Tensor) -> Result<Tensor> {
        let positions: Vec<i64> = (0..self.time).collect();
        let make = |m: &Mask| m.additive(&positions, &positions, like.device());
        match window {
            None => {
                if self.plain.is_none() {
                    self.plain = Some(make(&self.mask)?);
                }
            }
            Some(size) if self.window.as_ref().is_none_or(|(s, _)| *s != size) => {
                self.window = Some((size, make(&(self.mask.clone() & Mask::Window { size }))?));
            }
            Some(_) => {}
        }
        let found = if window.is_none() {
            self.plain.as_ref()
        } else {
            self.window.as_ref().map(|(_, m)| m)
        };
        found
            .map(Tensor::shallow_clone)
            .ok_or_else(|| Error::Input("no mask was made".into()))
    }
}

impl Attend for Dense {
    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (b, t) = (self.batch, self.time);
        let window = call.window.filter(|w| *w < t);
        let causal = self.mask == Mask::Causal && window.is_none();
        let mask = if causal || (self.mask == Mask::Full && window.is_none()) {
            None
        } else {
            Some(self.additive(window, q)?)
        };
        let split = |x: &Tensor| -> Result<Tensor> {
            let [_, h, d] = x.size()[..] else {
                return Err(Error::Input(
                    "attention rows must be [rows, heads, head_dim]".into(),
                ));
            };
            Ok(x.f_reshape([b, t, h, d])?.f_transpose(1, 2)?)
        };
        let out = Tensor::f_scaled_dot_product_attention(
            &split(q)?,
            &split(k)?,
            &split(v)?,
            mask.as_ref(),
            0.0,
            causal,
            call.scale,
            q.size().get(1) != k.size().get(1),
        )?;
        Ok(out.f_transpose(1, 2)?.f_reshape([b * t, -1])?)
    }
}

/// Attention of `q` `[rows, heads, head_dim]` over `keys` and `values`
/// `[kv_heads, columns, head_dim]` of one sequence, under an additive mask
/// `[rows, columns]` or a causal one; gives `[rows, heads * head_dim]`.
///
/// # Errors
/// When shapes do not fit.
pub fn over(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    call: Call,
) -> Result<Tensor> {
    let rows = q.size().first().copied().unwrap_or(0);
    let out = Tensor::f_scaled_dot_product_attention(
        &q.f_transpose(0, 1)?.f_unsqueeze(0)?,
        &keys.f_unsqueeze(0)?,
        &values.f_unsqueeze(0)?,
        mask,
        0.0,
        causal,
        call.scale,
        q.size().get(1) != keys.size().first(),
    )?;
    Ok(out
        .f_squeeze_dim(0)?
        .f_transpose(0, 1)?
        .f_reshape([rows, -1])?)
}

/// Rows of several slots of a [`KvCache`], one span after the other.
#[derive(Debug)]
pub struct Cached<'a> {
    cache: &'a mut KvCache,
    /// Slot and number of rows of each span.
    spans: Vec<(usize, i64)>,
    /// Masks already made in this forward: span, window, mask.
    masks: Vec<(usize, Option<i64>, Option<Tensor>)>,
    /// The same as lists of columns, for our own kernel: span, window, columns of each row.
    seen: Vec<(usize, Option<i64>, Vec<Seen>)>,
}

impl<'a> Cached<'a> {
    /// The slots must have been announced by [`KvCache::begin`].
    pub fn new(cache: &'a mut KvCache, slots: &[usize]) -> Self {
        let spans = slots
            .iter()
            .map(|&s| (s, cache.pending_len(s) as i64))
            .collect();
        Self {
            cache,
            spans,
            masks: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// The cache, for rows of other kinds that join these in a layer.
    pub fn cache(&mut self) -> &mut KvCache {
        self.cache
    }

    fn mask(&mut self, span: usize, slot: usize, window: Option<i64>) -> Result<Option<Tensor>> {
        if let Some((.., m)) = self
            .masks
            .iter()
            .find(|(s, w, _)| (*s, *w) == (span, window))
        {
            return Ok(m.as_ref().map(Tensor::shallow_clone));
        }
        let made = self.cache.mask(slot, window)?;
        self.masks
            .push((span, window, made.as_ref().map(Tensor::shallow_clone)));
        Ok(made)
    }
}

/// Most rows of a span that our own kernel takes. It goes row by row, each in the same order
/// of sums; libtorch's shares work between many rows.
const MOST_ROWS: i64 = 64;

impl Cached<'_> {
    /// Writes the keys and values of one span and attends, on host memory.
    fn span_on_host(
        &mut self,
        span: usize,
        call: Call,
        rows: &JointRows<'_>,
        qkv: &[f32],
        start: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let JointRows {
            heads,
            kv_heads,
            head_dim,
            rope,
            ..
        } = *rows;
        let (slot, count) = self.spans[span];
        let (count, width) = (count as usize, (heads + 2 * kv_heads) * head_dim);
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for row in start..start + count {
            let all = &qkv[row * width..(row + 1) * width];
            let (queries, rest) = all.split_at(heads * head_dim);
            let (keys, values) = rest.split_at(kv_heads * head_dim);
            let (new_q, new_k) = (q.len(), k.len());
            q.extend_from_slice(queries);
            k.extend_from_slice(keys);
            v.extend_from_slice(values);
            if let Some(rope) = rope {
                rope.rotate_row(row, &mut q[new_q..], head_dim);
                rope.rotate_row(row, &mut k[new_k..], head_dim);
            }
        }
        self.cache.append_slices(slot, call.layer, &k, &v)?;
        let out = &mut out[start * heads * head_dim..(start + count) * heads * head_dim];
        self.attend_span(span, call, &q, heads, out)
    }

    /// Attention of one span, whose keys and values are in the cache.
    fn attend_span(
        &mut self,
        span: usize,
        call: Call,
        q: &[f32],
        heads: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let slot = self.spans[span].0;
        let known = |(s, w, _): &&(usize, Option<i64>, Vec<Seen>)| (*s, *w) == (span, call.window);
        if self.seen.iter().find(known).is_none() {
            let made = self.cache.seen(slot, call.window)?;
            self.seen.push((span, call.window, made));
        }
        let seen = self
            .seen
            .iter()
            .find(known)
            .map_or(&[][..], |(.., seen)| seen);
        self.cache.lend(slot, call.layer, |cache| {
            let (threads, isa) = (threads::get(), Isa::chosen());
            fused::attend(q, heads, cache, seen, call.scale as f32, out, threads, isa);
        })
    }

    /// Does our own kernel take these rows of a span?
    fn kernel_takes(&self, span: usize, call: Call, x: &Tensor) -> Result<bool> {
        let (slot, rows) = self.spans[span];
        Ok(rows <= MOST_ROWS
            && kernels_take(x)
            && self.cache.shape().device == Device::Cpu
            && self.cache.is_whole(slot, call.layer)?)
    }
}

impl Attend for Cached<'_> {
    fn attend_jointly(&mut self, call: Call, rows: &JointRows<'_>) -> Result<Option<Tensor>> {
        let JointRows {
            qkv,
            heads,
            kv_heads,
            head_dim,
            rope,
        } = *rows;
        let total: i64 = self.spans.iter().map(|(_, n)| n).sum();
        let shape = self.cache.shape();
        let fits = qkv.size() == [total, ((heads + 2 * kv_heads) * head_dim) as i64]
            && (shape.kv_heads, shape.head_dim) == (kv_heads as i64, head_dim as i64)
            && rope.is_none_or(|r| r.size().0 == total as usize && r.size().1 <= head_dim);
        if !fits {
            return Ok(None);
        }
        for span in 0..self.spans.len() {
            if !self.kernel_takes(span, call, qkv)? {
                return Ok(None);
            }
        }
        let qkv = qkv.f_contiguous()?;
        let size = [total, (heads * head_dim) as i64];
        let (out, done) = bridge::read(&qkv, |qkv: &[f32]| {
            bridge::build(&size, |out: &mut [f32]| {
                let mut start = 0;
                for span in 0..self.spans.len() {
                    self.span_on_host(span, call, rows, qkv, start, out)?;
                    start += self.spans[span].1 as usize;
                }
                Ok::<(), Error>(())
            })
        })??;
        done?;
        Ok(Some(out))
    }

    fn attend(&mut self, call: Call, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let mut outs = Vec::with_capacity(self.spans.len());
        let mut start = 0;
        for span in 0..self.spans.len() {
            let (slot, rows) = self.spans[span];
            let part = |x: &Tensor| x.f_narrow(0, start, rows);
            self.cache.append(slot, call.layer, &part(k)?, &part(v)?)?;
            if self.kernel_takes(span, call, q)? {
                let [_, heads, width] = q.size()[..] else {
                    return Err(Error::Input(
                        "attention rows must be [rows, heads, head_dim]".into(),
                    ));
                };
                let shape = self.cache.shape();
                if width != shape.head_dim || heads < 1 || heads % shape.kv_heads != 0 {
                    return Err(Error::Input(format!(
                        "{heads} query heads of {width} channels for a state of {} key/value heads of {}",
                        shape.kv_heads, shape.head_dim
                    )));
                }
                let q = part(q)?.f_contiguous()?;
                let size = [rows, heads * width];
                let (out, done) = bridge::read(&q, |q: &[f32]| {
                    bridge::build(&size, |out: &mut [f32]| {
                        self.attend_span(span, call, q, heads as usize, out)
                    })
                })??;
                done?;
                outs.push(out);
                start += rows;
                continue;
            }
            let (keys, values) = self.cache.view(slot, call.layer)?;
            let fresh = keys.size()[1] == rows; // nothing committed: plain causal needs no mask
            let causal = fresh
                && rows > 1
                && call.window.is_none_or(|w| w >= rows)
                && self.cache.is_chain(slot);
            let mask = if causal {
                None
            } else {
                self.mask(span, slot, call.window)?
            };
            outs.push(over(
                &part(q)?,
                &keys,
                &values,
                mask.as_ref(),
                causal,
                call,
            )?);
            start += rows;
        }
        match &outs[..] {
            [only] => Ok(only.shallow_clone()),
            _ => Ok(Tensor::f_cat(&outs, 0)?),
        }
    }
}

/// Multi-head self-attention with grouped queries.
#[derive(Debug)]
pub struct SelfAttention {
    config: AttentionConfig,
    qkv: Joined,
    out: Linear,
    norms: Option<(Norm, Norm)>,
    scale: f64,
}

impl SelfAttention {
    /// Parameters `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` when asked for.
    ///
    /// # Errors
    /// [`Error::Config`] when the heads do not divide.
    pub fn new(p: &ParamBuilder, config: AttentionConfig) -> Result<Self> {
        let c = &config;
        if c.heads <= 0 || c.kv_heads <= 0 || c.head_dim <= 0 || c.heads % c.kv_heads != 0 {
            return Err(Error::Config(format!(
                "{} query heads cannot share {} key/value heads of {} channels",
                c.heads, c.kv_heads, c.head_dim
            )));
        }
        let project = |name: &str, heads: i64| {
            Linear::new(&p.pp(name), c.dim, heads * c.head_dim, c.qkv_bias, c.init)
        };
        let parts = vec![
            project("q_proj", c.heads)?,
            project("k_proj", c.kv_heads)?,
            project("v_proj", c.kv_heads)?,
        ];
        let out = Linear::new(
            &p.pp("o_proj"),
            c.heads * c.head_dim,
            c.dim,
            c.out_bias,
            c.out_init,
        )?
        .packed(p)?;
        let norm = |name: &str, eps| Norm::new(&p.pp(name), NormKind::Rms, c.head_dim, eps);
        let norms = c
            .qk_norm
            .map(|eps| Ok::<_, Error>((norm("q_norm", eps)?, norm("k_norm", eps)?)))
            .transpose()?;
        let scale = c
            .scale
            .unwrap_or_else(|| (c.head_dim as f64).sqrt().recip());
        Ok(Self {
            qkv: Joined::new(parts, p)?,
            out,
            norms,
            scale,
            config,
        })
    }

    /// `x`: `[rows, dim]`; gives `[rows, dim]`.
    ///
    /// # Errors
    /// When shapes do not fit, or `attend` refuses.
    pub fn forward(
        &self,
        x: &Tensor,
        layer: usize,
        rope: Option<&RopeTables>,
        attend: &mut dyn Attend,
    ) -> Result<Tensor> {
        let c = &self.config;
        let rows = x.size()[0];
        let call = Call {
            layer,
            window: c.window,
            scale: self.scale,
        };
        let qkv = self.qkv.forward(x)?;
        if self.norms.is_none() {
            let joint = JointRows {
                qkv: &qkv,
                heads: c.heads as usize,
                kv_heads: c.kv_heads as usize,
                head_dim: c.head_dim as usize,
                rope,
            };
            if let Some(attended) = attend.attend_jointly(call, &joint)? {
                return self.out.forward(&attended);
            }
        }
        let qkv = qkv.f_reshape([rows, c.heads + 2 * c.kv_heads, c.head_dim])?;
        let heads = |x: &Tensor, from: i64, n: i64| x.f_narrow(1, from, n);
        let v = heads(&qkv, c.heads + c.kv_heads, c.kv_heads)?;
        let (mut q, mut k);
        match &self.norms {
            Some((qn, kn)) => {
                (q, k) = (
                    qn.forward(&heads(&qkv, 0, c.heads)?)?,
                    kn.forward(&heads(&qkv, c.heads, c.kv_heads)?)?,
                );
                if let Some(r) = rope {
                    (q, k) = (r.apply(&q)?, r.apply(&k)?);
                }
            }
            None => {
                // Queries and keys are rotated together: half the calls.
                let mut qk = heads(&qkv, 0, c.heads + c.kv_heads)?;
                if let Some(r) = rope {
                    qk = r.apply(&qk)?;
                }
                (q, k) = (heads(&qk, 0, c.heads)?, heads(&qk, c.heads, c.kv_heads)?);
            }
        }
        debug_assert_eq!(q.kind(), Kind::Float);
        self.out.forward(&attend.attend(call, &q, &k, &v)?)
    }

    /// The norms of queries and keys, where it has them.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.norms.iter().flat_map(|(q, k)| [q, k])
    }

    /// Bytes of weights that one pass reads.
    pub fn bytes(&self) -> usize {
        self.qkv.bytes() + self.out.bytes()
    }
}
