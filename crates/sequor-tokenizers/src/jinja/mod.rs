//! A small Jinja for chat templates, safe by construction.
//!
//! Chat templates arrive with model files, from anyone. General template
//! engines bound the number of instructions, but one instruction can double a
//! string, compare exponentially shared lists or print a value that contains
//! itself, which ends in a hang, in exhausted memory or in a stack overflow
//! that no program survives. Here every operation pays for the work and the
//! memory it causes from one [`Budget`](budget::Budget), values cannot be
//! cyclic or nested deeply, and every recursion is counted.
//!
//! The language is what published chat templates use, as Hugging Face renders
//! them: `if`, `for` (with `break` and `continue`), `set`, `macro`, `with`,
//! `raw`, `generation`, whitespace control with `trim_blocks` and
//! `lstrip_blocks`, Jinja's expressions, filters and tests, and Python's
//! methods of strings and mappings. Inheritance and inclusion do not exist in
//! a single string.

mod ast;
mod budget;
mod builtins;
mod eval;
mod filters;
mod lexer;
mod methods;
mod parser;
mod python;
mod strftime;
mod value;

use serde_json::Value as Json;

pub(crate) use budget::Limits;

/// Why a template could not be parsed or rendered.
#[derive(Debug)]
pub(crate) struct Fault {
    pub kind: FaultKind,
    /// Line of the template, from 1.
    pub line: Option<usize>,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The template is wrong, or refused its input.
    Template,
    /// The work or the output grew beyond its limit.
    Limits,
}

/// Result of this module.
type Result<T> = std::result::Result<T, Fault>;

impl Fault {
    fn new(reason: impl Into<String>) -> Self {
        Self { kind: FaultKind::Template, line: None, reason: reason.into() }
    }

    fn limit(reason: impl Into<String>) -> Self {
        Self { kind: FaultKind::Limits, line: None, reason: reason.into() }
    }

    /// Adds the line where it happened, unless a more exact one is known.
    fn at(mut self, line: u32) -> Self {
        self.line = self.line.or(Some(line as usize));
        self
    }
}

/// Checks the syntax of a template, and that all filters and tests it names exist.
pub(crate) fn check(source: &str) -> Result<()> {
    parser::parse(source).map(|_| ())
}

/// Renders a template with the variables of `context`; `now` is what
/// `strftime_now` takes for the present, in seconds since 1970.
pub(crate) fn render(source: &str, context: Vec<(String, Json)>, now: i64, limits: Limits) -> Result<String> {
    let program = parser::parse(source)?;
    eval::run(&program, context, now, limits)
}

#[cfg(test)]
mod tests;
