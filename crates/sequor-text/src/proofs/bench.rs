//! What all proofs start from: the model, the prompts, and a record of both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use sequor_data::Resolver;
use sequor_eval::proof::{Inputs, Setup};
use sequor_eval::weights_sha256;
use sequor_nn::device::DType;
use serde_json::{Map, Value, json};

use super::ReproduceOptions;
use crate::prompts::{Encoded, PromptSet};
use crate::{Error, LoadOptions, Result, TextPipeline};

/// How much is run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Prompts of each kind.
    pub per_kind: usize,
    /// Most new tokens.
    pub new_tokens: usize,
    /// Longest prompt; from longer ones the middle is cut out.
    pub prompt_tokens: usize,
    /// Prompts and new tokens of the test in f32.
    pub exact: (usize, usize),
}

impl Size {
    fn of(quick: bool) -> Self {
        if quick {
            Self {
                per_kind: 1,
                new_tokens: 40,
                prompt_tokens: 192,
                exact: (2, 16),
            }
        } else {
            Self {
                per_kind: 4,
                new_tokens: 96,
                prompt_tokens: 384,
                exact: (6, 32),
            }
        }
    }
}

/// Everything a proof runs on.
pub(super) struct Bench<'o> {
    pub options: &'o ReproduceOptions,
    pub pipeline: TextPipeline,
    /// Folder or file of the model.
    pub model_path: PathBuf,
    /// Its name.
    pub model_name: String,
    pub prompts: Vec<Encoded>,
    pub size: Size,
    setup: Setup,
}

impl<'o> Bench<'o> {
    pub fn open(options: &'o ReproduceOptions, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let set = match &options.prompts {
            Some(path) => PromptSet::load(path)?,
            None => PromptSet::find()?,
        };
        let model_path = resolver(options).resolve_model(&options.model)?.path;
        let model_name = model_name(&options.model);
        let pipeline = TextPipeline::load(&model_path, &options.load)?;
        let size = Size::of(options.quick);
        let chosen = set.select(size.per_kind);
        let prompts = chosen
            .into_iter()
            .map(|p| p.encode(&pipeline, size.prompt_tokens))
            .collect::<Result<Vec<_>>>()?;
        say(&format!(
            "{} prompts of the set {} ({} kinds), {} in {}",
            prompts.len(),
            set.name,
            set.kinds().len(),
            model_name,
            options.load.weights
        ));
        let mut settings = Map::new();
        settings.insert("model".into(), model_name.clone().into());
        settings.insert("dtype".into(), options.load.weights.to_string().into());
        settings.insert("new_tokens".into(), size.new_tokens.into());
        settings.insert("prompt_tokens".into(), size.prompt_tokens.into());
        let mut setup = Setup {
            command: options.command.clone(),
            seeds: vec![SEED],
            weights_sha256: weights_sha256(&model_name, &model_path)?,
            inputs: Some(Inputs {
                name: set.name.clone(),
                sha256: set.sha256.clone(),
                count: prompts.len(),
            }),
            settings,
            notes: Vec::new(),
            quick: options.quick,
        };
        let cut = prompts.iter().filter(|p| p.cut > 0).count();
        if cut > 0 {
            setup.notes.push(format!(
                "the middle of {cut} prompts was cut out, so that they fit into {} tokens",
                size.prompt_tokens
            ));
        }
        if options.train && options.quick {
            setup
                .notes
                .push("the heads were trained for a few minutes: their numbers say little".into());
        }
        Ok(Self {
            options,
            pipeline,
            model_path,
            model_name,
            prompts,
            size,
            setup,
        })
    }

    /// What the run is recorded with; `heads` are the folders of further weights by name.
    /// Measures what a pass over several rows costs, which sizes of drafts may follow.
    pub fn setup(
        &self,
        heads: &BTreeMap<String, PathBuf>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Setup> {
        say("measuring what a pass over several rows costs");
        let curve = self.pipeline.model().measure_cost()?;
        let cost: Vec<Value> = curve
            .rows()
            .iter()
            .map(|&rows| json!([rows, curve.relative(rows)]))
            .collect();
        let mut setup = self.setup.clone();
        setup.settings.insert("cost_of_rows".into(), cost.into());
        for (name, folder) in heads {
            setup.weights_sha256.extend(weights_sha256(name, folder)?);
        }
        Ok(setup)
    }

    /// The same model in f32, in which texts must be equal.
    pub fn exact(&self) -> Result<TextPipeline> {
        let load = LoadOptions {
            weights: DType::F32.into(),
            ..self.options.load
        };
        TextPipeline::load(&self.model_path, &load)
    }

    /// The prompts of the test in f32: one of each kind first.
    pub fn exact_prompts(&self) -> &[Encoded] {
        let n = self.size.exact.0.min(self.prompts.len());
        self.prompts.get(..n).unwrap_or_default()
    }

    pub fn resolver(&self) -> Resolver {
        resolver(self.options)
    }

    /// Ends the run when somebody asked for it.
    pub fn check_cancelled(&self) -> Result<()> {
        match self.options.cancel.load(Ordering::Relaxed) {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

/// The seed of everything that is drawn.
pub(super) const SEED: u64 = 1;

fn resolver(options: &ReproduceOptions) -> Resolver {
    Resolver::from_env().offline(options.offline)
}

/// The last part of a name or path, without the ending of a file.
fn model_name(model: &str) -> String {
    let name = Path::new(model.trim_end_matches('/')).file_name();
    let name = name.map_or(model.into(), |n| n.to_string_lossy());
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}
