use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sequor_data::{Cache, Resolver};
use sequor_train::progress::StepReport;
use sequor_train::{Progress, Silent};

use super::lm::train_with;
use super::*;
use crate::{Error, Result};

fn text() -> String {
    let words = [
        "the", "a", "dog", "cat", "bird", "sees", "hears", "follows", "and", "then",
    ];
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        words[(state >> 16) as usize % words.len()]
    };
    (0..3000)
        .map(|i| format!("{}{}", next(), if i % 9 == 8 { ".\n" } else { " " }))
        .collect()
}

const RECIPE: &str = r#"
    name = "toy"
    description = "A toy."
    [data]
    source = "text.txt"
    held_out = 0.1
    [tokenizer]
    vocab_size = 300
    [model]
    hidden_size = 16
    intermediate_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    max_position_embeddings = 32
    [train]
    steps = 30
    batch = 4
    accumulation = 2
    context = 16
    learning_rate = 0.02
    warmup = 5
    dropout = 0.1
    ema = 0.9
    eval_every = 10
    log_every = 5
    threads = 1
"#;

fn recipe(base: &Path) -> LmRecipe {
    std::fs::write(base.join("text.txt"), text()).unwrap();
    LmRecipe::from_toml(RECIPE, base.to_owned()).unwrap()
}

fn train(
    recipe: &LmRecipe,
    out: &Path,
    run: &LmRun,
    progress: &mut dyn Progress,
    cancel: &AtomicBool,
) -> Result<LmReport> {
    train_with(recipe, &Resolver::empty(None), out, run, progress, cancel)
}

struct StopAt<'a>(u64, &'a AtomicBool);

impl Progress for StopAt<'_> {
    fn step(&mut self, report: &StepReport) {
        self.1.store(report.step >= self.0, Ordering::Relaxed);
    }
}

#[test]
fn a_recipe_becomes_a_model_that_learned_and_interruption_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let never = AtomicBool::new(false);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let report = train(&recipe, &a, &LmRun::default(), &mut Silent, &never).unwrap();
    // A uniform guess over 300 tokens would be far above.
    assert!(report.bits_per_byte < 2.2, "{}", report.bits_per_byte);
    assert_eq!((report.steps, report.tokens), (30, 30 * 2 * 4 * 16));

    let cancel = AtomicBool::new(false);
    let stopped = train(
        &recipe,
        &b,
        &LmRun::default(),
        &mut StopAt(17, &cancel),
        &cancel,
    );
    assert!(matches!(stopped, Err(Error::Cancelled)));
    let again = train(&recipe, &b, &LmRun::default(), &mut Silent, &never)
        .unwrap_err()
        .to_string();
    assert!(again.contains("17 steps"), "{again}");
    let run = LmRun {
        resume: true,
        keep_checkpoints: true,
        ..LmRun::default()
    };
    let resumed = train(&recipe, &b, &run, &mut Silent, &never).unwrap();
    let same = |r: LmReport| LmReport {
        seconds: 0.0,
        folder: PathBuf::new(),
        ..r
    };
    assert_eq!(same(report), same(resumed));
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        let read = |d: &Path| std::fs::read(d.join(file)).unwrap();
        assert_eq!(read(&a), read(&b), "{file}");
    }
    assert!(b.join(".checkpoints").exists() && !a.join(".checkpoints").exists());

    // The folder is complete: it loads like any other, and its recipe says the same again.
    for file in [
        "generation_config.json",
        "tokenizer_config.json",
        "README.md",
        "training/log.jsonl",
        "training/loss.png",
    ] {
        assert!(a.join(file).metadata().unwrap().len() > 20, "{file}");
    }
    let config = sequor_backbone::causal_lm::read_config(&a).unwrap();
    assert_eq!((config.eos, config.bos), (vec![0], Some(0)));
    sequor_backbone::CausalLm::load(&a, sequor_nn::device::DType::F32, sequor_nn::Device::Cpu)
        .unwrap();
    let card = std::fs::read_to_string(a.join("README.md")).unwrap();
    assert!(
        card.contains("| **all** |") && card.contains("sequor train lm"),
        "{card}"
    );
    let written = LmRecipe::from_file(&a.join("recipe.toml")).unwrap();
    assert_eq!(
        LmRecipe {
            base: recipe.base.clone(),
            ..written
        },
        recipe
    );
}

#[test]
fn sixteen_bit_training_learns_and_uses_an_existing_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let first = recipe(dir.path());
    let never = AtomicBool::new(false);
    let short = LmRecipe {
        train: OptimisationRecipe {
            steps: 1,
            warmup: 0,
            ..first.train.clone()
        },
        ..first.clone()
    };
    train(
        &short,
        &dir.path().join("first"),
        &LmRun::default(),
        &mut Silent,
        &never,
    )
    .unwrap();
    let second = LmRecipe {
        tokenizer: TokenizerRecipe {
            vocab_size: None,
            path: Some("first/tokenizer.json".into()),
        },
        train: OptimisationRecipe {
            dtype: Dtype::Bf16,
            ..first.train.clone()
        },
        ..first
    };
    second.validate().unwrap();
    let report = train(
        &second,
        &dir.path().join("second"),
        &LmRun::default(),
        &mut Silent,
        &never,
    )
    .unwrap();
    assert!(report.bits_per_byte < 2.2, "{}", report.bits_per_byte);
    let read = |d: &str| std::fs::read(dir.path().join(d).join("tokenizer.json")).unwrap();
    assert_eq!(read("first"), read("second"));
}

#[test]
fn mistakes_in_recipes_are_named() {
    let message = |from: &str, to: &str| {
        assert!(RECIPE.contains(from));
        LmRecipe::from_toml(&RECIPE.replace(from, to), PathBuf::new())
            .unwrap_err()
            .to_string()
    };
    for (from, to, expected) in [
        (
            "steps = 30",
            "steps = 0",
            "train.steps = 0 must lie in 1..=",
        ),
        (
            "context = 16",
            "context = 64",
            "train.context = 64 must lie in 1..=32",
        ),
        ("dropout = 0.1", "dropout = 1.0", "train.dropout"),
        ("ema = 0.9", "ema = 1.5", "train.ema"),
        ("warmup = 5", "warmup = 50", "warm-up of 50"),
        (
            "learning_rate = 0.02",
            "learning_rate = -1.0",
            "learning rate -1",
        ),
        ("batch = 4", "batchsize = 4", "batchsize"),
        ("held_out = 0.1", "held_out = 1.5", "data.held_out = 1.5"),
        ("held_out = 0.1", "held_out = []", "data.held_out"),
        ("held_out = 0.1", "held_out = \"Ruth\"", "list of names"),
        ("vocab_size = 300", "", "vocab_size or path"),
        ("vocab_size = 300", "vocab_size = 12", "257..="),
        ("hidden_size = 16", "hidden_size = 15", "does not divide"),
        ("batch = 4", "batch = 65536", "batch times train.context"),
        (
            "hidden_size = 16",
            "hidden_size = 65536",
            "weights of [model]",
        ),
        (
            "num_hidden_layers = 2",
            "num_hidden_layers = 2000000000",
            "num_hidden_layers",
        ),
        ("name = \"toy\"", "name = \"../toy\"", "name"),
        ("[train]", "[training]", "training"),
    ] {
        let found = message(from, to);
        assert!(found.contains(expected), "{to}: {found}");
    }
    let no_data = LmRecipe::from_toml(RECIPE, "/nowhere".into()).unwrap();
    let cache = Cache::at("/nowhere");
    let error = train_with(
        &no_data,
        &Resolver::empty(Some(cache)),
        Path::new("/nowhere/out"),
        &LmRun::default(),
        &mut Silent,
        &AtomicBool::new(false),
    );
    assert!(error.unwrap_err().to_string().contains("text.txt"));
}

#[test]
fn the_recipes_of_the_bundled_models_are_valid() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    for name in ["bible-lm", "bible-draft"] {
        let recipe = LmRecipe::from_file(&models.join(name).join("recipe.toml")).unwrap();
        assert_eq!(recipe.name, name);
    }
}
