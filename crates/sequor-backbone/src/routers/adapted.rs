//! Models with a low-rank adapter.

use std::path::Path;

use sequor_nn::device::{DType, Weights};
use sequor_nn::lora::{Adapter, LoraConfig, LoraMerged};
use sequor_nn::weights::{self, Gguf, TensorSource};
use sequor_nn::{Device, Kind, ParamBuilder, Result};

use crate::causal_lm::read_config;
use crate::{CausalLm, Decoder, DecoderConfig, keys};

/// Loads a model as [`CausalLm::load`] does, with the adapter of a folder in the layout of
/// PEFT added to its matrices: it is as fast as without. The modules of the adapter are named
/// as in `LlamaForCausalLM` (`model.layers.0.self_attn.q_proj`), whatever the file's own names.
///
/// # Errors
/// As [`CausalLm::load`]; one error that lists everything about the adapter that does not fit.
pub fn load_adapted(
    path: &Path,
    adapter: &Path,
    weights: impl Into<Weights>,
    device: Device,
) -> Result<CausalLm> {
    let keep = weights.into();
    let config = read_config(path)?;
    let source = LoraMerged::new(open(path, &config)?, Adapter::open(adapter)?)?;
    let params = ParamBuilder::load_as(Box::new(source), keep, device)?;
    let check = params.dry_run();
    Decoder::new(&check, &config)?;
    check.finish()?;
    Ok(CausalLm::new(Decoder::new(&params, &config)?, path, keep))
}

/// Loads a model in f32 with a trainable low-rank update on every layer that `config` names.
/// The updates are the only parameters of the builder that comes with it.
///
/// # Errors
/// As [`CausalLm::load`]; [`sequor_nn::Error::Config`] when `config` is out of range or names no
/// layer of this model.
pub fn adapt(
    path: &Path,
    config: LoraConfig,
    seed: u64,
    device: Device,
) -> Result<(CausalLm, ParamBuilder)> {
    let model = read_config(path)?;
    let params = ParamBuilder::load(open(path, &model)?, Kind::Float, device);
    let check = params.dry_run();
    Decoder::new(&check, &model)?;
    check.finish()?;
    let targets = config.targets.clone();
    let params = params.with_lora(config, seed)?;
    let decoder = Decoder::new(&params, &model)?;
    if params.params().is_empty() {
        return Err(sequor_nn::Error::Config(format!(
            "{}: no layer of this model is called any of {targets:?}",
            path.display()
        )));
    }
    Ok((CausalLm::new(decoder, path, DType::F32), params))
}

/// The tensors of a model folder or GGUF file under canonical names.
fn open(path: &Path, config: &DecoderConfig) -> Result<Box<dyn TensorSource>> {
    if path.is_dir() {
        keys::canonical(weights::open(path)?, config)
    } else {
        Ok(Box::new(weights::hugging_face_names(Gguf::open(path)?)?))
    }
}
