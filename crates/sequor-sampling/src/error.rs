//! The error of this crate: one variant per reason.

use std::fmt;
use std::path::PathBuf;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be sampled, drafted, verified or generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option or argument is out of range.
    #[error("`{option}` is {value}, expected {expected}")]
    Input {
        /// Name of the option, as users write it.
        option: String,
        /// What was given.
        value: String,
        /// The allowed range, in words.
        expected: String,
    },
    /// Options that contradict each other, or a configuration that cannot be read.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A size is beyond what the model can hold.
    #[error("{what} is {found}, the limit is {limit}: {advice}")]
    Limits {
        /// What is too large.
        what: &'static str,
        /// Its size.
        found: usize,
        /// The largest size allowed.
        limit: usize,
        /// What to do about it.
        advice: &'static str,
    },
    /// Something real that this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A row of logits from which no token can be chosen.
    #[error("no token can be chosen for position {position}: {problem}")]
    Logits {
        /// Index in the sequence (prompt included) of the token to be chosen.
        position: usize,
        /// What is wrong with the row.
        problem: LogitsProblem,
    },
    /// The acceptance-rejection loop of a residual law gave up. It happens with a
    /// probability below one in a million per rejection, and only when target and
    /// draft are almost equal.
    #[error("no residual unit found in {tries} tries; target and draft laws are almost equal")]
    Residual {
        /// Draws made.
        tries: usize,
    },
    /// A model, state or drafter did not keep to its interface.
    #[error("{who} broke its contract: {what}")]
    Contract {
        /// The part at fault.
        who: String,
        /// What it did, and what was expected.
        what: String,
    },
    /// The network below failed.
    #[error(transparent)]
    Model(#[from] sequor_nn::Error),
    /// A file could not be read or written, or is damaged.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: std::io::Error,
    },
    /// Any other failure of a model or drafter that is implemented elsewhere.
    #[error("{0}")]
    Backend(String),
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// What makes a row of logits unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LogitsProblem {
    /// At least one entry is NaN.
    NotANumber,
    /// At least one entry is plus infinity.
    Infinite,
    /// Every entry is minus infinity: nothing is left to choose from.
    AllRemoved,
    /// There are no entries.
    Empty,
}

impl fmt::Display for LogitsProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotANumber => "its logits contain NaN",
            Self::Infinite => "its logits contain plus infinity",
            Self::AllRemoved => "every token was removed (all logits are minus infinity)",
            Self::Empty => "it has no logits",
        })
    }
}

impl Error {
    /// An [`Error::Input`].
    pub fn input(
        option: impl Into<String>,
        value: impl fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Input {
            option: option.into(),
            value: value.to_string(),
            expected: expected.into(),
        }
    }

    /// An [`Error::File`].
    pub fn file(path: impl Into<PathBuf>, reason: std::io::Error) -> Self {
        Self::File {
            path: path.into(),
            reason,
        }
    }

    /// An [`Error::Contract`].
    pub fn contract(who: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Contract {
            who: who.into(),
            what: what.into(),
        }
    }

    /// Names the position of a token in an [`Error::Logits`].
    #[must_use]
    pub fn at_position(self, position: usize) -> Self {
        match self {
            Self::Logits { problem, .. } => Self::Logits { position, problem },
            other => other,
        }
    }
}
