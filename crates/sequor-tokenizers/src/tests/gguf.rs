use super::{byte_level_vocab, sentence_piece_vocab};
use crate::{Error, GgufVocab, Message, Tokenizer};

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    ids
}

#[test]
fn byte_level_ids() {
    let tokenizer = Tokenizer::from_gguf_vocab(byte_level_vocab()).unwrap();
    assert_eq!(
        ids(&tokenizer, "the  thin 123"),
        [116, 257, 32, 256, 104, 259, 32, 261]
    );
    assert_eq!(ids(&tokenizer, "<|end|>[user] the"), [266, 267, 258]);
    assert_eq!(ids(&tokenizer, "😀"), [263, 152, 128]);
    assert!(ids(&tokenizer, "").is_empty());
    assert_eq!(
        (tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()),
        (268, Some(266), Some(266))
    );
    // Control tokens can be left out of the text; user-defined ones are text.
    assert_eq!(
        tokenizer.decode(&[266, 267, 258], true).unwrap(),
        "[user] the"
    );
    assert_eq!(
        (tokenizer.is_special(266), tokenizer.is_special(267)),
        (true, false)
    );
    assert_eq!(tokenizer.token_bytes(263), Some(vec![0xf0, 0x9f]));
    assert_eq!(
        (
            tokenizer.id_to_token(256).as_deref(),
            tokenizer.token_to_id("Ġt")
        ),
        (Some("Ġt"), Some(256))
    );
}

#[test]
fn digits_and_unknown_splits() {
    let with_pre = |pre: Option<&str>| {
        let vocab = GgufVocab {
            pre: pre.map(String::from),
            ..byte_level_vocab()
        };
        ids(&Tokenizer::from_gguf_vocab(vocab).unwrap(), "the  thin 123")
    };
    assert_eq!(
        with_pre(Some("smollm")),
        [116, 257, 32, 256, 104, 259, 32, 49, 50, 51]
    );
    // Unknown and absent: as GPT-2.
    assert_eq!(with_pre(Some("some-later-model")), with_pre(None));
    assert_eq!(with_pre(None), [116, 257, 32, 256, 104, 259, 32, 261]);
}

#[test]
fn llama3_takes_whole_words_and_begins_with_bos() {
    // "the" is a token without merges that lead to it.
    let mut vocab = GgufVocab {
        pre: Some("llama-bpe".to_owned()),
        ..byte_level_vocab()
    };
    vocab.tokens.push("the".to_owned());
    vocab.token_types.as_mut().unwrap().push(1);
    let tokenizer = Tokenizer::from_gguf_vocab(vocab.clone()).unwrap();
    assert_eq!(tokenizer.encode("the", true).unwrap(), [266, 268]);
    let vocab = GgufVocab { pre: None, ..vocab };
    let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
    assert_eq!(tokenizer.encode("the", true).unwrap(), [116, 257]);
}

#[test]
fn qwen2_composes_characters() {
    let vocab = GgufVocab {
        pre: Some("qwen2".to_owned()),
        ..byte_level_vocab()
    };
    let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
    assert_eq!(tokenizer.encode("e\u{301}", false).unwrap(), [0xc3, 0xa9]);
}

#[test]
fn ends_of_a_text() {
    let with = |add_bos, add_eos| {
        let vocab = GgufVocab {
            add_bos,
            add_eos,
            ..byte_level_vocab()
        };
        Tokenizer::from_gguf_vocab(vocab)
            .unwrap()
            .encode("in", true)
            .unwrap()
    };
    assert_eq!(with(None, None), [259]);
    assert_eq!(with(Some(true), None), [266, 259]);
    assert_eq!(with(Some(true), Some(true)), [266, 259, 266]);
    assert_eq!(with(Some(false), Some(true)), [259, 266]);
}

#[test]
fn sentence_piece_ids() {
    let tokenizer = Tokenizer::from_gguf_vocab(sentence_piece_vocab()).unwrap();
    let space = tokenizer.token_to_id("\u{2581}").unwrap();
    let id = |t: &str| tokenizer.token_to_id(t).unwrap();
    assert_eq!(
        ids(&tokenizer, "the in"),
        [id("\u{2581}the"), space, id("in")]
    );
    // Best score first: "ab" comes before "bc", and "abc" is made of "ab" + "c".
    assert_eq!(ids(&tokenizer, "abc"), [space, id("abc")]);
    // Bytes for what is not in the vocabulary.
    assert_eq!(ids(&tokenizer, "é"), [space, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(
        ids(&tokenizer, "  a"),
        [id("\u{2581}\u{2581}"), space, id("a")]
    );
    assert_eq!(tokenizer.encode("a", true).unwrap(), [1, space, id("a")]);
    assert!(ids(&tokenizer, "").is_empty());
    // Half a character, and one interrupted.
    assert_eq!(tokenizer.decode(&[3 + 0xc3], false).unwrap(), "\u{fffd}");
    assert_eq!(
        tokenizer
            .decode(&[3 + 0xc3, id("a"), 3 + 0xa9], false)
            .unwrap(),
        "\u{fffd}a\u{fffd}"
    );
}

#[test]
fn sentence_piece_without_the_leading_space() {
    let vocab = GgufVocab {
        add_space_prefix: Some(false),
        ..sentence_piece_vocab()
    };
    let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
    let id = |t: &str| tokenizer.token_to_id(t).unwrap();
    assert_eq!(ids(&tokenizer, "abc"), [id("abc")]);
    assert_eq!(ids(&tokenizer, " the"), [id("\u{2581}the")]);
}

#[test]
fn token_types_are_guessed_where_they_are_missing() {
    let stated = Tokenizer::from_gguf_vocab(sentence_piece_vocab()).unwrap();
    let vocab = GgufVocab {
        token_types: None,
        ..sentence_piece_vocab()
    };
    let guessed = Tokenizer::from_gguf_vocab(vocab).unwrap();
    for text in ["<s>the</s>", "abc é <unk>", "<0x41>"] {
        assert_eq!(
            stated.encode(text, true).unwrap(),
            guessed.encode(text, true).unwrap(),
            "{text}"
        );
    }
    assert!(guessed.is_special(1) && guessed.is_special(0));
}

#[test]
fn chat_template_of_the_file() {
    let template =
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let vocab = GgufVocab {
        chat_template: Some(template.to_owned()),
        ..byte_level_vocab()
    };
    let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
    let messages = [Message::user(" the")];
    assert_eq!(
        tokenizer.render_chat(&messages, true).unwrap(),
        "<|end|>[user] the"
    );
    assert_eq!(
        tokenizer.encode_chat(&messages, true).unwrap(),
        [266, 267, 258]
    );

    let plain = Tokenizer::from_gguf_vocab(byte_level_vocab()).unwrap();
    let error = plain.render_chat(&messages, true).unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn contradictions_are_named() {
    fn fails(change: impl FnOnce(&mut GgufVocab), base: GgufVocab) -> String {
        let mut vocab = base;
        change(&mut vocab);
        Tokenizer::from_gguf_vocab(vocab).unwrap_err().to_string()
    }
    let bpe = byte_level_vocab;
    let cases: Vec<(String, &str)> = vec![
        (fails(|v| v.model = "t5".into(), bpe()), "\"t5\""),
        (fails(|v| v.tokens.clear(), bpe()), "tokens is empty"),
        (
            fails(|v| v.tokens[3] = v.tokens[1].clone(), bpe()),
            "twice, as 1 and 3",
        ),
        (
            fails(|v| v.token_types.as_mut().unwrap().truncate(267), bpe()),
            "token_type has 267 entries for 268",
        ),
        (fails(|v| v.eos = Some(268), bpe()), "eos_token_id is 268"),
        (
            fails(|v| v.merges[4] = "12".into(), bpe()),
            "merges[4] is \"12\", not a pair",
        ),
        (
            fails(|v| v.merges[4] = "1 3".into(), bpe()),
            "\"13\" is not a token",
        ),
        (
            fails(|v| v.merges[4] = "1 xyz".into(), bpe()),
            "\"xyz\" is not a token",
        ),
        (fails(|v| v.scores = None, sentence_piece_vocab()), "scores"),
        (
            fails(|v| v.scores = Some(vec![0.0]), sentence_piece_vocab()),
            "scores has 1 entries",
        ),
    ];
    for (message, expected) in cases {
        assert!(
            message.contains(expected),
            "{message:?} does not say {expected:?}"
        );
    }
}

#[test]
fn strange_scores_and_long_tokens_are_survived() {
    let mut vocab = sentence_piece_vocab();
    let scores = vocab.scores.as_mut().unwrap();
    scores[260] = f32::NAN;
    scores[261] = f32::INFINITY;
    scores[262] = f32::NEG_INFINITY;
    vocab.tokens.push("a".repeat(200_000));
    scores.push(0.0);
    vocab.token_types.as_mut().unwrap().push(1);
    let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
    ids(&tokenizer, "the thin aaaaaaaaaa");
}

#[test]
fn ids_beyond_the_vocabulary_are_errors() {
    let tokenizer = Tokenizer::from_gguf_vocab(byte_level_vocab()).unwrap();
    for id in [268, 50_000, u32::MAX] {
        let error = tokenizer.decode(&[1, id], false).unwrap_err();
        assert!(matches!(error, Error::TokenId { id: wrong, vocab_size: 268 } if wrong == id));
        assert!(error.to_string().contains("268 tokens"), "{error}");
        assert!(tokenizer.decode_stream(false).push(id).is_err());
        assert_eq!(
            (tokenizer.token_bytes(id), tokenizer.id_to_token(id)),
            (None, None)
        );
    }
}

#[test]
fn a_byte_level_tokenizer_becomes_a_vocabulary_again() {
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let vocab = GgufVocab {
            pre: Some(pre.to_owned()),
            add_bos: Some(true),
            add_eos: Some(false),
            ..byte_level_vocab()
        };
        let tokenizer = Tokenizer::from_gguf_vocab(vocab.clone()).unwrap();
        let again = GgufVocab::from_tokenizer(&tokenizer).unwrap();
        assert_eq!(again.pre.as_deref(), Some(pre));
        assert_eq!(
            (&again.tokens, &again.merges),
            (&vocab.tokens, &vocab.merges)
        );
        assert_eq!(
            (again.bos, again.eos, again.add_bos),
            (vocab.bos, vocab.eos, Some(true))
        );
        let second = Tokenizer::from_gguf_vocab(again).unwrap();
        for text in [
            "the  thin 123",
            "<|end|>[user] the",
            "\u{1f600}\n\n It's",
            "",
        ] {
            assert_eq!(ids(&second, text), ids(&tokenizer, text), "{pre}: {text:?}");
            assert_eq!(
                second.encode(text, true).unwrap(),
                tokenizer.encode(text, true).unwrap()
            );
        }
    }
    let pieces = Tokenizer::from_gguf_vocab(sentence_piece_vocab()).unwrap();
    let refused = GgufVocab::from_tokenizer(&pieces).unwrap_err();
    assert!(refused.to_string().contains("safetensors"), "{refused}");
}
