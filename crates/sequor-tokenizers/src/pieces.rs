//! What each token adds to the text.
//!
//! In the two families that cover nearly all language models, byte-level BPE
//! and SentencePiece with byte fallback, a token *is* a run of bytes, and text
//! is the tokens' bytes decoded as UTF-8. Knowing this makes streaming exact.
//! Other decoders (WordPiece, CTC) look at neighbouring tokens and stay with
//! the engine.

use serde_json::Value;

/// How the decoder of a tokenizer turns tokens into bytes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Pieces {
    /// Each character of a token stands for one byte (GPT-2's table).
    ByteLevel,
    /// Pieces with replaced markers, `<0xNN>` byte tokens, and leading
    /// characters taken off the start of the text.
    Marked {
        /// Replacements in the order they are made.
        replace: Vec<(String, String)>,
        byte_fallback: bool,
        /// The character taken off, and how often at most.
        strip: Option<(u8, usize)>,
    },
    /// Only the engine knows.
    Opaque,
}

impl Pieces {
    /// Recognises the `decoder` of a `tokenizer.json`.
    pub fn from_decoder(decoder: &Value) -> Self {
        let Some(kind) = decoder.get("type").and_then(Value::as_str) else {
            return Self::Opaque;
        };
        if kind == "ByteLevel" {
            return Self::ByteLevel;
        }
        let single = [decoder.clone()];
        let parts = if kind == "Sequence" {
            decoder
                .get("decoders")
                .and_then(Value::as_array)
                .map(Vec::as_slice)
        } else {
            Some(single.as_slice())
        };
        parts.and_then(marked).unwrap_or(Self::Opaque)
    }

    /// The bytes of a token. `added` tokens are in the text as they stand.
    pub fn bytes(&self, token: &str, added: bool) -> Vec<u8> {
        match self {
            Self::ByteLevel if !added => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Marked {
                replace,
                byte_fallback,
                ..
            } => {
                let text = replace
                    .iter()
                    .fold(token.to_owned(), |t, (from, to)| t.replace(from, to));
                match byte_token(&text) {
                    Some(byte) if *byte_fallback => vec![byte],
                    _ => text.into_bytes(),
                }
            }
            Self::ByteLevel | Self::Opaque => token.as_bytes().to_vec(),
        }
    }

    /// The character taken off the start of the text, and how often at most.
    pub fn strip(&self) -> Option<(u8, usize)> {
        match self {
            Self::Marked { strip, .. } => *strip,
            _ => None,
        }
    }
}

/// `[Replace]* [ByteFallback] [Fuse [Strip]]`, the shape of SentencePiece decoders.
fn marked(parts: &[Value]) -> Option<Pieces> {
    let (mut replace, mut byte_fallback, mut fused, mut strip) = (Vec::new(), false, false, None);
    for part in parts {
        let text = |key: &str| part.get(key).and_then(Value::as_str);
        let number = |key: &str| part.get(key).and_then(Value::as_u64);
        match text("type")? {
            "Replace" if !byte_fallback && !fused => {
                let pattern = part.pointer("/pattern/String")?.as_str()?;
                (!pattern.is_empty()).then_some(())?;
                replace.push((pattern.to_owned(), text("content")?.to_owned()));
            }
            "ByteFallback" if !fused => byte_fallback = true,
            "Fuse" => fused = true,
            "Strip" if fused && strip.is_none() && number("stop")? == 0 => {
                match text("content")?.as_bytes() {
                    [byte] => strip = Some((*byte, usize::try_from(number("start")?).ok()?)),
                    _ => return None,
                }
            }
            _ => return None,
        }
    }
    (byte_fallback || fused).then_some(Pieces::Marked {
        replace,
        byte_fallback,
        strip,
    })
}

/// The byte that `<0xNN>` stands for.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The character that stands for a byte in byte-level vocabularies: itself
/// where it prints, otherwise one from 256 upwards (GPT-2's table).
pub(crate) fn char_of_byte(byte: u8) -> char {
    let code = u32::from(byte);
    let shifted = match byte {
        0..=0x20 => 256 + code,
        0x7f..=0xa0 => 256 + 33 + (code - 0x7f),
        0xad => 256 + 33 + 34,
        _ => code,
    };
    // All values are below 324, far from the surrogates.
    char::from_u32(shifted).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that a character of a byte-level vocabulary stands for.
fn byte_of_char(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 256..=288 => u8::try_from(code - 256).ok(),
        code @ 289..=322 => u8::try_from(code - 289 + 0x7f).ok(),
        323 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bytes_and_characters_are_one_to_one() {
        let all: std::collections::BTreeSet<char> = (0..=255).map(char_of_byte).collect();
        assert_eq!(all.len(), 256);
        for byte in 0..=255 {
            assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
        }
        // The two that everybody knows: space and line feed.
        assert_eq!((char_of_byte(b' '), char_of_byte(b'\n')), ('Ġ', 'Ċ'));
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for other in ["<0x+1>", "<0x0>", "<0x000>", "0x0A", "<0xGG>", "<0x0A", ""] {
            assert_eq!(byte_token(other), None, "{other}");
        }
    }

    #[test]
    fn decoders_are_recognised_or_left_to_the_engine() {
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let pieces = Pieces::from_decoder(&llama);
        assert_eq!(pieces.strip(), Some((b' ', 1)));
        assert_eq!(pieces.bytes("\u{2581}a", false), b" a");
        assert_eq!(pieces.bytes("<0xE2>", false), [0xe2]);

        assert_eq!(
            Pieces::from_decoder(&json!({"type": "ByteLevel"})),
            Pieces::ByteLevel
        );
        assert_eq!(Pieces::ByteLevel.bytes("Ġé", false), [b' ', 0xe9]);
        assert_eq!(Pieces::ByteLevel.bytes("é", true), "é".as_bytes());

        for other in [
            json!(null),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
            json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}),
            json!({"type": "Sequence", "decoders": []}),
        ] {
            assert_eq!(Pieces::from_decoder(&other), Pieces::Opaque, "{other}");
        }
    }
}
