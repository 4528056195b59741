//! Training, killed and resumed.

use super::cli::{json, sequor, stderr};
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

const RECIPE: &str = r#"
name = "toy"
description = "A toy."
[data]
source = "text.txt"
held_out = 0.1
[tokenizer]
vocab_size = 300
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 32
[train]
steps = 150
batch = 4
accumulation = 2
context = 32
learning_rate = 0.01
warmup = 5
dropout = 0.1
ema = 0.9
eval_every = 10
log_every = 1
threads = 1
"#;

fn write_recipe(dir: &Path) {
    let words = [
        "the", "a", "dog", "cat", "bird", "sees", "hears", "follows", "and", "then",
    ];
    let mut state = 7u32;
    let text: String = (0..4000)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            format!(
                "{}{}",
                words[(state >> 16) as usize % words.len()],
                if i % 9 == 8 { ".\n" } else { " " }
            )
        })
        .collect();
    std::fs::write(dir.join("text.txt"), text).unwrap();
    std::fs::write(dir.join("recipe.toml"), RECIPE).unwrap();
}

fn train(dir: &Path, out: &str) -> std::process::Command {
    let mut c = sequor();
    c.args(["train", "lm"])
        .arg(dir.join("recipe.toml"))
        .arg("--out")
        .arg(dir.join(out))
        .args(["--offline", "--save-every", "0"]);
    c.stdout(Stdio::null()).stderr(Stdio::null());
    c
}

/// Lines of a log without what a clock says.
fn log(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("training/log.jsonl")).unwrap();
    let line = |l: &str| {
        let mut v: Value = serde_json::from_str(l).unwrap();
        if let Some(map) = v.as_object_mut() {
            map.retain(|k, _| !k.contains("second") && !k.contains("time"));
        }
        v
    };
    text.lines().map(line).collect()
}

#[test]
fn killed_again_and_again_it_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    write_recipe(dir.path());
    let o = train(dir.path(), "whole")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    let mut kills = 0;
    // Delays that fall on different parts of a step, checkpoints included.
    for delay in [900u64, 410, 730, 550, 690, 870, 620, 790, 1010] {
        let mut child = train(dir.path(), "killed").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        kills += 1;
    }
    let o = train(dir.path(), "killed")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(kills > 0, "the run was over before it could be killed");
    let read = |out: &str, file: &str| std::fs::read(dir.path().join(out).join(file)).unwrap();
    assert!(
        read("whole", "model.safetensors") == read("killed", "model.safetensors"),
        "other weights after {kills} kills"
    );
    assert_eq!(
        log(&dir.path().join("whole")),
        log(&dir.path().join("killed"))
    );
    assert!(!dir.path().join("killed/.checkpoints").exists());

    // What was trained can be used.
    let o = sequor()
        .args([
            "generate",
            "text",
            "the dog",
            "--max-new-tokens",
            "8",
            "--json",
            "--model",
        ])
        .arg(dir.path().join("killed"))
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(json(&o)["new_tokens"].as_u64().unwrap() > 0);
}

#[test]
fn recipes_that_cannot_be_meant_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_recipe(dir.path());
    let path = dir.path().join("recipe.toml");
    for (from, to, word) in [
        ("steps = 150", "steps = 0", "steps"),
        (
            "learning_rate = 0.01",
            "learning_rate = -1.0",
            "learning rate",
        ),
        ("dropout = 0.1", "dropout = 1.5", "dropout"),
        ("[train]", "[train]\nspeed = 9", "speed"),
        (
            "source = \"text.txt\"",
            "source = \"nowhere.txt\"",
            "nowhere",
        ),
        (
            "num_attention_heads = 4",
            "num_attention_heads = 5",
            "heads",
        ),
        ("[model]", "[model", "recipe.toml"),
    ] {
        std::fs::write(&path, RECIPE.replace(from, to)).unwrap();
        let o = train(dir.path(), "out")
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert!(
            matches!(o.status.code(), Some(1 | 2)),
            "{to}: {:?}",
            o.status
        );
        assert!(stderr(&o).contains(word), "{to}: {}", stderr(&o));
        assert!(!dir.path().join("out/model.safetensors").exists());
    }
}
