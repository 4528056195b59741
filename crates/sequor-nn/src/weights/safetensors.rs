//! The [safetensors](https://github.com/huggingface/safetensors) format: eight
//! bytes of little-endian header length, a JSON object that gives each tensor's
//! dtype, shape and byte range, then the bytes.
//!
//! The header is checked completely when the file is opened: the byte ranges
//! must cover the data exactly, without holes or overlaps, and agree with the
//! shapes.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sequor_kernels::bridge;
use sequor_kernels::matmul::{Format, Stored};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use tch::Tensor;

use super::source::{
    Data, Limits, SourceDtype, TensorInfo, TensorSource, absent, check_name, check_shape,
    plain_tensor, stored_bytes,
};
use crate::error::{Error, Result};

/// One mapped `.safetensors` file.
///
/// The file is mapped, not copied: replacing it (write elsewhere, then rename)
/// while it is open is safe, truncating it in place is not.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    data: Data,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    shape: Vec<i64>,
    dtype: SourceDtype,
    /// Position in the file.
    range: Range<usize>,
    /// The format of rows that the file has as plain bytes ([`FORMATS`]).
    format: Option<Format>,
}

/// The metadata entry that says which tensors are rows in one of our formats: a JSON object,
/// name to `[format, length of a row]`. Such a tensor stands in the file as bytes (`U8`),
/// `[rows, bytes of a row]`.
pub(super) const FORMATS: &str = "sequor.formats";

impl Safetensors {
    /// Maps a file and checks its header with the default [`Limits`].
    ///
    /// # Errors
    /// The file cannot be read, is not safetensors, is damaged or truncated,
    /// or is beyond the limits.
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
        let (mut tensors, metadata) = parse(&path, data.bytes(), limits)?;
        if let Some(formats) = metadata.get(FORMATS) {
            read_formats(&path, formats, &mut tensors)?;
        }
        Ok(Self {
            path,
            data,
            tensors,
            metadata,
        })
    }
}

impl Safetensors {
    fn entry(&self, name: &str) -> Result<(&Entry, &[u8])> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| absent(&self.path, name))?;
        let bytes = self.data.bytes().get(entry.range.clone()).ok_or_else(|| {
            Error::weights(&self.path, format!("tensor '{name}' lies outside the file"))
        })?;
        Ok((entry, bytes))
    }
}

impl TensorSource for Safetensors {
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
        if let Some(rows) = self.stored(name)? {
            let numbers = rows.expand();
            return bridge::from_slice(&numbers, &[rows.outputs() as i64, rows.inputs() as i64])
                .map_err(|e| Error::weights(&self.path, format!("tensor '{name}': {e}")));
        }
        let (entry, bytes) = self.entry(name)?;
        plain_tensor(&self.path, name, bytes, &entry.shape, &entry.dtype)
    }

    fn stored(&self, name: &str) -> Result<Option<Stored>> {
        let (entry, bytes) = self.entry(name)?;
        let (Some(format), [outputs, inputs]) = (entry.format, &entry.shape[..]) else {
            return Ok(None);
        };
        let stored = Stored::new(format, *outputs as usize, *inputs as usize, bytes.to_vec());
        stored
            .map(Some)
            .map_err(|e| Error::weights(&self.path, format!("tensor '{name}': {e}")))
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Gives tensors that are rows in one of our formats their real shape and dtype.
fn read_formats(path: &Path, text: &str, tensors: &mut BTreeMap<String, Entry>) -> Result<()> {
    let bad = |what: String| Error::weights(path, format!("metadata '{FORMATS}': {what}"));
    let formats: BTreeMap<String, (String, u64)> =
        serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    for (name, (format, inputs)) in formats {
        let format: Format = format.parse().map_err(|e| bad(format!("'{name}': {e}")))?;
        let entry = tensors
            .get_mut(&name)
            .ok_or_else(|| bad(format!("there is no tensor '{name}'")))?;
        let row = usize::try_from(inputs)
            .ok()
            .and_then(|n| format.row_bytes(n));
        let shape = match entry.shape[..] {
            [rows, bytes] if entry.dtype == SourceDtype::U8 => {
                let fits = row.is_some_and(|row| i64::try_from(row) == Ok(bytes));
                i64::try_from(inputs)
                    .ok()
                    .filter(|_| fits)
                    .map(|inputs| vec![rows, inputs])
            }
            _ => None,
        };
        entry.shape = shape.ok_or_else(|| {
            bad(format!(
                "'{name}' is {} {:?}, which is not rows of {inputs} numbers as {format}",
                entry.dtype, entry.shape
            ))
        })?;
        entry.dtype = format.into();
        entry.format = Some(format);
    }
    Ok(())
}

/// Bytes of the header length at the start of the file.
const PREFIX: usize = 8;

type Directory = (BTreeMap<String, Entry>, BTreeMap<String, String>);

fn parse(path: &Path, bytes: &[u8], limits: &Limits) -> Result<Directory> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(Error::weights(
            path,
            format!(
                "{} bytes are too few for a safetensors file; it is truncated",
                bytes.len()
            ),
        ));
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > limits.max_header_bytes {
        return Err(Error::Limits(format!(
            "{}: the header claims {header_len} bytes, at most {} are allowed; \
             this is not a safetensors file or it is damaged",
            path.display(),
            limits.max_header_bytes
        )));
    }
    let header_and_data = usize::try_from(header_len)
        .ok()
        .and_then(|header_len| rest.split_at_checked(header_len));
    let Some((header, data)) = header_and_data else {
        return Err(Error::weights(
            path,
            format!(
                "the header claims {header_len} bytes but only {} follow; the file is truncated",
                rest.len()
            ),
        ));
    };
    if header.first() != Some(&b'{') {
        return Err(Error::weights(
            path,
            "the header does not start with '{'; not safetensors",
        ));
    }
    let header = read_header(header, limits)
        .map_err(|e| Error::weights(path, format!("the header is not valid: {e}")))?;

    let tensors = tile(
        path,
        header.tensors,
        bytes.len() - data.len(),
        data.len() as u64,
    )?;
    Ok((tensors, header.metadata))
}

/// Checks that the tensors cover the `data_len` bytes from file position
/// `start` exactly once, and that shapes agree with sizes.
fn tile(
    path: &Path,
    raw: BTreeMap<String, RawEntry>,
    start: usize,
    data_len: u64,
) -> Result<BTreeMap<String, Entry>> {
    let mut in_order: Vec<(String, RawEntry)> = raw.into_iter().collect();
    in_order.sort_by_key(|(_, e)| e.data_offsets);

    let mut covered = 0;
    let mut tensors = BTreeMap::new();
    for (
        name,
        RawEntry {
            dtype,
            shape,
            data_offsets: (begin, end),
        },
    ) in in_order
    {
        check_name(path, &name)?;
        let bad = |what: String| Error::weights(path, format!("tensor '{name}': {what}"));
        if begin != covered || end < begin || end > data_len {
            return Err(bad(format!(
                "bytes {begin}..{end} were found where the next free byte is {covered} of {data_len}; \
                 tensors must follow each other without holes or overlaps"
            )));
        }
        covered = end;

        let dtype = dtype_from_name(&dtype);
        let (shape, numel) = check_shape(path, &name, &shape)?;
        // The width of a foreign dtype is unknown; it is never read either.
        if dtype.block().is_some() && stored_bytes(&dtype, numel) != Some(end - begin) {
            return Err(bad(format!(
                "shape {shape:?} of {dtype} does not take {} bytes",
                end - begin
            )));
        }
        // Both ends are at most `data_len`, which is the length of a slice.
        let range = start + begin as usize..start + end as usize;
        tensors.insert(
            name,
            Entry {
                shape,
                dtype,
                range,
                format: None,
            },
        );
    }
    if covered != data_len {
        return Err(Error::weights(
            path,
            format!("the tensors end at byte {covered} of {data_len}; the rest belongs to nothing"),
        ));
    }
    Ok(tensors)
}

fn dtype_from_name(name: &str) -> SourceDtype {
    match name {
        "F64" => SourceDtype::F64,
        "F32" => SourceDtype::F32,
        "F16" => SourceDtype::F16,
        "BF16" => SourceDtype::BF16,
        "I64" => SourceDtype::I64,
        "I32" => SourceDtype::I32,
        "I16" => SourceDtype::I16,
        "I8" => SourceDtype::I8,
        "U8" => SourceDtype::U8,
        "BOOL" => SourceDtype::Bool,
        other => SourceDtype::Other(other.into()),
    }
}

struct Header {
    tensors: BTreeMap<String, RawEntry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

fn read_header(json: &[u8], limits: &Limits) -> serde_json::Result<Header> {
    let mut de = serde_json::Deserializer::from_slice(json);
    let header = HeaderSeed { limits }.deserialize(&mut de)?;
    de.end()?;
    Ok(header)
}

/// Reads the header while counting tensors and refusing names that occur
/// twice, which a plain map would silently merge.
struct HeaderSeed<'a> {
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = Header;
    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<Header, D::Error> {
        de.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = BTreeMap::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let UniqueMap(entries) = map.next_value::<UniqueMap>()?;
                let max = self.limits.max_metadata_string;
                if let Some((key, value)) = entries.iter().find(|(_, v)| v.len() > max) {
                    return Err(A::Error::custom(format!(
                        "metadata '{key}' has {} bytes, at most {max} are allowed",
                        value.len()
                    )));
                }
                if metadata.replace(entries).is_some() {
                    return Err(A::Error::custom("'__metadata__' occurs twice"));
                }
                continue;
            }
            let entry = map
                .next_value::<RawEntry>()
                .map_err(|e| A::Error::custom(format!("tensor '{}': {e}", name.escape_debug())))?;
            if tensors.len() >= self.limits.max_tensors {
                return Err(A::Error::custom(format!(
                    "more than {} tensors, which is the limit",
                    self.limits.max_tensors
                )));
            }
            if tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor '{name}' occurs twice")));
            }
            tensors.insert(name, entry);
        }
        Ok(Header {
            tensors,
            metadata: metadata.unwrap_or_default(),
        })
    }
}

/// A JSON object of strings in which no key occurs twice.
pub(super) struct UniqueMap(pub(super) BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = UniqueMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&key) {
                        return Err(A::Error::custom(format!("'{key}' occurs twice")));
                    }
                    out.insert(key, value);
                }
                Ok(UniqueMap(out))
            }
        }
        de.deserialize_map(Strings)
    }
}
