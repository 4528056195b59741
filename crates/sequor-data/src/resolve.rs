//! From a name to files on this machine.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cache::Cache;
use crate::catalog::{self, Entry, Kind};
use crate::error::{Error, Result};
use crate::fetch::Fetcher;
use crate::fetch::hub::{Hub, HubRef};
use crate::fetch::package::Clients;
use crate::fetch::progress::{Progress, Terminal, human_bytes};
use crate::fetch::verify;

/// Files that mark the root of a checkout.
const ROOT_MARKS: [&str; 2] = [".git", "Cargo.lock"];

/// Finds models and data sets by name.
///
/// In this order: an existing path; [`extra_dirs`](Self::extra_dirs); the folders
/// of `$SEQUOR_MODELS` (data sets: `$SEQUOR_DATA`); for a model, `models/NAME`
/// beside the checkout or the executable; the cache; a fetch. `hf:owner/name` goes
/// to the Hugging Face hub.
#[derive(Clone)]
pub struct Resolver {
    /// Forbids fetching.
    pub offline: bool,
    /// Folders that are searched first, each holding `NAME` folders.
    pub extra_dirs: Vec<PathBuf>,
    /// The folders of `$SEQUOR_MODELS`.
    pub model_dirs: Vec<PathBuf>,
    /// The folders of `$SEQUOR_DATA`.
    pub data_dirs: Vec<PathBuf>,
    /// The `models/` folders beside the checkout and the executable.
    pub bundled_dirs: Vec<PathBuf>,
    /// The cache; `None` where the environment names no place for one.
    pub cache: Option<Cache>,
    /// The Hugging Face hub.
    pub hub: Hub,
    /// The package clients.
    pub clients: Clients,
    /// Hears of licences, fallbacks and bytes.
    pub progress: Arc<dyn Progress>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver")
            .field("offline", &self.offline)
            .field("extra_dirs", &self.extra_dirs)
            .field("model_dirs", &self.model_dirs)
            .field("data_dirs", &self.data_dirs)
            .field("bundled_dirs", &self.bundled_dirs)
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

/// Something that was found or fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// A model's folder or its only file; a data set's folder.
    pub path: PathBuf,
    /// The name that was asked for.
    pub name: String,
    /// Where it was found.
    pub origin: Found,
}

/// A resolved model.
pub type ResolvedModel = Resolved;

/// Where something was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// The name was a path.
    Path,
    /// Below a folder that the caller or the environment named.
    Named(PathBuf),
    /// Below a `models/` folder beside the checkout or executable.
    Bundled(PathBuf),
    /// In the cache.
    Cache,
    /// In the hub's cache.
    HubCache,
    /// It was fetched just now; the text names the origin.
    Fetched(String),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("a path"),
            Self::Named(dir) | Self::Bundled(dir) => write!(f, "{}", dir.display()),
            Self::Cache => f.write_str("the cache"),
            Self::HubCache => f.write_str("the hub's cache"),
            Self::Fetched(origin) => f.write_str(origin),
        }
    }
}

/// A line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// One line for a person.
    pub description: String,
    /// The licence, where it is stated.
    pub licence: Option<String>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Where it lies; `None` when it has not been fetched.
    pub path: Option<PathBuf>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self::from_env()
    }
}

impl Resolver {
    /// The settings of this process: its environment, current folder and
    /// executable, with progress on standard error.
    pub fn from_env() -> Self {
        let paths = |name: &str| split_paths(std::env::var_os(name));
        let here = std::env::current_dir().unwrap_or_default();
        let exe = std::env::current_exe()
            .ok()
            .and_then(|e| e.parent().map(Path::to_owned))
            .unwrap_or_default();
        Self {
            offline: false,
            extra_dirs: Vec::new(),
            model_dirs: paths("SEQUOR_MODELS"),
            data_dirs: paths("SEQUOR_DATA"),
            bundled_dirs: [models_beside(&here, 0), models_beside(&exe, 1)].concat(),
            cache: Cache::from_env().ok(),
            hub: Hub::from_env(),
            clients: Clients::default(),
            progress: Arc::new(Terminal::new()),
        }
    }

    /// A resolver that looks nowhere, for callers who say everything themselves.
    pub fn empty(cache: Option<Cache>) -> Self {
        Self {
            offline: true,
            extra_dirs: Vec::new(),
            model_dirs: Vec::new(),
            data_dirs: Vec::new(),
            bundled_dirs: Vec::new(),
            cache,
            hub: Hub::from_vars(|_| None),
            clients: Clients::default(),
            progress: Arc::new(crate::fetch::progress::Silent),
        }
    }

    /// Allows or forbids fetching.
    #[must_use]
    pub fn offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// Adds a folder that is searched first.
    #[must_use]
    pub fn extra_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.extra_dirs.push(dir.into());
        self
    }

    /// Sends progress elsewhere.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = progress;
        self
    }

    /// Finds a model: a path, a name of the catalogue or of a bundled model, or
    /// `hf:owner/name[/file][@revision]`.
    ///
    /// # Errors
    /// [`Error::UnknownName`], [`Error::Offline`], and the errors of fetching.
    pub fn resolve_model(&self, name: &str) -> Result<ResolvedModel> {
        match name.strip_prefix("hf:") {
            Some(rest) => self.resolve_hub(name, &HubRef::parse(rest)?),
            None => self.resolve(Kind::Model, name),
        }
    }

    /// Finds a data set: a path, or a name of the catalogue.
    ///
    /// # Errors
    /// [`Error::UnknownName`], [`Error::Offline`], and the errors of fetching.
    pub fn resolve_data(&self, name: &str) -> Result<Resolved> {
        self.resolve(Kind::Dataset, name)
    }

    fn resolve_hub(&self, name: &str, model: &HubRef) -> Result<Resolved> {
        let found = |path, origin| Resolved {
            path,
            name: name.to_owned(),
            origin,
        };
        if let Some(path) = self.hub.cached(model) {
            return Ok(found(path, Found::HubCache));
        }
        if self.offline {
            return Err(Error::Offline {
                name: name.to_owned(),
                how: format!("Fetch it once with: sequor models fetch {model}"),
            });
        }
        let path = self.hub.fetch(model, &*self.progress)?;
        Ok(found(path, Found::Fetched(model.to_string())))
    }

    fn resolve(&self, kind: Kind, name: &str) -> Result<Resolved> {
        let found = |path, origin| {
            Ok(Resolved {
                path,
                name: name.to_owned(),
                origin,
            })
        };
        if let Some(path) = as_path(kind, name)? {
            return found(path, Found::Path);
        }
        if !is_name(name) {
            return Err(Error::Input(format!(
                "there is no file or folder '{name}'{}",
                hub_hint(kind, name)
            )));
        }
        for (dir, origin) in self.places(kind) {
            if let Some(path) = usable(kind, &dir.join(name)) {
                return found(path, origin);
            }
        }
        let Some(entry) = catalog::find(kind, name) else {
            return Err(self.unknown(kind, name));
        };
        if let Some(cache) = &self.cache {
            let folder = cache.entry(kind, name);
            if entry.is_complete(&folder) {
                return found(entry.path_in(&folder), Found::Cache);
            }
            if folder.symlink_metadata().is_ok() {
                self.progress.notice(&format!(
                    "{} is incomplete and will be replaced",
                    folder.display()
                ));
            }
        }
        if self.offline {
            return Err(Error::Offline {
                name: name.to_owned(),
                how: how_to_fetch(entry),
            });
        }
        let (folder, origin) = self.fetch(entry)?;
        found(entry.path_in(&folder), origin)
    }

    /// Fetches a catalogue entry, or finds it in the cache.
    ///
    /// # Errors
    /// [`Error::Offline`] and the errors of fetching.
    pub fn fetch_entry(&self, entry: &Entry) -> Result<Resolved> {
        if self.offline {
            return Err(Error::Offline {
                name: entry.name.to_owned(),
                how: how_to_fetch(entry),
            });
        }
        let (folder, origin) = self.fetch(entry)?;
        Ok(Resolved {
            path: entry.path_in(&folder),
            name: entry.name.to_owned(),
            origin,
        })
    }

    fn fetch(&self, entry: &Entry) -> Result<(PathBuf, Found)> {
        let cache = self.need_cache()?;
        let folder = cache.entry(entry.kind, entry.name);
        if entry.is_complete(&folder) {
            return Ok((folder, Found::Cache));
        }
        let fetcher = Fetcher {
            cache,
            clients: &self.clients,
            hub: &self.hub,
            progress: &*self.progress,
        };
        let (folder, origin) = fetcher.fetch(entry)?;
        Ok((
            folder,
            origin.map_or(Found::Cache, |o| Found::Fetched(o.to_string())),
        ))
    }

    /// Computes the hashes of a fetched entry again.
    ///
    /// # Errors
    /// [`Error::Hash`] when a file has changed, [`Error::Io`] when one is gone,
    /// [`Error::UnknownName`] for a name that is not in the catalogue.
    pub fn verify(&self, kind: Kind, name: &str) -> Result<PathBuf> {
        let entry = catalog::find(kind, name).ok_or_else(|| self.unknown(kind, name))?;
        let folder = self.need_cache()?.entry(kind, name);
        for pin in entry.files {
            verify::check(pin, &folder, &"the cache")?;
        }
        Ok(folder)
    }

    /// Everything of one kind that is here or can be fetched, by name.
    pub fn list(&self, kind: Kind) -> Vec<Listed> {
        let mut listed: Vec<Listed> = Vec::new();
        for (dir, _) in self.places(kind) {
            let Ok(entries) = fs::read_dir(&dir) else {
                continue;
            };
            for entry in entries.flatten() {
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                if !entry.path().is_dir() {
                    continue;
                }
                let known = listed.iter().any(|l| l.name == name);
                let Some(path) = usable(kind, &entry.path()).filter(|_| is_name(&name) && !known)
                else {
                    continue;
                };
                // A folder of data says nothing by itself: only known names count.
                let fetchable = catalog::find(kind, &name);
                if kind == Kind::Dataset && fetchable.is_none() {
                    continue;
                }
                listed.push(describe(name, path, &entry.path(), fetchable));
            }
        }
        for entry in catalog::entries(kind) {
            if listed.iter().any(|l| l.name == entry.name) {
                continue;
            }
            let folder = self
                .cache
                .as_ref()
                .map(|c| c.entry(kind, entry.name))
                .filter(|f| entry.is_complete(f));
            listed.push(Listed {
                name: entry.name.to_owned(),
                description: entry.description.to_owned(),
                licence: Some(entry.licence.to_owned()),
                size_bytes: entry.size_bytes(),
                path: folder.map(|f| entry.path_in(&f)),
            });
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// The folders beside the models that hold a file called `file` (`heads.json`, say), in
    /// the order that models are searched, then by name.
    pub fn model_folders_with(&self, file: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for (dir, _) in self.places(Kind::Model) {
            let Ok(entries) = fs::read_dir(&dir) else {
                continue;
            };
            let mut here: Vec<PathBuf> = entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.join(file).is_file())
                .collect();
            here.sort();
            found.extend(here);
        }
        found
    }

    /// The folders that may hold a folder `NAME`, in the order they are searched.
    fn places(&self, kind: Kind) -> Vec<(PathBuf, Found)> {
        let env = match kind {
            Kind::Model => &self.model_dirs,
            Kind::Dataset => &self.data_dirs,
        };
        let named = self
            .extra_dirs
            .iter()
            .chain(env)
            .map(|d| (d.clone(), Found::Named(d.clone())));
        let bundled: &[PathBuf] = match kind {
            Kind::Model => &self.bundled_dirs,
            Kind::Dataset => &[],
        };
        let bundled = bundled
            .iter()
            .map(|d| (d.clone(), Found::Bundled(d.clone())));
        named.chain(bundled).collect()
    }

    fn need_cache(&self) -> Result<&Cache> {
        self.cache.as_ref().ok_or_else(Cache::nowhere)
    }

    fn unknown(&self, kind: Kind, name: &str) -> Error {
        if Path::new(name).exists() {
            let wants = match kind {
                Kind::Model => "a config.json, a single .gguf file, or (as a file) weights",
                Kind::Dataset => "any files",
            };
            return Error::Input(format!(
                "'{name}' is there, but it is not a {kind}: it does not hold {wants}"
            ));
        }
        let names: Vec<String> = self.list(kind).into_iter().map(|l| l.name).collect();
        Error::UnknownName {
            kind,
            name: name.to_owned(),
            nearest: nearest(name, &names),
        }
    }
}

/// The folders of a path list, without empty parts.
fn split_paths(value: Option<OsString>) -> Vec<PathBuf> {
    value
        .map(|v| {
            std::env::split_paths(&v)
                .filter(|p| !p.as_os_str().is_empty())
                .collect()
        })
        .unwrap_or_default()
}

/// The `models` folders in `start` and in its parents up to the root of the
/// checkout that it lies in. Outside of a checkout only `parents` of them count:
/// higher up may be folders that anybody can write to.
fn models_beside(start: &Path, parents: usize) -> Vec<PathBuf> {
    let is_root = |dir: &Path| ROOT_MARKS.iter().any(|mark| dir.join(mark).exists());
    let height = start.ancestors().position(is_root).unwrap_or(parents);
    start
        .ancestors()
        .take(height + 1)
        .map(|dir| dir.join("models"))
        .filter(|dir| dir.is_dir())
        .collect()
}

/// Names are plain words; everything else is a path.
fn is_name(name: &str) -> bool {
    (1..=96).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !name.starts_with('.')
}

/// The name as a path, if one exists. A bare word counts as a path only where it
/// leads to something that can be loaded, so that a folder that happens to be
/// called like a model does not hide the model.
fn as_path(kind: Kind, name: &str) -> Result<Option<PathBuf>> {
    if name.is_empty() {
        return Err(Error::Input(format!("the name of the {kind} is empty")));
    }
    let path = Path::new(name);
    match path.metadata() {
        Ok(_) if is_name(name) => Ok(usable(kind, path)),
        Ok(meta) if meta.is_dir() => Ok(Some(only_gguf(path).unwrap_or_else(|| path.to_owned()))),
        Ok(meta) if meta.is_file() => Ok(Some(path.to_owned())),
        Ok(_) => Err(Error::Input(format!(
            "'{name}' is neither a file nor a folder"
        ))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound || is_name(name) => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

/// What can be loaded at `path`: a file, or a folder that looks right.
fn usable(kind: Kind, path: &Path) -> Option<PathBuf> {
    let meta = path.metadata().ok()?;
    if meta.is_file() {
        let weights = has_extension(path, &["gguf", "safetensors", "bin", "pt", "pth"]);
        return (kind == Kind::Dataset || weights).then(|| path.to_owned());
    }
    if !meta.is_dir() {
        return None;
    }
    if kind == Kind::Model {
        if path.join("config.json").is_file() {
            return Some(path.to_owned());
        }
        return only_gguf(path);
    }
    // A folder that happens to be called like a known data set is not it.
    let known = path
        .file_name()
        .and_then(|n| n.to_str())
        .and_then(|n| catalog::find(kind, n));
    match known {
        Some(entry) => entry.is_complete(path).then(|| path.to_owned()),
        None => fs::read_dir(path).ok()?.next().map(|_| path.to_owned()),
    }
}

/// The GGUF file of a folder that holds one and no `config.json`.
fn only_gguf(folder: &Path) -> Option<PathBuf> {
    if folder.join("config.json").exists() {
        return None;
    }
    let mut files = fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .filter(|p| has_extension(p, &["gguf"]) && p.is_file());
    let first = files.next()?;
    files.next().is_none().then_some(first)
}

fn has_extension(path: &Path, any: &[&str]) -> bool {
    path.extension()
        .and_then(|e| e.to_str())
        .is_some_and(|e| any.contains(&e))
}

/// Reads what a folder says about itself: the model card's first line of prose,
/// and the licence of its front matter.
fn describe(name: String, path: PathBuf, folder: &Path, entry: Option<&Entry>) -> Listed {
    let card = fs::read_to_string(folder.join("README.md")).unwrap_or_default();
    let (mut licence, mut description) = (None, None);
    let mut front_matter = false;
    for (i, line) in card.lines().map(str::trim).enumerate() {
        if line == "---" && (i == 0 || front_matter) {
            front_matter = i == 0;
        } else if front_matter {
            licence = line
                .strip_prefix("license:")
                .map(|l| l.trim().to_owned())
                .or(licence);
        } else if !line.is_empty() && !line.starts_with('#') {
            description = Some(line.to_owned());
            break;
        }
    }
    let size_bytes = match folder.is_dir() {
        true => verify::list_files(folder)
            .unwrap_or_default()
            .iter()
            .filter_map(|f| folder.join(f).metadata().ok())
            .map(|m| m.len())
            .sum(),
        false => folder.metadata().map(|m| m.len()).unwrap_or_default(),
    };
    Listed {
        name,
        description: description
            .or_else(|| entry.map(|e| e.description.to_owned()))
            .unwrap_or_default(),
        licence: licence.or_else(|| entry.map(|e| e.licence.to_owned())),
        size_bytes,
        path: Some(path),
    }
}

fn how_to_fetch(entry: &Entry) -> String {
    let origins: Vec<String> = entry.origins.iter().map(ToString::to_string).collect();
    format!(
        "Fetch it once with: sequor {} fetch {} ({}, from {})",
        entry.kind.command(),
        entry.name,
        human_bytes(entry.size_bytes()),
        origins.join(" or ")
    )
}

/// `owner/name` is how the hub's own tools write it.
fn hub_hint(kind: Kind, name: &str) -> String {
    match HubRef::parse(name) {
        Ok(model) if kind == Kind::Model => {
            format!("; for a model from the Hugging Face hub write {model}")
        }
        _ => String::new(),
    }
}

/// At most three names that look like `name`, the likeliest first.
fn nearest(name: &str, names: &[String]) -> Vec<String> {
    let name = name.to_lowercase();
    let patience = (name.chars().count() / 3).max(2);
    let mut scored: Vec<(usize, &String)> = names
        .iter()
        .filter_map(|known| {
            let distance = edit_distance(&name, &known.to_lowercase());
            let part = name.len() >= 3 && (known.contains(&name) || name.contains(known.as_str()));
            (distance <= patience || part).then_some((distance, known))
        })
        .collect();
    scored.sort();
    scored
        .into_iter()
        .take(3)
        .map(|(_, known)| known.clone())
        .collect()
}

/// Levenshtein's distance, in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
