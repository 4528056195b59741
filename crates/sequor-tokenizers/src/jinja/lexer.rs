//! Template text to tokens, with Jinja's whitespace control as Hugging Face
//! sets it: `trim_blocks` (the line end after a block goes) and
//! `lstrip_blocks` (the indentation before a block goes).

use super::{Fault, Result};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// Text between tags.
    Data(String),
    /// `{%`
    BlockStart,
    /// `%}`
    BlockEnd,
    /// `{{`
    VariableStart,
    /// `}}`
    VariableEnd,
    Name(String),
    Str(String),
    Int(i64),
    Float(f64),
    Op(&'static str),
}

/// Operators; longer ones first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "(", ")", "[", "]", "{", "}", "<", ">", "=", ".",
    ":", "|", ",", ";",
];

/// The tokens of a template, each with its line.
pub(super) fn lex(source: &str) -> Result<Vec<(Token, u32)>> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    // One line end at the very end of a file is not part of the template.
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { rest: source, line: 1, line_start: true, tokens: Vec::new() };
    while !lexer.rest.is_empty() {
        lexer.text()?;
    }
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    rest: &'a str,
    line: u32,
    /// Whether `rest` begins a line, as far as stripping is concerned.
    line_start: bool,
    tokens: Vec<(Token, u32)>,
}

impl<'a> Lexer<'a> {
    /// Takes `bytes` bytes, which must end at a character.
    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        self.line += u32::try_from(taken.matches('\n').count()).unwrap_or(0);
        self.rest = rest;
        taken
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn fault<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Fault::new(reason).at(self.line))
    }

    /// Text up to the next tag, and that tag.
    fn text(&mut self) -> Result<()> {
        let tags = ["{{", "{%", "{#"];
        let next = tags.iter().filter_map(|tag| self.rest.find(tag)).min();
        let Some(at) = next else {
            let text = self.take(self.rest.len()).to_owned();
            self.push_data(&text);
            return Ok(());
        };
        let line = self.line;
        let text = self.take(at);
        let tag = self.take(2);
        let sign = self.rest.chars().next().filter(|c| matches!(c, '-' | '+'));
        let text = self.before_tag(text, sign, tag != "{{");
        if !text.is_empty() {
            self.tokens.push((Token::Data(text.to_owned()), line));
        }
        if sign.is_some() {
            self.take(1);
        }
        match tag {
            "{#" => self.comment(),
            "{{" => {
                self.push(Token::VariableStart);
                self.inside("}}")
            }
            _ if self.begins_raw() => self.raw(),
            _ => {
                self.push(Token::BlockStart);
                self.inside("%}")
            }
        }
    }

    /// What is left of the text before a tag with `sign`; blocks and comments
    /// take their indentation with them.
    fn before_tag(&self, text: &'a str, sign: Option<char>, indented: bool) -> &'a str {
        match sign {
            Some('-') => text.trim_end(),
            None if indented => {
                let (line, starts) = match text.rfind('\n') {
                    Some(at) => (at + 1, true),
                    None => (0, self.line_start),
                };
                let (before, last) = text.split_at(line);
                if starts && last.trim().is_empty() { before } else { text }
            }
            _ => text,
        }
    }

    fn push_data(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Data(text.to_owned()));
        }
    }

    /// Takes the whitespace that goes with the end of a tag. `trims` is whether
    /// it takes a line end without being told.
    fn after_tag(&mut self, sign: Option<char>, trims: bool) {
        let bytes = match sign {
            Some('-') => self.rest.len() - self.rest.trim_start().len(),
            None if trims && self.rest.starts_with('\n') => 1,
            _ => 0,
        };
        self.line_start = self.take(bytes).ends_with('\n');
    }

    fn comment(&mut self) -> Result<()> {
        let Some(at) = self.rest.find("#}") else { return self.fault("a comment is not closed with \"#}\"") };
        let text = self.take(at);
        self.take(2);
        let sign = text.chars().last().filter(|c| matches!(c, '-' | '+'));
        self.after_tag(sign, true);
        Ok(())
    }

    /// Whether the block that just began is `raw`.
    fn begins_raw(&self) -> bool {
        let after = self.rest.trim_start().strip_prefix("raw").map(str::trim_start);
        after.is_some_and(|s| s.starts_with("%}") || s.starts_with("-%}"))
    }

    /// Everything up to `{% endraw %}` as text.
    fn raw(&mut self) -> Result<()> {
        let line = self.line;
        let head = self.rest.find("%}").unwrap_or(0);
        let sign = self.take(head).chars().last().filter(|&c| c == '-');
        self.take(2);
        self.after_tag(sign, false);
        let mut from = 0;
        while let Some(at) = self.rest.get(from..).and_then(|s| s.find("{%")).map(|n| n + from) {
            let (text, tag) = self.rest.split_at(at);
            let tag = tag.get(2..).unwrap_or_default();
            let first = tag.chars().next().filter(|c| matches!(c, '-' | '+'));
            let inner = tag.trim_start_matches(['-', '+']).trim_start();
            let Some(end) = inner.strip_prefix("endraw").map(str::trim_start) else {
                from = at + 2;
                continue;
            };
            let last = end.chars().next().filter(|c| matches!(c, '-' | '+'));
            let end = end.strip_prefix(['-', '+']).unwrap_or(end);
            let Some(after) = end.strip_prefix("%}") else {
                from = at + 2;
                continue;
            };
            let data = self.before_tag(text, first, true);
            self.push_data(data);
            self.take(self.rest.len() - after.len());
            self.after_tag(last, true);
            return Ok(());
        }
        Err(Fault::new("raw is not closed with {% endraw %}").at(line))
    }

    /// The tokens of a tag up to `end`.
    fn inside(&mut self, end: &'static str) -> Result<()> {
        let start = self.line;
        let mut open: Vec<&str> = Vec::new();
        loop {
            self.take(self.rest.len() - self.rest.trim_start().len());
            if open.is_empty() {
                let sign = self.rest.chars().next().filter(|c| *c == '-' || (*c == '+' && end == "%}"));
                let after = self.rest.get(sign.map_or(0, char::len_utf8)..).unwrap_or_default();
                if after.starts_with(end) {
                    let variable = end == "}}";
                    self.push(if variable { Token::VariableEnd } else { Token::BlockEnd });
                    self.take(sign.map_or(0, char::len_utf8) + end.len());
                    self.after_tag(sign, !variable);
                    return Ok(());
                }
            }
            let Some(c) = self.rest.chars().next() else {
                return Err(Fault::new(format!("a tag is not closed with {end:?}")).at(start));
            };
            if c == '"' || c == '\'' {
                self.string(c)?;
            } else if c.is_ascii_digit() {
                self.number()?;
            } else if c.is_alphabetic() || c == '_' {
                let length = self.rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(self.rest.len());
                let name = self.take(length).to_owned();
                self.push(Token::Name(name));
            } else if let Some(op) = OPERATORS.iter().find(|op| self.rest.starts_with(**op)) {
                match *op {
                    "(" | "[" | "{" => open.push(op),
                    ")" | "]" | "}" => {
                        let matching = matches!((open.pop(), *op), (Some("("), ")") | (Some("["), "]") | (Some("{"), "}"));
                        if !matching {
                            return self.fault(format!("{op:?} closes nothing"));
                        }
                    }
                    _ => {}
                }
                self.push(Token::Op(op));
                self.take(op.len());
            } else {
                return self.fault(format!("unexpected character {c:?}"));
            }
        }
    }

    fn number(&mut self) -> Result<()> {
        let digits = |s: &str| s.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(s.len());
        let mut length = digits(self.rest);
        let mut is_float = false;
        let tail = |length: usize| self.rest.get(length..).unwrap_or_default();
        if let Some(fraction) = tail(length).strip_prefix('.').filter(|s| s.starts_with(|c: char| c.is_ascii_digit())) {
            length += 1 + digits(fraction);
            is_float = true;
        }
        if let Some(exponent) = tail(length).strip_prefix(['e', 'E']) {
            let unsigned = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
            if unsigned.starts_with(|c: char| c.is_ascii_digit()) {
                length += 1 + (exponent.len() - unsigned.len()) + digits(unsigned);
                is_float = true;
            }
        }
        let text = self.take(length).replace('_', "");
        let token = if is_float {
            text.parse().map(Token::Float).map_err(|_| ())
        } else {
            text.parse().map(Token::Int).map_err(|_| ())
        };
        match token {
            Ok(token) => {
                self.push(token);
                Ok(())
            }
            Err(()) => self.fault(format!("the number {text} is too large")),
        }
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let line = self.line;
        self.take(1);
        let mut text = String::new();
        loop {
            let plain = self.rest.find([quote, '\\']);
            let Some(plain) = plain else {
                return Err(Fault::new("a string is not closed").at(line));
            };
            text.push_str(self.take(plain));
            if self.take(1) != "\\" {
                break;
            }
            self.escape(&mut text)?;
        }
        self.tokens.push((Token::Str(text), line));
        Ok(())
    }

    /// What follows a backslash.
    fn escape(&mut self, text: &mut String) -> Result<()> {
        let Some(c) = self.rest.chars().next() else { return self.fault("a string is not closed") };
        self.take(c.len_utf8());
        let digits = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => {
                match c {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    'b' => text.push('\u{8}'),
                    'f' => text.push('\u{c}'),
                    'v' => text.push('\u{b}'),
                    'a' => text.push('\u{7}'),
                    '0' => text.push('\0'),
                    '\\' | '\'' | '"' => text.push(c),
                    '\n' => {}
                    other => text.extend(['\\', other]),
                }
                return Ok(());
            }
        };
        let code = self.rest.get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32);
        match code {
            Some(c) => {
                self.take(digits);
                text.push(c);
                Ok(())
            }
            None => self.fault(format!("\\{c} is not followed by {digits} digits of a character's code")),
        }
    }
}
