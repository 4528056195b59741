//! The systems that this project sets out to build, with what their proofs found.

mod list;

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use list::SYSTEMS;

/// Largest result that is read.
const MAX_RESULT_BYTES: u64 = 64 << 20;
/// What a result says when there is none.
const NOT_RUN: &str = "not run";

/// What a system makes or reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// Text.
    Text,
    /// Pictures.
    Image,
    /// Speech and sound.
    Speech,
    /// Video.
    Video,
    /// Series, peptides, meshes, scenes, chips.
    Other,
}

impl fmt::Display for Modality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Text => "text",
            Self::Image => "image",
            Self::Speech => "speech",
            Self::Video => "video",
            Self::Other => "other",
        })
    }
}

/// One system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct System {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// What it makes or reads.
    pub modality: Modality,
    /// What it is, in a line.
    pub summary: &'static str,
    /// The module that has it; absent while it is not built.
    pub module: Option<&'static str>,
    /// Its page in `docs/systems`.
    pub page: Option<&'static str>,
}

/// The numbers of a proof's verdicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Claims that hold.
    pub holds: usize,
    /// Claims that fail.
    pub fails: usize,
    /// Claims that could not be decided.
    pub inconclusive: usize,
    /// Whether the run was a short one.
    pub quick: bool,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.holds, "hold"),
            (self.fails, "fail"),
            (self.inconclusive, "undecided"),
        ];
        let said: Vec<String> = counts
            .into_iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, what)| format!("{n} {what}"))
            .collect();
        f.write_str(&said.join(", "))?;
        f.write_str(if self.quick { " (short run)" } else { "" })
    }
}

impl System {
    /// The system with this number.
    #[must_use]
    pub fn find(number: u32) -> Option<&'static Self> {
        SYSTEMS.iter().find(|s| s.number == number)
    }

    /// Name of its result below `docs/results`.
    #[must_use]
    pub fn result_file(&self) -> String {
        format!("{:02}.json", self.number)
    }

    /// What its proof found, by the files in `results`. `None` when it has not run or its
    /// result cannot be read.
    #[must_use]
    pub fn tally(&self, results: &Path) -> Option<Tally> {
        let path = results.join(self.result_file());
        let meta = path.metadata().ok()?;
        if !meta.is_file() || meta.len() > MAX_RESULT_BYTES {
            return None;
        }
        let json: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        if json.get("system")?.as_u64()? != u64::from(self.number) {
            return None;
        }
        let mut tally = Tally {
            quick: json.get("quick")?.as_bool()?,
            ..Tally::default()
        };
        for claim in json.get("claims")?.as_array()? {
            match claim.get("verdict")?.as_str()? {
                "holds" => tally.holds += 1,
                "fails" => tally.fails += 1,
                "inconclusive" => tally.inconclusive += 1,
                _ => return None,
            }
        }
        (tally.holds + tally.fails + tally.inconclusive > 0).then_some(tally)
    }
}

/// All systems as a Markdown table, with links relative to the root of the checkout.
#[must_use]
pub fn markdown(results: &Path) -> String {
    let mut text = String::from(
        "| | system | modality | what it is | claims of the paper, measured here |\n|---|---|---|---|---|\n",
    );
    for s in &SYSTEMS {
        let name = match s.page {
            Some(page) => format!("[{}](docs/systems/{page})", s.name),
            None => s.name.to_owned(),
        };
        let found = match (s.module, s.tally(results)) {
            (None, _) => "not built yet".to_owned(),
            (Some(_), None) => NOT_RUN.to_owned(),
            (Some(_), Some(tally)) => format!("[{tally}](docs/results/{})", s.result_file()),
        };
        text += &format!(
            "| {:02} | {name} | {} | {} | {found} |\n",
            s.number, s.modality, s.summary
        );
    }
    text
}

/// All systems as lines for a terminal.
#[must_use]
pub fn plain(results: &Path) -> String {
    let mut text = String::new();
    for s in &SYSTEMS {
        let found = match (s.module, s.tally(results)) {
            (None, _) => "-".to_owned(),
            (Some(_), None) => NOT_RUN.to_owned(),
            (Some(_), Some(tally)) => tally.to_string(),
        };
        text += &format!(
            "{:02}  {:33}  {:6}  {found:30}  {}\n",
            s.number, s.name, s.modality, s.summary
        );
    }
    text
}

/// All systems as JSON, each with its verdicts (null when it has not run).
#[must_use]
pub fn json(results: &Path) -> Value {
    let rows = SYSTEMS.iter().map(|s| {
        let mut row = serde_json::to_value(s).unwrap_or_default();
        if let Some(fields) = row.as_object_mut() {
            let tally = serde_json::to_value(s.tally(results)).unwrap_or_default();
            fields.insert("result".into(), tally);
        }
        row
    });
    Value::Array(rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_fifty_one_and_each_line_says_something() {
        for (i, s) in SYSTEMS.iter().enumerate() {
            assert_eq!(s.number as usize, i + 1);
            assert!(
                s.summary.len() > 20 && !s.summary.contains('|'),
                "{}",
                s.name
            );
            assert_eq!(s.module.is_some(), s.page.is_some(), "{}", s.name);
        }
        assert_eq!(System::find(23).map(|s| s.name), Some("Hydra"));
        assert!(System::find(0).is_none() && System::find(52).is_none());
    }

    #[test]
    fn verdicts_come_from_files_and_broken_files_count_as_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let hydra = System::find(23).unwrap();
        let line = |dir: &Path| {
            let text = markdown(dir);
            let hydra = text
                .lines()
                .find(|l| l.contains("Hydra"))
                .unwrap()
                .to_owned();
            assert_eq!(text.lines().count(), 53);
            hydra
        };
        assert!(line(dir.path()).ends_with("| not run |"));
        for broken in [
            "",
            "{}",
            r#"{"system": 22, "quick": false, "claims": [{"verdict": "holds"}]}"#,
            r#"{"system": 23, "quick": false, "claims": []}"#,
            r#"{"system": 23, "quick": false, "claims": [{"verdict": "great"}]}"#,
        ] {
            std::fs::write(dir.path().join("23.json"), broken).unwrap();
            assert!(line(dir.path()).ends_with("| not run |"), "{broken}");
        }
        let good = r#"{"system": 23, "quick": true, "claims": [{"verdict": "holds"}, {"verdict": "fails"}]}"#;
        std::fs::write(dir.path().join("23.json"), good).unwrap();
        assert_eq!(
            hydra.tally(dir.path()).unwrap().to_string(),
            "1 hold, 1 fail (short run)"
        );
        assert!(line(dir.path()).contains("[1 hold, 1 fail (short run)](docs/results/23.json)"));
        assert_eq!(json(dir.path())[22]["result"]["fails"], 1);
        assert_eq!(json(dir.path())[0]["result"], Value::Null);
        assert!(plain(dir.path()).contains("OWSM-CTC"));
    }
}
