//! Plain text: files and folders as documents, and what is held out of them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A piece of text that belongs together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its name: a file name without extension, "Genesis 1".
    pub name: String,
    /// What it is a part of: the book of a chapter. Documents of one group are
    /// held out together.
    pub group: String,
    /// The text.
    pub text: String,
}

/// Bounds on what is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextLimits {
    /// Most bytes in all. Default: 1 GiB.
    pub max_bytes: u64,
    /// Most files. Default: 100,000.
    pub max_files: usize,
}

impl Default for TextLimits {
    fn default() -> Self {
        Self {
            max_bytes: 1 << 30,
            max_files: 100_000,
        }
    }
}

/// Reads a text file, or every `.txt` file directly within a folder in the order
/// of their names. A byte order mark at the start is removed; nothing else is
/// changed.
///
/// # Errors
/// [`Error::Format`] naming the first byte that is not UTF-8; [`Error::Limits`];
/// [`Error::Input`] for a folder without text files and for things that are
/// neither file nor folder; [`Error::Io`].
pub fn read_text(path: &Path, limits: &TextLimits) -> Result<Vec<Document>> {
    let meta = path.metadata().map_err(|e| Error::io(path, e))?;
    let files = if meta.is_dir() {
        text_files(path, limits)?
    } else {
        vec![path.to_owned()]
    };
    let mut left = limits.max_bytes;
    let mut documents = Vec::with_capacity(files.len());
    for file in files {
        let text = read_utf8(&file, left, limits)?;
        left -= text.len() as u64;
        let name = file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = match text.strip_prefix('\u{feff}') {
            Some(rest) => rest.to_owned(),
            None => text,
        };
        documents.push(Document {
            group: name.clone(),
            name,
            text,
        });
    }
    Ok(documents)
}

fn text_files(folder: &Path, limits: &TextLimits) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.extension().is_some_and(|e| e == "txt") && path.is_file() {
            files.push(path);
            if files.len() > limits.max_files {
                return Err(Error::Limits(format!(
                    "{} holds more than {} text files",
                    folder.display(),
                    limits.max_files
                )));
            }
        }
    }
    if files.is_empty() {
        return Err(Error::Input(format!(
            "{} holds no .txt files",
            folder.display()
        )));
    }
    files.sort();
    Ok(files)
}

fn read_utf8(path: &Path, left: u64, limits: &TextLimits) -> Result<String> {
    // Before it is opened: a pipe would wait for a writer.
    let meta = path.metadata().map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::Input(format!(
            "{} is neither a file nor a folder",
            path.display()
        )));
    }
    let too_much = || {
        Error::Limits(format!(
            "with {} there are more than {} bytes of text",
            path.display(),
            limits.max_bytes
        ))
    };
    if meta.len() > left {
        return Err(too_much());
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or_default());
    file.take(left.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > left {
        return Err(too_much());
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        Error::format(
            path,
            format!(
                "not UTF-8: byte 0x{:02x} at position {at}, line {line}; convert the file to UTF-8",
                e.as_bytes()[at]
            ),
        )
    })
}

/// What is kept away from training, to measure with.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum HoldOut {
    /// Every document of these groups.
    Groups(Vec<String>),
    /// About this part of the groups, in `(0, 1)`, chosen by a hash of their
    /// names and of the seed: adding a document moves no other one.
    Fraction {
        /// The part to hold out.
        fraction: f64,
        /// Another seed chooses others.
        seed: u64,
    },
    /// The last part, in `(0, 1)`, of every document, from the start of a line
    /// where there is one: for a corpus that is one long text.
    Tail(f64),
}

impl HoldOut {
    /// Divides documents into those to train on and those held out. The same
    /// documents give the same result on every machine.
    ///
    /// # Errors
    /// [`Error::Input`] when a group does not exist, a fraction is out of range,
    /// or one of the two parts would be empty.
    pub fn split(&self, documents: Vec<Document>) -> Result<(Vec<Document>, Vec<Document>)> {
        let (train, held): (Vec<_>, Vec<_>) = match self {
            Self::Groups(groups) => {
                if let Some(absent) = groups
                    .iter()
                    .find(|g| documents.iter().all(|d| d.group != **g))
                {
                    return Err(Error::Input(format!("there is no '{absent}' to hold out")));
                }
                documents
                    .into_iter()
                    .partition(|d| !groups.contains(&d.group))
            }
            Self::Fraction { fraction, seed } => {
                check_fraction(*fraction)?;
                documents
                    .into_iter()
                    .partition(|d: &Document| unit_hash(*seed, &d.group) >= *fraction)
            }
            Self::Tail(fraction) => {
                check_fraction(*fraction)?;
                documents
                    .into_iter()
                    .map(|d| cut_tail(d, *fraction))
                    .unzip()
            }
        };
        let empty = |part: &[Document]| part.iter().all(|d| d.text.is_empty());
        if empty(&train) || empty(&held) {
            return Err(Error::Input(format!(
                "holding out {self:?} of {} documents leaves nothing on one side",
                train.len() + held.len()
            )));
        }
        Ok((train, held))
    }
}

fn check_fraction(fraction: f64) -> Result<()> {
    if fraction > 0.0 && fraction < 1.0 {
        return Ok(());
    }
    Err(Error::Input(format!(
        "the part to hold out is {fraction}; it must lie between 0 and 1"
    )))
}

/// A number in `[0, 1)` that depends on the name and the seed alone.
fn unit_hash(seed: u64, name: &str) -> f64 {
    let digest = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(name)
        .finalize();
    let bits = digest
        .iter()
        .take(7)
        .fold(0_u64, |n, &b| n << 8 | u64::from(b))
        >> 3;
    bits as f64 / (1_u64 << 53) as f64
}

fn cut_tail(mut document: Document, fraction: f64) -> (Document, Document) {
    let mut at = (document.text.len() as f64 * (1.0 - fraction)) as usize;
    while !document.text.is_char_boundary(at) {
        at += 1;
    }
    if let Some(line_end) = document.text[at..].find('\n') {
        let next_line = at + line_end + 1;
        if next_line < document.text.len() {
            at = next_line;
        }
    }
    let tail = document.text.split_off(at);
    let held = Document {
        name: document.name.clone(),
        group: document.group.clone(),
        text: tail,
    };
    (document, held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn documents(groups: usize) -> Vec<Document> {
        (0..groups)
            .flat_map(|g| {
                (0..2).map(move |i| Document {
                    name: format!("g{g} {i}"),
                    group: format!("g{g}"),
                    text: "x".into(),
                })
            })
            .collect()
    }

    #[test]
    fn files_and_folders() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("b.txt"), "\u{feff}zwei\r\n").unwrap();
        fs::write(tmp.path().join("a.txt"), "eins").unwrap();
        fs::write(tmp.path().join("c.md"), "drei").unwrap();
        let d = read_text(tmp.path(), &TextLimits::default()).unwrap();
        let got: Vec<_> = d
            .iter()
            .map(|d| (d.name.as_str(), d.text.as_str()))
            .collect();
        assert_eq!(got, [("a", "eins"), ("b", "zwei\r\n")]);
        assert_eq!(
            read_text(&tmp.path().join("c.md"), &TextLimits::default()).unwrap()[0].text,
            "drei"
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        let limits = TextLimits::default();
        assert!(matches!(
            read_text(tmp.path(), &limits),
            Err(Error::Input(_))
        ));
        assert!(matches!(
            read_text(&tmp.path().join("no"), &limits),
            Err(Error::Io { .. })
        ));
        let path = tmp.path().join("a.txt");
        fs::write(&path, b"one\ntw\xffo").unwrap();
        let message = read_text(&path, &limits).unwrap_err().to_string();
        assert!(message.contains("0xff at position 6, line 2"), "{message}");
        // A character that is cut off.
        fs::write(&path, &"é".as_bytes()[..1]).unwrap();
        assert!(
            read_text(&path, &limits)
                .unwrap_err()
                .to_string()
                .contains("position 0")
        );

        fs::write(&path, "12345").unwrap();
        fs::write(tmp.path().join("b.txt"), "12345").unwrap();
        assert!(
            read_text(
                tmp.path(),
                &TextLimits {
                    max_bytes: 10,
                    ..limits
                }
            )
            .is_ok()
        );
        assert!(matches!(
            read_text(
                tmp.path(),
                &TextLimits {
                    max_bytes: 9,
                    ..limits
                }
            ),
            Err(Error::Limits(_))
        ));
        assert!(matches!(
            read_text(
                tmp.path(),
                &TextLimits {
                    max_files: 1,
                    ..limits
                }
            ),
            Err(Error::Limits(_))
        ));
    }

    #[test]
    fn groups_stay_together_and_splits_are_stable() {
        let (train, held) = HoldOut::Groups(vec!["g1".into()])
            .split(documents(3))
            .unwrap();
        assert_eq!((train.len(), held.len()), (4, 2));
        assert!(
            HoldOut::Groups(vec!["g9".into()])
                .split(documents(3))
                .is_err()
        );

        let rule = HoldOut::Fraction {
            fraction: 0.25,
            seed: 1,
        };
        let (train, held) = rule.split(documents(400)).unwrap();
        assert!((150..250).contains(&held.len()), "{}", held.len());
        assert!(
            held.iter()
                .all(|h| train.iter().all(|t| t.group != h.group))
        );
        // More documents do not move the old ones.
        let (_, more) = rule.split(documents(500)).unwrap();
        assert_eq!(&more[..held.len()], &held[..]);
        let (_, other) = HoldOut::Fraction {
            fraction: 0.25,
            seed: 2,
        }
        .split(documents(400))
        .unwrap();
        assert_ne!(other, held);
        for bad in [0.0, 1.0, -1.0, f64::NAN] {
            assert!(
                HoldOut::Fraction {
                    fraction: bad,
                    seed: 0
                }
                .split(documents(4))
                .is_err()
            );
        }
        assert!(
            HoldOut::Groups(vec!["g0".into()])
                .split(documents(1))
                .is_err(),
            "nothing left to train on"
        );
    }

    #[test]
    fn tails_begin_at_a_line_and_lose_nothing() {
        let text = "ä\n".repeat(50);
        let document = Document {
            name: "n".into(),
            group: "n".into(),
            text: text.clone(),
        };
        let (train, held) = HoldOut::Tail(0.1).split(vec![document]).unwrap();
        assert_eq!(train[0].text.clone() + &held[0].text, text);
        assert!(
            train[0].text.ends_with('\n') && held[0].text.len() <= 15 && !held[0].text.is_empty()
        );
        let one_line = Document {
            name: "n".into(),
            group: "n".into(),
            text: "é".repeat(10),
        };
        let (train, held) = HoldOut::Tail(0.5).split(vec![one_line]).unwrap();
        assert_eq!((train[0].text.len(), held[0].text.len()), (10, 10));
    }
}
