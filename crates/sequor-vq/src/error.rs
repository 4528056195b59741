//! The error of this crate: one variant per reason.

use sequor_kernels::bridge::BridgeError;
use sequor_nn::tch::TchError;
use std::fmt;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a quantiser could not be made or could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a configuration is out of range or contradicts another.
    #[error("`{field}` is {value}: {advice}")]
    Config {
        /// The field, as it is written in the configuration.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        advice: String,
    },
    /// A tensor passed in has the wrong shape, type or values.
    #[error("invalid input: {0}")]
    Input(String),
    /// A size is beyond what is allowed.
    #[error("limit exceeded: {0}")]
    Limits(String),
    /// The parameters do not fit, or libtorch refused an operation.
    #[error(transparent)]
    Model(#[from] sequor_nn::Error),
}

impl Error {
    /// An [`Error::Config`].
    pub fn config(field: &'static str, value: impl fmt::Debug, advice: impl Into<String>) -> Self {
        Self::Config {
            field,
            value: format!("{value:?}"),
            advice: advice.into(),
        }
    }
}

impl From<TchError> for Error {
    fn from(e: TchError) -> Self {
        Self::Model(e.into())
    }
}

impl From<BridgeError> for Error {
    fn from(e: BridgeError) -> Self {
        Self::Input(e.to_string())
    }
}
