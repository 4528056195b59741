//! Files with rows in our formats, as they are written here.

use std::collections::BTreeMap;

use sequor_kernels::matmul::{Format, Stored};
use sequor_kernels::rng::{Key, Purpose};
use tch::Kind;

use super::fixtures::{refused, safetensors, values};
use crate::weights::{
    Gguf, GgufArray, GgufValue, Limits, PlannedTensor, Safetensors, SourceDtype, TensorSource,
    write_gguf, write_safetensors_with,
};

fn matrix(format: Format) -> Stored {
    let mut stream = Key::new(1, 0).stream(0, Purpose::Test);
    let numbers: Vec<f32> = (0..3 * 256)
        .map(|_| stream.uniform() as f32 - 0.5)
        .collect();
    Stored::quantise(format, &numbers, 3, 256).unwrap()
}

fn planned(name: &str, shape: &[i64], dtype: impl Into<SourceDtype>) -> PlannedTensor {
    PlannedTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: dtype.into(),
    }
}

/// All formats and a vector, written tensor by tensor.
fn plan(formats: &[Format]) -> Vec<PlannedTensor> {
    let matrices = formats
        .iter()
        .map(|&f| planned(&format!("{f}.weight"), &[3, 256], f));
    matrices
        .chain([planned("v", &[3], SourceDtype::F32)])
        .collect()
}

fn bytes_of(tensor: &PlannedTensor) -> Vec<u8> {
    match tensor.name.strip_suffix(".weight") {
        Some(format) => matrix(format.parse().unwrap()).bytes().to_vec(),
        None => [1.0f32, -2.0, 3.5]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
    }
}

fn check(source: &dyn TensorSource, formats: &[Format]) {
    for &format in formats {
        let name = format!("{format}.weight");
        let info = source.info(&name).unwrap();
        let expected = matrix(format);
        assert_eq!(info.shape, [3, 256], "{format}");
        assert_eq!(info.dtype, format.into());
        assert_eq!(info.bytes, expected.bytes().len() as u64);
        let tensor = source.load(&name).unwrap().to_kind(Kind::Float);
        let numbers = values(&tensor).1;
        let exact: Vec<f64> = expected.expand().into_iter().map(f64::from).collect();
        assert_eq!(numbers, exact, "{format}");
        if format != Format::Bf16 {
            assert_eq!(source.stored(&name).unwrap().unwrap(), expected, "{format}");
        }
    }
    assert_eq!(
        values(&source.load("v").unwrap()),
        (vec![3], vec![1.0, -2.0, 3.5])
    );
    assert!(source.stored("v").unwrap().is_none());
}

#[test]
fn safetensors_keep_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    write_safetensors_with(&path, &plan(&Format::ALL), &BTreeMap::new(), |t, put| {
        // In pieces, as a writer may.
        bytes_of(t).chunks(100).try_for_each(put)
    })
    .unwrap();
    check(&Safetensors::open(&path).unwrap(), &Format::ALL);
    // For other programs they are bytes.
    let file = std::fs::read(&path).unwrap();
    let other = ::safetensors::SafeTensors::deserialize(&file).unwrap();
    let view = other.tensor("q8_0.weight").unwrap();
    assert_eq!((view.shape(), view.data().len()), (&[3, 272][..], 3 * 272));
}

#[test]
fn gguf_keeps_values_and_formats() {
    let formats = [
        Format::Bf16,
        Format::Q8_0,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q4K,
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let values = BTreeMap::from(
        [
            ("u8", GgufValue::U8(200)),
            ("i8", GgufValue::I8(-3)),
            ("u16", GgufValue::U16(60_000)),
            ("i16", GgufValue::I16(-30_000)),
            ("u32", GgufValue::U32(u32::MAX)),
            ("i32", GgufValue::I32(i32::MIN)),
            ("u64", GgufValue::U64(u64::MAX)),
            ("i64", GgufValue::I64(i64::MIN)),
            ("f32", GgufValue::F32(1.5)),
            ("f64", GgufValue::F64(-2.25)),
            ("bool", GgufValue::Bool(true)),
            ("text", GgufValue::String("\u{e9}t\u{e9}".to_owned())),
            (
                "texts",
                GgufValue::Array(GgufArray::String(vec!["a".to_owned(), String::new()])),
            ),
            (
                "bools",
                GgufValue::Array(GgufArray::Bool(vec![true, false])),
            ),
            ("floats", GgufValue::Array(GgufArray::F32(vec![0.5, -1.0]))),
            ("ints", GgufValue::Array(GgufArray::I32(vec![-1, 7]))),
        ]
        .map(|(k, v)| (k.to_owned(), v)),
    );
    let write = |t: &PlannedTensor, put: crate::weights::Put<'_>| put(&bytes_of(t));
    write_gguf(&path, &values, &plan(&formats), write).unwrap();
    let file = Gguf::open(&path).unwrap();
    assert_eq!(file.values(), &values);
    check(&file, &formats);

    let int8 = write_gguf(&path, &values, &plan(&[Format::Int8]), write);
    refused(int8, &["int8.weight", "q8_0"]);
    // The older file is still whole.
    check(&Gguf::open(&path).unwrap(), &formats);
}

#[test]
fn wrong_plans_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let write = |plan: &[PlannedTensor], bytes: usize| {
        write_safetensors_with(&path, plan, &BTreeMap::new(), |_, put| put(&vec![0; bytes]))
    };
    let vector = planned("v", &[3], SourceDtype::F32);
    refused(
        write(std::slice::from_ref(&vector), 11),
        &["'v'", "11", "12"],
    );
    refused(write(&[vector.clone(), vector], 12), &["'v'", "twice"]);
    refused(
        write(&[planned("w", &[3, 33], Format::Q4_0)], 1),
        &["'w'", "Q4_0"],
    );
    refused(
        write(&[planned("w", &[3], Format::Q8_0)], 1),
        &["'w'", "Q8_0"],
    );
    refused(write(&[planned("w", &[-1], SourceDtype::F32)], 1), &["'w'"]);
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
}

#[test]
fn formats_that_a_file_only_claims_are_refused() {
    let open = |formats: &str, dtype: &str, shape: &str, bytes: usize| {
        let header = format!(
            r#"{{"__metadata__":{{"sequor.formats":{formats:?}}},"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{bytes}]}}}}"#
        );
        Safetensors::from_bytes(
            safetensors(&header, &vec![0; bytes]),
            "m",
            &Limits::default(),
        )
    };
    let good = r#"{"w":["q8_0",32]}"#;
    assert_eq!(
        open(good, "U8", "[2,34]", 68)
            .unwrap()
            .info("w")
            .unwrap()
            .shape,
        [2, 32]
    );
    refused(open(good, "U8", "[2,33]", 66), &["'w'", "q8_0", "32"]);
    refused(open(good, "U8", "[68]", 68), &["'w'", "q8_0"]);
    refused(open(good, "I8", "[2,34]", 68), &["'w'", "I8"]);
    refused(
        open(r#"{"w":["q3_k",32]}"#, "U8", "[2,34]", 68),
        &["q3_k", "q4_k"],
    );
    refused(
        open(r#"{"x":["q8_0",32]}"#, "U8", "[2,34]", 68),
        &["no tensor 'x'"],
    );
    refused(
        open(r#"{"w":["int8",18446744073709551615]}"#, "U8", "[2,34]", 68),
        &["'w'"],
    );
    refused(open("[1]", "U8", "[2,34]", 68), &["sequor.formats"]);
}
