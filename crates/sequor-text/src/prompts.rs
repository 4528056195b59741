//! Prompts to measure with.
//!
//! [Spec-Bench](https://github.com/hemingkx/Spec-Bench) has 480 prompts of six kinds; the
//! file is read where it is found, and is never part of what a model or a head is trained
//! on. A small set of our own, of the same six kinds, comes with the crate for everybody
//! who does not have it. Only the first turn of a conversation is used.

use std::path::{Path, PathBuf};

use sequor_data::Resolver;
use sequor_eval::{sha256_bytes, sha256_file};
use sequor_tokenizers::Message;
use serde_json::Value;

use crate::{Error, Result, TextPipeline};

/// Our own prompts.
const BUNDLED: &str = include_str!("../prompts.jsonl");
/// Environment variable that names the file of Spec-Bench or its folder.
pub const SPECBENCH_VAR: &str = "SEQUOR_SPECBENCH";
/// The file of Spec-Bench.
const SPECBENCH_FILE: &str = "question.jsonl";
/// Largest file of prompts.
const MAX_BYTES: u64 = 64 << 20;
/// Part of a text that is kept from its beginning when it has to be cut, of its end the rest.
const HEAD_SHARE: f64 = 0.75;
/// Categories of MT-bench within Spec-Bench, which are one kind there.
const CONVERSATION: [&str; 8] = [
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
];

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its name within the set.
    pub id: String,
    /// Kind of task: `conversation`, `translation`, `summarization`, `qa`,
    /// `math_reasoning`, `rag`, or what a file of one's own says.
    pub kind: String,
    /// What the user says.
    pub text: String,
}

/// Prompts of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptSet {
    /// `spec-bench`, `bundled`, or the name of the file.
    pub name: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The prompts in the order of the file; at least one.
    pub prompts: Vec<Prompt>,
}

/// A prompt in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its name within the set.
    pub id: String,
    /// Kind of task.
    pub kind: String,
    /// The tokens, in the model's chat template where it has one.
    pub tokens: Vec<u32>,
    /// Tokens that were cut out of the middle of the text.
    pub cut: usize,
}

impl PromptSet {
    /// The prompts that come with this crate: six of each kind.
    ///
    /// # Errors
    /// None in practice: the tests read the file.
    pub fn bundled() -> Result<Self> {
        Ok(Self {
            name: "bundled".to_owned(),
            sha256: sha256_bytes(BUNDLED.as_bytes()),
            prompts: parse(BUNDLED, "the bundled prompts")?,
        })
    }

    /// Reads a file with one JSON object per line: `turns` (a list whose first text is the
    /// prompt) or `prompt` (a text), and optionally `category` and `question_id`.
    ///
    /// # Errors
    /// [`Error::Input`] naming the line; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        let meta = path.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() || meta.len() > MAX_BYTES {
            return Err(Error::Input(format!(
                "{}: prompts must be a file of at most {MAX_BYTES} bytes",
                path.display()
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = if file == SPECBENCH_FILE {
            "spec-bench".to_owned()
        } else {
            file.into_owned()
        };
        Ok(Self {
            name,
            sha256: sha256_file(path)?,
            prompts: parse(&text, &path.display().to_string())?,
        })
    }

    /// Spec-Bench where it is found, and the bundled prompts otherwise.
    ///
    /// # Errors
    /// When a file is found and cannot be read, and when `$SEQUOR_SPECBENCH` names none.
    pub fn find() -> Result<Self> {
        match specbench()? {
            Some(path) => Self::load(&path),
            None => Self::bundled(),
        }
    }

    /// The kinds in the order of the file.
    #[must_use]
    pub fn kinds(&self) -> Vec<&str> {
        let mut kinds: Vec<&str> = Vec::new();
        for prompt in &self.prompts {
            if !kinds.contains(&prompt.kind.as_str()) {
                kinds.push(&prompt.kind);
            }
        }
        kinds
    }

    /// At most `n` prompts of each kind, spread evenly over the file: always the same ones.
    /// Kinds take turns.
    #[must_use]
    pub fn select(&self, n: usize) -> Vec<&Prompt> {
        let chosen: Vec<Vec<&Prompt>> = self
            .kinds()
            .into_iter()
            .map(|kind| {
                let all: Vec<&Prompt> = self.prompts.iter().filter(|p| p.kind == kind).collect();
                let n = n.min(all.len());
                let at = |i: usize| all.get(i * all.len() / n.max(1)).copied();
                (0..n).filter_map(at).collect()
            })
            .collect();
        (0..n)
            .flat_map(|i| chosen.iter().filter_map(move |kind| kind.get(i).copied()))
            .collect()
    }
}

impl Prompt {
    /// The prompt in the chat template of the model (as it stands where there is none), in
    /// at most `most` tokens. From a longer text the middle is cut out: the beginning says
    /// what to do, and the end often what about.
    ///
    /// # Errors
    /// [`Error::Input`] when the template alone is longer; those of the tokenizer.
    pub fn encode(&self, pipeline: &TextPipeline, most: usize) -> Result<Encoded> {
        let whole = |text: String| match pipeline.chat_prompt(&[Message::user(text.clone())]) {
            Err(Error::Unsupported(_)) => pipeline.encode(&text),
            other => other,
        };
        let encoded = |tokens: Vec<u32>, cut: usize| Encoded {
            id: self.id.clone(),
            kind: self.kind.clone(),
            tokens,
            cut,
        };
        let tokens = whole(self.text.clone())?;
        if tokens.len() <= most {
            return Ok(encoded(tokens, 0));
        }
        let ids = pipeline.tokenizer().encode(&self.text, false)?;
        let around = tokens.len().saturating_sub(ids.len());
        // Text put together from two parts may have a few tokens more: try again with less.
        for spare in [0, 2, 4, 8, 16, 32] {
            let room = most.saturating_sub(around + spare).min(ids.len());
            let head = (room as f64 * HEAD_SHARE) as usize;
            let tail = ids.len() - (room - head);
            let (Some(first), Some(last)) = (ids.get(..head), ids.get(tail..)) else {
                break;
            };
            let first = pipeline.tokenizer().decode(first, true)?;
            let last = pipeline.tokenizer().decode(last, true)?;
            let tokens = whole(format!("{first} ... {last}"))?;
            if room > 0 && tokens.len() <= most {
                return Ok(encoded(tokens, tail - head));
            }
        }
        Err(Error::Input(format!(
            "the prompt {} does not fit into {most} tokens: {around} are taken by the chat template",
            self.id
        )))
    }
}

/// Tokens before the first 8-gram that the text has had before: what comes after is a
/// loop, which every drafter predicts. A text without one counts whole.
#[must_use]
pub fn before_repeat(tokens: &[u32]) -> usize {
    const N: usize = 8;
    let mut seen = std::collections::HashSet::new();
    tokens
        .windows(N)
        .position(|gram| !seen.insert(gram))
        .unwrap_or(tokens.len())
}

/// The file of Spec-Bench: as `$SEQUOR_SPECBENCH` says, in a folder `specbench` of
/// `$SEQUOR_DATA`, or in `shared/data/specbench` within or beside the checkout.
fn specbench() -> Result<Option<PathBuf>> {
    if let Some(named) = std::env::var_os(SPECBENCH_VAR).filter(|v| !v.is_empty()) {
        let path = PathBuf::from(named);
        let file = if path.is_dir() {
            path.join(SPECBENCH_FILE)
        } else {
            path
        };
        return match file.is_file() {
            true => Ok(Some(file)),
            false => Err(Error::Input(format!(
                "{SPECBENCH_VAR} names {}, which is not there",
                file.display()
            ))),
        };
    }
    let resolver = Resolver::from_env();
    let data = resolver.data_dirs.iter().map(|d| d.join("specbench"));
    // `models/` lies in the root of the checkout.
    let around = resolver
        .bundled_dirs
        .iter()
        .flat_map(|m| m.ancestors().skip(1).take(2));
    let shared = around.map(|d| d.join("shared/data/specbench"));
    let found = data.chain(shared).map(|d| d.join(SPECBENCH_FILE));
    Ok(found.into_iter().find(|f| f.is_file()))
}

fn parse(text: &str, file: &str) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    for (i, line) in text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty())
    {
        let wrong = |what: &str| Error::Input(format!("{file}, line {}: {what}", i + 1));
        let json: Value =
            serde_json::from_str(line).map_err(|e| wrong(&format!("not a JSON object ({e})")))?;
        let first = json.get("turns").and_then(|t| t.get(0));
        let text = first.or(json.get("prompt")).and_then(Value::as_str);
        let text = text
            .filter(|t| !t.trim().is_empty())
            .ok_or_else(|| wrong("neither 'turns' with a text nor 'prompt'"))?;
        let kind = match json.get("category").and_then(Value::as_str) {
            Some(c) if CONVERSATION.contains(&c) => "conversation",
            Some(c) => c,
            None => "prompt",
        };
        let id = match json.get("question_id") {
            Some(Value::String(id)) => id.clone(),
            Some(id @ Value::Number(_)) => id.to_string(),
            _ => (i + 1).to_string(),
        };
        prompts.push(Prompt {
            id,
            kind: kind.to_owned(),
            text: text.to_owned(),
        });
    }
    if prompts.is_empty() {
        return Err(Error::Input(format!("{file} holds no prompts")));
    }
    let mut ids: Vec<&str> = prompts.iter().map(|p| p.id.as_str()).collect();
    ids.sort_unstable();
    match ids.iter().zip(ids.iter().skip(1)).find(|(a, b)| a == b) {
        Some((id, _)) => Err(Error::Input(format!(
            "{file}: the question_id {id} is there twice"
        ))),
        None => Ok(prompts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_prompts_have_six_of_six_kinds() {
        let set = PromptSet::bundled().unwrap();
        let kinds = [
            "conversation",
            "translation",
            "summarization",
            "qa",
            "math_reasoning",
            "rag",
        ];
        assert_eq!(set.kinds(), kinds);
        assert_eq!((set.prompts.len(), set.sha256.len()), (36, 64));
        let chosen = set.select(2);
        assert_eq!(chosen.len(), 12);
        // Kinds take turns, and the choice spreads over the file.
        assert_eq!(
            chosen
                .iter()
                .take(6)
                .map(|p| p.kind.as_str())
                .collect::<Vec<_>>(),
            kinds
        );
        assert_eq!(
            (chosen[0].id.as_str(), chosen[6].id.as_str()),
            ("conversation-1", "conversation-4")
        );
        assert_eq!(set.select(100).len(), 36);
        assert_eq!(set.select(0).len(), 0);
    }

    #[test]
    fn files_are_read_and_mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("question.jsonl");
        let good = "{\"question_id\": 81, \"category\": \"writing\", \"turns\": [\"One.\", \"Two.\"]}\n\n{\"prompt\": \"Three.\"}\n";
        std::fs::write(&path, good).unwrap();
        let set = PromptSet::load(&path).unwrap();
        assert_eq!((set.name.as_str(), set.prompts.len()), ("spec-bench", 2));
        let first = &set.prompts[0];
        assert_eq!(
            (first.id.as_str(), first.kind.as_str(), first.text.as_str()),
            ("81", "conversation", "One.")
        );
        assert_eq!(set.kinds(), ["conversation", "prompt"]);
        for (bad, why) in [
            ("", "no prompts"),
            ("{\"turns\": []}", "line 1"),
            ("{\"prompt\": \"a\"}\nnonsense", "line 2"),
            ("{\"prompt\": 3}", "line 1"),
            (
                "{\"question_id\": 2, \"prompt\": \"a\"}\n{\"prompt\": \"b\"}",
                "twice",
            ),
        ] {
            std::fs::write(&path, bad).unwrap();
            let error = PromptSet::load(&path).unwrap_err();
            assert!(
                error.to_string().contains(why) && error.is_usage(),
                "{error}"
            );
        }
        assert!(PromptSet::load(dir.path()).is_err());
        assert!(PromptSet::load(&dir.path().join("none")).is_err());
    }

    #[test]
    fn loops_do_not_count() {
        let fresh: Vec<u32> = (0..50).collect();
        assert_eq!(before_repeat(&fresh), 50);
        assert_eq!(before_repeat(&[]), 0);
        // A loop of three tokens: the 8-gram at 10 is the one that begins at 13 again.
        let looped: Vec<u32> = (0..10).chain((0..30).map(|i| 100 + i % 3)).collect();
        assert_eq!(before_repeat(&looped), 13);
        // The same token for ever.
        assert_eq!(before_repeat(&[7; 40]), 1);
    }
}
