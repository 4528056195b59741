//! The crate's error: one variant per reason, each saying what to do next.

use std::path::PathBuf;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a training run could not start, go on or be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value passed in is out of range or has the wrong shape.
    #[error("invalid input: {0}")]
    Input(String),
    /// A recipe or an option contradicts itself or is out of range.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A checkpoint is damaged or is not what it claims to be.
    #[error("{path}: {reason}", path = path.display())]
    Weights {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A checkpoint was made by a run with other settings.
    #[error("{path}: cannot resume, because {field} was {saved} when this run began and is {now} now; restore it, or start afresh in another folder", path = path.display())]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// The setting that differs, as a path of keys.
        field: String,
        /// Its value in the checkpoint.
        saved: String,
        /// Its value now.
        now: String,
    },
    /// The loss or its gradient stopped being a number and stayed so.
    #[error(
        "the gradient was not finite in {steps} steps in a row (last at step {last}); lower the learning rate or the clipping norm, or lengthen the warm-up"
    )]
    Diverged {
        /// Number of consecutive steps that were skipped.
        steps: u64,
        /// The last of them.
        last: u64,
    },
    /// A size is beyond what is allowed.
    #[error("limit exceeded: {0}")]
    Limits(String),
    /// Something real that this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Backend(#[from] sequor_nn::Error),
    /// The task that is being trained failed for a reason of its own.
    #[error(transparent)]
    Task(Box<dyn std::error::Error + Send + Sync>),
    /// Somebody asked to stop. What was done is in the newest checkpoint.
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

    /// An [`Error::Task`] around any other error.
    pub fn task(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Task(Box::new(error))
    }
}

impl From<sequor_nn::tch::TchError> for Error {
    fn from(e: sequor_nn::tch::TchError) -> Self {
        Self::Backend(e.into())
    }
}
