use super::Random;
use crate::{BpeOptions, Error, Split, Tokenizer, train_bpe};

fn corpus() -> Vec<String> {
    let words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "naïve",
        "日本語",
        "12",
        "!",
    ];
    let mut random = Random(6);
    (0..400)
        .map(|_| {
            (0..12)
                .map(|_| words[random.below(words.len())])
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect()
}

fn trained(options: &BpeOptions) -> Tokenizer {
    train_bpe(corpus().into_iter(), options).unwrap()
}

#[test]
fn the_most_frequent_pairs_come_first() {
    // aab aab ab: "ab" occurs three times, then "a" + "ab" twice.
    let texts = ["aab", "aab", "ab"].map(String::from);
    let options = BpeOptions {
        vocab_size: 300,
        ..BpeOptions::default()
    };
    let tokenizer = train_bpe(texts.into_iter(), &options).unwrap();
    assert_eq!(tokenizer.vocab_size(), 259);
    assert_eq!(tokenizer.token_to_id("<|endoftext|>"), Some(0));
    assert_eq!(
        (tokenizer.token_to_id("ab"), tokenizer.token_to_id("aab")),
        (Some(257), Some(258))
    );
    assert_eq!(tokenizer.encode("aab", true).unwrap(), [258]);
    assert_eq!(tokenizer.eos(), Some(0));
}

#[test]
fn training_repeats_exactly_and_ignores_the_order_of_texts() {
    let options = BpeOptions {
        vocab_size: 320,
        ..BpeOptions::default()
    };
    let first = trained(&options).to_json_bytes().unwrap();
    for _ in 0..3 {
        assert_eq!(trained(&options).to_json_bytes().unwrap(), first);
    }
    let reversed = train_bpe(corpus().into_iter().rev(), &options).unwrap();
    assert_eq!(reversed.to_json_bytes().unwrap(), first);
}

#[test]
fn saved_and_read_back_it_is_the_same() {
    let options = BpeOptions {
        vocab_size: 330,
        special_tokens: ["<|bos|>", "<|eos|>"].map(String::from).to_vec(),
        bos_token: Some("<|bos|>".to_owned()),
        eos_token: Some("<|eos|>".to_owned()),
        ..BpeOptions::default()
    };
    let tokenizer = trained(&options);
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save_dir(dir.path()).unwrap();
    let read = Tokenizer::from_dir(dir.path()).unwrap();
    let alone = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(
        (read.bos(), read.eos(), read.vocab_size()),
        (Some(0), Some(1), tokenizer.vocab_size())
    );
    assert_eq!(
        read.to_json_bytes().unwrap(),
        tokenizer.to_json_bytes().unwrap()
    );
    let mut random = Random(7);
    for text in corpus()
        .into_iter()
        .take(50)
        .chain((0..100).map(|_| random.text(20)))
    {
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(read.encode(&text, false).unwrap(), ids);
        assert_eq!(alone.encode(&text, false).unwrap(), ids);
        assert_eq!(read.decode(&ids, false).unwrap(), text);
    }
    // Nothing is left behind by writing.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn every_split_can_be_trained() {
    for split in [Split::Gpt2, Split::SmolLm, Split::Llama3, Split::Qwen2] {
        let tokenizer = trained(&BpeOptions {
            vocab_size: 300,
            split,
            ..BpeOptions::default()
        });
        assert_eq!(tokenizer.vocab_size(), 300);
        let text = "the quick 日本語 12!";
        assert_eq!(
            tokenizer
                .decode(&tokenizer.encode(text, false).unwrap(), true)
                .unwrap(),
            text
        );
        let joined = tokenizer.token_to_id("12").is_some();
        assert_eq!(
            joined,
            matches!(split, Split::Gpt2 | Split::Llama3),
            "{split:?}"
        );
    }
}

#[test]
fn long_words_and_empty_texts() {
    let texts = ["z".repeat(2_000_000), String::new(), "é".repeat(1000)];
    let options = BpeOptions {
        vocab_size: 300,
        ..BpeOptions::default()
    };
    let tokenizer = train_bpe(texts.into_iter(), &options).unwrap();
    assert!(tokenizer.encode(&"z".repeat(1000), false).unwrap().len() < 100);
    let none = train_bpe(std::iter::empty(), &options).unwrap();
    assert_eq!(none.vocab_size(), 257);
}

#[test]
fn token_length_can_be_limited() {
    let tokenizer = trained(&BpeOptions {
        vocab_size: 320,
        max_token_length: Some(3),
        ..BpeOptions::default()
    });
    let longest = (1..tokenizer.vocab_size())
        .filter_map(|id| tokenizer.token_bytes(u32::try_from(id).unwrap()));
    assert_eq!(longest.map(|b| b.len()).max(), Some(3));
}

#[test]
fn options_are_checked_and_serialised() {
    let base = BpeOptions::default;
    for wrong in [
        BpeOptions {
            vocab_size: 256,
            ..base()
        },
        BpeOptions {
            vocab_size: usize::MAX,
            ..base()
        },
        BpeOptions {
            special_tokens: vec![String::new()],
            eos_token: None,
            ..base()
        },
        BpeOptions {
            special_tokens: vec!["a".into()],
            eos_token: None,
            ..base()
        },
        BpeOptions {
            special_tokens: vec!["<x>".into(), "<x>".into()],
            eos_token: None,
            ..base()
        },
        BpeOptions {
            bos_token: Some("<s>".into()),
            ..base()
        },
        BpeOptions {
            max_token_length: Some(1),
            ..base()
        },
    ] {
        assert!(
            matches!(
                train_bpe(corpus().into_iter(), &wrong),
                Err(Error::Config(_))
            ),
            "{wrong:?}"
        );
    }
    let json = serde_json::to_string(&base()).unwrap();
    assert_eq!(serde_json::from_str::<BpeOptions>(&json).unwrap(), base());
    let partial: BpeOptions =
        serde_json::from_str(r#"{"vocab_size": 999, "split": "llama3"}"#).unwrap();
    assert_eq!(
        partial,
        BpeOptions {
            vocab_size: 999,
            split: Split::Llama3,
            ..base()
        }
    );
    assert!(serde_json::from_str::<BpeOptions>(r#"{"vocabsize": 999}"#).is_err());
}
