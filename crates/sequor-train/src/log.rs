//! The record of a run: one JSON object per line.
//!
//! Every line has a `step`. A resumed run first removes the lines of steps that will be
//! done again, so that its log ends up as that of a run that was never interrupted, but
//! for wall times.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::files::write_atomic;
use crate::{Error, Result};

/// One line.
pub type Record = Map<String, Value>;

/// A log that is open for writing.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log of a run that has done `step` steps, keeping only whole lines up to
    /// there. Step 0 starts afresh.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        }
        let mut kept = String::new();
        if step > 0 && path.exists() {
            for (line, record) in lines(path)? {
                if step_of(&record).is_some_and(|s| s <= step) {
                    kept += &line;
                    kept.push('\n');
                }
            }
        }
        write_atomic(path, kept.as_bytes())?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| Error::io(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = Value::Object(record.clone()).to_string();
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Makes what was written durable. A checkpoint must not be newer than its log.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io(&self.path, e))
    }
}

/// The records of a log. A line that is not whole, as a kill leaves it, is passed over.
///
/// # Errors
/// [`Error::Io`].
pub fn read(path: &Path) -> Result<Vec<Record>> {
    Ok(lines(path)?.into_iter().map(|(_, record)| record).collect())
}

fn lines(path: &Path) -> Result<Vec<(String, Record)>> {
    let text = fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8_lossy(&text);
    let whole = text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'));
    Ok(whole
        .filter_map(|l| Some((l.to_owned(), serde_json::from_str::<Record>(l).ok()?)))
        .collect())
}

/// The `step` of a record.
pub fn step_of(record: &Record) -> Option<u64> {
    record.get("step").and_then(Value::as_u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(step: u64) -> Record {
        json!({"kind": "train", "step": step, "loss": 0.1 + step as f64})
            .as_object()
            .unwrap()
            .clone()
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["t/a.jsonl", "t/b.jsonl"].map(|n| dir.path().join(n));
        let mut log = Log::open(&a, 0).unwrap();
        (1..=6).for_each(|s| log.write(&record(s)).unwrap());

        let mut log = Log::open(&b, 0).unwrap();
        (1..=5).for_each(|s| log.write(&record(s)).unwrap());
        log.sync().unwrap();
        fs::OpenOptions::new()
            .append(true)
            .open(&b)
            .unwrap()
            .write_all(b"{\"step\": 6, \"lo")
            .unwrap();
        let mut log = Log::open(&b, 3).unwrap();
        (4..=6).for_each(|s| log.write(&record(s)).unwrap());
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
        assert_eq!(read(&a).unwrap().len(), 6);
        // A new run does not go on with an old log.
        Log::open(&a, 0).unwrap();
        assert!(read(&a).unwrap().is_empty());
    }
}
