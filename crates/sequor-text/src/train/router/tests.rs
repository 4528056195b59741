use super::task::Text;
use super::*;
use sequor_backbone::routers::{GateRule, RoutedLm, load_adapted};
use sequor_backbone::routers::{Gating, gated_forward};
use sequor_backbone::{Decoder, DecoderConfig};
use sequor_nn::weights::{Safetensors, TensorSource, write_safetensors};
use sequor_sampling::{GenerationConfig, Generator, Options};
use sequor_train::Silent;
use std::sync::atomic::Ordering;

const VOCAB: u32 = 32;

/// A random model in a folder.
fn model(dir: &Path) {
    let config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "head_dim": 6});
    let mut c = DecoderConfig::from_json(&config).unwrap();
    c.init_std = 0.25;
    let params = ParamBuilder::init(11, Kind::Float, Device::Cpu);
    Decoder::new(&params, &c).unwrap();
    let params = params.params();
    let list: Vec<(&str, &Tensor)> = params
        .iter()
        .map(|p| (p.name.as_str(), &p.tensor))
        .collect();
    write_safetensors(&dir.join("model.safetensors"), &list, &Default::default()).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// A corpus of the model's greedy text behind arbitrary prompts.
fn corpus(dir: &Path, model: &CausalLm) -> DistillCorpus {
    let (mut tokens, mut starts, mut prompts) = (Vec::new(), vec![0i32], Vec::new());
    let config = GenerationConfig {
        do_sample: Some(false),
        max_new_tokens: Some(14),
        ..Default::default()
    };
    let generator = Generator::new(model, Options::from(config)).unwrap();
    for i in 0..20u32 {
        let prompt: Vec<u32> = (0..6 + i % 4).map(|j| (j * j + i * 5) % VOCAB).collect();
        let said = generator
            .generate(&prompt, None, |_| std::ops::ControlFlow::Continue(()))
            .unwrap();
        prompts.push(prompt.len() as i32);
        tokens.extend(prompt.iter().chain(&said.tokens).map(|&t| t as i32));
        starts.push(tokens.len() as i32);
    }
    let features = Tensor::zeros([tokens.len() as i64, 24], (Kind::Half, Device::Cpu));
    let ints = |v: &[i32]| Tensor::from_slice(v);
    write_safetensors(
        &dir.join("shard-00000.safetensors"),
        &[
            ("tokens", &ints(&tokens)),
            ("starts", &ints(&starts)),
            ("prompt_lens", &ints(&prompts)),
            ("features", &features),
        ],
        &Default::default(),
    )
    .unwrap();
    DistillCorpus::open(dir).unwrap()
}

fn recipe() -> RouterRecipe {
    RouterRecipe {
        kept: 0.67,
        steps: 16,
        adapter_steps: 24,
        context: 32,
        learning_rate: 2e-2,
        adapter_rate: 1e-2,
        held_out: 5,
        dropout: 0.0,
        ..RouterRecipe::default()
    }
}

#[test]
fn both_phases_leave_a_folder_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let base = CausalLm::load(dir.path(), DType::F32, Device::Cpu).unwrap();
    let data = tempfile::tempdir().unwrap();
    let corpus = corpus(data.path(), &base);
    let run = HeadsRun {
        base: "tiny".into(),
        threads: Some(1),
        ..HeadsRun::default()
    };
    let out = dir.path().join("router");
    let train = |out: &Path,
                 recipe: &RouterRecipe,
                 run: &HeadsRun,
                 progress: &mut dyn Progress,
                 cancel: &AtomicBool| {
        train_router(dir.path(), &corpus, out, recipe, run, progress, cancel)
    };
    let report = train(&out, &recipe(), &run, &mut Silent, &AtomicBool::new(false)).unwrap();
    assert_eq!((report.layers, report.layers_kept), (6, 4.0));
    let loss = |name: &str| report.losses[name];
    assert!(loss("full") < loss("routers"), "{:?}", report.losses);
    assert!(
        loss("routers + adapter") < loss("routers"),
        "{:?}",
        report.losses
    );
    assert_eq!(report.losses.len(), 6);

    let folder = RouterFolder::open(&out).unwrap();
    folder.check(&base).unwrap();
    assert_eq!(folder.config.static_best(4).unwrap().len(), 4);
    let adapted = load_adapted(
        dir.path(),
        folder.adapter().unwrap(),
        DType::F32,
        Device::Cpu,
    )
    .unwrap();
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("chosen by the routers, with the adapter"),
        "{card}"
    );
    assert!(
        !out.join(CHECKPOINTS)
            .join("routers")
            .join("LATEST")
            .exists()
    );

    // What is measured is what a user gets: the same loss through the cached model.
    let policy = Policy {
        keep: Some(4),
        rule: GateRule::Majority,
        protect: true,
    };
    let lesson = Lesson::new(&corpus, &recipe(), &base).unwrap();
    let task = RouterTask {
        model: &adapted,
        routers: &folder.routers,
        builder: &ParamBuilder::init(0, Kind::Float, Device::Cpu),
        recipe: &recipe(),
        policy,
        lesson: &lesson,
        phase: Phase::Adapter,
        steps: 1,
        next: 0,
    };
    let again = task.measure(&lesson.held_out).unwrap().loss;
    assert!((again - loss("routers + adapter")).abs() < 1e-4, "{again}");
    let routed = RoutedLm::new(
        &adapted,
        Some(folder.routers),
        &LayerSelection::Routed(policy),
        Prefill::Full,
    )
    .unwrap();
    let config = GenerationConfig {
        do_sample: Some(false),
        max_new_tokens: Some(5),
        ..Default::default()
    };
    let generator = Generator::new(&routed, Options::from(config)).unwrap();
    let said = generator
        .generate(&[1, 2, 3], None, |_| std::ops::ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(said.tokens.len(), 5);

    // Interrupted in either phase, the run ends in the same bytes.
    struct Stop<'a>(u64, u64, &'a AtomicBool);
    impl Progress for Stop<'_> {
        fn step(&mut self, _: &sequor_train::progress::StepReport) {
            self.0 += 1;
            if self.0 == self.1 {
                self.2.store(true, Ordering::Relaxed);
            }
        }
    }
    let other = dir.path().join("again");
    let resume = HeadsRun {
        resume: true,
        keep_checkpoints: true,
        ..run.clone()
    };
    for stop in [5, 20] {
        let cancel = AtomicBool::new(false);
        let stopped = train(
            &other,
            &recipe(),
            &resume,
            &mut Stop(0, stop, &cancel),
            &cancel,
        );
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
        assert!(!other.join("heads.json").exists());
    }
    train(
        &other,
        &recipe(),
        &resume,
        &mut Silent,
        &AtomicBool::new(false),
    )
    .unwrap();
    for file in ["heads.safetensors", "adapter_model.safetensors"] {
        let [a, b] = [&out, &other].map(|d| Safetensors::open(&d.join(file)).unwrap());
        for name in a.names() {
            assert!(
                a.load(&name).unwrap().equal(&b.load(&name).unwrap()),
                "{name}"
            );
        }
    }

    // A budget of time, no adapter, gated prefill.
    let small = RouterRecipe {
        adapter_steps: 0,
        prefill: Prefill::Gated,
        ..recipe()
    };
    let short = HeadsRun {
        minutes: Some(0.01),
        ..run
    };
    let third = dir.path().join("third");
    let report = train(&third, &small, &short, &mut Silent, &AtomicBool::new(false)).unwrap();
    assert!(report.steps >= 1 && report.adapter_parameters == 0);
    assert!(RouterFolder::open(&third).unwrap().adapter().is_none());
}

#[test]
fn the_budget_pulls_the_gates() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let base = CausalLm::load(dir.path(), DType::F32, Device::Cpu).unwrap();
    let builder = ParamBuilder::init(0, Kind::Float, Device::Cpu);
    let routers = Routers::new(&builder, 6, 24).unwrap();
    begin(&builder).unwrap();
    let texts = vec![
        Text {
            tokens: (0..20).collect(),
            prompt_len: 8
        };
        8
    ];
    let recipe = RouterRecipe {
        kept: 0.5,
        ..recipe()
    };
    let lesson = Lesson::split(texts, &recipe).unwrap();
    let task = RouterTask {
        model: &base,
        routers: &routers,
        builder: &builder,
        recipe: &recipe,
        policy: recipe.policy(6),
        lesson: &lesson,
        phase: Phase::Routers,
        steps: 10,
        next: 0,
    };
    // 3 layers are protected, 3 begin at sigmoid(2): 10 * (0.940 - 0.5)^2 + 0.01 * 0.881.
    let gating = Gating::Soft {
        protect: true,
        straight_through: false,
    };
    let pass = gated_forward(
        base.decoder(),
        &routers,
        &lesson.texts[0].tokens,
        8,
        Prefill::Full,
        gating,
    )
    .unwrap();
    let r: f64 = 1.0 / (1.0 + (-2f64).exp());
    let budget = 10.0 * ((3.0 + 3.0 * r) / 6.0 - 0.5f64).powi(2) + 0.01 * r;
    let close = |step: u64, expected: f64| {
        let got = task.pressure(&pass, step).unwrap().double_value(&[]);
        assert!((got - expected).abs() < 1e-4, "{got} {expected}");
    };
    close(0, budget);
    close(5, budget + 0.05 * r * (1.0 - r));
    close(9, budget + 0.05 * r * (1.0 - r));
    let scores = task.prompt_scores(&lesson.texts[0]).unwrap();
    assert!(scores.iter().all(|s| (s - r).abs() < 1e-5));
}

#[test]
fn recipes_and_corpora_that_cannot_be_meant_are_refused() {
    RouterRecipe::default().validate().unwrap();
    for bad in [
        RouterRecipe {
            kept: 0.0,
            ..recipe()
        },
        RouterRecipe {
            steps: 0,
            ..recipe()
        },
        RouterRecipe {
            rank: 0,
            ..recipe()
        },
        RouterRecipe {
            dropout: 1.0,
            ..recipe()
        },
        RouterRecipe {
            budget_weight: f64::NAN,
            ..recipe()
        },
        RouterRecipe {
            learning_rate: 0.0,
            ..recipe()
        },
        RouterRecipe {
            targets: vec![],
            ..recipe()
        },
    ] {
        assert!(bad.validate().is_err());
    }
    assert!(Lesson::split(Vec::new(), &recipe()).is_err());
    let one = vec![Text {
        tokens: (0..20).collect(),
        prompt_len: 8,
    }];
    assert!(Lesson::split(one, &recipe()).is_err());
    let many = vec![
        Text {
            tokens: (0..20).collect(),
            prompt_len: 8
        };
        40
    ];
    let lesson = Lesson::split(many, &recipe()).unwrap();
    assert_eq!((lesson.held_out.len(), lesson.texts.len()), (5, 35));
}
