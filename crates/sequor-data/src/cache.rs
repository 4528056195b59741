//! The folder where fetched things are kept, and how they get there.
//!
//! A fetch fills a hidden folder beside the final one and renames it when every
//! file has been checked, so that a name either holds the whole thing or is not
//! there, whatever kills the process. A lock file lets a second process wait for
//! the first; correctness does not depend on it.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::catalog::Kind;
use crate::error::{Error, Result};
use crate::fetch::progress::Progress;

/// After this long a waiting process goes ahead without the lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(30 * 60);

/// The cache folder: `models/NAME` and `data/NAME` below one root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$XDG_CACHE_HOME/sequor`, or `$HOME/.cache/sequor`.
    ///
    /// # Errors
    /// [`Error::Config`] when neither variable is set to an absolute path.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))
    }

    /// As [`Cache::from_env`], with the values of the two variables. Relative
    /// paths are passed over, as the XDG base directory specification asks.
    ///
    /// # Errors
    /// [`Error::Config`] when neither is an absolute path.
    pub fn from_vars(xdg_cache_home: Option<OsString>, home: Option<OsString>) -> Result<Self> {
        let absolute = |v: Option<OsString>| v.map(PathBuf::from).filter(|p| p.is_absolute());
        absolute(xdg_cache_home)
            .or_else(|| absolute(home).map(|h| h.join(".cache")))
            .map(|base| Self::at(base.join("sequor")))
            .ok_or_else(Self::nowhere)
    }

    /// The error of having no place for a cache.
    pub(crate) fn nowhere() -> Error {
        Error::Config(
            "there is no cache folder: neither XDG_CACHE_HOME nor HOME is set to an absolute path; set XDG_CACHE_HOME to a folder that you may write to".into(),
        )
    }

    /// A cache at a given place.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root folder. It need not exist.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where an entry lies once it has been fetched.
    pub fn entry(&self, kind: Kind, name: &str) -> PathBuf {
        self.shelf(kind).join(name)
    }

    fn shelf(&self, kind: Kind) -> PathBuf {
        self.root.join(kind.command())
    }

    /// Makes `kind/name` appear: `fill` gets an empty folder for the files and
    /// one for its own use, and must leave checked files in the first. When
    /// `complete` says that the final folder is fine already (another process
    /// was faster), nothing is done.
    ///
    /// # Errors
    /// Those of `fill`, and [`Error::DiskFull`], [`Error::Unwritable`],
    /// [`Error::Io`]. Nothing is left under the final name then.
    pub(crate) fn install(
        &self,
        kind: Kind,
        name: &str,
        progress: &dyn Progress,
        complete: impl Fn(&Path) -> bool,
        fill: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let shelf = self.shelf(kind);
        fs::create_dir_all(&shelf).map_err(|e| Error::write(&shelf, e))?;
        let target = shelf.join(name);
        let prefix = format!(".{name}-");

        let lock = lock(&shelf.join(format!(".{name}.lock")), name, progress)?;
        if complete(&target) {
            return Ok(target);
        }
        if lock.is_some() {
            remove_leftovers(&shelf, &prefix);
        }

        let staging = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".partial")
            .tempdir_in(&shelf)
            .map_err(|e| Error::write(&shelf, e))?;
        let [files, work] = ["files", "work"].map(|d| staging.path().join(d));
        for dir in [&files, &work] {
            fs::create_dir(dir).map_err(|e| Error::write(dir, e))?;
        }
        fill(&files, &work)?;

        // What lies under the final name now is damaged, or was put there by a
        // process that could not be seen through the lock.
        if target.symlink_metadata().is_ok() {
            if complete(&target) {
                return Ok(target);
            }
            let old = staging.path().join("old");
            fs::rename(&target, &old).map_err(|e| Error::write(&target, e))?;
        }
        match fs::rename(&files, &target) {
            Ok(()) => Ok(target),
            Err(_) if complete(&target) => Ok(target),
            Err(e) => Err(Error::write(&target, e)),
        }
    }
}

/// Takes the lock, waiting for whoever has it. `None`: this file system has no
/// locks, or the wait took too long.
fn lock(path: &Path, name: &str, progress: &dyn Progress) -> Result<Option<File>> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|e| Error::write(path, e))?;
    let start = Instant::now();
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if start.elapsed() > LOCK_PATIENCE => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
        }
        if !told {
            progress.notice(&format!(
                "another process is fetching {name}; waiting for it"
            ));
            told = true;
        }
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Removes what killed processes left behind. Called with the lock held. Failing
/// to tidy up is no reason to fail.
fn remove_leftovers(shelf: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(shelf) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(prefix) && name.ends_with(".partial") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::progress::Silent;

    fn put(text: &'static str) -> impl Fn(&Path, &Path) -> Result<()> {
        move |files, _| fs::write(files.join("a"), text).map_err(|e| Error::write(files, e))
    }

    fn has_a(dir: &Path) -> bool {
        dir.join("a").is_file()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut v: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        v.sort();
        v
    }

    #[test]
    fn xdg_wins_then_home_and_relative_paths_do_not_count() {
        let os = |s: &str| Some(OsString::from(s));
        assert_eq!(
            Cache::from_vars(os("/x"), os("/h")).unwrap().root(),
            Path::new("/x/sequor")
        );
        assert_eq!(
            Cache::from_vars(None, os("/h")).unwrap().root(),
            Path::new("/h/.cache/sequor")
        );
        assert_eq!(
            Cache::from_vars(os("rel"), os("/h")).unwrap().root(),
            Path::new("/h/.cache/sequor")
        );
        assert_eq!(
            Cache::from_vars(os(""), os("/h")).unwrap().root(),
            Path::new("/h/.cache/sequor")
        );
        let message = Cache::from_vars(None, None).unwrap_err().to_string();
        assert!(message.contains("XDG_CACHE_HOME"), "{message}");
    }

    #[test]
    fn a_failed_fill_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let result = cache.install(Kind::Model, "m", &Silent, has_a, |files, work| {
            fs::write(files.join("a"), "half").unwrap();
            fs::write(work.join("b"), "junk").unwrap();
            Err(Error::Input("no".into()))
        });
        assert!(result.is_err());
        assert_eq!(names(&dir.path().join("models")), [".m.lock"]);
    }

    #[test]
    fn leftovers_of_a_killed_process_are_removed_and_damage_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        fs::create_dir_all(dir.path().join("data/.d-x1.partial/files")).unwrap();
        fs::create_dir_all(dir.path().join("data/d/wrong")).unwrap();
        let path = cache
            .install(Kind::Dataset, "d", &Silent, has_a, put("ok"))
            .unwrap();
        assert_eq!(path, cache.entry(Kind::Dataset, "d"));
        assert_eq!(names(&path), ["a"]);
        assert_eq!(names(&dir.path().join("data")), [".d.lock", "d"]);
    }

    #[test]
    fn of_many_threads_one_fills() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let fills = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    cache
                        .install(Kind::Model, "m", &Silent, has_a, |files, work| {
                            fills.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(20));
                            put("x")(files, work)
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(fills.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_cache_that_cannot_be_made_says_what_to_set() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let cache = Cache::at(dir.path().join("file/sequor"));
        let error = cache
            .install(Kind::Model, "m", &Silent, has_a, put("x"))
            .unwrap_err();
        assert!(matches!(error, Error::Unwritable { .. }), "{error:?}");
        assert!(error.to_string().contains("XDG_CACHE_HOME"));
    }

    #[test]
    fn waiting_for_the_lock_can_be_cancelled() {
        struct Stop;
        impl Progress for Stop {
            fn cancelled(&self) -> bool {
                true
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".m.lock");
        let held = lock(&path, "m", &Silent).unwrap();
        assert!(held.is_some());
        assert!(matches!(lock(&path, "m", &Stop), Err(Error::Cancelled)));
    }
}
