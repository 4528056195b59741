//! Checkpoints of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`): a zip archive
//! with a pickle, `data.pkl`, that describes the tensors, and one member
//! `data/{key}` per storage.
//!
//! The pickle is read by a restricted reader that executes nothing; see
//! [`TorchCheckpoint`] for what it accepts.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::archive::{self, Member};
use super::pickle::{self, Id, Pickle, Value, View};
use super::source::{
    Data, Limits, SourceDtype, TensorInfo, TensorSource, absent, check_name, check_shape,
    plain_tensor, stored_bytes, unsupported_dtype,
};
use crate::error::{Error, Result};

/// One mapped `torch.save` checkpoint.
///
/// Accepted are dicts, lists, tuples, numbers, texts and tensors (also
/// parameters and strided views). Any other class that the pickle asks for is
/// refused by name; nothing in the file is ever executed. The format from
/// before PyTorch 1.6 and TorchScript archives are refused too.
///
/// Names: keys of nested dicts and positions in lists are joined by dots; a
/// file that is one bare tensor has the name `tensor`. When the file is a dict
/// in which all tensors lie under the single key `state_dict`,
/// `model_state_dict` or `model`, and that entry is itself a dict, this key is
/// left out of the names. With other tensors beside it (an optimizer's, an
/// average's) the names keep their first key, and
/// [`Renamed::strip_prefix`](super::Renamed::strip_prefix) picks one part.
///
/// Numbers, texts and truth values of the file are its metadata, under their
/// full dotted names.
#[derive(Debug)]
pub struct TorchCheckpoint {
    path: PathBuf,
    data: Data,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    shape: Vec<i64>,
    /// In elements, one per dimension.
    strides: Vec<i64>,
    dtype: SourceDtype,
    /// Position in the file of the first to the last element of the view.
    range: Range<usize>,
    /// Bytes of the tensor without gaps or repetition.
    bytes: u64,
}

/// Keys that wrap a state dict in a training checkpoint.
const WRAPPERS: [&str; 3] = ["state_dict", "model_state_dict", "model"];
/// Name of a tensor that is the whole file.
const BARE: &str = "tensor";
/// Depth of nested containers.
const MAX_DEPTH: usize = 64;
/// Containers and leaves visited while names are made. A pickle can refer to
/// one container many times; this bounds what that can grow to.
const MAX_VISITS: usize = 8_000_000;
/// Archive members that are not storages.
const OTHER_MEMBERS: usize = 64;

impl TorchCheckpoint {
    /// Maps a file and reads its pickle with the default [`Limits`].
    ///
    /// # Errors
    /// The file cannot be read, is not a `torch.save` archive, holds more than
    /// plain containers of tensors, is damaged, or is beyond the limits.
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
        let archive = Archive::open(&path, data.bytes(), limits)?;
        let pickle = pickle::read(&path, archive.pickle(limits)?)?;
        let Contents {
            tensors: views,
            metadata,
        } = Contents::of(&path, &pickle, limits)?;

        let mut tensors = BTreeMap::new();
        for (name, view) in views {
            let entry = archive.place(&name, view, limits)?;
            if tensors.contains_key(&name) {
                return Err(Error::weights(
                    &path,
                    format!("tensor '{name}' occurs twice"),
                ));
            }
            tensors.insert(name, entry);
        }
        Ok(Self {
            path,
            data,
            tensors,
            metadata,
        })
    }
}

impl TensorSource for TorchCheckpoint {
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
            bytes: e.bytes,
            file: self.path.clone(),
        })
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| absent(&self.path, name))?;
        let bytes = self.data.bytes().get(entry.range.clone()).ok_or_else(|| {
            Error::weights(&self.path, format!("tensor '{name}' lies outside the file"))
        })?;
        if is_contiguous(&entry.shape, &entry.strides) {
            return plain_tensor(&self.path, name, bytes, &entry.shape, &entry.dtype);
        }
        let Some((_, width)) = entry.dtype.block() else {
            return Err(unsupported_dtype(&self.path, name, &entry.dtype));
        };
        let span = (bytes.len() / width as usize) as i64;
        let flat = plain_tensor(&self.path, name, bytes, &[span], &entry.dtype)?;
        let view = flat.f_as_strided(entry.shape.as_slice(), entry.strides.as_slice(), 0)?;
        Ok(view.f_contiguous()?)
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Whether the elements lie in row-major order without gaps.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != expected {
            return shape.contains(&0);
        }
        expected *= size;
    }
    true
}

/// The archive around a pickle.
struct Archive<'a> {
    path: &'a Path,
    file: &'a [u8],
    members: BTreeMap<String, Member>,
    /// What comes before `data.pkl`, such as `archive/`.
    root: String,
}

impl<'a> Archive<'a> {
    fn open(path: &'a Path, file: &'a [u8], limits: &Limits) -> Result<Self> {
        let members =
            archive::members(path, file, limits.max_tensors.saturating_add(OTHER_MEMBERS))?;
        let mut roots = members
            .keys()
            .filter_map(|name| name.strip_suffix("data.pkl"))
            .filter(|root| root.is_empty() || root.ends_with('/'));
        let (Some(root), None) = (roots.next().map(str::to_owned), roots.next()) else {
            return Err(Error::weights(
                path,
                "a zip archive without exactly one data.pkl; not a torch.save checkpoint",
            ));
        };
        let archive = Self {
            path,
            file,
            members,
            root,
        };
        if archive.member("constants.pkl").is_some() {
            return Err(Error::Unsupported(format!(
                "{}: a TorchScript archive; save its weights with \
                 torch.save(torch.jit.load(file).state_dict(), ..)",
                path.display()
            )));
        }
        // Absent in files from before PyTorch 2.1, which are little-endian.
        if archive.member("byteorder").is_some() && archive.content("byteorder")? != b"little" {
            return Err(Error::Unsupported(format!(
                "{}: the checkpoint is not little-endian; save it again on a little-endian machine",
                path.display()
            )));
        }
        Ok(archive)
    }

    fn member(&self, name: &str) -> Option<&Member> {
        self.members.get(&format!("{}{name}", self.root))
    }

    fn range(&self, name: &str) -> Result<Range<usize>> {
        match self.member(name) {
            Some(Member::Stored(range)) => Ok(range.clone()),
            Some(Member::Packed(method)) => Err(Error::Unsupported(format!(
                "{}: the member '{name}' is compressed or encrypted (zip method {method}), which \
                 torch.save never does; unpack the archive and pack it again with zip -0",
                self.path.display()
            ))),
            None => Err(Error::weights(
                self.path,
                format!("the archive lacks the member '{name}'; save or fetch it again"),
            )),
        }
    }

    fn content(&self, name: &str) -> Result<&'a [u8]> {
        let range = self.range(name)?;
        // The range was checked against the file when the directory was read.
        Ok(&self.file[range])
    }

    fn pickle(&self, limits: &Limits) -> Result<&'a [u8]> {
        let program = self.content("data.pkl")?;
        if program.len() as u64 > limits.max_header_bytes {
            return Err(Error::Limits(format!(
                "{}: data.pkl has {} bytes, at most {} are allowed",
                self.path.display(),
                program.len(),
                limits.max_header_bytes
            )));
        }
        Ok(program)
    }

    /// Checks a view against its storage and finds it in the file.
    fn place(&self, name: &str, view: &View, limits: &Limits) -> Result<Entry> {
        let bad = |what: String| Error::weights(self.path, format!("tensor '{name}': {what}"));
        let View {
            storage,
            dtype,
            offset,
            shape,
            strides,
        } = view;
        let (dims, numel) = check_shape(self.path, name, shape)?;
        if strides.len() != shape.len() {
            return Err(bad(format!(
                "{} dimensions but {} strides",
                shape.len(),
                strides.len()
            )));
        }
        let steps = strides
            .iter()
            .map(|&s| i64::try_from(s).map_err(|_| bad(format!("the stride {s} is too large"))))
            .collect::<Result<Vec<i64>>>()?;
        let range = self.range(&format!("data/{}", storage.key))?;
        let stored = range.len() as u64;

        let Some((_, width)) = dtype.block() else {
            // Listed, but never read.
            return Ok(Entry {
                shape: dims,
                strides: steps,
                dtype: dtype.clone(),
                range,
                bytes: stored,
            });
        };
        let claimed = match storage.dtype {
            Some(_) => storage.len.checked_mul(width),
            None => Some(storage.len),
        };
        let Some(claimed) = claimed.filter(|&claimed| claimed <= stored) else {
            return Err(bad(format!(
                "its storage '{}' claims {} elements of {dtype} but has {stored} bytes; the file \
                 is damaged",
                storage.key, storage.len
            )));
        };
        // Elements from the first to the last one that the view touches.
        let span = if numel == 0 {
            Some(0)
        } else {
            shape
                .iter()
                .zip(strides)
                .try_fold(1u64, |span, (&size, &stride)| {
                    span.checked_add((size - 1).checked_mul(stride)?)
                })
        };
        let start = if numel == 0 {
            Some(0)
        } else {
            offset.checked_mul(width)
        };
        let touched = span.and_then(|span| span.checked_mul(width));
        let end = touched
            .zip(start)
            .and_then(|(bytes, start)| start.checked_add(bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= claimed)) else {
            return Err(bad(format!(
                "offset {offset}, shape {shape:?} and strides {strides:?} reach beyond the \
                 {claimed} bytes of its storage '{}'",
                storage.key
            )));
        };
        let bytes =
            stored_bytes(dtype, numel).ok_or_else(|| bad("its size overflows".to_owned()))?;
        if bytes > stored && bytes > limits.max_expanded_bytes {
            return Err(Error::Limits(format!(
                "{}: tensor '{name}' repeats {stored} stored bytes to {bytes}, at most {} are allowed",
                self.path.display(),
                limits.max_expanded_bytes
            )));
        }
        // Both are at most `stored`, the length of a slice.
        let range = range.start + start as usize..range.start + end as usize;
        Ok(Entry {
            shape: dims,
            strides: steps,
            dtype: dtype.clone(),
            range,
            bytes,
        })
    }
}

/// Tensors and other leaves of a pickle under their dotted names.
struct Contents<'a> {
    tensors: Vec<(String, &'a View)>,
    metadata: BTreeMap<String, String>,
}

impl<'a> Contents<'a> {
    fn of(path: &Path, pickle: &'a Pickle, limits: &Limits) -> Result<Self> {
        let mut walk = Walk {
            path,
            pickle,
            limits,
            visits: 0,
            name_bytes: 0,
            out: Contents {
                tensors: Vec::new(),
                metadata: BTreeMap::new(),
            },
        };
        if let Value::Tensor(view) = pickle.get(pickle.root) {
            walk.out.tensors.push((BARE.to_owned(), view));
            return Ok(walk.out);
        }
        let Value::Dict(items) = pickle.get(pickle.root) else {
            walk.visit(pickle.root, &mut String::new(), 0)?;
            return Ok(walk.out);
        };
        // The one entry of the outermost dict that holds all tensors so far.
        let mut only: Option<(String, Id)> = None;
        let mut several = false;
        for &(key, value) in items {
            let before = walk.out.tensors.len();
            walk.item(key, value, &mut String::new(), 0)?;
            if walk.out.tensors.len() > before {
                several |= only.is_some();
                only = walk.key(key).map(|key| (key, value));
            }
        }
        if let Some((key, value)) = only
            && !several
            && WRAPPERS.contains(&key.as_str())
            && matches!(pickle.get(value), Value::Dict(_))
        {
            for (name, _) in &mut walk.out.tensors {
                name.drain(..=key.len());
            }
        }
        Ok(walk.out)
    }
}

/// A bounded walk through nested containers.
struct Walk<'a, 'b> {
    path: &'b Path,
    pickle: &'a Pickle,
    limits: &'b Limits,
    visits: usize,
    /// Bytes of names and texts collected so far.
    name_bytes: u64,
    out: Contents<'a>,
}

impl Walk<'_, '_> {
    fn limit(&self, what: &str, max: usize) -> Error {
        Error::Limits(format!(
            "{}: more than {max} {what} in data.pkl",
            self.path.display()
        ))
    }

    /// A dict key as part of a name.
    fn key(&self, key: Id) -> Option<String> {
        match self.pickle.get(key) {
            Value::Text(text) => Some(text.to_string()),
            Value::Int(n) => Some(n.to_string()),
            _ => None,
        }
    }

    fn visit(&mut self, id: Id, name: &mut String, depth: usize) -> Result<()> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return Err(self.limit("values", MAX_VISITS));
        }
        if depth > MAX_DEPTH {
            return Err(self.limit("nested containers", MAX_DEPTH));
        }
        let pickle = self.pickle;
        let text = match pickle.get(id) {
            Value::Tensor(view) => {
                if self.out.tensors.len() >= self.limits.max_tensors {
                    return Err(self.limit("tensors", self.limits.max_tensors));
                }
                self.charge(name.len())?;
                self.out.tensors.push((name.clone(), view));
                return Ok(());
            }
            Value::Dict(items) => {
                for &(key, value) in items {
                    self.item(key, value, name, depth)?;
                }
                return Ok(());
            }
            Value::Sequence(items) => {
                for (i, &value) in items.iter().enumerate() {
                    self.child(&i.to_string(), value, name, depth)?;
                }
                return Ok(());
            }
            Value::Bool(v) => v.to_string(),
            Value::Int(v) => v.to_string(),
            Value::Float(v) => v.to_string(),
            Value::Text(v) if v.len() <= self.limits.max_metadata_string => v.to_string(),
            _ => return Ok(()),
        };
        self.charge(name.len() + text.len())?;
        self.out.metadata.insert(name.clone(), text);
        Ok(())
    }

    /// One text can be reached by many names, so what is copied is counted.
    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.name_bytes += bytes as u64;
        if self.name_bytes > self.limits.max_header_bytes {
            return Err(Error::Limits(format!(
                "{}: names and texts take more than {} bytes",
                self.path.display(),
                self.limits.max_header_bytes
            )));
        }
        Ok(())
    }

    fn item(&mut self, key: Id, value: Id, name: &mut String, depth: usize) -> Result<()> {
        match self.key(key) {
            Some(key) => self.child(&key, value, name, depth),
            None => Err(Error::Unsupported(format!(
                "{}: a dict key under '{name}' is neither a text nor a whole number; save a plain \
                 state dict",
                self.path.display()
            ))),
        }
    }

    fn child(&mut self, part: &str, value: Id, name: &mut String, depth: usize) -> Result<()> {
        let len = name.len();
        if len > 0 {
            name.push('.');
        }
        name.push_str(part);
        check_name(self.path, name)?;
        let result = self.visit(value, name, depth + 1);
        name.truncate(len);
        result
    }
}
