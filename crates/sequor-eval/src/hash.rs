//! What a measurement was made with, as hashes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Endings of files that hold weights.
const WEIGHTS: [&str; 5] = ["safetensors", "gguf", "bin", "pt", "pth"];

/// SHA-256 of `bytes` as 64 hex digits.
#[must_use]
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes).as_slice())
}

/// SHA-256 of a file as 64 hex digits.
///
/// # Errors
/// [`Error::Io`].
pub fn sha256_file(path: &Path) -> Result<String> {
    let io = |e| Error::io(path, e);
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path).map_err(io)?, &mut hash).map_err(io)?;
    Ok(hex(hash.finalize().as_slice()))
}

/// SHA-256 of every file with weights of the model `name` at `path`, a file or a folder.
/// The only file of a model goes by `name`, each of several by `name/file`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] for a folder without weights.
pub fn weights_sha256(name: &str, path: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
            let file = entry.map_err(|e| Error::io(path, e))?.path();
            let ending = file.extension().and_then(|e| e.to_str());
            if ending.is_some_and(|e| WEIGHTS.contains(&e)) && file.is_file() {
                files.push(file);
            }
        }
        files.sort();
    } else {
        files.push(path.to_owned());
    }
    if files.is_empty() {
        let endings = WEIGHTS.join(", .");
        return Err(Error::Input(format!(
            "{} holds no weights (.{endings})",
            path.display()
        )));
    }
    let only = files.len() == 1;
    let mut hashes = BTreeMap::new();
    for file in files {
        let key = match file.file_name() {
            Some(f) if !only => format!("{name}/{}", f.to_string_lossy()),
            _ => name.to_owned(),
        };
        hashes.insert(key, sha256_file(&file)?);
    }
    Ok(hashes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        // Writing to a string cannot fail.
        let _ = write!(s, "{b:02x}");
        s
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_known_content() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_bytes(b"abc"), abc);
        let dir = tempfile::tempdir().unwrap();
        assert!(weights_sha256("m", dir.path()).is_err());
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        std::fs::write(dir.path().join("model.safetensors"), "abc").unwrap();
        let one = weights_sha256("m", dir.path()).unwrap();
        assert_eq!(one.get("m").map(String::as_str), Some(abc));
        std::fs::write(dir.path().join("more.bin"), "abc").unwrap();
        let two = weights_sha256("m", dir.path()).unwrap();
        assert_eq!(
            two.keys().collect::<Vec<_>>(),
            ["m/model.safetensors", "m/more.bin"]
        );
    }
}
