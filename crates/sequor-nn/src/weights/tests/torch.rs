//! The checkpoint reader: pickles made by PyTorch, and pickles that must be
//! refused.

use tch::Kind;
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use super::fixtures::{archive, archive_with, checkpoint, limited, pickle, refused, values};
use crate::error::{Error, Result};
use crate::weights::{Limits, SourceDtype, TensorSource, TorchCheckpoint};

fn parse(file: Vec<u8>) -> Result<TorchCheckpoint> {
    TorchCheckpoint::from_bytes(file, "m.pt", &Limits::default())
}

/// A checkpoint of one pickled value and storages.
fn pickled(value: &[u8], storages: &[&[u8]]) -> Result<TorchCheckpoint> {
    parse(checkpoint(&pickle::program(value), storages))
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `data.pkl` of PyTorch 2.11 for `w = arange(6.).reshape(2, 3)` and
/// `{"w": w.t(), "row": w[1], "h": tensor([1., -2.]).bfloat16()}`.
const VIEWS: &[u8] = b"\x80\x02}q\x00(X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x03K\x02\x86q\x08K\x01K\x03\x86q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rX\x03\x00\x00\x00rowq\x0eh\x02((h\x03h\x04h\x05h\x06K\x06tq\x0fQK\x03K\x03\x85q\x10K\x01\x85q\x11\x89h\n)Rq\x12tq\x13Rq\x14X\x01\x00\x00\x00hq\x15h\x02((h\x03ctorch\nBFloat16Storage\nq\x16X\x01\x00\x00\x001q\x17h\x06K\x02tq\x18QK\x00K\x02\x85q\x19K\x01\x85q\x1a\x89h\n)Rq\x1btq\x1cRq\x1du.";

/// The same for `{"state_dict": Linear(2, 1).state_dict(), "epoch": 3}`.
const WRAPPED: &[u8] = b"\x80\x02}q\x00(X\n\x00\x00\x00state_dictq\x01ccollections\nOrderedDict\nq\x02)Rq\x03(X\x06\x00\x00\x00weightq\x04ctorch._utils\n_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\nFloatStorage\nq\x07X\x01\x00\x00\x000q\x08X\x03\x00\x00\x00cpuq\tK\x02tq\nQK\x00K\x01K\x02\x86q\x0bK\x02K\x01\x86q\x0c\x89h\x02)Rq\rtq\x0eRq\x0fX\x04\x00\x00\x00biasq\x10h\x05((h\x06h\x07X\x01\x00\x00\x001q\x11h\tK\x01tq\x12QK\x00K\x01\x85q\x13K\x01\x85q\x14\x89h\x02)Rq\x15tq\x16Rq\x17u}q\x18X\t\x00\x00\x00_metadataq\x19h\x02)Rq\x1aX\x00\x00\x00\x00q\x1b}q\x1cX\x07\x00\x00\x00versionq\x1dK\x01sssbX\x05\x00\x00\x00epochq\x1eK\x03u.";

/// The same for `{"u": arange(3).to(uint16)}`.
const UNSIGNED: &[u8] = b"\x80\x02}q\x00X\x01\x00\x00\x00uq\x01ctorch._utils\n_rebuild_tensor_v3\nq\x02((X\x07\x00\x00\x00storageq\x03ctorch.storage\nUntypedStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x03\x85q\x08K\x01\x85q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0bctorch\nuint16\nq\x0ctq\rRq\x0es.";

/// The same for `nn.Parameter(torch.ones(2))`.
const PARAMETER: &[u8] = b"\x80\x02ctorch._utils\n_rebuild_parameter\nq\x00ctorch._utils\n_rebuild_tensor_v2\nq\x01((X\x07\x00\x00\x00storageq\x02ctorch\nFloatStorage\nq\x03X\x01\x00\x00\x000q\x04X\x03\x00\x00\x00cpuq\x05K\x02tq\x06QK\x00K\x02\x85q\x07K\x01\x85q\x08\x89ccollections\nOrderedDict\nq\t)Rq\ntq\x0bRq\x0c\x88h\t)Rq\r\x87q\x0eRq\x0f.";

#[test]
fn views_become_tensors_of_their_own() {
    let six = f32s(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let source = parse(checkpoint(VIEWS, &[&six, &[0x80, 0x3F, 0, 0xC0]])).unwrap();
    assert_eq!(source.names(), ["h", "row", "w"]);
    let w = source.load("w").unwrap();
    assert_eq!(values(&w), (vec![3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0]));
    assert!(w.is_contiguous());
    assert_eq!(
        values(&source.load("row").unwrap()),
        (vec![3], vec![3.0, 4.0, 5.0])
    );
    let h = source.load("h").unwrap();
    assert_eq!((h.kind(), values(&h).1), (Kind::BFloat16, vec![1.0, -2.0]));
    assert_eq!(source.info("row").unwrap().bytes, 12);
    refused(source.load("x"), &["m.pt", "no tensor 'x'"]);
}

#[test]
fn a_single_wrapper_is_taken_off() {
    let file = checkpoint(WRAPPED, &[&f32s(&[1.0, 2.0]), &f32s(&[3.0])]);
    let source = parse(file).unwrap();
    assert_eq!(source.names(), ["bias", "weight"]);
    assert_eq!(
        values(&source.load("weight").unwrap()),
        (vec![1, 2], vec![1.0, 2.0])
    );
    assert_eq!(source.metadata()["epoch"], "3");

    let one = f32s(&[1.0]);
    let names = |value: Vec<u8>| pickled(&value, &[&one]).unwrap().names();
    let w = || pickle::floats("0", 1);
    let inner = || pickle::dict(&[("w", w())]);
    for wrapper in ["state_dict", "model_state_dict", "model"] {
        assert_eq!(names(pickle::dict(&[(wrapper, inner())])), ["w"]);
    }
    // Another key, a second bearer of tensors, a tensor itself, a dotted key.
    assert_eq!(names(pickle::dict(&[("net", inner())])), ["net.w"]);
    assert_eq!(
        names(pickle::dict(&[("model", inner()), ("ema", inner())])),
        ["ema.w", "model.w"]
    );
    assert_eq!(names(pickle::dict(&[("model", w())])), ["model"]);
    assert_eq!(names(pickle::dict(&[("model.w", w())])), ["model.w"]);
    assert_eq!(names(pickle::list(&[w(), inner()])), ["0", "1.w"]);
}

#[test]
fn a_bare_parameter_is_called_tensor() {
    let source = parse(checkpoint(PARAMETER, &[&f32s(&[1.0, 1.0])])).unwrap();
    assert_eq!(source.names(), ["tensor"]);
    assert_eq!(values(&source.load("tensor").unwrap()).1, [1.0, 1.0]);
}

#[test]
fn dtypes_without_a_counterpart_are_refused_when_loaded() {
    let source = parse(checkpoint(UNSIGNED, &[&[0, 0, 1, 0, 2, 0]])).unwrap();
    assert_eq!(
        source.info("u").unwrap().dtype,
        SourceDtype::Other("uint16".into())
    );
    refused(source.load("u"), &["m.pt", "tensor 'u'", "uint16"]);
}

#[test]
fn every_storage_class_is_read() {
    let cases: [(&str, Kind, Vec<u8>); 10] = [
        ("DoubleStorage", Kind::Double, 1f64.to_le_bytes().to_vec()),
        ("FloatStorage", Kind::Float, 1f32.to_le_bytes().to_vec()),
        ("HalfStorage", Kind::Half, vec![0, 0x3C]),
        ("BFloat16Storage", Kind::BFloat16, vec![0x80, 0x3F]),
        ("LongStorage", Kind::Int64, 1i64.to_le_bytes().to_vec()),
        ("IntStorage", Kind::Int, 1i32.to_le_bytes().to_vec()),
        ("ShortStorage", Kind::Int16, vec![1, 0]),
        ("CharStorage", Kind::Int8, vec![1]),
        ("ByteStorage", Kind::Uint8, vec![1]),
        ("BoolStorage", Kind::Bool, vec![1]),
    ];
    for (class, kind, bytes) in cases {
        let value = pickle::tensor(pickle::storage(class, "0", 1), 0, &[], &[]);
        let t = pickled(&value, &[&bytes]).unwrap().load("tensor").unwrap();
        assert_eq!(
            (t.kind(), values(&t)),
            (kind, (vec![], vec![1.0])),
            "{class}"
        );
    }
}

#[test]
fn views_are_checked_against_their_storage() {
    let four = f32s(&[1.0, 2.0, 3.0, 4.0]);
    let view = |offset: i64, shape: &[i64], strides: &[i64]| {
        let value = pickle::tensor(
            pickle::storage("FloatStorage", "0", 4),
            offset,
            shape,
            strides,
        );
        pickled(&value, &[&four]).and_then(|c| c.load("tensor"))
    };
    assert_eq!(values(&view(1, &[2], &[2]).unwrap()).1, [2.0, 4.0]);
    assert_eq!(
        values(&view(2, &[2, 3], &[1, 0]).unwrap()).1,
        [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]
    );
    assert_eq!(
        values(&view(0, &[3, 2], &[1, 1]).unwrap()).1,
        [1.0, 2.0, 2.0, 3.0, 3.0, 4.0]
    );
    assert_eq!(view(9, &[0, 5], &[5, 1]).unwrap().size(), [0, 5]);
    for (offset, shape, strides) in [
        (0, &[5][..], &[1][..]),
        (1, &[4], &[1]),
        (4, &[1], &[1]),
        (0, &[2], &[4]),
        (i64::MAX, &[1], &[1]),
        (0, &[2, 2], &[i64::MAX, i64::MAX]),
    ] {
        refused(
            view(offset, shape, strides),
            &["m.pt", "tensor 'tensor'", "beyond", "storage '0'"],
        );
    }
    refused(view(0, &[i64::MAX, 4], &[0, 0]), &["overflows"]);
    refused(view(0, &[2], &[1, 1]), &["1 dimensions but 2 strides"]);
    refused(view(-1, &[1], &[1]), &["the size -1"]);
    refused(view(0, &[1], &[-1]), &["the size -1"]);
    refused(view(0, &[1; 65], &[1; 65]), &["at most 64"]);
    // A repeated element may not grow without bound.
    limited(view(0, &[1 << 40], &[0]));

    let claims = |len: i64| {
        let storage = pickle::storage("FloatStorage", "0", len);
        pickled(&pickle::tensor(storage, 0, &[1], &[1]), &[&four])
    };
    assert!(claims(3).is_ok());
    refused(claims(5), &["storage '0'", "claims 5 elements", "16 bytes"]);
    refused(claims(i64::MAX), &["claims"]);
    refused(claims(-1), &["the size -1"]);
    refused(
        pickled(&pickle::floats("1", 4), &[&four]),
        &["lacks the member 'data/1'"],
    );
    refused(
        pickled(&pickle::floats("../0", 4), &[&four]),
        &["lacks the member"],
    );
}

/// Asserts that a pickle is refused as unsupported, naming `what`.
#[track_caller]
fn unsupported(value: &[u8], what: &str) {
    match pickled(value, &[]) {
        Err(Error::Unsupported(text)) => assert!(text.contains(what), "'{what}' not in: {text}"),
        other => panic!("expected a refusal of {what}, got {other:?}"),
    }
}

#[test]
fn nothing_but_the_listed_globals_is_understood() {
    let bomb = pickle::call(pickle::global("posix", "system"), &[pickle::text("true")]);
    unsupported(&pickle::dict(&[("w", bomb)]), "posix.system");
    for (module, name) in [
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("torch", "load"),
        ("torch", "Storage"),
        ("torch.nn.modules.linear", "Linear"),
        ("argparse", "Namespace"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("numpy.core.multiarray", "_reconstruct"),
    ] {
        unsupported(&pickle::global(module, name), &format!("{module}.{name}"));
    }
    // By way of the stack, and with the module's attribute path.
    unsupported(
        &[pickle::text("os"), pickle::text("system"), vec![0x93]].concat(),
        "os.system",
    );
    unsupported(
        &[
            pickle::text("collections"),
            pickle::text("OrderedDict.__init__"),
            vec![0x93],
        ]
        .concat(),
        "collections.OrderedDict.__init__",
    );
    // Known names that are not functions cannot be called.
    unsupported(
        &pickle::call(pickle::global("torch", "float32"), &[]),
        "call",
    );
    unsupported(&pickle::call(pickle::text("os.system"), &[]), "call");
    // A class of its own instead of a tensor's.
    let typed = pickle::call(
        pickle::global("torch._tensor", "_rebuild_from_type_v2"),
        &[
            pickle::global("torch._utils", "_rebuild_tensor_v2"),
            pickle::global("collections", "OrderedDict"),
            pickle::tuple(&[]),
            b"}".to_vec(),
        ],
    );
    unsupported(&typed, "foreign class");
}

#[test]
fn other_opcodes_are_refused_by_name() {
    for (opcode, name) in [
        (b'i', "INST"),
        (b'o', "OBJ"),
        (0x81, "NEWOBJ"),
        (0x92, "NEWOBJ_EX"),
        (0x82, "EXT1"),
        (b'I', "INT"),
        (b'P', "PERSID"),
        (0x98, "READONLY_BUFFER"),
        (0xFF, "unknown"),
    ] {
        unsupported(&[opcode], &format!("({name}) at byte 2"));
    }
    let other = |program: &[u8]| parse(checkpoint(program, &[]));
    refused(other(b"(dp0\n."), &["protocol 0"]);
    refused(other(b"\x80\x06N."), &["protocol 6"]);
    refused(other(b""), &["protocol 0"]);
}

#[test]
fn broken_programs_are_refused() {
    for value in [
        &b""[..], // nothing on the stack at STOP
        b"0",     // POP of nothing
        b"t",     // no MARK
        b"(0",    // POP through a MARK
        b"K",     // the final dot is eaten as an argument
        b"X\xff\xff\xff\xff",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"X\x01\x00\x00\x00\xff",
        b"h\x07",         // unknown memo
        b"N(K\x01K\x01u", // items of None
        b"NNa",           // append to None
        b"}(Nu",          // half an item
        b"NR",
        b"NQ",
        b"Nb",
        b"ccollections\nOrderedDict\nNR",
        b"ccollections\nOrderedDict\n)R)R",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch._utils\n_rebuild_parameter\n)R",
        b"cno newline",
    ] {
        assert!(pickled(value, &[]).is_err(), "{value:?}");
    }
    refused(pickled(b"h\x07", &[]), &["m.pt", "no memo 7", "data.pkl"]);
}

#[test]
fn protocol_four_and_integers_of_all_sizes() {
    // A FRAME, short texts, MEMOIZE and STACK_GLOBAL, as protocols 4 and 5 use.
    let program = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94J\xfb\xff\xff\xff\
        \x8c\x01b\x94M\x00\x01\x8c\x01c\x94\x8a\x01\xff\x8c\x01d\x94\x8a\x00\x8c\x01e\x94\x88\
        \x8c\x01f\x94G?\xf8\x00\x00\x00\x00\x00\x00\x8c\x01g\x94\x8a\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\
        \x8c\x01h\x94C\x02zz\x8c\x01i\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94\
        \x8c\x01j\x94h\x01\x8c\x01k\x94Nu.";
    let source = parse(checkpoint(program, &[])).unwrap();
    let metadata: Vec<(&str, &str)> = source
        .metadata()
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    let expected = [
        ("a", "-5"),
        ("b", "256"),
        ("c", "-1"),
        ("d", "0"),
        ("e", "true"),
        ("f", "1.5"),
        ("j", "a"),
    ];
    assert_eq!(metadata, expected);
}

#[test]
fn containers_inside_themselves_and_repeated_ones_are_bounded() {
    // A list that contains itself.
    limited(pickled(b"]q\x00h\x00a", &[]));
    // Each list holds the one before ten times: 10^12 leaves in 400 bytes.
    let mut laughs = b"]q\x00(K\x01K\x01e".to_vec();
    for i in 1..=12u8 {
        laughs.extend([b']', b'q', i, b'(']);
        laughs.extend([b'h', i - 1].repeat(10));
        laughs.push(b'e');
    }
    limited(pickled(&laughs, &[]));
    // One long text under many names.
    let mut texts = pickle::text(&"x".repeat(4_000_000));
    texts.extend(b"q\x000](");
    texts.extend(b"h\x00".repeat(1000));
    texts.push(b'e');
    limited(pickled(&texts, &[]));
    // Deeper than any checkpoint.
    let deep = [b"]".repeat(100), b"a".repeat(99)].concat();
    limited(pickled(&deep, &[]));
    // A flood of references without values.
    let flood = [b"N".to_vec(), b"2".repeat(40_000_000)].concat();
    limited(pickled(&flood, &[]));
}

#[test]
fn names_that_clash_or_cannot_be_written_are_refused() {
    let one = f32s(&[1.0]);
    let w = || pickle::floats("0", 1);
    let clash = pickle::dict(&[("a.b", w()), ("a", pickle::dict(&[("b", w())]))]);
    refused(pickled(&clash, &[&one]), &["tensor 'a.b' occurs twice"]);
    refused(pickled(&pickle::dict(&[("a\0", w())]), &[&one]), &["NUL"]);
    limited(pickled(
        &pickle::dict(&[(&"a".repeat(65_536), w())]),
        &[&one],
    ));
    refused(pickled(b"}Nb}NNs", &[]), &["dict key"]);
}

#[test]
fn archives_that_are_no_checkpoints() {
    let program = pickle::program(b"}");
    refused(parse(archive(&[("a/x", b"1")])), &["m.pt", "data.pkl"]);
    refused(
        parse(archive(&[
            ("a/data.pkl", &program),
            ("b/data.pkl", &program),
        ])),
        &["data.pkl"],
    );
    refused(
        parse(archive(&[
            ("a/data.pkl", &program),
            ("a/constants.pkl", &program),
        ])),
        &["TorchScript", "state_dict"],
    );
    refused(
        parse(archive(&[
            ("a/data.pkl", &program),
            ("a/byteorder", b"big"),
        ])),
        &["not little-endian"],
    );
    assert!(parse(archive(&[("data.pkl", &program)])).is_ok());

    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let packed = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    zip.start_file("a/data.pkl", packed).unwrap();
    std::io::Write::write_all(&mut zip, &program).unwrap();
    refused(
        parse(zip.finish().unwrap().into_inner()),
        &["'data.pkl' is compressed", "zip method 8", "zip -0"],
    );

    let short = Limits {
        max_header_bytes: 3,
        ..Limits::default()
    };
    let file = checkpoint(&program, &[]);
    limited(TorchCheckpoint::from_bytes(file, "m.pt", &short));
    let few = Limits {
        max_tensors: 0,
        ..Limits::default()
    };
    let value = pickle::program(&pickle::list(&[pickle::floats("0", 1)]));
    let file = checkpoint(&value, &[&[0; 4]]);
    limited(TorchCheckpoint::from_bytes(file, "m.pt", &few));
    assert!(parse(checkpoint(&value, &[&[0; 4]])).is_ok());
}

#[test]
fn large_file_headers_are_understood() {
    let options = SimpleFileOptions::default().large_file(true);
    let value = pickle::program(&pickle::floats("0", 1));
    let file = archive_with(
        options,
        &[("m/data.pkl", &value), ("m/data/0", &f32s(&[2.0]))],
    );
    assert_eq!(
        values(&parse(file).unwrap().load("tensor").unwrap()).1,
        [2.0]
    );
}
