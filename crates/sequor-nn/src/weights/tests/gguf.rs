//! The GGUF reader: metadata, tensors, quantised blocks, tokenizer, names.

use half::f16;
use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::fixtures::{GgufWriter, limited, refused, values};
use crate::error::Result;
use crate::weights::{
    Gguf, GgufArray, GgufValue, Limits, SourceDtype, TensorSource, hugging_face_names,
};

fn parse(file: Vec<u8>) -> Result<Gguf> {
    Gguf::from_bytes(file, "m.gguf", &Limits::default())
}

fn array(element: u32, len: u64, content: &[u8]) -> Vec<u8> {
    [
        &element.to_le_bytes(),
        len.to_le_bytes().as_slice(),
        content,
    ]
    .concat()
}

#[test]
fn metadata_keeps_its_types() {
    let mut w = GgufWriter::new();
    w.entry("u8", 0, &[200])
        .entry("i8", 1, &[0xFF])
        .entry("u16", 2, &60_000u16.to_le_bytes())
        .entry("i16", 3, &(-5i16).to_le_bytes())
        .u32("u32", 7)
        .entry("i32", 5, &(-7i32).to_le_bytes())
        .entry("f32", 6, &1.5f32.to_le_bytes())
        .entry("bool", 7, &[1])
        .text("text", "né")
        .entry("u64", 10, &u64::MAX.to_le_bytes())
        .entry("i64", 11, &i64::MIN.to_le_bytes())
        .entry("f64", 12, &0.25f64.to_le_bytes())
        .entry("flags", 9, &array(7, 2, &[0, 1]))
        .entry("ids", 9, &array(5, 2, &[1, 0, 0, 0, 254, 255, 255, 255]))
        .entry("scores", 9, &array(6, 1, &0.5f32.to_le_bytes()))
        .texts("words", &["a", ""]);
    let g = parse(w.finish()).unwrap();

    let value = |key: &str| g.value(key).unwrap().clone();
    assert_eq!(value("u8"), GgufValue::U8(200));
    assert_eq!(value("i8"), GgufValue::I8(-1));
    assert_eq!(value("u16"), GgufValue::U16(60_000));
    assert_eq!(value("i16").as_i64(), Some(-5));
    assert_eq!(value("i16").as_u64(), None);
    assert_eq!(value("u32").as_u64(), Some(7));
    assert_eq!(value("i32").as_f64(), Some(-7.0));
    assert_eq!(value("f32").as_f64(), Some(1.5));
    assert_eq!(value("bool").as_bool(), Some(true));
    assert_eq!(value("text").as_str(), Some("né"));
    assert_eq!(value("u64").as_u64(), Some(u64::MAX));
    assert_eq!(value("u64").as_i64(), None);
    assert_eq!(value("i64"), GgufValue::I64(i64::MIN));
    assert_eq!(value("f64"), GgufValue::F64(0.25));
    assert_eq!(
        value("flags"),
        GgufValue::Array(GgufArray::Bool(vec![false, true]))
    );
    assert_eq!(
        value("ids").as_array().unwrap().to_i64s(),
        Some(vec![1, -2])
    );
    assert_eq!(
        value("scores").as_array().unwrap().as_f32s(),
        Some([0.5].as_slice())
    );
    assert_eq!(
        value("words").as_array().unwrap().as_strings().unwrap(),
        ["a", ""]
    );
    assert_eq!(g.metadata()["f32"], "1.5");
    assert!(!g.metadata().contains_key("words"), "arrays are not texts");
}

#[test]
fn plain_tensors_keep_their_dtype_and_torch_order() {
    let mut w = GgufWriter::new();
    w.f32s("f32", &[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        .tensor("f16", &[2], 1, &[0, 0x3E, 0, 0xC0])
        .tensor("bf16", &[1, 2], 30, &[0xC0, 0x3F, 0, 0xC0])
        .tensor("i8", &[2], 24, &[3, 252])
        .tensor("i16", &[1], 25, &[3, 0])
        .tensor("i32", &[1], 26, &[3, 0, 0, 0])
        .tensor("i64", &[1], 27, &[3, 0, 0, 0, 0, 0, 0, 0])
        .tensor("f64", &[1], 28, &1.5f64.to_le_bytes())
        .tensor("scalar", &[], 0, &2.5f32.to_le_bytes())
        .tensor("empty", &[0], 0, &[]);
    let g = parse(w.finish()).unwrap();
    let expect = |name: &str, kind: Kind, shape: &[i64], content: &[f64]| {
        let t = g.load(name).unwrap();
        assert_eq!(t.kind(), kind, "{name}");
        assert_eq!(values(&t), (shape.to_vec(), content.to_vec()), "{name}");
        assert_eq!(g.info(name).unwrap().shape, shape);
    };
    expect("f32", Kind::Float, &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    expect("f16", Kind::Half, &[2], &[1.5, -2.0]);
    expect("bf16", Kind::BFloat16, &[2, 1], &[1.5, -2.0]);
    expect("i8", Kind::Int8, &[2], &[3.0, -4.0]);
    expect("i16", Kind::Int16, &[1], &[3.0]);
    expect("i32", Kind::Int, &[1], &[3.0]);
    expect("i64", Kind::Int64, &[1], &[3.0]);
    expect("f64", Kind::Double, &[1], &[1.5]);
    expect("scalar", Kind::Float, &[], &[2.5]);
    expect("empty", Kind::Float, &[0], &[]);
    assert_eq!(g.raw("i8").unwrap(), [3, 252]);
    refused(g.load("absent"), &["m.gguf", "no tensor 'absent'"]);
}

/// Number, block length, block bytes, positions of the half-precision scales.
const QUANTISED: [(SourceDtype, u32, usize, usize, &[usize]); 8] = [
    (SourceDtype::Q4_0, 2, 32, 18, &[0]),
    (SourceDtype::Q4_1, 3, 32, 20, &[0, 2]),
    (SourceDtype::Q5_0, 6, 32, 22, &[0]),
    (SourceDtype::Q5_1, 7, 32, 24, &[0, 2]),
    (SourceDtype::Q8_0, 8, 32, 34, &[0]),
    (SourceDtype::Q4K, 12, 256, 144, &[0, 2]),
    (SourceDtype::Q5K, 13, 256, 176, &[0, 2]),
    (SourceDtype::Q6K, 14, 256, 210, &[208]),
];

fn quantised(number: u32, shape: &[u64], blocks: &[u8]) -> Gguf {
    let mut w = GgufWriter::new();
    w.tensor("w", shape, number, blocks);
    parse(w.finish()).unwrap()
}

/// FNV-1a of the little-endian bytes of `f32` values.
fn fingerprint(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[test]
fn quantised_blocks_agree_with_the_reference_bit_for_bit() {
    // Expected values by `gguf.quants.dequantize` of the Python package gguf
    // 0.19.0, for two blocks of the bytes 7k^2 + 31k + 11 with scales of 0.1 and
    // minima of -0.3: fingerprint of all elements, elements 0, 17, the last of
    // the first block and the sixth of the second.
    let golden: [(u64, [f32; 4]); 8] = [
        (
            0x5db0_bd5a_1a27_0ae1,
            [-0.299_926_76, 0.199_951_17, -0.799_804_7, 0.099_975_586],
        ),
        (
            0x6856_e8cb_5ea1_7c4a,
            [0.399_780_27, 0.199_829_1, -0.000_122_070_31, 0.999_633_8],
        ),
        (
            0x2bed_d206_0305_7574,
            [0.099_975_586, 0.299_926_76, -0.599_853_5, 0.099_975_586],
        ),
        (
            0xc82d_4659_3d4c_d171,
            [1.599_487_3, 0.199_829_1, 0.099_853_516, 0.199_829_1],
        ),
        (
            0x2f97_6a16_8d0b_b6f6,
            [10.097_534, 5.498_657, -4.698_852_5, -0.699_829_1],
        ),
        (
            0xf69a_079d_4918_db0f,
            [61.385_376, 6.398_803_7, 12.000_977, 34.797_73],
        ),
        (
            0xcbf5_599e_b939_a9e3,
            [149.363_89, 94.377_32, 12.600_83, 20.397_339],
        ),
        (
            0xb61d_683d_46aa_0f89,
            [202.450_56, 22.494_507, -42.689_575, -288.829_47],
        ),
    ];
    for ((dtype, number, n, size, scales), (hash, samples)) in QUANTISED.into_iter().zip(golden) {
        let mut blocks: Vec<u8> = (0..2 * size)
            .map(|k| (7 * k * k + 31 * k + 11) as u8)
            .collect();
        for block in blocks.chunks_exact_mut(size) {
            for (&at, half) in scales.iter().zip([[0x66, 0x2E], [0xCD, 0xB4]]) {
                block[at..at + 2].copy_from_slice(&half);
            }
        }
        let g = quantised(number, &[n as u64, 2], &blocks);
        assert_eq!(g.info("w").unwrap().dtype, dtype);
        assert_eq!(g.info("w").unwrap().bytes, 2 * size as u64);
        let t = g.load("w").unwrap();
        assert_eq!((t.size(), t.kind()), (vec![2, n as i64], Kind::Float));
        let got = Vec::<f32>::try_from(t.reshape([-1])).unwrap();
        assert_eq!(
            [got[0], got[17], got[n - 1], got[n + 5]],
            samples,
            "{dtype}"
        );
        assert_eq!(fingerprint(&got), hash, "{dtype}");
    }
}

/// Element `i` of a block by a formula in its index, in double precision.
fn element(dtype: &SourceDtype, block: &[u8], i: usize) -> f64 {
    let half = |at: usize| f64::from(f16::from_le_bytes([block[at], block[at + 1]]));
    let bits = |byte: usize, shift: usize, n: u32| {
        f64::from((block[byte] >> shift) & ((1u16 << n) - 1) as u8)
    };
    // Nibble of a block of 32, and bit `i` of a run of bits.
    let nibble = |at: usize| bits(at + i % 16, 4 * (i / 16), 4);
    let bit = |at: usize| bits(at + i / 8, i % 8, 1);
    // The K types: sub-block, its six-bit scale and minimum, its nibble.
    let sub = i / 32;
    let six = |first: usize, last: usize| {
        if sub < 4 {
            bits(first + sub, 0, 6)
        } else {
            bits(8 + sub, last, 4) + 16.0 * bits(first + sub - 4, 6, 2)
        }
    };
    let k_nibble = |at: usize| bits(at + 32 * (i / 64) + i % 32, 4 * (sub % 2), 4);
    match dtype {
        SourceDtype::Q4_0 => half(0) * (nibble(2) - 8.0),
        SourceDtype::Q4_1 => half(0) * nibble(4) + half(2),
        SourceDtype::Q5_0 => half(0) * (nibble(6) + 16.0 * bit(2) - 16.0),
        SourceDtype::Q5_1 => half(0) * (nibble(8) + 16.0 * bit(4)) + half(2),
        SourceDtype::Q8_0 => half(0) * f64::from(block[2 + i] as i8),
        SourceDtype::Q4K => half(0) * six(4, 0) * k_nibble(16) - half(2) * six(8, 4),
        SourceDtype::Q5K => {
            let q = k_nibble(48) + 16.0 * bits(16 + i % 32, sub, 1);
            half(0) * six(4, 0) * q - half(2) * six(8, 4)
        }
        SourceDtype::Q6K => {
            let (part, run, at) = (i / 128, i % 128 / 32, i % 32);
            let low = bits(64 * part + 32 * (run % 2) + at, 4 * (run / 2), 4);
            let high = bits(128 + 32 * part + at, 2 * run, 2);
            let scale = f64::from(block[192 + i / 16] as i8);
            half(208) * scale * (low + 16.0 * high - 32.0)
        }
        _ => unreachable!(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn quantised_blocks_follow_their_formula(
        which in 0usize..8,
        noise in prop::collection::vec(any::<u8>(), 3 * 210),
        scales in prop::array::uniform2(-4.0f32..4.0),
    ) {
        let (dtype, number, n, size, at) = &QUANTISED[which];
        let mut blocks = noise[..3 * size].to_vec();
        for block in blocks.chunks_exact_mut(*size) {
            for (&at, &scale) in at.iter().zip(&scales) {
                block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
        }
        let (_, got) = values(&quantised(*number, &[*n as u64, 3], &blocks).load("w").unwrap());
        for (i, got) in got.iter().enumerate() {
            let block = &blocks[i / n * size..][..*size];
            let expected = element(dtype, block, i % n);
            let scale = 4.0 * 64.0 * 128.0;
            prop_assert!((got - expected).abs() <= scale * 1e-6, "{dtype} {i}: {got} {expected}");
        }
    }
}

#[test]
fn large_tensors_are_expanded_in_parts_by_several_threads() {
    // Enough for several threads and several chunks in each, and no multiple of
    // either: 33 rows of 8,224 elements, each row scaled by its number.
    let (rows, row_blocks) = (33usize, 257usize);
    let mut blocks = Vec::new();
    for row in 0..rows {
        for b in 0..row_blocks {
            blocks.extend(f16::from_f32(row as f32).to_le_bytes());
            blocks.extend((0..32).map(|i| ((b + i) % 128) as u8));
        }
    }
    let g = quantised(8, &[(row_blocks * 32) as u64, rows as u64], &blocks);
    let row = |r: usize| (0..row_blocks * 32).map(move |i| (r * ((i / 32 + i % 32) % 128)) as f32);
    let expected: Vec<f32> = (0..rows).flat_map(row).collect();
    let got = Vec::<f32>::try_from(g.load("w").unwrap().reshape([-1])).unwrap();
    assert!(got == expected);
}

#[test]
fn other_quantisations_are_refused_by_name_and_number() {
    let mut w = GgufWriter::new();
    w.info("w", &[256], 10, 0).info("x", &[32], 99, 0);
    let g = parse(w.finish()).unwrap();
    assert_eq!(
        g.info("w").unwrap().dtype.to_string(),
        "Q2_K (ggml type 10)"
    );
    refused(
        g.load("w"),
        &["m.gguf", "tensor 'w'", "Q2_K (ggml type 10)"],
    );
    refused(g.load("x"), &["tensor 'x'", "unknown (ggml type 99)"]);
}

#[test]
fn versions_and_byte_orders() {
    let with = |version: u32| {
        let mut w = GgufWriter::new();
        w.version = version;
        parse(w.f32s("w", &[1], &[1.0]).finish())
    };
    assert!(with(2).is_ok());
    refused(with(1), &["version 1", "convert"]);
    refused(with(4), &["version 4"]);
    refused(with(3u32.swap_bytes()), &["big-endian"]);
    refused(parse(b"GGML".to_vec()), &["not a GGUF file"]);
}

#[test]
fn alignment_is_respected_and_checked() {
    let with = |kind: u32, value: &[u8], alignment: usize| {
        let mut w = GgufWriter::new();
        w.alignment = alignment;
        w.entry("general.alignment", kind, value);
        w.f32s("a", &[1], &[1.0]).f32s("b", &[1], &[2.0]);
        parse(w.finish())
    };
    let g = with(4, &64u32.to_le_bytes(), 64).unwrap();
    assert_eq!(values(&g.load("b").unwrap()).1, [2.0]);
    assert!(with(4, &8u32.to_le_bytes(), 8).is_ok());
    for bad in [0u32, 3, 1 << 30] {
        refused(
            with(4, &bad.to_le_bytes(), 32),
            &["general.alignment", "power of two"],
        );
    }
    refused(
        with(8, &GgufWriter::string("x"), 32),
        &["general.alignment"],
    );
    // The data is where 32 says, the file claims 64.
    refused(with(4, &64u32.to_le_bytes(), 32), &["not a multiple of 64"]);
}

#[test]
fn tensor_tables_are_checked() {
    let with = |build: &dyn Fn(&mut GgufWriter)| {
        let mut w = GgufWriter::new();
        w.data = vec![0; 64];
        build(&mut w);
        parse(w.finish())
    };
    assert!(with(&|w| _ = w.info("a", &[8], 0, 0).info("b", &[8], 0, 32)).is_ok());
    refused(
        with(&|w| _ = w.info("a", &[8], 0, 4)),
        &["'a'", "not a multiple of 32"],
    );
    refused(
        with(&|w| _ = w.info("a", &[17], 0, 0)),
        &["'a'", "68 bytes", "beyond", "truncated"],
    );
    refused(
        with(&|w| _ = w.info("a", &[1], 0, 1 << 63)),
        &["'a'", "beyond"],
    );
    refused(
        with(&|w| _ = w.info("a", &[1], 0, u64::MAX - 31)),
        &["'a'", "beyond"],
    );
    refused(
        with(&|w| _ = w.info("a", &[9], 0, 0).info("b", &[8], 0, 32)),
        &["'a' and 'b' overlap"],
    );
    refused(
        with(&|w| _ = w.info("a", &[1], 0, 0).info("a", &[1], 0, 32)),
        &["'a' occurs twice"],
    );
    refused(
        with(&|w| _ = w.info("a", &[1 << 62, 4], 0, 0)),
        &["'a'", "overflows"],
    );
    refused(
        with(&|w| _ = w.info("a", &[1 << 62, 1], 28, 0)),
        &["'a'", "overflows"],
    );
    refused(
        with(&|w| _ = w.info("a", &[u64::MAX], 0, 0)),
        &["'a'", "63 bits"],
    );
    refused(
        with(&|w| _ = w.info("a", &[1; 5], 0, 0)),
        &["'a'", "5 dimensions"],
    );
    refused(
        with(&|w| _ = w.info("a", &[48], 2, 0)),
        &["'a'", "48", "whole blocks of 32"],
    );
    refused(with(&|w| _ = w.info("a\0b", &[1], 0, 0)), &["NUL"]);
}

#[test]
fn lying_counts_and_lengths_are_refused() {
    let with = |build: &dyn Fn(&mut GgufWriter)| {
        let mut w = GgufWriter::new();
        build(&mut w);
        parse(w.finish())
    };
    let huge = 1u64 << 63;
    limited(with(&|w| w.tensors = huge));
    limited(with(&|w| w.entries = huge));
    refused(with(&|w| w.tensors = 1_000_000), &["truncated"]);
    refused(with(&|w| w.entries = 65_536), &["truncated"]);
    limited(with(&|w| _ = w.entry("k", 8, &huge.to_le_bytes())));
    limited(with(&|w| _ = w.entry("k", 9, &array(0, huge, &[]))));
    refused(
        with(&|w| _ = w.entry("k", 9, &array(0, 16_000_000, &[]))),
        &["'k'", "truncated"],
    );
    refused(
        with(&|w| _ = w.entry("k", 9, &array(8, 16_000_000, &[]))),
        &["'k'"],
    );
    refused(
        with(&|w| _ = w.entry("k", 9, &array(9, 1, &[]))),
        &["'k'", "array of arrays"],
    );
    refused(
        with(&|w| _ = w.entry("k", 9, &array(13, 0, &[]))),
        &["'k'", "element type 13"],
    );
    refused(
        with(&|w| _ = w.entry("k", 13, &[])),
        &["'k'", "value type 13"],
    );
    refused(
        with(&|w| _ = w.entry("k", 7, &[2])),
        &["'k'", "2 is not a truth value"],
    );
    refused(
        with(&|w| _ = w.entry("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 255])),
        &["'k'", "UTF-8"],
    );
    refused(
        with(&|w| _ = w.u32("k", 1).u32("k", 2)),
        &["'k' occurs twice"],
    );

    let limits = Limits {
        max_header_bytes: 100,
        ..Limits::default()
    };
    let mut w = GgufWriter::new();
    w.text("k", &"x".repeat(200));
    limited(Gguf::from_bytes(w.finish(), "m.gguf", &limits));
}

fn vocabulary() -> GgufWriter {
    let mut w = GgufWriter::new();
    w.text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &["<s>", "a", "b"])
        .texts("tokenizer.ggml.merges", &["a b"])
        .entry(
            "tokenizer.ggml.token_type",
            9,
            &array(5, 3, &[3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]),
        )
        .u32("tokenizer.ggml.bos_token_id", 0)
        .entry("tokenizer.ggml.add_bos_token", 7, &[0])
        .text("tokenizer.chat_template", "{{ x }}");
    w
}

#[test]
fn the_tokenizer_is_handed_over() {
    let fields = parse(vocabulary().finish())
        .unwrap()
        .vocab_fields()
        .unwrap()
        .unwrap();
    assert_eq!(
        (fields.model.as_str(), fields.pre.as_deref()),
        ("gpt2", Some("smollm"))
    );
    assert_eq!(fields.tokens, ["<s>", "a", "b"]);
    assert_eq!(fields.merges, ["a b"]);
    assert_eq!(fields.token_types, Some(vec![3, 1, 1]));
    assert_eq!(
        (fields.bos, fields.eos, fields.scores),
        (Some(0), None, None)
    );
    assert_eq!((fields.add_bos, fields.add_eos), (Some(false), None));
    assert_eq!(fields.chat_template.as_deref(), Some("{{ x }}"));
    assert_eq!(
        parse(GgufWriter::new().finish())
            .unwrap()
            .vocab_fields()
            .unwrap(),
        None
    );

    let bad = |build: &dyn Fn(&mut GgufWriter)| {
        let mut w = vocabulary();
        build(&mut w);
        parse(w.finish()).unwrap().vocab_fields()
    };
    refused(
        bad(&|w| _ = w.u32("tokenizer.ggml.eos_token_id", 3)),
        &["m.gguf", "tokenizer.ggml.eos_token_id is 3", "below 3"],
    );
    refused(
        bad(&|w| _ = w.entry("tokenizer.ggml.scores", 9, &array(6, 1, &[0; 4]))),
        &["tokenizer.ggml.scores", "3 floats"],
    );
    refused(
        bad(&|w| _ = w.u32("tokenizer.ggml.add_eos_token", 1)),
        &["add_eos_token", "true"],
    );
}

/// What the conversion to GGUF does to Q and K: `view(heads, 2, d/2, in)`, then
/// the middle dimensions swapped.
fn permute(t: &Tensor, heads: i64) -> Tensor {
    let size = t.size();
    let half = size[0] / heads / 2;
    let mut split = vec![heads, 2, half];
    split.extend(&size[1..]);
    t.reshape(split).transpose(1, 2).reshape(size)
}

/// A model of 4 query heads and 2 key heads of 6 channels each, and its Q.
fn small_model(architecture: &str) -> (Gguf, Tensor, Tensor) {
    let rows = |n: i64| Tensor::arange(n * 5, (Kind::Float, tch::Device::Cpu)).reshape([n, 5]);
    let (q, k) = (rows(24), rows(12));
    let flat = |t: &Tensor| Vec::<f32>::try_from(t.reshape([-1])).unwrap();
    let mut w = GgufWriter::new();
    w.text("general.architecture", architecture)
        .u32(&format!("{architecture}.attention.head_count"), 4)
        .u32(&format!("{architecture}.attention.head_count_kv"), 2)
        .f32s("token_embd.weight", &[1], &[1.0])
        .f32s("output_norm.weight", &[1], &[2.0])
        .f32s("blk.3.attn_q.weight", &[5, 24], &flat(&permute(&q, 4)))
        .f32s("blk.3.attn_k.weight", &[5, 12], &flat(&permute(&k, 2)))
        .f32s(
            "blk.3.attn_q.bias",
            &[24],
            &flat(&permute(&q.select(1, 0), 4)),
        )
        .f32s("blk.3.ffn_down.weight", &[1], &[3.0])
        .f32s("rope_freqs.weight", &[1], &[4.0]);
    (parse(w.finish()).unwrap(), q, k)
}

#[test]
fn llama_files_look_like_hugging_face_checkpoints() {
    let (gguf, q, k) = small_model("llama");
    let source = hugging_face_names(gguf).unwrap();
    assert_eq!(
        source.names(),
        [
            "model.embed_tokens.weight",
            "model.layers.3.mlp.down_proj.weight",
            "model.layers.3.self_attn.k_proj.weight",
            "model.layers.3.self_attn.q_proj.bias",
            "model.layers.3.self_attn.q_proj.weight",
            "model.norm.weight",
            "rope_freqs.weight",
        ]
    );
    let load = |name: &str| {
        source
            .load(&format!("model.layers.3.self_attn.{name}"))
            .unwrap()
    };
    assert!(load("q_proj.weight").equal(&q));
    assert!(load("k_proj.weight").equal(&k));
    assert!(load("q_proj.bias").equal(&q.select(1, 0)));
    assert_eq!(source.inner().architecture().unwrap(), "llama");
    assert_eq!(
        source
            .inner()
            .model_value("attention.head_count")
            .unwrap()
            .as_u64(),
        Some(4)
    );
}

#[test]
fn qwen_files_are_not_permuted() {
    let (gguf, q, _) = small_model("qwen2");
    let source = hugging_face_names(gguf).unwrap();
    let got = source
        .load("model.layers.3.self_attn.q_proj.weight")
        .unwrap();
    assert!(got.equal(&permute(&q, 4)));
}

#[test]
fn unknown_architectures_are_refused() {
    refused(
        hugging_face_names(small_model("gemma").0),
        &["m.gguf", "'gemma'", "llama"],
    );
    let none = parse(GgufWriter::new().finish()).unwrap();
    refused(
        hugging_face_names(none),
        &["general.architecture is missing"],
    );
    let mut w = GgufWriter::new();
    w.text("general.architecture", "llama");
    refused(
        hugging_face_names(parse(w.finish()).unwrap()),
        &["head_count", "missing"],
    );
    w.u32("llama.attention.head_count", 0)
        .f32s("blk.0.attn_q.weight", &[1, 2], &[1.0, 2.0]);
    refused(
        hugging_face_names(parse(w.finish()).unwrap()),
        &["blk.0.attn_q.weight", "0 heads"],
    );
}
