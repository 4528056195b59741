//! The folder of trained heads.

use std::collections::BTreeMap;
use std::path::Path;

use sequor_backbone::heads::{Heads, HeadsConfig};
use sequor_nn::params::Param;
use sequor_nn::weights::{self, write_safetensors};
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};

use crate::train::lm::put_json;
use crate::{Error, Result};

/// What says that a folder of heads is complete.
pub(super) const CONFIG: &str = "heads.json";
const WEIGHTS: &str = "heads.safetensors";
/// Name of the drafted tokens' ids among the tensors.
const DRAFT_TOKENS: &str = "d2t";

/// Writes the weights in bf16. The config of heads that lay there before is removed first and
/// the new one written last ([`write_config`]), so that a folder with a config is whole.
pub(super) fn write_weights(out: &Path, params: &[Param], tokens: Option<&[u32]>) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
    let config = out.join(CONFIG);
    match std::fs::remove_file(&config) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(config, e)),
        _ => {}
    }
    let mut tensors: Vec<(&str, Tensor)> = Vec::with_capacity(params.len() + 1);
    for p in params {
        let rounded = p
            .tensor
            .f_detach()
            .and_then(|t| t.f_to_kind(Kind::BFloat16));
        tensors.push((&p.name, rounded.map_err(sequor_nn::Error::from)?));
    }
    if let Some(tokens) = tokens {
        let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
        let ids = Tensor::f_from_slice(&ids).map_err(sequor_nn::Error::from)?;
        tensors.push((DRAFT_TOKENS, ids));
    }
    let borrowed: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&out.join(WEIGHTS), &borrowed, &metadata)?;
    Ok(())
}

/// The heads as they were written, in f32.
pub(super) fn read_weights(out: &Path, config: &HeadsConfig) -> Result<Heads> {
    let source = weights::open(&out.join(WEIGHTS))?;
    let params = ParamBuilder::load(source, Kind::Float, Device::Cpu);
    let heads = Heads::new(&params, config)?;
    params.finish()?;
    Ok(heads)
}

/// Writes `heads.json`.
pub(super) fn write_config(out: &Path, config: &HeadsConfig) -> Result<()> {
    let json = serde_json::to_value(config)
        .map_err(|e| Error::Config(format!("{CONFIG} cannot be written: {e}")))?;
    put_json(&out.join(CONFIG), &json)
}

/// Bytes of the weights as they are stored.
pub(super) fn size(out: &Path) -> Result<u64> {
    let path = out.join(WEIGHTS);
    let meta = std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
    Ok(meta.len())
}
