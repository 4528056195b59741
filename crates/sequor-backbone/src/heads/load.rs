//! Reading folders of draft heads: ours and the published ones.

use super::config::{Base, HeadsConfig, HeadsKind, LayerConfig};
use super::network::Heads;
use crate::causal_lm::{CausalLm, read_json};
use crate::config::DecoderConfig;
use sequor_nn::device::DType;
use sequor_nn::weights::{self, NewTensor, Renamed, TensorSource};
use sequor_nn::{Device, Error, Kind, ParamBuilder, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The tensor that names the target id of each draft id.
const DRAFT_TOKENS: &str = "d2t";

/// A folder that was recognised: its config and its tensors under our names.
struct Folder {
    config: HeadsConfig,
    source: Box<dyn TensorSource>,
    /// Does `d2t` hold distances (target id minus draft id) instead of target ids?
    relative: bool,
}

impl Heads {
    /// Loads draft heads for `target`, with matrices in `dtype`.
    ///
    /// The folder is one of
    /// * ours: `heads.json` and `heads.safetensors`;
    /// * Medusa as published: `medusa_lm_head.{safetensors,pt}`. The numbers of heads and
    ///   blocks are counted from the tensors: published configs are often wrong about them;
    /// * Hydra and Hydra++ as published: `hydra_lm_head.{safetensors,pt}` (one block stored
    ///   under several indices is read once per index). The prefix layer of Hydra++ has the
    ///   sizes of the target's own layers;
    /// * EAGLE as published: `config.json` and weights with `fc` and `layers.0`. Its copy of
    ///   the token embedding is not read, the target's is used. EAGLE-3 is not supported.
    ///
    /// Where `d2t` restricts drafts to a part of the vocabulary, our folders hold target ids
    /// and published ones the distance from draft id to target id.
    ///
    /// # Errors
    /// When the heads were made for another model (the message says for which), when nothing
    /// known is in the folder, and one error that names every tensor that does not fit.
    pub fn load(path: &Path, dtype: DType, device: Device, target: &CausalLm) -> Result<Self> {
        let Folder {
            config,
            source,
            relative,
        } = open(path, target)?;
        let draft_tokens = match config.draft_vocab_size {
            Some(n) => Some(read_draft_tokens(&*source, n, config.vocab_size, relative)?),
            None => None,
        };
        let params = ParamBuilder::load(source, dtype.kind(), device);
        // Compare names and shapes first: nothing is allocated for a file that does not fit.
        let check = params.dry_run();
        Self::new(&check, &config)?;
        check.finish()?;
        let mut heads = Self::new(&params, &config)?;
        if let Some(tokens) = draft_tokens {
            heads.set_draft_tokens(tokens, target.decoder().head())?;
        }
        Ok(heads)
    }
}

/// Reads `heads.json`, whatever kind of networks lies beside it.
///
/// # Errors
/// When the file is absent or damaged, or a field is out of range.
pub fn read_config(path: &Path) -> Result<HeadsConfig> {
    let file = path.join("heads.json");
    let config: HeadsConfig = serde_json::from_value(read_json(&file)?)
        .map_err(|e| Error::weights(&file, format!("is not a config of draft heads: {e}")))?;
    config
        .validate()
        .map_err(|e| Error::weights(&file, e.to_string()))?;
    Ok(config)
}

fn open(path: &Path, target: &CausalLm) -> Result<Folder> {
    if !path.is_dir() {
        return Err(Error::weights(
            path,
            "is not a folder; draft heads are a folder with heads.json, or one as published by Medusa, Hydra or EAGLE",
        ));
    }
    if path.join("heads.json").is_file() {
        let config = read_config(path)?;
        check_base(path, &config, target)?;
        return Ok(Folder {
            source: weights::open(&path.join("heads.safetensors"))?,
            config,
            relative: false,
        });
    }
    let named = |stem: &str| -> Option<PathBuf> {
        ["safetensors", "pt"]
            .iter()
            .map(|end| path.join(format!("{stem}.{end}")))
            .find(|file| file.is_file())
    };
    if let Some(file) = named("medusa_lm_head") {
        return medusa(path, &file, target);
    }
    if let Some(file) = named("hydra_lm_head") {
        return hydra(path, &file, target);
    }
    if !path.join("config.json").is_file() {
        return Err(Error::weights(
            path,
            "holds no draft heads: neither heads.json, medusa_lm_head.*, hydra_lm_head.* nor an EAGLE layer with config.json",
        ));
    }
    eagle(path, target)
}

/// Refuses heads that were made for another model.
fn check_base(path: &Path, c: &HeadsConfig, target: &CausalLm) -> Result<()> {
    let (width, vocab) = (target.config().embed_dim, target.config().vocab_size);
    let fingerprint = target.fingerprint()?;
    let stranger = !c.base.fingerprint.is_empty() && c.base.fingerprint != fingerprint;
    if (c.hidden_size, c.vocab_size) == (width, vocab) && !stranger {
        return Ok(());
    }
    let named = |name: &str, alternative: &str| {
        if name.is_empty() {
            alternative.to_owned()
        } else {
            format!("'{name}'")
        }
    };
    Err(Error::weights(
        path,
        format!(
            "these {} heads were made for {} (fingerprint {}, states of {}, {} tokens), and the model {} is another (fingerprint {fingerprint}, states of {width}, {vocab} tokens): load the model that they were made for, or heads made for this one",
            c.kind.name(),
            named(&c.base.name, "a model that they do not name"),
            named(&c.base.fingerprint, "unknown"),
            c.hidden_size,
            c.vocab_size,
            target.source().display(),
        ),
    ))
}

/// The ids behind `d2t`, checked.
fn read_draft_tokens(
    source: &dyn TensorSource,
    expected: i64,
    vocab: i64,
    relative: bool,
) -> Result<Vec<u32>> {
    let bad =
        |what: String| Error::weights(source.path(), format!("tensor '{DRAFT_TOKENS}' {what}"));
    let tensor = source.load(DRAFT_TOKENS)?;
    if tensor.size() != [expected] {
        return Err(bad(format!(
            "has shape {:?} where draft_vocab_size is {expected}",
            tensor.size()
        )));
    }
    let ids: Vec<i64> = sequor_kernels::bridge::to_vec(&tensor.f_to_kind(Kind::Int64)?)
        .map_err(|e| bad(e.to_string()))?;
    let mut seen = BTreeSet::new();
    ids.into_iter()
        .enumerate()
        .map(|(draft, id)| {
            let id = if relative {
                id.saturating_add(draft as i64)
            } else {
                id
            };
            match u32::try_from(id) {
                Ok(token) if id < vocab && seen.insert(token) => Ok(token),
                Ok(token) if id < vocab => Err(bad(format!("names token {token} twice"))),
                _ => Err(bad(format!(
                    "maps draft id {draft} to token {id}, outside the vocabulary of {vocab}"
                ))),
            }
        })
        .collect()
}

/// A config with everything that published folders share.
fn published(
    kind: HeadsKind,
    path: &Path,
    [vocab_size, hidden_size]: [i64; 2],
) -> Result<HeadsConfig> {
    let file = path.join("config.json");
    let json = if file.is_file() {
        read_json(&file)?
    } else {
        Value::Null
    };
    let name = ["base_model_name_or_path", "_name_or_path"]
        .iter()
        .find_map(|key| json.get(key).and_then(Value::as_str));
    Ok(HeadsConfig {
        kind,
        base: Base {
            name: name.unwrap_or_default().to_owned(),
            fingerprint: String::new(),
        },
        hidden_size,
        vocab_size,
        draft_vocab_size: None,
        heads: 1,
        layers: 1,
        rank: None,
        own_outputs: true,
        bias: false,
        layer: None,
        accuracies: Vec::new(),
    })
}

/// The shape `[rows, columns]` of a matrix.
fn matrix(source: &dyn TensorSource, name: &str) -> Result<[i64; 2]> {
    match source.info(name).as_ref().map(|i| &i.shape[..]) {
        Some(&[rows, columns]) => Ok([rows, columns]),
        Some(shape) => Err(Error::weights(
            source.path(),
            format!("tensor '{name}' has shape {shape:?} where a matrix is expected"),
        )),
        None => Err(Error::weights(
            source.path(),
            format!("there is no tensor '{name}'"),
        )),
    }
}

/// Head and block numbers of all names that `parse` knows.
fn count(names: &[String], parse: impl Fn(&str) -> Option<(usize, usize)>) -> (usize, Vec<usize>) {
    let found: BTreeSet<(usize, usize)> = names.iter().filter_map(|n| parse(n)).collect();
    let heads = found.iter().map(|(head, _)| head + 1).max().unwrap_or(0);
    // Published heads of one file are alike; the first says how.
    let blocks = found.iter().filter(|(h, _)| *h == 0).map(|(_, b)| *b);
    (heads, blocks.collect())
}

/// `{head}.{block}.linear.{weight,bias}` and `{head}.{blocks}.weight`.
fn medusa(path: &Path, file: &Path, target: &CausalLm) -> Result<Folder> {
    let source = weights::open(file)?;
    let plain = |name: &str| name.strip_prefix("medusa_head.").unwrap_or(name).to_owned();
    let block = |name: &str| {
        let name = plain(name);
        let (head, rest) = name.split_once('.')?;
        let (block, rest) = rest.split_once('.')?;
        rest.starts_with("linear.")
            .then_some((head.parse().ok()?, block.parse().ok()?))
    };
    let names = source.names();
    let (heads, blocks) = count(&names, block);
    let layers = blocks.len();
    let output = names
        .iter()
        .find(|n| plain(n) == format!("0.{layers}.weight"))
        .ok_or_else(|| {
            Error::weights(file, format!("there is no tensor '0.{layers}.weight', the output matrix of the first Medusa head"))
        })?;
    let config = HeadsConfig {
        heads,
        layers,
        ..published(HeadsKind::Medusa, path, matrix(&*source, output)?)?
    };
    check_base(path, &config, target)?;
    let renamed = Renamed::new(source, |name, _| {
        let short = plain(name);
        let new = match short.split('.').collect::<Vec<_>>()[..] {
            [head, block, "linear", what] => format!("heads.{head}.blocks.{block}.linear.{what}"),
            [head, block, "weight"] if block == layers.to_string() => {
                format!("heads.{head}.output.weight")
            }
            _ => short,
        };
        vec![NewTensor::renamed(new)]
    })?;
    Ok(Folder {
        config,
        source: Box::new(renamed),
        relative: false,
    })
}

/// `hydra_mlp.{head}.{index}.{linear,res_connection}.*`, `hydra_lm_head.{head}[.1].*` and
/// `prefix_embeding_layer.*` (the published spelling). Indices skip the dropouts between the
/// blocks.
fn hydra(path: &Path, file: &Path, target: &CausalLm) -> Result<Folder> {
    let source = weights::open(file)?;
    let block = |name: &str| {
        let (head, rest) = name.strip_prefix("hydra_mlp.")?.split_once('.')?;
        let (index, rest) = rest.split_once('.')?;
        rest.starts_with("linear.")
            .then_some((head.parse().ok()?, index.parse().ok()?))
    };
    let names = source.names();
    let (heads, indices) = count(&names, block);
    let output = names
        .iter()
        .find(|n| n.starts_with("hydra_lm_head.0.") && n.ends_with(".weight"))
        .ok_or_else(|| Error::weights(file, "there is no tensor 'hydra_lm_head.0.weight'"))?;
    let prefixed = names
        .iter()
        .any(|n| n.starts_with("prefix_embeding_layer."));
    let kind = if prefixed {
        HeadsKind::HydraPlus
    } else {
        HeadsKind::Hydra
    };
    let mut config = HeadsConfig {
        heads,
        layers: indices.len(),
        ..published(kind, path, matrix(&*source, output)?)?
    };
    check_hydra_options(path)?;
    check_base(path, &config, target)?;
    if prefixed {
        config.layer = Some(LayerConfig {
            final_norm: true,
            ..LayerConfig::copy_of(target.config())?
        });
    }
    let renamed = Renamed::new(source, |name, _| {
        let number = |index: &str| {
            let index: usize = index.parse().ok()?;
            indices.iter().position(|&i| i == index)
        };
        let new = match name.split('.').collect::<Vec<_>>()[..] {
            [
                "hydra_mlp",
                head,
                index,
                part @ ("linear" | "res_connection"),
                what,
            ] => {
                let part = if part == "linear" { part } else { "residual" };
                number(index).map(|j| format!("heads.{head}.blocks.{j}.{part}.{what}"))
            }
            ["hydra_lm_head", head, what] | ["hydra_lm_head", head, _, what] => {
                Some(format!("heads.{head}.output.{what}"))
            }
            ["prefix_embeding_layer", "embed_tokens", "weight"] => return Vec::new(),
            ["prefix_embeding_layer", "layers", "0", ..] => name
                .strip_prefix("prefix_embeding_layer.layers.0")
                .map(|rest| format!("prefix{rest}")),
            ["prefix_embeding_layer", ..] => name
                .strip_prefix("prefix_embeding_layer")
                .map(|rest| format!("prefix{rest}")),
            _ => None,
        };
        vec![NewTensor::renamed(new.unwrap_or_else(|| name.to_owned()))]
    })?;
    Ok(Folder {
        config,
        source: Box::new(renamed),
        relative: false,
    })
}

/// Published variants of Hydra that are other networks.
fn check_hydra_options(path: &Path) -> Result<()> {
    let file = path.join("config.json");
    if !file.is_file() {
        return Ok(());
    }
    let json = read_json(&file)?;
    let text = |key: &str| json.get(key).and_then(Value::as_str);
    if let Some(other) = text("hydra_head_arch").filter(|a| !matches!(*a, "mlp" | "prefix-mlp")) {
        return Err(Error::Unsupported(format!(
            "{}: Hydra heads of the architecture '{other}' (known: mlp, prefix-mlp)",
            file.display()
        )));
    }
    match json.get("hidden_state_offset").and_then(Value::as_i64) {
        None | Some(0) => Ok(()),
        Some(offset) => Err(Error::Unsupported(format!(
            "{}: Hydra heads on the states of an earlier layer (hidden_state_offset = {offset})",
            file.display()
        ))),
    }
}

/// `fc.*` and `layers.0.*`.
fn eagle(path: &Path, target: &CausalLm) -> Result<Folder> {
    let source = weights::open(path)?;
    if source.info("midlayer.self_attn.q_proj.weight").is_some() {
        return Err(Error::Unsupported(format!(
            "{}: EAGLE-3, which reads three layers of the target; use EAGLE or EAGLE-2 weights",
            path.display()
        )));
    }
    let [hidden, _] = matrix(&*source, "fc.weight")?;
    let vocab = match source.info("embed_tokens.weight") {
        Some(_) => matrix(&*source, "embed_tokens.weight")?[0],
        None => target.config().vocab_size,
    };
    let shape = |name: &str| source.info(name).and_then(|i| i.shape.first().copied());
    let config = HeadsConfig {
        own_outputs: false,
        draft_vocab_size: shape(DRAFT_TOKENS),
        bias: shape("fc.bias").is_some(),
        ..published(HeadsKind::Eagle, path, [vocab, hidden])?
    };
    check_base(path, &config, target)?;
    let file = path.join("config.json");
    let mut json = read_json(&file)?;
    if let Some(fields) = json.as_object_mut() {
        // The class is EAGLE's own; the layer is that of Llama.
        fields.insert(
            "architectures".into(),
            serde_json::json!(["LlamaForCausalLM"]),
        );
    }
    let layer = DecoderConfig::from_json(&json)
        .map_err(|e| Error::weights(&file, e.to_string()))
        .and_then(|c| LayerConfig::copy_of(&c))?;
    let renamed = Renamed::new(source, |name, _| {
        let new = match name.strip_prefix("layers.0.") {
            Some(rest) => format!("layer.{rest}"),
            None if matches!(name, "embed_tokens.weight" | "t2d") => return Vec::new(),
            None => name.to_owned(),
        };
        vec![NewTensor::renamed(new)]
    })?;
    Ok(Folder {
        config: HeadsConfig {
            layer: Some(layer),
            ..config
        },
        source: Box::new(renamed),
        relative: true,
    })
}
