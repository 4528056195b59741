//! The error of this crate: those of the crates below, and what only text can get wrong.

use std::path::PathBuf;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a text could not be generated or a model not be trained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option cannot be meant.
    #[error("{0}")]
    Input(String),
    /// A configuration or recipe is incomplete or contradicts itself.
    #[error("{0}")]
    Config(String),
    /// Something real that this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Weights or the network.
    #[error(transparent)]
    Model(#[from] sequor_nn::Error),
    /// Choosing tokens.
    #[error(transparent)]
    Sampling(sequor_sampling::Error),
    /// Text to tokens and back.
    #[error(transparent)]
    Tokenizer(#[from] sequor_tokenizers::Error),
    /// Finding or fetching a model or data set.
    #[error(transparent)]
    Data(sequor_data::Error),
    /// The training loop.
    #[error(transparent)]
    Train(sequor_train::Error),
    /// Measuring quality.
    #[error(transparent)]
    Eval(#[from] sequor_eval::Error),
    /// The operating system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// Is it the caller's options that are wrong, and not a file or the machine?
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Input(_) | Self::Sampling(sequor_sampling::Error::Input { .. })
        )
    }
}

impl From<sequor_sampling::Error> for Error {
    fn from(e: sequor_sampling::Error) -> Self {
        match e {
            sequor_sampling::Error::Cancelled => Self::Cancelled,
            sequor_sampling::Error::Model(e) => Self::Model(e),
            e => Self::Sampling(e),
        }
    }
}

impl From<sequor_data::Error> for Error {
    fn from(e: sequor_data::Error) -> Self {
        match e {
            sequor_data::Error::Cancelled => Self::Cancelled,
            e => Self::Data(e),
        }
    }
}

impl From<sequor_train::Error> for Error {
    fn from(e: sequor_train::Error) -> Self {
        match e {
            sequor_train::Error::Cancelled => Self::Cancelled,
            e => Self::Train(e),
        }
    }
}
