//! The [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) format
//! of llama.cpp: typed metadata (with the tokenizer) and tensors, many of them
//! quantised.
//!
//! Quantised tensors are dequantised to `f32` when they are loaded as tensors, and stay
//! as they are where our kernels compute on them ([`TensorSource::stored`]). Tensor
//! names are llama.cpp's; [`hugging_face_names`] presents a file under the names
//! and layout of a Hugging Face checkpoint.

mod dequant;
mod names;
mod parse;
mod tokenizer;
mod value;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sequor_kernels::matmul::Stored;
use tch::Tensor;

pub use names::{ggml_names, hugging_face_names};
pub use tokenizer::GgufTokenizerFields;
pub use value::{GgufArray, GgufValue};
pub use write::write_gguf;

use super::source::{
    Data, Limits, TensorInfo, TensorSource, absent, plain_tensor, unsupported_dtype,
};
use crate::error::{Error, Result};

/// One mapped `.gguf` file, version 2 or 3, little-endian.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    data: Data,
    values: BTreeMap<String, GgufValue>,
    texts: BTreeMap<String, String>,
    tensors: BTreeMap<String, parse::Entry>,
}

impl Gguf {
    /// Maps a file and checks its header with the default [`Limits`].
    ///
    /// # Errors
    /// The file cannot be read, is not GGUF of a known version, is damaged or
    /// truncated, or is beyond the limits.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &Limits::default())
    }

    /// [`open`](Self::open) with chosen limits.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: &Path, limits: &Limits) -> Result<Self> {
        Self::new(path.to_owned(), Data::open(path)?, limits)
    }

    /// Reads a file that is already in memory; `label` stands in for its path
    /// in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(bytes: Vec<u8>, label: impl Into<PathBuf>, limits: &Limits) -> Result<Self> {
        Self::new(label.into(), Data::Owned(bytes), limits)
    }

    pub(super) fn new(path: PathBuf, data: Data, limits: &Limits) -> Result<Self> {
        let parse::Header {
            metadata: values,
            tensors,
        } = parse::parse(&path, data.bytes(), limits)?;
        let texts = values
            .iter()
            .filter(|(_, value)| value.as_array().is_none())
            .map(|(key, value)| (key.clone(), value.to_string()))
            .collect();
        Ok(Self {
            path,
            data,
            values,
            texts,
            tensors,
        })
    }

    /// All metadata, typed.
    #[must_use]
    pub fn values(&self) -> &BTreeMap<String, GgufValue> {
        &self.values
    }

    /// One metadata value, e.g. `general.architecture`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        self.values.get(key)
    }

    /// `general.architecture`, e.g. `llama`.
    ///
    /// # Errors
    /// The file does not say.
    pub fn architecture(&self) -> Result<&str> {
        self.value("general.architecture")
            .and_then(GgufValue::as_str)
            .ok_or_else(|| {
                Error::weights(
                    &self.path,
                    "general.architecture is missing; not a model file",
                )
            })
    }

    /// A value under the architecture's own prefix: `block_count` reads
    /// `llama.block_count` when the architecture is `llama`.
    #[must_use]
    pub fn model_value(&self, key: &str) -> Option<&GgufValue> {
        let architecture = self.architecture().ok()?;
        self.value(&format!("{architecture}.{key}"))
    }

    /// The stored bytes of a tensor: quantised blocks as they are, for kernels
    /// that compute on them.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn raw(&self, name: &str) -> Result<&[u8]> {
        let entry = self.entry(name)?;
        self.data.bytes().get(entry.range.clone()).ok_or_else(|| {
            Error::weights(&self.path, format!("tensor '{name}' lies outside the file"))
        })
    }

    fn entry(&self, name: &str) -> Result<&parse::Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| absent(&self.path, name))
    }
}

impl TensorSource for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|e| TensorInfo {
            shape: e.shape.clone(),
            dtype: e.dtype.clone(),
            bytes: e.range.len() as u64,
            file: self.path.clone(),
        })
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let bytes = self.raw(name)?;
        match entry.dtype.block() {
            None => Err(unsupported_dtype(&self.path, name, &entry.dtype)),
            Some((1, _)) => plain_tensor(&self.path, name, bytes, &entry.shape, &entry.dtype),
            Some(block) => dequant::tensor(&entry.dtype, block, bytes, &entry.shape)
                .map_err(|e| e.in_layer(name)),
        }
    }

    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        let entry = self.entry(name)?;
        let (Some(format), [outputs, inputs]) = (entry.dtype.format(), &entry.shape[..]) else {
            return Ok(None);
        };
        let bytes = self.raw(name)?.to_vec();
        let stored = Stored::new(format, *outputs as usize, *inputs as usize, bytes);
        stored
            .map(Some)
            .map_err(|e| Error::weights(&self.path, format!("tensor '{name}': {e}")))
    }

    /// The metadata as text, without arrays; [`Gguf::values`] has all of it.
    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.texts
    }
}
