use super::Random;
use crate::{Error, Tokenizer};

#[test]
fn handles_are_shared_between_threads() {
    fn check<T: Send + Sync + Clone + 'static>() {}
    check::<Tokenizer>();
    check::<crate::DecodeStream<'static>>();
    check::<crate::ChatTemplate>();
}

#[test]
fn bytes_are_their_own_ids() {
    let tokenizer = Tokenizer::bytes(&["<eos>", "<pad>"])
        .unwrap()
        .with_eos("<eos>")
        .unwrap();
    assert_eq!(
        tokenizer.encode("aé<pad>\n", false).unwrap(),
        [97, 0xc3, 0xa9, 257, 10]
    );
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos()), (258, Some(256)));
    let all: Vec<u32> = (0..256).collect();
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(
        tokenizer.decode(&all, false).unwrap(),
        String::from_utf8_lossy(&bytes)
    );
    assert_eq!(tokenizer.token_bytes(0xc3), Some(vec![0xc3]));
    assert_eq!(Tokenizer::bytes(&[]).unwrap().vocab_size(), 256);
}

#[test]
fn characters_of_a_text() {
    let tokenizer = Tokenizer::characters("hello wörld 😀", &["<eos>"]).unwrap();
    // <eos>, <unk>, then " dehlorwö😀" by code point.
    assert_eq!(tokenizer.encode("hö😀", false).unwrap(), [5, 10, 11]);
    assert_eq!(tokenizer.encode("xh?<eos>", false).unwrap(), [1, 5, 1, 0]);
    assert_eq!(tokenizer.vocab_size(), 12);
    assert_eq!(tokenizer.decode(&[5, 2, 11, 0], true).unwrap(), "h 😀");
}

#[test]
fn special_tokens_of_simple_vocabularies_are_checked() {
    for result in [
        Tokenizer::bytes(&[""]),
        Tokenizer::bytes(&["a"]),
        Tokenizer::bytes(&["<x>", "<x>"]),
        Tokenizer::characters("a", &["<unk>"]),
        Tokenizer::characters("a", &["a"]),
        Tokenizer::bytes(&[]).unwrap().with_eos("<eos>"),
    ] {
        assert!(matches!(result.unwrap_err(), Error::Config(_)));
    }
}

#[test]
fn any_text_survives_and_batches_agree() {
    let tokenizer = Tokenizer::bytes(&["<eos>"]).unwrap();
    let mut random = Random(1);
    let texts: Vec<String> = (0..200).map(|_| random.text(30)).collect();
    let refs: Vec<&str> = texts.iter().map(String::as_str).collect();
    let batch = tokenizer.encode_batch(&refs, true).unwrap();
    for (text, ids) in refs.iter().zip(&batch) {
        assert_eq!(ids, &tokenizer.encode(text, true).unwrap());
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), text);
    }
}

#[test]
fn long_monotonous_texts_do_not_hang() {
    let tokenizer = super::gguf_tokenizer();
    for unit in [" ", "z", "\n", "7", "'", "😀", "\u{301}"] {
        let text = unit.repeat(100_000 / unit.len());
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
}
