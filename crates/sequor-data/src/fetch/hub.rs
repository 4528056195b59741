//! The Hugging Face hub: whole model repositories by `hf:owner/name`, and single
//! files of catalogue entries.
//!
//! Models lie in the hub's own shared cache (`$HF_HUB_CACHE`, `$HF_HOME/hub`,
//! `$XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`), so that what
//! Python tools have fetched is found, and the reverse. Transfers run in a thread
//! that is watched: silence is an error after a time, never a hang.

use std::ffi::OsString;
use std::fmt;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache as HubCache, Repo, RepoType};
use serde::Deserialize;

use super::progress::{Progress, human_bytes};
use super::verify;
use crate::catalog::Pinned;
use crate::error::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Files of a model repository that are taken when they are there.
const OPTIONAL: [&str; 5] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// What can be done without the hub.
const NO_WAY: &str = "Without a network, give the path of a folder that holds the model, put it into a folder named by SEQUOR_MODELS, or use a model that is here already ('sequor models list'); behind a proxy set HTTPS_PROXY, for a mirror set HF_ENDPOINT";
const TRY_AGAIN: &str = "Try again; what has arrived is kept";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model on the hub, or one file of it: `hf:owner/name[/file][@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRef {
    /// `owner/name`.
    pub repo: String,
    /// One file to take instead of the whole model (a GGUF file, say).
    pub file: Option<String>,
    /// Branch, tag or commit.
    pub revision: String,
}

impl HubRef {
    /// Reads the text after `hf:`.
    ///
    /// # Errors
    /// [`Error::Input`] when it does not have the form, or holds characters that
    /// the hub does not allow.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::Input(format!(
                "'hf:{text}' is not a model on the hub ({why}); write hf:owner/name, hf:owner/name@revision or hf:owner/name/file.gguf"
            ))
        };
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let allowed = |part: &str| {
            (1..=96).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
                && !part.starts_with('.')
        };
        if let Some(part) = path
            .split('/')
            .chain(revision.split('/'))
            .find(|p| !allowed(p))
        {
            return Err(bad(&format!("'{part}' is not a name")));
        }
        let mut parts = path.splitn(3, '/');
        let (Some(owner), Some(name)) = (parts.next(), parts.next()) else {
            return Err(bad("there is no owner"));
        };
        Ok(Self {
            repo: format!("{owner}/{name}"),
            file: parts.next().map(str::to_owned),
            revision: revision.to_owned(),
        })
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, self.revision.clone())
    }
}

impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repo)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// How the hub is reached.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Scheme, host and port.
    pub endpoint: String,
    /// The shared cache; `None` where the environment names no place for one.
    pub cache: Option<PathBuf>,
    /// Access token for gated repositories.
    pub token: Option<String>,
    /// Whether a proxy is configured; then reachability is left to it.
    pub proxy: bool,
    /// Longest wait for the first contact.
    pub connect: Duration,
    /// Longest silence within a transfer.
    pub stall: Duration,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME`,
    /// `HF_TOKEN` and the proxy variables, as the hub's Python client does.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// As [`Hub::from_env`], with another source of variables.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name: &str| {
            var(name)
                .and_then(|v| v.into_string().ok())
                .filter(|v| !v.is_empty())
        };
        let dir = |name: &str| var(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let home = dir("HF_HOME")
            .or_else(|| dir("XDG_CACHE_HOME").map(|d| d.join("huggingface")))
            .or_else(|| dir("HOME").map(|d| d.join(".cache/huggingface")));
        let stored = || {
            let token = std::fs::read_to_string(home.as_ref()?.join("token")).ok()?;
            Some(token.trim().to_owned()).filter(|t| !t.is_empty())
        };
        let proxies = [
            "ALL_PROXY",
            "all_proxy",
            "HTTPS_PROXY",
            "https_proxy",
            "HTTP_PROXY",
            "http_proxy",
        ];
        Self {
            endpoint: text("HF_ENDPOINT")
                .unwrap_or_else(|| DEFAULT_ENDPOINT.into())
                .trim_end_matches('/')
                .into(),
            token: text("HF_TOKEN").or_else(stored),
            cache: dir("HF_HUB_CACHE").or_else(|| home.as_ref().map(|h| h.join("hub"))),
            proxy: proxies.iter().any(|p| text(p).is_some()),
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(60),
        }
    }

    /// The model in the shared cache, where all of it is there: the folder of
    /// one revision, or the one file.
    pub fn cached(&self, model: &HubRef) -> Option<PathBuf> {
        let repo = HubCache::new(self.cache.clone()?).repo(model.repo());
        if let Some(file) = &model.file {
            return repo.get(file);
        }
        let folder = repo.get("config.json")?.parent()?.to_owned();
        (has_weights(&folder)).then_some(folder)
    }

    /// Fetches a model into the shared cache; resumes where an earlier attempt
    /// was cut off.
    ///
    /// # Errors
    /// [`Error::Network`] when the hub cannot be reached, does not answer, or
    /// refuses; [`Error::Unsupported`] when the repository holds no weights that
    /// can be read; [`Error::Hash`] when a file arrives damaged; the errors of
    /// writing files.
    pub fn fetch(&self, model: &HubRef, progress: &dyn Progress) -> Result<PathBuf> {
        let Some(cache) = self.cache.clone() else {
            return Err(Error::Config(
                "there is no folder for models from the hub: set HF_HOME, XDG_CACHE_HOME or HOME to an absolute path".into(),
            ));
        };
        self.reach(model)?;
        let info = self.info(model, &cache)?;
        let files = match &model.file {
            Some(file) => vec![info.file(file).ok_or_else(|| info.lacks(model, file))?],
            None => info.select(model)?,
        };
        let total: u64 = files.iter().filter_map(|f| f.size).sum();
        progress.notice(&format!(
            "{model}: {} file{}, {}. Licence, as its publisher states it: {}.",
            files.len(),
            if files.len() == 1 { "" } else { "s" },
            human_bytes(total),
            info.licence()
        ));
        let mut folder: Option<PathBuf> = None;
        let mut last = None;
        for file in files {
            let path = self.file(model, file, &cache, progress)?;
            let depth = file.rfilename.split('/').count();
            let here = path.ancestors().nth(depth).map(Path::to_owned);
            if folder.is_some() && folder != here {
                return Err(network(
                    model,
                    "the repository changed meanwhile",
                    TRY_AGAIN,
                ));
            }
            folder = here;
            last = Some(path);
        }
        match (&model.file, folder, last) {
            (Some(_), _, Some(file)) => Ok(file),
            (None, Some(folder), _) if has_weights(&folder) => Ok(folder),
            _ => Err(network(
                model,
                "the index of its weights names files that the repository does not hold",
                "Its publisher has to mend it",
            )),
        }
    }

    /// Fetches one pinned file to `target`, below `work`. The hub is asked for
    /// the file's hash first, so that a wrong file costs no download.
    pub(crate) fn fetch_pinned(
        &self,
        model: &HubRef,
        file: &str,
        pin: &Pinned,
        target: &Path,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        self.reach(model)?;
        let cache = work.join("hub");
        let info = self.info(model, &cache)?;
        let known = info.file(file).ok_or_else(|| info.lacks(model, file))?;
        if let Some(found) = known.sha256().filter(|h| *h != pin.sha256) {
            return Err(Error::Hash {
                file: file.to_owned(),
                origin: model.to_string(),
                expected: pin.sha256.to_owned(),
                expected_bytes: pin.bytes,
                found: found.to_owned(),
                found_bytes: known.size.unwrap_or_default(),
            });
        }
        let path = self.file(model, known, &cache, progress)?;
        let blob = path.canonicalize().map_err(|e| Error::io(&path, e))?;
        std::fs::rename(&blob, target).map_err(|e| Error::write(target, e))
    }

    /// Fetches one file into a hub cache, or finds it there.
    fn file(
        &self,
        model: &HubRef,
        file: &Sibling,
        cache: &Path,
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        let repo = HubCache::new(cache.to_owned()).repo(model.repo());
        let name = file.rfilename.clone();
        if let Some(path) = repo.get(&name) {
            return Ok(path);
        }
        let api = self.api(model, cache)?;
        let counter = Arc::new(AtomicU64::new(0));
        let bar = Counter(counter.clone());
        let wanted = name.clone();
        progress.begin(&format!("{} of {}", name, model.repo), file.size);
        let result = self.watch(model, progress, &counter, self.stall, move || {
            api.download_with_progress(&wanted, bar)
        });
        progress.finish();
        let path = result?.map_err(|e| refuse(model, &name, e, cache))?;

        // Large files are named by their SHA-256 in the cache; resumed ones
        // especially deserve the check.
        let blob = path.canonicalize().map_err(|e| Error::io(&path, e))?;
        let expected = blob
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default()
            .to_owned();
        if expected.len() == 64 {
            let (found, found_bytes) = verify::hash_file(&blob)?;
            if found != expected {
                let _ = std::fs::remove_file(&path);
                let _ = std::fs::remove_file(&blob);
                return Err(Error::Hash {
                    file: name,
                    origin: model.to_string(),
                    expected,
                    expected_bytes: file.size.unwrap_or_default(),
                    found,
                    found_bytes,
                });
            }
        }
        Ok(path)
    }

    fn api(&self, model: &HubRef, cache: &Path) -> Result<ApiRepo> {
        ApiBuilder::from_cache(HubCache::new(cache.to_owned()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(3)
            .with_user_agent("sequor", env!("CARGO_PKG_VERSION"))
            .build()
            .map(|api| api.repo(model.repo()))
            .map_err(|e| network(model, &e.to_string(), TRY_AGAIN))
    }

    /// What the repository holds.
    fn info(&self, model: &HubRef, cache: &Path) -> Result<Info> {
        let request = self
            .api(model, cache)?
            .info_request()
            .query("blobs", "true")
            .timeout(self.stall);
        let answer = self.watch(
            model,
            &super::progress::Silent,
            &AtomicU64::new(0),
            self.stall * 2,
            move || match request.call() {
                Ok(response) => response.into_string().map_err(|e| (None, e.to_string())),
                Err(e) => {
                    let text = e.to_string();
                    Err((e.into_response().map(|r| r.status()), text))
                }
            },
        )?;
        let text = answer.map_err(|(status, text)| match status {
            Some(401 | 403) => network(
                model,
                "the hub says that there is no such repository, or that it asks for a login",
                &format!(
                    "Look at {}/{}; where it asks, accept its licence there and set HF_TOKEN",
                    self.endpoint, model.repo
                ),
            ),
            Some(404) => network(
                model,
                &format!(
                    "there is no such repository, or no revision '{}' of it",
                    model.revision
                ),
                "Check the name; it is written owner/name",
            ),
            _ => network(model, &text, TRY_AGAIN),
        })?;
        serde_json::from_str(&text).map_err(|e| {
            network(
                model,
                &format!("the hub's answer makes no sense ({e})"),
                "Is HF_ENDPOINT, or a proxy, in the way?",
            )
        })
    }

    /// Fails soon, and in plain words, where there is no way to the hub.
    fn reach(&self, model: &HubRef) -> Result<()> {
        let host = host_and_port(&self.endpoint).ok_or_else(|| {
            Error::Config(format!(
                "HF_ENDPOINT is '{}', which is not a web address such as {DEFAULT_ENDPOINT}",
                self.endpoint
            ))
        })?;
        if self.proxy {
            return Ok(());
        }
        let patience = self.connect;
        let target = host.clone();
        let quiet = super::progress::Silent;
        // Looking a name up cannot be given a time limit, hence the thread.
        let tried = self.watch(model, &quiet, &AtomicU64::new(0), patience, move || {
            let end = Instant::now() + patience;
            let mut reason = "its name leads nowhere".to_owned();
            for address in target.to_socket_addrs().map_err(|e| e.to_string())? {
                let left = end
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_millis(1));
                match TcpStream::connect_timeout(&address, left) {
                    Ok(_) => return Ok(()),
                    Err(e) => reason = e.to_string(),
                }
            }
            Err(reason)
        });
        let reason = match tried {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {} seconds", patience.as_secs_f64()),
        };
        Err(network(
            model,
            &format!("{host} cannot be reached ({reason})"),
            NO_WAY,
        ))
    }

    /// Runs `job` in a thread and waits for it as long as `counter` moves. A job
    /// that is given up goes on until its own end, and nobody listens.
    fn watch<T: Send + 'static>(
        &self,
        model: &HubRef,
        progress: &dyn Progress,
        counter: &AtomicU64,
        patience: Duration,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let (send, receive) = channel();
        std::thread::Builder::new()
            .name("sequor-hub".into())
            .spawn(move || drop(send.send(job())))
            .map_err(|e| Error::io("a new thread", e))?;
        let mut last = (0, Instant::now());
        loop {
            match receive.recv_timeout(Duration::from_millis(50)) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(network(model, "the transfer broke off", TRY_AGAIN));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let done = counter.load(Ordering::Relaxed);
            if done != last.0 {
                last = (done, Instant::now());
                progress.advance(done);
            } else if last.1.elapsed() > patience {
                return Err(network(
                    model,
                    &format!("nothing arrived for {} seconds", patience.as_secs_f64()),
                    TRY_AGAIN,
                ));
            }
        }
    }
}

/// Counts the bytes of a transfer.
struct Counter(Arc<AtomicU64>);

impl hf_hub::api::Progress for Counter {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.0.store(0, Ordering::Relaxed);
    }
    fn update(&mut self, size: usize) {
        self.0.fetch_add(size as u64, Ordering::Relaxed);
    }
    fn finish(&mut self) {}
}

/// The part of the hub's description of a repository that is used.
#[derive(Debug, Default, Deserialize)]
struct Info {
    #[serde(default)]
    siblings: Vec<Sibling>,
    #[serde(default)]
    tags: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    #[serde(default)]
    sha256: Option<String>,
}

impl Sibling {
    fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref()?.sha256.as_deref()
    }
}

impl Info {
    fn file(&self, name: &str) -> Option<&Sibling> {
        self.siblings.iter().find(|s| s.rfilename == name)
    }

    fn licence(&self) -> &str {
        self.tags
            .iter()
            .find_map(|t| t.strip_prefix("license:"))
            .unwrap_or("not stated")
    }

    /// The files that make a model, small ones first.
    fn select(&self, model: &HubRef) -> Result<Vec<&Sibling>> {
        let mut files = vec![
            self.file("config.json")
                .ok_or_else(|| self.lacks(model, "config.json"))?,
        ];
        files.extend(OPTIONAL.iter().filter_map(|name| self.file(name)));
        if let Some(weights) = self.file(WEIGHTS) {
            files.push(weights);
        } else if let Some(index) = self.file(INDEX) {
            files.push(index);
            files.extend(self.siblings.iter().filter(|s| is_shard(&s.rfilename)));
        } else {
            return Err(self.lacks(model, WEIGHTS));
        }
        Ok(files)
    }

    fn lacks(&self, model: &HubRef, file: &str) -> Error {
        let gguf: Vec<_> = self
            .siblings
            .iter()
            .map(|s| s.rfilename.as_str())
            .filter(|n| n.ends_with(".gguf"))
            .take(20)
            .collect();
        let mut message = format!("the hub repository {} holds no {file}", model.repo);
        if let Some(first) = gguf.first() {
            message += &format!(
                "; it holds GGUF files, take one by its name, as in hf:{}/{first} (there are: {})",
                model.repo,
                gguf.join(", ")
            );
        }
        Error::Unsupported(message)
    }
}

/// `model-00001-of-00003.safetensors`
fn is_shard(name: &str) -> bool {
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    name.strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-of-"))
        .is_some_and(|(i, n)| digits(i) && digits(n))
}

/// Whether a folder holds all of a model's weights.
fn has_weights(folder: &Path) -> bool {
    if folder.join(WEIGHTS).is_file() {
        return true;
    }
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let Ok(text) = std::fs::read_to_string(folder.join(INDEX)) else {
        return false;
    };
    serde_json::from_str::<Index>(&text).is_ok_and(|index| {
        index
            .weight_map
            .values()
            .all(|shard| is_shard(shard) && folder.join(shard).is_file())
    })
}

/// `host:port` of a web address.
fn host_and_port(endpoint: &str) -> Option<String> {
    let (scheme, rest) = endpoint.split_once("://")?;
    let port = match scheme {
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    let host = rest.split('/').next().unwrap_or_default();
    let plain = !host.is_empty()
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b));
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, p)| p.parse::<u16>().is_ok());
    plain.then(|| {
        if has_port {
            host.to_owned()
        } else {
            format!("{host}:{port}")
        }
    })
}

fn network(model: &HubRef, reason: &str, remedy: &str) -> Error {
    Error::Network {
        what: model.to_string(),
        reason: reason.to_owned(),
        remedy: remedy.to_owned(),
    }
}

fn refuse(model: &HubRef, file: &str, error: ApiError, cache: &Path) -> Error {
    match error {
        ApiError::TooManyRetries(inner) => refuse(model, file, *inner, cache),
        // Broken transfers are errors of the operating system, too.
        ApiError::IoError(e) => match Error::write(cache, e) {
            Error::Io { source, .. } => network(model, &format!("{file}: {source}"), TRY_AGAIN),
            full_or_forbidden => full_or_forbidden,
        },
        ApiError::LockAcquisition(_) => network(
            model,
            "another process is fetching it",
            "Wait for that one and try again",
        ),
        ApiError::InvalidResume => network(
            model,
            &format!("an interrupted download of {file} cannot be continued"),
            &format!(
                "Delete the .part files below {} and try again",
                cache.display()
            ),
        ),
        other => network(model, &format!("{file}: {other}"), TRY_AGAIN),
    }
}

#[cfg(test)]
mod tests;
