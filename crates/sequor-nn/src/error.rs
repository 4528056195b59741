//! The error of the ground floor: one variant per reason, each saying what was
//! expected, what was found, and what to do.

use std::path::PathBuf;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a layer, a weight file or a state could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value passed in is out of range or has the wrong shape.
    #[error("invalid input: {0}")]
    Input(String),
    /// A configuration contradicts itself or is incomplete.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A weight file is damaged or is not what it claims to be.
    #[error("{path}: {reason}", path = path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The tensors of a file do not fit the model.
    #[error(transparent)]
    Mismatch(#[from] Box<crate::params::MismatchReport>),
    /// A size is beyond what is allowed.
    #[error("limit exceeded: {0}")]
    Limits(String),
    /// Something real that this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// libtorch refused an operation.
    #[error("libtorch failed in {op}: {message}")]
    Backend {
        /// The layer or operation that was running.
        op: String,
        /// First line of libtorch's message.
        message: String,
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
    /// An [`Error::Weights`] for `path`.
    pub fn weights(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Weights {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// Adds the name of the layer that was running to a libtorch error.
    #[must_use]
    pub fn in_layer(self, layer: &str) -> Self {
        match self {
            Self::Backend { op, message } => Self::Backend {
                op: format!("{layer}: {op}"),
                message,
            },
            other => other,
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        let text = e.to_string();
        // libtorch appends a C++ backtrace; the first line says what happened.
        let message = text.lines().next().unwrap_or("unknown error").to_owned();
        Self::Backend {
            op: "a tensor operation".to_owned(),
            message,
        }
    }
}
