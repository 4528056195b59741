//! Tests of the public interface on small vocabularies. Expected ids come from
//! independent implementations: Hugging Face's Python package, llama.cpp, and
//! for chat templates Jinja itself.

mod chat;
mod folder;
mod gguf;
mod hostile;
mod simple;
mod stream;
mod train;

use crate::pieces::char_of_byte;
use crate::{GgufVocab, Tokenizer};

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % n
    }

    /// A text with letters of many scripts, spaces, digits, and emoji of
    /// several code points.
    fn text(&mut self, parts: usize) -> String {
        const PARTS: [&str; 24] = [
            "a",
            "the",
            " ",
            "  ",
            "\n",
            "\t",
            "1",
            "42",
            "é",
            "e\u{301}",
            "ß",
            "Ж",
            "日本",
            "۳",
            "😀",
            "👍🏽",
            "👨\u{200d}👩\u{200d}👧",
            "🇫🇷",
            "\u{fffd}",
            "\u{2581}",
            "<0x41>",
            "'s",
            "\u{10ffff}",
            "\0",
        ];
        (0..self.below(parts + 1))
            .map(|_| PARTS[self.below(PARTS.len())])
            .collect()
    }
}

/// A small byte-level vocabulary: the bytes, ten merges, a control token and
/// a user-defined one.
fn byte_level_vocab() -> GgufVocab {
    let merges = [
        "Ġ t", "h e", "Ġt he", "i n", "1 2", "12 3", "Ġ a", "ð Ł", "c a", "Ġ Ġ",
    ];
    let mut tokens: Vec<String> = (0..=255).map(|b| char_of_byte(b).to_string()).collect();
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    tokens.extend(["<|end|>", "[user]"].map(String::from));
    let mut token_types = vec![1; 266];
    token_types.extend([3, 4]);
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        token_types: Some(token_types),
        merges: merges.map(String::from).to_vec(),
        bos: Some(266),
        eos: Some(266),
        ..GgufVocab::default()
    }
}

/// A small SentencePiece vocabulary with byte fallback.
fn sentence_piece_vocab() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    let pieces = [
        "\u{2581}t",
        "he",
        "\u{2581}the",
        "in",
        "\u{2581}\u{2581}",
        "ab",
        "bc",
        "abc",
        "\u{2581}",
        "t",
        "h",
        "e",
        "i",
        "n",
        "a",
        "b",
        "c",
    ];
    tokens.extend(pieces.map(String::from));
    let scores = (0..tokens.len())
        .map(|n| if n < 259 { 0.0 } else { 258.0 - n as f32 })
        .collect();
    let mut token_types = vec![2, 3, 3];
    token_types.extend([6; 256]);
    token_types.extend([1; 17]);
    GgufVocab {
        model: "llama".to_owned(),
        tokens,
        scores: Some(scores),
        token_types: Some(token_types),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..GgufVocab::default()
    }
}

/// A WordPiece tokenizer, whose decoder looks at neighbouring tokens.
fn word_piece() -> Tokenizer {
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "[SEP]", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100,
                  "vocab": {"[SEP]": 0, "[UNK]": 1, "un": 2, "##able": 3, "to": 4, "!": 5, "\u{fffd}": 6, "##s": 7}}
    });
    Tokenizer::from_json_bytes(json.to_string().as_bytes()).unwrap()
}

fn gguf_tokenizer() -> Tokenizer {
    Tokenizer::from_gguf_vocab(byte_level_vocab()).unwrap()
}
