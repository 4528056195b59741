//! Checks the libtorch that is about to be compiled against, because the first
//! sign of a wrong one is otherwise a thousand lines of C++ errors from
//! torch-sys.
//!
//! The package must not depend on torch-sys directly: cargo would then run this
//! script only after the one of torch-sys, too late to explain anything.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The release line that tch 0.24 is generated from.
const WANTED: &str = "2.11.0";
const WANTED_PREFIX: &str = "2.11.";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // With a Python environment torch-sys asks Python for the version; a static
    // libtorch has no shared library to look for.
    let by_python = variable("LIBTORCH_USE_PYTORCH").is_some();
    let is_static = variable("LIBTORCH_STATIC").is_some_and(|v| v != "0" && v != "false");
    let any_version = variable("LIBTORCH_BYPASS_VERSION_CHECK").is_some();
    let root = variable("LIBTORCH").map(PathBuf::from);
    let lib_root = variable("LIBTORCH_LIB").map(PathBuf::from);
    let (Some(root), false, false) = (root, by_python, is_static) else {
        return;
    };

    let version_file = root.join("build-version");
    println!("cargo::rerun-if-changed={}", version_file.display());
    if let Some(found) = missing_library(&lib_root.unwrap_or_else(|| root.clone())) {
        fail(&found);
    } else if let (Some(found), false) = (wrong_version(&version_file), any_version) {
        fail(&found);
    }
}

fn variable(name: &str) -> Option<OsString> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var_os(name)
}

fn missing_library(root: &Path) -> Option<String> {
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let file = match os.as_str() {
        "macos" => "libtorch_cpu.dylib",
        "windows" => "torch_cpu.dll",
        _ => "libtorch_cpu.so",
    };
    let library = root.join("lib").join(file);
    println!("cargo::rerun-if-changed={}", library.display());
    (!library.exists()).then(|| format!("there is no {}", library.display()))
}

fn wrong_version(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let version = text.trim();
    (!version.starts_with(WANTED_PREFIX))
        .then(|| format!("{} says version {version:?}", file.display()))
}

fn fail(found: &str) {
    println!(
        "cargo::error=libtorch {WANTED} is needed (tch 0.24), but {found}: run `make setup`, \
         or point LIBTORCH at a libtorch {WANTED} folder"
    );
}
