//! Writes safetensors files so that a reader never sees half of one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sequor_kernels::bridge;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Writes tensors to a safetensors file, in their own dtype.
///
/// Tensors on other devices or with gaps are copied one at a time. The file
/// appears under its name only when it is complete and on disk; an older one
/// stays untouched until then, also for readers that have it mapped.
///
/// # Errors
/// A name occurs twice or is reserved, a tensor is sparse or of a dtype that
/// safetensors does not have, or the file cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(&str, &Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let plan = Plan::new(tensors)?;
    let header = plan.header(metadata);
    write_atomic(path, |file| {
        let put = |file: &mut BufWriter<File>, bytes: &[u8]| {
            file.write_all(bytes).map_err(|e| Error::io(path, e))
        };
        put(file, &(header.len() as u64).to_le_bytes())?;
        put(file, &header)?;
        for Item { name, tensor, .. } in &plan.items {
            let dense = tensor
                .f_detach()?
                .f_to_device(Device::Cpu)?
                .f_resolve_neg()?
                .f_contiguous()?;
            bridge::read_bytes(&dense, |bytes| put(file, bytes))
                .map_err(|e| Error::Input(format!("tensor '{name}' cannot be written: {e}")))??;
        }
        Ok(())
    })
}

/// Writes a file through a temporary one in the same folder: written, flushed to
/// disk, then renamed. On an error the temporary file is removed and an older
/// file under `path` is left as it was.
///
/// # Errors
/// What `write` returns, or the file cannot be created, flushed or renamed.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let (partial, file) = Partial::create(path, folder)?;
    let mut file = BufWriter::new(file);
    write(&mut file)?;
    let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    drop(file);
    partial.rename_to(path).map_err(failed)?;
    // The rename itself must survive a power cut; only Unix can flush a folder.
    #[cfg(unix)]
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed)?;
    Ok(())
}

/// A temporary file that is removed unless it is renamed.
struct Partial {
    path: PathBuf,
    renamed: bool,
}

impl Partial {
    fn create(path: &Path, folder: &Path) -> Result<(Self, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = path.file_name() else {
            return Err(Error::Input(format!(
                "'{}' is not a file name",
                path.display()
            )));
        };
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        partial.push(format!(".{}-{unique}.partial", std::process::id()));
        let partial = folder.join(partial);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&partial)
            .map_err(|e| Error::io(&partial, e))?;
        Ok((
            Self {
                path: partial,
                renamed: false,
            },
            file,
        ))
    }

    fn rename_to(mut self, path: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.path, path)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed {
            // Already failing; a leftover is harmless and named `.partial`.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// What is written, in the order of the file.
struct Plan<'a> {
    items: Vec<Item<'a>>,
}

struct Item<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    dtype: &'static str,
    width: usize,
    bytes: usize,
}

impl<'a> Plan<'a> {
    fn new(tensors: &[(&'a str, &'a Tensor)]) -> Result<Self> {
        let mut seen = BTreeSet::new();
        let mut items = Vec::with_capacity(tensors.len());
        for &(name, tensor) in tensors {
            if name == "__metadata__" || name.contains('\0') {
                return Err(Error::Input(format!(
                    "{name:?} cannot be the name of a tensor"
                )));
            }
            if !seen.insert(name) {
                return Err(Error::Input(format!("tensor '{name}' is given twice")));
            }
            let kind = tensor.f_kind()?;
            let Some((dtype, width)) = dtype_name(kind) else {
                return Err(Error::Unsupported(format!(
                    "tensor '{name}' is {kind:?}, which safetensors does not have"
                )));
            };
            // Only plain strided memory has views of its own making.
            if tensor
                .f_detach()?
                .f_as_strided([0i64; 1], [1i64; 1], None)
                .is_err()
            {
                return Err(Error::Unsupported(format!(
                    "tensor '{name}' is not dense; convert it before saving"
                )));
            }
            items.push(Item {
                name,
                tensor,
                dtype,
                width,
                bytes: tensor.numel() * width,
            });
        }
        // Wide dtypes first, so that every tensor is aligned to its width.
        items.sort_by(|a, b| b.width.cmp(&a.width).then(a.name.cmp(b.name)));
        Ok(Self { items })
    }

    fn header(&self, metadata: &BTreeMap<String, String>) -> Vec<u8> {
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".to_owned(), json!(metadata));
        }
        let mut at = 0;
        for item in &self.items {
            header.insert(
                item.name.to_owned(),
                json!({
                    "dtype": item.dtype,
                    "shape": item.tensor.size(),
                    "data_offsets": [at, at + item.bytes],
                }),
            );
            at += item.bytes;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        header
    }
}

fn dtype_name(kind: Kind) -> Option<(&'static str, usize)> {
    Some(match kind {
        Kind::Double => ("F64", 8),
        Kind::Float => ("F32", 4),
        Kind::Half => ("F16", 2),
        Kind::BFloat16 => ("BF16", 2),
        Kind::Int64 => ("I64", 8),
        Kind::Int => ("I32", 4),
        Kind::Int16 => ("I16", 2),
        Kind::Int8 => ("I8", 1),
        Kind::Uint8 => ("U8", 1),
        Kind::Bool => ("BOOL", 1),
        _ => return None,
    })
}
