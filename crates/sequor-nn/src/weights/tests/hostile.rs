//! Damaged files of every format: an error or a correct load, never a panic,
//! and no more memory than the file can justify.

use proptest::prelude::*;

use super::fixtures::{GgufWriter, checkpoint, pickle, safetensors};
use crate::weights::{Limits, TensorSource, from_bytes};

/// Quantised blocks grow most, from 18 bytes to 128.
const GROWTH: u64 = 8;
const EXPANDED: u64 = 1 << 16;

/// Opens a file and loads all of it; returns whether that succeeded.
fn exercise(file: &[u8]) -> bool {
    let limits = Limits {
        max_expanded_bytes: EXPANDED,
        ..Limits::default()
    };
    let Ok(source) = from_bytes(file.to_vec(), "m", &limits) else {
        return false;
    };
    let mut whole = true;
    for name in source.names() {
        let info = source.info(&name).unwrap();
        match source.load(&name) {
            Ok(t) => {
                assert_eq!(t.size(), info.shape);
                assert_eq!(Some(t.kind()), info.dtype.kind());
                let bytes = (t.numel() * t.kind().elt_size_in_bytes()) as u64;
                assert!(
                    bytes <= (GROWTH * file.len() as u64).max(EXPANDED),
                    "{bytes} bytes"
                );
            }
            Err(_) => whole = false,
        }
    }
    if let Ok(gguf) = crate::weights::Gguf::from_bytes(file.to_vec(), "m", &limits) {
        let _ = gguf.vocab_fields();
        let _ = crate::weights::hugging_face_names(gguf);
    }
    whole
}

fn small_safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},
        "c":{"dtype":"BOOL","shape":[],"data_offsets":[32,33]},
        "d":{"dtype":"I64","shape":[0],"data_offsets":[33,33]}}"#;
    safetensors(header, &[7; 33])
}

fn small_gguf() -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.text("general.architecture", "llama")
        .u32("llama.attention.head_count", 2)
        .u32("general.alignment", 32)
        .text("tokenizer.ggml.model", "gpt2")
        .texts("tokenizer.ggml.tokens", &["<s>", "a"])
        .u32("tokenizer.ggml.bos_token_id", 0)
        .f32s("blk.0.attn_q.weight", &[1, 4], &[1.0, 2.0, 3.0, 4.0])
        .tensor("q4", &[32, 2], 2, &[9; 36])
        .tensor("q6", &[256], 14, &[9; 210])
        .tensor("h", &[3], 1, &[9; 6]);
    w.finish()
}

fn small_checkpoint() -> Vec<u8> {
    let view = pickle::tensor(pickle::storage("HalfStorage", "1", 6), 1, &[2, 2], &[1, 2]);
    let value = pickle::dict(&[
        (
            "model",
            pickle::dict(&[("a", pickle::floats("0", 3)), ("b", view)]),
        ),
        ("epoch", pickle::int(3)),
        (
            "betas",
            pickle::list(&[pickle::text("x"), b"G?\xf8\0\0\0\0\0\0".to_vec()]),
        ),
    ]);
    checkpoint(&pickle::program(&value), &[&[1; 12], &[2; 12]])
}

fn small_files() -> [Vec<u8>; 3] {
    [small_safetensors(), small_gguf(), small_checkpoint()]
}

#[test]
fn every_prefix_is_an_error() {
    for file in small_files() {
        assert!(exercise(&file));
        for n in 0..file.len() {
            assert!(
                !exercise(&file[..n]),
                "{n} of {} bytes were accepted",
                file.len()
            );
        }
    }
}

#[test]
fn every_changed_byte_is_an_error_or_a_load() {
    for file in small_files() {
        assert!(file.len() < 4096);
        for at in 0..file.len() {
            for change in [0xFF, 0x80, 0x20, 0x01] {
                let mut changed = file.clone();
                changed[at] ^= change;
                exercise(&changed);
            }
        }
    }
}

#[test]
fn extreme_numbers_everywhere_are_an_error_or_a_load() {
    for file in small_files() {
        for at in 0..file.len() - 8 {
            for extreme in [
                u64::MAX,
                1 << 63,
                i64::MAX as u64,
                1 << 32,
                u64::from(u32::MAX),
                0,
            ] {
                let mut changed = file.clone();
                changed[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
                exercise(&changed);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn many_changes_at_once(
        which in 0usize..3,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..16),
    ) {
        let mut file = small_files()[which].clone();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        exercise(&file);
    }

    #[test]
    fn pieces_moved_and_repeated(
        which in 0usize..3,
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        len in 1usize..64,
    ) {
        let file = small_files()[which].clone();
        let (from, to) = (from.index(file.len()), to.index(file.len()));
        let piece = file[from..(from + len).min(file.len())].to_vec();
        let mut changed = file;
        changed.splice(to..to, piece);
        exercise(&changed);
    }

    #[test]
    fn any_bytes_after_a_good_start(which in 0usize..3, tail in prop::collection::vec(any::<u8>(), 0..512)) {
        let start: &[u8] = [&b"GGUF\x03\0\0\0"[..], b"\x40\0\0\0\0\0\0\0{\"w\":", b"PK\x03\x04"][which];
        exercise(&[start, &tail].concat());
    }

    #[test]
    fn any_pickle(program in prop::collection::vec(any::<u8>(), 0..256)) {
        exercise(&checkpoint(&pickle::program(&program), &[&[0; 16]]));
    }

    /// Opcodes and arguments that mean something, in any order.
    #[test]
    fn any_meaningful_pickle(words in prop::collection::vec(0usize..24, 0..64)) {
        let words: Vec<u8> = words.iter().flat_map(|&w| word(w)).collect();
        exercise(&checkpoint(&pickle::program(&words), &[&[0; 16]]));
    }

    #[test]
    fn any_directory(
        entries in prop::collection::vec(
            ("[a-c]{1,2}", "F32|BF16|U8|F8_E5M2", prop::collection::vec(0u64..5, 0..4), 0u64..40, 0u64..40),
            0..4,
        ),
    ) {
        let entries: Vec<String> = entries
            .iter()
            .map(|(name, dtype, shape, a, b)| {
                format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{a},{b}]}}"#)
            })
            .collect();
        exercise(&safetensors(&format!("{{{}}}", entries.join(",")), &[0; 24]));
    }
}

fn word(which: usize) -> Vec<u8> {
    match which {
        0 => pickle::floats("0", 4),
        1 => pickle::storage("ByteStorage", "0", 16),
        2 => pickle::global("torch._utils", "_rebuild_tensor_v2"),
        3 => pickle::global("torch._utils", "_rebuild_parameter"),
        4 => pickle::global("collections", "OrderedDict"),
        5 => pickle::global("torch", "FloatStorage"),
        6 => pickle::text("storage"),
        7 => pickle::ints(&[2, 2]),
        8 => b"q\x00".to_vec(),
        9 => b"h\x00".to_vec(),
        10 => pickle::global("torch._tensor", "_rebuild_from_type_v2"),
        11 => pickle::global("torch", "Tensor"),
        12 => pickle::int(1),
        n => vec![b"(tR}]usae)bQ"[n - 13]],
    }
}
