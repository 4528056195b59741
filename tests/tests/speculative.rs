//! Speculation through the public API and the command: the text must stay the same.

use crate::cli::{json, run, stderr, stdout};
use sequor_data::Resolver;
use sequor_nn::device::DType;
use sequor_text::verify::{VerifyOptions, verify};
use sequor_text::{
    Acceptance, Depth, HeadKind, Layers, LoadOptions, Shape, Speculate, TextOptions, TextPipeline,
};
use std::sync::atomic::AtomicBool;

fn resolver() -> Resolver {
    Resolver::from_env().offline(true)
}

fn bible() -> TextPipeline {
    let path = |name: &str| resolver().resolve_model(name).unwrap().path;
    let mut p = TextPipeline::load(&path("bible-lm"), &LoadOptions::default()).unwrap();
    p.load_draft(&path("bible-draft"), &LoadOptions::default())
        .unwrap();
    p
}

fn methods() -> Vec<Speculate> {
    let more = ["early-exit=3", "draft=bible-draft"];
    let names = Speculate::BARE.into_iter().chain(more);
    names.map(|name| name.parse().unwrap()).collect()
}

/// Beginnings of texts: sixteen of eight sizes that differ, some of which repeat themselves.
fn prompts() -> Vec<String> {
    const VERSES: [&str; 8] = [
        "In the beginning God created the heavens and the earth.",
        "Yahweh is my shepherd; I shall lack nothing.",
        "Now it happened in the days of",
        "The sons of Levi: Gershon, Kohath, and Merari. The sons of",
        "And it was evening, and it was morning, one day. And it was evening, and it was",
        "Blessed are the poor in spirit, for theirs is the Kingdom of Heaven. Blessed are",
        "Jesus answered him,",
        "These are the names of the children of Israel,",
    ];
    (0..64)
        .map(|i| {
            let verse = VERSES[i % 8];
            let words: Vec<&str> = verse.split(' ').collect();
            let keep = words.len() - (i / 8).min(words.len() - 2) / 2;
            words[..keep].join(" ")
        })
        .enumerate()
        .map(|(i, text)| match i / 16 {
            0 => text,
            1 => format!("{text} Amen."),
            2 => format!("{text} {text}"),
            _ => format!("He said, \"{text}"),
        })
        .collect()
}

#[test]
fn greedy_texts_equal_plain_ones_for_64_prompts_and_every_method() {
    let p = bible();
    let prompts = prompts();
    let run = |prompt: &str, options: &TextOptions| {
        let g = p.generate(prompt, options).unwrap();
        (g.tokens, g.report.drafted, g.report.accepted)
    };
    let plain: Vec<_> = prompts
        .iter()
        .map(|t| run(t, &TextOptions::greedy(12)).0)
        .collect();
    for speculate in methods() {
        let options = TextOptions {
            speculate,
            ..TextOptions::greedy(12)
        };
        let (mut drafted, mut accepted) = (0, 0);
        for (prompt, plain) in prompts.iter().zip(&plain) {
            let (tokens, d, a) = run(prompt, &options);
            assert_eq!(&tokens, plain, "{} after {prompt:?}", options.speculate);
            (drafted, accepted) = (drafted + d, accepted + a);
        }
        // A network of three layers says nothing after the first.
        let idle = options.speculate == Speculate::EarlyExit(None);
        assert!(drafted > 0, "{}", options.speculate);
        assert!(accepted > 0 || idle, "{}", options.speculate);
    }
}

#[test]
fn drawn_texts_equal_plain_ones_where_drafts_are_not_drawn() {
    let p = bible();
    for speculate in methods() {
        for seed in 0..6 {
            let plain = TextOptions::sampling(24, 0.8, seed);
            let drafted = TextOptions {
                speculate: speculate.clone(),
                ..plain.clone()
            };
            let text = |o: &TextOptions| p.generate("And it came to pass", o).unwrap().tokens;
            assert_eq!(text(&plain), text(&drafted), "{speculate}, seed {seed}");
        }
    }
}

#[test]
fn verification_passes_a_lossless_method_and_finds_out_a_lossy_one() {
    let p = bible();
    let options = TextOptions {
        speculate: "draft=bible-draft".parse().unwrap(),
        depth: Depth::Fixed(3),
        ..TextOptions::default()
    };
    let how = VerifyOptions {
        prompts: 3,
        tokens: 24,
        draws: 250,
        ..VerifyOptions::default()
    };
    let report = |options: &TextOptions| {
        verify(&p, options, &how, &mut |_| {}, &AtomicBool::new(false)).unwrap()
    };
    let good = report(&options);
    assert!(good.passes(), "{good}");
    assert!(good.sampled.iter().all(|t| t.accepted > 50), "{good}");
    let lossy = report(&TextOptions {
        acceptance: Acceptance::Synthetic { rate: 0.9 },
        ..options
    });
    assert!(!lossy.passes(), "{lossy}");
    assert!(lossy.to_string().contains("LOSSY"), "{lossy}");
}

#[test]
fn lossy_rules_and_other_models_are_named_in_the_result() {
    let p = bible();
    let rules = [
        Acceptance::Tolerance { r: 0.3 },
        Acceptance::Typical {
            epsilon: 0.09,
            delta: 0.3,
        },
        Acceptance::Lantern { k: 50, delta: 0.3 },
    ];
    for acceptance in rules {
        let lossy = TextOptions {
            speculate: "draft=bible-draft".parse().unwrap(),
            acceptance,
            ..TextOptions::sampling(16, 0.8, 1)
        };
        let g = p.generate("In the beginning", &lossy).unwrap();
        assert!(!g.lossless() && g.report.lossy.is_some(), "{acceptance:?}");
        assert!(g.report.drafted > 0 && g.tokens.len() == 16);
    }
    let fewer = TextOptions {
        layers: Layers::Even(4),
        ..TextOptions::greedy(8)
    };
    let g = p.generate("In the beginning", &fewer).unwrap();
    assert!(!g.lossless());
    assert_eq!(g.layers.as_deref(), Some("even=4"));
    let all = TextOptions {
        layers: Layers::Even(p.model().config().layers),
        ..TextOptions::greedy(8)
    };
    let same = p.generate("In the beginning", &all).unwrap();
    let plain = p
        .generate("In the beginning", &TextOptions::greedy(8))
        .unwrap();
    assert_eq!(same.tokens, plain.tokens);
}

#[test]
fn what_cannot_be_meant_is_said() {
    let p = bible();
    let refused = |options: TextOptions| p.generate("In the", &options).unwrap_err().to_string();
    let shaped = refused(TextOptions {
        speculate: Speculate::PromptLookup,
        shape: Shape::Chain,
        ..TextOptions::greedy(4)
    });
    assert!(shaped.contains("has its own"), "{shaped}");
    let missing = refused(TextOptions {
        speculate: Speculate::Heads(HeadKind::Medusa),
        ..TextOptions::greedy(4)
    });
    assert!(missing.contains("load_heads"), "{missing}");
    let deep = refused(TextOptions {
        speculate: Speculate::EarlyExit(Some(99)),
        ..TextOptions::greedy(4)
    });
    assert!(deep.contains("early exit"), "{deep}");
    for nodes in [0, 10_000] {
        let nodes = refused(TextOptions {
            speculate: Speculate::Trigram,
            tree_nodes: Some(nodes),
            ..TextOptions::greedy(4)
        });
        assert!(nodes.contains("1 to 256"), "{nodes}");
    }
    let many = refused(TextOptions {
        layers: Layers::Even(999),
        ..TextOptions::greedy(4)
    });
    assert!(many.contains("999"), "{many}");
}

#[test]
fn the_command_refuses_before_it_loads() {
    let refused = |args: &[&str], said: &str| {
        let o = run(&[&["generate", "text", "x", "--model", "nowhere"], args].concat());
        assert_eq!(o.status.code(), Some(2), "{args:?}: {}", stderr(&o));
        assert!(stderr(&o).contains(said), "{args:?}: {}", stderr(&o));
    };
    refused(&["--speculate", "star"], "hidden-transfer");
    refused(&["--topology", "star"], "dynamic");
    refused(&["--acceptance", "star"], "typical");
    refused(&["--acceptance", "tolerance=x"], "not a number");
    refused(&["--layers", "some"], "router");
    refused(&["--tree-nodes", "0"], "1 to 256");
    let o = run(&["verify", "--model", "nowhere", "--method", "draft"]);
    assert_eq!(o.status.code(), Some(2), "{}", stderr(&o));
    // No heads are there for this model: the message says how to get some.
    let o = run(&[
        "generate",
        "text",
        "x",
        "--model",
        "bible-lm",
        "--offline",
        "--speculate",
        "medusa",
    ]);
    assert!(!o.status.success());
    assert!(stderr(&o).contains("sequor train heads"), "{}", stderr(&o));
}

#[test]
fn the_command_reports_a_run() {
    let o = run(&[
        "generate",
        "text",
        "In the beginning God created",
        "--model",
        "bible-lm",
        "--speculate",
        "draft=bible-draft",
        "--acceptance",
        "typical",
        "--temperature",
        "0.8",
        "--max-new-tokens",
        "24",
        "--json",
    ]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stderr(&o).contains("LOSSY"), "{}", stderr(&o));
    assert!(
        stderr(&o).contains("tokens per target call"),
        "{}",
        stderr(&o)
    );
    let j = json(&o);
    assert_eq!(j["lossless"], false);
    assert!(j["speculation"]["lossy"].is_string());
    assert!(j["speculation"]["forward_by_rows"].is_array());
    assert!(!stdout(&o).is_empty());
}

/// Trained heads on the real model, where both are at hand.
#[test]
fn the_heads_of_the_real_model_change_nothing_but_the_number_of_calls() {
    let Some(path) = crate::model::smollm2() else {
        return;
    };
    let load = LoadOptions {
        weights: DType::F32.into(),
        ..LoadOptions::default()
    };
    let mut p = TextPipeline::load(&path, &load).unwrap();
    let prompt = "The history of the city began when";
    let plain = p.generate(prompt, &TextOptions::greedy(24)).unwrap();
    let alone = HeadKind::ALL.map(Speculate::Heads);
    let joined = Speculate::CopyAndHeads(HeadKind::HydraPlus);
    for speculate in alone.into_iter().chain([joined]) {
        for shape in [Shape::Chain, Shape::Static, Shape::Dynamic] {
            let options = TextOptions {
                speculate: speculate.clone(),
                shape,
                ..TextOptions::greedy(24)
            };
            if let Err(e) = p.prepare(&options, &load, &resolver(), None) {
                eprintln!("skipped, {e}");
                continue;
            }
            let g = p.generate(prompt, &options).unwrap();
            assert_eq!(g.tokens, plain.tokens, "{speculate} {shape:?}");
            assert!(g.report.accepted > 0, "{speculate} {shape:?}");
        }
    }
}
