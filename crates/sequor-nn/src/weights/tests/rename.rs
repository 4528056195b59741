//! Other names and layouts for the same tensors.

use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::fixtures::{refused, safetensors, values};
use crate::weights::{Limits, NewTensor, Renamed, Safetensors, TensorSource, Transform, open_with};

/// `a` is `[2, 3]` with elements 0..6, `b` is `[4]` with 6..10.
fn source() -> Safetensors {
    let header = r#"{"m.a":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]},
        "m.b":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}}"#;
    let data: Vec<u8> = (0..10).collect();
    Safetensors::from_bytes(safetensors(header, &data), "m", &Limits::default()).unwrap()
}

fn table(steps: Vec<Transform>) -> crate::error::Result<Renamed<Safetensors>> {
    Renamed::from_table(source(), [("new".to_owned(), ("m.a".to_owned(), steps))])
}

#[test]
fn steps_rearrange() {
    let check = |steps: Vec<Transform>, shape: &[i64], expected: &[f64]| {
        let renamed = table(steps).unwrap();
        assert_eq!(renamed.names(), ["new"]);
        assert_eq!(renamed.info("new").unwrap().shape, shape);
        let t = renamed.load("new").unwrap();
        assert!(t.is_contiguous());
        assert_eq!(values(&t), (shape.to_vec(), expected.to_vec()));
    };
    check(vec![], &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    check(
        vec![Transform::Transpose],
        &[3, 2],
        &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0],
    );
    check(
        vec![Transform::Slice {
            dim: 1,
            start: 1,
            len: 2,
        }],
        &[2, 2],
        &[1.0, 2.0, 4.0, 5.0],
    );
    check(
        vec![Transform::Reshape(vec![3, 2])],
        &[3, 2],
        &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    );
    let steps = vec![
        Transform::Slice {
            dim: 0,
            start: 1,
            len: 1,
        },
        Transform::Reshape(vec![3]),
    ];
    check(steps, &[3], &[3.0, 4.0, 5.0]);
    refused(table(vec![]).unwrap().load("m.a"), &["no tensor 'm.a'"]);
}

#[test]
fn steps_that_do_not_fit_are_refused_at_once() {
    let bad = |step: Transform, what: &str| {
        refused(table(vec![step]), &["'m.a'", "[2, 3]", "'new'", what]);
    };
    bad(
        Transform::Slice {
            dim: 2,
            start: 0,
            len: 1,
        },
        "no dimension 2",
    );
    bad(
        Transform::Slice {
            dim: 1,
            start: 2,
            len: 2,
        },
        "2 indices from 2",
    );
    bad(
        Transform::Slice {
            dim: 1,
            start: -1,
            len: 1,
        },
        "from -1",
    );
    bad(
        Transform::Slice {
            dim: 1,
            start: i64::MAX,
            len: 1,
        },
        "do not fit",
    );
    bad(Transform::Reshape(vec![7]), "number of elements");
    bad(Transform::Reshape(vec![-2, -3]), "number of elements");
    bad(Transform::Reshape(vec![i64::MAX, 4]), "number of elements");
    bad(Transform::UnpermuteRope { heads: 0 }, "0 heads");
    bad(
        Transform::UnpermuteRope { heads: 2 },
        "2 heads of even size",
    );
    bad(Transform::UnpermuteRope { heads: i64::MAX }, "heads");
    let transposed = Renamed::new(source(), |old, _| {
        vec![NewTensor {
            name: old.to_owned(),
            steps: vec![Transform::Transpose],
        }]
    });
    refused(transposed, &["'m.b'", "only a matrix"]);
}

#[test]
fn names_are_split_dropped_and_checked() {
    let split = Renamed::new(source(), |old, info| {
        if info.shape.len() == 2 {
            return Vec::new();
        }
        let half = |name: &str, start| NewTensor {
            name: format!("{old}.{name}"),
            steps: vec![Transform::Slice {
                dim: 0,
                start,
                len: 2,
            }],
        };
        vec![half("k", 0), half("v", 2)]
    })
    .unwrap();
    assert_eq!(split.names(), ["m.b.k", "m.b.v"]);
    assert_eq!(values(&split.load("m.b.v").unwrap()).1, [8.0, 9.0]);

    let clash = Renamed::new(source(), |_, _| vec![NewTensor::renamed("x")]);
    refused(clash, &["'m.a' and 'm.b' both become 'x'"]);
    let absent = [("x".to_owned(), ("y".to_owned(), Vec::new()))];
    refused(Renamed::from_table(source(), absent), &["no tensor 'y'"]);
}

#[test]
fn prefixes_are_stripped_through_a_box() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let header = r#"{"m.a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    std::fs::write(file.path(), safetensors(header, &[5])).unwrap();
    let boxed = open_with(file.path(), &Limits::default()).unwrap();
    let stripped = Renamed::strip_prefix(boxed, "m.").unwrap();
    assert_eq!(stripped.names(), ["a"]);
    assert_eq!(values(&stripped.load("a").unwrap()).1, [5.0]);
    assert_eq!(stripped.path(), file.path());
    refused(Renamed::strip_prefix(source(), "ema."), &["'ema.'"]);
}

/// Row `j d/2 + i` of a head moves to `2i + j`, by index.
fn permuted_row(row: i64, heads: i64, rows: i64) -> i64 {
    let dim = rows / heads;
    let (head, at) = (row / dim, row % dim);
    let (j, i) = (at / (dim / 2), at % (dim / 2));
    head * dim + 2 * i + j
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn unpermuting_undoes_the_permutation(heads in 1i64..5, half in 1i64..9, columns in 1i64..4) {
        let rows = heads * 2 * half;
        let original =
            Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)).reshape([rows, columns]);
        // Converted row by row from the definition.
        let mut order = vec![0i64; rows as usize];
        for row in 0..rows {
            order[permuted_row(row, heads, rows) as usize] = row;
        }
        let converted = original.index_select(0, &Tensor::from_slice(&order));
        let bytes: Vec<u8> = Vec::<f32>::try_from(converted.reshape([-1]))
            .unwrap()
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let header = format!(
            r#"{{"q":{{"dtype":"F32","shape":[{rows},{columns}],"data_offsets":[0,{}]}}}}"#,
            bytes.len()
        );
        let source =
            Safetensors::from_bytes(safetensors(&header, &bytes), "m", &Limits::default()).unwrap();
        let table = [("q".to_owned(), ("q".to_owned(), vec![Transform::UnpermuteRope { heads }]))];
        let restored = Renamed::from_table(source, table).unwrap().load("q").unwrap();
        prop_assert!(restored.equal(&original));
    }
}

#[test]
fn rotations_are_permuted_there_and_back() {
    let header = r#"{"q":{"dtype":"U8","shape":[8,1],"data_offsets":[0,8]}}"#;
    let source = || {
        let file = safetensors(header, &(0..8).collect::<Vec<u8>>());
        Safetensors::from_bytes(file, "m", &Limits::default()).unwrap()
    };
    let one = |steps: Vec<Transform>| {
        let renamed = Renamed::from_table(source(), [("q".to_owned(), ("q".to_owned(), steps))]);
        values(&renamed.unwrap().load("q").unwrap()).1
    };
    // Two heads of four channels: pairs (0, 2), (1, 3) become neighbours.
    let there = Transform::PermuteRope { heads: 2 };
    assert_eq!(
        one(vec![there.clone()]),
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    );
    let back = Transform::UnpermuteRope { heads: 2 };
    assert_eq!(
        one(vec![there, back]),
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    );
}
