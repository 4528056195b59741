//! Conversations to prompts, by the Jinja templates that models come with.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State};
use serde::{Deserialize, Serialize};

use crate::python::{self, JsonStyle};
use crate::sandbox::{check_namespaces, on_large_stack};
use crate::strftime::strftime;
use crate::{Error, Result};

/// Longest template, in bytes. Published ones have up to 30 KB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Longest prompt that a template may write, in bytes.
const MAX_PROMPT_BYTES: usize = 64 << 20;
/// Steps that a template may take, whatever the conversation.
const BASE_FUEL: u64 = 200_000;
/// Steps that it may take on top for every message.
const FUEL_PER_MESSAGE: u64 = 500;
/// Steps that no template may exceed: they also bound how deeply values nest.
const MAX_FUEL: u64 = 4_000_000;
/// Deepest nesting of macro calls and recursive loops.
const MAX_RECURSION: usize = 100;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant` for most models.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message with any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }

    /// Standing instructions; the first message where there are any.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// What a template is given besides the messages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatOptions {
    /// Whether to end where the assistant's answer begins. On by default.
    pub add_generation_prompt: bool,
    /// Text of the token that begins a text, as `bos_token`.
    pub bos_token: Option<String>,
    /// Text of the token that ends a text, as `eos_token`.
    pub eos_token: Option<String>,
    /// More variables, by name; `tools`, `documents` and whatever else the
    /// template knows (`enable_thinking`, `date_string`).
    pub extra: serde_json::Map<String, serde_json::Value>,
    /// What `strftime_now` takes for the present, in seconds since 1970 (UTC);
    /// the machine's clock if absent.
    pub now: Option<i64>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            bos_token: None,
            eos_token: None,
            extra: serde_json::Map::new(),
            now: None,
        }
    }
}

/// A chat template: a Jinja program from messages to one prompt.
///
/// It sees what Hugging Face's `apply_chat_template` gives it: `messages`,
/// `add_generation_prompt`, `bos_token`, `eos_token`, `tools`, `documents`,
/// Python's methods of strings and mappings, `tojson`, `raise_exception` and
/// `strftime_now` (in UTC), with `trim_blocks` and `lstrip_blocks` on. A
/// system prompt that the model has by default is the template's own business.
///
/// Templates come with models, so they are not trusted: they reach nothing but
/// what they are given, the number of their steps, the depth of their recursion
/// and the length of the prompt are limited, and a namespace can only be used
/// by its attributes, so that no value holds itself.
///
/// What is *not* limited is the work and the memory of a single step: a
/// template that doubles a string (or shares a list) again and again can
/// exhaust memory or take very long. Where models come from strangers, render
/// in a process with limits of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    source: Arc<str>,
}

/// The format of many small models: each turn between `<|im_start|>` and
/// `<|im_end|>`.
const CHATML: &str = "\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}";

impl ChatTemplate {
    /// A template from its Jinja source.
    ///
    /// # Errors
    /// [`Error::Template`] with the line of the first mistake in it,
    /// [`Error::Limits`] above 1 MiB.
    pub fn new(source: impl Into<String>) -> Result<Self> {
        let template = Self::unchecked(source);
        template.with_compiled(0, 0, |_| Ok(()))?;
        Ok(template)
    }

    /// A template that is checked when it is first used: a model whose
    /// template is broken can still complete plain text.
    pub(crate) fn unchecked(source: impl Into<String>) -> Self {
        Self {
            source: source.into().into(),
        }
    }

    /// The ChatML format, for a model that was trained on it and came without
    /// a template. Never used unless asked for.
    #[must_use]
    pub fn chatml() -> Self {
        Self::unchecked(CHATML)
    }

    /// The Jinja source.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Writes the prompt for a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] with the line where the template has a mistake or
    /// refuses the messages (many insist that user and assistant alternate);
    /// [`Error::Limits`] when it takes too many steps or writes more than
    /// 64 MiB.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        let mut context: Vec<(String, Value)> = vec![
            ("messages".to_owned(), Value::from_serialize(messages)),
            (
                "add_generation_prompt".to_owned(),
                options.add_generation_prompt.into(),
            ),
            ("tools".to_owned(), ().into()),
            ("documents".to_owned(), ().into()),
        ];
        let tokens = [
            ("bos_token", &options.bos_token),
            ("eos_token", &options.eos_token),
        ];
        context.extend(
            tokens
                .into_iter()
                .filter_map(|(k, v)| Some((k.to_owned(), v.as_deref()?.into()))),
        );
        context.extend(
            options
                .extra
                .iter()
                .map(|(k, v)| (k.clone(), Value::from_serialize(v))),
        );
        let context: Value = context.into_iter().collect();

        let fuel = BASE_FUEL
            .saturating_add(FUEL_PER_MESSAGE.saturating_mul(messages.len() as u64))
            .min(MAX_FUEL);
        let now = options.now.unwrap_or_else(unix_seconds);
        self.with_compiled(fuel, now, |template| {
            let mut prompt = Prompt(Vec::new());
            template.render_captured_to(context, &mut prompt)?;
            Ok(prompt.0)
        })
        .and_then(|bytes| {
            String::from_utf8(bytes).map_err(|_| Error::Template {
                line: None,
                reason: "it wrote text that is not UTF-8".to_owned(),
            })
        })
    }

    fn with_compiled<T: Send>(
        &self,
        fuel: u64,
        now: i64,
        then: impl FnOnce(&minijinja::Template<'_, '_>) -> Result<T, minijinja::Error> + Send,
    ) -> Result<T> {
        if self.source.len() > MAX_SOURCE_BYTES {
            return Err(Error::Limits(format!(
                "the chat template has {} bytes; {MAX_SOURCE_BYTES} are allowed",
                self.source.len()
            )));
        }
        check_namespaces(&self.source)?;
        let source = without_generation_tags(&self.source);
        on_large_stack(|| {
            let environment = environment(fuel, now);
            let template = environment.template_from_named_str("chat_template", &source);
            template
                .and_then(|template| then(&template))
                .map_err(describe)
        })
    }
}

/// The prompt as it is written, up to its limit.
struct Prompt(Vec<u8>);

impl Write for Prompt {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_PROMPT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment(fuel: u64, now: i64) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_fuel(Some(fuel));
    environment.remove_global("debug");
    environment.set_formatter(print);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, minijinja::Error> { Err(failure(message)) },
    );
    environment.add_function("strftime_now", move |format: &str| {
        strftime(format, now)
            .map_err(|field| failure(format!("strftime_now does not know {field:?}")))
    });
    environment
}

fn failure(message: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

fn print(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&python::str_of(value)?)?,
    }
    Ok(())
}

/// `tojson` as Hugging Face defines it: `json.dumps` without escaping for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    // Written once with a limit before a copy is made: shared lists can be
    // exponentially long.
    serde_json::to_writer(Prompt(Vec::new()), value)
        .map_err(|e| failure(format!("cannot be written as JSON: {e}")))?;
    let json = serde_json::to_value(value)
        .map_err(|e| failure(format!("cannot be written as JSON: {e}")))?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = JsonStyle {
        indent: options.get::<Option<usize>>("indent")?.map(|n| n.min(16)),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        separators: separators
            .and_then(|list| <[String; 2]>::try_from(list).ok())
            .map(|[a, b]| (a, b)),
    };
    options.assert_all_used()?;
    Ok(Value::from(python::json_dumps(&json, &style)))
}

/// `{% generation %}` marks the assistant's words for training; for the prompt
/// it means nothing, and Jinja itself does not know it.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        let sign = tag.len() - tag.trim_start_matches(['-', '+']).len();
        let (sign, tag) = tag.split_at(sign);
        let body = tag.trim_start();
        let (space, _) = tag.split_at(tag.len() - body.len());
        let marks = [("endgeneration", "endif"), ("generation", "if true")];
        let ends = |after: &str| {
            after
                .trim_start_matches([' ', '\t', '\n', '\r', '-', '+'])
                .starts_with("%}")
        };
        let found = marks.iter().find_map(|(mark, jinja)| {
            let after = body.strip_prefix(mark).filter(|after| ends(after))?;
            Some((*jinja, after))
        });
        let (jinja, after) = found.unwrap_or(("", body));
        for part in [before, "{%", sign, space, jinja] {
            text.push_str(part);
        }
        rest = after;
    }
    text.push_str(rest);
    text
}

fn describe(error: minijinja::Error) -> Error {
    match error.kind() {
        ErrorKind::OutOfFuel => Error::Limits(
            "the chat template takes too many steps; it does not come to an end as it is"
                .to_owned(),
        ),
        ErrorKind::WriteFailure => Error::Limits(format!(
            "the chat template writes more than {MAX_PROMPT_BYTES} bytes"
        )),
        kind => {
            let reason = match error.detail() {
                Some(detail) => format!("{kind}: {detail}"),
                None => kind.to_string(),
            };
            Error::Template {
                line: error.line(),
                reason,
            }
        }
    }
}

fn unix_seconds() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    i64::try_from(since).unwrap_or(i64::MAX)
}
