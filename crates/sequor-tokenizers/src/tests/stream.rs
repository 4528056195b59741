use super::{Random, byte_level_vocab, sentence_piece_vocab, word_piece};
use crate::{DecodeStream, GgufVocab, Tokenizer};

/// The pieces of a stream, joined. Checks that none is empty.
fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.decode_stream(skip_special);
    let mut text = String::new();
    for &id in ids {
        if let Some(piece) = stream.push(id).unwrap() {
            assert!(!piece.is_empty());
            text.push_str(&piece);
        }
    }
    text + &stream.finish().unwrap()
}

fn vocabularies() -> Vec<Tokenizer> {
    let bare = GgufVocab {
        add_space_prefix: Some(false),
        ..sentence_piece_vocab()
    };
    vec![
        Tokenizer::bytes(&["<eos>"]).unwrap(),
        Tokenizer::from_gguf_vocab(byte_level_vocab()).unwrap(),
        Tokenizer::from_gguf_vocab(sentence_piece_vocab()).unwrap(),
        Tokenizer::from_gguf_vocab(bare).unwrap(),
    ]
}

#[test]
fn pieces_join_to_the_whole_for_texts() {
    let mut random = Random(2);
    for _ in 0..500 {
        let text = random.text(20);
        for tokenizer in vocabularies() {
            let ids = tokenizer.encode(&text, false).unwrap();
            assert_eq!(
                streamed(&tokenizer, &ids, false),
                tokenizer.decode(&ids, false).unwrap()
            );
        }
    }
}

#[test]
fn pieces_join_to_the_whole_for_any_ids() {
    let mut random = Random(3);
    for tokenizer in vocabularies() {
        for _ in 0..500 {
            let length = random.below(40);
            let ids: Vec<u32> = (0..length)
                .map(|_| u32::try_from(random.below(tokenizer.vocab_size())).unwrap())
                .collect();
            for skip in [false, true] {
                assert_eq!(
                    streamed(&tokenizer, &ids, skip),
                    tokenizer.decode(&ids, skip).unwrap(),
                    "{ids:?}"
                );
            }
        }
    }
}

#[test]
fn our_decoding_is_the_engine_s_for_valid_text() {
    let mut random = Random(4);
    for tokenizer in vocabularies() {
        for _ in 0..200 {
            let ids = tokenizer.encode(&random.text(20), false).unwrap();
            assert_eq!(
                tokenizer.decode(&ids, false).unwrap(),
                tokenizer.decode_opaque(&ids, false).unwrap()
            );
        }
    }
}

#[test]
fn characters_are_held_back_until_whole() {
    let tokenizer = Tokenizer::bytes(&[]).unwrap();
    let mut stream = tokenizer.decode_stream(false);
    let pieces: Vec<Option<String>> = "a😀é"
        .bytes()
        .map(|b| stream.push(b.into()).unwrap())
        .collect();
    let whole = |s: &str| Some(s.to_owned());
    assert_eq!(
        pieces,
        [whole("a"), None, None, None, whole("😀"), None, whole("é")]
    );
    assert_eq!(stream.finish().unwrap(), "");

    // A character that is never finished, and one that cannot be.
    assert_eq!(stream.push(0xf0).unwrap(), None);
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    assert_eq!(stream.push(0xff).unwrap().as_deref(), Some("\u{fffd}"));
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn a_wrong_id_leaves_the_stream_as_it_was() {
    let tokenizer = Tokenizer::bytes(&[]).unwrap();
    let mut stream = DecodeStream::owned(tokenizer, false);
    assert_eq!(stream.push(0xc3).unwrap(), None);
    assert!(stream.push(256).is_err());
    assert_eq!(stream.push(0xa9).unwrap().as_deref(), Some("é"));
}

#[test]
fn the_leading_space_of_sentence_piece() {
    let tokenizer = Tokenizer::from_gguf_vocab(sentence_piece_vocab()).unwrap();
    let the = tokenizer.token_to_id("\u{2581}the").unwrap();
    let mut stream = tokenizer.decode_stream(true);
    assert_eq!(stream.push(1).unwrap(), None);
    assert_eq!(stream.push(the).unwrap().as_deref(), Some("the"));
    assert_eq!(stream.push(the).unwrap().as_deref(), Some(" the"));
    stream.finish().unwrap();
    assert_eq!(stream.push(the).unwrap().as_deref(), Some("the"));
}

#[test]
fn decoders_that_look_at_neighbours() {
    let tokenizer = word_piece();
    let ids = tokenizer.encode("unable to!", false).unwrap();
    assert_eq!(ids, [2, 3, 4, 5]);
    let mut stream = tokenizer.decode_stream(true);
    let pieces: Vec<_> = ids
        .iter()
        .filter_map(|&id| stream.push(id).unwrap())
        .collect();
    assert_eq!(pieces, ["un", "able", " to", "!"]);
    assert_eq!(tokenizer.token_bytes(2), None);

    let mut random = Random(5);
    for _ in 0..500 {
        let length = random.below(20);
        let ids: Vec<u32> = (0..length)
            .map(|_| u32::try_from(random.below(8)).unwrap())
            .collect();
        for skip in [false, true] {
            assert_eq!(
                streamed(&tokenizer, &ids, skip),
                tokenizer.decode(&ids, skip).unwrap(),
                "{ids:?}"
            );
        }
    }
    assert!(stream.push(8).is_err());
}

#[test]
fn long_streams_take_linear_time() {
    for tokenizer in [Tokenizer::bytes(&[]).unwrap(), word_piece()] {
        let mut stream = tokenizer.decode_stream(false);
        for n in 0..100_000 {
            // Byte 6 never ends a character; token 6 of the other is U+FFFD.
            stream.push(if n % 2 == 0 { 6 } else { 4 }).unwrap();
        }
    }
}
