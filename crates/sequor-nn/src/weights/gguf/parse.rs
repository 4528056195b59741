//! The GGUF header: typed metadata and the table of tensors.
//!
//! Layout (version 2 and 3, little-endian): magic `GGUF`, u32 version, u64
//! tensor count, u64 metadata count; then per metadata entry a string key, a
//! u32 type and the value; then per tensor a string name, u32 rank, u64
//! dimensions (innermost first), u32 dtype and u64 offset; then, at the next
//! multiple of `general.alignment`, the data that the offsets count from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::super::source::{Limits, SourceDtype, check_name, check_shape, stored_bytes};
use super::value::{GgufArray, GgufValue};
use crate::error::{Error, Result};

/// ggml's own bound on the rank of a tensor.
const MAX_DIMS: u32 = 4;
/// Metadata entries of one file; real files have a few dozen.
const MAX_ENTRIES: u64 = 65_536;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 65_536;

/// Everything before the data.
pub(super) struct Header {
    pub metadata: BTreeMap<String, GgufValue>,
    pub tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// Torch order, outermost first.
    pub shape: Vec<i64>,
    pub dtype: SourceDtype,
    /// Position in the file; empty when the size of the dtype is unknown.
    pub range: Range<usize>,
}

pub(super) fn parse(path: &Path, file: &[u8], limits: &Limits) -> Result<Header> {
    let mut r = Reader::new(path, file, limits);
    if r.take(4, "the magic number")? != b"GGUF" {
        return Err(Error::weights(
            path,
            "does not start with 'GGUF'; not a GGUF file",
        ));
    }
    let version = r.u32("the version")?;
    if version.swap_bytes() <= 3 && version > 3 {
        return Err(Error::Unsupported(format!(
            "{}: a big-endian GGUF file; convert it to little-endian first",
            path.display()
        )));
    }
    if !(2..=3).contains(&version) {
        return Err(Error::Unsupported(format!(
            "{}: GGUF version {version}, this reads 2 and 3; convert the model again with a \
             current converter",
            path.display()
        )));
    }
    let tensor_count = r.u64("the tensor count")?;
    let entry_count = r.u64("the metadata count")?;
    let too_many = |what: &str, n: u64, max: u64| {
        Error::Limits(format!(
            "{}: {n} {what}, at most {max} are allowed",
            path.display()
        ))
    };
    if tensor_count > limits.max_tensors as u64 {
        return Err(too_many("tensors", tensor_count, limits.max_tensors as u64));
    }
    if entry_count > MAX_ENTRIES {
        return Err(too_many("metadata entries", entry_count, MAX_ENTRIES));
    }

    let mut metadata = BTreeMap::new();
    for _ in 0..entry_count {
        let key = r.string("a metadata key")?;
        check_name(path, &key)?;
        let value = r.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(Error::weights(
                path,
                format!("metadata '{key}' occurs twice"),
            ));
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(path, &metadata)?;

    let mut raw = Vec::new();
    for _ in 0..tensor_count {
        raw.push(r.tensor()?);
    }
    let data_start = (r.pos as u64).next_multiple_of(alignment);
    let tensors = place(path, raw, data_start, file.len() as u64, alignment)?;
    Ok(Header { metadata, tensors })
}

fn alignment(path: &Path, metadata: &BTreeMap<String, GgufValue>) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(a) if a.is_power_of_two() && a <= MAX_ALIGNMENT => Ok(a),
        _ => Err(Error::weights(
            path,
            format!(
                "general.alignment is {value}, expected a power of two of at most {MAX_ALIGNMENT}"
            ),
        )),
    }
}

/// A tensor as the table describes it.
struct RawTensor {
    name: String,
    /// ggml order, innermost first.
    dims: Vec<u64>,
    dtype: SourceDtype,
    offset: u64,
}

/// Turns offsets into file positions and checks that they are aligned, inside
/// the file and do not overlap.
fn place(
    path: &Path,
    raw: Vec<RawTensor>,
    data_start: u64,
    file_len: u64,
    alignment: u64,
) -> Result<BTreeMap<String, Entry>> {
    let mut tensors = BTreeMap::new();
    let mut spans: Vec<(u64, u64, String)> = Vec::new();
    for RawTensor {
        name,
        mut dims,
        dtype,
        offset,
    } in raw
    {
        check_name(path, &name)?;
        let bad = |what: String| Error::weights(path, format!("tensor '{name}': {what}"));
        let row = dims.first().copied().unwrap_or(1);
        dims.reverse();
        let (shape, numel) = check_shape(path, &name, &dims)?;
        let bytes = match dtype.block() {
            None => 0,
            Some((block, _)) if row % block != 0 => {
                return Err(bad(format!(
                    "rows of {row} elements are not whole blocks of {block} as {dtype} needs"
                )));
            }
            Some(_) => stored_bytes(&dtype, numel)
                .ok_or_else(|| bad(format!("the size of shape {shape:?} overflows")))?,
        };
        if offset % alignment != 0 {
            return Err(bad(format!(
                "offset {offset} is not a multiple of {alignment}"
            )));
        }
        let end = data_start
            .checked_add(offset)
            .and_then(|at| at.checked_add(bytes));
        let Some(end) = end.filter(|&end| end <= file_len) else {
            return Err(bad(format!(
                "{bytes} bytes at offset {offset} end beyond the {file_len} bytes of the file; \
                 it is truncated or damaged"
            )));
        };
        let begin = end - bytes;
        // `end` is at most the length of a slice, so both fit a usize.
        let range = begin as usize..end as usize;
        if bytes > 0 {
            spans.push((begin, end, name.clone()));
        }
        if tensors.contains_key(&name) {
            return Err(Error::weights(
                path,
                format!("tensor '{name}' occurs twice"),
            ));
        }
        tensors.insert(
            name,
            Entry {
                shape,
                dtype,
                range,
            },
        );
    }
    spans.sort();
    for (before, after) in spans.iter().zip(spans.iter().skip(1)) {
        if after.0 < before.1 {
            return Err(Error::weights(
                path,
                format!("tensors '{}' and '{}' overlap", before.2, after.2),
            ));
        }
    }
    Ok(tensors)
}

/// A cursor that reads little-endian numbers and never past the end.
struct Reader<'a> {
    path: &'a Path,
    limits: &'a Limits,
    bytes: &'a [u8],
    pos: usize,
    /// The header must end before this position.
    end: usize,
}

impl<'a> Reader<'a> {
    fn new(path: &'a Path, bytes: &'a [u8], limits: &'a Limits) -> Self {
        let max = usize::try_from(limits.max_header_bytes).unwrap_or(usize::MAX);
        Self {
            path,
            limits,
            bytes,
            pos: 0,
            end: bytes.len().min(max),
        }
    }

    fn bad(&self, what: impl Into<String>) -> Error {
        Error::weights(self.path, what)
    }

    fn remaining(&self) -> usize {
        self.end - self.pos
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        if n > self.remaining() {
            if self.end < self.bytes.len() {
                return Err(Error::Limits(format!(
                    "{}: the header goes on beyond {} bytes, which is the limit",
                    self.path.display(),
                    self.end
                )));
            }
            return Err(self.bad(format!(
                "the file ends at byte {} inside {what}; it is truncated or damaged",
                self.bytes.len()
            )));
        }
        let taken = &self.bytes[self.pos..self.pos + n];
        self.pos += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        if len > self.limits.max_metadata_string as u64 {
            return Err(Error::Limits(format!(
                "{}: {what} claims {len} bytes, at most {} are allowed",
                self.path.display(),
                self.limits.max_metadata_string
            )));
        }
        let bytes = self.take(len as usize, what)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| self.bad(format!("{what} is not valid UTF-8")))
    }

    fn bool(&mut self, key: &str) -> Result<bool> {
        match self.array(key)? {
            [0u8] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.bad(format!("metadata '{key}': {other} is not a truth value"))),
        }
    }

    fn value(&mut self, key: &str) -> Result<GgufValue> {
        let what = format!("metadata '{key}'");
        Ok(match self.u32(&what)? {
            0 => GgufValue::U8(self.array(&what).map(u8::from_le_bytes)?),
            1 => GgufValue::I8(self.array(&what).map(i8::from_le_bytes)?),
            2 => GgufValue::U16(self.array(&what).map(u16::from_le_bytes)?),
            3 => GgufValue::I16(self.array(&what).map(i16::from_le_bytes)?),
            4 => GgufValue::U32(self.u32(&what)?),
            5 => GgufValue::I32(self.array(&what).map(i32::from_le_bytes)?),
            6 => GgufValue::F32(self.array(&what).map(f32::from_le_bytes)?),
            7 => GgufValue::Bool(self.bool(key)?),
            8 => GgufValue::String(self.string(&what)?),
            9 => GgufValue::Array(self.array_value(key, &what)?),
            10 => GgufValue::U64(self.u64(&what)?),
            11 => GgufValue::I64(self.array(&what).map(i64::from_le_bytes)?),
            12 => GgufValue::F64(self.array(&what).map(f64::from_le_bytes)?),
            other => return Err(self.bad(format!("{what} has the unknown value type {other}"))),
        })
    }

    fn array_value(&mut self, key: &str, what: &str) -> Result<GgufArray> {
        let element = self.u32(what)?;
        let len = self.u64(what)?;
        if len > self.limits.max_array_len as u64 {
            return Err(Error::Limits(format!(
                "{}: {what} claims {len} elements, at most {} are allowed",
                self.path.display(),
                self.limits.max_array_len
            )));
        }
        let n = len as usize;
        Ok(match element {
            0 => GgufArray::U8(self.numbers(n, what, u8::from_le_bytes)?),
            1 => GgufArray::I8(self.numbers(n, what, i8::from_le_bytes)?),
            2 => GgufArray::U16(self.numbers(n, what, u16::from_le_bytes)?),
            3 => GgufArray::I16(self.numbers(n, what, i16::from_le_bytes)?),
            4 => GgufArray::U32(self.numbers(n, what, u32::from_le_bytes)?),
            5 => GgufArray::I32(self.numbers(n, what, i32::from_le_bytes)?),
            6 => GgufArray::F32(self.numbers(n, what, f32::from_le_bytes)?),
            7 => {
                let mut out = Vec::new();
                for _ in 0..n {
                    out.push(self.bool(key)?);
                }
                GgufArray::Bool(out)
            }
            8 => {
                // No reservation from the claimed length: strings grow only as
                // the file really provides them.
                let mut out = Vec::new();
                for _ in 0..n {
                    out.push(self.string(what)?);
                }
                GgufArray::String(out)
            }
            9 => {
                return Err(Error::Unsupported(format!(
                    "{}: {what} is an array of arrays",
                    self.path.display()
                )));
            }
            10 => GgufArray::U64(self.numbers(n, what, u64::from_le_bytes)?),
            11 => GgufArray::I64(self.numbers(n, what, i64::from_le_bytes)?),
            12 => GgufArray::F64(self.numbers(n, what, f64::from_le_bytes)?),
            other => return Err(self.bad(format!("{what} has the unknown element type {other}"))),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        n: usize,
        what: &str,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let bytes = self.take(n.saturating_mul(N), what)?;
        Ok(bytes
            .as_chunks::<N>()
            .0
            .iter()
            .map(|&b| decode(b))
            .collect())
    }

    fn tensor(&mut self) -> Result<RawTensor> {
        let name = self.string("a tensor name")?;
        let what = format!("tensor '{name}'");
        let rank = self.u32(&what)?;
        if rank > MAX_DIMS {
            return Err(self.bad(format!(
                "{what}: {rank} dimensions, ggml has at most {MAX_DIMS}"
            )));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            dims.push(self.u64(&what)?);
        }
        let dtype = dtype_from_number(self.u32(&what)?);
        let offset = self.u64(&what)?;
        Ok(RawTensor {
            name,
            dims,
            dtype,
            offset,
        })
    }
}

/// ggml's numbers of the dtypes that are read and written here.
const DTYPES: [(u32, SourceDtype); 16] = [
    (0, SourceDtype::F32),
    (1, SourceDtype::F16),
    (2, SourceDtype::Q4_0),
    (3, SourceDtype::Q4_1),
    (6, SourceDtype::Q5_0),
    (7, SourceDtype::Q5_1),
    (8, SourceDtype::Q8_0),
    (12, SourceDtype::Q4K),
    (13, SourceDtype::Q5K),
    (14, SourceDtype::Q6K),
    (24, SourceDtype::I8),
    (25, SourceDtype::I16),
    (26, SourceDtype::I32),
    (27, SourceDtype::I64),
    (28, SourceDtype::F64),
    (30, SourceDtype::BF16),
];

/// ggml's number of a dtype; `None` where ggml does not have it.
pub(super) fn dtype_number(dtype: &SourceDtype) -> Option<u32> {
    DTYPES.iter().find(|(_, d)| d == dtype).map(|(n, _)| *n)
}

/// The dtype of a number. Those that cannot be dequantised here keep their name and number,
/// so that a refusal says what was found.
fn dtype_from_number(number: u32) -> SourceDtype {
    if let Some((_, dtype)) = DTYPES.iter().find(|(n, _)| *n == number) {
        return dtype.clone();
    }
    let name = match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown",
    };
    SourceDtype::Other(format!("{name} (ggml type {number})").into())
}
