//! What every weight file has in common: named tensors that are described
//! cheaply and read one at a time.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use sequor_kernels::blocks::BlockType;
use sequor_kernels::bridge::{self, MappedFile};
use sequor_kernels::matmul::{Format, Stored};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// Named tensors in a file or a folder, read when they are asked for.
///
/// Opening a source reads and checks its directory only. The tensors stay on
/// disk (mapped, where the format allows it) until [`load`](Self::load).
pub trait TensorSource: fmt::Debug + Send {
    /// The file or index that was opened; it leads every error message.
    fn path(&self) -> &Path;

    /// All tensor names, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape, dtype and size of a tensor, without reading it.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Reads one tensor to the CPU. Floats and integers keep their stored
    /// dtype; quantised tensors are dequantised to `f32`. The result is
    /// contiguous and owns its memory.
    ///
    /// # Errors
    /// The name is not in the file, its dtype cannot be read, or the file is
    /// damaged.
    fn load(&self, name: &str) -> Result<Tensor>;

    /// The rows of a matrix in a format that our kernels compute on, bit for bit as stored;
    /// `None` where the file has another format.
    ///
    /// # Errors
    /// The name is not in the file, or the file is damaged.
    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        let _ = name;
        Ok(None)
    }

    /// Free text stored beside the tensors (may be empty).
    fn metadata(&self) -> &BTreeMap<String, String> {
        static EMPTY: BTreeMap<String, String> = BTreeMap::new();
        &EMPTY
    }
}

impl<S: TensorSource + ?Sized> TensorSource for Box<S> {
    fn path(&self) -> &Path {
        (**self).path()
    }
    fn names(&self) -> Vec<String> {
        (**self).names()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        (**self).info(name)
    }
    fn load(&self, name: &str) -> Result<Tensor> {
        (**self).load(name)
    }
    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        (**self).stored(name)
    }
    fn metadata(&self) -> &BTreeMap<String, String> {
        (**self).metadata()
    }
}

/// What a file says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions in torch order, outermost first; empty for a scalar.
    pub shape: Vec<i64>,
    /// The dtype as stored.
    pub dtype: SourceDtype,
    /// Bytes of the tensor as stored.
    pub bytes: u64,
    /// The file that holds it (a shard, when there are several).
    pub file: PathBuf,
}

impl TensorInfo {
    /// Number of elements; a scalar has one.
    #[must_use]
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// Element type as stored in a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceDtype {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte per truth value.
    Bool,
    /// ggml: blocks of 32, 4 bits, scale.
    Q4_0,
    /// ggml: blocks of 32, 4 bits, scale and minimum.
    Q4_1,
    /// ggml: blocks of 32, 5 bits, scale.
    Q5_0,
    /// ggml: blocks of 32, 5 bits, scale and minimum.
    Q5_1,
    /// ggml: blocks of 32, 8 bits, scale.
    Q8_0,
    /// ggml `Q4_K`: super-blocks of 256, 4 bits, 6-bit scales and minima.
    Q4K,
    /// ggml `Q5_K`: super-blocks of 256, 5 bits, 6-bit scales and minima.
    Q5K,
    /// ggml `Q6_K`: super-blocks of 256, 6 bits, 8-bit scales.
    Q6K,
    /// Our own: signed bytes with a scale for each 64 ([`Format::Int8`]).
    Int8Rows,
    /// A dtype that is recognised as such but cannot be loaded, by its own name.
    Other(Box<str>),
}

impl From<Format> for SourceDtype {
    fn from(format: Format) -> Self {
        match format {
            Format::Bf16 => Self::BF16,
            Format::Q8_0 => Self::Q8_0,
            Format::Q4_0 => Self::Q4_0,
            Format::Q4_1 => Self::Q4_1,
            Format::Q4K => Self::Q4K,
            _ => Self::Int8Rows,
        }
    }
}

impl SourceDtype {
    /// The dtype of the tensor that [`TensorSource::load`] returns, or `None`
    /// when this dtype cannot be loaded.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        Some(match self {
            Self::F64 => Kind::Double,
            Self::F32 => Kind::Float,
            Self::F16 => Kind::Half,
            Self::BF16 => Kind::BFloat16,
            Self::I64 => Kind::Int64,
            Self::I32 => Kind::Int,
            Self::I16 => Kind::Int16,
            Self::I8 => Kind::Int8,
            Self::U8 => Kind::Uint8,
            Self::Bool => Kind::Bool,
            Self::Other(_) => return None,
            _ => Kind::Float,
        })
    }

    /// The plain dtype that holds a tensor of this kind, if there is one.
    #[must_use]
    pub fn of(kind: Kind) -> Option<Self> {
        Some(match kind {
            Kind::Double => Self::F64,
            Kind::Float => Self::F32,
            Kind::Half => Self::F16,
            Kind::BFloat16 => Self::BF16,
            Kind::Int64 => Self::I64,
            Kind::Int => Self::I32,
            Kind::Int16 => Self::I16,
            Kind::Int8 => Self::I8,
            Kind::Uint8 => Self::U8,
            Kind::Bool => Self::Bool,
            _ => return None,
        })
    }

    /// The ggml blocks of a quantised dtype.
    #[must_use]
    pub fn block_type(&self) -> Option<BlockType> {
        Some(match self {
            Self::Q4_0 => BlockType::Q4_0,
            Self::Q4_1 => BlockType::Q4_1,
            Self::Q5_0 => BlockType::Q5_0,
            Self::Q5_1 => BlockType::Q5_1,
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q4K => BlockType::Q4K,
            Self::Q5K => BlockType::Q5K,
            Self::Q6K => BlockType::Q6K,
            _ => return None,
        })
    }

    /// The format of our kernels that has exactly these blocks.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        if *self == Self::Int8Rows {
            return Some(Format::Int8);
        }
        let blocks = self.block_type()?;
        Format::ALL.into_iter().find(|f| f.blocks() == Some(blocks))
    }

    /// Whether elements are stored in quantised blocks.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        *self == Self::Int8Rows || self.block().is_some_and(|(elements, _)| elements > 1)
    }

    /// The smallest storable unit as `(elements, bytes)`: `(1, width)` for
    /// plain dtypes, a block for quantised ones, `None` when unknown or not of one size.
    #[must_use]
    pub fn block(&self) -> Option<(u64, u64)> {
        Some(match self {
            Self::F64 | Self::I64 => (1, 8),
            Self::F32 | Self::I32 => (1, 4),
            Self::F16 | Self::BF16 | Self::I16 => (1, 2),
            Self::I8 | Self::U8 | Self::Bool => (1, 1),
            Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q8_0
            | Self::Q4K
            | Self::Q5K
            | Self::Q6K => {
                let (elements, bytes) = self.block_type()?.size();
                (elements as u64, bytes as u64)
            }
            Self::Int8Rows | Self::Other(_) => return None,
        })
    }
}

impl fmt::Display for SourceDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Int8Rows => "INT8",
            Self::Other(name) => name,
        })
    }
}

/// How much a file may ask for before it is refused. Every count and length in
/// a file is checked against these (and against the file's size) before memory
/// is reserved for it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of the directory: the safetensors header, the GGUF header, the
    /// index of a sharded checkpoint, the pickle of a torch checkpoint.
    pub max_header_bytes: u64,
    /// Tensors in one file.
    pub max_tensors: usize,
    /// Bytes of one metadata string.
    pub max_metadata_string: usize,
    /// Elements of one metadata array.
    pub max_array_len: usize,
    /// Bytes that a torch view with repeated elements (stride 0) may grow to.
    pub max_expanded_bytes: u64,
}

impl Default for Limits {
    /// 100 MB of header, a million tensors, strings of 16 MB, arrays of 16
    /// million elements, expanded views of 256 MB.
    fn default() -> Self {
        Self {
            max_header_bytes: 100_000_000,
            max_tensors: 1_000_000,
            max_metadata_string: 16_000_000,
            max_array_len: 16_000_000,
            max_expanded_bytes: 256_000_000,
        }
    }
}

/// The bytes of a weight file.
pub(super) enum Data {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

impl Data {
    /// Maps a regular, non-empty file. Anything else is refused before it is
    /// opened, because opening a FIFO would wait for a writer.
    pub(super) fn open(path: &Path) -> Result<Self> {
        if regular_file_len(path)? == 0 {
            return Err(Error::weights(
                path,
                "the file is empty; fetch or save it again",
            ));
        }
        MappedFile::open(path)
            .map(Self::Mapped)
            .map_err(|e| Error::io(path, e))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map.as_ref(),
            Self::Owned(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if matches!(self, Self::Mapped(_)) {
            "mapped"
        } else {
            "in memory"
        };
        write!(f, "{} bytes, {how}", self.bytes().len())
    }
}

/// Length of a regular file; an error for folders, FIFOs, sockets and devices.
pub(super) fn regular_file_len(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if meta.is_dir() {
        return Err(Error::weights(
            path,
            "expected a weight file, found a folder",
        ));
    }
    if !meta.is_file() {
        return Err(Error::weights(
            path,
            "expected a regular file, found a pipe, socket or device; copy its content to a file",
        ));
    }
    Ok(meta.len())
}

/// Longest tensor name or metadata key that is accepted, in bytes.
const MAX_NAME_BYTES: usize = 4096;
/// libtorch's own bound on the number of dimensions of a strided view.
const MAX_RANK: usize = 64;

/// Refuses names that could not be printed or passed on as C strings.
pub(super) fn check_name(path: &Path, name: &str) -> Result<()> {
    if name.contains('\0') {
        return Err(Error::weights(
            path,
            format!("the name {name:?} contains a NUL character"),
        ));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(Error::Limits(format!(
            "{}: a tensor name of {} bytes starting with '{}', at most {MAX_NAME_BYTES} are allowed",
            path.display(),
            name.len(),
            name.chars().take(32).collect::<String>()
        )));
    }
    Ok(())
}

/// Checks dimensions as read from a file; returns them as torch's integers
/// together with their product.
pub(super) fn check_shape(path: &Path, name: &str, dims: &[u64]) -> Result<(Vec<i64>, u64)> {
    let bad = |what: String| Error::weights(path, format!("tensor '{name}': {what}"));
    if dims.len() > MAX_RANK {
        return Err(bad(format!(
            "{} dimensions, at most {MAX_RANK} are possible",
            dims.len()
        )));
    }
    let shape = dims
        .iter()
        .map(|&d| i64::try_from(d).map_err(|_| bad(format!("dimension {d} does not fit 63 bits"))))
        .collect::<Result<Vec<i64>>>()?;
    // A zero must not hide an overflow of the other dimensions: libtorch
    // multiplies them too.
    let nonzero = dims.iter().filter(|&&d| d != 0).try_fold(1i64, |n, &d| {
        i64::try_from(d).ok().and_then(|d| n.checked_mul(d))
    });
    let Some(nonzero) = nonzero else {
        return Err(bad(format!(
            "the number of elements of shape {dims:?} overflows"
        )));
    };
    let numel = if dims.contains(&0) {
        0
    } else {
        nonzero.unsigned_abs()
    };
    Ok((shape, numel))
}

/// Bytes that `numel` elements of `dtype` take, or `None` when unknown, not a
/// whole number of blocks, or too large.
pub(super) fn stored_bytes(dtype: &SourceDtype, numel: u64) -> Option<u64> {
    let (elements, bytes) = dtype.block()?;
    if !numel.is_multiple_of(elements) {
        return None;
    }
    (numel / elements).checked_mul(bytes)
}

/// The error for a name that a source does not hold.
pub(super) fn absent(path: &Path, name: &str) -> Error {
    Error::weights(path, format!("there is no tensor '{name}' in this file"))
}

/// The error for a dtype that cannot be loaded.
pub(super) fn unsupported_dtype(path: &Path, name: &str, dtype: &SourceDtype) -> Error {
    Error::Unsupported(format!(
        "{}: tensor '{name}' is stored as {dtype}, which cannot be read; convert it to F32, F16 or BF16",
        path.display()
    ))
}

/// Copies plain (unquantised) stored bytes into a tensor.
pub(super) fn plain_tensor(
    path: &Path,
    name: &str,
    bytes: &[u8],
    shape: &[i64],
    dtype: &SourceDtype,
) -> Result<Tensor> {
    let Some(kind) = dtype.kind().filter(|_| !dtype.is_quantised()) else {
        return Err(unsupported_dtype(path, name, dtype));
    };
    let copy = |kind| {
        bridge::from_bytes(bytes, shape, kind)
            .map_err(|e| Error::weights(path, format!("tensor '{name}': {e}")))
    };
    if kind == Kind::Bool {
        // Any non-zero byte means true, but libtorch relies on 0 and 1.
        return Ok(copy(Kind::Uint8)?.f_ne(0)?);
    }
    copy(kind)
}
