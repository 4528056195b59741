//! A decoder with its weights, as a target or draft of generation.

use crate::config::DecoderConfig;
use crate::decoder::{Decoder, Input};
use crate::{gguf, keys};
use sequor_kernels::cost::CostCurve;
use sequor_nn::attention::Cached;
use sequor_nn::block::Pass;
use sequor_nn::device::{DType, Weights};
use sequor_nn::kv::{KvCache, KvShape};
use sequor_nn::weights::{self, Gguf, TensorSource};
use sequor_nn::{Device, Error, ParamBuilder, Result, Tensor};
use sequor_sampling::{Layout, LogitRows, Logits, Output, Step, TargetModel};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// A causal language model ready to generate.
#[derive(Debug)]
pub struct CausalLm {
    decoder: Decoder,
    source: PathBuf,
    weights: Weights,
    /// Longest sequence the state may hold.
    context: usize,
    cost: RefCell<Option<CostCurve>>,
}

/// The config of a model folder, or of the metadata of a GGUF file.
///
/// # Errors
/// When there is no config, it is damaged, or it names an unknown architecture.
pub fn read_config(path: &Path) -> Result<DecoderConfig> {
    let config = if is_gguf(path)? {
        gguf::config(&Gguf::open(path)?)
    } else {
        DecoderConfig::from_json(&read_json(&path.join("config.json"))?)
    };
    // Say which file is meant.
    config.map_err(|e| match e {
        Error::Config(what) => Error::Config(format!("{}: {what}", path.display())),
        Error::Unsupported(what) => Error::Unsupported(format!("{}: {what}", path.display())),
        other => other,
    })
}

/// Reads a JSON file of reasonable size.
///
/// # Errors
/// [`Error::Io`] and [`Error::Weights`] naming the file.
pub fn read_json(path: &Path) -> Result<serde_json::Value> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::weights(path, "is not a regular file"));
    }
    if meta.len() > 64 << 20 {
        return Err(Error::Limits(format!(
            "{}: a JSON file of {} MB is not read",
            path.display(),
            meta.len() >> 20
        )));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::weights(path, format!("is not valid JSON: {e}")))
}

fn is_gguf(path: &Path) -> Result<bool> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if meta.is_dir() {
        return Ok(false);
    }
    if !meta.is_file() {
        return Err(Error::weights(
            path,
            "is neither a model folder nor a GGUF file",
        ));
    }
    let mut magic = [0u8; 4];
    let mut file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    match std::io::Read::read_exact(&mut file, &mut magic) {
        Ok(()) if &magic == b"GGUF" => Ok(true),
        _ => Err(Error::weights(
            path,
            "is not a GGUF file; give a model folder (with config.json) or a .gguf file",
        )),
    }
}

impl CausalLm {
    /// Loads a model folder (`config.json` and weights) or a GGUF file; `weights` says how its
    /// matrices are kept, a [`DType`] or one of our formats.
    ///
    /// # Errors
    /// One error that names the file and everything that does not fit.
    pub fn load(path: &Path, weights: impl Into<Weights>, device: Device) -> Result<Self> {
        let keep = weights.into();
        let config = read_config(path)?;
        let source: Box<dyn TensorSource> = if is_gguf(path)? {
            Box::new(weights::hugging_face_names(Gguf::open(path)?)?)
        } else {
            keys::canonical(weights::open(path)?, &config)?
        };
        let params = ParamBuilder::load_as(source, keep, device)?;
        // Compare names and shapes first: nothing is allocated for a file that does not fit.
        let check = params.dry_run();
        Decoder::new(&check, &config)?;
        check.finish()?;
        Ok(Self::new(Decoder::new(&params, &config)?, path, keep))
    }

    /// Wraps a network that is already there.
    pub fn new(decoder: Decoder, source: &Path, weights: impl Into<Weights>) -> Self {
        let context = decoder.config().context;
        Self {
            decoder,
            source: source.to_path_buf(),
            weights: weights.into(),
            context,
            cost: RefCell::new(None),
        }
    }

    /// The network.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Its configuration.
    pub fn config(&self) -> &DecoderConfig {
        self.decoder.config()
    }

    /// Where it was loaded from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// How its matrices are kept.
    pub fn weights(&self) -> Weights {
        self.weights
    }

    /// Number format of what is computed beside it, such as draft heads.
    pub fn dtype(&self) -> DType {
        self.weights.dtype()
    }

    /// Identity of the model: the first 16 hexadecimal digits of the SHA-256 over its sizes
    /// (vocabulary, width, layers, query heads, key/value heads, feed-forward width; 64-bit
    /// little-endian) and the scales of all norms in the order of the layers (f32,
    /// little-endian). Norms are f32 whatever the format of the matrices, so that a
    /// quantised file and its original have one identity. What was trained beside a model
    /// (draft heads) names it by this.
    ///
    /// # Errors
    /// When a norm cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let c = self.config();
        let mut hash = Sha256::new();
        let sizes = [
            c.vocab_size,
            c.dim,
            c.layers as i64,
            c.heads,
            c.kv_heads,
            c.hidden,
        ];
        sizes.iter().for_each(|n| hash.update(n.to_le_bytes()));
        for norm in self.decoder.norms() {
            let scale = sequor_kernels::bridge::to_vec::<f32>(norm.weight())
                .map_err(|e| Error::Input(e.to_string()))?;
            scale.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
        let digest = hash.finalize();
        Ok(digest.iter().take(8).map(|b| format!("{b:02x}")).collect())
    }

    /// Measures what a pass over 1, 2, 4, .. rows costs here, unless that is known
    /// already. The curve decides how deep drafts are; it never changes an output.
    ///
    /// # Errors
    /// When a forward fails.
    pub fn measure_cost(&self) -> Result<CostCurve> {
        if let Some(curve) = self.cost.borrow().as_ref() {
            return Ok(curve.clone());
        }
        let shape = KvShape {
            max_len: self.context.min(512),
            ..self.kv_shape()
        };
        let mut state = KvCache::new(shape, 1)?;
        // Some context, so that attention is there to be paid for.
        let warm = vec![0u32; (self.context / 2).min(128)];
        let run = |state: &mut KvCache, tokens: &[u32], keep: bool| -> Result<()> {
            let step = Step {
                slot: 0,
                tokens,
                layout: Layout::Chain,
                logits: LogitRows::All,
                features: false,
            };
            self.run(&[step], state)?;
            if keep {
                state.commit(0, &(0..tokens.len()).collect::<Vec<_>>())
            } else {
                state.discard(0)
            }
        };
        run(&mut state, &warm, true)?;
        let most = (self.context - warm.len()).min(16);
        let rows: Vec<usize> = [1, 2, 3, 4, 6, 8, 12, 16]
            .into_iter()
            .filter(|&r| r <= most)
            .collect();
        let tokens = vec![0u32; most];
        let curve =
            sequor_kernels::cost::measure(&rows, 5, |n| run(&mut state, &tokens[..n], false))?;
        *self.cost.borrow_mut() = Some(curve.clone());
        Ok(curve)
    }

    pub(crate) fn kv_shape(&self) -> KvShape {
        let c = self.config();
        KvShape {
            layers: c.layers,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            max_len: self.context,
            device: self.decoder.device(),
        }
    }

    pub(crate) fn run(&self, steps: &[Step<'_>], state: &mut KvCache) -> Result<Vec<Output>> {
        self.run_layers(0..self.config().layers, steps, state)
    }

    /// One forward through some of the layers, the final norm and the head.
    pub(crate) fn run_layers(
        &self,
        layers: impl IntoIterator<Item = usize>,
        steps: &[Step<'_>],
        state: &mut KvCache,
    ) -> Result<Vec<Output>> {
        let _no_grad = sequor_nn::tch::no_grad_guard();
        let (ids, positions) = self.announce(steps, state)?;
        let slots: Vec<usize> = steps.iter().map(|s| s.slot).collect();
        let rows = self
            .decoder
            .input_rows(&Input::Ids(&ids), &positions, 0.0)?;
        let rope = self.decoder.rotations(&positions)?;
        let mut pass = Pass {
            attend: &mut Cached::new(state, &slots),
            rope: rope.as_ref(),
            dropout: 0.0,
        };
        let (rows, _) = self.decoder.run_layers(layers, rows, &mut pass, &[])?;
        self.outputs(steps, &self.decoder.finish(&rows)?)
    }

    /// Checks the steps and makes their rows pending; gives the ids `[rows]` and positions of
    /// all of them, one step after the other.
    pub(crate) fn announce(
        &self,
        steps: &[Step<'_>],
        state: &mut KvCache,
    ) -> Result<(Tensor, Vec<i64>)> {
        let vocab = self.config().vocab_size;
        let mut positions = Vec::new();
        let mut ids: Vec<i64> = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            if steps[..i].iter().any(|s| s.slot == step.slot) {
                return Err(Error::Input(format!(
                    "slot {} appears twice in one forward",
                    step.slot
                )));
            }
            if let Some(bad) = step.tokens.iter().find(|&&t| i64::from(t) >= vocab) {
                return Err(Error::Input(format!(
                    "token id {bad} lies outside the vocabulary of {vocab}"
                )));
            }
            let chain: Vec<Option<usize>>;
            let parents = match step.layout {
                Layout::Chain => {
                    chain = (0..step.tokens.len())
                        .map(|i: usize| i.checked_sub(1))
                        .collect();
                    &chain[..]
                }
                Layout::Tree(parents) if parents.len() == step.tokens.len() => parents,
                Layout::Tree(parents) => {
                    return Err(Error::Input(format!(
                        "{} parents for {} tokens",
                        parents.len(),
                        step.tokens.len()
                    )));
                }
            };
            positions.extend(state.begin(step.slot, parents)?);
            ids.extend(step.tokens.iter().map(|&t| i64::from(t)));
        }
        if ids.is_empty() {
            return Err(Error::Input("a forward needs at least one token".into()));
        }
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(self.decoder.device())?;
        Ok((ids, positions))
    }

    /// Projects only the rows that somebody wants to see.
    pub(crate) fn outputs(&self, steps: &[Step<'_>], hidden: &Tensor) -> Result<Vec<Output>> {
        let mut wanted: Vec<i64> = Vec::new();
        let mut start = 0i64;
        for step in steps {
            let end = start + step.tokens.len() as i64;
            match step.logits {
                LogitRows::None => {}
                LogitRows::Last => wanted.extend((end - 1).max(start)..end),
                LogitRows::All => wanted.extend(start..end),
            }
            start = end;
        }
        let vocab = self.config().vocab_size as usize;
        let mut rows: Vec<f32> = Vec::new();
        if !wanted.is_empty() {
            let all = wanted.len() as i64 == start;
            let chosen = if all {
                hidden.shallow_clone()
            } else {
                hidden.f_index_select(
                    0,
                    &Tensor::f_from_slice(&wanted)?.f_to_device(hidden.device())?,
                )?
            };
            rows = sequor_kernels::bridge::to_vec(&self.decoder.logits(&chosen)?)
                .map_err(|e| Error::Input(e.to_string()))?;
        }
        let (mut outputs, mut taken, mut start) = (Vec::with_capacity(steps.len()), 0, 0i64);
        for step in steps {
            let n = step.tokens.len();
            let count = match step.logits {
                LogitRows::None => 0,
                LogitRows::Last => n.min(1),
                LogitRows::All => n,
            } * vocab;
            let features = if step.features {
                Some(hidden.f_narrow(0, start, n as i64)?)
            } else {
                None
            };
            let data = if count == rows.len() {
                std::mem::take(&mut rows)
            } else {
                rows[taken..taken + count].to_vec()
            };
            let logits = Logits::new(data, vocab).map_err(|e| Error::Input(e.to_string()))?;
            outputs.push(Output { logits, features });
            taken += count;
            start += n as i64;
        }
        Ok(outputs)
    }
}

/// A failed forward leaves nothing pending behind.
pub(crate) fn or_discard<T>(
    outcome: Result<T>,
    steps: &[Step<'_>],
    state: &mut KvCache,
) -> sequor_sampling::Result<T> {
    if outcome.is_err() {
        let slots = state.slots();
        for step in steps.iter().filter(|s| s.slot < slots) {
            state.discard(step.slot)?;
        }
    }
    Ok(outcome?)
}

impl TargetModel for CausalLm {
    type State = KvCache;

    fn vocab_size(&self) -> usize {
        self.config().vocab_size as usize
    }

    fn context_len(&self) -> usize {
        self.context
    }

    fn new_state(&self, slots: usize) -> sequor_sampling::Result<KvCache> {
        Ok(KvCache::new(self.kv_shape(), slots)?)
    }

    fn forward(
        &self,
        steps: &[Step<'_>],
        state: &mut KvCache,
    ) -> sequor_sampling::Result<Vec<Output>> {
        or_discard(self.run(steps, state), steps, state)
    }

    fn cost_curve(&self) -> Option<CostCurve> {
        self.cost.borrow().clone()
    }
}
