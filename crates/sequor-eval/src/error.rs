//! The crate's error: one variant per reason.

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value passed in is out of range or has the wrong shape.
    #[error("invalid input: {0}")]
    Input(String),
    /// The network failed.
    #[error(transparent)]
    Backend(#[from] sequor_nn::Error),
}

impl From<sequor_nn::tch::TchError> for Error {
    fn from(e: sequor_nn::tch::TchError) -> Self {
        Self::Backend(e.into())
    }
}
