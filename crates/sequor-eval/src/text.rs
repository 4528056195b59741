//! How well a model predicts a text.
//!
//! A text that is longer than the model's context is cut into overlapping windows:
//! each starts `stride` tokens after the one before, and only tokens that no earlier
//! window scored are counted. A small stride gives every token a long context and
//! costs more; `stride = context` is the cheapest and least kind to the model.

use sequor_backbone::Decoder;
use sequor_nn::tch::{Reduction, no_grad_guard};
use sequor_nn::{Kind, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WindowOptions {
    /// Most tokens a window predicts from, at least 1.
    pub context: usize,
    /// Tokens between the starts of windows, in `1..=context`.
    pub stride: usize,
    /// Windows per forward, where the model takes several; at least 1.
    pub batch: usize,
}

impl Default for WindowOptions {
    fn default() -> Self {
        Self {
            context: 256,
            stride: 128,
            batch: 8,
        }
    }
}

impl WindowOptions {
    fn validate(&self) -> Result<()> {
        if self.context == 0 || self.batch == 0 {
            return Err(Error::Input("context and batch must be at least 1".into()));
        }
        if self.stride == 0 || self.stride > self.context {
            let what = format!(
                "stride = {} must lie in 1..={} (the context)",
                self.stride, self.context
            );
            return Err(Error::Input(what));
        }
        Ok(())
    }
}

/// A window of a text: it predicts `start + 1 ..= end` from what is before each, and
/// counts those from `from` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First token.
    pub start: usize,
    /// Last token, predicted only.
    pub end: usize,
    /// First token that counts.
    pub from: usize,
}

/// The windows of a text of `len` tokens. Every token but the first counts exactly once.
pub fn windows(len: usize, context: usize, stride: usize) -> impl Iterator<Item = Window> {
    let last = len.saturating_sub(1);
    let (context, stride) = (context.max(1), stride.max(1));
    let mut next: Option<usize> = Some(0).filter(|_| len > 1);
    let mut counted: usize = 1;
    std::iter::from_fn(move || {
        let start = next?;
        let end = start.saturating_add(context).min(last);
        let window = Window {
            start,
            end,
            from: counted,
        };
        counted = end + 1;
        next = Some(start + stride).filter(|_| end < last);
        Some(window)
    })
}

/// What a model thinks of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Likelihood {
    /// Sum of the negative log-likelihoods in nats.
    pub nats: f64,
    /// Number of tokens that were predicted.
    pub tokens: usize,
}

impl Likelihood {
    /// Mean negative log-likelihood in nats per token.
    pub fn per_token(&self) -> f64 {
        self.nats / self.tokens.max(1) as f64
    }

    /// Exponential of the mean negative log-likelihood per token.
    pub fn perplexity(&self) -> f64 {
        self.per_token().exp()
    }

    /// Bits per byte of a text of `bytes` bytes of UTF-8.
    pub fn bits_per_byte(&self, bytes: usize) -> f64 {
        self.nats / (std::f64::consts::LN_2 * bytes.max(1) as f64)
    }

    /// Adds another text.
    pub fn add(&mut self, other: Self) {
        self.nats += other.nats;
        self.tokens += other.tokens;
    }
}

/// Scores a text with any model. `nll` gets the ids of a window, `[n]`, and returns the
/// negative log-likelihoods, in nats, of all but the first given those before: `[n - 1]`.
///
/// # Errors
/// [`Error::Input`] for options out of range and results of another length, and
/// whatever `nll` returns.
pub fn score(
    tokens: &[u32],
    options: &WindowOptions,
    mut nll: impl FnMut(&[u32]) -> Result<Vec<f64>>,
) -> Result<Likelihood> {
    options.validate()?;
    let mut total = Likelihood::default();
    for w in windows(tokens.len(), options.context, options.stride) {
        let ids = &tokens[w.start..=w.end];
        let values = nll(ids)?;
        if values.len() + 1 != ids.len() {
            let what = format!(
                "a window of {} tokens needs {} likelihoods, not {}",
                ids.len(),
                ids.len() - 1,
                values.len()
            );
            return Err(Error::Input(what));
        }
        let counted = &values[w.from - w.start - 1..];
        total.add(Likelihood {
            nats: counted.iter().sum(),
            tokens: counted.len(),
        });
    }
    Ok(total)
}

/// Scores a text with a model that maps ids `[batch, time]`, int64, to logits
/// `[batch, time, vocab]`. Sums are taken in f64.
///
/// # Errors
/// [`Error::Input`] for options out of range, and whatever `logits` returns.
pub fn score_logits(
    tokens: &[u32],
    options: &WindowOptions,
    mut logits: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Likelihood> {
    options.validate()?;
    let _no_grad = no_grad_guard();
    let all: Vec<Window> = windows(tokens.len(), options.context, options.stride).collect();
    let mut total = Likelihood::default();
    // Windows of one length go together; the last one may be shorter.
    for same in all.chunk_by(|a, b| a.end - a.start == b.end - b.start) {
        for batch in same.chunks(options.batch) {
            total.add(score_batch(tokens, batch, &mut logits)?);
        }
    }
    Ok(total)
}

fn score_batch(
    tokens: &[u32],
    batch: &[Window],
    logits: &mut impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Likelihood> {
    let Some(time) = batch.first().map(|w| (w.end - w.start) as i64) else {
        return Ok(Likelihood::default());
    };
    let rows = batch.len() as i64;
    let ids = |from: usize, w: &Window| {
        tokens[w.start + from..w.end + from]
            .iter()
            .map(|&t| i64::from(t))
            .collect::<Vec<_>>()
    };
    let tensor = |from: usize| -> Result<Tensor> {
        let flat: Vec<i64> = batch.iter().flat_map(|w| ids(from, w)).collect();
        Ok(Tensor::f_from_slice(&flat)?.f_reshape([rows, time])?)
    };
    let scores = logits(&tensor(0)?)?;
    let [b, t, vocab] = scores.size()[..] else {
        return Err(Error::Input(format!(
            "logits must be [batch, time, vocab], not {:?}",
            scores.size()
        )));
    };
    if (b, t) != (rows, time) {
        return Err(Error::Input(format!(
            "logits for [{rows}, {time}] ids have the shape {:?}",
            scores.size()
        )));
    }
    let targets = tensor(1)?.f_to_device(scores.device())?.f_reshape([-1])?;
    let scores = scores.f_to_kind(Kind::Float)?.f_reshape([-1, vocab])?;
    let nll = scores.f_cross_entropy_loss::<Tensor>(&targets, None, Reduction::None, -100, 0.0)?;
    let nll = nll.f_to_kind(Kind::Double)?.f_reshape([rows, time])?;
    let mut total = Likelihood::default();
    for (row, w) in batch.iter().enumerate() {
        let (skipped, counted) = ((w.from - w.start - 1) as i64, (w.end + 1 - w.from) as i64);
        let part = nll
            .f_narrow(0, row as i64, 1)?
            .f_narrow(1, skipped, counted)?;
        total.add(Likelihood {
            nats: part.f_sum(Kind::Double)?.f_double_value(&[])?,
            tokens: counted as usize,
        });
    }
    Ok(total)
}

/// Scores a text with a decoder.
///
/// # Errors
/// [`Error::Input`] for options out of range; [`Error::Backend`] for ids outside the
/// vocabulary and windows longer than the model's context.
pub fn score_decoder(
    decoder: &Decoder,
    tokens: &[u32],
    options: &WindowOptions,
) -> Result<Likelihood> {
    score_logits(tokens, options, |ids| Ok(decoder.forward_dense(ids, 0.0)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sequor_backbone::DecoderConfig;
    use sequor_nn::{Device, ParamBuilder};

    #[test]
    fn every_token_but_the_first_counts_once() {
        for len in 0..20 {
            for context in 1..8 {
                for stride in 1..=context {
                    let mut counted = Vec::new();
                    for w in windows(len, context, stride) {
                        assert!(w.start < w.from && w.end - w.start <= context && w.end < len);
                        counted.extend(w.from..=w.end);
                    }
                    assert_eq!(
                        counted,
                        (1..len).collect::<Vec<_>>(),
                        "{len} {context} {stride}"
                    );
                }
            }
        }
        // All but the first window see at least context - stride tokens before what counts.
        assert!(
            windows(1000, 64, 16)
                .skip(1)
                .all(|w| w.from - w.start > 64 - 16)
        );
    }

    fn decoder() -> Decoder {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
            "intermediate_size": 32, "vocab_size": 20, "max_position_embeddings": 12, "initializer_range": 0.5,
        });
        let config = DecoderConfig::from_json(&config).unwrap();
        Decoder::new(&ParamBuilder::init(1, Kind::Float, Device::Cpu), &config).unwrap()
    }

    #[test]
    fn batches_of_windows_agree_with_one_at_a_time() {
        let decoder = decoder();
        let tokens: Vec<u32> = (0..45).map(|i| (i * i + 3 * i) % 20).collect();
        for (context, stride) in [(12, 12), (12, 5), (7, 1), (100, 100)] {
            let options = WindowOptions {
                context,
                stride,
                batch: 3,
            };
            let batched = score_decoder(&decoder, &tokens, &options);
            if context > 12 {
                assert!(batched.unwrap_err().to_string().contains("context"));
                continue;
            }
            let batched = batched.unwrap();
            let single = score(&tokens, &options, |window| {
                let ids: Vec<i64> = window.iter().map(|&t| t.into()).collect();
                let inputs = Tensor::from_slice(&ids[..ids.len() - 1]).unsqueeze(0);
                let logits = decoder.forward_dense(&inputs, 0.0)?;
                let logp = logits.squeeze_dim(0).log_softmax(-1, Kind::Double);
                Ok((1..ids.len())
                    .map(|i| -logp.double_value(&[i as i64 - 1, ids[i]]))
                    .collect())
            });
            let single = single.unwrap();
            assert_eq!((batched.tokens, single.tokens), (44, 44));
            assert!(
                (batched.nats - single.nats).abs() < 1e-3,
                "{} {}",
                batched.nats,
                single.nats
            );
        }
        assert!(
            score_decoder(
                &decoder,
                &[1, 99],
                &WindowOptions {
                    context: 4,
                    stride: 4,
                    batch: 1
                }
            )
            .is_err()
        );
        assert_eq!(
            score_decoder(&decoder, &[1], &WindowOptions::default())
                .unwrap()
                .tokens,
            0
        );
    }

    #[test]
    fn measures_follow_their_definitions_and_options_are_checked() {
        let l = Likelihood {
            nats: 6.0 * std::f64::consts::LN_2,
            tokens: 3,
        };
        assert!((l.perplexity() - 4.0).abs() < 1e-12);
        assert!((l.bits_per_byte(12) - 0.5).abs() < 1e-12);
        for (context, stride, batch) in [(0, 1, 1), (4, 0, 1), (4, 5, 1), (4, 4, 0)] {
            let options = WindowOptions {
                context,
                stride,
                batch,
            };
            assert!(score(&[1, 2], &options, |_| Ok(vec![0.0])).is_err());
        }
        assert!(score(&[1, 2, 3], &WindowOptions::default(), |_| Ok(vec![0.0])).is_err());
    }
}
