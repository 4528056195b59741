//! Writes GGUF files, tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use super::parse::dtype_number;
use super::value::{GgufArray, GgufValue};
use crate::error::{Error, Result};
use crate::weights::write::{PlannedTensor, Put, check_names, write_atomic, write_data};

/// Where the data of each tensor begins: at a multiple of this.
const ALIGNMENT: usize = 32;

/// Writes a GGUF file (version 3): typed metadata, then the tensors in the given order.
/// `write` is asked for each and puts its bytes, so that no more than one needs to be in
/// memory. The file appears under its name only when it is complete.
///
/// A `general.alignment` in `values` is not taken over: tensors stand at multiples of 32
/// bytes, the format's own choice.
///
/// # Errors
/// A name occurs twice, a tensor has more than four dimensions or a dtype that GGUF does
/// not have, `write` puts more or fewer bytes than planned or fails, or the file cannot be
/// written.
pub fn write_gguf(
    path: &Path,
    values: &BTreeMap<String, GgufValue>,
    tensors: &[PlannedTensor],
    write: impl FnMut(&PlannedTensor, Put<'_>) -> Result<()>,
) -> Result<()> {
    check_names(tensors)?;
    let header = header(values, tensors)?;
    let order: Vec<&PlannedTensor> = tensors.iter().collect();
    write_atomic(path, |file| {
        use std::io::Write;
        file.write_all(&header).map_err(|e| Error::io(path, e))?;
        write_data(path, file, &order, ALIGNMENT, write)
    })
}

fn header(values: &BTreeMap<String, GgufValue>, tensors: &[PlannedTensor]) -> Result<Vec<u8>> {
    let values = values.iter().filter(|(k, _)| *k != "general.alignment");
    let mut out = Vec::new();
    out.extend(b"GGUF");
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((values.clone().count() as u64).to_le_bytes());
    for (key, value) in values {
        text(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0usize;
    for tensor in tensors {
        let refused = |why: &str| {
            Error::Unsupported(format!("tensor '{}' in a GGUF file: {why}", tensor.name))
        };
        if tensor.shape.len() > 4 {
            return Err(refused("it has more than four dimensions"));
        }
        let dtype = dtype_number(&tensor.dtype).ok_or_else(|| {
            refused(&format!(
                "GGUF has no {}; choose q8_0, or write safetensors",
                tensor.dtype
            ))
        })?;
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        // ggml counts dimensions from the innermost.
        for d in tensor.shape.iter().rev() {
            out.extend(d.to_le_bytes());
        }
        out.extend(dtype.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        let bytes = tensor.bytes()?;
        offset = offset
            .checked_add(bytes)
            .and_then(|at| at.checked_next_multiple_of(ALIGNMENT))
            .ok_or_else(|| refused("the file would be too large"))?;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The type and the value.
fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    macro_rules! put {
        ($number:literal, $bytes:expr) => {{
            out.extend(u32::to_le_bytes($number));
            out.extend($bytes);
        }};
    }
    match value {
        GgufValue::U8(v) => put!(0, v.to_le_bytes()),
        GgufValue::I8(v) => put!(1, v.to_le_bytes()),
        GgufValue::U16(v) => put!(2, v.to_le_bytes()),
        GgufValue::I16(v) => put!(3, v.to_le_bytes()),
        GgufValue::U32(v) => put!(4, v.to_le_bytes()),
        GgufValue::I32(v) => put!(5, v.to_le_bytes()),
        GgufValue::F32(v) => put!(6, v.to_le_bytes()),
        GgufValue::Bool(v) => put!(7, [u8::from(*v)]),
        GgufValue::String(v) => {
            out.extend(8u32.to_le_bytes());
            text(out, v);
        }
        GgufValue::Array(v) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, v);
        }
        GgufValue::U64(v) => put!(10, v.to_le_bytes()),
        GgufValue::I64(v) => put!(11, v.to_le_bytes()),
        GgufValue::F64(v) => put!(12, v.to_le_bytes()),
    }
}

/// The type of the elements, their number and they.
fn put_array(out: &mut Vec<u8>, array: &GgufArray) {
    macro_rules! put {
        ($number:literal, $values:expr) => {{
            out.extend(u32::to_le_bytes($number));
            out.extend(($values.len() as u64).to_le_bytes());
            out.extend($values.iter().flat_map(|v| v.to_le_bytes()));
        }};
    }
    match array {
        GgufArray::U8(v) => put!(0, v),
        GgufArray::I8(v) => put!(1, v),
        GgufArray::U16(v) => put!(2, v),
        GgufArray::I16(v) => put!(3, v),
        GgufArray::U32(v) => put!(4, v),
        GgufArray::I32(v) => put!(5, v),
        GgufArray::F32(v) => put!(6, v),
        GgufArray::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            out.extend(v.iter().map(|&b| u8::from(b)));
        }
        GgufArray::String(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|t| text(out, t));
        }
        GgufArray::U64(v) => put!(10, v),
        GgufArray::I64(v) => put!(11, v),
        GgufArray::F64(v) => put!(12, v),
    }
}
