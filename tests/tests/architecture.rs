//! The invariants that `docs/architecture.md` marks as checked.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Floors as in the table of `docs/architecture.md`.
const FLOORS: [(&str, u32); 13] = [
    ("sequor-kernels", 0),
    ("sequor-tokenizers", 0),
    ("sequor-nn", 1),
    ("sequor-sampling", 2),
    ("sequor-vq", 2),
    ("sequor-backbone", 3),
    ("sequor-data", 4),
    ("sequor-eval", 4),
    ("sequor-train", 5),
    ("sequor-text", 6),
    ("sequor", 7),
    ("sequor-cli", 8),
    ("sequor-examples", 9),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn floor(name: &str) -> Option<u32> {
    FLOORS.iter().find(|(n, _)| *n == name).map(|(_, f)| *f)
}

/// The workspace's packages, without what they depend on.
fn packages() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    json["packages"].as_array().unwrap().clone()
}

fn normal_dependencies(package: &Value) -> Vec<String> {
    let all = package["dependencies"].as_array().unwrap();
    all.iter()
        .filter(|d| d["kind"].is_null())
        .map(|d| d["name"].as_str().unwrap().to_owned())
        .collect()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap()
}

#[test]
fn dependencies_go_down() {
    for p in packages().iter().filter(|p| name(p) != "sequor-tests") {
        let own = floor(name(p))
            .unwrap_or_else(|| panic!("{} has no floor: add it to the table", name(p)));
        for d in normal_dependencies(p) {
            if let Some(lower) = floor(&d) {
                assert!(
                    lower < own,
                    "{} (floor {own}) depends on {d} (floor {lower})",
                    name(p)
                );
            }
        }
    }
}

#[test]
fn heavy_or_opinionated_dependencies_stay_in_their_rooms() {
    for p in packages() {
        let high = floor(name(&p)).is_none_or(|f| f >= 7);
        for d in normal_dependencies(&p) {
            let allowed = match d.as_str() {
                "tch" | "torch-sys" => matches!(name(&p), "sequor-kernels" | "sequor-nn"),
                "clap" | "tokio" | "axum" | "hyper" | "async-std" => high,
                _ => true,
            };
            assert!(allowed, "{} must not depend on {d}", name(&p));
            assert!(
                name(&p) != "sequor-tokenizers" || floor(&d).is_none(),
                "sequor-tokenizers stands on its own, not on {d}"
            );
        }
    }
}

#[test]
fn unsafe_code_is_in_the_kernels_alone() {
    for p in packages() {
        let manifest = Path::new(p["manifest_path"].as_str().unwrap())
            .parent()
            .unwrap()
            .to_path_buf();
        for target in p["targets"].as_array().unwrap() {
            let kind = target["kind"][0].as_str().unwrap();
            if !matches!(kind, "lib" | "bin") || name(&p) == "sequor-kernels" {
                continue;
            }
            let path = target["src_path"].as_str().unwrap();
            let text = std::fs::read_to_string(path).unwrap();
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{path} must forbid unsafe code"
            );
        }
        assert!(manifest.is_dir());
    }
}

#[test]
fn every_published_crate_presents_itself() {
    for p in packages() {
        if p["publish"].as_array().is_some_and(Vec::is_empty) {
            continue;
        }
        let dir = Path::new(p["manifest_path"].as_str().unwrap())
            .parent()
            .unwrap()
            .to_path_buf();
        assert!(
            dir.join("README.md").is_file(),
            "{} has no README.md",
            name(&p)
        );
        let description = p["description"].as_str().unwrap_or("");
        assert!(description.len() > 20, "{} has no description", name(&p));
        assert_eq!(p["license"], "MIT OR Apache-2.0", "{}", name(&p));
    }
}

#[test]
fn the_document_lists_every_crate_and_floor() {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    for (name, floor) in FLOORS.iter().filter(|(n, _)| *n != "sequor-examples") {
        assert!(
            text.contains(&format!("| {floor} | `{name}` |")),
            "docs/architecture.md does not put {name} on floor {floor}"
        );
    }
}
