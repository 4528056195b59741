//! How a command ends: 0 done, 1 failure, 2 wrong usage, 130 interrupted.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why a command did not finish.
#[derive(Debug)]
pub enum Exit {
    /// The options cannot be meant.
    Usage(String),
    /// Something went wrong.
    Failure(String),
    /// Ctrl-C, after everything was put in order.
    Interrupted,
}

/// Result of a command.
pub type Result<T = ()> = std::result::Result<T, Exit>;

impl Exit {
    /// Prints the reason and gives the exit code.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Usage(why) => {
                eprintln!("error: {why}");
                ExitCode::from(2)
            }
            Self::Failure(why) => {
                eprintln!("error: {why}");
                ExitCode::FAILURE
            }
            Self::Interrupted => {
                eprintln!("interrupted");
                ExitCode::from(130)
            }
        }
    }
}

/// A failure with any error as its reason.
pub fn failure(e: impl std::fmt::Display) -> Exit {
    Exit::Failure(e.to_string())
}

/// Wrong usage with any error as its reason.
pub fn usage(e: impl std::fmt::Display) -> Exit {
    Exit::Usage(e.to_string())
}

impl From<sequor_text::Error> for Exit {
    fn from(e: sequor_text::Error) -> Self {
        match e {
            sequor_text::Error::Cancelled => Self::Interrupted,
            e if e.is_usage() => Self::Usage(e.to_string()),
            e => Self::Failure(e.to_string()),
        }
    }
}

impl From<std::io::Error> for Exit {
    fn from(e: std::io::Error) -> Self {
        // The reader of our output went away: nothing to complain about.
        if e.kind() == std::io::ErrorKind::BrokenPipe {
            Self::Interrupted
        } else {
            failure(e)
        }
    }
}

/// A flag that Ctrl-C sets. A second Ctrl-C ends the program at once.
pub fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let handler = flag.clone();
    let set = move || {
        if handler.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(set).map_err(|e| failure(format!("Ctrl-C cannot be handled: {e}")))?;
    Ok(flag)
}
