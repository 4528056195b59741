//! Copying with a hash and a limit, and checking files against their pins.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::catalog::Pinned;
use crate::error::{Error, Result};

/// Deeper folders than this are refused.
const MAX_DEPTH: usize = 16;

fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes `reader` to the new file `path`, stopping one byte after `limit`, which
/// no pinned file then matches. Returns the bytes written.
///
/// `origin` names the reader in errors.
pub(crate) fn copy(mut reader: impl Read, origin: &Path, path: &Path, limit: u64) -> Result<u64> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::write(parent, e))?;
    }
    let mut file = File::create(path).map_err(|e| Error::write(path, e))?;
    let most = limit.saturating_add(1);
    let mut left = most;
    let mut buffer = vec![0; 256 << 10];
    while left > 0 {
        let want = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = match reader.read(&mut buffer[..want]) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => {
                return Err(Error::format(
                    origin,
                    format!("the archive is damaged: {e}"),
                ));
            }
        };
        file.write_all(&buffer[..n])
            .map_err(|e| Error::write(path, e))?;
        left -= n as u64;
    }
    Ok(most - left)
}

/// SHA-256 and size of a file, read in pieces.
pub(crate) fn hash_file(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((hex(hasher.finalize()), size)),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(path, e)),
        }
    }
}

/// All regular files below `folder` as paths relative to it with `/` between
/// the parts, sorted byte by byte. Links are not followed.
pub(crate) fn list_files(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut todo: Vec<(PathBuf, String, usize)> = vec![(folder.to_owned(), String::new(), 0)];
    while let Some((dir, prefix, depth)) = todo.pop() {
        if depth > MAX_DEPTH {
            return Err(Error::Limits(format!(
                "{} is more than {MAX_DEPTH} folders deep",
                dir.display()
            )));
        }
        for entry in fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
            let entry = entry.map_err(|e| Error::io(&dir, e))?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type().map_err(|e| Error::io(entry.path(), e))?;
            if kind.is_dir() {
                todo.push((entry.path(), name + "/", depth + 1));
            } else if kind.is_file() {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Hash and size of a pinned thing: of the file itself, or of the listing of a
/// folder as [`Pinned::sha256`] describes it.
pub(crate) fn measure(pin: &Pinned, root: &Path) -> Result<(String, u64)> {
    let path = root.join(pin.path);
    if !pin.path.ends_with('/') {
        return hash_file(&path);
    }
    let mut listing = Sha256::new();
    let mut total = 0;
    for name in list_files(&path)? {
        let (hash, size) = hash_file(&path.join(&name))?;
        listing.update(format!("{hash}  {name}\n"));
        total += size;
    }
    Ok((hex(listing.finalize()), total))
}

/// Brings a fetched file onto the disk, before it gets a name that is trusted.
/// The thousands of small files of a folder are left to the system: that would
/// take longer than fetching them.
pub(crate) fn sync(pin: &Pinned, root: &Path) -> Result<()> {
    if pin.path.ends_with('/') {
        return Ok(());
    }
    let path = root.join(pin.path);
    File::open(&path)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::write(&path, e))
}

/// Compares a fetched thing with its pin.
///
/// # Errors
/// [`Error::Hash`] when it is another.
pub(crate) fn check(pin: &Pinned, root: &Path, origin: &dyn std::fmt::Display) -> Result<()> {
    let (found, found_bytes) = measure(pin, root)?;
    if found == pin.sha256 && found_bytes == pin.bytes {
        return Ok(());
    }
    Err(Error::Hash {
        file: pin.path.to_owned(),
        origin: origin.to_string(),
        expected: pin.sha256.to_owned(),
        expected_bytes: pin.bytes,
        found,
        found_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_stops_after_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/file");
        assert_eq!(
            copy(&mut std::io::repeat(7), Path::new("x"), &path, 1000).unwrap(),
            1001
        );
        assert_eq!(hash_file(&path).unwrap().1, 1001);
    }

    #[test]
    fn file_and_folder_hashes_are_those_of_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("f/b")).unwrap();
        fs::write(dir.path().join("f/a.txt"), "one").unwrap();
        fs::write(dir.path().join("f/b/c.txt"), "two").unwrap();
        // (cd f; printf 'a.txt\nb/c.txt\n' | xargs sha256sum | sha256sum)
        let file = Pinned {
            path: "f/a.txt",
            sha256: "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
            bytes: 3,
        };
        check(&file, dir.path(), &"here").unwrap();
        let folder = Pinned {
            path: "f/",
            sha256: "27cf4fabb62b5bc86b6842969f6f46cf934bd67e8038b04a37808abf1bfb0dc3",
            bytes: 6,
        };
        check(&folder, dir.path(), &"here").unwrap();
        fs::write(dir.path().join("f/b/c.txt"), "twO").unwrap();
        assert!(matches!(
            check(&folder, dir.path(), &"here"),
            Err(Error::Hash { .. })
        ));
    }
}
