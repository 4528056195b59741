//! The maps, and the way of pseudo rows through the layers.

use super::config::TransferConfig;
use crate::causal_lm::read_json;
use crate::{CausalLm, Decoder};
use sequor_kernels::bridge;
use sequor_nn::attention::Attend;
use sequor_nn::block::Pass;
use sequor_nn::rope::RopeTables;
use sequor_nn::tch::no_grad;
use sequor_nn::weights::{Safetensors, TensorSource, write_atomic, write_safetensors};
use sequor_nn::{Error, Init, Kind, ParamBuilder, Result, Tensor};
use sequor_sampling::{StaticTree, Topology};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Name of the config within a folder.
const CONFIG: &str = "heads.json";
/// Name of the weight file within a folder.
const WEIGHTS: &str = "heads.safetensors";
/// Name of the table from draft ids to the model's ids.
const DRAFT_TOKENS: &str = "d2t";

/// The maps of hidden transfer: one `[dim, dim]` with bias for every offset.
#[derive(Debug)]
pub struct HiddenTransfer {
    config: TransferConfig,
    maps: Vec<Map>,
    draft_tokens: Option<Vec<u32>>,
}

/// `W h + b`, in f32 whatever the format of the model: the maps are small.
#[derive(Debug)]
struct Map {
    weight: Tensor,
    bias: Tensor,
}

impl Map {
    fn new(p: &ParamBuilder, dim: i64) -> Result<Self> {
        Ok(Self {
            weight: p.matrix("weight", &[dim, dim], Init::Zeros)?,
            bias: p.vector("bias", &[dim], Init::Zeros)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight, Some(&self.bias))?)
    }
}

/// The rows of one climb through the layers.
pub(super) struct Climb<'a> {
    /// Real rows below all maps, `[rows, dim]`; none where they went up before.
    pub rows: Option<Tensor>,
    /// Positions of the real rows (empty when there are none).
    pub positions: &'a [i64],
    /// Positions of the real rows that carry pseudo rows.
    pub anchors: &'a [i64],
    /// Who sees whom.
    pub attend: &'a mut dyn Attend,
}

impl HiddenTransfer {
    /// Parameters `transfer.{j}.weight` and `transfer.{j}.bias`.
    ///
    /// # Errors
    /// When a weight file cannot be read. Missing and mis-shaped tensors are reported by
    /// [`ParamBuilder::finish`].
    pub fn new(p: &ParamBuilder, config: &TransferConfig) -> Result<Self> {
        let dim = config.hidden_size;
        let map = |j| Map::new(&p.pp("transfer").pp(j), dim);
        if config.draft_vocab_size.is_some() {
            p.ignore(DRAFT_TOKENS);
        }
        Ok(Self {
            config: config.clone(),
            maps: (0..config.offsets()).map(map).collect::<Result<_>>()?,
            draft_tokens: None,
        })
    }

    /// Trainable maps that begin as identities: every pseudo state is the state it is made
    /// of. `p` must be made by [`ParamBuilder::init`] with f32.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn identity(p: &ParamBuilder, config: &TransferConfig) -> Result<Self> {
        let maps = Self::new(p, config)?;
        for map in &maps.maps {
            let options = (map.weight.kind(), map.weight.device());
            let identity = Tensor::f_eye(config.hidden_size, options)?;
            no_grad(|| map.weight.shallow_clone().f_copy_(&identity))?;
        }
        Ok(maps)
    }

    /// Reads a folder with `heads.json` and `heads.safetensors`, made for `model`.
    ///
    /// # Errors
    /// One error that names the file and everything that does not fit, another model
    /// included.
    pub fn load(folder: &Path, model: &CausalLm) -> Result<Self> {
        let path = folder.join(CONFIG);
        let in_file = |e: Error| match e {
            Error::Config(what) => Error::Config(format!("{}: {what}", path.display())),
            other => other,
        };
        let config: TransferConfig = serde_json::from_value(read_json(&path)?)
            .map_err(|e| Error::Config(format!("{}: {e}", path.display())))?;
        config.validate(model.config()).map_err(in_file)?;
        config.check_base(model).map_err(in_file)?;
        let weights = folder.join(WEIGHTS);
        let source = Safetensors::open(&weights)?;
        let drafted = match config.draft_vocab_size {
            None => None,
            Some(_) => Some(read_tokens(&source)?),
        };
        let device = model.decoder().device();
        let p = ParamBuilder::load(Box::new(source), Kind::Float, device);
        let mut maps = Self::new(&p, &config)?;
        p.finish()?;
        if let Some(tokens) = drafted {
            maps.set_draft_tokens(tokens).map_err(|e| match e {
                Error::Input(what) => Error::weights(&weights, format!("{DRAFT_TOKENS}: {what}")),
                other => other,
            })?;
        }
        Ok(maps)
    }

    /// Rounds the maps to what [`save`](Self::save) stores.
    ///
    /// # Errors
    /// When libtorch cannot convert them.
    pub fn round(&mut self) -> Result<()> {
        for t in self.maps.iter().flat_map(|m| [&m.weight, &m.bias]) {
            let stored = t.f_to_kind(Kind::BFloat16)?.f_to_kind(Kind::Float)?;
            no_grad(|| t.shallow_clone().f_copy_(&stored))?;
        }
        Ok(())
    }

    /// Writes `heads.json` and `heads.safetensors` (maps in bf16) into `folder`. A config that
    /// lies there is removed first and the new one written last, so that a folder with a
    /// config is whole.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let path = folder.join(CONFIG);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(path, e)),
            _ => {}
        }
        let mut tensors = Vec::new();
        for (j, map) in self.maps.iter().enumerate() {
            for (name, t) in [("weight", &map.weight), ("bias", &map.bias)] {
                let rounded = t.f_detach()?.f_to_kind(Kind::BFloat16)?;
                tensors.push((format!("transfer.{j}.{name}"), rounded));
            }
        }
        if let Some(tokens) = &self.draft_tokens {
            let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
            tensors.push((DRAFT_TOKENS.to_owned(), Tensor::f_from_slice(&ids)?));
        }
        let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_safetensors(&folder.join(WEIGHTS), &named, &metadata)?;
        let mut text = serde_json::to_vec_pretty(&self.config)
            .map_err(|e| Error::Config(format!("{CONFIG} cannot be written: {e}")))?;
        text.push(b'\n');
        write_atomic(&path, |file| {
            file.write_all(&text).map_err(|e| Error::io(&path, e))
        })
    }

    /// What they are made of.
    pub fn config(&self) -> &TransferConfig {
        &self.config
    }

    /// Keeps what was measured, in the form of [`TransferConfig::accuracies`].
    pub fn set_accuracies(&mut self, accuracies: Vec<Vec<f64>>) {
        self.config.accuracies = accuracies;
    }

    /// The model's id of each draft id, when only a part of the vocabulary is drafted.
    pub fn draft_tokens(&self) -> Option<&[u32]> {
        self.draft_tokens.as_deref()
    }

    /// Restricts drafts to `tokens` (ids of the model).
    ///
    /// # Errors
    /// [`Error::Input`] when there are not `draft_vocab_size` of them or one lies outside the
    /// vocabulary.
    pub fn set_draft_tokens(&mut self, tokens: Vec<u32>) -> Result<()> {
        if Some(tokens.len() as i64) != self.config.draft_vocab_size {
            return Err(Error::Input(format!(
                "{} draft tokens where draft_vocab_size is {:?}",
                tokens.len(),
                self.config.draft_vocab_size
            )));
        }
        let vocab = self.config.vocab_size;
        if let Some(bad) = tokens.iter().find(|&&t| i64::from(t) >= vocab) {
            return Err(Error::Input(format!(
                "draft token {bad} lies outside the vocabulary of {vocab}"
            )));
        }
        self.draft_tokens = Some(tokens);
        Ok(())
    }

    /// The best static tree of `nodes` nodes by the measured accuracies; a chain when nothing
    /// was measured.
    pub fn topology(&self, nodes: usize) -> Topology {
        let tree = StaticTree::search(&self.config.accuracies, nodes);
        if tree.is_empty() {
            Topology::Chain
        } else {
            Topology::Static(tree)
        }
    }

    /// Runs real rows and the pseudo rows that hang on them upwards; gives all rows after the
    /// final norm: the real ones, then those of offset 1 (one per anchor), of offset 2, ...
    /// `source(j, rows)` gives the states `[anchors, dim]` that map `j` reads, given the rows
    /// behind its layer.
    pub(super) fn climb(
        &self,
        decoder: &Decoder,
        climb: Climb<'_>,
        source: &dyn Fn(usize, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Climb {
            mut rows,
            positions,
            anchors,
            attend,
        } = climb;
        let mut rope = match rows {
            Some(_) => decoder.rotations(positions)?,
            None => None,
        };
        let mut run = |rows: Tensor, layers, rope: Option<&RopeTables>| -> Result<Tensor> {
            let mut pass = Pass {
                attend: &mut *attend,
                rope,
                dropout: 0.0,
            };
            let layers: std::ops::Range<usize> = layers;
            Ok(decoder.run_layers(layers, rows, &mut pass, &[])?.0)
        };
        let mut layer = 0;
        for (j, (map, &t)) in self
            .maps
            .iter()
            .zip(&self.config.transfer_layers)
            .enumerate()
        {
            if let Some(below) = rows.take() {
                rows = Some(run(below, layer..t, rope.as_ref())?);
            }
            layer = t;
            let pseudo = map.forward(&source(j, rows.as_ref())?)?;
            rows = Some(match &rows {
                Some(rows) => Tensor::f_cat(&[rows, &pseudo], 0)?,
                None => pseudo,
            });
            // Made apart from those of the real rows: where the longest position decides
            // about frequencies, a guess must not change what is real.
            let places: Vec<i64> = anchors.iter().map(|p| p + j as i64 + 1).collect();
            rope = match (rope, decoder.rotations(&places)?) {
                (Some(rope), Some(new)) => Some(RopeTables::cat(&[&rope, &new])?),
                (rope, new) => rope.or(new),
            };
        }
        let rows = rows.ok_or_else(|| Error::Config("transfer_layers is empty".into()))?;
        decoder.finish(&run(rows, layer..decoder.config().layers, rope.as_ref())?)
    }
}

/// The table of draft tokens.
fn read_tokens(source: &Safetensors) -> Result<Vec<u32>> {
    let damaged = |what: String| Error::weights(source.path(), format!("{DRAFT_TOKENS}: {what}"));
    let ids = source.load(DRAFT_TOKENS)?.f_to_kind(Kind::Int64)?;
    let ids: Vec<i64> = bridge::to_vec(&ids).map_err(|e| damaged(e.to_string()))?;
    ids.into_iter()
        .map(|id| u32::try_from(id).map_err(|_| damaged(format!("{id} is no token id"))))
        .collect()
}
