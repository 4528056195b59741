//! The safetensors reader against the reference crate and against bad headers.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use ::safetensors::tensor::{Dtype, TensorView};
use tch::Kind;

use super::fixtures::{limited, refused, safetensors, values};
use crate::error::Result;
use crate::weights::{Limits, Safetensors, Sharded, SourceDtype, TensorSource};

fn parse(file: Vec<u8>) -> Result<Safetensors> {
    Safetensors::from_bytes(file, "m.safetensors", &Limits::default())
}

/// The result of a one-tensor header over `data` zero bytes.
fn one(entry: &str, data: usize) -> Result<Safetensors> {
    parse(safetensors(&format!("{{\"w\":{entry}}}"), &vec![0; data]))
}

#[test]
fn reads_every_dtype_that_the_reference_crate_writes() {
    type Case = (&'static str, Dtype, Vec<u8>, Kind, [f64; 2]);
    let cases: [Case; 10] = [
        (
            "f64",
            Dtype::F64,
            [1.5f64, -2.0].map(f64::to_le_bytes).concat(),
            Kind::Double,
            [1.5, -2.0],
        ),
        (
            "f32",
            Dtype::F32,
            [1.5f32, -2.0].map(f32::to_le_bytes).concat(),
            Kind::Float,
            [1.5, -2.0],
        ),
        (
            "f16",
            Dtype::F16,
            vec![0x00, 0x3E, 0x00, 0xC0],
            Kind::Half,
            [1.5, -2.0],
        ),
        (
            "bf16",
            Dtype::BF16,
            vec![0xC0, 0x3F, 0x00, 0xC0],
            Kind::BFloat16,
            [1.5, -2.0],
        ),
        (
            "i64",
            Dtype::I64,
            [3i64, -4].map(i64::to_le_bytes).concat(),
            Kind::Int64,
            [3.0, -4.0],
        ),
        (
            "i32",
            Dtype::I32,
            [3i32, -4].map(i32::to_le_bytes).concat(),
            Kind::Int,
            [3.0, -4.0],
        ),
        (
            "i16",
            Dtype::I16,
            [3i16, -4].map(i16::to_le_bytes).concat(),
            Kind::Int16,
            [3.0, -4.0],
        ),
        ("i8", Dtype::I8, vec![3, 252], Kind::Int8, [3.0, -4.0]),
        ("u8", Dtype::U8, vec![3, 252], Kind::Uint8, [3.0, 252.0]),
        ("bool", Dtype::BOOL, vec![0, 1], Kind::Bool, [0.0, 1.0]),
    ];
    let views: Vec<(&str, TensorView)> = cases
        .iter()
        .map(|(name, dtype, data, ..)| (*name, TensorView::new(*dtype, vec![2, 1], data).unwrap()))
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let source = parse(::safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();

    assert_eq!(
        source.metadata(),
        &BTreeMap::from([("format".to_owned(), "pt".to_owned())])
    );
    assert_eq!(source.names().len(), cases.len());
    for (name, _, data, kind, expected) in &cases {
        let info = source.info(name).unwrap();
        assert_eq!((info.shape, info.bytes), (vec![2, 1], data.len() as u64));
        assert_eq!(info.file, Path::new("m.safetensors"));
        let tensor = source.load(name).unwrap();
        assert_eq!(tensor.kind(), *kind);
        assert_eq!(values(&tensor), (vec![2, 1], expected.to_vec()));
    }
}

#[test]
fn scalars_and_empty_tensors_are_tensors() {
    let header = r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "b":{"dtype":"F32","shape":[0,3],"data_offsets":[4,4]},
        "c":{"dtype":"U8","shape":[2],"data_offsets":[4,6]},
        "d":{"dtype":"F64","shape":[0],"data_offsets":[6,6]}}"#;
    let source = parse(safetensors(header, &[0, 0, 128, 63, 7, 8])).unwrap();
    assert_eq!(values(&source.load("a").unwrap()), (vec![], vec![1.0]));
    assert_eq!(source.load("b").unwrap().size(), [0, 3]);
    assert_eq!(values(&source.load("c").unwrap()).1, [7.0, 8.0]);
    assert_eq!(source.load("d").unwrap().kind(), Kind::Double);
    assert!(parse(safetensors("{}", &[])).unwrap().names().is_empty());
}

#[test]
fn any_nonzero_byte_is_true() {
    let header = r#"{"w":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}}"#;
    let tensor = parse(safetensors(header, &[0, 2, 255]))
        .unwrap()
        .load("w")
        .unwrap();
    assert_eq!(tensor.kind(), Kind::Bool);
    assert_eq!(values(&tensor).1, [0.0, 1.0, 1.0]);
}

#[test]
fn lying_header_lengths_are_refused() {
    limited(parse(
        [(1u64 << 63).to_le_bytes().as_slice(), b"{}"].concat(),
    ));
    limited(parse([u64::MAX.to_le_bytes().as_slice(), b"{}"].concat()));
    limited(parse(
        [100_000_001u64.to_le_bytes().as_slice(), b"{}"].concat(),
    ));
    refused(
        parse([3u64.to_le_bytes().as_slice(), b"{}"].concat()),
        &[
            "m.safetensors",
            "claims 3 bytes but only 2 follow",
            "truncated",
        ],
    );
    refused(parse(vec![1, 0, 0]), &["3 bytes are too few"]);
    refused(parse(safetensors("[]", &[])), &["does not start with '{'"]);
    refused(parse(safetensors("", &[])), &["does not start with '{'"]);
}

#[test]
fn damaged_headers_are_refused() {
    let cases = [
        ("{", "header is not valid"),
        ("{} x", "trailing characters"),
        (r#"{"w":1}"#, "tensor 'w': invalid type"),
        (r#"{"w":{"dtype":"F32","shape":[1]}}"#, "data_offsets"),
        (
            r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#,
            "tensor 'w'",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[0.5],"data_offsets":[0,0]}}"#,
            "tensor 'w'",
        ),
        (r#"{"__metadata__":{"a":1}}"#, "invalid type"),
        (r#"{"__metadata__":{"a":"x","a":"y"}}"#, "'a' occurs twice"),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#,
            "'__metadata__' occurs twice",
        ),
        (
            r#"{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
            "tensor 'w' occurs twice",
        ),
        (
            r#"{"a\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
            "NUL",
        ),
    ];
    for (header, what) in cases {
        refused(parse(safetensors(header, &[])), &["m.safetensors", what]);
    }
    refused(
        parse([2u64.to_le_bytes().as_slice(), b"{\xff"].concat()),
        &["header is not valid"],
    );
    // Deep nesting ends in an error, not in a full stack.
    let deep = format!("{{\"w\":{}", "[".repeat(100_000));
    refused(parse(safetensors(&deep, &[])), &["header is not valid"]);
}

#[test]
fn tensors_must_tile_the_data() {
    let two = |a: [u64; 2], b: [u64; 2], data: usize| {
        let entry = |[begin, end]: [u64; 2]| {
            let n = end.saturating_sub(begin);
            format!(r#"{{"dtype":"U8","shape":[{n}],"data_offsets":[{begin},{end}]}}"#)
        };
        parse(safetensors(
            &format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b)),
            &vec![0; data],
        ))
    };
    assert!(two([0, 2], [2, 5], 5).is_ok());
    assert!(two([3, 5], [0, 3], 5).is_ok());
    refused(
        two([0, 2], [3, 5], 5),
        &["tensor 'b'", "bytes 3..5", "next free byte is 2"],
    );
    refused(
        two([0, 3], [2, 5], 5),
        &["tensor 'b'", "without holes or overlaps"],
    );
    refused(two([0, 2], [0, 2], 2), &["overlaps"]);
    refused(two([1, 2], [2, 5], 5), &["tensor 'a'"]);
    refused(two([0, 2], [2, 6], 5), &["tensor 'b'"]);
    refused(two([0, 2], [2, 1], 5), &["tensor 'b'"]);
    refused(two([0, 2], [2, 5], 7), &["end at byte 5 of 7"]);
    refused(two([0, 2], [2, u64::MAX], 5), &["tensor 'b'"]);
}

#[test]
fn shapes_must_agree_with_sizes() {
    refused(
        one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4),
        &["tensor 'w'", "[2]", "F32", "4 bytes"],
    );
    for shape in [
        "[4294967296,4294967296,4]",
        "[9223372036854775807,3]",
        "[0,4294967296,4294967296]",
    ] {
        let entry = format!(r#"{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}"#);
        refused(one(&entry, 0), &["tensor 'w'", "overflows"]);
    }
    refused(
        one(
            r#"{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}"#,
            0,
        ),
        &["63 bits"],
    );
    let rank = vec!["1"; 65].join(",");
    refused(
        one(
            &format!(r#"{{"dtype":"U8","shape":[{rank}],"data_offsets":[0,1]}}"#),
            1,
        ),
        &["65 dimensions"],
    );
}

#[test]
fn foreign_dtypes_are_listed_and_refused_when_loaded() {
    let header = r#"{"ok":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "scale":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[1,5]}}"#;
    let source = parse(safetensors(header, &[9, 0, 0, 0, 0])).unwrap();
    assert_eq!(
        source.info("scale").unwrap().dtype,
        SourceDtype::Other("F8_E4M3".into())
    );
    refused(
        source.load("scale"),
        &["m.safetensors", "tensor 'scale'", "F8_E4M3", "convert"],
    );
    assert!(source.load("ok").is_ok());
    refused(
        source.load("absent"),
        &["m.safetensors", "no tensor 'absent'"],
    );
}

#[test]
fn limits_are_limits() {
    let limits = Limits {
        max_tensors: 1,
        max_metadata_string: 3,
        ..Limits::default()
    };
    let entry = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let read = |header: &str| Safetensors::from_bytes(safetensors(header, &[]), "m", &limits);
    assert!(read(&format!(r#"{{"a":{entry}}}"#)).is_ok());
    refused(
        read(&format!(r#"{{"a":{entry},"b":{entry}}}"#)),
        &["more than 1 tensors"],
    );
    refused(
        read(r#"{"__metadata__":{"k":"four"}}"#),
        &["'k' has 4 bytes"],
    );
    let long = format!(r#"{{"{}":{entry}}}"#, "x".repeat(65_536));
    limited(read(&long));
}

/// A folder with an index and the shards it names.
fn sharded(index: &str, shards: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, Result<Sharded>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in shards {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let path = folder.path().join("model.safetensors.index.json");
    std::fs::write(&path, index).unwrap();
    let opened = Sharded::open(&path);
    (folder, opened)
}

fn shard(name: &str, byte: u8) -> Vec<u8> {
    let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    safetensors(&format!("{{\"{name}\":{entry}}}"), &[byte])
}

#[test]
fn shards_are_one_source() {
    let index = r#"{"metadata":{"total_size":2,"note":"x"},
        "weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    let shards = [
        ("one.safetensors", shard("a", 1)),
        ("two.safetensors", shard("b", 2)),
    ];
    let (folder, source) = sharded(index, &shards);
    let source = source.unwrap();
    assert_eq!(source.names(), ["a", "b"]);
    assert_eq!(values(&source.load("b").unwrap()).1, [2.0]);
    assert_eq!(
        source.info("b").unwrap().file,
        folder.path().join("two.safetensors")
    );
    assert_eq!(source.metadata()["total_size"], "2");
    assert_eq!(source.metadata()["note"], "x");
    refused(source.load("c"), &["index.json", "no tensor 'c'"]);
}

#[test]
fn bad_indices_are_refused() {
    let one = || [("one.safetensors", shard("a", 1))];
    for file in [
        "../one.safetensors",
        "/etc/passwd",
        "x/one.safetensors",
        "x\\\\y",
        "..",
        ".",
        "",
    ] {
        let index = format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#);
        refused(
            sharded(&index, &one()).1,
            &["index.json", "'a'", "only plain names"],
        );
    }
    refused(
        sharded(r#"{"weight_map":{"a":"two.safetensors"}}"#, &one()).1,
        &["index.json", "'two.safetensors'", "does not exist", "fetch"],
    );
    refused(
        sharded(
            r#"{"weight_map":{"a":"one.safetensors","b":"one.safetensors"}}"#,
            &one(),
        )
        .1,
        &["'b'", "'one.safetensors'", "does not hold it"],
    );
    refused(
        sharded(
            r#"{"weight_map":{"a":"one.safetensors","a":"one.safetensors"}}"#,
            &one(),
        )
        .1,
        &["'a' occurs twice"],
    );
    refused(
        sharded(r#"{"weight_map":{"a":1}}"#, &one()).1,
        &["index is not valid"],
    );
    refused(sharded("{", &one()).1, &["index is not valid"]);
    // An index does not lead to another one, itself least of all.
    refused(
        sharded(
            r#"{"weight_map":{"a":"model.safetensors.index.json"}}"#,
            &one(),
        )
        .1,
        &["JSON file"],
    );
    refused(
        sharded(
            r#"{"weight_map":{"a":"one.safetensors"}}"#,
            &[("one.safetensors", vec![1])],
        )
        .1,
        &["one.safetensors"],
    );
}
