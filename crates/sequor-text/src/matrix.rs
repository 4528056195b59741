//! Which method pays for which task: every method on the same prompts, beside plain decoding.
//!
//! Methods take turns on each prompt, so that whatever else the machine does hits all of
//! them alike. Ratios are of seconds per token over all prompts of a kind; acceptance is
//! counted up to the first eight tokens that occurred before, because a model that goes in
//! circles flatters every method.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::options::TextOptions;
use crate::pipeline::TextPipeline;
use crate::prompts::{PromptSet, before_repeat};
use crate::stream::Generation;
use crate::{Error, Result};

/// What is measured.
#[derive(Clone, Debug)]
pub struct MatrixBench {
    /// Name and options of every method. Lengths and temperature are set by the bench.
    pub methods: Vec<(String, TextOptions)>,
    /// Prompts per kind.
    pub per_kind: usize,
    /// Longest prompt, in tokens; from longer ones the middle is cut out.
    pub prompt_tokens: usize,
    /// Tokens per prompt.
    pub tokens: usize,
    /// Temperature; 0 is greedy.
    pub temperature: f64,
}

/// One method on one kind of task.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cell {
    /// The method.
    pub method: String,
    /// The kind of task.
    pub kind: String,
    /// Prompts.
    pub prompts: usize,
    /// Prompts whose text equals that of plain decoding, token for token.
    pub equal: usize,
    /// Tokens per target call up to the first repetition.
    pub tokens_per_call: f64,
    /// Seconds per token of plain decoding over those of the method.
    pub speedup: f64,
    /// Share of the time that went into drafting.
    pub draft_share: f64,
    /// Drafted tokens.
    pub drafted: usize,
    /// Accepted ones.
    pub accepted: usize,
}

/// The whole matrix.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Matrix {
    /// Where the prompts are from, and their SHA-256.
    pub prompts: (String, String),
    /// Number format of the weights.
    pub dtype: String,
    /// Temperature.
    pub temperature: f64,
    /// Tokens per prompt.
    pub tokens: usize,
    /// Cells, methods by kinds, then `all` for each method.
    pub cells: Vec<Cell>,
}

#[derive(Default)]
struct Sum {
    cell: Cell,
    calls_tokens: f64,
    plain: f64,
    seconds: f64,
    draft_seconds: f64,
}

impl Sum {
    fn add(&mut self, plain: &Generation, found: &Generation) {
        let per_token =
            |g: &Generation| g.report.decode_seconds / (g.tokens.len().max(2) - 1) as f64;
        self.cell.prompts += 1;
        self.cell.equal += usize::from(plain.tokens == found.tokens);
        self.calls_tokens += found.tokens_per_call_up_to(before_repeat(&found.tokens));
        self.plain += per_token(plain);
        self.seconds += per_token(found);
        self.draft_seconds += found.report.draft_seconds / (found.tokens.len().max(2) - 1) as f64;
        self.cell.drafted += found.report.drafted;
        self.cell.accepted += found.report.accepted;
    }

    fn finish(mut self, method: &str, kind: &str) -> Cell {
        let n = self.cell.prompts.max(1) as f64;
        self.cell.method = method.to_owned();
        self.cell.kind = kind.to_owned();
        self.cell.tokens_per_call = self.calls_tokens / n;
        self.cell.speedup = self.plain / self.seconds.max(1e-12);
        self.cell.draft_share = self.draft_seconds / self.seconds.max(1e-12);
        self.cell
    }
}

/// Runs all methods; everything they need must have been loaded
/// ([`TextPipeline::prepare`]).
///
/// # Errors
/// For impossible options, when a model fails, and [`Error::Cancelled`].
pub fn bench_matrix(
    pipeline: &TextPipeline,
    prompts: &PromptSet,
    bench: &MatrixBench,
    progress: &mut dyn FnMut(&str),
    cancel: &AtomicBool,
) -> Result<Matrix> {
    if bench.tokens < 2 || bench.per_kind == 0 || bench.methods.is_empty() {
        return Err(Error::Input(
            "a matrix needs a method, a prompt per kind and 2 tokens at least".into(),
        ));
    }
    pipeline.model().measure_cost()?;
    let chosen = prompts.select(bench.per_kind);
    let kinds: Vec<String> = prompts.kinds().into_iter().map(str::to_owned).collect();
    let mut sums: Vec<Vec<Sum>> = bench
        .methods
        .iter()
        .map(|_| {
            kinds
                .iter()
                .map(|_| Sum::default())
                .chain([Sum::default()])
                .collect()
        })
        .collect();
    let with = |options: &TextOptions| TextOptions {
        max_new_tokens: bench.tokens,
        temperature: Some(bench.temperature),
        seed: 7,
        ignore_eos: false,
        ..options.clone()
    };
    for (i, prompt) in chosen.iter().enumerate() {
        let encoded = prompt.encode(pipeline, bench.prompt_tokens)?.tokens;
        let plain = pipeline
            .stream_tokens(&encoded, &with(&TextOptions::default()))?
            .collect_all()?;
        let kind = kinds.iter().position(|k| *k == prompt.kind).unwrap_or(0);
        for ((name, options), sums) in bench.methods.iter().zip(&mut sums) {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            progress(&format!(
                "{} of {} prompts, {}: {name}",
                i + 1,
                chosen.len(),
                prompt.kind
            ));
            let found = pipeline
                .stream_tokens(&encoded, &with(options))?
                .collect_all()?;
            let last = kinds.len();
            for at in [kind, last] {
                if let Some(sum) = sums.get_mut(at) {
                    sum.add(&plain, &found);
                }
            }
        }
    }
    let names = kinds.iter().map(String::as_str).chain(["all"]);
    let cells = bench
        .methods
        .iter()
        .zip(sums)
        .flat_map(|((method, _), sums)| {
            sums.into_iter()
                .zip(names.clone())
                .map(|(sum, kind)| sum.finish(method, kind))
                .collect::<Vec<_>>()
        })
        .collect();
    Ok(Matrix {
        prompts: (prompts.name.clone(), prompts.sha256.clone()),
        dtype: pipeline.model().weights().to_string(),
        temperature: bench.temperature,
        tokens: bench.tokens,
        cells,
    })
}

impl Matrix {
    /// One table per measure: rows are methods, columns kinds of task.
    fn table(&self, f: &mut fmt::Formatter<'_>, title: &str, of: fn(&Cell) -> f64) -> fmt::Result {
        let mut kinds: Vec<&str> = Vec::new();
        let mut methods: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !kinds.contains(&cell.kind.as_str()) {
                kinds.push(&cell.kind);
            }
            if !methods.contains(&cell.method.as_str()) {
                methods.push(&cell.method);
            }
        }
        writeln!(f, "{title}\n")?;
        writeln!(f, "| method | {} |", kinds.join(" | "))?;
        writeln!(f, "|---{}|", "|---".repeat(kinds.len()))?;
        for method in methods {
            write!(f, "| {method} |")?;
            for kind in &kinds {
                let cell = self
                    .cells
                    .iter()
                    .find(|c| c.method == method && c.kind == *kind);
                match cell {
                    Some(cell) => write!(f, " {:.2} |", of(cell))?,
                    None => write!(f, " |")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} weights, temperature {}, {} tokens, prompts: {}\n",
            self.dtype, self.temperature, self.tokens, self.prompts.0
        )?;
        self.table(
            f,
            "Tokens per target call (up to the first repetition)",
            |c| c.tokens_per_call,
        )?;
        writeln!(f)?;
        self.table(f, "Times as fast as plain decoding", |c| c.speedup)?;
        writeln!(f)?;
        self.table(f, "Share of texts equal to plain decoding", |c| {
            c.equal as f64 / c.prompts.max(1) as f64
        })
    }
}
