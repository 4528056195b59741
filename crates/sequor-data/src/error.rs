//! The crate's error: one variant per reason, each saying what to do next.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model or a data set could not be found, fetched or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value passed in is out of range or malformed.
    #[error("invalid input: {0}")]
    Input(String),
    /// The environment lacks something that is needed (a home folder, say).
    #[error("invalid configuration: {0}")]
    Config(String),
    /// Nobody knows this name.
    #[error("no {kind} is called '{name}'{hint}; 'sequor {command} list' shows all names, and a path or hf:owner/name works too", hint = nearest_hint(nearest), command = kind.command())]
    UnknownName {
        /// What was looked for.
        kind: crate::catalog::Kind,
        /// The name that was asked for.
        name: String,
        /// Known names that look like it, the likeliest first.
        nearest: Vec<String>,
    },
    /// The thing is not on this machine and fetching is not allowed.
    #[error("'{name}' is not on this machine and fetching is switched off (--offline). {how}")]
    Offline {
        /// The name that was asked for.
        name: String,
        /// How to fetch it once.
        how: String,
    },
    /// A program that fetching needs is not installed.
    #[error("{program} was not found, and it is needed to fetch {what}. {install}")]
    ClientMissing {
        /// The program.
        program: String,
        /// What was to be fetched.
        what: String,
        /// How to install the program.
        install: String,
    },
    /// A package client ran and failed.
    #[error("{client} could not fetch {what}: {message}")]
    Client {
        /// The client, as called.
        client: String,
        /// The package.
        what: String,
        /// The last lines the client printed, or what to do about them.
        message: String,
    },
    /// The network, or the far side, did not answer as hoped.
    #[error("{what} could not be fetched: {reason}. {remedy}")]
    Network {
        /// What was to be fetched.
        what: String,
        /// What happened.
        reason: String,
        /// What else can be done.
        remedy: String,
    },
    /// None of the origins of a catalogue entry worked.
    #[error("'{name}' could not be fetched from any of its origins:{list}", list = origin_list(attempts))]
    AllOriginsFailed {
        /// The entry.
        name: String,
        /// One error for every origin, in the order tried.
        attempts: Vec<Error>,
    },
    /// A fetched file is not the one that was pinned.
    #[error(
        "{file} from {origin} is not the pinned file: expected SHA-256 {expected} ({expected_bytes} bytes), found {found} ({found_bytes} bytes). Nothing was kept; the origin may have published a new version"
    )]
    Hash {
        /// The file within the entry.
        file: String,
        /// Where it came from.
        origin: String,
        /// The pinned hash, in hexadecimal.
        expected: String,
        /// The pinned size in bytes.
        expected_bytes: u64,
        /// The hash that was computed.
        found: String,
        /// The size that was found.
        found_bytes: u64,
    },
    /// A data file is damaged or is not what it claims to be.
    #[error("{path}: {reason}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A size is beyond what is allowed.
    #[error("limit exceeded: {0}")]
    Limits(String),
    /// Something real that this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The disk is full.
    #[error("the disk that holds {path} is full; free some space, or set XDG_CACHE_HOME to a folder on another disk", path = path.display())]
    DiskFull {
        /// The file or folder that was being written.
        path: PathBuf,
    },
    /// The cache folder cannot be written.
    #[error("{path} cannot be written ({source}); set XDG_CACHE_HOME to a folder that you may write to", path = path.display())]
    Unwritable {
        /// The file or folder that was being written.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// An [`Error::Io`] for reading `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// An [`Error::Format`] for `path`.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// The error of a failed write: a full disk and a forbidden folder have
    /// remedies of their own.
    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path },
            ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::NotADirectory => Self::Unwritable { path, source },
            _ => Self::Io { path, source },
        }
    }

    /// The error without advice, for the case that something else is tried.
    pub(crate) fn in_short(&self) -> String {
        match self {
            Self::Network { what, reason, .. } => format!("{what} could not be fetched: {reason}"),
            Self::Hash { file, origin, .. } => {
                format!("{file} from {origin} is not the pinned file")
            }
            other => other.to_string(),
        }
    }

    /// Whether trying another origin is pointless: the reason lies on this side.
    pub(crate) fn is_local(&self) -> bool {
        matches!(
            self,
            Self::DiskFull { .. } | Self::Unwritable { .. } | Self::Cancelled | Self::Io { .. }
        )
    }
}

fn nearest_hint(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        [one] => format!(" (did you mean '{one}'?)"),
        many => format!(" (nearest: {})", many.join(", ")),
    }
}

fn origin_list(attempts: &[Error]) -> String {
    attempts.iter().map(|e| format!("\n  - {e}")).collect()
}
