//! A checkpoint in several files with an index, in the Hugging Face layout:
//! `{"metadata": {..}, "weight_map": {"tensor name": "file beside the index"}}`.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use sequor_kernels::matmul::Stored;
use serde::Deserialize;
use tch::Tensor;

use super::safetensors::UniqueMap;
use super::source::{Limits, TensorInfo, TensorSource, absent, check_name, regular_file_len};
use crate::error::{Error, Result};

/// Several weight files that together hold one model.
#[derive(Debug)]
pub struct Sharded {
    path: PathBuf,
    shards: Vec<Box<dyn TensorSource>>,
    /// Tensor name to its position in `shards`.
    shard_of: BTreeMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Map<String, serde_json::Value>,
    weight_map: UniqueMap,
}

impl Sharded {
    /// Opens an index file (`model.safetensors.index.json`,
    /// `pytorch_model.bin.index.json`) and every shard it names.
    ///
    /// # Errors
    /// The index is not valid, names a file outside its own folder, names a
    /// file that is absent or damaged, or a shard lacks a tensor that the index
    /// promises.
    pub fn open(index: &Path) -> Result<Self> {
        Self::open_with(index, &Limits::default())
    }

    /// [`open`](Self::open) with chosen limits (they hold for each file).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(index: &Path, limits: &Limits) -> Result<Self> {
        let Index {
            metadata,
            weight_map: UniqueMap(weight_map),
        } = read_index(index, limits)?;
        if weight_map.len() > limits.max_tensors {
            return Err(Error::Limits(format!(
                "{}: {} tensors, at most {} are allowed",
                index.display(),
                weight_map.len(),
                limits.max_tensors
            )));
        }
        let folder = index.parent().unwrap_or(Path::new(""));
        let mut shards: Vec<Box<dyn TensorSource>> = Vec::new();
        let mut opened: BTreeMap<String, usize> = BTreeMap::new();
        let mut shard_of = BTreeMap::new();
        for (name, file) in weight_map {
            check_name(index, &name)?;
            let shard = match opened.get(&file) {
                Some(&i) => i,
                None => {
                    shards.push(open_shard(index, folder, &file, &name, limits)?);
                    opened.insert(file.clone(), shards.len() - 1);
                    shards.len() - 1
                }
            };
            if shards[shard].info(&name).is_none() {
                return Err(Error::weights(
                    index,
                    format!("the index places tensor '{name}' in '{file}', which does not hold it"),
                ));
            }
            shard_of.insert(name, shard);
        }
        let metadata = metadata
            .into_iter()
            .map(|(key, value)| match value {
                serde_json::Value::String(text) => (key, text),
                other => (key, other.to_string()),
            })
            .collect();
        Ok(Self {
            path: index.to_owned(),
            shards,
            shard_of,
            metadata,
        })
    }

    fn shard(&self, name: &str) -> Option<&dyn TensorSource> {
        self.shards
            .get(*self.shard_of.get(name)?)
            .map(AsRef::as_ref)
    }
}

fn read_index(path: &Path, limits: &Limits) -> Result<Index> {
    let len = regular_file_len(path)?;
    if len > limits.max_header_bytes {
        return Err(Error::Limits(format!(
            "{}: an index of {len} bytes, at most {} are allowed",
            path.display(),
            limits.max_header_bytes
        )));
    }
    let json = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&json)
        .map_err(|e| Error::weights(path, format!("the index is not valid: {e}")))
}

/// Opens a shard that must lie directly beside the index: an index comes with
/// the model and must not reach other files of the reader's.
fn open_shard(
    index: &Path,
    folder: &Path,
    file: &str,
    tensor: &str,
    limits: &Limits,
) -> Result<Box<dyn TensorSource>> {
    let mut parts = Path::new(file).components();
    let plain = matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    );
    if !plain || file.contains(['/', '\\', ':', '\0']) {
        return Err(Error::weights(
            index,
            format!(
                "the index places tensor '{tensor}' in {file:?}; \
                 only plain names of files beside the index are allowed"
            ),
        ));
    }
    let path = folder.join(file);
    super::open_content(&path, limits).map_err(|e| match e {
        Error::Io { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::weights(
                index,
                format!(
                    "the index names the shard '{file}' (for tensor '{tensor}'), but {} does not \
                     exist; fetch it into the same folder",
                    path.display()
                ),
            )
        }
        other => other,
    })
}

impl TensorSource for Sharded {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.shard_of.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.shard(name)?.info(name)
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        self.shard(name)
            .ok_or_else(|| absent(&self.path, name))?
            .load(name)
    }

    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        self.shard(name)
            .ok_or_else(|| absent(&self.path, name))?
            .stored(name)
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}
