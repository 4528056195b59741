//! What is in a model folder or weight file, and what the loader would do with it.

use crate::Result;
use sequor_backbone::{Decoder, DecoderConfig, causal_lm, gguf, keys};
use sequor_nn::weights::{self, Gguf, TensorSource};
use sequor_nn::{Device, Kind, ParamBuilder};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// One tensor of a file.
#[derive(Clone, Debug, Serialize)]
pub struct TensorLine {
    /// Its name.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<i64>,
    /// Its number format in the file.
    pub dtype: String,
    /// Its bytes in the file.
    pub bytes: u64,
}

/// What a file or folder holds.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Every tensor, by name.
    pub tensors: Vec<TensorLine>,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of all tensors in the file.
    pub bytes: u64,
    /// Bytes and number of tensors by number format.
    pub dtypes: BTreeMap<String, (u64, usize)>,
    /// The config, as published or as read from GGUF metadata.
    pub config: Option<serde_json::Value>,
    /// What the loader would do.
    pub verdict: String,
    /// Would it load?
    pub loads: bool,
}

/// Looks at a model without reading its numbers.
///
/// # Errors
/// When there is nothing to look at or the file is damaged.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let source = weights::open(path)?;
    let mut tensors = Vec::new();
    let mut dtypes: BTreeMap<String, (u64, usize)> = BTreeMap::new();
    let (mut parameters, mut bytes) = (0u64, 0u64);
    for name in source.names() {
        let Some(info) = source.info(&name) else {
            continue;
        };
        let dtype = info.dtype.to_string();
        let entry = dtypes.entry(dtype.clone()).or_default();
        *entry = (entry.0 + info.bytes, entry.1 + 1);
        parameters += info
            .shape
            .iter()
            .map(|&d| d.unsigned_abs())
            .product::<u64>();
        bytes += info.bytes;
        tensors.push(TensorLine {
            name,
            shape: info.shape,
            dtype,
            bytes: info.bytes,
        });
    }
    let (config, plan) = plan(path, source);
    let (verdict, loads) = match plan {
        Ok(text) => (text, true),
        Err(e) => (format!("would be refused: {e}"), false),
    };
    Ok(Inspection {
        tensors,
        parameters,
        bytes,
        dtypes,
        config,
        verdict,
        loads,
    })
}

fn plan(path: &Path, source: Box<dyn TensorSource>) -> (Option<serde_json::Value>, Result<String>) {
    let is_gguf =
        source.path().extension().is_some_and(|e| e == "gguf") || Gguf::open(source.path()).is_ok();
    let json = if is_gguf {
        Gguf::open(source.path()).and_then(|g| gguf::to_json(&g))
    } else if path.is_dir() {
        causal_lm::read_json(&path.join("config.json"))
    } else {
        Err(sequor_nn::Error::Config("a single weight file has no config; the loader needs a folder with config.json, or a GGUF file".into()))
    };
    let json = match json {
        Ok(json) => json,
        Err(e) => return (None, Err(e.into())),
    };
    let outcome = (|| -> Result<String> {
        let config = DecoderConfig::from_json(&json)?;
        let source: Box<dyn TensorSource> = if is_gguf {
            let file = Gguf::open(source.path())?;
            Box::new(weights::hugging_face_names(file)?)
        } else {
            keys::canonical(source, &config)?
        };
        let params = ParamBuilder::load(source, Kind::Float, Device::Cpu).dry_run();
        let decoder = Decoder::new(&params, &config)?;
        params.finish()?;
        let f32_bytes = decoder.bytes_per_token() as u64;
        Ok(format!(
            "loads as {} ({} layers, width {}, {} heads, {} key/value heads, vocabulary {}, context {}{}); \
             one token reads {:.0} MB in f32, {:.0} MB in bf16 or f16",
            config.family.architecture(),
            config.layers,
            config.dim,
            config.heads,
            config.kv_heads,
            config.vocab_size,
            config.context,
            if config.tied { ", tied head" } else { "" },
            f32_bytes as f64 / 1e6,
            f32_bytes as f64 / 2e6,
        ))
    })();
    (Some(json), outcome)
}
