//! Processors beyond the reference vectors.

use crate::processors::{Context, LogitsProcessor, Processor, ProcessorList};
use crate::{Error, GenerationConfig};

const INF: f32 = f32::INFINITY;

fn run(config: &GenerationConfig, tokens: &[u32], prompt_len: usize, scores: &[f32]) -> Vec<f32> {
    let mut scores = scores.to_vec();
    let list = ProcessorList::from_config(config).unwrap();
    list.process(&Context::new(tokens, prompt_len), &mut scores)
        .unwrap();
    scores
}

#[test]
fn frequency_and_presence_count_generated_tokens_only() {
    let config = GenerationConfig {
        frequency_penalty: Some(0.5),
        presence_penalty: Some(1.0),
        ..GenerationConfig::greedy()
    };
    // Prompt 0 0; generated 1 1 2.
    let found = run(&config, &[0, 0, 1, 1, 2], 2, &[5.0; 4]);
    assert_eq!(found, [5.0, 3.0, 3.5, 5.0]);
}

#[test]
fn nothing_is_on_by_default() {
    let list = ProcessorList::from_config(&GenerationConfig::sampling(1.0)).unwrap();
    assert!(list.is_empty(), "{list:?}");
    // Neither are values that mean "off".
    let off = GenerationConfig {
        top_k: Some(0),
        top_p: Some(1.0),
        typical_p: Some(1.0),
        epsilon_cutoff: Some(0.0),
        eta_cutoff: Some(0.0),
        repetition_penalty: Some(1.0),
        no_repeat_ngram_size: Some(0),
        min_length: Some(0),
        guidance_scale: Some(1.0),
        remove_invalid_values: Some(false),
        renormalize_logits: Some(false),
        ..GenerationConfig::sampling(1.0)
    };
    assert_eq!(ProcessorList::from_config(&off).unwrap().len(), 0);
}

#[test]
fn the_published_order() {
    let all = GenerationConfig {
        guidance_scale: Some(2.0),
        sequence_bias: Some(vec![(vec![1], 1.0)]),
        encoder_repetition_penalty: Some(1.1),
        repetition_penalty: Some(1.1),
        frequency_penalty: Some(0.1),
        no_repeat_ngram_size: Some(3),
        encoder_no_repeat_ngram_size: Some(3),
        bad_words_ids: Some(vec![vec![1, 2]]),
        min_length: Some(3),
        min_new_tokens: Some(3),
        eos_token_id: Some(1.into()),
        forced_bos_token_id: Some(1),
        forced_eos_token_id: Some(1.into()),
        remove_invalid_values: Some(true),
        exponential_decay_length_penalty: Some((3, 1.1)),
        suppress_tokens: Some(vec![1]),
        begin_suppress_tokens: Some(vec![1]),
        top_h: Some(0.5),
        top_k: Some(5),
        top_p: Some(0.5),
        min_p: Some(0.1),
        typical_p: Some(0.5),
        epsilon_cutoff: Some(0.1),
        eta_cutoff: Some(0.1),
        watermarking_config: Some(Default::default()),
        renormalize_logits: Some(true),
        ..GenerationConfig::sampling(0.7)
    };
    let list = ProcessorList::from_config(&all).unwrap();
    let places: Vec<u8> = list.iter().map(Processor::place).collect();
    assert_eq!(
        places,
        [
            1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 18, 18, 19, 20, 21, 22, 23, 24,
            25, 26
        ]
    );
    // What Mirostat replaces.
    let kept: Vec<u8> = list
        .clone()
        .without_truncation()
        .iter()
        .map(Processor::place)
        .collect();
    assert_eq!(kept[kept.len() - 3..], [18, 25, 26]);
    // Functions find their places.
    let list = list
        .with_user(|_: &Context<'_>, _: &mut [f32]| Ok(()))
        .with_allowed_tokens(|_| vec![1]);
    assert_eq!(list.len(), 28);
    let shown = format!("{list:?}");
    let at = |what: &str| shown.find(what).unwrap();
    assert!(
        at("MinNewTokens") < at("function at place 10")
            && at("function at place 10") < at("ForcedBos")
    );
    assert!(
        at("BeginSuppress") < at("function at place 17")
            && at("function at place 17") < at("Temperature")
    );
    assert!(
        serde_json::to_string(&list).is_err(),
        "functions cannot be written down"
    );
    // Without sampling, truncation is left out; a temperature of 0 means that too.
    for greedy in [
        GenerationConfig {
            do_sample: None,
            ..all.clone()
        },
        GenerationConfig {
            temperature: Some(0.0),
            ..all
        },
    ] {
        let places: Vec<u8> = ProcessorList::from_config(&greedy)
            .unwrap()
            .iter()
            .map(Processor::place)
            .collect();
        assert_eq!(places[places.len() - 3..], [16, 25, 26]);
    }
}

#[test]
fn allowed_tokens_and_user_functions() {
    let list = ProcessorList::new([Processor::TopK { k: 1 }])
        .with_allowed_tokens(|tokens| vec![tokens.len() as u32, 3])
        .with_user(|ctx: &Context<'_>, scores: &mut [f32]| {
            scores[ctx.tokens[0] as usize] += 10.0;
            Ok(())
        });
    let mut scores = [4.0, 3.0, 2.0, 1.0];
    list.process(&Context::new(&[3, 0], 1), &mut scores)
        .unwrap();
    assert_eq!(scores, [-INF, -INF, -INF, 11.0]);
}

#[test]
fn every_option_has_its_range() {
    type Set = fn(&mut GenerationConfig, f64);
    let cases: [(&str, Set, &[f64]); 13] = [
        (
            "temperature",
            |c, x| c.temperature = Some(x),
            &[-0.1, f64::NAN, f64::INFINITY],
        ),
        ("max_time", |c, x| c.max_time = Some(x), &[-1.0, f64::NAN]),
        (
            "top_h",
            |c, x| c.top_h = Some(x),
            &[0.0, -1.0, 1.1, f64::NAN],
        ),
        (
            "top_p",
            |c, x| c.top_p = Some(x),
            &[0.0, -0.1, 1.1, f64::NAN],
        ),
        ("min_p", |c, x| c.min_p = Some(x), &[-0.1, 1.1, f64::NAN]),
        (
            "typical_p",
            |c, x| c.typical_p = Some(x),
            &[0.0, 1.1, f64::NAN],
        ),
        (
            "epsilon_cutoff",
            |c, x| c.epsilon_cutoff = Some(x),
            &[-0.1, 1.0, f64::NAN],
        ),
        (
            "eta_cutoff",
            |c, x| c.eta_cutoff = Some(x),
            &[-0.1, 1.0, f64::NAN],
        ),
        (
            "repetition_penalty",
            |c, x| c.repetition_penalty = Some(x),
            &[0.0, -1.0, f64::NAN, f64::INFINITY],
        ),
        (
            "encoder_repetition_penalty",
            |c, x| c.encoder_repetition_penalty = Some(x),
            &[0.0, f64::NAN],
        ),
        (
            "frequency_penalty",
            |c, x| c.frequency_penalty = Some(x),
            &[f64::NAN, f64::INFINITY],
        ),
        (
            "presence_penalty",
            |c, x| c.presence_penalty = Some(x),
            &[f64::NAN],
        ),
        (
            "guidance_scale",
            |c, x| c.guidance_scale = Some(x),
            &[f64::NAN, f64::NEG_INFINITY],
        ),
    ];
    for (name, set, bad) in cases {
        for &value in bad {
            let mut config = GenerationConfig::sampling(1.0);
            set(&mut config, value);
            match config.validate(10) {
                Err(Error::Input {
                    option,
                    value: shown,
                    expected,
                }) => {
                    assert_eq!((option.as_str(), shown), (name, value.to_string()));
                    assert!(!expected.is_empty());
                }
                other => panic!("{name} = {value}: {other:?}"),
            }
            assert!(ProcessorList::from_config(&config).is_err());
        }
        for good in [0.3, 0.999] {
            let mut config = GenerationConfig::sampling(1.0);
            set(&mut config, good);
            config.validate(10).unwrap();
        }
    }
}

#[test]
fn token_ids_must_be_in_the_vocabulary() {
    type Set = fn(&mut GenerationConfig, u32);
    let cases: [(&str, Set); 7] = [
        ("eos_token_id", |c, t| {
            c.eos_token_id = Some(vec![1, t].into())
        }),
        ("forced_eos_token_id", |c, t| {
            c.forced_eos_token_id = Some(t.into())
        }),
        ("forced_bos_token_id", |c, t| {
            c.forced_bos_token_id = Some(t)
        }),
        ("suppress_tokens", |c, t| c.suppress_tokens = Some(vec![t])),
        ("begin_suppress_tokens", |c, t| {
            c.begin_suppress_tokens = Some(vec![t])
        }),
        ("bad_words_ids", |c, t| {
            c.bad_words_ids = Some(vec![vec![0, t]])
        }),
        ("sequence_bias", |c, t| {
            c.sequence_bias = Some(vec![(vec![t], 1.0)])
        }),
    ];
    for (name, set) in cases {
        let mut config = GenerationConfig::greedy();
        set(&mut config, 9);
        config.validate(10).unwrap();
        set(&mut config, 10);
        let error = config.validate(10).unwrap_err();
        assert!(
            matches!(&error, Error::Input { option, .. } if option == name),
            "{name}: {error}"
        );
        // Even unvalidated, an id outside the vocabulary is ignored and not a panic.
        let _ = run(&config, &[0, 1], 1, &[0.0; 10]);
    }
    let empty = GenerationConfig {
        bad_words_ids: Some(vec![vec![]]),
        ..GenerationConfig::greedy()
    };
    assert!(empty.validate(10).is_err());
}

#[test]
fn published_files_can_be_read() {
    let config = GenerationConfig::from_json(
        r#"{"bos_token_id": 1, "eos_token_id": [2, 32000], "do_sample": true, "temperature": 0.6,
            "top_k": null, "transformers_version": "5.0", "cache_implementation": "static"}"#,
    )
    .unwrap();
    assert_eq!(config.eos_ids(), [2, 32000]);
    assert_eq!(config.top_k, None);
    assert_eq!(config.extra["cache_implementation"], "static");
    let back = GenerationConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!(back, config);
    let single = GenerationConfig::from_json(r#"{"eos_token_id": 7}"#).unwrap();
    assert_eq!(single.eos_ids(), [7]);
    assert_eq!(
        serde_json::to_string(&single).unwrap(),
        r#"{"eos_token_id":7}"#
    );
    // An error names the field.
    let error = GenerationConfig::from_json(r#"{"temperature": 1.0, "top_k": -5}"#)
        .unwrap_err()
        .to_string();
    assert!(error.contains("top_k") && error.contains("-5"), "{error}");
    assert!(GenerationConfig::from_json("[]").is_err());
}

#[test]
fn extreme_temperatures_stay_finite() {
    let scores = [1.0, 3.0, -INF, 2.0];
    for t in [1e-30, 1e-44, 1e30] {
        let config = GenerationConfig::sampling(t);
        let found = run(&config, &[0], 1, &scores);
        assert!(
            found.iter().all(|s| !s.is_nan() && *s < INF),
            "{t}: {found:?}"
        );
        let law = crate::Categorical::from_scores(found.as_slice()).unwrap();
        assert_eq!(law.prob(2), 0.0);
        assert_eq!(law.prob(1) == 1.0, t < 1.0);
    }
    // Where dividing would overflow, the best still wins.
    let found = run(&GenerationConfig::sampling(1e-37), &[0], 1, &[500.0, 499.0]);
    assert_eq!(
        crate::Categorical::from_scores(found).unwrap().mode(),
        (0, 1.0)
    );
}

#[test]
fn bad_rows_pass_through_every_processor() {
    let all = GenerationConfig {
        repetition_penalty: Some(1.3),
        frequency_penalty: Some(0.2),
        no_repeat_ngram_size: Some(2),
        eos_token_id: Some(1.into()),
        min_new_tokens: Some(4),
        exponential_decay_length_penalty: Some((0, 2.0)),
        top_h: Some(0.5),
        top_k: Some(2),
        top_p: Some(0.5),
        min_p: Some(0.1),
        typical_p: Some(0.5),
        epsilon_cutoff: Some(0.1),
        eta_cutoff: Some(0.1),
        watermarking_config: Some(Default::default()),
        renormalize_logits: Some(true),
        ..GenerationConfig::sampling(0.7)
    };
    for row in [
        [f32::NAN; 4],
        [1.0, f32::NAN, INF, -INF],
        [INF; 4],
        [-INF; 4],
    ] {
        let found = run(&all, &[0, 1, 2, 0], 1, &row);
        assert!(crate::Categorical::from_scores(found).is_err());
    }
    // Asked to, it repairs them.
    let repair = GenerationConfig {
        remove_invalid_values: Some(true),
        ..GenerationConfig::greedy()
    };
    assert_eq!(
        run(&repair, &[0], 1, &[f32::NAN, INF, -INF, 1.0]),
        [0.0, f32::MAX, f32::MIN, 1.0]
    );
    // Equal rows and empty histories are no trouble either.
    let found = run(
        &GenerationConfig {
            min_new_tokens: None,
            ..all
        },
        &[],
        0,
        &[0.0; 4],
    );
    assert!(crate::Categorical::from_scores(found).is_ok());
}

#[test]
fn a_long_text_ends_under_exponential_decay() {
    let config = GenerationConfig {
        eos_token_id: Some(0.into()),
        exponential_decay_length_penalty: Some((0, 2.0)),
        ..GenerationConfig::greedy()
    };
    let tokens = vec![1; 5000];
    let found = run(&config, &tokens, 1, &[0.5, 3.0]);
    assert_eq!(found, [f32::MAX, 3.0]);
    // A forbidden end stays forbidden.
    assert_eq!(run(&config, &tokens, 1, &[-INF, 3.0]), [-INF, 3.0]);
}
