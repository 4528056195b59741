//! The raw values of a proof as a table, and as comma-separated text (RFC 4180).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::{Error, Result};

/// Columns of every table.
pub(super) const FIXED: [&str; 4] = ["arm", "unit", "group", "repeat"];
/// Largest text that is read.
const MAX_BYTES: usize = 1 << 30;

/// What one arm did on one unit in one repeat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// The arm.
    pub arm: String,
    /// The unit: a prompt, a picture, an utterance.
    pub unit: String,
    /// The kind of unit.
    pub group: String,
    /// Number of the repeat.
    pub repeat: usize,
    /// Words by column.
    pub labels: BTreeMap<String, String>,
    /// Values by metric; absent where a metric makes no sense.
    pub values: BTreeMap<String, f64>,
}

impl Row {
    /// A row without values.
    pub fn new(arm: impl Into<String>, unit: impl Into<String>) -> Self {
        Self {
            arm: arm.into(),
            unit: unit.into(),
            ..Self::default()
        }
    }

    /// Sets the kind of unit.
    #[must_use]
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = group.into();
        self
    }

    /// Sets the repeat.
    #[must_use]
    pub fn repeat(mut self, repeat: usize) -> Self {
        self.repeat = repeat;
        self
    }

    /// Sets a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: impl Into<String>) -> Self {
        self.labels.insert(name.to_owned(), value.into());
        self
    }

    /// Sets a value.
    #[must_use]
    pub fn value(mut self, metric: &str, value: f64) -> Self {
        self.values.insert(metric.to_owned(), value);
        self
    }

    /// Sets a value where there is one.
    #[must_use]
    pub fn maybe(self, metric: &str, value: Option<f64>) -> Self {
        match value {
            Some(value) => self.value(metric, value),
            None => self,
        }
    }
}

/// Rows with their columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    labels: Vec<String>,
    metrics: Vec<String>,
    rows: Vec<Row>,
}

impl Table {
    /// A table without rows.
    #[must_use]
    pub fn new(labels: Vec<String>, metrics: Vec<String>) -> Self {
        Self {
            labels,
            metrics,
            rows: Vec::new(),
        }
    }

    /// The rows in the order they came.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The arms in the order they came.
    #[must_use]
    pub fn arms(&self) -> Vec<&str> {
        let mut arms: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !arms.contains(&row.arm.as_str()) {
                arms.push(&row.arm);
            }
        }
        arms
    }

    /// Adds a row.
    ///
    /// # Errors
    /// [`Error::Input`] for a label or a metric that is not a column.
    pub fn push(&mut self, row: Row) -> Result<()> {
        let unknown = row
            .values
            .keys()
            .find(|m| !self.metrics.contains(m))
            .or_else(|| row.labels.keys().find(|l| !self.labels.contains(l)));
        if let Some(name) = unknown {
            return Err(Error::Input(format!(
                "the row of '{}' has a value for '{name}', which is not a column",
                row.arm
            )));
        }
        self.rows.push(row);
        Ok(())
    }

    fn header(&self) -> Vec<&str> {
        let named = self.labels.iter().chain(&self.metrics).map(String::as_str);
        FIXED.into_iter().chain(named).collect()
    }

    /// The table as comma-separated text. Numbers are written so that they are read as the
    /// same bits; an absent value is an empty field.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let mut text = String::new();
        write_line(&mut text, self.header().into_iter());
        for row in &self.rows {
            let repeat = row.repeat.to_string();
            let fixed = [&row.arm, &row.unit, &row.group, &repeat];
            let label = |name| row.labels.get(name).map_or("", String::as_str);
            let number = |name| row.values.get(name).map(f64::to_string).unwrap_or_default();
            let numbers: Vec<String> = self.metrics.iter().map(number).collect();
            let fields = fixed.into_iter().map(String::as_str);
            let fields = fields.chain(self.labels.iter().map(label));
            write_line(&mut text, fields.chain(numbers.iter().map(String::as_str)));
        }
        text
    }

    /// Reads what [`to_csv`](Self::to_csv) wrote, with the same columns.
    ///
    /// # Errors
    /// [`Error::Input`] naming the line, what was expected and what was found.
    pub fn from_csv(text: &str, labels: Vec<String>, metrics: Vec<String>) -> Result<Self> {
        let mut table = Self::new(labels, metrics);
        let mut records = records(text)?.into_iter();
        let header = records.next().unwrap_or_default().1;
        if header != table.header() {
            return Err(Error::Input(format!(
                "the columns must be {}, not {}",
                table.header().join(","),
                header.join(",")
            )));
        }
        for (line, fields) in records {
            let wrong = |what: String| Error::Input(format!("line {line}: {what}"));
            if fields.len() != header.len() {
                return Err(wrong(format!(
                    "{} fields, {} expected",
                    fields.len(),
                    header.len()
                )));
            }
            let mut row = Row::default();
            for (name, field) in header.iter().zip(fields) {
                match name.as_str() {
                    "arm" => row.arm = field,
                    "unit" => row.unit = field,
                    "group" => row.group = field,
                    "repeat" => {
                        row.repeat = field
                            .parse()
                            .map_err(|_| wrong(format!("the repeat '{field}' is not a number")))?;
                    }
                    _ if field.is_empty() => {}
                    _ if table.labels.contains(name) => {
                        row.labels.insert(name.clone(), field);
                    }
                    _ => {
                        let value = field
                            .parse()
                            .map_err(|_| wrong(format!("{name} '{field}' is not a number")))?;
                        row.values.insert(name.clone(), value);
                    }
                }
            }
            table.rows.push(row);
        }
        Ok(table)
    }
}

fn write_line<'a>(text: &mut String, fields: impl Iterator<Item = &'a str>) {
    for (i, field) in fields.enumerate() {
        if i > 0 {
            text.push(',');
        }
        if field.contains(['"', ',', '\n', '\r']) {
            // Writing to a string cannot fail.
            let _ = write!(text, "\"{}\"", field.replace('"', "\"\""));
        } else {
            text.push_str(field);
        }
    }
    text.push('\n');
}

/// The records of a text, each with the number of its first line.
fn records(text: &str) -> Result<Vec<(usize, Vec<String>)>> {
    if text.len() > MAX_BYTES {
        return Err(Error::Input(format!(
            "a table of {} bytes; {MAX_BYTES} are the most that is read",
            text.len()
        )));
    }
    let mut records = Vec::new();
    let mut fields: Vec<String> = Vec::new();
    let mut field = String::new();
    let (mut quoted, mut line, mut first) = (false, 1, 1);
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        line += usize::from(letter == '\n');
        match letter {
            '"' if quoted && letters.next_if_eq(&'"').is_some() => field.push('"'),
            '"' if quoted || field.is_empty() => quoted = !quoted,
            _ if quoted => field.push(letter),
            ',' => fields.push(std::mem::take(&mut field)),
            '\r' if letters.peek() == Some(&'\n') => {}
            '\n' => {
                fields.push(std::mem::take(&mut field));
                records.push((first, std::mem::take(&mut fields)));
                first = line;
            }
            _ => field.push(letter),
        }
    }
    if quoted {
        return Err(Error::Input(format!("line {first}: a quote is not closed")));
    }
    if !field.is_empty() || !fields.is_empty() {
        fields.push(field);
        records.push((first, fields));
    }
    Ok(records)
}
