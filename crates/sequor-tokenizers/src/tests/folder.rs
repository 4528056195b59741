use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::{Error, Message, Tokenizer};

/// A folder with the byte vocabulary and the given files.
fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::bytes(&["<s>", "</s>", "<pad>", "<unk>"]).unwrap();
    tokenizer.save(dir.path().join("tokenizer.json")).unwrap();
    for (name, content) in files {
        let text = content
            .as_str()
            .map_or_else(|| content.to_string(), String::from);
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn read(files: &[(&str, Value)]) -> Tokenizer {
    Tokenizer::from_dir(folder(files).path()).unwrap()
}

#[test]
fn special_tokens_as_text_objects_and_from_the_map() {
    let config = json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
                        "model_max_length": 1e30, "added_tokens_decoder": {}});
    let map =
        json!({"eos_token": "<unk>", "pad_token": "<pad>", "unk_token": {"content": "<unk>"}});
    let t = read(&[
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", map),
    ]);
    assert_eq!(
        (t.bos(), t.eos(), t.pad(), t.unk()),
        (Some(256), Some(257), Some(258), Some(259))
    );
    let t = read(&[]);
    assert_eq!((t.bos(), t.eos(), t.chat_template()), (None, None, None));
}

#[test]
fn ends_that_the_config_overrides() {
    let ids = |config: Value| {
        read(&[("tokenizer_config.json", config)])
            .encode("a", true)
            .unwrap()
    };
    assert_eq!(ids(json!({"bos_token": "<s>", "eos_token": "</s>"})), [97]);
    assert_eq!(
        ids(json!({"bos_token": "<s>", "add_bos_token": true})),
        [256, 97]
    );
    let both = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true});
    assert_eq!(ids(both), [256, 97, 257]);

    // The other way round: tokenizer.json adds a token that the config forbids.
    let dir = tempfile::tempdir().unwrap();
    let vocab = crate::GgufVocab {
        add_bos: Some(true),
        ..super::byte_level_vocab()
    };
    Tokenizer::from_gguf_vocab(vocab)
        .unwrap()
        .save_dir(dir.path())
        .unwrap();
    assert_eq!(
        Tokenizer::from_dir(dir.path())
            .unwrap()
            .encode("in", true)
            .unwrap(),
        [266, 259]
    );
    let config = json!({"bos_token": "<|end|>", "add_bos_token": false}).to_string();
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(t.encode("in", true).unwrap(), [259]);
    assert_eq!(t.encode("<|end|>in", true).unwrap(), [266, 259]);
    assert_eq!(
        t.encode_batch(&["in", ""], true).unwrap(),
        [vec![259], vec![]]
    );
}

#[test]
fn chat_templates_of_all_kinds() {
    let render = |t: &Tokenizer| t.render_chat(&[Message::user("x")], false).unwrap();
    let one = (
        "tokenizer_config.json",
        json!({"chat_template": "one {{ messages[0].content }}"}),
    );
    assert_eq!(render(&read(std::slice::from_ref(&one))), "one x");
    let named = json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
    let t = read(&[("tokenizer_config.json", named.clone())]);
    assert_eq!(
        (
            render(&t).as_str(),
            t.chat_template_named("tool_use").unwrap().source()
        ),
        ("d", "t")
    );
    assert_eq!(
        render(&read(&[one, ("chat_template.jinja", json!("file"))])),
        "file"
    );

    // All of them survive saving.
    let t = read(&[
        ("tokenizer_config.json", named),
        ("chat_template.jinja", json!("file")),
    ]);
    let dir = tempfile::tempdir().unwrap();
    t.save_dir(dir.path()).unwrap();
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(
        (
            render(&t).as_str(),
            t.chat_template_named("tool_use").unwrap().source()
        ),
        ("file", "t")
    );
}

#[test]
fn a_broken_template_does_not_stop_the_model_from_loading() {
    let t = read(&[(
        "tokenizer_config.json",
        json!({"chat_template": "a\n{% if %}"}),
    )]);
    assert_eq!(t.encode("a", false).unwrap(), [97]);
    let error = t.render_chat(&[], true).unwrap_err();
    assert!(
        matches!(error, Error::Template { line: Some(2), .. }),
        "{error}"
    );
}

#[test]
fn named_tokens_become_special() {
    // In the vocabulary, but not among the added tokens.
    let json = json!({"version": "1.0", "decoder": {"type": "Fuse"},
                      "model": {"type": "BPE", "vocab": {"a": 0, "<": 1, "s": 2, ">": 3, "<s>": 4}, "merges": []}});
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"eos_token": "<s>"}"#,
    )
    .unwrap();
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(t.encode("a<s>", false).unwrap(), [0, 4]);
    assert_eq!(t.decode(&[0, 4], true).unwrap(), "a");
}

#[test]
fn errors_name_the_file_and_what_to_do() {
    let says = |result: crate::Result<Tokenizer>, parts: &[&str]| {
        let message = result.unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    };
    let missing = Path::new("no-such-folder");
    says(
        Tokenizer::from_dir(missing),
        &["no-such-folder", "tokenizer.json", "model folder"],
    );
    says(
        Tokenizer::from_file(missing),
        &["no-such-folder", "Hugging Face"],
    );

    let from = |files: &[(&str, Value)]| Tokenizer::from_dir(folder(files).path());
    says(
        from(&[("tokenizer_config.json", json!("{"))]),
        &["tokenizer_config.json", "line 1"],
    );
    says(
        from(&[("tokenizer_config.json", json!([1]))]),
        &["tokenizer_config.json"],
    );
    says(
        from(&[("tokenizer_config.json", json!(""))]),
        &["tokenizer_config.json"],
    );
    says(
        from(&[("special_tokens_map.json", json!({"eos_token": 7}))]),
        &["special_tokens_map.json"],
    );
    says(
        from(&[("tokenizer_config.json", json!({"eos_token": "<|end|>"}))]),
        &["eos_token", "<|end|>", "vocabulary"],
    );
    says(
        from(&[("tokenizer.json", json!(""))]),
        &["tokenizer.json", "damaged"],
    );

    let dir = folder(&[]);
    fs::write(dir.path().join("chat_template.jinja"), [0xff]).unwrap();
    says(
        Tokenizer::from_dir(dir.path()),
        &["chat_template.jinja", "UTF-8"],
    );
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
    says(Tokenizer::from_dir(dir.path()), &["tokenizer.json"]);
    says(
        Tokenizer::bytes(&[])
            .unwrap()
            .save(missing.join("a/b"))
            .map(|()| unreachable!()),
        &["no-such-folder"],
    );
}
