//! Multi-scale residual quantisation: one picture as index maps of growing size.

mod features;
mod phi;

pub use features::Features;

use crate::codebook::Codebook;
use crate::config::{Distance, Learning, Restart, finite, matrix, probability, size};
use crate::estimator::straight_through;
use crate::layout::{channels_first, channels_last};
use crate::math::mse;
use crate::quantizer::{Encoded, Quantizer, StageLoss, Trained, total};
use crate::rows::{Indices, Rows};
use crate::vector::VqConfig;
use crate::{Error, Result};
use phi::Phi;
use sequor_kernels::rng::Key;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::{Kind, ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of a [`MultiScaleVq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MultiScaleVqConfig {
    /// Number of channels. Must be given.
    pub dim: i64,
    /// Number of codes. Must be given.
    pub codebook_size: i64,
    /// Sides of the index maps, growing; the last is the side of the feature map. Must be
    /// given: `[1, 2, 3, 4, 5, 6, 8, 10, 13, 16]` in VAR for 256 x 256 pixels.
    pub scales: Vec<i64>,
    /// Number of shared convolutions after up-sampling; 0 for none. Default: 4.
    pub num_convolutions: u32,
    /// How much of a convolution's output is mixed in, in `[0, 1]`. Default: 0.5.
    pub convolution_ratio: f64,
    /// What "nearest" means; [`Distance::Direction`] is VAR's `using_znorm`. Default:
    /// Euclidean.
    pub distance: Distance,
    /// Weight of `mse(f, sg(f_hat))`. Default: 0.25.
    pub commitment_weight: f64,
    /// Weight of `mse(f_hat, sg(f))`. Default: 1.
    pub codebook_weight: f64,
    /// Restart of dead codes. Default: none.
    pub restart: Option<Restart>,
}

impl Default for MultiScaleVqConfig {
    fn default() -> Self {
        Self {
            dim: 0,
            codebook_size: 0,
            scales: Vec::new(),
            num_convolutions: 4,
            convolution_ratio: 0.5,
            distance: Distance::default(),
            commitment_weight: 0.25,
            codebook_weight: 1.0,
            restart: None,
        }
    }
}

/// A side or number of convolutions beyond this is a mistake in a configuration.
const LARGEST_SIDE: i64 = 4096;

impl MultiScaleVqConfig {
    /// The defaults for `dim` channels, `codebook_size` codes and these scales.
    #[must_use]
    pub fn new(dim: i64, codebook_size: i64, scales: &[i64]) -> Self {
        Self {
            dim,
            codebook_size,
            scales: scales.to_vec(),
            ..Self::default()
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        size("dim", self.dim)?;
        size("codebook_size", self.codebook_size)?;
        matrix("codebook_size", self.codebook_size, self.dim)?;
        matrix("dim", self.dim, self.dim.saturating_mul(9))?;
        let growing = self.scales.windows(2).all(|w| w.first() <= w.last());
        let in_range = |&s: &i64| (1..=LARGEST_SIDE).contains(&s);
        if self.scales.is_empty() || !growing || !self.scales.iter().all(in_range) {
            return Err(Error::config(
                "scales",
                &self.scales,
                format!(
                    "give sides from 1 to {LARGEST_SIDE} that do not shrink, for example [1, 2, 4]"
                ),
            ));
        }
        if i64::from(self.num_convolutions) > LARGEST_SIDE {
            return Err(Error::config(
                "num_convolutions",
                self.num_convolutions,
                "there are never more than scales",
            ));
        }
        probability("convolution_ratio", self.convolution_ratio)?;
        finite("commitment_weight", self.commitment_weight)?;
        finite("codebook_weight", self.codebook_weight)?;
        self.restart.iter().try_for_each(Restart::validate)
    }

    fn codebook(&self) -> VqConfig {
        VqConfig {
            distance: self.distance,
            learning: Learning::Gradient,
            restart: self.restart,
            ..VqConfig::new(self.dim, self.codebook_size)
        }
    }
}

/// Multi-scale residual vector quantisation (Tian et al., "Visual autoregressive modeling",
/// 2024, algorithms 1 and 2).
///
/// At each scale `p` the rest of the feature map is averaged down to `p x p`, quantised,
/// blown up (bicubic), smoothed by one of the shared convolutions, and subtracted:
/// `f_hat += phi(up(code))`, `rest = f - f_hat`.
///
/// As a [`Quantizer`], `z` is `[batch, side, side, dim]` and indices are `[batch, tokens]`:
/// the maps of all scales one after the other, each row by row
/// ([`split`](Self::split) takes them apart). [`Quantizer::decode`] takes the first scales
/// alone, too. Generators build the feature map scale by scale with [`Features`].
///
/// Parameters: `codebook.weight` `[codes, dim]`, `phi.{i}.{weight,bias}`
/// `[dim, dim, 3, 3]`, `[dim]`.
#[derive(Debug)]
pub struct MultiScaleVq {
    config: MultiScaleVqConfig,
    codebook: Codebook,
    phi: Phi,
}

impl MultiScaleVq {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`] for a field out of range; when a file cannot be read.
    pub fn new(p: &ParamBuilder, config: &MultiScaleVqConfig) -> Result<Self> {
        config.validate()?;
        let convolutions = config.num_convolutions as usize;
        Ok(Self {
            codebook: Codebook::new(&p.pp("codebook"), &config.codebook())?,
            phi: Phi::new(
                &p.pp("phi"),
                config.dim,
                convolutions,
                config.scales.len(),
                config.convolution_ratio,
            )?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &MultiScaleVqConfig {
        &self.config
    }

    /// The table of codes.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// Sides of the index maps.
    pub fn scales(&self) -> &[i64] {
        &self.config.scales
    }

    /// Side of the feature map.
    pub fn side(&self) -> i64 {
        self.config.scales.last().copied().unwrap_or(1)
    }

    /// Tokens of all scales together.
    pub fn tokens(&self) -> i64 {
        self.config.scales.iter().map(|s| s * s).sum()
    }

    /// Joined indices `[batch, tokens]`, of all scales or the first ones, as maps
    /// `[batch, p * p]`.
    ///
    /// # Errors
    /// [`Error::Input`] when the number of tokens is not that of some first scales.
    pub fn split(&self, indices: &Tensor) -> Result<Vec<Tensor>> {
        let shape = if indices.defined() {
            indices.size()
        } else {
            Vec::new()
        };
        let (mut maps, mut start) = (Vec::new(), 0);
        if let [_, tokens] = shape[..] {
            for area in self.config.scales.iter().map(|s| s * s) {
                if start + area > tokens {
                    break;
                }
                maps.push(indices.f_narrow(1, start, area)?);
                start += area;
            }
            if start == tokens && tokens > 0 {
                return Ok(maps);
            }
        }
        Err(Error::Input(format!(
            "the indices have the shape {shape:?}: it must be [batch, tokens] with the tokens of \
             the first or of all scales {:?} ({} in all)",
            self.config.scales,
            self.tokens()
        )))
    }

    /// The inputs of a next-scale predictor that is taught with the true indices
    /// `[batch, tokens]`: for each scale but the first, the features so far averaged down to
    /// it. `[batch, tokens - p_1^2, dim]`; tokens of scales that are not predicted (the last
    /// ones, when only the first scales are given) are left out.
    ///
    /// # Errors
    /// As [`split`](Self::split), and when an index does not exist.
    pub fn predictor_inputs(&self, indices: &Tensor) -> Result<Tensor> {
        let maps = self.split(indices)?;
        let mut features = self.features(batch_of(indices));
        let mut inputs = Vec::new();
        for map in maps.iter().take(maps.len() - 1) {
            features.add(self, map)?;
            inputs.extend(features.next_input(self)?);
        }
        if inputs.is_empty() {
            let (batch, dim) = (batch_of(indices), self.config.dim);
            let like = (Kind::Float, indices.device());
            return Ok(Tensor::f_zeros([batch, 0, dim], like)?);
        }
        Ok(Tensor::f_cat(&inputs, 1)?)
    }

    /// An empty feature map for `batch` pictures.
    #[must_use]
    pub fn features(&self, batch: i64) -> Features {
        Features::new(batch)
    }

    /// `[batch, dim, side, side]` averaged down to the side of scale `scale`.
    fn down(&self, f: &Tensor, scale: usize) -> Result<Tensor> {
        let side = self.side_of(scale)?;
        if side == self.side() {
            return Ok(f.shallow_clone());
        }
        Ok(f.f_adaptive_avg_pool2d([side, side])?)
    }

    /// What vectors `[batch, dim, p, p]` at scale `scale` add to the features.
    fn contribution(&self, vectors: &Tensor, scale: usize) -> Result<Tensor> {
        let side = self.side();
        let large = if self.side_of(scale)? == side {
            vectors.shallow_clone()
        } else {
            vectors.f_upsample_bicubic2d([side, side], false, None, None)?
        };
        self.phi.apply(&large, scale)
    }

    fn side_of(&self, scale: usize) -> Result<i64> {
        let side = self.config.scales.get(scale).copied();
        side.ok_or_else(|| {
            Error::Input(format!(
                "there is no scale {scale}: this quantiser has the scales {:?}",
                self.config.scales
            ))
        })
    }

    /// The nearest codes of `[batch, dim, p, p]`: rows as they were compared, indices
    /// `[batch, p * p]` and their vectors `[batch, dim, p, p]`.
    fn nearest(&self, z: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let last = channels_last(z)?;
        let rows = last.f_reshape([-1, self.config.dim])?;
        let rows = self.codebook.comparable(&rows)?;
        let index = self.codebook.nearest(&rows)?;
        let vectors = self.codebook.rows(&index)?.f_reshape(last.size())?;
        let index = index.f_reshape([batch_of(z), -1])?;
        Ok((rows, index, channels_first(&vectors)?))
    }

    /// `z` `[batch, side, side, dim]` as `[batch, dim, side, side]`, f32.
    fn picture(&self, z: &Tensor) -> Result<(Rows, Tensor)> {
        let rows = Rows::new(z, self.config.dim)?;
        let (side, shape) = (self.side(), z.size());
        if !matches!(shape[..], [_, h, w, _] if h == side && w == side) {
            return Err(Error::Input(format!(
                "z has the shape {shape:?}: expected [batch, {side}, {side}, {}] \
                 (channels_last brings the channels there)",
                self.config.dim
            )));
        }
        let f = channels_first(&rows.flat.f_reshape(shape)?)?.f_contiguous()?;
        Ok((rows, f))
    }

    fn vectors(&self, rows: &Rows, f: &Tensor) -> Result<Tensor> {
        rows.vectors(&channels_last(f)?.f_reshape([-1, self.config.dim])?)
    }
}

fn batch_of(t: &Tensor) -> i64 {
    t.size().first().copied().unwrap_or(0)
}

impl Quantizer for MultiScaleVq {
    fn dim(&self) -> i64 {
        self.config.dim
    }

    fn codebook_size(&self) -> i64 {
        self.config.codebook_size
    }

    /// Empty: all scales share one codebook.
    fn index_shape(&self) -> Vec<i64> {
        Vec::new()
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        let _no_grad = no_grad_guard();
        let (rows, f) = self.picture(z)?;
        let (mut rest, mut f_hat) = (f.shallow_clone(), f.f_zeros_like()?);
        let mut indices = Vec::new();
        for scale in 0..self.config.scales.len() {
            let (_, index, vectors) = self.nearest(&self.down(&rest, scale)?)?;
            let h = self.contribution(&vectors, scale)?;
            f_hat = f_hat.f_add(&h)?;
            rest = rest.f_sub(&h)?;
            indices.push(index);
        }
        Ok(Encoded {
            indices: Tensor::f_cat(&indices, 1)?,
            quantized: self.vectors(&rows, &f_hat)?,
        })
    }

    /// `[batch, tokens, dim]`.
    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let i = Indices::new(indices, &[], 0, self.config.codebook_size)?;
        i.restore(&self.codebook.rows(&i.flat)?)
    }

    /// `[batch, side, side, dim]`.
    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let mut features = self.features(batch_of_indices(indices));
        for map in self.split(indices)? {
            features.add(self, &map)?;
        }
        match features.map() {
            Some(map) => channels_last(map),
            None => Err(Error::Input("there is no index to look up".into())),
        }
    }

    /// The loss is the mean over scales of `commitment_weight mse(f, sg(f_hat))` and
    /// `codebook_weight mse(f_hat, sg(f))`, `f_hat` being the sum up to the scale.
    fn train(&mut self, z: &Tensor, key: Key) -> Result<Trained> {
        let (rows, f) = self.picture(z)?;
        let still = f.f_detach()?;
        let (mut rest, mut f_hat) = (still.shallow_clone(), still.f_zeros_like()?);
        let (mut indices, mut inputs, mut stages) = (Vec::new(), Vec::new(), Vec::new());
        let scales = self.config.scales.len();
        let weights = [self.config.commitment_weight, self.config.codebook_weight];
        let [commitment, codebook] = weights.map(|w| w / scales as f64);
        for scale in 0..scales {
            let small = self.down(&rest, scale)?;
            if scale == 0 {
                let first = channels_last(&small)?.f_reshape([-1, self.config.dim])?;
                self.codebook.prepare(&first, key)?;
            }
            let (input, index, vectors) = self.nearest(&small)?;
            let h = self.contribution(&vectors, scale)?;
            f_hat = f_hat.f_add(&h)?;
            rest = rest.f_sub(&h.f_detach()?)?;
            stages.push(StageLoss {
                commitment: Some(mse(&f, &f_hat.f_detach()?)?.f_mul_scalar(commitment)?),
                codebook: Some(mse(&f_hat, &still)?.f_mul_scalar(codebook)?),
                entropy: None,
            });
            inputs.push(input);
            indices.push(index);
        }
        let indices = Tensor::f_cat(&indices, 1)?;
        let quantized = straight_through(&f, &f_hat)?;
        let mut restarted = 0;
        if self.config.restart.is_some() {
            let inputs = Tensor::f_cat(&inputs, 0)?;
            // Counting does not depend on the order of the rows.
            self.codebook.update(&inputs, &indices.f_flatten(0, -1)?)?;
            restarted = self.codebook.restart(&inputs, key)?;
        }
        Ok(Trained {
            indices,
            quantized: self.vectors(&rows, &quantized)?,
            loss: total(&stages, &quantized)?,
            stages,
            restarted,
        })
    }
}

fn batch_of_indices(indices: &Tensor) -> i64 {
    if indices.defined() {
        batch_of(indices)
    } else {
        0
    }
}
