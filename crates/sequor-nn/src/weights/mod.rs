//! Weight files: safetensors (one file or shards with an index), GGUF, and
//! `torch.save` checkpoints, behind one trait.
//!
//! [`open`] takes a file or a model folder and recognises the format by its
//! content. A [`TensorSource`] then lists tensors and loads them one by one; a
//! [`Renamed`] source presents them under other names.
//!
//! Files are untrusted: everything a header claims is checked before it is
//! used, counts and lengths are bounded by [`Limits`], and nothing in a file is
//! executed. Files are mapped where possible; like every mapped file they must
//! not be truncated in place while they are open (replacing them is fine, and is
//! what [`write_safetensors`] does).
//!
//! ```
//! use sequor_nn::weights::{self, TensorSource};
//! use sequor_nn::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let weight = Tensor::f_ones([2, 3], (Kind::BFloat16, Device::Cpu))?;
//! let path = folder.path().join("model.safetensors");
//! weights::write_safetensors(&path, &[("linear.weight", &weight)], &Default::default())?;
//!
//! let source = weights::open(folder.path())?;
//! assert_eq!(source.names(), ["linear.weight"]);
//! assert_eq!(source.load("linear.weight")?.size(), [2, 3]);
//! # Ok(())
//! # }
//! ```

#[cfg(target_endian = "big")]
compile_error!("weight files are little-endian and are read without conversion");

mod archive;
mod gguf;
mod pickle;
mod rename;
mod safetensors;
mod sharded;
mod source;
mod torch;
mod write;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use gguf::{
    Gguf, GgufArray, GgufTokenizerFields, GgufValue, ggml_names, hugging_face_names, write_gguf,
};
pub use rename::{NewTensor, Renamed, Transform};
pub use safetensors::Safetensors;
pub use sharded::Sharded;
pub use source::{Limits, SourceDtype, TensorInfo, TensorSource};
pub use torch::TorchCheckpoint;
pub use write::{PlannedTensor, Put, write_atomic, write_safetensors, write_safetensors_with};

use crate::error::{Error, Result};
use source::Data;

/// Opens a weight file or a model folder with the default [`Limits`].
///
/// A file may be safetensors, GGUF or a `torch.save` checkpoint, whatever its
/// name, or the index of a sharded checkpoint (`*.index.json`). In a folder the
/// first of these is taken: `model.safetensors.index.json`,
/// `model.safetensors`, the only `*.safetensors`, the only `*.gguf`,
/// `pytorch_model.bin.index.json`, `pytorch_model.bin`, the only file among
/// `*.pt`, `*.pth`, `*.ckpt` and `*.bin`.
///
/// # Errors
/// Nothing to read is found, there are several candidates, or the file is
/// damaged, of an unknown format or beyond the limits.
pub fn open(path: &Path) -> Result<Box<dyn TensorSource>> {
    open_with(path, &Limits::default())
}

/// [`open`] with chosen limits.
///
/// # Errors
/// As [`open`].
pub fn open_with(path: &Path, limits: &Limits) -> Result<Box<dyn TensorSource>> {
    let file = if path.is_dir() {
        weights_in(path)?
    } else {
        path.to_owned()
    };
    if file
        .as_os_str()
        .as_encoded_bytes()
        .ends_with(b".index.json")
    {
        return Ok(Box::new(Sharded::open_with(&file, limits)?));
    }
    open_content(&file, limits)
}

/// Reads a weight file that is already in memory, recognised by its content;
/// `label` stands in for its path in messages.
///
/// # Errors
/// As [`open`].
pub fn from_bytes(
    bytes: Vec<u8>,
    label: impl Into<PathBuf>,
    limits: &Limits,
) -> Result<Box<dyn TensorSource>> {
    recognise(label.into(), Data::Owned(bytes), limits)
}

/// Opens one file by its content; never an index, so that an index cannot lead
/// to another.
fn open_content(path: &Path, limits: &Limits) -> Result<Box<dyn TensorSource>> {
    recognise(path.to_owned(), Data::open(path)?, limits)
}

fn recognise(path: PathBuf, data: Data, limits: &Limits) -> Result<Box<dyn TensorSource>> {
    let start = data.bytes();
    if start.starts_with(b"GGUF") {
        return Ok(Box::new(Gguf::new(path, data, limits)?));
    }
    // Before the zip magic, which a header length can look like; byte 8 of a
    // stored zip member is its compression method, 0.
    if start.get(8) == Some(&b'{') {
        return Ok(Box::new(Safetensors::new(path, data, limits)?));
    }
    if start.starts_with(archive::MAGIC) {
        return Ok(Box::new(TorchCheckpoint::new(path, data, limits)?));
    }
    Err(unrecognised(&path, start))
}

/// Says what an unreadable file probably is.
fn unrecognised(path: &Path, start: &[u8]) -> Error {
    let known: [(&[u8], &str); 6] = [
        (
            b"version https://git-lfs",
            "a Git LFS pointer, not the weights; run `git lfs pull`",
        ),
        (b"<", "a web page, not the weights; the download went wrong"),
        (
            b"{",
            "a JSON file; name the index of a sharded checkpoint *.index.json, or give its folder",
        ),
        (
            b"\x80",
            "a bare pickle, probably saved by PyTorch before 1.6; load it in PyTorch and save it \
             again with torch.save or safetensors",
        ),
        (
            b"lmgg",
            "a GGML file from before GGUF; convert the model again",
        ),
        (
            b"tjgg",
            "a GGJT file from before GGUF; convert the model again",
        ),
    ];
    let what = known
        .iter()
        .find(|(magic, _)| start.starts_with(magic))
        .map(|(_, what)| *what);
    let what = what.unwrap_or("neither safetensors nor GGUF nor a torch.save archive");
    Error::weights(path, format!("this is {what}"))
}

/// The weight file of a model folder.
fn weights_in(folder: &Path) -> Result<PathBuf> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        // Names that are not UTF-8 are none of those looked for.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();

    enum Wanted {
        Name(&'static str),
        Only(&'static [&'static str]),
    }
    let order = [
        Wanted::Name("model.safetensors.index.json"),
        Wanted::Name("model.safetensors"),
        Wanted::Only(&[".safetensors"]),
        Wanted::Only(&[".gguf"]),
        Wanted::Name("pytorch_model.bin.index.json"),
        Wanted::Name("pytorch_model.bin"),
        Wanted::Only(&[".pt", ".pth", ".ckpt", ".bin"]),
    ];
    for wanted in order {
        let found: Vec<&String> = match wanted {
            Wanted::Name(name) => names.iter().filter(|n| *n == name).collect(),
            Wanted::Only(ends) => names
                .iter()
                .filter(|n| ends.iter().any(|end| n.ends_with(end)))
                .collect(),
        };
        match found.as_slice() {
            [] => {}
            [one] => return Ok(folder.join(one)),
            [first, second, ..] => {
                return Err(Error::weights(
                    folder,
                    format!(
                        "{} weight files ('{first}', '{second}', ..) and no index; \
                         give the path of one of them",
                        found.len()
                    ),
                ));
            }
        }
    }
    Err(Error::weights(
        folder,
        "no weights in this folder; expected model.safetensors, a *.gguf file or \
         pytorch_model.bin",
    ))
}
