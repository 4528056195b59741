use std::panic::catch_unwind;

use serde_json::{Value, json};

use crate::{Error, Tokenizer};

/// A definition that uses many parts of the format and stays small.
fn sample() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 6, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"},
                       {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "_?[a-z]+"}, "behavior": "Isolated", "invert": false},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "_", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "?", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false, "ignore_merges": false,
                  "vocab": {"?": 0, "_": 1, "a": 2, "b": 3, "ab": 4, "_ab": 5}, "merges": [["a", "b"], ["_", "ab"]]}
    })
}

fn load(json: &Value) -> crate::Result<Tokenizer> {
    Tokenizer::from_json_bytes(json.to_string().as_bytes())
}

/// Uses whatever was loaded; only panics count.
fn exercise(tokenizer: &Tokenizer) {
    for text in ["", "ab ab", "é <s>?", "\0\u{10ffff} a"] {
        let ids = tokenizer.encode(text, true).unwrap_or_default();
        drop(tokenizer.decode(&ids, false));
        let mut stream = tokenizer.decode_stream(true);
        ids.iter().for_each(|&id| drop(stream.push(id)));
        drop(stream.finish());
    }
    drop(tokenizer.to_json_bytes());
}

#[test]
fn the_sample_itself_is_fine() {
    let t = load(&sample()).unwrap();
    assert_eq!(t.encode("ab ab", true).unwrap(), [6, 4, 5]);
    assert_eq!(t.decode(&[5, 5], false).unwrap(), "ab_ab");
    assert_eq!(t.encode("!?ab", false).unwrap(), [0, 0, 4]);
}

#[test]
fn every_beginning_of_a_file_is_an_error() {
    let json = sample().to_string();
    for end in 0..json.len() {
        let error = Tokenizer::from_json_bytes(&json.as_bytes()[..end]).unwrap_err();
        assert!(matches!(error, Error::Definition { .. }), "{end}: {error}");
    }
}

#[test]
fn no_flipped_bit_panics() {
    let json = sample().to_string().into_bytes();
    for at in 0..json.len() {
        for bit in 0..8 {
            let mut damaged = json.clone();
            damaged[at] ^= 1 << bit;
            let outcome =
                catch_unwind(|| Tokenizer::from_json_bytes(&damaged).map(|t| exercise(&t)));
            assert!(outcome.is_ok(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn no_exchanged_value_panics() {
    fn paths(value: &Value, at: &str, all: &mut Vec<String>) {
        all.push(at.to_owned());
        match value {
            Value::Object(map) => map
                .iter()
                .for_each(|(k, v)| paths(v, &format!("{at}/{k}"), all)),
            Value::Array(list) => list
                .iter()
                .enumerate()
                .for_each(|(n, v)| paths(v, &format!("{at}/{n}"), all)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    paths(&sample(), "", &mut all);
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(u64::MAX),
        json!(1e300),
        json!("x"),
        json!(""),
        json!([]),
        json!({}),
        json!(true),
        json!([["a", "b", "c"]]),
        json!({"type": "Strip", "content": "a", "start": 9, "stop": 9}),
        json!({"type": "FixedLength", "length": 0}),
        json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true}),
    ];
    for path in &all {
        for value in &values {
            let mut changed = sample();
            *changed.pointer_mut(path).unwrap() = value.clone();
            let outcome = catch_unwind(|| load(&changed).map(|t| exercise(&t)));
            assert!(outcome.is_ok(), "{path} = {value}");
        }
    }
}

/// The error that one change to the sample leads to.
fn error(path: &str, value: Value) -> String {
    let mut json = sample();
    *json.pointer_mut(path).unwrap() = value;
    match load(&json) {
        Err(error @ Error::Definition { .. }) => error.to_string(),
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn lies_are_named() {
    assert!(
        error("/model/vocab/b", json!(2)).contains("id 2 is given to two tokens, \"a\" and \"b\"")
    );
    assert!(error("/model/merges", json!([["a", "c"]])).contains('c'));
    assert!(error("/model/merges", json!(["a"])).contains("Merges"));
    assert!(error("/model/vocab", json!({})).contains("out of vocabulary"));
    assert!(error("/model/vocab/b", json!(1u64 << 24)).contains("not below 16777216"));
    assert!(error("/added_tokens/0/content", json!("a")).contains("claims the id 6"));
    assert!(error("/version", json!("9.9")).contains("9.9"));
    assert!(error("/model/type", json!("Neural")).contains("tokenizer.json"));
    let empty = json!({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}});
    assert!(
        load(&empty)
            .unwrap_err()
            .to_string()
            .contains("the vocabulary is empty")
    );
    let nested = "[".repeat(100_000);
    assert!(Tokenizer::from_json_bytes(nested.as_bytes()).is_err());
    assert!(
        Tokenizer::from_json_bytes(b"\xff\xfe{}")
            .unwrap_err()
            .to_string()
            .contains("UTF-8")
    );
    assert!(Tokenizer::from_json_bytes(b"").is_err());
}

#[test]
fn engine_panics_become_errors() {
    // A prefix longer than the merged token: the engine slices beyond its end.
    let mut json = sample();
    *json
        .pointer_mut("/model/continuing_subword_prefix")
        .unwrap() = json!("very long");
    assert!(load(&json).unwrap_err().to_string().contains("damaged"));
    // A decoder that takes more characters than there are.
    let mut json = sample();
    *json.pointer_mut("/decoder").unwrap() =
        json!({"type": "Strip", "content": "a", "start": 0, "stop": 2});
    let t = load(&json).unwrap();
    assert!(matches!(
        t.decode(&[2], false),
        Err(Error::Backend { op: "decode", .. })
    ));
    assert!(t.encode("ab", false).is_ok());
}

#[test]
fn text_cannot_be_blown_up() {
    let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let chain = json!({"type": "Sequence", "normalizers": vec![double.clone(); 60]});
    assert!(error("/normalizer", chain).contains("times as long"));
    let chain = json!({"type": "Sequence", "decoders": vec![double; 60]});
    assert!(error("/decoder", chain).contains("times as long"));
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let chain = json!({"type": "Sequence", "pretokenizers": vec![bytes; 60]});
    assert!(error("/pre_tokenizer", chain).contains("times as long"));
}

#[test]
fn padding_truncation_and_dropout_are_left_out() {
    let mut json = sample();
    json["padding"] = json!({"strategy": {"Fixed": 1_000_000_000_000_u64}, "direction": "Right",
                             "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "?"});
    json["truncation"] =
        json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
    json["model"]["dropout"] = json!(1.0);
    let t = load(&json).unwrap();
    assert_eq!(t.encode("ab ab", true).unwrap(), [6, 4, 5]);
}

#[test]
fn vocabularies_may_have_holes() {
    let mut json = sample();
    json["model"]["vocab"]["_ab"] = json!(40);
    // The engine alone would give the added token the id 6, the count of tokens.
    json["added_tokens"][0]["id"] = json!(50);
    json["post_processor"] = Value::Null;
    let t = load(&json).unwrap();
    assert_eq!(t.vocab_size(), 51);
    assert_eq!(t.encode("ab ab<s>", true).unwrap(), [4, 40, 50]);
    assert_eq!(t.decode(&[4, 7, 40], false).unwrap(), "ab_ab");
    assert_eq!((t.id_to_token(7), t.token_bytes(7)), (None, None));
    let again = Tokenizer::from_json_bytes(&t.to_json_bytes().unwrap()).unwrap();
    assert_eq!(again.encode("ab ab<s>", true).unwrap(), [4, 40, 50]);
}
