//! `sequor forward`.

use crate::args::Forward;
use crate::exit::{Result, failure};
use sequor_nn::Tensor;
use sequor_nn::weights::{self, TensorSource};
use std::collections::BTreeMap;

/// Runs a model's reference forward from file to file.
pub fn run(a: &Forward) -> Result {
    let source = weights::Safetensors::open(&a.inputs).map_err(failure)?;
    let mut inputs: BTreeMap<String, Tensor> = BTreeMap::new();
    for name in source.names() {
        let tensor = source.load(&name).map_err(failure)?;
        inputs.insert(name, tensor);
    }
    let outputs = sequor_text::forward(&a.model, &inputs)?;
    let list: Vec<(&str, &Tensor)> = outputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    weights::write_safetensors(&a.outputs, &list, &BTreeMap::new()).map_err(failure)?;
    for (name, tensor) in list {
        println!("{name} {:?} -> {}", tensor.size(), a.outputs.display());
    }
    Ok(())
}
