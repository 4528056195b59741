//! One suite of decoding cases, run over every decoder.

use std::ops::ControlFlow;

use sequor_kernels::cost::CostCurve;

use super::toy::{DrawnTree, Grown, Markov, RankTree};
use crate::draft::{
    Copying, DraftMode, DraftModel, Drafter, Jacobi, Joined, Lookahead, LookaheadOptions, NoDraft,
    PromptLookup, StaticTree, Topology, Trigram, TrigramOptions, TrigramTable, Vocabulary,
};
use crate::generate::{Request, generate_batch};
use crate::mirostat::{MirostatConfig, MirostatVersion};
use crate::processors::WatermarkConfig;
use crate::tree::Draw;
use crate::{DepthPolicy, FinishReason, Generation, GenerationConfig, Generator, Options, Result};

const V: usize = 12;

/// The target: peaked enough that drafts are often right, cheap enough per row that they
/// pay.
fn target() -> Markov {
    let curve = CostCurve::new(vec![1, 33], vec![1.0, 1.5]);
    Markov {
        curve,
        ..Markov::new(V, 2, 2.5, 1)
    }
}

/// A related but different model.
fn guess() -> Markov {
    Markov::new(V, 1, 2.5, 1)
}

/// Plain text of the target.
fn text() -> &'static [u32] {
    static TEXT: std::sync::OnceLock<Vec<u32>> = std::sync::OnceLock::new();
    TEXT.get_or_init(|| {
        let options = Options::from(GenerationConfig::sampling(0.8)).max_new_tokens(3000);
        let target = target();
        let session = Generator::new(&target, options)
            .unwrap()
            .session(&[1], None)
            .unwrap();
        session.collect::<Result<_>>().unwrap()
    })
}

fn grown(topology: Topology) -> Option<Box<dyn Drafter>> {
    let guess = Markov::new(V, 2, 2.5, 1);
    Some(Box::new(Grown { guess, topology }))
}

fn shape() -> StaticTree {
    let ranks = vec![0.5, 0.2, 0.1];
    StaticTree::search(&[ranks.clone(), ranks.clone(), ranks.clone(), ranks], 30)
}

struct Decoder {
    name: &'static str,
    depth: DepthPolicy,
    nodes: Option<usize>,
    make: fn() -> Option<Box<dyn Drafter>>,
}

fn decoders() -> Vec<Decoder> {
    fn decoder(
        name: &'static str,
        depth: DepthPolicy,
        make: fn() -> Option<Box<dyn Drafter>>,
    ) -> Decoder {
        Decoder {
            name,
            depth,
            nodes: None,
            make,
        }
    }
    use DepthPolicy::{Adaptive, Auto, Fixed};
    fn lookup() -> Option<Box<dyn Drafter>> {
        Some(Box::new(PromptLookup::default()))
    }
    fn rank_tree() -> Option<Box<dyn Drafter>> {
        Some(Box::new(RankTree {
            guess: Markov::new(V, 2, 2.5, 1),
            width: 3,
        }))
    }
    vec![
        decoder("plain", Auto { max: 8 }, || None),
        decoder("no draft", Fixed(4), || Some(Box::new(NoDraft))),
        decoder("lookup 1", Fixed(1), lookup),
        decoder("lookup 6", Fixed(6), lookup),
        decoder("lookup adaptive", Adaptive { max: 6 }, lookup),
        decoder("lookup auto", Auto { max: 6 }, lookup),
        decoder("small model, greedy", Fixed(3), || {
            Some(Box::new(
                DraftModel::new(guess(), DraftMode::Greedy).unwrap(),
            ))
        }),
        decoder("same model, greedy", Fixed(4), || {
            Some(Box::new(
                DraftModel::new(target(), DraftMode::Greedy).unwrap(),
            ))
        }),
        decoder("confident small model", Fixed(5), || {
            let model = DraftModel::new(guess(), DraftMode::Greedy).unwrap();
            Some(Box::new(model.with_min_confidence(0.6).unwrap()))
        }),
        decoder("small model, sampled", Fixed(3), || {
            Some(Box::new(
                DraftModel::new(guess(), DraftMode::Sampled).unwrap(),
            ))
        }),
        Decoder {
            nodes: Some(12),
            ..decoder("ranked tree", Fixed(4), rank_tree)
        },
        Decoder {
            nodes: Some(5),
            ..decoder("cut tree", Adaptive { max: 4 }, rank_tree)
        },
        Decoder {
            nodes: Some(9),
            ..decoder("grown chain", Fixed(3), || grown(Topology::Chain))
        },
        Decoder {
            nodes: Some(10),
            ..decoder("static tree", Fixed(4), || grown(Topology::Static(shape())))
        },
        decoder("static tree, auto", Auto { max: 4 }, || {
            grown(Topology::Static(shape()))
        }),
        Decoder {
            nodes: Some(14),
            ..decoder("dynamic tree", Fixed(5), || {
                grown(Topology::Dynamic { top_k: 3 })
            })
        },
        Decoder {
            nodes: Some(16),
            ..decoder("trigram", Fixed(5), || {
                Some(Box::new(Trigram::new(TrigramOptions::default()).unwrap()))
            })
        },
        decoder("copy, auto", Auto { max: 8 }, || {
            Some(Box::new(Copying::default()))
        }),
        Decoder {
            nodes: Some(12),
            ..decoder("copy and a tree", Fixed(5), || {
                let tree = grown(Topology::Dynamic { top_k: 3 })?;
                Some(Box::new(Joined::new(Copying::default(), tree).unwrap()))
            })
        },
        decoder("copy and a tree, auto", Auto { max: 5 }, || {
            let tree = grown(Topology::Static(shape()))?;
            Some(Box::new(Joined::new(Copying::default(), tree).unwrap()))
        }),
        decoder("trigram, auto", Auto { max: 5 }, || {
            Some(Box::new(Trigram::new(TrigramOptions::default()).unwrap()))
        }),
        Decoder {
            nodes: Some(12),
            ..decoder("counted trigram", Fixed(4), || {
                let vocabulary = Vocabulary {
                    size: V as u32,
                    hash: [1; 32],
                };
                let table = TrigramTable::from_tokens(text(), vocabulary, 12).unwrap();
                let options = TrigramOptions {
                    adapt: None,
                    search: None,
                    ..TrigramOptions::default()
                };
                Some(Box::new(Trigram::new(options).unwrap().with_table(table)))
            })
        },
        decoder("jacobi", Fixed(6), || {
            Some(Box::new(Jacobi::new(6).unwrap()))
        }),
        decoder("jacobi, adaptive", Adaptive { max: 8 }, || {
            Some(Box::new(Jacobi::new(5).unwrap()))
        }),
        Decoder {
            nodes: Some(LookaheadOptions::default().nodes()),
            ..decoder("lookahead", Fixed(11), || {
                Some(Box::new(
                    Lookahead::new(LookaheadOptions::default()).unwrap(),
                ))
            })
        },
        Decoder {
            nodes: Some(12),
            ..decoder("small lookahead", Fixed(4), || {
                let options = LookaheadOptions {
                    window: 3,
                    ngram: 3,
                    pool: 3,
                    pool_from_text: false,
                };
                Some(Box::new(Lookahead::new(options).unwrap()))
            })
        },
        Decoder {
            nodes: Some(12),
            ..decoder("drawn tree", Fixed(4), || {
                let draw = Draw::WithoutReplacement;
                Some(Box::new(DrawnTree {
                    guess: guess(),
                    width: 3,
                    draw,
                    heard: Vec::new(),
                }))
            })
        },
    ]
}

struct Case {
    name: &'static str,
    options: Options,
}

fn cases() -> Vec<Case> {
    let case = |name, config: GenerationConfig| {
        let limit = config.max_new_tokens.or(Some(40));
        Case {
            name,
            options: Options::from(GenerationConfig {
                max_new_tokens: limit,
                ..config
            })
            .seed(17),
        }
    };
    let greedy = GenerationConfig::greedy;
    let sampling = || GenerationConfig::sampling(0.8);
    let with = |mut case: Case, change: fn(&mut Options)| {
        change(&mut case.options);
        case
    };
    vec![
        case("greedy", greedy()),
        case(
            "greedy, repetition penalty",
            GenerationConfig {
                repetition_penalty: Some(1.4),
                ..greedy()
            },
        ),
        case(
            "greedy, no bigram twice",
            GenerationConfig {
                no_repeat_ngram_size: Some(2),
                ..greedy()
            },
        ),
        case(
            "greedy, frequency",
            GenerationConfig {
                frequency_penalty: Some(0.6),
                ..greedy()
            },
        ),
        case(
            "greedy, eos",
            GenerationConfig {
                eos_token_id: Some(3.into()),
                ..greedy()
            },
        ),
        case(
            "greedy, two eos, not before ten",
            GenerationConfig {
                eos_token_id: Some(vec![3, 7].into()),
                min_new_tokens: Some(10),
                ..greedy()
            },
        ),
        with(case("greedy, stop ids", greedy()), |o| {
            o.stop_token_ids = vec![5, 6]
        }),
        with(
            case(
                "greedy, eos ignored",
                GenerationConfig {
                    eos_token_id: Some(3.into()),
                    ..greedy()
                },
            ),
            |o| o.ignore_eos = true,
        ),
        case(
            "nothing",
            GenerationConfig {
                max_new_tokens: Some(0),
                ..greedy()
            },
        ),
        case(
            "one token",
            GenerationConfig {
                max_new_tokens: Some(1),
                ..sampling()
            },
        ),
        case(
            "two tokens",
            GenerationConfig {
                max_new_tokens: Some(2),
                ..sampling()
            },
        ),
        case("sampling", sampling()),
        case(
            "sampling, truncated",
            GenerationConfig {
                top_k: Some(5),
                top_p: Some(0.9),
                min_p: Some(0.02),
                ..sampling()
            },
        ),
        case(
            "sampling, history",
            GenerationConfig {
                repetition_penalty: Some(1.2),
                no_repeat_ngram_size: Some(3),
                presence_penalty: Some(0.2),
                eos_token_id: Some(2.into()),
                exponential_decay_length_penalty: Some((5, 1.1)),
                ..sampling()
            },
        ),
        case(
            "sampling, forced end",
            GenerationConfig {
                forced_eos_token_id: Some(9.into()),
                eos_token_id: Some(9.into()),
                min_new_tokens: Some(39),
                ..sampling()
            },
        ),
        case(
            "sampling, watermark",
            GenerationConfig {
                watermarking_config: Some(WatermarkConfig::default()),
                ..sampling()
            },
        ),
        with(case("mirostat 1", sampling()), |o| {
            o.mirostat = Some(MirostatConfig {
                version: MirostatVersion::V1,
                tau: 1.5,
                eta: 0.3,
            });
        }),
        with(case("mirostat 2", sampling()), |o| {
            o.mirostat = Some(MirostatConfig {
                version: MirostatVersion::V2,
                tau: 1.5,
                eta: 0.3,
            });
        }),
        with(case("small chunks", sampling()), |o| o.prefill_chunk = 3),
    ]
}

fn prompts() -> Vec<Vec<u32>> {
    (0..64_u32)
        .map(|i| {
            (0..1 + i % 9)
                .map(|j| (i * 7 + j * j * 5 + j) % V as u32)
                .collect()
        })
        .collect()
}

/// Eight of them, of different lengths.
fn few_prompts() -> Vec<Vec<u32>> {
    prompts().into_iter().skip(3).step_by(5).take(8).collect()
}

fn run(
    target: &Markov,
    decoder: &Decoder,
    options: &Options,
    prompt: &[u32],
) -> Result<Generation> {
    let options = Options {
        depth: decoder.depth,
        draft_nodes: decoder.nodes,
        ..options.clone()
    };
    let mut told = Vec::new();
    let out = Generator::new(target, options)?.generate(prompt, (decoder.make)(), |token| {
        told.push(token);
        ControlFlow::Continue(())
    })?;
    assert_eq!(
        told, out.tokens,
        "{}: the callback hears every token in order",
        decoder.name
    );
    Ok(out)
}

/// What holds for every decoder in every case.
fn check(name: &str, options: &Options, prompt: &[u32], out: &Generation) {
    let limit = options.config.max_new_tokens.unwrap();
    assert!(out.tokens.len() <= limit, "{name}: too long");
    let ends = |t: &u32| {
        options.stop_token_ids.contains(t)
            || (!options.ignore_eos && options.config.eos_ids().contains(t))
    };
    match out.finish {
        FinishReason::Length => assert_eq!(out.tokens.len(), limit, "{name}"),
        FinishReason::Stop => assert!(out.tokens.last().is_some_and(ends), "{name}"),
        other => panic!("{name}: {other}"),
    }
    let before_last = out.tokens.split_last().map_or(&[][..], |(_, rest)| rest);
    assert!(
        !before_last.iter().any(ends),
        "{name}: went on after an end token"
    );

    let report = &out.report;
    assert_eq!(report.emitted, out.tokens.len(), "{name}");
    assert_eq!(report.prompt_tokens, prompt.len(), "{name}");
    assert_eq!(
        report.accepted,
        report.accepted_by_depth.iter().sum::<usize>(),
        "{name}"
    );
    assert!(
        report.accepted <= report.drafted && report.rounds <= report.target_calls,
        "{name}"
    );
    assert!(
        report.emitted <= 1 + report.target_calls + report.accepted,
        "{name}"
    );
    if limit == 0 {
        assert_eq!(
            (report.prefill_calls, report.target_calls),
            (0, 0),
            "{name}: no forward pass for no token"
        );
    } else {
        assert_eq!(
            report.prefill_calls,
            prompt.len().div_ceil(options.prefill_chunk),
            "{name}"
        );
    }
    let back: crate::Report =
        serde_json::from_value(serde_json::to_value(report).unwrap()).unwrap();
    assert_eq!(&back, report, "{name}");
}

#[test]
fn every_decoder_in_every_case() {
    let target = target();
    let decoders = decoders();
    let plain = &decoders[0];
    let mut accepted = vec![0; decoders.len()];
    for case in cases() {
        let prompts = if case.options.config.is_greedy() {
            prompts()
        } else {
            few_prompts()
        };
        for (i, prompt) in prompts.iter().enumerate() {
            let options = Options {
                request: i as u64,
                ..case.options.clone()
            };
            let expected = run(&target, plain, &options, prompt).unwrap();
            check(case.name, &options, prompt, &expected);
            for (d, decoder) in decoders.iter().enumerate().skip(1) {
                let name = format!("{}, {}, prompt {i}", case.name, decoder.name);
                let out = run(&target, decoder, &options, prompt).unwrap();
                check(&name, &options, prompt, &out);
                accepted[d] += out.report.accepted;
                let random = (decoder.make)().is_some_and(|d| d.is_random());
                if options.config.is_greedy() || !random {
                    assert_eq!(out.tokens, expected.tokens, "{name}");
                    assert_eq!(out.finish, expected.finish, "{name}");
                }
                if random {
                    let again = run(&target, decoder, &options, prompt).unwrap();
                    assert_eq!(again.tokens, out.tokens, "{name}: not repeatable");
                }
            }
        }
    }
    for (decoder, accepted) in decoders.iter().zip(accepted).skip(2) {
        assert!(
            accepted > 300,
            "{} was hardly ever right: {accepted}",
            decoder.name
        );
    }
}

#[test]
fn a_ragged_batch_equals_single_runs() {
    let target = target();
    for case in cases() {
        for decoder in decoders() {
            let options = |i: usize| Options {
                depth: decoder.depth,
                draft_nodes: decoder.nodes,
                request: i as u64,
                ..case.options.clone()
            };
            let prompts = few_prompts();
            let requests = prompts.iter().enumerate().map(|(i, prompt)| Request {
                drafter: (decoder.make)(),
                ..Request::new(prompt.clone(), options(i))
            });
            let batch = generate_batch(&target, requests.collect(), None).unwrap();
            for (i, (out, prompt)) in batch.into_iter().zip(&prompts).enumerate() {
                let single = run(&target, &decoder, &options(i), prompt).unwrap();
                let name = format!("{}, {}, row {i}", case.name, decoder.name);
                assert_eq!(out.unwrap().tokens, single.tokens, "{name}");
            }
        }
    }
}

#[test]
fn requests_of_one_seed_are_independent() {
    let target = target();
    let options = Options::from(GenerationConfig::sampling(1.0)).max_new_tokens(30);
    let plain = &decoders()[0];
    let outs: Vec<_> = (0..3)
        .map(|r| {
            run(&target, plain, &options.clone().request(r), &[1])
                .unwrap()
                .tokens
        })
        .collect();
    assert_ne!(outs[0], outs[1]);
    assert_ne!(outs[1], outs[2]);
}

#[test]
fn a_callback_cuts_a_round_short() {
    let target = target();
    let options = Options::from(GenerationConfig::greedy())
        .max_new_tokens(30)
        .depth(DepthPolicy::Fixed(8));
    let generator = Generator::new(&target, options).unwrap();
    let draft = || -> Option<Box<dyn Drafter>> {
        Some(Box::new(
            DraftModel::new(Markov::new(V, 2, 2.5, 1), DraftMode::Greedy).unwrap(),
        ))
    };
    let whole = generator
        .generate(&[1, 2], draft(), |_| ControlFlow::Continue(()))
        .unwrap();
    for stop_after in 1..30 {
        let mut heard = 0;
        let session = generator.session(&[1, 2], draft()).unwrap();
        let mut session = session.on_token(|_| {
            heard += 1;
            if heard == stop_after {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let tokens: Vec<u32> = session.by_ref().collect::<Result<_>>().unwrap();
        assert_eq!(tokens, whole.tokens[..stop_after]);
        assert_eq!(session.finish(), Some(FinishReason::Stop));
        let all = session.tokens().to_vec();
        // What was cut off is not in the state either.
        assert_eq!(session.state().committed(0), &all[..all.len() - 1]);
    }
}

#[test]
fn the_drafter_hears_what_became_of_its_drafts() {
    let target = target();
    let mut drafter = DrawnTree {
        guess: guess(),
        width: 1,
        draw: Draw::WithReplacement,
        heard: Vec::new(),
    };
    let options = Options::from(GenerationConfig::sampling(1.0))
        .max_new_tokens(200)
        .depth(DepthPolicy::Fixed(4));
    let generator = Generator::new(&target, options).unwrap();
    let out = generator
        .generate(&[1, 2], Some(Box::new(&mut drafter)), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    let heard = &drafter.heard;
    assert_eq!(heard.len(), out.report.rounds);
    assert_eq!(heard.iter().map(|h| h.0).sum::<usize>(), out.report.drafted);
    assert_eq!(
        heard.iter().map(|h| h.1).sum::<usize>(),
        out.report.accepted
    );
    assert!(heard.iter().all(|h| h.2 <= h.1 + 1));
}
