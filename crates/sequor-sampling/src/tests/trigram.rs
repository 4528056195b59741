//! The table of trigrams: weights, files, and learning on the way.

use std::ops::ControlFlow;

use super::toy::Markov;
use crate::draft::{
    AdaptiveTrigram, Budget, DraftContext, Drafter, TreeSearch, Trigram, TrigramOptions,
    TrigramTable, Vocabulary,
};
use crate::tree::path_to;
use crate::{DepthPolicy, Error, GenerationConfig, Generator, Key, Options};

const VOCABULARY: Vocabulary = Vocabulary {
    size: 50,
    hash: [7; 32],
};

fn table() -> TrigramTable {
    let tokens = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 5, 6];
    TrigramTable::from_tokens(&tokens, VOCABULARY, 12).unwrap()
}

#[test]
fn counted_rows_sum_to_one() {
    let table = table();
    assert_eq!(table.after_pair(1, 2), [(3, 0.5), (4, 0.25), (5, 0.25)]);
    assert_eq!(table.after_pair(2, 3), [(1, 1.0)]);
    assert_eq!(table.after(2), [(3, 0.5), (4, 0.25), (5, 0.25)]);
    assert_eq!(table.after_pair(9, 9), []);
    assert_eq!(table.len(), 6);
    let short = TrigramTable::from_tokens(&[1, 2, 3, 1, 2, 4, 1, 2, 3], VOCABULARY, 1).unwrap();
    assert_eq!(short.after_pair(1, 2), [(3, 2.0 / 3.0)]);
    assert!(TrigramTable::from_tokens(&[1, 50], VOCABULARY, 1).is_err());
    assert!(
        TrigramTable::from_tokens(&[1], VOCABULARY, 1)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn learning_follows_the_closed_form() {
    let mut table = table();
    let known = table.after_pair(1, 2)[1];
    for k in 1..=120 {
        table.learn(&[1, 2, 4], 0.04, 3.0);
        table.learn(&[1, 2, 9], 0.04, 3.0);
        let weight = |t: u32| table.after_pair(1, 2).iter().find(|s| s.0 == t).unwrap().1;
        let expected = |w: f32| (w + 0.04 * k as f32).min(3.0);
        assert!((weight(4) - expected(known.1)).abs() < 1e-4);
        assert!((weight(9) - expected(0.0)).abs() < 1e-4);
        assert!(table.after_pair(1, 2).is_sorted_by(|a, b| a.1 >= b.1));
    }
    // A full row forgets what is lightest.
    for t in 0..200 {
        table.learn(&[8, 8, t % 50], 0.04, 3.0);
        table.learn(&[8, 8, 50 + t], 0.01, 3.0);
    }
    assert_eq!(table.after_pair(8, 8).len(), 64);
    table.truncate(12);
    assert_eq!(table.after_pair(8, 8).len(), 12);
}

fn context<'a>(tokens: &'a [u32], eos: &'a [u32]) -> DraftContext<'a> {
    DraftContext {
        tokens,
        prompt_len: tokens.len(),
        max_length: 1000,
        eos,
        key: Key::new(1, 2),
        features: None,
    }
}

fn adaptive(search: Option<TreeSearch>) -> Trigram {
    let options = TrigramOptions {
        search,
        ..TrigramOptions::default()
    };
    Trigram::new(options).unwrap()
}

#[test]
fn the_window_slides_over_the_sequence() {
    let mut drafter = adaptive(Some(TreeSearch::default()));
    let budget = Budget {
        depth: 5,
        nodes: 64,
    };
    let tokens: Vec<u32> = (0..40).collect();
    drafter
        .propose(&context(&tokens[..30], &[]), budget)
        .unwrap();
    // The whole prompt is read once.
    let weight = |d: &Trigram, t: u32| d.table().after_pair(t - 2, t - 1)[0].1;
    assert!((2..30).all(|t| (weight(&drafter, t) - 0.04).abs() < 1e-6));
    drafter
        .propose(&context(&tokens[..31], &[]), budget)
        .unwrap();
    // Tokens 15..31 again, the others not.
    assert!((2..17).all(|t| (weight(&drafter, t) - 0.04).abs() < 1e-6));
    assert!((17..30).all(|t| (weight(&drafter, t) - 0.08).abs() < 1e-6));
    assert!((weight(&drafter, 30) - 0.04).abs() < 1e-6);
    // Another sequence is read from its beginning; the table stays.
    drafter.propose(&context(&[7, 8, 9], &[]), budget).unwrap();
    assert!((weight(&drafter, 9) - 0.08).abs() < 1e-6);
}

#[test]
fn every_path_is_a_chain_of_known_trigrams() {
    let text: Vec<u32> = (0..3000_u32).map(|i| (i * i / 7 + i * 3) % 50).collect();
    let table = TrigramTable::from_tokens(&text, VOCABULARY, 12).unwrap();
    for search in [Some(TreeSearch::default()), None] {
        let options = TrigramOptions {
            adapt: None,
            search,
            ..TrigramOptions::default()
        };
        let mut drafter = Trigram::new(options).unwrap().with_table(table.clone());
        for at in 0..200 {
            let tokens = &text[at..at + 5];
            let (a, b) = (tokens[3], tokens[4]);
            let tree = drafter
                .propose(
                    &context(tokens, &[11]),
                    Budget {
                        depth: 5,
                        nodes: 40,
                    },
                )
                .unwrap();
            assert!(!tree.is_empty() && tree.len() <= 40);
            for node in 0..tree.len() {
                let (mut a, mut b) = (a, b);
                for n in path_to(tree.parents(), node) {
                    let token = tree.units()[n];
                    assert!(table.after_pair(a, b).iter().any(|s| s.0 == token));
                    (a, b) = (b, token);
                }
                assert!(tree.children(Some(node)).count() == 0 || tree.units()[node] != 11);
            }
        }
        assert_eq!(drafter.table().len(), table.len(), "it does not learn");
        // An unknown pair falls back on what follows the last token; one token is enough.
        let known = text[100];
        for tokens in [&[49, known][..], &[known]] {
            let tree = drafter
                .propose(
                    &context(tokens, &[]),
                    Budget {
                        depth: 5,
                        nodes: 40,
                    },
                )
                .unwrap();
            assert!(
                tree.children(None)
                    .all(|c| table.after(known).iter().any(|s| s.0 == tree.units()[c]))
            );
            assert!(!tree.is_empty());
        }
        assert!(
            drafter
                .propose(&context(&[], &[]), Budget::chain(4))
                .unwrap()
                .is_empty()
        );
    }
}

/// Tokens per call in the first and the last third of a session that starts empty.
#[test]
fn an_empty_table_learns_over_a_session() {
    let target = Markov::new(40, 2, 2.5, 1);
    let mut drafter = adaptive(Some(TreeSearch::default()));
    let mut rates = Vec::new();
    for request in 0..30 {
        let options = Options::from(GenerationConfig::sampling(0.7))
            .max_new_tokens(150)
            .request(request)
            .depth(DepthPolicy::Fixed(5))
            .draft_nodes(32);
        let generator = Generator::new(&target, options).unwrap();
        let out = generator
            .generate(&[request as u32, 3], Some(Box::new(&mut drafter)), |_| {
                ControlFlow::Continue(())
            })
            .unwrap();
        rates.push(out.report.tokens_per_call());
    }
    let mean = |rates: &[f64]| rates.iter().sum::<f64>() / rates.len() as f64;
    let (first, last) = (mean(&rates[..10]), mean(&rates[20..]));
    assert!(last > first * 1.1 && last > 1.5, "{first} to {last}");
}

#[test]
fn files_come_back_the_same() {
    let mut table = table();
    table.learn(&[3, 1, 2, 4, 8], 0.04, 3.0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.trigram");
    table.save(&path).unwrap();
    table.save(&path).unwrap();
    let back = TrigramTable::load(&path, &VOCABULARY).unwrap();
    let bytes = |t: &TrigramTable| {
        let mut out = Vec::new();
        t.write(&mut out).unwrap();
        out
    };
    assert_eq!(bytes(&back), bytes(&table));
    assert_eq!(back.after_pair(1, 2), table.after_pair(1, 2));
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing is left behind"
    );
    let refused = |result: crate::Result<TrigramTable>| match result {
        Err(e @ Error::File { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    };
    let other = Vocabulary {
        hash: [8; 32],
        ..VOCABULARY
    };
    assert!(refused(TrigramTable::load(&path, &other)).contains("another vocabulary"));
    assert!(refused(TrigramTable::load(folder.path().join("none"), &other)).contains("none"));
    assert!(table.save(folder.path().join("no/such/folder")).is_err());
}

#[test]
fn hostile_files_are_refused() {
    let mut good = Vec::new();
    table().write(&mut good).unwrap();
    assert!(TrigramTable::read(good.as_slice(), &VOCABULARY).is_ok());
    // Cut anywhere, or longer than it says.
    for end in 0..good.len() {
        assert!(
            TrigramTable::read(&good[..end], &VOCABULARY).is_err(),
            "{end}"
        );
    }
    let longer = [good.as_slice(), &[0]].concat();
    assert!(TrigramTable::read(longer.as_slice(), &VOCABULARY).is_err());
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        TrigramTable::read(bad.as_slice(), &VOCABULARY)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    // Header: magic 8, size 4, hash 32, two counts of 8; the first row is (1, 2) with three
    // successors.
    assert!(with(0, b"X").is_err());
    assert!(
        with(44, &u64::MAX.to_le_bytes())
            .unwrap_err()
            .contains("rows")
    );
    assert!(with(44, &5_u64.to_le_bytes()).is_err());
    assert!(
        with(60, &u64::MAX.to_le_bytes()).is_err(),
        "a key outside the vocabulary"
    );
    assert!(with(68, &0_u16.to_le_bytes()).unwrap_err().contains("row"));
    assert!(
        with(68, &u16::MAX.to_le_bytes())
            .unwrap_err()
            .contains("row")
    );
    assert!(
        with(70, &50_u32.to_le_bytes())
            .unwrap_err()
            .contains("vocabulary")
    );
    for weight in [f32::NAN, f32::INFINITY, 0.0, -1.0, 0.1] {
        assert!(with(74, &weight.to_le_bytes()).is_err(), "{weight}");
    }
    assert!(
        with(70, &4_u32.to_le_bytes())
            .unwrap_err()
            .contains("twice")
    );
    // Any byte at all: an error or a table, never a panic.
    for at in 0..good.len() {
        for byte in [0, 1, 0x7f, 0xff] {
            let _ = with(at, &[byte]);
        }
    }
}

#[test]
fn options_are_checked() {
    let refused = |change: fn(&mut TrigramOptions)| {
        let mut options = TrigramOptions::default();
        change(&mut options);
        Trigram::new(options).unwrap_err().to_string()
    };
    let adapt = |delta, cap, window| Some(AdaptiveTrigram { delta, cap, window });
    assert!(refused(|o| o.topn = 0).contains("topn"));
    assert!(refused(|o| o.topn = 65).contains("topn"));
    assert!(
        refused(|o| o.adapt = Some(AdaptiveTrigram {
            window: 2,
            ..Default::default()
        }))
        .contains("window")
    );
    assert!(
        refused(|o| o.search = Some(TreeSearch {
            nodes: 0,
            ..Default::default()
        }))
        .contains("nodes")
    );
    for bad in [adapt(f32::NAN, 3.0, 16), adapt(0.04, 0.0, 16)] {
        let options = TrigramOptions {
            adapt: bad,
            ..TrigramOptions::default()
        };
        assert!(Trigram::new(options).is_err());
    }
    let json = serde_json::to_string(&TrigramOptions::default()).unwrap();
    let back: TrigramOptions = serde_json::from_str(&json).unwrap();
    assert_eq!(back, TrigramOptions::default());
}
