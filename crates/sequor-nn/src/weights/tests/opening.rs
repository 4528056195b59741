//! Finding and recognising weight files.

use std::path::Path;

use super::fixtures::{GgufWriter, checkpoint, pickle, refused, safetensors};
use crate::error::{Error, Result};
use crate::weights::{TensorSource, open};

fn tensors() -> Vec<u8> {
    safetensors(
        r#"{"st":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
        &[],
    )
}

fn gguf() -> Vec<u8> {
    GgufWriter::new().f32s("gg", &[1], &[1.0]).finish()
}

fn torch() -> Vec<u8> {
    checkpoint(
        &pickle::program(&pickle::dict(&[("pt", pickle::floats("0", 1))])),
        &[&[0; 4]],
    )
}

/// A folder with these files, and what opening it gives.
fn folder(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Result<Box<dyn TensorSource>>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let opened = open(folder.path());
    (folder, opened)
}

#[test]
fn formats_are_recognised_by_content() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (bytes, name) in [(tensors(), "st"), (gguf(), "gg"), (torch(), "pt")] {
        std::fs::write(file.path(), bytes).unwrap();
        assert_eq!(open(file.path()).unwrap().names(), [name]);
    }
}

#[test]
fn folders_have_an_order() {
    let index = r#"{"weight_map":{"st":"model.safetensors"}}"#;
    let bin_index = r#"{"weight_map":{"pt":"pytorch_model.bin"}}"#;
    let (tensors, gguf, torch) = (tensors(), gguf(), torch());
    let names = |files: &[(&str, &[u8])]| folder(files).1.unwrap().names();
    let path = |files: &[(&str, &[u8])]| {
        let (_folder, opened) = folder(files);
        opened
            .unwrap()
            .path()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        path(&[
            ("model.safetensors.index.json", index.as_bytes()),
            ("model.safetensors", &tensors),
            ("a.gguf", &gguf)
        ]),
        "model.safetensors.index.json"
    );
    assert_eq!(
        path(&[
            ("model.safetensors", &tensors),
            ("other.safetensors", &tensors)
        ]),
        "model.safetensors"
    );
    assert_eq!(
        names(&[("x.safetensors", &tensors), ("a.gguf", &gguf)]),
        ["st"]
    );
    assert_eq!(
        names(&[("a.gguf", &gguf), ("pytorch_model.bin", &torch)]),
        ["gg"]
    );
    assert_eq!(
        path(&[
            ("pytorch_model.bin.index.json", bin_index.as_bytes()),
            ("pytorch_model.bin", &torch)
        ]),
        "pytorch_model.bin.index.json"
    );
    assert_eq!(
        names(&[("pytorch_model.bin", &torch), ("training_args.bin", b"x")]),
        ["pt"]
    );
    assert_eq!(
        names(&[("weights.pth", &torch), ("config.json", b"{}")]),
        ["pt"]
    );

    refused(
        folder(&[("a.gguf", &gguf), ("b.gguf", &gguf)]).1,
        &["2 weight files", "'a.gguf', 'b.gguf'", "path of one"],
    );
    refused(
        folder(&[("config.json", b"{}")]).1,
        &["no weights in this folder"],
    );
}

#[test]
fn what_is_not_weights_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (content, what) in [
        (&b""[..], "empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        ),
        (b"<!DOCTYPE html>", "web page"),
        (b"{\"weight_map\": {}}", "JSON"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"lmggxxxx", "before GGUF"),
        (b"hello", "neither safetensors nor GGUF"),
    ] {
        std::fs::write(file.path(), content).unwrap();
        refused(open(file.path()), &[file.path().to_str().unwrap(), what]);
    }
}

#[test]
fn paths_that_are_no_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.safetensors");
    assert!(matches!(open(&absent), Err(Error::Io { path, .. }) if path == absent));
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    refused(
        open(folder.path()),
        &["model.safetensors", "found a folder"],
    );
    assert!(open(Path::new("")).is_err());
}

#[cfg(unix)]
#[test]
fn pipes_devices_and_loops_do_not_hang() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.gguf");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    refused(open(&pipe), &["pipe.gguf", "regular file"]);
    refused(open(folder.path()), &["pipe.gguf", "regular file"]);
    refused(open(Path::new("/dev/zero")), &["regular file"]);
    let turn = folder.path().join("turn.pt");
    std::os::unix::fs::symlink(&turn, &turn).unwrap();
    assert!(matches!(open(&turn), Err(Error::Io { .. })));
    // A pipe that an index names.
    let index = folder.path().join("x.index.json");
    std::fs::write(&index, r#"{"weight_map":{"a":"pipe.gguf"}}"#).unwrap();
    refused(open(&index), &["pipe.gguf", "regular file"]);
}
