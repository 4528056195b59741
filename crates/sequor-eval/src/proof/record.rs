//! Taking values down, and writing what they show.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use sequor_kernels::cpu;
use sequor_nn::weights::write_atomic;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::judge::{self, ArmSummary, Judged, Verdict};
use super::table::{Row, Table};
use super::{Effect, Metric, Proof, plot};
use crate::{Error, Result};

/// What a proof is run with.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Setup {
    /// The command that runs it.
    pub command: String,
    /// Seeds of everything random.
    pub seeds: Vec<u64>,
    /// SHA-256 of weights by name.
    pub weights_sha256: BTreeMap<String, String>,
    /// What the arms ran on.
    pub inputs: Option<Inputs>,
    /// Everything else that was chosen.
    pub settings: Map<String, Value>,
    /// Things a reader should know.
    pub notes: Vec<String>,
    /// Whether it was a short run.
    pub quick: bool,
}

/// Prompts, pictures or recordings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Inputs {
    /// What they are called.
    pub name: String,
    /// SHA-256 of their file.
    pub sha256: String,
    /// How many were used.
    pub count: usize,
}

/// How busy the machine was.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Load {
    /// Load average of the last minute before the run.
    pub before: Option<f64>,
    /// After it.
    pub after: Option<f64>,
}

/// The machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Physical cores that the process may use.
    pub cores: usize,
    /// Threads for arithmetic.
    pub threads: usize,
    /// Vector instructions.
    pub features: String,
}

/// What `NN.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProofResult {
    /// Number of the system.
    pub system: u32,
    /// What it is called.
    pub title: String,
    /// Where the paper's figures come from.
    pub paper: String,
    /// The claims.
    pub claims: Vec<Judged>,
    /// The arms.
    pub arms: Vec<ArmSummary>,
    /// What the metrics mean.
    pub metrics: Vec<Metric>,
    /// The command.
    pub command: String,
    /// Commit of the checkout that it ran in; absent elsewhere.
    pub commit: Option<String>,
    /// Whether files of that checkout had been changed.
    pub modified: Option<bool>,
    /// Version of this crate.
    pub version: String,
    /// Seeds of everything random.
    pub seeds: Vec<u64>,
    /// SHA-256 of weights by name.
    pub weights_sha256: BTreeMap<String, String>,
    /// Name of the inputs.
    pub prompts: Option<String>,
    /// SHA-256 of the inputs.
    pub prompts_sha256: Option<String>,
    /// How many inputs were used.
    pub prompts_count: Option<usize>,
    /// Everything else that was chosen.
    pub settings: Map<String, Value>,
    /// Things a reader should know.
    pub notes: Vec<String>,
    /// Day and time of the end, UTC.
    pub date: String,
    /// How long it took.
    pub wall_seconds: f64,
    /// How busy the machine was.
    pub load: Load,
    /// The machine.
    pub machine: Machine,
    /// Whether it was a short run, whose verdicts are preliminary.
    pub quick: bool,
}

impl ProofResult {
    /// Number of claims with this verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.claims.iter().filter(|c| c.verdict == verdict).count()
    }
}

/// The files that were written.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The judgement.
    pub result: ProofResult,
    /// Where it was written.
    pub json: PathBuf,
    /// The raw values.
    pub csv: PathBuf,
    /// The picture, if there was something to draw.
    pub png: Option<PathBuf>,
}

/// A proof in progress.
#[derive(Debug)]
pub struct Recorder {
    proof: Proof,
    setup: Setup,
    table: Table,
    started: Instant,
    load: Option<f64>,
}

impl Recorder {
    /// Begins: the clock runs.
    ///
    /// # Errors
    /// Those of [`Proof::validate`].
    pub fn start(proof: Proof, setup: Setup) -> Result<Self> {
        proof.validate()?;
        let metrics = proof.metrics.iter().map(|m| m.name.clone()).collect();
        Ok(Self {
            table: Table::new(proof.labels.clone(), metrics),
            proof,
            setup,
            started: Instant::now(),
            load: load(),
        })
    }

    /// Takes down one row.
    ///
    /// # Errors
    /// Those of [`Table::push`].
    pub fn push(&mut self, row: Row) -> Result<()> {
        self.table.push(row)
    }

    /// Adds something a reader should know.
    pub fn note(&mut self, note: impl Into<String>) {
        self.setup.notes.push(note.into());
    }

    /// Adds something that was chosen or measured once.
    pub fn setting(&mut self, name: &str, value: impl Into<Value>) {
        self.setup.settings.insert(name.to_owned(), value.into());
    }

    /// What it is run with so far.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Writes the values, reads them again, judges, and writes the judgement into `dir`,
    /// which is created. Files of an earlier run are replaced, each at once.
    ///
    /// # Errors
    /// [`Error::Io`]. A claim that does not hold is no error.
    pub fn finish(self, dir: &Path) -> Result<Outcome> {
        let wall_seconds = self.started.elapsed().as_secs_f64();
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let file = |ending: &str| dir.join(format!("{:02}.{ending}", self.proof.system));
        let (csv, json, png) = (file("csv"), file("json"), file("png"));
        write(&csv, self.table.to_csv().as_bytes())?;
        let text = std::fs::read_to_string(&csv).map_err(|e| Error::io(&csv, e))?;
        let metrics = self.proof.metrics.iter().map(|m| m.name.clone()).collect();
        let table = Table::from_csv(&text, self.proof.labels.clone(), metrics)
            .map_err(|e| Error::format(&csv, e.to_string()))?;
        let arms = judge::summaries(&self.proof, &table);
        let drawn = plot::plot(&self.proof, &arms, &png)?;
        let Setup {
            command,
            seeds,
            weights_sha256,
            inputs,
            settings,
            notes,
            quick,
        } = self.setup;
        let checkout = checkout();
        let result = ProofResult {
            claims: judge::judge(&self.proof, &table),
            system: self.proof.system,
            title: self.proof.title,
            paper: self.proof.paper,
            arms,
            metrics: self.proof.metrics,
            command,
            commit: checkout.as_ref().map(|c| c.0.clone()),
            modified: checkout.map(|c| c.1),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seeds,
            weights_sha256,
            prompts: inputs.as_ref().map(|i| i.name.clone()),
            prompts_sha256: inputs.as_ref().map(|i| i.sha256.clone()),
            prompts_count: inputs.map(|i| i.count),
            settings,
            notes,
            date: date(SystemTime::now()),
            wall_seconds,
            load: Load {
                before: self.load,
                after: load(),
            },
            machine: Machine {
                cpu: cpu::model_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
                cores: cpu::physical_cores(),
                threads: usize::try_from(sequor_nn::tch::get_num_threads()).unwrap_or(0),
                features: cpu::Features::detect().to_string(),
            },
            quick,
        };
        let text = serde_json::to_string_pretty(&result)
            .map_err(|e| Error::format(&json, e.to_string()))?;
        write(&json, (text + "\n").as_bytes())?;
        Ok(Outcome {
            result,
            json,
            csv,
            png: drawn.then_some(png),
        })
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |file| {
        file.write_all(bytes)
            .map_err(|e| sequor_nn::Error::io(path, e))
    })?;
    Ok(())
}

/// Load average of the last minute, where the system tells.
fn load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Commit of the checkout of this project that the process runs in, and whether its files
/// were changed. Another project's commit would say nothing.
fn checkout() -> Option<(String, bool)> {
    let git = |args: &[&str]| -> Option<String> {
        let output = Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let ours = Path::new(&top).join("crates").join(env!("CARGO_PKG_NAME"));
    if !ours.join("Cargo.toml").is_file() {
        return None;
    }
    let commit = git(&["rev-parse", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some((commit, !changes.is_empty()))
}

/// A time as `2025-03-31T12:00:00Z`.
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to a date of the Gregorian calendar: count from 1 March 0000, in eras of 400
    // years, so that a leap day is the last of its year (Hinnant, "chrono-compatible
    // low-level date algorithms").
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = (shifted_month + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

impl fmt::Display for ProofResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.quick { " (short run)" } else { "" };
        writeln!(f, "System {}: {}{kind}", self.system, self.title)?;
        for c in &self.claims {
            writeln!(f, "\n{:12}  {}", c.verdict, c.text)?;
            let number = |x: Option<f64>| x.map_or_else(|| "?".to_owned(), |x| format!("{x:.3}"));
            let effect = match c.effect {
                Effect::Ratio => "ratio",
                Effect::Difference => "difference",
                Effect::Level => "value",
            };
            write!(f, "{:14}{effect} {}", "", number(c.value))?;
            if let Some([low, high]) = c.ci95 {
                write!(f, " [{low:.3}, {high:.3}]")?;
            }
            if let Some(baseline) = &c.baseline_arm {
                let (a, b) = (number(c.measured), number(c.baseline));
                write!(f, " ({}: {a}, {baseline}: {b})", c.arm)?;
            }
            write!(f, ", n = {}", c.n)?;
            if let Some(paper) = &c.paper {
                write!(f, "; paper: {paper}")?;
            }
            if let Some(reason) = &c.reason {
                write!(f, "; {reason}")?;
            }
            writeln!(f)?;
        }
        write!(f, "\n{:.0} s, {}", self.wall_seconds, self.date)?;
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_of_the_calendar() {
        let at = |s: u64| date(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
