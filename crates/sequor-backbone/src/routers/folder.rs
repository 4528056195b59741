//! Trained routers on disk: `heads.json`, `heads.safetensors`, and an adapter in the layout
//! of PEFT where one was trained.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use sequor_nn::weights::{self, write_safetensors};
use sequor_nn::{Error, Kind, ParamBuilder, Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Routers;
use super::policy::{GateRule, Policy, Prefill};
use crate::CausalLm;
use crate::causal_lm::read_json;
use crate::heads::{Base, HeadsKind};

/// Most layers that are read as meant.
const MAX_LAYERS: usize = 1 << 12;

/// What `heads.json` says about routers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterConfig {
    /// [`HeadsKind::Router`].
    pub kind: HeadsKind,
    /// The model they were trained for.
    pub base: Base,
    /// Width of that model's rows.
    pub hidden_size: i64,
    /// Number of its token ids.
    pub vocab_size: i64,
    /// Number of its layers.
    pub decoder_layers: usize,
    /// Share of the layers that training aimed at keeping, in (0, 1].
    pub kept: f64,
    /// What the layers did with the prompt in training.
    pub prefill: Prefill,
    /// How scores are to be read.
    pub rule: GateRule,
    /// Are the first two layers and the last protected?
    pub protect: bool,
    /// Mean probability of each layer over the prompts of the training data.
    pub scores: Vec<f64>,
    /// Is there an adapter, trained with the layers left out?
    pub adapter: bool,
    /// How they were trained and what was measured, for people.
    #[serde(default)]
    pub training: Value,
}

impl RouterConfig {
    /// How the routers decide, by what the folder says.
    pub fn policy(&self) -> Policy {
        Policy {
            rule: self.rule,
            keep: None,
            protect: self.protect,
        }
    }

    /// The `keep` layers with the best mean scores, protected ones first: the best choice that
    /// ignores the prompt.
    ///
    /// # Errors
    /// [`Error::Config`] when there are not as many layers, or more are protected.
    pub fn static_best(&self, keep: usize) -> Result<Vec<usize>> {
        let policy = Policy {
            rule: GateRule::MeanProb,
            keep: Some(keep),
            protect: self.protect,
        };
        policy.validate(self.decoder_layers, Prefill::Full)?;
        let scores: Vec<_> = self
            .scores
            .iter()
            .map(|&mean| super::LayerScore { mean, votes: 0.0 })
            .collect();
        let gates = policy.decide(&scores);
        Ok((0..gates.len())
            .filter(|&l| gates.get(l) == Some(&true))
            .collect())
    }

    fn validate(&self, path: &Path) -> Result<()> {
        let fail = |what: String| Err(Error::weights(path, what));
        if self.kind != HeadsKind::Router {
            return fail(format!(
                "holds {} heads, and routers are wanted",
                self.kind.name()
            ));
        }
        if !(1..=MAX_LAYERS).contains(&self.decoder_layers)
            || !(1..=1 << 20).contains(&self.hidden_size)
            || !(1..=1 << 24).contains(&self.vocab_size)
        {
            return fail(format!(
                "decoder_layers {}, hidden_size {} and vocab_size {} are not those of a model",
                self.decoder_layers, self.hidden_size, self.vocab_size
            ));
        }
        if self.scores.len() != self.decoder_layers
            || self.scores.iter().any(|s| !(0.0..=1.0).contains(s))
        {
            return fail(format!(
                "scores must be {} probabilities, one per layer",
                self.decoder_layers
            ));
        }
        if !(self.kept > 0.0 && self.kept <= 1.0) {
            return fail(format!("kept is {}, expected a share in (0, 1]", self.kept));
        }
        Ok(())
    }
}

/// A folder of trained routers.
#[derive(Debug)]
pub struct RouterFolder {
    /// What it says about itself.
    pub config: RouterConfig,
    /// The routers.
    pub routers: Routers,
    path: PathBuf,
}

impl RouterFolder {
    /// Reads a folder.
    ///
    /// # Errors
    /// When a file is absent or damaged, or holds something else.
    pub fn open(path: &Path) -> Result<Self> {
        let json = path.join("heads.json");
        let config: RouterConfig = serde_json::from_value(read_json(&json)?)
            .map_err(|e| Error::weights(&json, format!("is not about routers: {e}")))?;
        config.validate(&json)?;
        let source = weights::open(&path.join("heads.safetensors"))?;
        let p = ParamBuilder::load(source, Kind::Float, sequor_nn::Device::Cpu);
        let check = p.dry_run();
        Routers::new(&check, config.decoder_layers, config.hidden_size)?;
        check.finish()?;
        let routers = Routers::new(&p, config.decoder_layers, config.hidden_size)?;
        Ok(Self {
            config,
            routers,
            path: path.to_path_buf(),
        })
    }

    /// Where the adapter is, if there is one ([`load_adapted`](super::load_adapted)).
    pub fn adapter(&self) -> Option<&Path> {
        self.config.adapter.then_some(&self.path)
    }

    /// Were these routers trained for `model`?
    ///
    /// # Errors
    /// [`Error::Config`] naming both models when they were not.
    pub fn check(&self, model: &CausalLm) -> Result<()> {
        let found = model.fingerprint()?;
        let base = &self.config.base;
        if base.fingerprint.is_empty() || base.fingerprint == found {
            return Ok(());
        }
        Err(Error::Config(format!(
            "{}: these routers are for {} ({}), the model is {} ({found})",
            self.path.display(),
            base.name,
            base.fingerprint,
            model.source().display(),
        )))
    }

    /// Writes `heads.json` and `heads.safetensors` (bf16) into a folder. `params` are those of
    /// the builder that [`Routers::new`] used. An adapter is written beside them with
    /// [`Adapter::write`](sequor_nn::lora::Adapter::write).
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(
        path: &Path,
        config: &RouterConfig,
        params: &[sequor_nn::params::Param],
    ) -> Result<()> {
        config.validate(path)?;
        std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        let rounded = params
            .iter()
            .map(|p| Ok((&p.name, p.tensor.f_detach()?.f_to_kind(Kind::BFloat16)?)))
            .collect::<Result<Vec<_>>>()?;
        let tensors: Vec<(&str, &Tensor)> = rounded.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_safetensors(&path.join("heads.safetensors"), &tensors, &metadata)?;
        let json = path.join("heads.json");
        let text = serde_json::to_string_pretty(config)
            .map_err(|e| Error::Config(format!("cannot be written as JSON: {e}")))?;
        weights::write_atomic(&json, |file| {
            writeln!(file, "{text}").map_err(|e| Error::io(&json, e))
        })
    }
}
