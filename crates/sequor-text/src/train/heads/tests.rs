use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use sequor_backbone::heads::{Base, Heads, HeadsConfig, HeadsKind};
use sequor_backbone::{CausalLm, Decoder, DecoderConfig};
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::weights::write_safetensors;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor};
use sequor_sampling::{Layout, LogitRows, Step, TargetModel};
use sequor_train::progress::StepReport;
use sequor_train::{Progress, Silent, Task, TrainOptions, Trainer, Workplace};
use serde_json::json;

use super::data::{Batch, Row, Sequences, held_out};
use super::judge::Judge;
use super::task::{HeadsTask, Lesson};
use super::*;
use crate::Error;
use crate::train::distill::{DistillCorpus, Sample};

const VOCAB: usize = 48;
const DIM: i64 = 24;
const KINDS: [HeadsKind; 4] = [
    HeadsKind::Medusa,
    HeadsKind::Hydra,
    HeadsKind::HydraPlus,
    HeadsKind::Eagle,
];

/// A small decoder on disk, loaded as any other. `head` makes the output head from the
/// embedding, both `[vocab, dim]`.
fn target_with(dir: &Path, seed: u64, head: impl Fn(&Tensor) -> Tensor) -> CausalLm {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": DIM, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "initializer_range": 0.02,
    });
    let config = DecoderConfig::from_json(&json).unwrap();
    let builder = ParamBuilder::init(seed, Kind::Float, Device::Cpu);
    let _decoder = Decoder::new(&builder, &config).unwrap();
    let mut params = builder.params();
    let embed = params.iter().find(|p| p.name.contains("embed_tokens"));
    let head = head(&embed.unwrap().tensor.detach());
    params.retain(|p| p.name != "lm_head.weight");
    let mut tensors: Vec<(&str, &Tensor)> = vec![("lm_head.weight", &head)];
    tensors.extend(params.iter().map(|p| (&p.name[..], &p.tensor)));
    std::fs::create_dir_all(dir).unwrap();
    write_safetensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    CausalLm::load(dir, sequor_nn::device::DType::F32, Device::Cpu).unwrap()
}

/// A decoder that mostly counts: after token v it says v + 1.
fn target(dir: &Path, seed: u64) -> CausalLm {
    target_with(dir, seed, |embed| {
        let norm = embed
            .square()
            .sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
            .sqrt();
        (embed / norm * 1.4).roll([1i64].as_slice(), [0i64].as_slice())
    })
}

/// Writes sequences as a corpus.
fn write_corpus(dir: &Path, sequences: &[(Vec<i32>, i32, Tensor)]) -> DistillCorpus {
    std::fs::create_dir_all(dir).unwrap();
    let mut starts = vec![0];
    starts.extend(sequences.iter().scan(0, |at, (t, ..)| {
        *at += t.len() as i32;
        Some(*at)
    }));
    let tokens: Vec<i32> = sequences.iter().flat_map(|(t, ..)| t.clone()).collect();
    let prompts: Vec<i32> = sequences.iter().map(|(_, p, _)| *p).collect();
    let features: Vec<&Tensor> = sequences.iter().map(|(.., f)| f).collect();
    write_safetensors(
        &dir.join("shard-00000.safetensors"),
        &[
            ("tokens", &Tensor::from_slice(&tokens)),
            ("starts", &Tensor::from_slice(&starts)),
            ("prompt_lens", &Tensor::from_slice(&prompts)),
            ("features", &Tensor::cat(&features, 0).to_kind(Kind::Half)),
        ],
        &BTreeMap::new(),
    )
    .unwrap();
    DistillCorpus::open(dir).unwrap()
}

/// Lets the model write `count` sequences of 20 to 40 tokens.
fn own_corpus(dir: &Path, model: &CausalLm, count: usize) -> DistillCorpus {
    let sequences: Vec<_> = (0..count)
        .map(|i| {
            let mut random = Key::new(9, i as u64).stream(0, Purpose::Sample);
            let length = 20 + random.below(20) as usize;
            let mut tokens = vec![random.below(VOCAB as u64) as u32];
            let (mut state, mut features) = (model.new_state(1).unwrap(), Vec::new());
            for n in 0..length {
                let step = Step {
                    slot: 0,
                    tokens: &tokens[n..],
                    layout: Layout::Chain,
                    logits: LogitRows::Last,
                    features: true,
                };
                let output = model.forward(&[step], &mut state).unwrap().remove(0);
                sequor_sampling::SequenceState::commit(&mut state, 0, &[0]).unwrap();
                features.push(output.features.unwrap());
                let row = output.logits.row(0).unwrap();
                let law: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
                let mut u = random.uniform() * law.iter().sum::<f64>();
                let next = law.iter().position(|p| {
                    u -= p;
                    u < 0.0
                });
                tokens.push(next.unwrap_or(0) as u32);
            }
            tokens.pop();
            let tokens: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
            (tokens, 3, Tensor::cat(&features, 0))
        })
        .collect();
    write_corpus(dir, &sequences)
}

fn recipe(kind: HeadsKind) -> HeadsRecipe {
    HeadsRecipe {
        draft_vocab: 40,
        depth: 3,
        steps: 60,
        batch: 8,
        context: 24,
        learning_rate: 1e-2,
        dropout: if kind == HeadsKind::HydraPlus {
            0.1
        } else {
            0.0
        },
        ..HeadsRecipe::new(kind)
    }
}

fn run() -> HeadsRun {
    HeadsRun {
        base: "toy".into(),
        licence: "MIT".into(),
        threads: Some(1),
        command: "sequor train heads --kind x".into(),
        ..HeadsRun::default()
    }
}

struct StopAt<'a>(u64, &'a AtomicBool);

impl Progress for StopAt<'_> {
    fn step(&mut self, report: &StepReport) {
        self.1.store(report.step >= self.0, Ordering::Relaxed);
    }
}

#[test]
fn all_kinds_learn_and_their_folders_are_complete() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let corpus = own_corpus(&dir.path().join("corpus"), &model, 120);
    let never = AtomicBool::new(false);
    for kind in KINDS {
        let out = dir.path().join(kind.name());
        let report = train_heads(
            &model,
            &corpus,
            &recipe(kind),
            &out,
            &run(),
            &mut Silent,
            &never,
        )
        .unwrap();
        let first = report.heads[0];
        let trivial = corpus.frequent_tokens(1).1;
        assert!(
            first.top1 > 0.3 && trivial < 0.1,
            "{}: {:?}, trivial {trivial}",
            kind.name(),
            report.heads
        );
        assert!(first.top1 <= first.top3 && first.top3 <= first.top10);
        assert_eq!(report.heads.len(), 3);
        assert!(report.chain_tokens > 1.0 && report.cost_share > 0.0);
        let log = sequor_train::log::read(&out.join("training/log.jsonl")).unwrap();
        let losses: Vec<f64> = log.iter().filter_map(|r| r.get("loss")?.as_f64()).collect();
        assert!(
            losses.last().unwrap() < &(0.9 * losses[0]),
            "{}: {losses:?}",
            kind.name()
        );
        for file in [
            "heads.json",
            "heads.safetensors",
            "README.md",
            "training/report.json",
        ] {
            assert!(out.join(file).metadata().unwrap().len() > 50, "{file}");
        }
        assert!(!out.join(".checkpoints").exists());
        let config: HeadsConfig =
            serde_json::from_slice(&std::fs::read(out.join("heads.json")).unwrap()).unwrap();
        assert_eq!(config.base.fingerprint, model.fingerprint().unwrap());
        assert_eq!((config.kind, config.draft_vocab_size), (kind, Some(40)));
        assert_eq!(config.accuracies.len(), 3);
        let loaded = Heads::load(&out, Default::default(), Device::Cpu, &model).unwrap();
        assert_eq!(loaded.draft_tokens().map(<[u32]>::len), Some(40));
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(
            card.contains("| 4 |") && card.contains("sequor train heads --kind x"),
            "{card}"
        );
    }
}

#[test]
fn interruption_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let corpus = own_corpus(&dir.path().join("corpus"), &model, 45);
    let never = AtomicBool::new(false);
    for kind in [HeadsKind::HydraPlus, HeadsKind::Eagle] {
        let recipe = HeadsRecipe {
            steps: 14,
            ..recipe(kind)
        };
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let whole = train_heads(&model, &corpus, &recipe, &a, &run(), &mut Silent, &never).unwrap();
        let cancel = AtomicBool::new(false);
        let mut stop = StopAt(8, &cancel);
        let stopped = train_heads(&model, &corpus, &recipe, &b, &run(), &mut stop, &cancel);
        assert!(matches!(stopped, Err(Error::Cancelled)));
        assert!(!b.join("heads.json").exists());
        let refused = train_heads(&model, &corpus, &recipe, &b, &run(), &mut Silent, &never);
        assert!(refused.unwrap_err().to_string().contains("8 steps"));
        // Minutes do not matter any more: the number of steps is that of the beginning.
        let again = HeadsRun {
            resume: true,
            minutes: Some(1e-3),
            ..run()
        };
        let resumed =
            train_heads(&model, &corpus, &recipe, &b, &again, &mut Silent, &never).unwrap();
        assert_eq!(
            (whole.heads, whole.positions),
            (resumed.heads, resumed.positions)
        );
        for file in ["heads.safetensors", "heads.json"] {
            let read = |d: &Path| std::fs::read(d.join(file)).unwrap();
            assert_eq!(read(&a), read(&b), "{file}");
        }
        std::fs::remove_dir_all(&a).unwrap();
        std::fs::remove_dir_all(&b).unwrap();
    }
}

/// States whose first channels say the next token, as the output head reads them, and whose
/// other channels say the token `ahead` further on, which the head cannot see.
fn coded_corpus(dir: &Path, ahead: usize) -> DistillCorpus {
    let half = DIM as usize / 2;
    let sequences: Vec<_> = (0..60)
        .map(|i| {
            let mut random = Key::new(4, i).stream(0, Purpose::Test);
            let text: Vec<usize> = (0..44)
                .map(|_| random.below(half as u64) as usize)
                .collect();
            let mut features = vec![0f32; 40 * DIM as usize];
            for n in 0..40 {
                features[n * DIM as usize + text[n + 1]] = 0.3;
                features[n * DIM as usize + half + text[n + 1 + ahead]] = 1.0;
            }
            let tokens: Vec<i32> = text[..40].iter().map(|&t| t as i32).collect();
            (tokens, 2, Tensor::from_slice(&features).reshape([40, DIM]))
        })
        .collect();
    write_corpus(dir, &sequences)
}

/// A decoder whose output head says token v where channel v of the state is large.
fn coded_target(dir: &Path) -> CausalLm {
    target_with(dir, 1, |_| {
        let half = DIM / 2;
        let eye = Tensor::eye(half, (Kind::Float, Device::Cpu)) * 20.0;
        let right = Tensor::zeros([half, DIM - half], (Kind::Float, Device::Cpu));
        let below = Tensor::zeros([VOCAB as i64 - half, DIM], (Kind::Float, Device::Cpu));
        Tensor::cat(&[Tensor::cat(&[eye, right], 1), below], 0)
    })
}

fn lesson<'a>(
    model: &'a CausalLm,
    corpus: &'a DistillCorpus,
    recipe: &'a HeadsRecipe,
    tokens: Option<&[u32]>,
) -> Lesson<'a> {
    Lesson {
        target: model,
        corpus,
        recipe,
        judge: Judge::new(model, tokens).unwrap(),
        held_out: held_out(corpus),
    }
}

fn config(kind: HeadsKind, model: &CausalLm, depth: usize) -> HeadsConfig {
    let mut config = HeadsConfig::small(kind, model.config(), Base::default());
    if kind != HeadsKind::Eagle {
        config.heads = depth;
    }
    config
}

/// A head learns the token that its state tells of if and only if that is the token it is for.
#[test]
fn head_i_is_for_token_i_plus_two() {
    let dir = tempfile::tempdir().unwrap();
    let model = coded_target(&dir.path().join("model"));
    for (labels, ahead) in [(Labels::Laws, 1), (Labels::Laws, 2), (Labels::Tokens, 1)] {
        let corpus = coded_corpus(&dir.path().join(ahead.to_string()), ahead);
        let recipe = HeadsRecipe {
            depth: 2,
            labels,
            draft_vocab: 0,
            context: 40,
            decay: 1.0,
            ..recipe(HeadsKind::Medusa)
        };
        let builder = ParamBuilder::init(1, Kind::Float, Device::Cpu);
        let heads = Heads::new(&builder, &config(recipe.kind, &model, 2)).unwrap();
        let mut task = HeadsTask::new(lesson(&model, &corpus, &recipe, None), heads, builder);
        let place = Workplace {
            checkpoints: dir.path().join(format!("{ahead}{labels:?}")),
            log: dir.path().join("log.jsonl"),
            save_every: std::time::Duration::from_secs(100),
            config: json!(null),
        };
        let options = TrainOptions {
            eval_every: 0,
            ..recipe.train_options()
        };
        Trainer::new(&mut task, options, place, false, &mut Silent)
            .unwrap()
            .run(&mut Silent, &AtomicBool::new(false))
            .unwrap();
        let metrics = task.evaluate().unwrap();
        let top1 = [metrics[TOP1], metrics["top1_head_1"]];
        let chance = 2.0 / (DIM / 2) as f64;
        assert!(top1[ahead - 1] > 0.95, "{labels:?} {ahead}: {top1:?}");
        assert!(top1[2 - ahead] < chance, "{labels:?} {ahead}: {top1:?}");
    }
}

fn sample(n: usize, seed: u64) -> Sample {
    let mut random = Key::new(seed, 0).stream(0, Purpose::Test);
    let mut features = vec![0f32; n * DIM as usize];
    random.fill_normal_f32(&mut features);
    Sample {
        tokens: (0..n).map(|_| random.below(VOCAB as u64) as u32).collect(),
        prompt_len: 3,
        features: Tensor::from_slice(&features).reshape([n as i64, DIM]),
    }
}

#[test]
fn a_judge_of_fewer_tokens_agrees_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let whole = Judge::new(&model, Some(&[7, 3, 20, 11, 30])).unwrap();
    let states = sample(6, 1).features;
    let all = whole.scores(&states).unwrap();
    // The two most frequent, and of the batch those that are drafted.
    let few = whole
        .among(&Tensor::from_slice(&[30i64, 1, 3, 2]).reshape([2, 2]), 2)
        .unwrap();
    let expected = all.index_select(1, &Tensor::from_slice(&[0i64, 1, 4]));
    let diff = (few.scores(&states).unwrap() - expected).abs().max();
    assert!(diff.double_value(&[]) < 1e-5);
    let tokens = Tensor::from_slice(&[7i64, 3, 30, 20, 11, 1]);
    let ranks = few.ranks(&states, &tokens).unwrap();
    assert!(ranks[..3].iter().all(Option::is_some) && ranks[3..] == [None; 3]);
    let loss = |judge: &Judge<'_>| {
        let laws = judge.laws(&sample(6, 2).features).unwrap();
        judge.soft_loss(&states, &laws).unwrap().double_value(&[])
    };
    let same = whole.among(&tokens.narrow(0, 0, 5), 5).unwrap();
    assert!((loss(&whole) - loss(&same)).abs() < 1e-4);
    assert!(whole.among(&Tensor::from_slice(&[99i64]), 1).is_err());
}

#[test]
fn the_linear_guess_is_a_better_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let corpus = own_corpus(&dir.path().join("corpus"), &model, 60);
    for kind in KINDS {
        let recipe = recipe(kind);
        let builder = ParamBuilder::init(3, Kind::Float, Device::Cpu);
        let heads = Heads::new(&builder, &config(kind, &model, 3)).unwrap();
        let task = HeadsTask::new(lesson(&model, &corpus, &recipe, None), heads, builder);
        let before = task.lesson().measure(task.heads(), 1000).unwrap().1;
        super::regress::begin(&task).unwrap();
        let after = task.lesson().measure(task.heads(), 1000).unwrap().1;
        assert!(after < 0.9 * before, "{}: {before} {after}", kind.name());
    }
}

/// Loss and gradients of a batch do not depend on what its padding holds, nor on who else is
/// in it.
#[test]
fn padding_and_neighbours_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let corpus = own_corpus(&dir.path().join("corpus"), &model, 4);
    for kind in KINDS {
        // One pass: which positions begin a chain depends on the shape of the batch.
        let recipe = HeadsRecipe {
            noise: 0.0,
            dropout: 0.0,
            unroll: 1,
            ..recipe(kind)
        };
        let lesson = lesson(&model, &corpus, &recipe, Some(&[1, 2, 3, 5, 8, 13]));
        let builder = ParamBuilder::init(3, Kind::Float, Device::Cpu);
        let heads = Heads::new(&builder, &config(kind, &model, 3)).unwrap();
        let measure = |batch: &Batch| {
            let places = batch.places(1, Row::is_answer);
            let loss = lesson.loss(&heads, batch, &places, Some(1)).unwrap();
            let params: Vec<Tensor> = builder.params().into_iter().map(|p| p.tensor).collect();
            let grads = Tensor::run_backward(&[&loss], &params, false, false);
            let norm: f64 = grads
                .iter()
                .filter(|g| g.defined())
                .map(|g| g.square().sum(Kind::Double).double_value(&[]))
                .sum();
            (loss.double_value(&[]), norm)
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-4 * a.abs(), "{kind:?}: {a} {b}");
        let both = Batch::new(&[(sample(9, 1), 0), (sample(14, 2), 0)], 64).unwrap();
        assert_eq!(both.tokens.size(), [2, 14]);
        let plain = measure(&both);
        let pad = both.features.narrow(0, 0, 1).narrow(1, 9, 5).fill_(37.0);
        assert_eq!(pad.size(), [1, 5, DIM]);
        let _ = both.tokens.narrow(0, 0, 1).narrow(1, 9, 5).fill_(7);
        let filled = measure(&both);
        near(plain.0, filled.0);
        near(plain.1, filled.1);
        let alone = |s| measure(&Batch::new(&[(s, 0)], 64).unwrap()).0;
        if kind != HeadsKind::Eagle {
            near(plain.0, alone(sample(9, 1)) + alone(sample(14, 2)));
        }
    }
}

#[test]
fn batches_hold_parts_of_sequences_in_an_order_that_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let corpus = own_corpus(&dir.path().join("corpus"), &model, 41);
    assert_eq!(held_out(&corpus), [18, 37]);
    let mut sequences = Sequences::new(&corpus, 5);
    assert_eq!(sequences.len(), 39);
    for _ in 0..7 {
        let batch = sequences.next_batch(&corpus, 8, 16, 2).unwrap();
        for row in &batch.rows {
            assert!(row.len <= 16 && row.first + row.len <= 40);
        }
    }
    assert!((sequences.epochs() - 56.0 / 39.0).abs() < 1e-9);
    let cursor = sequences.cursor();
    let next = sequences.next_batch(&corpus, 8, 16, 2).unwrap();
    let mut again = Sequences::new(&corpus, 5);
    again.seek(&cursor).unwrap();
    let same = again.next_batch(&corpus, 8, 16, 2).unwrap();
    assert!(next.features.equal(&same.features) && next.tokens.equal(&same.tokens));
    assert!(again.seek(&json!({"epoch": 0, "index": 99})).is_err());
    assert!(again.seek(&json!(7)).is_err());
    assert!(again.next_batch(&corpus, 1, 16, 100).is_err());

    // Positions that are left of the end of their own row only.
    let batch = Batch::new(&[(sample(3, 1), 0), (sample(6, 2), 4)], 64).unwrap();
    assert_eq!(batch.time(), 3);
    assert_eq!(batch.places(1, |_, _| true), [0, 1, 3]);
    assert_eq!(batch.places(2, |_, _| true), [0]);
    assert_eq!([0, 1, 2, 3, 4].map(|p| batch.left(p)), [2, 1, 0, 1, 0]);
    assert_eq!(batch.places(1, Row::is_regular), [3]);
}

#[test]
fn mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), 1);
    let other = target(&dir.path().join("other"), 2);
    let corpus = own_corpus(&dir.path().join("corpus"), &model, 30);
    let foreign = own_corpus(&dir.path().join("foreign"), &other, 30);
    let out = dir.path().join("out");
    let never = AtomicBool::new(false);
    let good = HeadsRecipe {
        steps: 1,
        ..recipe(HeadsKind::Medusa)
    };
    let fails = |corpus: &DistillCorpus, recipe: &HeadsRecipe, out: &Path, run: &HeadsRun| {
        train_heads(&model, corpus, recipe, out, run, &mut Silent, &never)
            .unwrap_err()
            .to_string()
    };
    let says = |found: String, expected: &str| assert!(found.contains(expected), "{found}");
    says(fails(&foreign, &good, &out, &run()), "another model");
    let tokens: Vec<i32> = vec![1, 2, 99];
    let features = Tensor::zeros([3, DIM], (Kind::Float, Device::Cpu));
    let wide = write_corpus(&dir.path().join("wide"), &[(tokens, 1, features)]);
    says(fails(&wide, &good, &out, &run()), "token 99");
    let narrow = Tensor::zeros([2, 5], (Kind::Float, Device::Cpu));
    let narrow = write_corpus(&dir.path().join("narrow"), &[(vec![1, 2], 1, narrow)]);
    says(fails(&narrow, &good, &out, &run()), "width 5");
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    says(fails(&corpus, &good, &file.join("out"), &run()), "file");
    let minutes = HeadsRun {
        minutes: Some(-1.0),
        ..run()
    };
    says(fails(&corpus, &good, &out, &minutes), "minutes");
    let with = |change: fn(&mut HeadsRecipe)| {
        let mut recipe = good.clone();
        change(&mut recipe);
        fails(&corpus, &recipe, &out, &run())
    };
    says(with(|r| r.depth = 0), "depth = 0");
    says(with(|r| r.steps = 0), "steps = 0");
    says(with(|r| r.context = 1 << 20), "context");
    says(with(|r| r.decay = f64::NAN), "decay");
    says(with(|r| r.dropout = 1.0), "dropout");
    says(with(|r| r.learning_rate = 0.0), "learning_rate");
    says(with(|r| r.kind = HeadsKind::Router), "router");
    assert!(!out.join("heads.json").exists());
    // The good one works, with all tokens drafted, and in as many steps as fit.
    let all = HeadsRecipe {
        draft_vocab: 0,
        ..good
    };
    let short = HeadsRun {
        minutes: Some(0.001),
        ..run()
    };
    let report = train_heads(&model, &corpus, &all, &out, &short, &mut Silent, &never).unwrap();
    assert_eq!((report.draft_vocab, report.coverage), (None, 1.0));
}
