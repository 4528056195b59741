//! Runs reference cases through the library code that users call.
//!
//! A case is a folder: `case.json` (class, names and shapes of inputs and outputs,
//! tolerances), `config.json`, `inputs.safetensors`, weights where the case has a
//! network, and `expected.safetensors`. [`run`] computes the outputs without looking
//! at the expected ones.

#![forbid(unsafe_code)]

mod decoding;
mod heads;
mod quantizers;

use sequor_nn::weights::{Safetensors, TensorSource};
use sequor_nn::{Kind, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The snippets of the repository's README, compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;

/// Outputs of a case by name.
pub type Outputs = BTreeMap<String, Tensor>;

/// Any failure, as text.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The class of a case, if this workspace supports it.
pub fn supported(case: &Value) -> bool {
    let class = case["class"].as_str().unwrap_or("");
    is_decoder(class)
        || decoding::CLASSES.contains(&class)
        || heads::CLASSES.contains(&class)
        || quantizers::CLASSES.contains(&class)
}

fn is_decoder(class: &str) -> bool {
    let config = serde_json::json!({ "architectures": [class] });
    // An unknown architecture is refused before any field is looked at.
    !matches!(
        sequor_backbone::DecoderConfig::from_json(&config),
        Err(sequor_nn::Error::Unsupported(_))
    )
}

/// Reads `case.json` of a case folder.
///
/// # Errors
/// When the file is absent or damaged.
pub fn read_case(dir: &Path) -> Result<Value> {
    Ok(sequor_backbone::causal_lm::read_json(
        &dir.join("case.json"),
    )?)
}

/// Computes the outputs of a case.
///
/// # Errors
/// When the class is not supported or the library refuses.
pub fn run(dir: &Path) -> Result<Outputs> {
    let case = read_case(dir)?;
    let class = case["class"].as_str().ok_or("case.json has no class")?;
    let inputs = load_all(&dir.join("inputs.safetensors"))?;
    if is_decoder(class) {
        return Ok(sequor_text::forward(dir, &inputs)?);
    }
    if heads::CLASSES.contains(&class) {
        return heads::run(class, dir, &inputs);
    }
    if quantizers::CLASSES.contains(&class) {
        return quantizers::run(class, dir, &inputs);
    }
    // Options of a case without a network stand in its config.
    let mut options = sequor_backbone::causal_lm::read_json(&dir.join("config.json"))?;
    if let (Some(options), Some(case)) = (options.as_object_mut(), case.as_object()) {
        options.extend(case.clone());
    }
    decoding::run(class, &options, &inputs)
}

/// All tensors of a safetensors file.
///
/// # Errors
/// When it cannot be read.
pub fn load_all(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let file = Safetensors::open(path)?;
    file.names()
        .into_iter()
        .map(|n| Ok((n.clone(), file.load(&n)?)))
        .collect()
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(sequor_kernels::bridge::to_vec(&t.f_to_kind(Kind::Double)?)?)
}

/// Compares outputs with expected ones: integers equal, floats within
/// `atol + rtol * |expected|`. Gives one line per tensor that is missing or differs.
///
/// # Errors
/// When a file cannot be read.
pub fn compare(dir: &Path, outputs: &Outputs) -> Result<Vec<String>> {
    let case = read_case(dir)?;
    let (atol, rtol) = (
        case["atol"].as_f64().unwrap_or(0.0),
        case["rtol"].as_f64().unwrap_or(0.0),
    );
    let mut problems = Vec::new();
    for (name, expected) in load_all(&dir.join("expected.safetensors"))? {
        let Some(found) = outputs.get(&name) else {
            problems.push(format!("{name}: missing"));
            continue;
        };
        if found.size() != expected.size() {
            problems.push(format!(
                "{name}: shape {:?}, expected {:?}",
                found.size(),
                expected.size()
            ));
            continue;
        }
        let (found, wanted) = (numbers(found)?, numbers(&expected)?);
        let exact = !expected.is_floating_point();
        let differences = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs());
        let allowed = |b: &f64| if exact { 0.0 } else { atol + rtol * b.abs() };
        // Written so that NaN is a difference, too.
        let agree = differences
            .clone()
            .zip(&wanted)
            .all(|(d, b)| d <= allowed(b));
        if !agree {
            problems.push(format!(
                "{name}: differs by up to {:.3e}",
                differences.fold(0.0, f64::max)
            ));
        }
    }
    Ok(problems)
}

/// The folders that hold cases: the repository's own, and a folder of further
/// reference data beside the checkout when there is one.
pub fn case_folders() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for root in [here.join("parity"), here.join("../../shared/parity")] {
        let Ok(entries) = std::fs::read_dir(root) else {
            continue;
        };
        found.extend(
            entries
                .flatten()
                .map(|e| e.path())
                .filter(|p| p.join("case.json").is_file()),
        );
    }
    found.sort();
    found
}
