use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use sequor_backbone::transfer::{TransferDrafter, TransferLm};
use sequor_backbone::{Decoder, DecoderConfig};
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::weights::write_safetensors;
use sequor_nn::{Tensor, tch};
use sequor_sampling::generate::{DepthPolicy, Generator, Options};
use sequor_sampling::{
    GenerationConfig, Layout, LogitRows, SequenceState, Step, TargetModel, Topology,
};
use sequor_train::progress::StepReport;
use sequor_train::{Silent, StepCtx};

use super::super::heads::Batch;
use super::*;
use crate::Error;

const VOCAB: usize = 32;

/// A small decoder, on disk and loaded as any other. With `simple`, states are little more than
/// their own token, and the next token follows from the last one alone.
fn target(dir: &Path, simple: bool) -> CausalLm {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": VOCAB, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "initializer_range": if simple { 0.02 } else { 0.7 },
    });
    let config = DecoderConfig::from_json(&json).unwrap();
    let builder = ParamBuilder::init(5, Kind::Float, Device::Cpu);
    let _decoder = Decoder::new(&builder, &config).unwrap();
    let params = builder.params();
    let mut tensors: BTreeMap<&str, Tensor> = params
        .iter()
        .map(|p| (&p.name[..], p.tensor.detach()))
        .collect();
    if simple {
        let n = VOCAB as i64;
        let eye = Tensor::eye(n, (Kind::Float, Device::Cpu));
        // Row v of the head reads the one token that v follows: v = 5 u + 3 visits them all.
        let before: Vec<i64> = (0..n).map(|v| (v - 3).rem_euclid(n) * 13 % n).collect();
        let head = eye.index_select(0, &Tensor::from_slice(&before)) * 2.0;
        tensors.insert("model.embed_tokens.weight", eye);
        tensors.insert("lm_head.weight", head);
    }
    let tensors: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    std::fs::create_dir_all(dir).unwrap();
    write_safetensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    CausalLm::load(dir, sequor_nn::device::DType::F32, Device::Cpu).unwrap()
}

/// The model's own greedy text after a few random tokens, with its states.
fn corpus(dir: &Path, model: &CausalLm, count: usize) -> DistillCorpus {
    let (mut tokens, mut starts, mut features) = (Vec::new(), vec![0i32], Vec::new());
    for i in 0..count {
        let mut random = Key::new(9, i as u64).stream(0, Purpose::Test);
        let mut text: Vec<u32> = (0..3).map(|_| random.below(VOCAB as u64) as u32).collect();
        let mut state = model.new_state(1).unwrap();
        for n in 2..26 {
            let fed = if n == 2 { &text[..] } else { &text[n..] };
            let step = Step {
                slot: 0,
                tokens: fed,
                layout: Layout::Chain,
                logits: LogitRows::Last,
                features: true,
            };
            let output = model.forward(&[step], &mut state).unwrap().remove(0);
            let path: Vec<usize> = (0..fed.len()).collect();
            SequenceState::commit(&mut state, 0, &path).unwrap();
            features.push(output.features.unwrap());
            let row = output.logits.row(0).unwrap();
            let best = (0..VOCAB)
                .max_by(|&a, &b| row[a].total_cmp(&row[b]))
                .unwrap();
            text.push(best as u32);
        }
        text.pop();
        tokens.extend(text.iter().map(|&t| t as i32));
        starts.push(tokens.len() as i32);
    }
    std::fs::create_dir_all(dir).unwrap();
    let prompts = vec![3i32; count];
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

fn recipe() -> TransferRecipe {
    TransferRecipe {
        draft_vocab: 0,
        steps: 150,
        context: 24,
        learning_rate: 1e-2,
        ..TransferRecipe::common(2, 2)
    }
}

fn run() -> HeadsRun {
    HeadsRun {
        base: "toy".into(),
        licence: "MIT".into(),
        threads: Some(1),
        command: "sequor train heads --kind hidden-transfer".into(),
        ..HeadsRun::default()
    }
}

#[test]
fn maps_learn_and_their_folder_drafts() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), true);
    let corpus = corpus(&dir.path().join("corpus"), &model, 100);
    let never = AtomicBool::new(false);
    let out = dir.path().join("maps");
    let recipe = TransferRecipe {
        draft_vocab: 30,
        learning_rate: 5e-2,
        ..recipe()
    };
    let plan = Plan::new(&model, &corpus, &recipe, &run()).unwrap();
    let before = plan.task().unwrap().evaluate().unwrap();
    let report =
        train_transfer(&model, &corpus, &recipe, &out, &run(), &mut Silent, &never).unwrap();
    let (loss, first) = (before["held_out_loss"], before["top1"]);
    assert!(
        report.held_out_loss < 0.3 * loss,
        "{} of {loss}",
        report.held_out_loss
    );
    assert!(
        report.heads.iter().all(|h| h.top1 > 0.85) && first < 0.1,
        "{:?} from {first}",
        report.heads
    );
    assert!(report.heads[0].top1 <= report.heads[0].top3);
    assert_eq!((report.heads.len(), report.steps), (2, 150));
    for file in [
        "heads.json",
        "heads.safetensors",
        "README.md",
        "training/report.json",
    ] {
        assert!(out.join(file).metadata().unwrap().len() > 50, "{file}");
    }
    assert!(!out.join(".checkpoints").exists());
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("| 3 | 2 |") && card.contains("--kind hidden-transfer"),
        "{card}"
    );

    // What is stored is what was measured: a chain of it is accepted as often as promised.
    let maps = HiddenTransfer::load(&out, &model).unwrap();
    assert_eq!(maps.config().accuracies.len(), 2);
    assert_eq!(maps.draft_tokens().map(<[u32]>::len), Some(30));
    let lm = TransferLm::new(&model, &maps).unwrap();
    let options = Options {
        depth: DepthPolicy::Fixed(1),
        ignore_eos: true,
        ..Options::from(GenerationConfig::default()).max_new_tokens(24)
    };
    let generator = Generator::new(&lm, options.clone()).unwrap();
    let plain = Generator::new(&model, options).unwrap();
    let go = |_| ControlFlow::Continue(());
    let (mut accepted, mut rounds) = (0, 0);
    for i in 0..20u64 {
        let mut random = Key::new(77, i).stream(0, Purpose::Test);
        let prompt: Vec<u32> = (0..3).map(|_| random.below(VOCAB as u64) as u32).collect();
        let drafter = TransferDrafter::new(&model, &maps, Topology::Chain).unwrap();
        let drafted = generator
            .generate(&prompt, Some(Box::new(drafter)), go)
            .unwrap();
        assert_eq!(
            drafted.tokens,
            plain.generate(&prompt, None, go).unwrap().tokens
        );
        accepted += drafted.report.accepted;
        rounds += drafted.report.rounds;
    }
    let share = accepted as f64 / rounds as f64;
    assert!(
        (share - report.heads[0].top1).abs() < 0.12,
        "{share} and {:?}",
        report.heads
    );
}

struct StopAt<'a>(u64, &'a AtomicBool);

impl Progress for StopAt<'_> {
    fn step(&mut self, report: &StepReport) {
        self.1.store(report.step >= self.0, Ordering::Relaxed);
    }
}

#[test]
fn interruption_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), false);
    let corpus = corpus(&dir.path().join("corpus"), &model, 25);
    let recipe = TransferRecipe {
        steps: 10,
        batch: 2,
        ..recipe()
    };
    let never = AtomicBool::new(false);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let whole = train_transfer(&model, &corpus, &recipe, &a, &run(), &mut Silent, &never).unwrap();
    let cancel = AtomicBool::new(false);
    let stopped = train_transfer(
        &model,
        &corpus,
        &recipe,
        &b,
        &run(),
        &mut StopAt(6, &cancel),
        &cancel,
    );
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert!(!b.join("heads.json").exists());
    let again = HeadsRun {
        resume: true,
        minutes: Some(1e-3),
        ..run()
    };
    let resumed =
        train_transfer(&model, &corpus, &recipe, &b, &again, &mut Silent, &never).unwrap();
    assert_eq!(
        (whole.heads, whole.positions),
        (resumed.heads, resumed.positions)
    );
    for file in ["heads.safetensors", "heads.json"] {
        let read = |d: &Path| std::fs::read(d.join(file)).unwrap();
        assert_eq!(read(&a), read(&b), "{file}");
    }
}

/// Maps that give the true state of the token after an anchor are right about it: the loss of
/// offset `j` there is nothing, and that of the same guess one place further on is not.
#[test]
fn an_offset_is_held_to_the_law_of_its_own_token() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), false);
    let corpus = corpus(&dir.path().join("corpus"), &model, 4);
    let recipe = TransferRecipe {
        layers: vec![3, 3],
        ..recipe()
    };
    let plan = Plan::new(&model, &corpus, &recipe, &run()).unwrap();
    let task = plan.task().unwrap();
    let params = task.params();
    let (lesson, maps) = task.into_parts();
    let batch = Batch::new(&[(corpus.read(0).unwrap(), 0)], 24).unwrap();
    let tokens: Vec<i64> = Vec::try_from(batch.tokens.reshape([-1])).unwrap();
    let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).collect();
    // Behind the last layer a pseudo state is normed and read: the state before that norm.
    let _no_grad = tch::no_grad_guard();
    let anchor = 7;
    let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    let positions: Vec<i64> = (0..ids.len() as i64).collect();
    let truth = model
        .decoder()
        .forward(
            &sequor_backbone::decoder::Input::Ids(&Tensor::from_slice(&ids)),
            &positions,
            &mut sequor_nn::attention::Dense::new(
                1,
                ids.len() as i64,
                sequor_nn::mask::Mask::Causal,
            ),
            0.0,
            &[2],
        )
        .unwrap();
    for p in &params {
        let state = p
            .name
            .strip_prefix("transfer.")
            .and_then(|n| n.strip_suffix(".bias"));
        let _ = p.tensor.shallow_clone().zero_();
        if let Some(j) = state {
            let j: i64 = j.parse().unwrap();
            p.tensor
                .shallow_clone()
                .copy_(&truth.taps[0].get(anchor as i64 + 1 + j));
        }
    }
    let at = |anchor: usize| -> Vec<f64> {
        let guesses = lesson.guess(&maps, &batch, &[anchor]).unwrap();
        guesses
            .divergences
            .iter()
            .map(|d| d.double_value(&[]))
            .collect()
    };
    let (right, late, early) = (at(anchor), at(anchor + 1), at(anchor - 1));
    assert!(right.iter().all(|d| d.abs() < 1e-4), "{right:?}");
    assert!(
        late.iter().chain(&early).all(|d| *d > 0.05),
        "{late:?} {early:?}"
    );
    let ranks = |j: usize| {
        let guesses = lesson.guess(&maps, &batch, &[anchor]).unwrap();
        let token = Tensor::from_slice(&[i64::from(tokens[anchor + 2 + j])]);
        lesson.judge.ranks(&guesses.states[j], &token).unwrap()
    };
    // Greedy text: the best guess is the token that stands there.
    assert_eq!([ranks(0), ranks(1)], [[Some(0)], [Some(0)]]);
}

#[test]
fn anchors_are_a_part_of_the_answer_and_the_draw_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), false);
    let corpus = corpus(&dir.path().join("corpus"), &model, 4);
    let recipe = TransferRecipe {
        anchors: 0.25,
        ..recipe()
    };
    let plan = Plan::new(&model, &corpus, &recipe, &run()).unwrap();
    let mut task = plan.task().unwrap();
    let cursor = task.cursor();
    let ctx = StepCtx {
        step: 0,
        micro: 0,
        seed: 3,
    };
    let first = task.loss(&ctx).unwrap();
    // Tokens 2 to 20 of 24 are followed by all that two offsets need: a quarter of 20.
    assert_eq!(first.targets, 5);
    task.set_cursor(&cursor).unwrap();
    let same = task.loss(&ctx).unwrap();
    assert_eq!(first.sum.double_value(&[]), same.sum.double_value(&[]));
    task.set_cursor(&cursor).unwrap();
    let other = task.loss(&StepCtx { seed: 4, ..ctx }).unwrap();
    assert_ne!(first.sum.double_value(&[]), other.sum.double_value(&[]));
    let (lesson, _) = task.into_parts();
    let batch = Batch::new(&[(corpus.read(1).unwrap(), 0)], 24).unwrap();
    let anchors = lesson.anchors(&batch, 1);
    assert!(
        anchors.is_sorted() && anchors.iter().all(|&n| (2..=21).contains(&n)),
        "{anchors:?}"
    );
}

#[test]
fn recipes_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let model = target(&dir.path().join("model"), false);
    let c = model.config();
    assert!(
        TransferRecipe::new(c).validate(c).is_err(),
        "256 tokens do not fit a context of 128"
    );
    assert_eq!(TransferRecipe::new(c).layers, [3, 3, 3]);
    assert!(recipe().validate(c).is_ok());
    let weights = recipe().weights();
    assert!((weights[1] / weights[0] - 0.8).abs() < 1e-12);
    type Change = fn(&mut TransferRecipe);
    let broken: [(&str, Change); 8] = [
        ("transfer_layers", |r| r.layers = vec![4]),
        ("transfer_layers", |r| r.layers.clear()),
        ("steps", |r| r.steps = 0),
        ("batch", |r| r.batch = 0),
        ("context", |r| r.context = 2),
        ("anchors", |r| r.anchors = 0.0),
        ("decay", |r| r.decay = f64::NAN),
        ("learning_rate", |r| r.learning_rate = 2.0),
    ];
    for (field, change) in broken {
        let mut bad = recipe();
        change(&mut bad);
        let e = bad.validate(c).unwrap_err().to_string();
        assert!(e.contains(field), "{field}: {e}");
    }
}
