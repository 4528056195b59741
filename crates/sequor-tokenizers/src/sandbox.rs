//! What the template engine itself does not guard against.
//!
//! A namespace is the only thing that a template can change, so only a
//! namespace can come to hold itself; printing or comparing it would then
//! overflow the stack, which no program survives. Templates use namespaces by
//! their attributes; [`check_namespaces`] rejects any other use. Values can
//! still be nested as deeply as a template has steps: [`on_large_stack`] gives
//! them room.

use std::collections::BTreeSet;

use crate::{Error, Result};

/// Stack of the rendering thread, in bytes. Only what is used of it becomes
/// memory. It holds values nested as deeply as the steps of a template allow.
const STACK_BYTES: usize = 512 << 20;

/// Rejects templates in which a namespace could come to hold itself.
pub(crate) fn check_namespaces(source: &str) -> Result<()> {
    let tokens = tokens(source);
    let text = |n: Option<usize>| n.and_then(|n| tokens.get(n)).map_or("", |t| t.text);
    let mut names = BTreeSet::new();
    for (n, token) in tokens
        .iter()
        .enumerate()
        .filter(|(_, t)| t.text == "namespace")
    {
        let [before, name, set] = [1, 2, 3].map(|back| text(n.checked_sub(back)));
        if before == "." {
            continue;
        }
        if before != "=" || set != "set" || text(Some(n + 1)) != "(" {
            return Err(misuse(
                token.line,
                "namespace() can only be used as in {% set ns = namespace(...) %}",
            ));
        }
        names.insert(name);
    }
    for (n, token) in tokens
        .iter()
        .enumerate()
        .filter(|(_, t)| names.contains(t.text))
    {
        let (before, after) = (text(n.checked_sub(1)), text(Some(n + 1)));
        if before != "." && !matches!(after, "." | "[" | "=" | "is") {
            let reason = format!(
                "the namespace {:?} can only be used by its attributes",
                token.text
            );
            return Err(misuse(token.line, &reason));
        }
    }
    Ok(())
}

fn misuse(line: usize, reason: &str) -> Error {
    Error::Template {
        line: Some(line),
        reason: reason.to_owned(),
    }
}

/// A name or a sign inside a tag; `==` is one sign.
struct Token<'a> {
    text: &'a str,
    line: usize,
}

/// The names and signs of all tags, without strings, text and comments.
fn tokens(source: &str) -> Vec<Token<'_>> {
    let (mut tokens, mut rest, mut line) = (Vec::new(), source, 1);
    // The end of the tag that we are in.
    let mut end: Option<&str> = None;
    while let Some(c) = rest.chars().next() {
        let mut length = c.len_utf8();
        if let Some(close) = end {
            if rest.starts_with(close) {
                (end, length) = (None, 2);
            } else if close == "#}" {
            } else if c == '"' || c == '\'' {
                length = string_length(rest, c);
            } else if c.is_alphanumeric() || c == '_' {
                length = rest
                    .find(|c: char| !c.is_alphanumeric() && c != '_')
                    .unwrap_or(rest.len());
                tokens.push(Token {
                    text: rest.split_at(length).0,
                    line,
                });
            } else if !c.is_whitespace() {
                length = if rest.starts_with("==") { 2 } else { length };
                tokens.push(Token {
                    text: rest.split_at(length).0,
                    line,
                });
            }
        } else if let Some((_, close)) = [("{{", "}}"), ("{%", "%}"), ("{#", "#}")]
            .into_iter()
            .find(|(open, _)| rest.starts_with(open))
        {
            (end, length) = (Some(close), 2);
        }
        let (taken, later) = rest.split_at(length);
        line += taken.matches('\n').count();
        rest = later;
    }
    tokens
}

/// Bytes of the string literal that `text` begins with.
fn string_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

/// Runs `work` where deep recursion has room.
pub(crate) fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let failed =
        |reason: String| Error::Limits(format!("the chat template could not be run: {reason}"));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat-template".to_owned())
            .stack_size(STACK_BYTES);
        let handle = thread
            .spawn_scoped(scope, work)
            .map_err(|e| failed(e.to_string()))?;
        handle
            .join()
            .unwrap_or_else(|_| Err(failed("its engine failed".to_owned())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_used_by_their_attributes() {
        for fine in [
            "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns['a'] }}{{ f(ns=2) }}{{ m.ns }}{{ ns is defined }}",
            "ns namespace {# namespace ns #}{{ 'namespace ns' }}{{ \"a\\\"ns\" }}{% set x = a.namespace %}",
            "{{ ns }}",
        ] {
            check_namespaces(fine).unwrap();
        }
        for bad in [
            "{% set ns = namespace() %}\n{% set ns.a = ns %}",
            "{% set ns = namespace() %}\n{% set ns.a = [ns] %}",
            "{% set ns = namespace() %}\n{{ ns == 1 }}",
            "{% set ns = namespace() %}\n{{ f(a=ns) }}",
            "\n{{ [namespace()] }}",
            "\n{% set f = namespace %}",
            "\n{% set a, b = namespace(), 1 %}{% set a.x = a %}",
        ] {
            let error = check_namespaces(bad).unwrap_err();
            assert!(
                matches!(error, Error::Template { line: Some(2), .. }),
                "{bad}: {error}"
            );
        }
    }
}
