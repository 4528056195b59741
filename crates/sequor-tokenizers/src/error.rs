//! The error of this crate: one variant per reason, each saying what was
//! expected, what was found, and what to do.

use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a tokenizer, a stream or a chat template could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value passed in is out of range.
    #[error("invalid input: {0}")]
    Input(String),
    /// A token id that no token can have.
    #[error(
        "token id {id} is outside the vocabulary of {vocab_size} tokens (ids 0 to {last}); \
         was it made by another model?",
        last = vocab_size.saturating_sub(1)
    )]
    TokenId {
        /// The id that was passed in.
        id: u32,
        /// One more than the largest id of this tokenizer.
        vocab_size: usize,
    },
    /// Options or vocabulary fields that contradict one another.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A tokenizer file is damaged or is not what it claims to be.
    #[error("{origin}: {reason}")]
    Definition {
        /// The file, or a name for what was read from memory.
        origin: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A chat template has a mistake in it, or refused the messages.
    #[error("chat template{}: {reason}", line.map(|n| format!(", line {n}")).unwrap_or_default())]
    Template {
        /// Line of the template, counted from 1, when it is known.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// A size or an amount of work is beyond what is allowed.
    #[error("limit exceeded: {0}")]
    Limits(String),
    /// Something real that this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The tokenizer engine refused an operation.
    #[error("the tokenizer failed to {op}: {message}")]
    Backend {
        /// What was being done.
        op: &'static str,
        /// The engine's message.
        message: String,
    },
    /// The operating system refused.
    #[error("{path}: {source}{hint}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
        /// What to do about it; empty, or starting with `"; "`.
        hint: String,
    },
}

impl Error {
    /// An [`Error::Io`] for `path`, with advice when the file is not there.
    pub(crate) fn io(path: &Path, source: std::io::Error, advice: &str) -> Self {
        let missing = source.kind() == std::io::ErrorKind::NotFound && !advice.is_empty();
        let hint = if missing {
            format!("; {advice}")
        } else {
            String::new()
        };
        Self::Io {
            path: path.to_owned(),
            source,
            hint,
        }
    }

    /// An [`Error::Definition`] for `origin`.
    pub(crate) fn definition(origin: &str, reason: impl Into<String>) -> Self {
        Self::Definition {
            origin: origin.to_owned(),
            reason: reason.into(),
        }
    }
}
