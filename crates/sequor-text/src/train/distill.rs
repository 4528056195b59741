//! A corpus of a model's own generations, for heads that learn to guess them.
//!
//! A draft head has to predict what its target will say, not what people write. The target
//! therefore writes the corpus itself. An instruction model also writes the questions: given
//! the chat template up to where a person would speak, it says what a person might (the
//! Magpie method, Xu et al. 2024), then answers. Part of the questions are tasks about
//! earlier answers (summarise, translate, find, rewrite) and small sums, so that texts that
//! copy from their prompt occur too. A plain language model just writes.
//!
//! The corpus is a folder of shards, `shard-NNNNN.safetensors`:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `tokens` | `[n]` int32 | the sequences, one after the other |
//! | `starts` | `[s + 1]` int32 | where each begins |
//! | `prompt_lens` | `[s]` int32 | tokens before the first one that the model chose as an answer |
//! | `features` | `[n, dim]` f16 | the target's states after its final norm |
//!
//! A shard depends on the seed, its number and the shard before it, so that an interrupted
//! run goes on where it was.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sequor_kernels::bridge;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::weights::{Safetensors, TensorSource, write_safetensors};
use sequor_nn::{Kind, Tensor};
use sequor_sampling::generate::{ModelLimits, Options, Sequence};
use sequor_sampling::{GenerationConfig, Step, TargetModel};
use sequor_tokenizers::Message;

use crate::pipeline::TextPipeline;
use crate::{Error, Result};

/// Sequences per shard.
const SHARD: usize = 256;
/// Sequences generated together.
const BATCH: usize = 64;
/// Most tokens of a question.
const QUESTION: usize = 96;
/// Most tokens of an earlier answer that a task quotes.
const QUOTE: usize = 160;
/// Stands for what the user says while the chat template is taken apart.
const MARK: &str = "QUESTIONGOESHERE";
/// How answers are chosen: temperatures by turns; 0 takes the best token.
const TEMPERATURES: [f64; 4] = [0.0, 0.7, 0.0, 1.0];

/// Choices left to a token that is drawn: cheap, and enough for variety.
const TOP_K: usize = 64;

/// What the corpus shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DistillOptions {
    /// Tokens in all, at least; whole shards are written.
    pub tokens: usize,
    /// Most tokens of an answer.
    pub answer: usize,
    /// Seed of all random numbers.
    pub seed: u64,
}

impl Default for DistillOptions {
    fn default() -> Self {
        Self {
            tokens: 400_000,
            answer: 224,
            seed: 1,
        }
    }
}

/// Generates the missing part of the corpus in `dir` with `pipeline`'s model. `progress` is
/// told the tokens done after every shard.
///
/// # Errors
/// When the model fails or the folder cannot be written; [`Error::Cancelled`] when `cancel`
/// became true (finished shards stay).
pub fn distill(
    pipeline: &TextPipeline,
    dir: &Path,
    options: &DistillOptions,
    progress: &mut dyn FnMut(usize),
    cancel: &AtomicBool,
) -> Result<()> {
    if options.answer == 0 {
        return Err(Error::Input("an answer needs at least 1 token".into()));
    }
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let writer = Writer::new(pipeline, options)?;
    let mut done = 0;
    let mut before: Option<Shard> = None;
    for number in 0.. {
        if done >= options.tokens {
            break;
        }
        let path = shard_path(dir, number);
        let shard = if path.is_file() {
            Shard::read(&path)?
        } else {
            let shard = writer.write_shard(number, before.as_ref(), cancel)?;
            shard.write(&path)?;
            shard
        };
        done += shard.tokens.len();
        progress(done);
        before = Some(shard);
    }
    Ok(())
}

/// The shards in `dir` in order, then those of its folders by name.
fn find_shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = vec![dir.to_path_buf()];
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut inner: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    inner.sort();
    folders.extend(inner);
    let shards_of = |folder: PathBuf| {
        (0..)
            .map(move |number| shard_path(&folder, number))
            .take_while(|path| path.is_file())
    };
    Ok(folders.into_iter().flat_map(shards_of).collect())
}

fn shard_path(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("shard-{number:05}.safetensors"))
}

/// A text to be written.
struct Plan {
    /// Its place in the shard.
    number: usize,
    prompt: Vec<u32>,
    /// A question, to be followed by its answer.
    question: bool,
}

/// A text in the making.
struct Job {
    plan: Plan,
    sequence: Sequence<'static>,
    features: Vec<Tensor>,
}

struct Writer<'a> {
    pipeline: &'a TextPipeline,
    options: DistillOptions,
    /// Tokens before and after a question in the chat template.
    chat: Option<(Vec<u32>, Vec<u32>)>,
}

impl<'a> Writer<'a> {
    fn new(pipeline: &'a TextPipeline, options: &DistillOptions) -> Result<Self> {
        let tokenizer = pipeline.tokenizer();
        let chat = match tokenizer.chat_template() {
            None => None,
            Some(_) => {
                let text = tokenizer.render_chat(&[Message::user(MARK)], true)?;
                let (head, tail) = text.split_once(MARK).ok_or_else(|| {
                    Error::Config("the model's chat template does not repeat what the user says; the corpus needs one that does".into())
                })?;
                Some((
                    tokenizer.encode(head, false)?,
                    tokenizer.encode(tail, false)?,
                ))
            }
        };
        Ok(Self {
            pipeline,
            options: *options,
            chat,
        })
    }

    /// Tasks, then as many questions as are missing for a shard that the model asks itself;
    /// all of them answered.
    fn write_shard(
        &self,
        number: usize,
        before: Option<&Shard>,
        cancel: &AtomicBool,
    ) -> Result<Shard> {
        let mut queue: VecDeque<Plan> = VecDeque::new();
        let mut add = |prompt: Vec<u32>, question: bool| {
            queue.push_back(Plan {
                number: queue.len(),
                prompt,
                question,
            });
        };
        match &self.chat {
            Some((head, tail)) => {
                let tasks = self.tasks(number, before)?;
                let own = SHARD - tasks.len();
                for _ in 0..own {
                    add(head.clone(), true);
                }
                for task in tasks {
                    add([head.as_slice(), &task, tail].concat(), false);
                }
            }
            None => {
                let start = self.pipeline.encode("").ok();
                let eos = || self.pipeline.eos().first().map(|&eos| vec![eos]);
                let start = start.or_else(eos).ok_or_else(|| {
                    Error::Unsupported("a model with neither a first nor a last token".into())
                })?;
                for _ in 0..SHARD {
                    add(start.clone(), false);
                }
            }
        }
        self.run(number, queue, cancel)
    }

    fn begin(&self, shard: usize, slot: usize, plan: Plan, limits: &ModelLimits) -> Result<Job> {
        let (temperature, new_tokens) = if plan.question {
            (1.0, QUESTION)
        } else {
            let turn = TEMPERATURES.get(plan.number % TEMPERATURES.len());
            (turn.copied().unwrap_or_default(), self.options.answer)
        };
        let config = GenerationConfig {
            do_sample: Some(temperature > 0.0),
            temperature: Some(temperature),
            top_k: (temperature > 0.0).then_some(TOP_K),
            max_new_tokens: Some(new_tokens),
            eos_token_id: Some(self.pipeline.eos().to_vec().into()),
            ..GenerationConfig::default()
        };
        // Every text has random numbers of its own.
        let request = ((shard * SHARD + plan.number) as u64) << 1 | u64::from(plan.question);
        let options = Options::from(config)
            .seed(self.options.seed)
            .request(request);
        let sequence = Sequence::new(slot, &plan.prompt, 0, &options, limits, None)?;
        Ok(Job {
            plan,
            sequence,
            features: Vec::new(),
        })
    }

    /// Writes all texts, [`BATCH`] at a time: one forward pass for all of them, and a text
    /// that ends makes room for the next.
    fn run(&self, shard: usize, mut queue: VecDeque<Plan>, cancel: &AtomicBool) -> Result<Shard> {
        let model = self.pipeline.model();
        let limits = ModelLimits::of(model);
        let mut state = model.new_state(BATCH)?;
        let mut slots: Vec<Option<Job>> = (0..BATCH).map(|_| None).collect();
        let mut done: BTreeMap<usize, Job> = BTreeMap::new();
        loop {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            for (slot, place) in slots.iter_mut().enumerate() {
                // What goes in circles teaches nothing more.
                let goes_on = |job: &mut Job| -> Result<bool> {
                    Ok(!repeats(job.sequence.generated()) && job.sequence.plan()?)
                };
                while let Some(mut job) = place.take() {
                    if goes_on(&mut job)? {
                        *place = Some(job);
                        break;
                    }
                    if job.plan.question {
                        queue.push_back(self.answer(job));
                    } else {
                        done.insert(job.plan.number, job);
                    }
                }
                if place.is_none()
                    && let Some(plan) = queue.pop_front()
                {
                    state.reset(slot)?;
                    let mut job = self.begin(shard, slot, plan, &limits)?;
                    job.sequence.plan()?;
                    *place = Some(job);
                }
            }
            let steps: Vec<Step<'_>> = slots
                .iter()
                .flatten()
                .filter_map(|job| job.sequence.step())
                .map(|step| Step {
                    features: true,
                    ..step
                })
                .collect();
            if steps.is_empty() {
                return Shard::of(done.into_values().collect());
            }
            let outputs = model.forward(&steps, &mut state)?;
            for (job, output) in slots.iter_mut().flatten().zip(&outputs) {
                if let Some(features) = &output.features {
                    // A copy: the view would keep the whole batch's rows in memory.
                    let half = features
                        .f_to_kind(Kind::Half)
                        .map_err(sequor_nn::Error::from)?;
                    job.features.push(half);
                }
                job.sequence.absorb(output, 0.0, &mut state)?;
            }
        }
    }

    /// The answer to a question that is written.
    fn answer(&self, question: Job) -> Plan {
        let eos = self.pipeline.eos();
        let mut prompt = question.sequence.tokens().to_vec();
        while prompt.last().is_some_and(|t| eos.contains(t)) {
            prompt.pop();
        }
        if let Some((_, tail)) = &self.chat {
            prompt.extend_from_slice(tail);
        }
        Plan {
            prompt,
            question: false,
            ..question.plan
        }
    }

    /// Questions about the texts of the shard before, and sums.
    fn tasks(&self, number: usize, before: Option<&Shard>) -> Result<Vec<Vec<u32>>> {
        let Some(before) = before else {
            return Ok(Vec::new());
        };
        let tokenizer = self.pipeline.tokenizer();
        let mut draw = Key::new(self.options.seed, number as u64).stream(0, Purpose::Data);
        let mut tasks = Vec::new();
        for i in 0..SHARD * 5 / 16 {
            let text = if i % 5 == 4 {
                sum(&mut |n| draw.below(n))
            } else {
                let (tokens, prompt_len) = before.sequence(draw.below(SHARD as u64) as usize);
                let answer = tokens.get(prompt_len..).unwrap_or_default();
                let quote = answer.get(..answer.len().min(QUOTE)).unwrap_or_default();
                let quote = tokenizer.decode(quote, true)?;
                let quote = quote.trim();
                if quote.len() < 40 {
                    continue;
                }
                let form = draw.below(TASKS.len() as u64) as usize;
                TASKS
                    .get(form)
                    .copied()
                    .unwrap_or_default()
                    .replace("{}", quote)
            };
            tasks.push(tokenizer.encode(&text, false)?);
        }
        Ok(tasks)
    }
}

/// What can be asked about a text.
const TASKS: [&str; 12] = [
    "Summarize the following text in two sentences.\n\n{}",
    "{}\n\nSummarize the text above.",
    "What are the main points of this text?\n\n{}",
    "Translate the following text into French.\n\n{}",
    "Translate this into German: {}",
    "Translate the following text into Spanish.\n\n{}",
    "Correct any mistakes in the following text and repeat it.\n\n{}",
    "Read the text and answer the question.\n\nText: {}\n\nQuestion: What is the text about?",
    "Use the passage to answer. Passage: {}\n\nQuestion: Name one important fact from the passage.",
    "Rewrite the following text in simpler words.\n\n{}",
    "List the key terms in this text as bullet points.\n\n{}",
    "Continue this text with one more paragraph.\n\n{}",
];

/// A small sum in words. `below(n)` draws a number below `n`.
fn sum(below: &mut dyn FnMut(u64) -> u64) -> String {
    const NAMES: [&str; 8] = [
        "Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo",
    ];
    const THINGS: [&str; 8] = [
        "apples", "books", "marbles", "tickets", "stamps", "cookies", "pencils", "flowers",
    ];
    let name = NAMES.get(below(8) as usize).copied().unwrap_or("Anna");
    let things = THINGS.get(below(8) as usize).copied().unwrap_or("books");
    let (a, b, c) = (below(40) + 5, below(30) + 2, below(9) + 2);
    match below(4) {
        0 => format!(
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"
        ),
        1 => format!(
            "{name} has {} {things} and gives away {b}. How many are left? Explain step by step.",
            a + b
        ),
        2 => format!(
            "There are {c} boxes with {a} {things} each. {name} takes {c} {things}. How many {things} remain in the boxes?"
        ),
        _ => format!(
            "{name} sells {a} {things} for {c} dollars each and spends {b} dollars. How much money does {name} have?"
        ),
    }
}

/// Whether the last eight tokens occurred before.
fn repeats(tokens: &[u32]) -> bool {
    const N: usize = 8;
    let Some(at) = tokens.len().checked_sub(N) else {
        return false;
    };
    let Some(last) = tokens.get(at..) else {
        return false;
    };
    tokens
        .get(..tokens.len() - 1)
        .is_some_and(|earlier| earlier.windows(N).any(|w| w == last))
}

/// A part of the corpus in memory.
#[derive(Debug)]
struct Shard {
    tokens: Vec<u32>,
    starts: Vec<usize>,
    prompt_lens: Vec<usize>,
    features: Tensor,
}

impl Shard {
    fn of(jobs: Vec<Job>) -> Result<Self> {
        let (mut tokens, mut starts, mut prompt_lens) = (Vec::new(), vec![0], Vec::new());
        let mut features = Vec::new();
        for job in jobs {
            // The newest token was never fed: it has no feature.
            let fed = job.sequence.cached();
            tokens.extend(job.sequence.tokens().iter().take(fed));
            starts.push(tokens.len());
            prompt_lens.push(job.plan.prompt.len());
            features.extend(job.features);
        }
        let features = Tensor::f_cat(&features, 0).map_err(sequor_nn::Error::from)?;
        Ok(Self {
            tokens,
            starts,
            prompt_lens,
            features,
        })
    }

    /// Tokens and length of the prompt of sequence `i`.
    fn sequence(&self, i: usize) -> (&[u32], usize) {
        let range = self.starts.get(i).zip(self.starts.get(i + 1));
        let tokens = range.and_then(|(&a, &b)| self.tokens.get(a..b));
        (
            tokens.unwrap_or_default(),
            self.prompt_lens.get(i).copied().unwrap_or_default(),
        )
    }

    fn write(&self, path: &Path) -> Result<()> {
        let ints = |v: &mut dyn Iterator<Item = usize>| -> Result<Tensor> {
            let v: Vec<i32> = v.map(|x| x as i32).collect();
            Ok(Tensor::f_from_slice(&v).map_err(sequor_nn::Error::from)?)
        };
        let tokens = ints(&mut self.tokens.iter().map(|&t| t as usize))?;
        let starts = ints(&mut self.starts.iter().copied())?;
        let prompts = ints(&mut self.prompt_lens.iter().copied())?;
        write_safetensors(
            path,
            &[
                ("tokens", &tokens),
                ("starts", &starts),
                ("prompt_lens", &prompts),
                ("features", &self.features),
            ],
            &BTreeMap::new(),
        )?;
        Ok(())
    }

    fn read(path: &Path) -> Result<Self> {
        let file = Safetensors::open(path)?;
        let damaged = |what: &str| {
            Error::Config(format!(
                "{}: {what}; remove the file, and it is made again",
                path.display()
            ))
        };
        let ints = |name: &str| -> Result<Vec<usize>> {
            let t = file.load(name)?;
            let t = t.f_to_kind(Kind::Int64).map_err(sequor_nn::Error::from)?;
            let v: Vec<i64> = bridge::to_vec(&t).map_err(|e| damaged(&e.to_string()))?;
            v.into_iter()
                .map(|x| usize::try_from(x).map_err(|_| damaged(&format!("{name} has {x}"))))
                .collect()
        };
        let tokens: Vec<u32> = ints("tokens")?.into_iter().map(|t| t as u32).collect();
        let (starts, prompt_lens) = (ints("starts")?, ints("prompt_lens")?);
        let features = file.load("features")?;
        let fits = starts.len() == prompt_lens.len() + 1
            && starts.first() == Some(&0)
            && starts.last() == Some(&tokens.len())
            && starts.windows(2).all(|w| matches!(w, [a, b] if a <= b))
            && matches!(features.size()[..], [n, _] if n == tokens.len() as i64);
        if !fits {
            return Err(damaged("its tensors do not belong together"));
        }
        Ok(Self {
            tokens,
            starts,
            prompt_lens,
            features,
        })
    }
}

/// One sequence of the corpus.
#[derive(Debug)]
pub struct Sample {
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// The target's states after its final norm, `[tokens, dim]` f32.
    pub features: Tensor,
}

/// A corpus on disk. The shard read last stays in memory.
#[derive(Debug)]
pub struct DistillCorpus {
    dir: PathBuf,
    shards: Vec<PathBuf>,
    /// Shard and number within it of every sequence.
    index: Vec<(usize, usize)>,
    counts: BTreeMap<u32, u64>,
    tokens: usize,
    dim: i64,
    last: RefCell<Option<(usize, Shard)>>,
}

impl DistillCorpus {
    /// Opens a folder that [`distill`] filled, or one that holds several of them.
    ///
    /// # Errors
    /// When there is no shard, or one is damaged; the message names the file.
    pub fn open(dir: &Path) -> Result<Self> {
        let shards = find_shards(dir)?;
        let (mut index, mut counts, mut tokens, mut dim) = (Vec::new(), BTreeMap::new(), 0, 0);
        for (number, path) in shards.iter().enumerate() {
            let shard = Shard::read(path)?;
            let width = shard.features.size().get(1).copied().unwrap_or_default();
            if number > 0 && width != dim {
                return Err(Error::Config(format!(
                    "{}: features of width {width} where the shards before have {dim}: they are of two models",
                    path.display()
                )));
            }
            dim = width;
            tokens += shard.tokens.len();
            for i in 0..shard.prompt_lens.len() {
                let (sequence, prompt_len) = shard.sequence(i);
                index.push((number, i));
                for &t in sequence.get(prompt_len..).unwrap_or_default() {
                    *counts.entry(t).or_default() += 1;
                }
            }
        }
        if index.is_empty() {
            return Err(Error::Config(format!(
                "{}: no corpus is here; make one with `sequor train corpus`",
                dir.display()
            )));
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            shards,
            index,
            counts,
            tokens,
            dim,
            last: RefCell::new(None),
        })
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.index.len()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Width of the features.
    pub fn dim(&self) -> i64 {
        self.dim
    }

    /// Sequence `i`. Reading in order is fast: a shard is read once.
    ///
    /// # Errors
    /// When there is no such sequence or its shard cannot be read.
    pub fn read(&self, i: usize) -> Result<Sample> {
        let &(number, within) = self.index.get(i).ok_or_else(|| {
            Error::Input(format!("sequence {i} of a corpus of {}", self.index.len()))
        })?;
        let gone = || Error::Config(format!("{}: the corpus changed", self.dir.display()));
        let mut last = self.last.borrow_mut();
        if last.as_ref().is_none_or(|(n, _)| *n != number) {
            let path = self.shards.get(number).ok_or_else(gone)?;
            *last = Some((number, Shard::read(path)?));
        }
        let (_, shard) = last.as_ref().ok_or_else(gone)?;
        let (tokens, prompt_len) = shard.sequence(within);
        let start = shard.starts.get(within).copied().ok_or_else(gone)?;
        let features = shard
            .features
            .f_narrow(0, start as i64, tokens.len() as i64)
            .and_then(|f| f.f_to_kind(Kind::Float))
            .map_err(sequor_nn::Error::from)?;
        Ok(Sample {
            tokens: tokens.to_vec(),
            prompt_len,
            features,
        })
    }

    /// The `n` most frequent tokens of the answers, most frequent first (ties by id), and the
    /// share of the answers that they cover.
    pub fn frequent_tokens(&self, n: usize) -> (Vec<u32>, f64) {
        let mut by_count: Vec<(u64, u32)> = self.counts.iter().map(|(&t, &c)| (c, t)).collect();
        by_count.sort_by_key(|&(c, t)| (std::cmp::Reverse(c), t));
        let all: u64 = by_count.iter().map(|(c, _)| c).sum();
        by_count.truncate(n);
        let kept: u64 = by_count.iter().map(|(c, _)| c).sum();
        let ids = by_count.into_iter().map(|(_, t)| t).collect();
        (ids, kept as f64 / all.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_are_seen() {
        let mut t: Vec<u32> = (0..20).collect();
        assert!(!repeats(&t));
        t.extend(3..10);
        assert!(!repeats(&t));
        t.push(10);
        assert!(repeats(&t));
        assert!(repeats(&[7; 9]));
        assert!(!repeats(&[7; 8]));
    }

    #[test]
    fn a_shard_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let shard = Shard {
            tokens: vec![5, 6, 7, 5, 5],
            starts: vec![0, 3, 5],
            prompt_lens: vec![1, 1],
            features: (Tensor::arange(10, (Kind::Half, sequor_nn::Device::Cpu))).reshape([5, 2]),
        };
        shard.write(&shard_path(dir.path(), 0)).unwrap();
        let corpus = DistillCorpus::open(dir.path()).unwrap();
        assert_eq!(
            (corpus.sequences(), corpus.tokens(), corpus.dim()),
            (2, 5, 2)
        );
        let second = corpus.read(1).unwrap();
        assert_eq!((second.tokens, second.prompt_len), (vec![5, 5], 1));
        assert_eq!(second.features.double_value(&[0, 0]), 6.0);
        assert_eq!(corpus.frequent_tokens(2), (vec![5, 6], 2.0 / 3.0));
        assert!(corpus.read(2).is_err());
        assert!(DistillCorpus::open(&dir.path().join("none")).is_err());
    }
}
