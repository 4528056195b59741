//! Next-token prediction as a task of the training loop.

use std::collections::BTreeMap;

use sequor_backbone::{Decoder, DecoderConfig};
use sequor_data::sampler::{Cursor, WindowSampler};
use sequor_eval::text::{Likelihood, WindowOptions, score_decoder};
use sequor_nn::params::Param;
use sequor_nn::tch::Reduction;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_train::{Error, MicroLoss, Result, StepCtx, Task};
use serde_json::Value;

use super::corpus::{Corpus, HeldOut};
use super::recipe::{Dtype, LmRecipe};

/// The held-out metric that training brings down.
pub(crate) const METRIC: &str = "bits_per_byte";
/// Field of the log with the held-out loss in the unit of the training loss.
pub(crate) const HELD_OUT_LOSS: &str = "held_out_loss";

/// A decoder, the text it learns from, and the text it is measured with.
pub struct LmTask {
    builder: ParamBuilder,
    decoder: Decoder,
    sampler: WindowSampler,
    batch: usize,
    context: usize,
    dropout: f64,
    held_out: Vec<HeldOut>,
}

impl LmTask {
    /// A network with initial weights, at the beginning of its data. Takes the held-out
    /// text out of `corpus`.
    ///
    /// # Errors
    /// When the network cannot be built, or the text is shorter than one window.
    pub fn new(recipe: &LmRecipe, corpus: &mut Corpus) -> crate::Result<Self> {
        let t = &recipe.train;
        let config = DecoderConfig::from_json(
            &recipe.config_json(corpus.tokenizer.vocab_size(), corpus.end),
        )?;
        let kind = match t.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
        };
        let builder = ParamBuilder::init(t.seed, kind, Device::Cpu);
        let decoder = Decoder::new(&builder, &config)?;
        Ok(Self {
            sampler: WindowSampler::new(corpus.train.clone(), t.context, t.seed)?,
            builder,
            decoder,
            batch: t.batch,
            context: t.context,
            dropout: t.dropout,
            held_out: std::mem::take(&mut corpus.held_out),
        })
    }

    /// The network.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// How well `decoder` predicts each held-out book: name, likelihood, bytes.
    ///
    /// # Errors
    /// When a forward fails.
    pub fn measure(&self, decoder: &Decoder) -> crate::Result<Vec<(String, Likelihood, usize)>> {
        let options = WindowOptions {
            context: self.context,
            stride: self.context.div_ceil(2),
            batch: 8,
        };
        let one = |h: &HeldOut| -> sequor_eval::Result<_> {
            Ok((
                h.name.clone(),
                score_decoder(decoder, &h.tokens, &options)?,
                h.bytes,
            ))
        };
        let measured: sequor_eval::Result<Vec<_>> = self.held_out.iter().map(one).collect();
        Ok(measured.map_err(Error::task)?)
    }

    /// The sum over books, and their bytes.
    pub(crate) fn total(measured: &[(String, Likelihood, usize)]) -> (Likelihood, usize) {
        let mut sum = (Likelihood::default(), 0);
        for (_, likelihood, bytes) in measured {
            sum.0.add(*likelihood);
            sum.1 += bytes;
        }
        sum
    }
}

impl Task for LmTask {
    fn params(&self) -> Vec<Param> {
        self.builder.params()
    }

    fn loss(&mut self, _: &StepCtx) -> Result<MicroLoss> {
        let (batch, time) = (self.batch as i64, self.context as i64);
        let windows = self.sampler.next_batch(self.batch);
        let ids: Vec<i64> = windows
            .into_iter()
            .flatten()
            .map(|&id| i64::from(id))
            .collect();
        let ids = Tensor::f_from_slice(&ids)?.f_reshape([batch, time + 1])?;
        let targets = ids.f_narrow(1, 1, time)?.f_reshape([-1])?;
        let logits = self
            .decoder
            .forward_dense(&ids.f_narrow(1, 0, time)?, self.dropout)?;
        let logits = logits.f_reshape([batch * time, -1])?;
        let sum =
            logits.f_cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, -100, 0.0)?;
        Ok(MicroLoss {
            sum,
            targets: self.batch * self.context,
        })
    }

    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        let measured = self.measure(&self.decoder).map_err(Error::task)?;
        let (likelihood, bytes) = Self::total(&measured);
        let metrics = [
            (METRIC, likelihood.bits_per_byte(bytes)),
            (HELD_OUT_LOSS, likelihood.per_token()),
            ("perplexity", likelihood.perplexity()),
        ];
        Ok(metrics
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect())
    }

    fn cursor(&self) -> Value {
        serde_json::to_value(self.sampler.cursor()).unwrap_or_default()
    }

    fn set_cursor(&mut self, cursor: &Value) -> Result<()> {
        let cursor: Cursor = serde_json::from_value(cursor.clone()).map_err(Error::task)?;
        self.sampler.seek(cursor).map_err(Error::task)
    }

    fn epoch(&self) -> f64 {
        let cursor = self.sampler.cursor();
        cursor.epoch as f64 + cursor.index as f64 / self.sampler.windows_in_epoch().max(1) as f64
    }
}
