//! Writes safetensors files so that a reader never sees half of one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sequor_kernels::bridge;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use super::safetensors::FORMATS;
use super::source::SourceDtype;
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
    let mut items = Vec::with_capacity(tensors.len());
    for &(name, tensor) in tensors {
        let kind = tensor.f_kind()?;
        let Some(dtype) = SourceDtype::of(kind) else {
            return Err(Error::Unsupported(format!(
                "tensor '{name}' is {kind:?}, which safetensors does not have"
            )));
        };
        // Only plain strided memory has views of its own making.
        let view = tensor.f_detach()?.f_as_strided([0i64; 1], [1i64; 1], None);
        if view.is_err() {
            return Err(Error::Unsupported(format!(
                "tensor '{name}' is not dense; convert it before saving"
            )));
        }
        items.push(PlannedTensor {
            name: name.to_owned(),
            shape: tensor.size(),
            dtype,
        });
    }
    let by_name: BTreeMap<&str, &Tensor> = tensors.iter().copied().collect();
    write_safetensors_with(path, &items, metadata, |item, put| {
        let Some(tensor) = by_name.get(item.name.as_str()) else {
            return Ok(());
        };
        let dense = tensor
            .f_detach()?
            .f_to_device(Device::Cpu)?
            .f_resolve_neg()?
            .f_contiguous()?;
        bridge::read_bytes(&dense, put)
            .map_err(|e| Error::Input(format!("tensor '{}' cannot be written: {e}", item.name)))?
    })
}

/// A tensor of a file that is about to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Its dimensions in torch order, outermost first.
    pub shape: Vec<i64>,
    /// How it is stored. A quantised dtype needs two dimensions and rows of whole blocks.
    pub dtype: SourceDtype,
}

impl PlannedTensor {
    /// Bytes of the tensor in the file.
    ///
    /// # Errors
    /// [`Error::Input`] when the dtype cannot keep this shape, or cannot be written.
    pub fn bytes(&self) -> Result<usize> {
        let bad = || {
            Error::Input(format!(
                "tensor '{}' of shape {:?} cannot be stored as {}",
                self.name, self.shape, self.dtype
            ))
        };
        let count = |d: &i64| usize::try_from(*d).ok();
        let bytes = match (&self.shape[..], self.dtype.format()) {
            ([rows, inputs], Some(format)) => count(inputs)
                .and_then(|n| format.row_bytes(n))
                .zip(count(rows))
                .and_then(|(row, rows)| row.checked_mul(rows)),
            (shape, _) => match self.dtype.block() {
                Some((1, width)) => shape.iter().try_fold(width as usize, |n, d| {
                    count(d).and_then(|d| n.checked_mul(d))
                }),
                _ => None,
            },
        };
        bytes.ok_or_else(bad)
    }
}

/// Takes the bytes of a tensor, in as many pieces as its writer likes.
pub type Put<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Writes a safetensors file tensor by tensor, so that no more than one needs to be in
/// memory: `write` is asked for each and puts its bytes. Rows in one of our formats are
/// written as bytes (`U8`), described in the metadata; [`Safetensors`](super::Safetensors)
/// reads them back as what they are.
///
/// # Errors
/// A name occurs twice or is reserved, a dtype is not one of safetensors or ours, `write`
/// puts more or fewer bytes than planned or fails, or the file cannot be written.
pub fn write_safetensors_with(
    path: &Path,
    tensors: &[PlannedTensor],
    metadata: &BTreeMap<String, String>,
    write: impl FnMut(&PlannedTensor, Put<'_>) -> Result<()>,
) -> Result<()> {
    check_names(tensors)?;
    // Wide dtypes first, so that every tensor is aligned to its width.
    let mut order: Vec<&PlannedTensor> = tensors.iter().collect();
    let width = |t: &PlannedTensor| {
        t.dtype
            .block()
            .map_or(1, |(n, bytes)| if n == 1 { bytes } else { 1 })
    };
    order.sort_by(|a, b| width(b).cmp(&width(a)).then(a.name.cmp(&b.name)));
    let header = safetensors_header(&order, metadata)?;
    write_atomic(path, |file| {
        let put = |file: &mut BufWriter<File>, bytes: &[u8]| {
            file.write_all(bytes).map_err(|e| Error::io(path, e))
        };
        put(file, &(header.len() as u64).to_le_bytes())?;
        put(file, &header)?;
        write_data(path, file, &order, 1, write)
    })
}

/// Writes the data of all tensors, each at a multiple of `alignment` from where the first begins.
pub(super) fn write_data(
    path: &Path,
    file: &mut BufWriter<File>,
    tensors: &[&PlannedTensor],
    alignment: usize,
    mut write: impl FnMut(&PlannedTensor, Put<'_>) -> Result<()>,
) -> Result<()> {
    for tensor in tensors {
        let planned = tensor.bytes()?;
        let mut written = 0usize;
        write(tensor, &mut |bytes| {
            written += bytes.len();
            file.write_all(bytes).map_err(|e| Error::io(path, e))
        })?;
        if written != planned {
            return Err(Error::Input(format!(
                "tensor '{}': {written} bytes were given where {planned} were planned",
                tensor.name
            )));
        }
        let gap = planned.next_multiple_of(alignment) - planned;
        file.write_all(&vec![0; gap])
            .map_err(|e| Error::io(path, e))?;
    }
    Ok(())
}

/// Refuses names that no file can have, or that occur twice.
pub(super) fn check_names(tensors: &[PlannedTensor]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for PlannedTensor { name, .. } in tensors {
        if name == "__metadata__" || name.contains('\0') {
            return Err(Error::Input(format!(
                "{name:?} cannot be the name of a tensor"
            )));
        }
        if !seen.insert(name) {
            return Err(Error::Input(format!("tensor '{name}' is given twice")));
        }
    }
    Ok(())
}

fn safetensors_header(
    tensors: &[&PlannedTensor],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut metadata = metadata.clone();
    let mut formats = Map::new();
    let mut entries = Map::new();
    let mut at = 0;
    for tensor in tensors {
        let bytes = tensor.bytes()?;
        let mut shape = tensor.shape.clone();
        let dtype = match (tensor.dtype.is_quantised(), tensor.dtype.format()) {
            (true, Some(format)) => {
                let [rows, inputs] = shape[..] else {
                    return Err(Error::Input(format!(
                        "tensor '{}' is not a matrix",
                        tensor.name
                    )));
                };
                formats.insert(tensor.name.clone(), json!([format.to_string(), inputs]));
                shape = vec![rows, bytes as i64 / rows.max(1)];
                "U8".to_owned()
            }
            _ => tensor.dtype.to_string(),
        };
        entries.insert(
            tensor.name.clone(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]}),
        );
        at += bytes;
    }
    if !formats.is_empty() {
        metadata.insert(FORMATS.to_owned(), Value::Object(formats).to_string());
    }
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    header.extend(entries);
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
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
