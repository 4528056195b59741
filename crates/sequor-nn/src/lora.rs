//! Low-rank adaptation (LoRA, Hu et al. 2021): `y = W x + (alpha / r) B (A x)`.
//!
//! `A` is `[r, in]` and `B` `[out, r]`, both f32 whatever the format of `W`. They serve in
//! three places:
//!
//! - training: [`ParamBuilder::with_lora`](crate::ParamBuilder::with_lora) puts a trainable
//!   pair on every linear layer that a [`LoraConfig`] names, and freezes the rest;
//! - loading: [`LoraMerged`] adds the product to a checkpoint's matrices while they are
//!   read, so that the model is as fast as without;
//! - at run time: [`Linear::attach`](crate::linear::Linear::attach), `merge`, `unmerge`.
//!
//! Files have the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors` with
//! `base_model.model.<module>.lora_A.weight` and `lora_B.weight`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use sequor_kernels::matmul::Stored;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::params::Param;
use crate::weights::{
    Safetensors, SourceDtype, TensorInfo, TensorSource, write_atomic, write_safetensors,
};
use crate::{Error, Result};

/// Name of the configuration in an adapter's folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights in an adapter's folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";
/// Ends of the names of the two matrices.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
/// How many problems a message lists before it counts the rest.
const LISTED: usize = 12;

/// Which layers are adapted, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update, at least 1.
    pub rank: i64,
    /// Strength; the update is scaled by `alpha / rank`. Positive.
    pub alpha: f64,
    /// Probability that training drops an entry of the update's input, in `[0, 1)`.
    pub dropout: f64,
    /// Names of the layers: a module is meant if its path is one of these or ends with one
    /// after a dot (`q_proj`, `self_attn.q_proj`).
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let problem = if self.rank < 1 {
            format!("lora rank {} must be at least 1", self.rank)
        } else if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            format!("lora alpha {} must be positive", self.alpha)
        } else if !(0.0..1.0).contains(&self.dropout) {
            format!("lora dropout {} must lie in [0, 1)", self.dropout)
        } else if self.targets.is_empty() {
            "lora needs at least one target module, such as q_proj".into()
        } else {
            return Ok(());
        };
        Err(Error::Config(problem))
    }

    /// Factor on the update.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Is the module at this path adapted?
    pub fn targets(&self, module: &str) -> bool {
        self.targets.iter().any(|t| {
            module
                .strip_suffix(t.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }
}

/// The update of one linear layer.
#[derive(Debug)]
pub struct Lora {
    a: Tensor,
    b: Tensor,
    scale: f64,
    dropout: f64,
}

impl Lora {
    /// From `a` `[r, in]` and `b` `[out, r]`, both f32 (others are converted). `dropout` is
    /// only used while gradients are recorded.
    ///
    /// # Errors
    /// [`Error::Input`] when the shapes do not belong together.
    pub fn new(a: Tensor, b: Tensor, scale: f64, dropout: f64) -> Result<Self> {
        match (&a.size()[..], &b.size()[..]) {
            (&[rank, _], &[_, r]) if rank == r && rank > 0 => Ok(Self {
                a: a.f_to_kind(Kind::Float)?,
                b: b.f_to_kind(Kind::Float)?,
                scale,
                dropout,
            }),
            (a, b) => Err(Error::Input(format!(
                "lora_A {a:?} and lora_B {b:?} must be [r, in] and [out, r] with the same r > 0"
            ))),
        }
    }

    /// Length of the input rows.
    pub fn input(&self) -> i64 {
        self.a.size().get(1).copied().unwrap_or_default()
    }

    /// Length of the output rows.
    pub fn output(&self) -> i64 {
        self.b.size().first().copied().unwrap_or_default()
    }

    /// The update as a matrix `[out, in]`, f32.
    ///
    /// # Errors
    /// When libtorch cannot make the product.
    pub fn delta(&self) -> Result<Tensor> {
        Ok(self.b.f_matmul(&self.a)?.f_mul_scalar(self.scale)?)
    }

    /// The update of rows `x` `[.., in]` f32: `[.., out]` f32.
    ///
    /// # Errors
    /// When the width does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // The result of an operation on a parameter requires a gradient exactly where
        // gradients are recorded.
        let a = self.a.f_mul_scalar(self.scale)?;
        let h = if self.dropout > 0.0 && a.requires_grad() {
            x.f_dropout(self.dropout, true)?
                .f_linear::<Tensor>(&a, None)?
        } else {
            x.f_linear::<Tensor>(&a, None)?
        };
        Ok(h.f_linear::<Tensor>(&self.b, None)?)
    }

    /// Bytes that one pass reads.
    pub fn bytes(&self) -> usize {
        4 * (self.a.numel() + self.b.numel())
    }

    pub(crate) fn share(&self) -> Self {
        Self {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            scale: self.scale,
            dropout: self.dropout,
        }
    }
}

/// An adapter for a whole model: the update of each of its modules by path.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    config: LoraConfig,
    modules: BTreeMap<String, Lora>,
}

impl Adapter {
    /// Reads a folder in the layout of PEFT.
    ///
    /// # Errors
    /// When a file is absent or damaged. Everything else that is wrong with the adapter
    /// (rank 0, a matrix without its partner, shapes that contradict each other or the
    /// rank, features of PEFT that are not plain LoRA) is listed in one
    /// [`Error::Weights`].
    pub fn open(dir: &Path) -> Result<Self> {
        let mut problems = Vec::new();
        let (config, scale) = read_config(&dir.join(CONFIG_FILE), &mut problems)?;
        let file = Safetensors::open(&dir.join(WEIGHTS_FILE))?;
        let modules = pairs(&file, &config, scale, &mut problems)?;
        refuse(dir, "this adapter cannot be used", problems)?;
        Ok(Self {
            path: dir.to_path_buf(),
            config,
            modules,
        })
    }

    /// What its configuration says.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The updates by module path (`model.layers.0.self_attn.q_proj`).
    pub fn modules(&self) -> &BTreeMap<String, Lora> {
        &self.modules
    }

    /// Writes trained pairs (parameters `<module>.lora_A.weight` and `.lora_B.weight`, as
    /// [`ParamBuilder::params`](crate::ParamBuilder::params) lists them; others are left
    /// out) into a folder in the layout of PEFT, in the number format `kind`.
    /// `base` names the model that they belong to.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no pair; when the folder cannot be written.
    pub fn write(
        dir: &Path,
        config: &LoraConfig,
        params: &[Param],
        kind: Kind,
        base: &str,
    ) -> Result<()> {
        config.validate()?;
        let ours = |p: &&Param| p.name.ends_with(A) || p.name.ends_with(B);
        let tensors = params
            .iter()
            .filter(ours)
            .map(|p| {
                let stored = p.tensor.f_detach()?.f_to_kind(kind)?;
                Ok((format!("{PREFIX}{}", p.name), stored))
            })
            .collect::<Result<Vec<(String, Tensor)>>>()?;
        if tensors.is_empty() {
            return Err(Error::Input(format!(
                "{}: there is no adapter to write: the target modules {:?} match no layer",
                dir.display(),
                config.targets
            )));
        }
        let tensors: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_safetensors(&dir.join(WEIGHTS_FILE), &tensors, &metadata)?;
        let text = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": config.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        let path = dir.join(CONFIG_FILE);
        write_atomic(&path, |file| {
            writeln!(file, "{text:#}").map_err(|e| Error::io(&path, e))
        })
    }
}

/// One error for everything that is wrong.
fn refuse(path: &Path, what: &str, problems: Vec<String>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let mut text = format!("{what} ({} problems)", problems.len());
    for problem in problems.iter().take(LISTED) {
        text.push_str("\n  ");
        text.push_str(problem);
    }
    if problems.len() > LISTED {
        text.push_str(&format!("\n  ... and {} more", problems.len() - LISTED));
    }
    Err(Error::weights(path, text))
}

/// The configuration, and the factor on the updates.
fn read_config(path: &Path, problems: &mut Vec<String>) -> Result<(LoraConfig, f64)> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() || meta.len() > 1 << 20 {
        return Err(Error::weights(
            path,
            "is not a file of at most 1 MiB, as an adapter's configuration is",
        ));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::weights(path, format!("is not valid JSON: {e}")))?;
    let set = |key: &str| match json.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(a)) => !a.is_empty(),
        Some(Value::Object(o)) => !o.is_empty(),
        Some(_) => true,
    };
    let plain = [
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "megatron_config",
    ];
    for key in plain.into_iter().filter(|key| set(key)) {
        problems.push(format!("{key} is set: only plain LoRA is supported"));
    }
    match json.get("peft_type").and_then(Value::as_str) {
        Some("LORA") | None => {}
        Some(other) => problems.push(format!("peft_type is '{other}', expected 'LORA'")),
    }
    match json.get("bias").and_then(Value::as_str) {
        Some("none") | None => {}
        Some(other) => problems.push(format!("bias is '{other}', expected 'none'")),
    }
    let number =
        |key: &str, default: Option<f64>| json.get(key).and_then(Value::as_f64).or(default);
    let rank = json.get("r").and_then(Value::as_i64).unwrap_or_default();
    if rank < 1 {
        problems.push(format!(
            "r is {}, expected a whole number of at least 1",
            json.get("r").unwrap_or(&Value::Null)
        ));
    }
    // PEFT's own defaults where the file is silent.
    let alpha = number("lora_alpha", Some(8.0)).unwrap_or_default();
    if !(alpha > 0.0 && alpha.is_finite()) {
        problems.push(format!("lora_alpha is {alpha}, expected a positive number"));
    }
    let dropout = number("lora_dropout", Some(0.0)).unwrap_or_default();
    if !(0.0..1.0).contains(&dropout) {
        problems.push(format!(
            "lora_dropout is {dropout}, expected a number in [0, 1)"
        ));
    }
    let targets = match json.get("target_modules") {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(Value::as_str)
            .map(Into::into)
            .collect(),
        _ => Vec::new(),
    };
    let config = LoraConfig {
        rank,
        alpha,
        dropout,
        targets,
    };
    let divisor = if set("use_rslora") {
        (rank.max(1) as f64).sqrt()
    } else {
        rank.max(1) as f64
    };
    Ok((config, alpha / divisor))
}

/// The pairs of a file; what does not pair is a problem.
fn pairs(
    file: &dyn TensorSource,
    config: &LoraConfig,
    scale: f64,
    problems: &mut Vec<String>,
) -> Result<BTreeMap<String, Lora>> {
    let mut found: BTreeSet<String> = BTreeSet::new();
    for name in file.names() {
        let module = name
            .strip_prefix(PREFIX)
            .and_then(|n| n.strip_suffix(A).or_else(|| n.strip_suffix(B)));
        match module {
            Some(module) => {
                found.insert(module.to_owned());
            }
            None => problems.push(format!("tensor '{name}' is not {PREFIX}<module>{A} or {B}")),
        }
    }
    if found.is_empty() {
        problems.push("there are no LoRA matrices in the file".into());
    }
    let mut modules = BTreeMap::new();
    for module in found {
        let names = [A, B].map(|end| format!("{PREFIX}{module}{end}"));
        let [a, b] = names.each_ref().map(|name| file.info(name));
        let (Some(a), Some(b)) = (&a, &b) else {
            let lacking = if a.is_none() { A } else { B };
            problems.push(format!("{module}: {lacking} is missing"));
            continue;
        };
        let float = |i: &TensorInfo| {
            matches!(
                i.dtype.kind(),
                Some(Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)
            )
        };
        match (&a.shape[..], &b.shape[..]) {
            _ if !(float(a) && float(b)) => {
                problems.push(format!("{module}: the matrices are not floating-point"));
            }
            (&[r, _], &[_, s]) if r == config.rank && s == r && r > 0 => {
                let [a, b] = names.each_ref().map(|name| file.load(name));
                modules.insert(module, Lora::new(a?, b?, scale, config.dropout)?);
            }
            (a, b) => problems.push(format!(
                "{module}: lora_A is {a:?} and lora_B {b:?}, expected [{r}, in] and [out, {r}] (r of {CONFIG_FILE})",
                r = config.rank
            )),
        }
    }
    Ok(modules)
}

/// A checkpoint with an adapter added to its matrices as they are read. Sums are made in
/// f32; a model in a 16-bit format rounds each once, after the addition.
#[derive(Debug)]
pub struct LoraMerged<S> {
    source: S,
    adapter: Adapter,
}

impl<S: TensorSource> LoraMerged<S> {
    /// Presents `source`, whose names must be those of the adapter's modules.
    ///
    /// # Errors
    /// One [`Error::Weights`] that lists every module that `source` lacks or has in another
    /// shape: the adapter is of another model.
    pub fn new(source: S, adapter: Adapter) -> Result<Self> {
        let mut problems = Vec::new();
        for (module, lora) in &adapter.modules {
            let needs = [lora.output(), lora.input()];
            match source.info(&format!("{module}.weight")) {
                Some(info) if info.shape == needs => {}
                Some(info) => problems.push(format!(
                    "{module}: the model's matrix is {:?}, the adapter's {needs:?}",
                    info.shape
                )),
                None => problems.push(format!("{module}: the model has no such module")),
            }
        }
        let what = format!("this adapter is not for {}", source.path().display());
        refuse(&adapter.path, &what, problems)?;
        Ok(Self { source, adapter })
    }

    fn update(&self, name: &str) -> Option<&Lora> {
        self.adapter.modules.get(name.strip_suffix(".weight")?)
    }
}

impl<S: TensorSource> TensorSource for LoraMerged<S> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = self.source.info(name)?;
        Some(match self.update(name) {
            Some(_) => TensorInfo {
                dtype: SourceDtype::F32,
                bytes: 4 * info.numel().unsigned_abs(),
                ..info
            },
            None => info,
        })
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let weight = self.source.load(name)?;
        match self.update(name) {
            Some(lora) => Ok(weight.f_to_kind(Kind::Float)?.f_add(&lora.delta()?)?),
            None => Ok(weight),
        }
    }

    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        match self.update(name) {
            Some(_) => Ok(None),
            None => self.source.stored(name),
        }
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        self.source.metadata()
    }
}

#[cfg(test)]
mod tests;
