//! How Python writes values, which is what chat templates were written for.

use super::Result;
use super::budget::Budget;
use super::value::Value;
use crate::jinja::Fault;

/// What `str(value)` gives: the text that `{{ value }}` prints.
pub(super) fn str_of(value: &Value, budget: &mut Budget) -> Result<String> {
    match value {
        Value::Undefined(_) => Ok(String::new()),
        Value::Str(text) => {
            budget.pay_string(text.len())?;
            Ok(text.to_string())
        }
        _ => {
            let mut text = String::new();
            repr(value, budget, &mut text)?;
            Ok(text)
        }
    }
}

fn repr(value: &Value, budget: &mut Budget, out: &mut String) -> Result<()> {
    budget.enter()?;
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
        Value::Int(n) => out.push_str(&n.to_string()),
        Value::Float(x) => out.push_str(&float(*x)),
        Value::Str(text) => quoted(text, budget, out)?,
        Value::List(list) => {
            out.push('[');
            for (n, item) in list.items.iter().enumerate() {
                out.push_str(if n > 0 { ", " } else { "" });
                repr(item, budget, out)?;
            }
            out.push(']');
        }
        Value::Map(map) => {
            out.push('{');
            for (n, (key, item)) in map.entries.iter().enumerate() {
                out.push_str(if n > 0 { ", " } else { "" });
                quoted(key, budget, out)?;
                out.push_str(": ");
                repr(item, budget, out)?;
            }
            out.push('}');
        }
        Value::Namespace(_) => out.push_str("<namespace>"),
        Value::Macro(_) => out.push_str("<macro>"),
        Value::Loop(_) => out.push_str("<loop>"),
    }
    budget.leave();
    Ok(())
}

/// A float as Python writes it: shortest digits, always with a point or an
/// exponent of at least two digits.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        let text = x.to_string();
        return if text.contains('.') { text } else { text + ".0" };
    }
    let text = format!("{x:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => text,
    }
}

/// A string literal, in single quotes unless it has some and no double ones.
fn quoted(text: &str, budget: &mut Budget, out: &mut String) -> Result<()> {
    budget.pay_string(2 * text.len())?;
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(quote);
    Ok(())
}

/// How `json.dumps` is to write.
#[derive(Default)]
pub(super) struct JsonStyle {
    /// Spaces per level; without, all is on one line.
    pub indent: Option<usize>,
    pub sort_keys: bool,
    pub ensure_ascii: bool,
    /// Between items, and between key and value.
    pub separators: Option<(String, String)>,
}

/// What `json.dumps` gives.
pub(super) fn json_dumps(value: &Value, style: &JsonStyle, budget: &mut Budget) -> Result<String> {
    let mut text = String::new();
    dump(value, style, 0, budget, &mut text)?;
    Ok(text)
}

fn dump(value: &Value, style: &JsonStyle, level: usize, budget: &mut Budget, out: &mut String) -> Result<()> {
    budget.enter()?;
    let default = (if style.indent.is_some() { "," } else { ", " }, ": ");
    let (between, colon) = style.separators.as_ref().map_or(default, |(a, b)| (a.as_str(), b.as_str()));
    budget.pay_string(between.len() + colon.len())?;
    let line = |out: &mut String, budget: &mut Budget, level: usize| -> Result<()> {
        if let Some(indent) = style.indent {
            budget.pay_string(indent * level)?;
            out.push('\n');
            out.push_str(&" ".repeat(indent * level));
        }
        Ok(())
    };
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Int(n) => out.push_str(&n.to_string()),
        Value::Float(x) if x.is_nan() => out.push_str("NaN"),
        Value::Float(x) if x.is_infinite() => out.push_str(if *x > 0.0 { "Infinity" } else { "-Infinity" }),
        Value::Float(x) => out.push_str(&float(*x)),
        Value::Str(text) => dump_str(text, style.ensure_ascii, budget, out)?,
        Value::List(list) => {
            out.push('[');
            for (n, item) in list.items.iter().enumerate() {
                out.push_str(if n > 0 { between } else { "" });
                line(out, budget, level + 1)?;
                dump(item, style, level + 1, budget, out)?;
            }
            if !list.items.is_empty() {
                line(out, budget, level)?;
            }
            out.push(']');
        }
        Value::Map(map) => {
            let mut entries: Vec<_> = map.entries.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| key);
            }
            out.push('{');
            for (n, (key, item)) in entries.into_iter().enumerate() {
                out.push_str(if n > 0 { between } else { "" });
                line(out, budget, level + 1)?;
                dump_str(key, style.ensure_ascii, budget, out)?;
                out.push_str(colon);
                dump(item, style, level + 1, budget, out)?;
            }
            if !map.entries.is_empty() {
                line(out, budget, level)?;
            }
            out.push('}');
        }
        other => return Err(Fault::new(format!("{} cannot be written as JSON", other.kind()))),
    }
    budget.leave();
    Ok(())
}

fn dump_str(text: &str, ensure_ascii: bool, budget: &mut Budget, out: &mut String) -> Result<()> {
    budget.pay_string(2 * text.len())?;
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !c.is_ascii()) => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    Ok(())
}
