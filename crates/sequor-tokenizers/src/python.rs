//! How Python writes values, which is what chat templates were written for.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;

/// Deepest nesting of lists and mappings that is written.
const MAX_DEPTH: usize = 64;

/// What `str(value)` gives: the text that `{{ value }}` prints.
pub(crate) fn str_of(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        _ => repr(value, 0),
    }
}

fn repr(value: &Value, depth: usize) -> Result<String, Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "a value is nested too deeply to be printed",
        ));
    }
    let item = |v: &Value| repr(v, depth + 1);
    Ok(match value.kind() {
        ValueKind::None | ValueKind::Undefined => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value
                .try_iter()?
                .map(|v| item(&v))
                .collect::<Result<Vec<_>, _>>()?;
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let mut items = Vec::new();
            for key in value.try_iter()? {
                items.push(format!(
                    "{}: {}",
                    item(&key)?,
                    item(&value.get_item(&key)?)?
                ));
            }
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    })
}

/// A string literal, in single quotes unless it has some and no double ones.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut literal = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => literal.push_str("\\n"),
            '\r' => literal.push_str("\\r"),
            '\t' => literal.push_str("\\t"),
            '\\' => literal.push_str("\\\\"),
            c if c == quote => literal.extend(['\\', c]),
            c => literal.push(c),
        }
    }
    literal.push(quote);
    literal
}

/// How `json.dumps` is to write.
#[derive(Default)]
pub(crate) struct JsonStyle {
    /// Spaces per level; without, all is on one line.
    pub indent: Option<usize>,
    pub sort_keys: bool,
    pub ensure_ascii: bool,
    /// Between items, and between key and value.
    pub separators: Option<(String, String)>,
}

/// What `json.dumps` gives.
pub(crate) fn json_dumps(value: &Json, style: &JsonStyle) -> String {
    let default = (if style.indent.is_some() { "," } else { ", " }, ": ");
    let separators = style
        .separators
        .as_ref()
        .map_or(default, |(a, b)| (a.as_str(), b.as_str()));
    let mut text = String::new();
    dump(value, style, separators, 0, &mut text);
    text
}

fn dump(value: &Json, style: &JsonStyle, separators: (&str, &str), level: usize, out: &mut String) {
    let (between, colon) = separators;
    let line = |out: &mut String, level: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * level));
        }
    };
    match value {
        Json::Array(items) if !items.is_empty() => {
            out.push('[');
            for (n, item) in items.iter().enumerate() {
                out.push_str(if n > 0 { between } else { "" });
                line(out, level + 1);
                dump(item, style, separators, level + 1, out);
            }
            line(out, level);
            out.push(']');
        }
        Json::Object(map) if !map.is_empty() => {
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| *key);
            }
            out.push('{');
            for (n, (key, item)) in entries.into_iter().enumerate() {
                out.push_str(if n > 0 { between } else { "" });
                line(out, level + 1);
                dump_str(key, style.ensure_ascii, out);
                out.push_str(colon);
                dump(item, style, separators, level + 1, out);
            }
            line(out, level);
            out.push('}');
        }
        Json::String(text) => dump_str(text, style.ensure_ascii, out),
        other => out.push_str(&other.to_string()),
    }
}

fn dump_str(text: &str, ensure_ascii: bool, out: &mut String) {
    let literal = Json::from(text).to_string();
    if !ensure_ascii {
        return out.push_str(&literal);
    }
    for c in literal.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_print_as_in_python() {
        let value =
            Value::from_serialize(json!({"a": [1, 2.5, true, null], "b": "it's", "c": "x\n'\""}));
        assert_eq!(
            str_of(&value).unwrap(),
            r#"{'a': [1, 2.5, True, None], 'b': "it's", 'c': 'x\n\'"'}"#
        );
        assert_eq!(str_of(&Value::from("it's")).unwrap(), "it's");
        assert_eq!(str_of(&Value::UNDEFINED).unwrap(), "");
    }

    #[test]
    fn json_is_written_as_python_does() {
        let value = json!({"b": [1, {}], "a": "<é😀>"});
        let dumps = |style: JsonStyle| json_dumps(&value, &style);
        assert_eq!(
            dumps(JsonStyle::default()),
            r#"{"b": [1, {}], "a": "<é😀>"}"#
        );
        let ascii = JsonStyle {
            ensure_ascii: true,
            sort_keys: true,
            ..JsonStyle::default()
        };
        assert_eq!(
            dumps(ascii),
            r#"{"a": "<\u00e9\ud83d\ude00>", "b": [1, {}]}"#
        );
        let indented = JsonStyle {
            indent: Some(2),
            ..JsonStyle::default()
        };
        assert_eq!(
            dumps(indented),
            "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": \"<é😀>\"\n}"
        );
        let tight = JsonStyle {
            separators: Some((",".into(), ":".into())),
            ..JsonStyle::default()
        };
        assert_eq!(dumps(tight), r#"{"b":[1,{}],"a":"<é😀>"}"#);
    }
}
