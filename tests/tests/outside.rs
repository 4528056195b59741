//! A crate outside the checkout that depends on one of ours builds and runs after
//! `scripts/setup --for DIR`.

use std::path::Path;
use std::process::Command;

#[test]
fn a_crate_elsewhere_builds_and_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("src")).unwrap();
    let manifest = format!(
        "[package]\nname = \"elsewhere\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[dependencies]\nsequor-nn = {{ path = {:?} }}\n",
        root.join("crates/sequor-nn")
    );
    std::fs::write(at("Cargo.toml"), manifest).unwrap();
    // The same versions as here, so that nothing has to be fetched or compiled again.
    std::fs::copy(root.join("Cargo.lock"), at("Cargo.lock")).unwrap();
    let program = "fn main() {\n    let t = sequor_nn::Tensor::from_slice(&[20i64, 22]);\n    println!(\"{}\", t.sum(sequor_nn::Kind::Int64).int64_value(&[]));\n}\n";
    std::fs::write(at("src/main.rs"), program).unwrap();
    let setup = Command::new(root.join("scripts/setup"))
        .arg("--for")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(
        setup.status.success(),
        "{}",
        String::from_utf8_lossy(&setup.stderr)
    );

    // The target folder of this checkout holds libtorch's binding compiled already.
    let target = Path::new(env!("CARGO_BIN_EXE_parity"))
        .parent()
        .unwrap()
        .parent()
        .unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["run", "-q", "--release", "--offline"])
        .current_dir(dir.path())
        .env("CARGO_TARGET_DIR", target);
    for (name, _) in
        std::env::vars().filter(|(n, _)| n.starts_with("CARGO_PROFILE") || n == "LIBTORCH")
    {
        cargo.env_remove(name);
    }
    let o = cargo.env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    assert_eq!(String::from_utf8_lossy(&o.stdout).trim(), "42");

    // A second set-up changes nothing, and settings that somebody wrote are not overwritten.
    let again = Command::new(root.join("scripts/setup"))
        .arg("--for")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(again.status.success());
    std::fs::write(at(".cargo/config.toml"), "[env]\nMINE = \"1\"\n").unwrap();
    let refused = Command::new(root.join("scripts/setup"))
        .arg("--for")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("add these lines"));
}
