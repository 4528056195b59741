//! Checkpoint folders that survive a kill at any moment.
//!
//! A checkpoint is a folder `step-00001200` that holds `model.safetensors`,
//! `optimizer.safetensors`, `ema.safetensors` when averages are kept, `trainer.json`
//! and `SHA256SUMS` over all of them. It is written under a hidden name, made durable
//! and renamed, so that a folder with a final name is complete. The file `latest`
//! names the newest. When that one turns out to be damaged, the one before serves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};

use sequor_nn::Tensor;
use sequor_nn::weights::{Safetensors, write_safetensors};
use sha2::{Digest, Sha256};

use crate::files::{sync_dir, write_atomic};
use crate::state::{FORMAT, TrainerState};
use crate::{Error, Result};

/// Names of the files of a checkpoint.
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const STATE: &str = "trainer.json";
const SUMS: &str = "SHA256SUMS";
const LATEST: &str = "latest";

/// How many of the newest checkpoints are kept.
const KEEP: usize = 2;

/// Named tensors.
pub type Tensors = Vec<(String, Tensor)>;

/// What a checkpoint is made of.
#[derive(Debug)]
pub struct Parts {
    /// The parameters as the model has them.
    pub model: Tensors,
    /// The optimizer's state.
    pub optimizer: Tensors,
    /// Averaged weights.
    pub ema: Option<Tensors>,
    /// Everything else.
    pub state: TrainerState,
}

/// The folder that holds the checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens the folder, making it when it is not there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps other processes away until the result is dropped or the process ends, however
    /// it ends, and removes what killed ones left behind. File systems without locks are
    /// trusted.
    ///
    /// # Errors
    /// [`Error::Input`] when another process trains in this folder; [`Error::Io`].
    pub fn lock(&self) -> Result<Lock> {
        let path = self.dir.join(".lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let what = format!("another process is training in {}", self.dir.display());
            return Err(Error::Input(what));
        }
        for entry in fs::read_dir(&self.dir)
            .map_err(|e| Error::io(&self.dir, e))?
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with(".step-") {
                // Failing to tidy up is no reason to fail.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(Lock { _file: file })
    }

    /// Removes the folder with all checkpoints, at once as far as anybody can see.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_all(self) -> Result<()> {
        remove(&self.dir)
    }

    /// Steps of the checkpoints that are there, ascending; damaged ones included.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = fs::read_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))?;
        let mut steps: Vec<u64> = entries
            .flatten()
            .filter_map(|e| step_of(&e.file_name().to_string_lossy()))
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint, points `latest` at it, and removes those that nobody can
    /// need any more: the newest two stay, and the best that either of them knows of.
    ///
    /// # Errors
    /// [`Error::Io`] and write errors, a full disk among them. Earlier checkpoints are
    /// untouched then.
    pub fn save(&self, parts: &Parts) -> Result<PathBuf> {
        let step = parts.state.step;
        let name = folder(step);
        let partial = self.dir.join(format!(".{name}.partial"));
        remove(&partial)?;
        if let Err(e) = write(&partial, parts) {
            // Give the space back: a full disk is a likely reason.
            let _ = fs::remove_dir_all(&partial);
            return Err(e);
        }
        let path = self.dir.join(&name);
        // A run that fell back writes this step for the second time.
        remove(&path)?;
        fs::rename(&partial, &path).map_err(|e| Error::io(&path, e))?;
        sync_dir(&self.dir)?;
        write_atomic(&self.dir.join(LATEST), format!("{name}\n").as_bytes())?;
        self.prune(&parts.state)?;
        Ok(path)
    }

    fn prune(&self, state: &TrainerState) -> Result<()> {
        let steps: Vec<u64> = self
            .steps()?
            .into_iter()
            .filter(|&s| s <= state.step)
            .collect();
        let newest = &steps[steps.len().saturating_sub(KEEP)..];
        let mut keep: BTreeSet<u64> = newest
            .iter()
            .copied()
            .chain(state.best.map(|b| b.step))
            .collect();
        for &step in newest {
            // Unreadable ones will be found out when they are needed.
            keep.extend(
                read_state(&self.path(step))
                    .ok()
                    .and_then(|s| s.best)
                    .map(|b| b.step),
            );
        }
        for step in self.steps()?.into_iter().filter(|s| !keep.contains(s)) {
            remove(&self.path(step))?;
        }
        Ok(())
    }

    fn path(&self, step: u64) -> PathBuf {
        self.dir.join(folder(step))
    }

    /// The checkpoint of a step.
    ///
    /// # Errors
    /// [`Error::Weights`] when it is damaged or not there.
    pub fn at(&self, step: u64) -> Result<Checkpoint> {
        Checkpoint::open(&self.path(step))
    }

    /// The newest checkpoint that is whole; `None` when there is none at all. Each
    /// damaged one that is passed over is told to `notice`.
    ///
    /// # Errors
    /// The error of the newest when all are damaged.
    pub fn newest(&self, notice: &mut dyn FnMut(&str)) -> Result<Option<Checkpoint>> {
        let pointed = fs::read_to_string(self.dir.join(LATEST))
            .ok()
            .and_then(|s| step_of(s.trim()));
        let mut candidates: Vec<u64> = self.steps()?.into_iter().rev().collect();
        if let Some(at) = candidates.iter().position(|&s| Some(s) == pointed) {
            candidates[..=at].rotate_right(1);
        }
        let mut first_error = None;
        for step in candidates {
            match self.at(step) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(e) => {
                    notice(&format!("{e}; trying an earlier checkpoint"));
                    first_error.get_or_insert(e);
                }
            }
        }
        first_error.map_or(Ok(None), Err)
    }
}

/// A folder of checkpoints that this process alone may write to.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// A checkpoint that was found whole.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: TrainerState,
}

impl Checkpoint {
    /// Opens a checkpoint folder and compares every file with its hash.
    ///
    /// # Errors
    /// [`Error::Weights`] naming the file that is damaged or missing.
    pub fn open(path: &Path) -> Result<Self> {
        let sums = path.join(SUMS);
        let text = fs::read_to_string(&sums).map_err(|e| damaged(&sums, &e.to_string()))?;
        let mut named = BTreeSet::new();
        for line in text.lines() {
            let Some((expected, name)) = line
                .split_once("  ")
                .filter(|(_, n)| [MODEL, OPTIMIZER, EMA, STATE].contains(n))
            else {
                return Err(damaged(
                    &sums,
                    "a line is not a hash and a file of a checkpoint",
                ));
            };
            let file = path.join(name);
            let found = sha256(&file).map_err(|e| damaged(&file, &e.to_string()))?;
            if found != expected {
                return Err(damaged(
                    &file,
                    &format!("its SHA-256 is {found}, and it was written with {expected}"),
                ));
            }
            named.insert(name);
        }
        if let Some(absent) = [MODEL, OPTIMIZER, STATE]
            .iter()
            .find(|n| !named.contains(**n))
        {
            return Err(damaged(&sums, &format!("it has no line for {absent}")));
        }
        Ok(Self {
            path: path.to_owned(),
            state: read_state(path)?,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything besides the tensors.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// The parameters.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn model(&self) -> Result<Safetensors> {
        self.tensors(MODEL)
    }

    /// The optimizer's state.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn optimizer(&self) -> Result<Safetensors> {
        self.tensors(OPTIMIZER)
    }

    /// The averaged weights, when the run kept them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn ema(&self) -> Result<Option<Safetensors>> {
        if self.path.join(EMA).is_file() {
            self.tensors(EMA).map(Some)
        } else {
            Ok(None)
        }
    }

    fn tensors(&self, name: &str) -> Result<Safetensors> {
        Ok(Safetensors::open(&self.path.join(name))?)
    }
}

fn folder(step: u64) -> String {
    format!("step-{step:08}")
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")
        .filter(|d| d.len() >= 8)
        .and_then(|d| d.parse().ok())
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::weights(path, format!("this checkpoint is damaged: {why}"))
}

fn read_state(path: &Path) -> Result<TrainerState> {
    let file = path.join(STATE);
    let bytes = fs::read(&file).map_err(|e| damaged(&file, &e.to_string()))?;
    let state: TrainerState =
        serde_json::from_slice(&bytes).map_err(|e| damaged(&file, &e.to_string()))?;
    if state.format != FORMAT {
        let what = format!(
            "checkpoints of format {} cannot be read, only {FORMAT}",
            state.format
        );
        return Err(Error::weights(file, what));
    }
    Ok(state)
}

/// Writes the files of a checkpoint into the new folder `dir`, durably.
fn write(dir: &Path, parts: &Parts) -> Result<()> {
    fs::create_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut names = vec![MODEL, OPTIMIZER, STATE];
    write_tensors(&dir.join(MODEL), &parts.model)?;
    write_tensors(&dir.join(OPTIMIZER), &parts.optimizer)?;
    if let Some(ema) = &parts.ema {
        names.push(EMA);
        write_tensors(&dir.join(EMA), ema)?;
    }
    let state = serde_json::to_vec_pretty(&parts.state)
        .map_err(|e| Error::Input(format!("the trainer's state: {e}")))?;
    write_atomic(&dir.join(STATE), &state)?;
    let mut sums = String::new();
    for name in &names {
        let file = dir.join(name);
        sums += &format!(
            "{}  {name}\n",
            sha256(&file).map_err(|e| Error::io(&file, e))?
        );
    }
    write_atomic(&dir.join(SUMS), sums.as_bytes())
}

fn write_tensors(path: &Path, tensors: &Tensors) -> Result<()> {
    let borrowed: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    Ok(write_safetensors(path, &borrowed, &BTreeMap::new())?)
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect())
}

/// Removes a folder, in two steps, so that a half-removed one never has a final name.
fn remove(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let doomed = path.with_file_name(format!(".{}.removed", name.trim_start_matches('.')));
    let away = || -> std::io::Result<()> {
        if doomed.exists() {
            fs::remove_dir_all(&doomed)?;
        }
        fs::rename(path, &doomed)?;
        fs::remove_dir_all(&doomed)
    };
    away().map_err(|e| Error::io(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Schedule, Shape};
    use crate::state::{Best, Window};
    use serde_json::{Value, json};

    fn parts(step: u64, best: u64) -> Parts {
        let tensors = |x: f32| vec![("w".to_owned(), Tensor::from_slice(&[x, 1.0]))];
        let state = TrainerState {
            format: FORMAT,
            step,
            updates: step,
            tokens: 7 * step,
            epoch: 0.5,
            cursor: json!({"at": step}),
            seed: 3,
            skipped: 0,
            skipped_in_a_row: 0,
            best: Some(Best {
                step: best,
                value: 1.5,
            }),
            stale: 0,
            window: Window::default(),
            seconds: 1.0,
            threads: 1,
            schedule: Schedule {
                peak: 1.0,
                warmup: 0,
                steps: 10,
                shape: Shape::Constant,
            },
            config: Value::Null,
            config_hash: String::new(),
        };
        Parts {
            model: tensors(step as f32),
            optimizer: tensors(-1.0),
            ema: None,
            state,
        }
    }

    fn newest(store: &Store) -> (Option<u64>, Vec<String>) {
        let mut notices = Vec::new();
        let found = store.newest(&mut |n| notices.push(n.to_owned())).unwrap();
        (found.map(|c| c.state().step), notices)
    }

    #[test]
    fn what_was_saved_comes_back_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(newest(&store), (None, vec![]));
        for (step, best) in [(10, 10), (20, 20), (30, 20), (40, 20), (50, 50)] {
            store.save(&parts(step, best)).unwrap();
        }
        // 40 and 50 are the newest, and 20 is the best that 40 knows of.
        assert_eq!(store.steps().unwrap(), [20, 40, 50]);
        let c = store.newest(&mut |_| ()).unwrap().unwrap();
        assert_eq!(c.state(), &parts(50, 50).state);
        use sequor_nn::weights::TensorSource;
        assert_eq!(
            c.model().unwrap().load("w").unwrap().double_value(&[0]),
            50.0
        );
        assert!(c.ema().unwrap().is_none());
        assert_eq!(
            fs::read_to_string(dir.path().join(LATEST)).unwrap(),
            "step-00000050\n"
        );
        // Written again after a fall-back.
        store.save(&parts(50, 20)).unwrap();
        assert_eq!(newest(&store), (Some(50), vec![]));
    }

    #[test]
    fn any_damage_to_the_newest_falls_back_and_names_the_file() {
        for name in [MODEL, OPTIMIZER, STATE, SUMS] {
            for damage in ["truncate", "flip", "remove"] {
                let dir = tempfile::tempdir().unwrap();
                let store = Store::open(dir.path()).unwrap();
                store.save(&parts(10, 10)).unwrap();
                let file = store.save(&parts(20, 10)).unwrap().join(name);
                let mut bytes = fs::read(&file).unwrap();
                match damage {
                    "truncate" => drop(bytes.pop()),
                    "flip" => *bytes.last_mut().unwrap() ^= 1,
                    _ => bytes.clear(),
                }
                fs::remove_file(&file).unwrap();
                if damage != "remove" {
                    fs::write(&file, bytes).unwrap();
                }
                let (step, notices) = newest(&store);
                // A last newline may go without harm.
                if (name, damage) != (SUMS, "truncate") {
                    assert_eq!((step, notices.len()), (Some(10), 1), "{name} {damage}");
                    assert!(notices[0].contains("step-00000020"), "{}", notices[0]);
                }
            }
        }
    }

    #[test]
    fn leftovers_and_a_lost_pointer_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.save(&parts(10, 10)).unwrap();
        store.save(&parts(20, 10)).unwrap();
        for junk in [
            ".step-00000030.partial",
            ".step-00000010.removed",
            "step-x",
            "notes",
        ] {
            fs::create_dir(dir.path().join(junk)).unwrap();
        }
        fs::write(dir.path().join(LATEST), "step-99\n").unwrap();
        assert_eq!(newest(&store).0, Some(20));
        let lock = store.lock().unwrap();
        assert!(
            store
                .lock()
                .unwrap_err()
                .to_string()
                .contains("another process")
        );
        drop(lock);
        let names = || {
            fs::read_dir(dir.path())
                .unwrap()
                .map(|e| e.unwrap().file_name())
        };
        assert!(names().all(|n| !n.to_string_lossy().starts_with(".step-")));
        // Killed between renaming a checkpoint and moving the pointer.
        fs::write(dir.path().join(LATEST), "step-00000010\n").unwrap();
        assert_eq!(newest(&store).0, Some(10));
        store.save(&parts(30, 10)).unwrap();
        assert_eq!(newest(&store).0, Some(30));
        store.remove_all().unwrap();
        assert!(!dir.path().exists());
        fs::create_dir(dir.path()).unwrap();
    }

    #[test]
    fn when_all_are_damaged_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let path = store.save(&parts(10, 10)).unwrap();
        fs::write(path.join(STATE), "{}").unwrap();
        let message = store.newest(&mut |_| ()).unwrap_err().to_string();
        assert!(message.contains(STATE), "{message}");
    }
}
