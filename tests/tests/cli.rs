//! The `sequor` command as a user runs it.

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The command, built on demand by the same cargo profile as the tests.
pub fn sequor() -> Command {
    static BUILD: std::sync::Once = std::sync::Once::new();
    let exe = PathBuf::from(env!("CARGO_BIN_EXE_parity"));
    let dir = exe.parent().unwrap().to_path_buf();
    BUILD.call_once(|| {
        // Cargo builds binaries of this package only; ask it for the command as well.
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args([
                "build",
                "-q",
                "--offline",
                "-p",
                "sequor-cli",
                "--bin",
                "sequor",
                "--target-dir",
            ])
            .arg(dir.parent().unwrap());
        if dir.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(
            cargo.status().unwrap().success(),
            "the sequor command does not build"
        );
    });
    let mut command = Command::new(dir.join("sequor"));
    command.stdin(Stdio::null());
    command
}

pub fn run(args: &[&str]) -> Output {
    sequor().args(args).output().unwrap()
}

pub fn stdout(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

pub fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

/// The last line of standard output as JSON.
pub fn json(o: &Output) -> Value {
    let text = stdout(o);
    let line = text
        .lines()
        .last()
        .unwrap_or_else(|| panic!("no output; standard error: {}", stderr(o)));
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

pub fn bible_lm() -> String {
    root().join("models/bible-lm").display().to_string()
}

#[test]
fn a_text_streams_and_json_tells_everything() {
    let model = bible_lm();
    let args = [
        "generate",
        "text",
        "In the beginning",
        "--model",
        &model,
        "--max-new-tokens",
        "24",
        "--json",
        "--seed",
        "5",
    ];
    let o = run(&args);
    assert!(o.status.success(), "{}", stderr(&o));
    let j = json(&o);
    assert_eq!(
        j["token_ids"].as_array().unwrap().len(),
        j["new_tokens"].as_u64().unwrap() as usize
    );
    assert_eq!(
        (j["seed"].as_u64(), j["finish"].as_str()),
        (Some(5), Some("length"))
    );
    assert!(
        stdout(&o).contains(j["text"].as_str().unwrap()),
        "the text was streamed as well"
    );
    let s = &j["speculation"];
    for key in [
        "method",
        "rounds",
        "target_calls",
        "drafted",
        "accepted",
        "accepted_by_depth",
    ] {
        assert!(!s[key].is_null(), "speculation.{key} is missing");
    }
    assert_eq!(s["method"], "off");
}

#[test]
fn every_method_gives_the_plain_text_and_really_drafts() {
    let (model, prompt) = (
        bible_lm(),
        "And God said, Let there be light: and there was light. And God said, Let there be",
    );
    let draft = format!("draft={}", root().join("models/bible-draft").display());
    for temperature in ["0", "0.8"] {
        let generate = |method: &str| {
            let o = run(&[
                "generate",
                "text",
                prompt,
                "--model",
                &model,
                "--max-new-tokens",
                "48",
                "--json",
                "--ignore-eos",
                "--temperature",
                temperature,
                "--seed",
                "3",
                "--speculate",
                method,
                "--draft-depth",
                "4",
            ]);
            assert!(o.status.success(), "{}", stderr(&o));
            json(&o)
        };
        let plain = generate("off");
        for method in ["prompt-lookup", draft.as_str(), "auto"] {
            let j = generate(method);
            assert_eq!(
                j["token_ids"], plain["token_ids"],
                "{method} at temperature {temperature}"
            );
            if method != "auto" {
                assert!(
                    j["speculation"]["drafted"].as_u64().unwrap() > 0,
                    "{method} never drafted"
                );
            }
        }
    }
}

#[test]
fn stop_texts_and_zero_tokens() {
    let model = bible_lm();
    let whole = json(&run(&[
        "generate",
        "text",
        "And he said",
        "--model",
        &model,
        "--max-new-tokens",
        "40",
        "--json",
    ]));
    let text = whole["text"].as_str().unwrap().to_owned();
    let middle: String = text
        .chars()
        .skip(text.chars().count() / 2)
        .take(5)
        .collect();
    let o = run(&[
        "generate",
        "text",
        "And he said",
        "--model",
        &model,
        "--max-new-tokens",
        "40",
        "--json",
        "--stop",
        &middle,
    ]);
    let j = json(&o);
    assert_eq!(j["finish"], "stop");
    assert_eq!(
        j["text"].as_str().unwrap(),
        &text[..text.find(&middle).unwrap()]
    );
    let j = json(&run(&[
        "generate",
        "text",
        "And he said",
        "--model",
        &model,
        "--max-new-tokens",
        "0",
        "--json",
    ]));
    assert_eq!(
        (j["text"].as_str(), j["new_tokens"].as_u64()),
        (Some(""), Some(0))
    );
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_allowed() {
    let model = bible_lm();
    let cases: [(&[&str], &str); 12] = [
        (&["--temperature", "nan"], "temperature"),
        (&["--temperature", "-1"], "temperature"),
        (&["--top-p", "0"], "top_p"),
        (&["--top-p", "2"], "top_p"),
        (&["--min-p", "-0.5"], "min_p"),
        (&["--repetition-penalty", "0"], "repetition_penalty"),
        (&["--dtype", "int3"], "f32, f16 or bf16"),
        (&["--device", "tpu"], "cpu, cuda"),
        (&["--threads", "0"], "threads"),
        (&["--speculate", "magic"], "prompt-lookup"),
        (&["--draft-depth", "0"], "draft depth"),
        (&["--stop", ""], "stop"),
    ];
    for (extra, word) in cases {
        let mut args = vec!["generate", "text", "hello", "--model", &model];
        args.extend(extra);
        let o = run(&args);
        assert_eq!(o.status.code(), Some(2), "{extra:?}: {}", stderr(&o));
        assert!(stderr(&o).contains(word), "{extra:?}: {}", stderr(&o));
    }
    let o = run(&["generate", "text", "", "--model", &model]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("prompt is empty"));
}

#[test]
fn failures_are_exit_code_1_and_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let expect = |args: &[&str], word: &str| {
        let o = run(args);
        assert_eq!(o.status.code(), Some(1), "{args:?}: {}", stderr(&o));
        assert!(stderr(&o).contains(word), "{args:?}: {}", stderr(&o));
        assert!(!stderr(&o).contains("panicked"), "{}", stderr(&o));
    };
    expect(
        &[
            "generate",
            "text",
            "x",
            "--model",
            &at("nowhere"),
            "--offline",
        ],
        "nowhere",
    );
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    expect(&["generate", "text", "x", "--model", &at("empty")], "empty");
    std::fs::write(dir.path().join("noise.gguf"), b"GGUF\x03\0\0\0garbage").unwrap();
    expect(
        &["generate", "text", "x", "--model", &at("noise.gguf")],
        "noise.gguf",
    );
    expect(&["inspect", &at("noise.gguf")], "noise.gguf");
    let model = bible_lm();
    let long = "word ".repeat(5000);
    expect(&["generate", "text", &long, "--model", &model], "context");
    expect(
        &[
            "forward",
            &model,
            &at("none.safetensors"),
            &at("out.safetensors"),
        ],
        "none.safetensors",
    );
    assert!(!dir.path().join("out.safetensors").exists());
    std::fs::write(dir.path().join("file"), b"").unwrap();
    expect(
        &["demo", "--offline", "--out", &format!("{}/out", at("file"))],
        "--out",
    );
}

#[cfg(unix)]
#[test]
fn arguments_that_are_not_utf8_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let o = sequor()
        .args(["generate", "text"])
        .arg(std::ffi::OsStr::from_bytes(b"\xff\xfe"))
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(2));
    assert!(!stderr(&o).contains("panicked"));
}

#[test]
fn a_conversation_goes_on_line_by_line() {
    let Some(model) = super::model::smollm2() else {
        return;
    };
    let mut child = sequor()
        .args(["chat", "--model"])
        .arg(model)
        .args(["--max-new-tokens", "12"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all("What is the capital of France?\nAnd of Italy?\n/quit\n".as_bytes())
        .unwrap();
    let o = child.wait_with_output().unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stdout(&o).contains("Paris"), "{}", stdout(&o));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_cleanly() {
    use std::io::Read;
    let model = bible_lm();
    let mut child = sequor()
        .args([
            "generate",
            "text",
            "In those days",
            "--model",
            &model,
            "--max-new-tokens",
            "200",
            "--ignore-eos",
            "--temperature",
            "0.9",
            "--json",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut first = [0u8; 1];
    out.read_exact(&mut first).unwrap();
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let status = child.wait().unwrap();
    // The text may have been complete before the signal arrived.
    assert!(matches!(status.code(), Some(130 | 0)), "{status:?}");
    let j: Value = serde_json::from_str(rest.lines().last().unwrap()).unwrap();
    assert_eq!(status.code() == Some(130), j["finish"] == "cancelled");
}

#[test]
fn inspect_doctor_models_and_forward_speak() {
    let model = bible_lm();
    let o = run(&["inspect", &model]);
    assert!(o.status.success(), "{}", stderr(&o));
    let text = stdout(&o);
    for word in [
        "model.embed_tokens.weight",
        "LlamaForCausalLM",
        "M parameters",
        "loads as",
    ] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let j: Value = serde_json::from_str(&stdout(&run(&["inspect", &model, "--json"]))).unwrap();
    assert_eq!(j["loads"], true);

    let o = run(&["doctor"]);
    for word in ["libtorch", "2.11", "threads", "cache"] {
        assert!(
            stdout(&o).contains(word),
            "{word} is not in:\n{}",
            stdout(&o)
        );
    }
    let o = run(&["models", "list"]);
    assert!(
        stdout(&o).contains("smollm2") && stdout(&o).contains("Apache-2.0"),
        "{}",
        stdout(&o)
    );
    assert!(run(&["data", "list"]).status.success());
    let o = run(&["models", "fetch", "smolm2", "--offline"]);
    assert_eq!(o.status.code(), Some(1));
    assert!(
        stderr(&o).contains("smollm2"),
        "the nearest name is offered: {}",
        stderr(&o)
    );

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let case = root().join("tests/parity/llama");
    let o = sequor()
        .arg("forward")
        .arg(&case)
        .arg(case.join("inputs.safetensors"))
        .arg(&out)
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    let outputs = sequor_tests::load_all(&out).unwrap();
    assert_eq!(
        sequor_tests::compare(&case, &outputs).unwrap(),
        Vec::<String>::new()
    );
}

#[test]
fn perplexity_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    std::fs::write(
        &text,
        "In the beginning God created the heavens and the earth. ".repeat(20),
    )
    .unwrap();
    let o = sequor()
        .args(["eval", "perplexity"])
        .arg(&text)
        .args([
            "--model",
            &bible_lm(),
            "--context",
            "64",
            "--stride",
            "32",
            "--json",
        ])
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", stderr(&o));
    let bits = json(&o)["bits_per_byte"].as_f64().unwrap();
    assert!((0.01..3.0).contains(&bits), "{bits}");
    std::fs::write(&text, b"\xff\xfe").unwrap();
    let o = sequor()
        .args(["eval", "perplexity"])
        .arg(&text)
        .args(["--model", &bible_lm()])
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(1));
    assert!(stderr(&o).contains("UTF-8"));
}

#[test]
fn quantized_models_load_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let write = |from: &str, to: &str, out: &str| {
        let o = run(&["quantize", from, "--to", to, "--out", out, "--json"]);
        assert!(o.status.success(), "{}", stderr(&o));
        json(&o)
    };
    let text = |model: &str, weights: &str| {
        let prompt = "In the beginning";
        let args = [
            "generate",
            "text",
            prompt,
            "--model",
            model,
            "--weights",
            weights,
            "--max-new-tokens",
            "24",
        ];
        let o = run(&[&args[..], &["--json"]].concat());
        assert!(o.status.success(), "{}", stderr(&o));
        json(&o)["text"].as_str().unwrap().to_owned()
    };
    let plain = bible_lm();
    // From the folder, converted as it is loaded, and from a file that is so already: the same.
    for format in ["int8", "q8_0", "q4_0", "q4_1"] {
        let folder = at(format);
        let report = write(&plain, format, &folder);
        let error = report["relative_error"].as_f64().unwrap();
        assert!(error > 1e-4 && error < 0.15, "{format}: {error}");
        // (4-bit files keep their tables in 8 bits, which --weights does not.)
        if !format.starts_with("q4") {
            assert_eq!(text(&folder, "auto"), text(&plain, format), "{format}");
        }
        if format != "int8" {
            let gguf = at(&format!("{format}.gguf"));
            write(&plain, format, &gguf);
            assert_eq!(text(&gguf, "auto"), text(&folder, "auto"), "{format}");
            // And back: the same bits in the other container.
            let back = at(&format!("{format}-back"));
            let report = write(&gguf, format, &back);
            assert_eq!(report["relative_error"].as_f64(), Some(0.0));
            assert_eq!(text(&back, "auto"), text(&folder, "auto"), "{format}");
        }
    }
    let same = at("same.gguf");
    write(&plain, "bf16", &same);
    assert_eq!(text(&same, "f32"), text(&plain, "f32"));
    // Rows of 192 are not whole blocks of 256: said, and kept in 8 bits.
    let report = write(&plain, "q4_k", &at("k.gguf"));
    assert!(!report["other"].as_array().unwrap().is_empty());

    for (args, words) in [
        (vec![&plain, "--to", "int8", "--out", &at("i.gguf")], "q8_0"),
        (
            vec![&plain, "--to", "q8_0", "--out", &same],
            "exists already",
        ),
        (vec![&plain, "--to", "q3_k", "--out", &at("x")], "q4_k"),
        (vec![&plain, "--to", "auto", "--out", &at("x")], "auto"),
        (
            vec![&at("absent"), "--to", "q8_0", "--out", &at("x")],
            "absent",
        ),
    ] {
        let args: Vec<&str> = args.into_iter().map(|a| a as &str).collect();
        let o = run(&[&["quantize"][..], &args].concat());
        assert!(!o.status.success(), "{args:?}");
        assert!(stderr(&o).contains(words), "{}", stderr(&o));
    }
    assert!(!dir.path().join("i.gguf").exists() && !dir.path().join("x").exists());
}
