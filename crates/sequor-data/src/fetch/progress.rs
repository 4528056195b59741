//! How long work tells somebody about itself.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Receives what a fetch has to say. Every method has an empty default.
pub trait Progress: Send + Sync {
    /// One line for a person: a licence, a fallback that was taken, a wait.
    fn notice(&self, _message: &str) {}
    /// A piece of work begins; `total` is its size in bytes where it is known.
    fn begin(&self, _what: &str, _total: Option<u64>) {}
    /// `done` bytes of the current piece are there.
    fn advance(&self, _done: u64) {}
    /// The current piece of work has ended, well or badly.
    fn finish(&self) {}
    /// Asked many times a second; `true` ends the work with
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    fn cancelled(&self) -> bool {
        false
    }
}

/// Says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {}

/// A bar on standard error when that is a terminal; otherwise one line for each
/// piece of work, so that a log stays readable.
#[derive(Debug)]
pub struct Terminal {
    interactive: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// Looks at standard error once to choose between a bar and plain lines.
    pub fn new() -> Self {
        Self {
            interactive: std::io::stderr().is_terminal(),
            bar: Mutex::new(None),
        }
    }

    /// Runs `f` on the place of the current bar. A panic elsewhere while the
    /// lock was held leaves nothing that could be wrong.
    fn with_bar<R>(&self, f: impl FnOnce(&mut Option<ProgressBar>) -> R) -> R {
        f(&mut self.bar.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Progress for Terminal {
    fn notice(&self, message: &str) {
        self.with_bar(|bar| match bar {
            Some(bar) => bar.suspend(|| say(message)),
            None => say(message),
        });
    }

    fn begin(&self, what: &str, total: Option<u64>) {
        if !self.interactive {
            match total {
                Some(total) => say(&format!("fetching {what} ({})", human_bytes(total))),
                None => say(&format!("fetching {what}")),
            }
            return;
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{msg} {wide_bar} {bytes}/{total_bytes} {eta}",
            ),
            None => (ProgressBar::new_spinner(), "{spinner} {msg} {bytes}"),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        self.with_bar(|slot| *slot = Some(bar));
    }

    fn advance(&self, done: u64) {
        self.with_bar(|bar| {
            if let Some(bar) = bar {
                bar.set_position(done);
            }
        });
    }

    fn finish(&self) {
        if let Some(bar) = self.with_bar(Option::take) {
            bar.finish_and_clear();
        }
    }
}

/// A closed standard error is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A size for a person: decimal units, as shops and disks use them.
///
/// ```
/// assert_eq!(sequor_data::human_bytes(98_362_432), "98.4 MB");
/// assert_eq!(sequor_data::human_bytes(999), "999 B");
/// ```
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        // 999.95 would print as "1000.0".
        if value < 999.95 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}
