//! A model's reference forward on named tensors, as reference cases name them.

use crate::{Error, Result};
use sequor_backbone::CausalLm;
use sequor_nn::device::DType;
use sequor_nn::{Device, Tensor, tch};
use std::collections::BTreeMap;
use std::path::Path;

/// Runs the model in `dir` in f32 on the CPU.
///
/// Decoders take `input_ids` `[batch, time]` (integers) and give `logits`
/// `[batch, time, vocab]`.
///
/// # Errors
/// When the model does not load, an input is missing, or a value lies outside its range.
pub fn forward(dir: &Path, inputs: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    let ids = inputs.get("input_ids").ok_or_else(|| {
        let names: Vec<&str> = inputs.keys().map(String::as_str).collect();
        Error::Input(format!(
            "the inputs hold no tensor input_ids [batch, time] (they hold: {})",
            names.join(", ")
        ))
    })?;
    if ids.is_floating_point() {
        return Err(Error::Input(format!(
            "input_ids must be integers, not {:?}",
            ids.kind()
        )));
    }
    let model = CausalLm::load(dir, DType::F32, Device::Cpu)?;
    let _no_grad = tch::no_grad_guard();
    let logits = model.decoder().forward_dense(ids, 0.0)?;
    Ok(BTreeMap::from([("logits".to_owned(), logits)]))
}
