//! Writing a model in another format: smaller files that load as they are.

use crate::pipeline::load_tokenizer;
use crate::{Error, Result};
use sequor_backbone::config::{Family, PositionKind};
use sequor_backbone::{Decoder, DecoderConfig, causal_lm, gguf, keys};
use sequor_kernels::bridge;
use sequor_kernels::matmul::{Format, Stored};
use sequor_nn::device::Weights;
use sequor_nn::rope::Scaling;
use sequor_nn::weights::{
    self, Gguf, GgufArray, GgufValue, PlannedTensor, SourceDtype, TensorInfo, TensorSource,
};
use sequor_nn::{Device, Kind, ParamBuilder};
use sequor_tokenizers::GgufVocab;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How a model is written.
#[derive(Clone, Copy, Debug)]
pub struct QuantiseOptions {
    /// The format of the matrices of linear layers.
    pub to: Weights,
    /// The format of embeddings and head; `None`: `q8_0` where `to` has 4 bits, else as `to`.
    /// (They are few of a large model's numbers and many of its loss: SmolLM2-135M loses 4 %
    /// of perplexity with them in 4 bits.)
    pub tables: Option<Weights>,
    /// Replace what is there already.
    pub overwrite: bool,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct QuantiseReport {
    /// The new file or folder.
    pub path: PathBuf,
    /// Bytes of all tensors in the old file and in the new one.
    pub bytes: (u64, u64),
    /// Tensors and bytes by number format of the new file.
    pub formats: BTreeMap<String, (usize, u64)>,
    /// Matrices that could not be kept as was asked for, with the format they have instead.
    pub other: Vec<(String, String)>,
    /// Root of the squared rounding errors of all matrices over that of their squares.
    pub relative_error: f64,
}

/// Writes the model at `from` (a folder or a GGUF file) to `to`: a GGUF file when it ends in
/// `.gguf`, else a folder of safetensors with config and tokenizer. `say` is told about
/// progress: tensors done, and of how many.
///
/// A folder becomes a GGUF file for models of the Llama, Qwen 2 and Qwen 3 families with a
/// byte-level BPE tokenizer.
///
/// # Errors
/// When the model does not load, `to` exists, or the format cannot keep it. Nothing is left
/// behind under the name of a file; a folder may be left without weights.
pub fn quantise(
    from: &Path,
    to: &Path,
    options: &QuantiseOptions,
    mut say: impl FnMut(usize, usize),
) -> Result<QuantiseReport> {
    let into_gguf = to
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if !options.overwrite && to.exists() {
        return Err(Error::Input(format!(
            "{} exists already; choose another name or remove it",
            to.display()
        )));
    }
    let model = Model::open(from)?;
    let values = into_gguf.then(|| model.values(options)).transpose()?;
    let source = model.into_source(into_gguf)?;
    let names = source.names();
    let mut report = QuantiseReport {
        path: to.to_path_buf(),
        bytes: (0, 0),
        formats: BTreeMap::new(),
        other: Vec::new(),
        relative_error: 0.0,
    };
    let mut plan = Vec::new();
    for name in &names {
        let Some(info) = source.info(name) else {
            continue;
        };
        let dtype = chosen(name, &info, options, into_gguf);
        if let Some(dtype) = dtype
            .as_ref()
            .filter(|d| **d != wanted(name, options, &info))
        {
            report.other.push((name.clone(), dtype.to_string()));
        }
        let dtype = dtype.unwrap_or_else(|| kept(&info, into_gguf));
        let tensor = PlannedTensor {
            name: name.clone(),
            shape: info.shape,
            dtype,
        };
        let bytes = tensor.bytes()? as u64;
        let entry = report.formats.entry(tensor.dtype.to_string()).or_default();
        *entry = (entry.0 + 1, entry.1 + bytes);
        report.bytes = (report.bytes.0 + info.bytes, report.bytes.1 + bytes);
        plan.push(tensor);
    }
    let mut done = 0;
    let (mut errors, mut squares) = (0f64, 0f64);
    let mut write = |tensor: &PlannedTensor, put: weights::Put<'_>| -> sequor_nn::Result<()> {
        let loss = write_tensor(&*source, tensor, put)?;
        (errors, squares) = (errors + loss.0, squares + loss.1);
        done += 1;
        say(done, plan.len());
        Ok(())
    };
    match values {
        Some(values) => weights::write_gguf(to, &values, &plan, &mut write)?,
        None => {
            std::fs::create_dir_all(to).map_err(|e| Error::io(to, e))?;
            write_beside(from, to)?;
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            let file = to.join("model.safetensors");
            weights::write_safetensors_with(&file, &plan, &metadata, &mut write)?;
        }
    }
    report.relative_error = (errors / squares.max(f64::MIN_POSITIVE)).sqrt();
    Ok(report)
}

/// A model that is known to load.
struct Model {
    path: PathBuf,
    config: DecoderConfig,
    gguf: Option<Gguf>,
}

impl Model {
    fn open(path: &Path) -> Result<Self> {
        let config = causal_lm::read_config(path)?;
        let gguf = if path.is_dir() {
            None
        } else {
            Some(Gguf::open(path)?)
        };
        let model = Self {
            path: path.to_path_buf(),
            config,
            gguf,
        };
        // A file that does not fit its config is refused before anything is written.
        let params = ParamBuilder::load(model.canonical()?, Kind::Float, Device::Cpu).dry_run();
        Decoder::new(&params, &model.config)?;
        params.finish()?;
        Ok(model)
    }

    /// Its tensors under canonical names.
    fn canonical(&self) -> Result<Box<dyn TensorSource>> {
        Ok(match &self.gguf {
            Some(_) => Box::new(weights::hugging_face_names(Gguf::open(&self.path)?)?),
            None => keys::canonical(weights::open(&self.path)?, &self.config)?,
        })
    }

    /// Its tensors under the names of the new file.
    fn into_source(self, into_gguf: bool) -> Result<Box<dyn TensorSource>> {
        if !into_gguf {
            return self.canonical();
        }
        let canonical = self.canonical()?;
        let c = &self.config;
        Ok(match self.gguf {
            // As the file has them: nothing is turned twice.
            Some(gguf) => Box::new(gguf),
            None => {
                let llama = architecture(c)? == "llama";
                let heads = llama.then_some((c.heads, c.kv_heads));
                Box::new(weights::ggml_names(canonical, heads)?)
            }
        })
    }

    /// The metadata of the new GGUF file.
    fn values(&self, options: &QuantiseOptions) -> Result<BTreeMap<String, GgufValue>> {
        let mut values = match &self.gguf {
            Some(gguf) => gguf.values().clone(),
            None => {
                let mut values = config_values(&self.config)?;
                if self.path.join("tokenizer.json").exists() {
                    let tokenizer = load_tokenizer(&self.path)?;
                    let mut vocab = GgufVocab::from_tokenizer(&tokenizer)?;
                    // A table of embeddings is often larger than the vocabulary; GGUF counts
                    // its rows by the tokens.
                    let rows = self.config.vocab_size as usize;
                    for id in vocab.tokens.len()..rows {
                        vocab.tokens.push(format!("[PAD{id}]"));
                        vocab.token_types.iter_mut().for_each(|t| t.push(5));
                    }
                    values.extend(tokenizer_values(vocab));
                } else {
                    let none = GgufValue::String("none".to_owned());
                    values.insert("tokenizer.ggml.model".to_owned(), none);
                }
                values
            }
        };
        values.insert("general.quantization_version".to_owned(), GgufValue::U32(2));
        match file_type(options.to) {
            Some(number) => values.insert("general.file_type".to_owned(), GgufValue::U32(number)),
            None => values.remove("general.file_type"),
        };
        Ok(values)
    }
}

/// ggml's number for "mostly this format".
fn file_type(to: Weights) -> Option<u32> {
    Some(match to.to_string().as_str() {
        "f32" => 0,
        "f16" => 1,
        "q4_0" => 2,
        "q4_1" => 3,
        "q8_0" => 7,
        "q4_k" => 14,
        "bf16" => 32,
        _ => return None,
    })
}

/// GGUF's name for a family whose config its metadata can hold.
fn architecture(c: &DecoderConfig) -> Result<&'static str> {
    let plain = c.windows.iter().all(Option::is_none)
        && matches!(&c.positions, PositionKind::Rotary(r) if matches!(r.scaling(), Scaling::None));
    let name = match c.family {
        Family::Llama | Family::Mistral => Some("llama"),
        Family::Qwen2 => Some("qwen2"),
        Family::Qwen3 => Some("qwen3"),
        _ => None,
    };
    name.filter(|_| plain && c.moe.is_none()).ok_or_else(|| {
        Error::Unsupported(format!(
            "a GGUF file of {}{}: Llama, Qwen 2 and Qwen 3 without sliding windows, scaled positions \
             and experts can be written; write safetensors (a folder) instead",
            c.family.architecture(),
            if plain { "" } else { " with its windows or positions" }
        ))
    })
}

fn config_values(c: &DecoderConfig) -> Result<BTreeMap<String, GgufValue>> {
    let arch = architecture(c)?;
    let PositionKind::Rotary(rope) = &c.positions else {
        return Err(Error::Unsupported(
            "a GGUF file of a model without rotations".to_owned(),
        ));
    };
    let number = |n: i64| GgufValue::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let own = [
        ("context_length", number(c.context as i64)),
        ("embedding_length", number(c.dim)),
        ("block_count", number(c.layers as i64)),
        ("feed_forward_length", number(c.hidden)),
        ("attention.head_count", number(c.heads)),
        ("attention.head_count_kv", number(c.kv_heads)),
        ("attention.key_length", number(c.head_dim)),
        ("attention.value_length", number(c.head_dim)),
        (
            "attention.layer_norm_rms_epsilon",
            GgufValue::F32(c.eps as f32),
        ),
        ("rope.dimension_count", number(c.head_dim)),
        ("rope.freq_base", GgufValue::F32(rope.theta() as f32)),
        ("vocab_size", number(c.vocab_size)),
    ];
    let mut values: BTreeMap<_, _> = own
        .into_iter()
        .map(|(key, value)| (format!("{arch}.{key}"), value))
        .collect();
    let name = GgufValue::String(arch.to_owned());
    values.insert("general.architecture".to_owned(), name);
    Ok(values)
}

fn tokenizer_values(v: GgufVocab) -> impl Iterator<Item = (String, GgufValue)> {
    let text = |t: String| GgufValue::String(t);
    let id = |n: u32| GgufValue::U32(n);
    [
        ("ggml.model", Some(text(v.model))),
        ("ggml.pre", v.pre.map(text)),
        (
            "ggml.tokens",
            Some(GgufValue::Array(GgufArray::String(v.tokens))),
        ),
        (
            "ggml.token_type",
            v.token_types.map(|t| GgufValue::Array(GgufArray::I32(t))),
        ),
        (
            "ggml.merges",
            Some(GgufValue::Array(GgufArray::String(v.merges))),
        ),
        ("ggml.bos_token_id", v.bos.map(id)),
        ("ggml.eos_token_id", v.eos.map(id)),
        ("ggml.unknown_token_id", v.unk.map(id)),
        ("ggml.padding_token_id", v.pad.map(id)),
        ("ggml.add_bos_token", v.add_bos.map(GgufValue::Bool)),
        ("ggml.add_eos_token", v.add_eos.map(GgufValue::Bool)),
        ("chat_template", v.chat_template.map(text)),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((format!("tokenizer.{key}"), value?)))
}

/// Is this a matrix of a linear layer or a table of embeddings?
fn is_matrix(name: &str, info: &TensorInfo) -> bool {
    // Routers choose who computes, position tables are added up: both are small, and stay.
    const EXACT: [&str; 5] = [
        "ffn_gate_inp",
        ".mlp.gate.weight",
        "embed_positions",
        "position_embd",
        "norm",
    ];
    info.shape.len() == 2 && name.ends_with(".weight") && !EXACT.iter().any(|e| name.contains(e))
}

/// The format that was asked for.
fn wanted(name: &str, options: &QuantiseOptions, info: &TensorInfo) -> SourceDtype {
    const TABLES: [&str; 4] = [
        "token_embd.weight",
        "output.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ];
    let four_bits = matches!(
        options.to,
        Weights::Packed(Format::Q4_0 | Format::Q4_1 | Format::Q4K)
    );
    let tables = options.tables.unwrap_or(if four_bits {
        Weights::Packed(Format::Q8_0)
    } else {
        options.to
    });
    match if TABLES.contains(&name) {
        tables
    } else {
        options.to
    } {
        Weights::Auto => info.dtype.clone(),
        Weights::Float(d) => SourceDtype::of(d.kind()).unwrap_or(SourceDtype::F32),
        Weights::Packed(format) => format.into(),
    }
}

/// The format of a matrix; `None` for what is not one.
fn chosen(
    name: &str,
    info: &TensorInfo,
    options: &QuantiseOptions,
    gguf: bool,
) -> Option<SourceDtype> {
    if !is_matrix(name, info) {
        return None;
    }
    let wanted = wanted(name, options, info);
    let width = info.shape.get(1).and_then(|&n| usize::try_from(n).ok())?;
    let fits = |f: Format| f.row_bytes(width).is_some();
    Some(match wanted.format() {
        Some(format) if !fits(format) => match (fits(Format::Q8_0), gguf) {
            (true, _) => SourceDtype::Q8_0,
            (false, true) => SourceDtype::F16,
            (false, false) => SourceDtype::Int8Rows,
        },
        _ => wanted,
    })
}

/// How a tensor that is not a matrix is kept: in f32 in a GGUF file, as llama.cpp expects;
/// else as it is.
fn kept(info: &TensorInfo, gguf: bool) -> SourceDtype {
    if gguf || info.dtype.is_quantised() {
        SourceDtype::F32
    } else {
        info.dtype.clone()
    }
}

/// Writes one tensor; gives the sums of squares of rounding errors and of the numbers.
fn write_tensor(
    source: &dyn TensorSource,
    tensor: &PlannedTensor,
    put: weights::Put<'_>,
) -> sequor_nn::Result<(f64, f64)> {
    let name = &tensor.name;
    let to_layer = |e: sequor_nn::Error| e.in_layer(name);
    let stored = source.stored(name)?;
    if let Some(format) = tensor.dtype.format() {
        if let Some(same) = stored.as_ref().filter(|s| s.format() == format) {
            put(same.bytes())?;
            return Ok((0.0, 0.0));
        }
        let [outputs, inputs] = tensor.shape[..] else {
            return Ok((0.0, 0.0)); // refused when it was planned
        };
        let numbers = match &stored {
            Some(rows) => rows.expand(),
            None => {
                let plain = source.load(name)?.f_to_kind(Kind::Float)?;
                bridge::to_vec::<f32>(&plain).map_err(sequor_nn::Error::from)?
            }
        };
        let quantised = Stored::quantise(format, &numbers, outputs as usize, inputs as usize)
            .map_err(|e| to_layer(e.into()))?;
        put(quantised.bytes())?;
        let mut row = vec![0f32; inputs as usize];
        let (mut errors, mut squares) = (0f64, 0f64);
        for (i, exact) in numbers.chunks_exact(row.len().max(1)).enumerate() {
            quantised.expand_row(i, &mut row);
            for (a, b) in exact.iter().zip(&row) {
                errors += f64::from(a - b).powi(2);
                squares += f64::from(*a).powi(2);
            }
        }
        return Ok((errors, squares));
    }
    let kind = tensor.dtype.kind().ok_or_else(|| {
        sequor_nn::Error::Unsupported(format!("tensor '{name}' is {}", tensor.dtype))
    })?;
    let plain = source.load(name)?.f_to_kind(kind)?.f_contiguous()?;
    bridge::read_bytes(&plain, put).map_err(sequor_nn::Error::from)??;
    Ok((0.0, 0.0))
}

/// Largest file that is copied beside the weights.
const MAX_COPIED: u64 = 256 << 20;

/// Writes config and tokenizer into the new folder.
fn write_beside(from: &Path, to: &Path) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| -> Result<()> {
        use std::io::Write;
        let path = to.join(name);
        Ok(weights::write_atomic(&path, |file| {
            file.write_all(bytes)
                .map_err(|e| sequor_nn::Error::io(&path, e))
        })?)
    };
    if !from.is_dir() {
        let file = Gguf::open(from)?;
        let config = serde_json::to_vec_pretty(&gguf::to_json(&file)?)
            .map_err(|e| Error::Config(e.to_string()))?;
        write("config.json", &config)?;
        if file.vocab_fields()?.is_some() {
            load_tokenizer(from)?.save_dir(to)?;
        }
        return Ok(());
    }
    for entry in std::fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let entry = entry.map_err(|e| Error::io(from, e))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let wanted = [".json", ".jinja", ".model", ".txt"]
            .iter()
            .any(|end| name.ends_with(end))
            && !name.ends_with(".index.json");
        let meta = std::fs::metadata(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
        if wanted && meta.is_file() && meta.len() <= MAX_COPIED {
            write(
                &name,
                &std::fs::read(entry.path()).map_err(|e| Error::io(entry.path(), e))?,
            )?;
        }
    }
    Ok(())
}
