//! Finding and loading the model that an option names.

use crate::args::{ModelArgs, SamplingArgs, SpeculateArgs};
use crate::exit::{Result, failure, usage};
use sequor_data::Resolver;
use sequor_nn::device::{DType, Weights, parse_device};
use sequor_text::{Acceptance, LoadOptions, TextOptions, TextPipeline};
use std::path::{Path, PathBuf};

/// The path of a model by name, fetched when it must be.
pub fn resolve(name: &str, offline: bool) -> Result<PathBuf> {
    let found = Resolver::from_env()
        .offline(offline)
        .resolve_model(name)
        .map_err(sequor_text::Error::from)?;
    Ok(found.path)
}

/// Checks the options of a model before anything is fetched or loaded.
pub fn load_options(a: &ModelArgs) -> Result<LoadOptions> {
    if a.threads == Some(0) {
        return Err(usage("--threads must be at least 1"));
    }
    Ok(LoadOptions {
        weights: weights(a).map_err(usage)?,
        device: parse_device(&a.device).map_err(|e| match e {
            sequor_nn::Error::Input(_) => usage(e),
            e => failure(e),
        })?,
        threads: a.threads,
    })
}

/// What `--weights` or `--dtype` say; f32, the reference arithmetic, where both are silent.
pub fn weights(a: &ModelArgs) -> sequor_nn::Result<Weights> {
    match (&a.weights, &a.dtype) {
        (Some(weights), _) => weights.parse(),
        (None, Some(dtype)) => dtype.parse().map(Weights::Float),
        (None, None) => Ok(DType::F32.into()),
    }
}

/// Checks the options of a generation before anything is fetched or loaded.
pub fn text_options(s: &SamplingArgs, d: &SpeculateArgs) -> Result<TextOptions> {
    let options = TextOptions {
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        typical_p: s.typical_p,
        repetition_penalty: s.repetition_penalty,
        seed: s.seed,
        max_new_tokens: s.max_new_tokens,
        stop: s.stop.clone(),
        ignore_eos: s.ignore_eos,
        speculate: d.speculate.parse()?,
        depth: d.draft_depth.parse()?,
        shape: d.topology.parse()?,
        tree_nodes: d.tree_nodes,
        acceptance: acceptance(&d.acceptance)?,
        layers: d.layers.parse()?,
        ..TextOptions::default()
    };
    options.validate()?;
    Ok(options)
}

/// A rule of acceptance by name.
pub fn acceptance(name: &str) -> Result<Acceptance> {
    let number = |text: &str| {
        text.parse::<f64>()
            .map_err(|_| usage(format!("'{text}' is not a number in --acceptance {name}")))
    };
    Ok(match name.split_once('=') {
        None if name == "lossless" => Acceptance::Exact,
        None if name == "typical" => Acceptance::Typical {
            epsilon: 0.09,
            delta: 0.3,
        },
        None if name == "lantern" => Acceptance::Lantern {
            k: 1000,
            delta: 0.1,
        },
        None if name == "tolerance" => Acceptance::Tolerance { r: 0.1 },
        Some(("tolerance", r)) => Acceptance::Tolerance { r: number(r)? },
        Some(("synthetic", rate)) => Acceptance::Synthetic {
            rate: number(rate)?,
        },
        _ => {
            return Err(usage(format!(
                "unknown rule of acceptance '{name}': choose lossless, typical, lantern, tolerance[=R] or synthetic=RATE"
            )));
        }
    })
}

/// Loads the pipeline with all that the method needs.
pub fn load(
    a: &ModelArgs,
    load: &LoadOptions,
    options: &TextOptions,
    heads: Option<&Path>,
) -> Result<TextPipeline> {
    let mut pipeline = TextPipeline::load(&resolve(&a.model, a.offline)?, load)?;
    let resolver = Resolver::from_env().offline(a.offline);
    pipeline.prepare(options, load, &resolver, heads)?;
    Ok(pipeline)
}
