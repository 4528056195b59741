//! Cases of vector quantisers, in the layouts and options of vector-quantize-pytorch.

use crate::{Outputs, Result};
use sequor_backbone::causal_lm::read_json;
use sequor_nn::weights::{self, Limits};
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_vq::{
    Codebook, Distance, Fsq, FsqConfig, GroupedResidualVq, GroupedResidualVqConfig, Key, Lfq,
    LfqConfig, Quantizer, ResidualFsq, ResidualFsqConfig, ResidualVq, ResidualVqConfig, Trained,
    VectorQuantizer, VqConfig, names,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Classes that this module runs.
pub const CLASSES: [&str; 6] = [
    "VectorQuantize",
    "ResidualVQ",
    "GroupedResidualVQ",
    "FSQ",
    "LFQ",
    "ResidualFSQ",
];

type Inputs = BTreeMap<String, Tensor>;

/// Runs a case of one of [`CLASSES`]: codes and vectors, then one training pass over the
/// same input.
pub fn run(class: &str, dir: &Path, inputs: &Inputs) -> Result<Outputs> {
    let x = inputs.get("x").ok_or("inputs have no x")?;
    let config = Options(read_json(&dir.join("config.json"))?);
    let path = dir.join("model.safetensors");
    let file = weights::open_with(&path, &Limits::default())?;
    let p = ParamBuilder::load(
        Box::new(names::from_published(file)?),
        Kind::Float,
        Device::Cpu,
    );
    let key = Key::new(0, 0);
    let mut out = Outputs::new();
    match class {
        "VectorQuantize" => {
            let mut q = VectorQuantizer::new(&p, &config.vector(config.int("dim")?)?)?;
            p.finish()?;
            let trained = passes(&mut q, x, key, &mut out)?;
            losses(&trained, &mut out)?;
            state("", q.codebook(), &mut out)?;
        }
        "ResidualVQ" => {
            let mut q = ResidualVq::new(&p, &config.residual(config.int("dim")?)?)?;
            p.finish()?;
            let trained = passes(&mut q, x, key, &mut out)?;
            losses(&trained, &mut out)?;
            levels("", &q, &mut out)?;
        }
        "GroupedResidualVQ" => {
            let groups = config.int("groups")?;
            let residual = config.residual(config.int("dim")? / groups.max(1))?;
            let mut q = GroupedResidualVq::new(&p, &GroupedResidualVqConfig { groups, residual })?;
            p.finish()?;
            let trained = passes(&mut q, x, key, &mut out)?;
            losses(&trained, &mut out)?;
            for (g, group) in q.groups().iter().enumerate() {
                levels(&format!("rvqs.{g}."), group, &mut out)?;
            }
            // There the groups come first.
            if let Some(indices) = out.get_mut("indices") {
                *indices = indices.f_movedim_int(-2, 0)?;
            }
        }
        "FSQ" => {
            let fsq = FsqConfig {
                levels: config.list("levels")?,
                dim: config.0["dim"].as_i64(),
            };
            let mut q = Fsq::new(&p, &fsq)?;
            p.finish()?;
            passes(&mut q, x, key, &mut out)?;
        }
        "LFQ" => {
            let lfq = LfqConfig {
                codebook_size: config.int("codebook_size")?,
                dim: config.0["dim"].as_i64(),
                entropy_loss_weight: config.float("entropy_loss_weight", 0.1),
                diversity_gamma: config.float("diversity_gamma", 1.0),
                commitment_loss_weight: config.float("commitment_loss_weight", 0.0),
                inv_temperature: config.float("inv_temperature", 100.0),
            };
            let mut q = Lfq::new(&p, &lfq)?;
            p.finish()?;
            let trained = passes(&mut q, x, key, &mut out)?;
            out.insert("aux_loss".into(), trained.loss.f_reshape([1])?);
        }
        _ => {
            let fsq = ResidualFsqConfig {
                dim: config.0["dim"].as_i64(),
                ..ResidualFsqConfig::new(config.int("num_quantizers")?, &config.list("levels")?)
            };
            let mut q = ResidualFsq::new(&p, &fsq)?;
            p.finish()?;
            passes(&mut q, x, key, &mut out)?;
        }
    }
    Ok(out)
}

fn passes(q: &mut dyn Quantizer, x: &Tensor, key: Key, out: &mut Outputs) -> Result<Trained> {
    let encoded = q.encode(x)?;
    out.insert("from_indices".into(), q.decode(&encoded.indices)?);
    out.insert("quantized".into(), encoded.quantized);
    out.insert("indices".into(), encoded.indices);
    Ok(q.train(x, key)?)
}

fn losses(trained: &Trained, out: &mut Outputs) -> Result<()> {
    let mut all = Vec::new();
    for stage in &trained.stages {
        all.push(stage.total()?.ok_or("a stage without a loss")?);
    }
    out.insert("train_loss".into(), Tensor::f_stack(&all, 0)?);
    Ok(())
}

/// The running means after the pass, with the leading dimension that the package keeps for
/// several heads.
fn state(prefix: &str, codebook: &Codebook, out: &mut Outputs) -> Result<()> {
    let mut add = |name: &str, t: &Tensor| -> Result<()> {
        let name = format!("after.{prefix}_codebook.{name}");
        out.insert(name, t.f_unsqueeze(0)?);
        Ok(())
    };
    add("embed", &codebook.codes()?)?;
    add("cluster_size", codebook.counts().ok_or("no counts")?)?;
    add("embed_avg", codebook.sums().ok_or("no sums")?)
}

fn levels(prefix: &str, q: &ResidualVq, out: &mut Outputs) -> Result<()> {
    for (l, stage) in q.stages().iter().enumerate() {
        state(&format!("{prefix}layers.{l}."), stage.codebook(), out)?;
    }
    Ok(())
}

/// Options of the package, with its defaults.
struct Options(Value);

impl Options {
    fn int(&self, name: &str) -> Result<i64> {
        Ok(self.0[name].as_i64().ok_or(format!("{name} is missing"))?)
    }

    fn float(&self, name: &str, default: f64) -> f64 {
        self.0[name].as_f64().unwrap_or(default)
    }

    fn list(&self, name: &str) -> Result<Vec<i64>> {
        Ok(serde_json::from_value(self.0[name].clone())?)
    }

    fn vector(&self, dim: i64) -> Result<VqConfig> {
        let cosine = self.0["use_cosine_sim"].as_bool().unwrap_or(false);
        Ok(VqConfig {
            codebook_dim: self.0["codebook_dim"].as_i64(),
            distance: if cosine {
                Distance::Cosine
            } else {
                Distance::Euclidean
            },
            decay: self.float("decay", 0.8),
            eps: self.float("eps", 1e-5),
            commitment_weight: self.float("commitment_weight", 1.0),
            ..VqConfig::new(dim, self.int("codebook_size")?)
        })
    }

    fn residual(&self, dim: i64) -> Result<ResidualVqConfig> {
        // Projections there are around all levels, never around each.
        let inner = self.0["codebook_dim"].as_i64().unwrap_or(dim);
        let stage = VqConfig {
            codebook_dim: None,
            ..self.vector(inner)?
        };
        Ok(ResidualVqConfig {
            dim: Some(dim),
            shared_codebook: self.0["shared_codebook"].as_bool().unwrap_or(false),
            ..ResidualVqConfig::new(self.int("num_quantizers")?, stage)
        })
    }
}
