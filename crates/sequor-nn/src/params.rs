//! Where the numbers of a model come from: one builder serves loading and training.
//!
//! A model is written once, asking the builder for each tensor by name and shape.
//! The builder answers from a checkpoint, from an initial law, or from both
//! (fine-tuning), and keeps account. A tensor that is missing or has another shape
//! does not stop the construction; [`ParamBuilder::finish`] names all of them in
//! one error, each with the nearest name the file does have.

use crate::device::{DType, Weights};
use crate::lora::{Lora, LoraConfig};
use crate::matrix::{Matrix, quantise};
use crate::weights::TensorSource;
use crate::{Error, Result};
use sequor_kernels::matmul::{Format, Isa, Stored};
use sequor_kernels::rng::{Key, Purpose};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// The law a parameter is drawn from when it is not loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `[-bound, bound]`.
    Uniform(f64),
}

/// How a parameter is used, which decides its number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix of a linear layer or an embedding: kept in the chosen format.
    Matrix,
    /// A norm's scale, a bias of a norm: always f32.
    Vector,
}

/// One parameter of a model.
#[derive(Debug)]
pub struct Param {
    /// Its name in the checkpoint.
    pub name: String,
    /// The tensor; shares storage with the model's.
    pub tensor: Tensor,
    /// How it is used.
    pub role: Role,
}

/// A tensor that a checkpoint lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The name that was asked for.
    pub name: String,
    /// The nearest name among those nobody asked for.
    pub nearest: Option<String>,
}

/// A tensor whose shape does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misshaped {
    /// Its name.
    pub name: String,
    /// The shape the model needs.
    pub expected: Vec<i64>,
    /// The shape in the file.
    pub found: Vec<i64>,
}

/// Everything about a checkpoint that does not fit the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MismatchReport {
    /// The checkpoint.
    pub path: PathBuf,
    /// Tensors the model needs and the file lacks.
    pub missing: Vec<Missing>,
    /// Tensors of the file that the model has no place for.
    pub unexpected: Vec<String>,
    /// Tensors of another shape.
    pub misshaped: Vec<Misshaped>,
}

/// How many names of one kind a message lists before it counts the rest.
const LISTED: usize = 12;

impl fmt::Display for MismatchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: the tensors do not fit the model that its config describes ({} missing, {} of another shape, {} unexpected)",
            self.path.display(),
            self.missing.len(),
            self.misshaped.len(),
            self.unexpected.len()
        )?;
        for m in self.missing.iter().take(LISTED) {
            write!(f, "\n  missing: {}", m.name)?;
            if let Some(n) = &m.nearest {
                write!(f, " (nearest in the file: {n})")?;
            }
        }
        rest(f, self.missing.len())?;
        for m in self.misshaped.iter().take(LISTED) {
            write!(
                f,
                "\n  shape: {} is {:?} in the file, the model needs {:?}",
                m.name, m.found, m.expected
            )?;
        }
        rest(f, self.misshaped.len())?;
        for name in self.unexpected.iter().take(LISTED) {
            write!(f, "\n  unexpected: {name}")?;
        }
        rest(f, self.unexpected.len())
    }
}

fn rest(f: &mut fmt::Formatter<'_>, n: usize) -> fmt::Result {
    if n > LISTED {
        write!(f, "\n  ... and {} more", n - LISTED)
    } else {
        Ok(())
    }
}

impl std::error::Error for MismatchReport {}

#[derive(Default)]
struct Account {
    requested: BTreeSet<String>,
    missing: Vec<String>,
    misshaped: Vec<Misshaped>,
    params: BTreeMap<String, (Tensor, Role)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// Parameters are read and used as they are.
    Infer,
    /// Parameters are trainable, and drawn from this seed when there is no file.
    Train(u64),
    /// Nothing is read: only names and shapes are compared.
    DryRun,
}

struct Shared {
    source: Option<Rc<dyn TensorSource>>,
    mode: Mode,
    kind: Kind,
    weights: Weights,
    device: Device,
    /// Which linear layers get a trainable low-rank update, and the seed of its numbers.
    lora: Option<(LoraConfig, u64)>,
    account: RefCell<Account>,
}

/// Hands out the parameters of a model by name. Cheap to clone; clones share one account.
#[derive(Clone)]
pub struct ParamBuilder {
    shared: Rc<Shared>,
    prefix: String,
    exact: bool,
}

impl ParamBuilder {
    fn new(source: Option<Rc<dyn TensorSource>>, mode: Mode, kind: Kind, device: Device) -> Self {
        let shared = Shared {
            source,
            mode,
            kind,
            weights: Weights::Float(DType::F32),
            device,
            lora: None,
            account: RefCell::default(),
        };
        Self {
            shared: Rc::new(shared),
            prefix: String::new(),
            exact: false,
        }
    }

    /// Parameters from a checkpoint, for inference. Matrices are converted to `kind`.
    pub fn load(source: Box<dyn TensorSource>, kind: Kind, device: Device) -> Self {
        Self::new(Some(source.into()), Mode::Infer, kind, device)
    }

    /// Parameters from a checkpoint, for inference, matrices kept as `weights` says.
    /// [`Weights::Auto`] means bf16 elsewhere than on a CPU; where this processor has no
    /// instructions for our formats, quantised files are expanded to f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for one of our formats elsewhere than on a CPU.
    pub fn load_as(
        source: Box<dyn TensorSource>,
        weights: Weights,
        device: Device,
    ) -> Result<Self> {
        let cpu = device == Device::Cpu;
        if let (Weights::Packed(format), false) = (weights, cpu) {
            return Err(Error::Unsupported(format!(
                "weights kept as {format} are computed on a CPU, not on {device:?}: choose f32, f16 or bf16"
            )));
        }
        let mut builder = Self::load(source, weights.dtype().kind(), device);
        if let (Some(shared), true) = (Rc::get_mut(&mut builder.shared), cpu) {
            shared.weights = weights;
        }
        Ok(builder)
    }

    /// Trainable parameters drawn from their initial laws. The numbers depend on
    /// `seed` and the name alone, not on the order of construction.
    pub fn init(seed: u64, kind: Kind, device: Device) -> Self {
        Self::new(None, Mode::Train(seed), kind, device)
    }

    /// Trainable parameters that begin at a checkpoint's values.
    pub fn tune(source: Box<dyn TensorSource>, kind: Kind, device: Device) -> Self {
        Self::new(Some(source.into()), Mode::Train(0), kind, device)
    }

    /// A fresh builder over the same checkpoint that also puts a trainable low-rank update
    /// on every linear layer that `config` names ([`crate::lora`]). The numbers depend on
    /// `seed` and the name: `A` uniform within `1/sqrt(in)`, `B` zero, so that nothing
    /// changes at first. On a builder made by [`load`](Self::load) the updates are the only
    /// trainable parameters.
    ///
    /// # Errors
    /// [`Error::Config`] when `config` is out of range.
    pub fn with_lora(self, config: LoraConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let s = &self.shared;
        let shared = Shared {
            source: s.source.clone(),
            mode: s.mode,
            kind: s.kind,
            weights: s.weights,
            device: s.device,
            lora: Some((config, seed)),
            account: RefCell::default(),
        };
        Ok(Self {
            shared: Rc::new(shared),
            prefix: self.prefix,
            exact: self.exact,
        })
    }

    /// The update of the linear layer that this builder stands at, if it is to have one.
    pub(crate) fn lora(&self, input: i64, output: i64) -> Result<Option<Lora>> {
        let s = &*self.shared;
        let Some((config, seed)) = s.lora.as_ref().filter(|_| s.mode != Mode::DryRun) else {
            return Ok(None);
        };
        if !config.targets(self.prefix.trim_end_matches('.')) {
            return Ok(None);
        }
        let make = |name: &str, shape: [i64; 2], init: Init| -> Result<Tensor> {
            let full = format!("{}{name}", self.prefix);
            let value = draw(Key::new(*seed, name_hash(&full)), &shape, init)?;
            let value = value.f_to_device(s.device)?.f_set_requires_grad(true)?;
            let kept = (value.shallow_clone(), Role::Vector); // f32 in every model
            s.account.borrow_mut().params.insert(full, kept);
            Ok(value)
        };
        let law = Init::Uniform((input.max(1) as f64).sqrt().recip());
        let a = make("lora_A.weight", [config.rank, input], law)?;
        let b = make("lora_B.weight", [output, config.rank], Init::Zeros)?;
        Ok(Some(Lora::new(a, b, config.scale(), config.dropout)?))
    }

    /// A builder over the same checkpoint that reads nothing and takes no memory:
    /// built with it, a model finds out whether the file fits before anything is loaded.
    #[must_use]
    pub fn dry_run(&self) -> Self {
        let s = &self.shared;
        Self {
            prefix: self.prefix.clone(),
            ..Self::new(s.source.clone(), Mode::DryRun, s.kind, s.device)
        }
    }

    /// The builder for the part of the model called `name`.
    #[must_use]
    pub fn pp(&self, name: impl fmt::Display) -> Self {
        Self {
            shared: self.shared.clone(),
            prefix: format!("{}{name}.", self.prefix),
            exact: self.exact,
        }
    }

    /// The same builder for parts whose matrices must not be quantised, such as the router
    /// of a mixture of experts: few numbers, and a small error in them changes who computes.
    #[must_use]
    pub fn exact(&self) -> Self {
        Self {
            exact: true,
            ..self.clone()
        }
    }

    /// May a layer join its matrices into one copy? Only for inference: a parameter in
    /// training keeps its own storage and name.
    pub fn may_join(&self) -> bool {
        self.shared.mode == Mode::Infer
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    /// Does the checkpoint have this tensor? (Always false without a checkpoint.)
    pub fn has(&self, name: &str) -> bool {
        let full = format!("{}{name}", self.prefix);
        self.shared
            .source
            .as_ref()
            .is_some_and(|s| s.info(&full).is_some())
    }

    /// Says that a tensor may be in the file and is not wanted.
    pub fn ignore(&self, name: &str) {
        self.shared
            .account
            .borrow_mut()
            .requested
            .insert(format!("{}{name}", self.prefix));
    }

    /// The matrix `name` of the given shape, in the chosen number format.
    ///
    /// # Errors
    /// Only when the file cannot be read; a missing or mis-shaped tensor is
    /// reported by [`finish`](Self::finish).
    pub fn matrix(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        self.get(name, shape, init, Role::Matrix)
    }

    /// The matrix `name` `[output, input]` of a linear layer or a table, by rows and kept as
    /// was asked for.
    ///
    /// # Errors
    /// When the file cannot be read, or the format cannot keep this matrix; a missing or
    /// mis-shaped tensor is reported by [`finish`](Self::finish).
    pub fn weight(&self, name: &str, output: i64, input: i64, init: Init) -> Result<Matrix> {
        let shape = [output, input];
        if let Some(stored) = self.quantised(name, &shape)? {
            let full = format!("{}{name}", self.prefix);
            self.shared.account.borrow_mut().requested.insert(full);
            return Ok(Matrix::Stored(stored));
        }
        Ok(Matrix::Dense(self.matrix(name, &shape, init)?))
    }

    /// The matrix in the format of ours that it is to be kept in, if it is.
    fn quantised(&self, name: &str, shape: &[i64; 2]) -> Result<Option<Stored>> {
        let s = &*self.shared;
        let wanted = s.weights;
        if self.exact || s.mode != Mode::Infer || matches!(wanted, Weights::Float(_)) {
            return Ok(None);
        }
        let full = format!("{}{name}", self.prefix);
        let Some((source, info)) = s.source.as_ref().and_then(|f| Some((f, f.info(&full)?))) else {
            return Ok(None);
        };
        if info.shape != shape {
            return Ok(None);
        }
        let format = match wanted {
            Weights::Packed(format) => format,
            // Blocks of other types have more than four bits and fit these.
            _ if info.dtype.is_quantised() && Isa::serve() => {
                info.dtype.format().unwrap_or(Format::Q8_0)
            }
            _ => return Ok(None),
        };
        // Blocks are converted row by row: all numbers at once would be most of the memory
        // that loading takes.
        if info.dtype.format().is_some()
            && let Some(stored) = source.stored(&full)?
        {
            return if stored.format() == format {
                Ok(Some(stored))
            } else {
                let converted = stored.convert(format).map_err(Error::from);
                converted.map(Some).map_err(|e| e.in_layer(&full))
            };
        }
        let stored = quantise(format, &source.load(&full)?);
        stored.map(Some).map_err(|e| e.in_layer(&full))
    }

    /// The vector `name` of the given shape, in f32.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn vector(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        self.get(name, shape, init, Role::Vector)
    }

    fn get(&self, name: &str, shape: &[i64], init: Init, role: Role) -> Result<Tensor> {
        let s = &*self.shared;
        let full = format!("{}{name}", self.prefix);
        let kind = if role == Role::Matrix {
            self.kind_of(&full)
        } else {
            Kind::Float
        };
        if let Some((t, _)) = s.account.borrow().params.get(&full) {
            return Ok(t.shallow_clone()); // a tied parameter, asked for twice
        }
        s.account.borrow_mut().requested.insert(full.clone());
        let value = match &s.source {
            Some(source) => match source.info(&full) {
                Some(info) if info.shape == shape && s.mode == Mode::DryRun => None,
                Some(info) if info.shape == shape => {
                    Some(source.load(&full)?.f_to_kind(kind)?.f_to_device(s.device)?)
                }
                Some(info) => {
                    let m = Misshaped {
                        name: full.clone(),
                        expected: shape.to_vec(),
                        found: info.shape,
                    };
                    s.account.borrow_mut().misshaped.push(m);
                    None
                }
                None => {
                    s.account.borrow_mut().missing.push(full.clone());
                    None
                }
            },
            None => {
                let Mode::Train(seed) = s.mode else {
                    return Err(Error::Config("no checkpoint to load from".into()));
                };
                Some(
                    draw(Key::new(seed, name_hash(&full)), shape, init)?
                        .f_to_kind(kind)?
                        .f_to_device(s.device)?,
                )
            }
        };
        // A stand-in that costs no memory lets the construction go on to collect
        // the whole report, even when a config asks for absurd sizes.
        let Some(value) = value else {
            return Ok(Tensor::f_zeros([1], (kind, s.device))?.f_expand(shape, false)?);
        };
        if matches!(s.mode, Mode::Train(_)) {
            let value = value.f_set_requires_grad(true)?;
            s.account
                .borrow_mut()
                .params
                .insert(full, (value.shallow_clone(), role));
            return Ok(value);
        }
        Ok(value)
    }

    /// The number format of a matrix that is kept as plain numbers: what was asked for, or
    /// with [`Weights::Auto`] that of the file.
    fn kind_of(&self, full: &str) -> Kind {
        let s = &*self.shared;
        if s.weights != Weights::Auto {
            return s.kind;
        }
        let info = s.source.as_ref().and_then(|f| f.info(full));
        match info.and_then(|i| i.dtype.kind()) {
            Some(kind @ (Kind::Half | Kind::BFloat16)) => kind,
            _ => Kind::Float,
        }
    }

    /// Ends the construction.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with the whole list when a tensor of the checkpoint is
    /// missing, has another shape, or has no place in the model.
    pub fn finish(&self) -> Result<()> {
        let Some(source) = &self.shared.source else {
            return Ok(());
        };
        let a = self.shared.account.borrow();
        let unexpected: Vec<String> = source
            .names()
            .into_iter()
            .filter(|n| !a.requested.contains(n) && !is_buffer(n))
            .collect();
        if a.missing.is_empty() && a.misshaped.is_empty() && unexpected.is_empty() {
            return Ok(());
        }
        let missing = a
            .missing
            .iter()
            .map(|name| Missing {
                name: name.clone(),
                nearest: nearest(name, &unexpected),
            })
            .collect();
        let report = MismatchReport {
            path: source.path().to_path_buf(),
            missing,
            unexpected,
            misshaped: a.misshaped.clone(),
        };
        Err(Error::Mismatch(Box::new(report)))
    }

    /// All trainable parameters handed out so far, by name.
    pub fn params(&self) -> Vec<Param> {
        let a = self.shared.account.borrow();
        a.params
            .iter()
            .map(|(name, (tensor, role))| Param {
                name: name.clone(),
                tensor: tensor.shallow_clone(),
                role: *role,
            })
            .collect()
    }
}

/// Tables that some files carry and every implementation recomputes.
fn is_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || name.ends_with(".attn.masked_bias")
        || name.ends_with(".attn.bias")
}

fn name_hash(name: &str) -> u64 {
    // FNV-1a: stable across platforms and versions.
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn draw(key: Key, shape: &[i64], init: Init) -> Result<Tensor> {
    let options = (Kind::Float, Device::Cpu);
    let scale = match init {
        Init::Zeros => return Ok(Tensor::f_zeros(shape, options)?),
        Init::Ones => return Ok(Tensor::f_ones(shape, options)?),
        Init::Normal(std) => std,
        Init::Uniform(bound) => bound,
    };
    let n = shape.iter().try_fold(1usize, |n, &d| {
        usize::try_from(d).ok().and_then(|d| n.checked_mul(d))
    });
    let n = n
        .filter(|&n| n <= 1 << 33)
        .ok_or_else(|| Error::Limits(format!("a parameter of shape {shape:?} is too large")))?;
    let mut values = vec![0f32; n];
    let mut stream = key.stream(0, Purpose::Init);
    match init {
        Init::Normal(_) => stream.fill_normal_f32(&mut values),
        _ => {
            stream.fill_uniform_f32(&mut values);
            values.iter_mut().for_each(|v| *v = 2.0 * *v - 1.0);
        }
    }
    values.iter_mut().for_each(|v| *v *= scale as f32);
    sequor_kernels::bridge::from_slice(&values, shape).map_err(|e| Error::Input(e.to_string()))
}

/// The candidate with the smallest edit distance, if it is near at all.
fn nearest(name: &str, candidates: &[String]) -> Option<String> {
    let limit = name.len() / 2;
    // The distance is quadratic: a hostile file with long names must not stall us.
    let near = candidates
        .iter()
        .take(2000)
        .filter(|c| c.len() <= 256 && c.len().abs_diff(name.len()) <= limit);
    near.map(|c| (edit_distance(name, c), c))
        .filter(|(d, _)| *d <= limit)
        .min()
        .map(|(_, c)| c.clone())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{SourceDtype, TensorInfo};
    use std::path::Path;

    #[derive(Debug)]
    struct Fake(BTreeMap<String, Tensor>);

    impl TensorSource for Fake {
        fn path(&self) -> &Path {
            Path::new("fake.safetensors")
        }
        fn names(&self) -> Vec<String> {
            self.0.keys().cloned().collect()
        }
        fn info(&self, name: &str) -> Option<TensorInfo> {
            let t = self.0.get(name)?;
            Some(TensorInfo {
                shape: t.size(),
                dtype: SourceDtype::F32,
                bytes: 4,
                file: "fake.safetensors".into(),
            })
        }
        fn load(&self, name: &str) -> Result<Tensor> {
            Ok(self.0[name].shallow_clone())
        }
    }

    fn zeros(shape: &[i64]) -> Tensor {
        Tensor::f_zeros(shape, (Kind::Float, Device::Cpu)).unwrap()
    }

    #[test]
    fn one_error_lists_everything() {
        let tensors = [
            ("a.weight", &[2, 3][..]),
            ("b.wieght", &[2]),
            ("c", &[4]),
            ("x.rotary_emb.inv_freq", &[1]),
        ];
        let fake = Fake(
            tensors
                .iter()
                .map(|(n, s)| ((*n).to_owned(), zeros(s)))
                .collect(),
        );
        let b = ParamBuilder::load(Box::new(fake), Kind::Float, Device::Cpu);
        let _ = b.pp("a").matrix("weight", &[2, 3], Init::Zeros).unwrap();
        let _ = b.pp("b").vector("weight", &[2], Init::Ones).unwrap();
        let _ = b.vector("c", &[5], Init::Ones).unwrap();
        // An absurd size costs nothing when the tensor is not there.
        let _ = b.vector("huge", &[1 << 40], Init::Ones).unwrap();
        let Err(Error::Mismatch(r)) = b.finish() else {
            panic!("expected a report")
        };
        assert_eq!(r.missing.len(), 2);
        assert_eq!(r.missing[0].nearest.as_deref(), Some("b.wieght"));
        assert_eq!(r.unexpected, ["b.wieght"]);
        assert_eq!(r.misshaped[0].found, [4]);
        let text = r.to_string();
        assert!(
            text.contains("b.weight (nearest in the file: b.wieght)"),
            "{text}"
        );
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_only() {
        let values = |seed, first: &str, name: &str| {
            let b = ParamBuilder::init(seed, Kind::Float, Device::Cpu);
            let _ = b.matrix(first, &[3], Init::Normal(1.0)).unwrap();
            let t = b.matrix(name, &[64, 64], Init::Normal(0.02)).unwrap();
            assert!(t.requires_grad());
            Vec::<f32>::try_from(t.detach().reshape([-1])).unwrap()
        };
        let a = values(1, "p", "w");
        assert_eq!(a, values(1, "q", "w"));
        assert_ne!(a, values(2, "p", "w"));
        assert_ne!(a, values(1, "p", "v"));
        let std = (a.iter().map(|x| f64::from(x * x)).sum::<f64>() / a.len() as f64).sqrt();
        assert!((std - 0.02).abs() < 0.001, "{std}");
    }

    #[test]
    fn a_tied_parameter_is_one_tensor() {
        let b = ParamBuilder::init(1, Kind::Float, Device::Cpu);
        let x = b.matrix("w", &[2], Init::Normal(1.0)).unwrap();
        let y = b.matrix("w", &[2], Init::Normal(1.0)).unwrap();
        assert_eq!(x.data_ptr(), y.data_ptr());
        assert_eq!(b.params().len(), 1);
    }
}
