//! Is a speculation method lossless on these models? Measured, not believed.
//!
//! * **Greedy**: over several prompts the method must give the tokens of plain decoding. In
//!   16-bit formats two products may round differently; where the texts part, the gap between
//!   the two best scores of the plain pass says whether it was such a tie.
//! * **Sampled**: the vocabulary is cut to the few best tokens, so that the law of the next
//!   tokens together can be computed exactly, path by path. Many continuations drawn with the
//!   method are then held against it (Pearson's chi-square, total variation).
//!
//! Both say how much was drafted and accepted: a method that drafted nothing has proved
//! nothing.

use std::sync::atomic::{AtomicBool, Ordering};

use sequor_sampling::processors::Context;
use sequor_sampling::{
    Categorical, GenerationConfig, Law as _, Layout, LogitRows, LogitsProcessor as _,
    ProcessorList, Step, TargetModel as _, stats,
};
use serde::Serialize;

use crate::options::TextOptions;
use crate::pipeline::TextPipeline;
use crate::{Error, Result};

/// Tokens that a drawn continuation has, and choices for each of them.
const DRAWN: usize = 4;
/// Smallest p-value that passes; a lossless method falls below it once in a thousand tests.
const SIGNIFICANCE: f64 = 1e-3;
/// Texts to begin from; those that repeat themselves give copying methods something to do.
const PROMPTS: [&str; 16] = [
    "The capital of France is",
    "one two three four one two three four one two",
    "Once upon a time there was a small",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
    "Water boils at a temperature of",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over",
    "Question: What is 2 + 3?\nAnswer: 5\nQuestion: What is 4 + 1?\nAnswer:",
    "A list of fruits:\n- apples\n- oranges\n-",
    "Dear Sir or Madam,\nI am writing to",
    "The sun is a star. The earth is a planet. The moon is a",
    "In 1969 the first people walked on",
    "red green blue red green blue red green",
    "To make tea you need hot water and",
    "{\"name\": \"Anna\", \"age\": 7}\n{\"name\": \"Ben\", \"age\":",
    "The history of the city began when",
];

/// How much is tested.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VerifyOptions {
    /// Prompts of the greedy test, `1..=16`.
    pub prompts: usize,
    /// Tokens per prompt, at least 2.
    pub tokens: usize,
    /// Drawn continuations per tested prompt; 0 leaves the sampled test out.
    pub draws: usize,
    /// Tokens left to choose from, `2..=6`.
    pub choices: usize,
    /// Temperature of the sampled test.
    pub temperature: f64,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            prompts: 8,
            tokens: 48,
            draws: 300,
            choices: 3,
            temperature: 1.0,
        }
    }
}

/// Where two greedy texts part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The prompt.
    pub prompt: String,
    /// Number of the first token that differs.
    pub token: usize,
    /// Score of plain decoding's token minus that of the other, in the plain pass.
    pub gap: f64,
}

/// The greedy test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GreedyTest {
    /// Prompts.
    pub prompts: usize,
    /// Those with equal texts.
    pub equal: usize,
    /// Where the others part.
    pub differences: Vec<Difference>,
    /// Drafted tokens.
    pub drafted: usize,
    /// Accepted ones.
    pub accepted: usize,
}

/// The sampled test of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampledTest {
    /// The prompt.
    pub prompt: String,
    /// Continuations drawn.
    pub draws: usize,
    /// Different continuations that are possible.
    pub cells: usize,
    /// Probability of counts at least as far from the exact law, if the method is lossless.
    pub p_value: f64,
    /// Total variation distance between the counts and the law.
    pub total_variation: f64,
    /// What it would be on average for exact draws of that number.
    pub expected_total_variation: f64,
    /// Draws that plain decoding cannot give at all.
    pub impossible: usize,
    /// Drafted tokens.
    pub drafted: usize,
    /// Accepted ones.
    pub accepted: usize,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VerifyReport {
    /// The method.
    pub method: String,
    /// The rule of acceptance, if it is a lossy one.
    pub lossy: Option<String>,
    /// Number format of the target.
    pub dtype: String,
    /// The greedy test.
    pub greedy: GreedyTest,
    /// The sampled tests.
    pub sampled: Vec<SampledTest>,
}

impl VerifyReport {
    /// Largest gap that rounding explains in this number format; scores are of order 10.
    fn tolerance(&self) -> f64 {
        match self.dtype.as_str() {
            "f32" => 1e-4,
            "f16" => 0.05,
            _ => 0.5,
        }
    }

    /// Were the texts equal, but for ties that the number format cannot tell apart?
    pub fn greedy_passes(&self) -> bool {
        let tolerance = self.tolerance();
        self.greedy
            .differences
            .iter()
            .all(|d| d.gap.abs() <= tolerance)
    }

    /// Does every sampled test pass?
    pub fn sampled_passes(&self) -> bool {
        self.sampled.iter().all(|t| t.p_value > SIGNIFICANCE)
    }

    /// Was anything put to the test?
    pub fn drafted(&self) -> bool {
        self.greedy.drafted + self.sampled.iter().map(|t| t.drafted).sum::<usize>() > 0
    }

    /// Lossless as far as these tests can tell.
    pub fn passes(&self) -> bool {
        self.greedy_passes() && self.sampled_passes() && self.drafted()
    }
}

impl std::fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let g = &self.greedy;
        writeln!(f, "{} on {} weights", self.method, self.dtype)?;
        if let Some(rule) = &self.lossy {
            writeln!(f, "acceptance rule: {rule} (LOSSY by design)")?;
        }
        writeln!(
            f,
            "greedy:  {} of {} texts equal plain decoding, token for token ({} drafted, {} accepted)",
            g.equal, g.prompts, g.drafted, g.accepted
        )?;
        for d in &g.differences {
            let tie = if d.gap.abs() <= self.tolerance() {
                "a tie in this number format"
            } else {
                "NOT a tie"
            };
            writeln!(
                f,
                "         differs at token {} of {:?}: gap of the scores {:.4}, {tie}",
                d.token, d.prompt, d.gap
            )?;
        }
        for t in &self.sampled {
            writeln!(
                f,
                "sampled: p = {:.4}, TV = {:.4} ({:.4} expected of exact draws) over {} draws, {} continuations, {} drafted, {} accepted; {:?}",
                t.p_value,
                t.total_variation,
                t.expected_total_variation,
                t.draws,
                t.cells,
                t.drafted,
                t.accepted,
                t.prompt
            )?;
            if t.impossible > 0 {
                writeln!(
                    f,
                    "         {} of them plain decoding cannot give at all",
                    t.impossible
                )?;
            }
        }
        let verdict = match (self.drafted(), self.passes()) {
            (false, _) => "nothing was drafted: nothing is proved",
            (true, true) => "lossless, as far as these tests can tell",
            (true, false) => "NOT lossless",
        };
        write!(f, "verdict: {verdict}")
    }
}

/// Tests the method of `options` on `pipeline`'s model. Sampling options of `options` other
/// than the method, its shape and its acceptance are not used.
///
/// # Errors
/// For impossible options, when a model fails, and [`Error::Cancelled`].
pub fn verify(
    pipeline: &TextPipeline,
    options: &TextOptions,
    how: &VerifyOptions,
    progress: &mut dyn FnMut(&str),
    cancel: &AtomicBool,
) -> Result<VerifyReport> {
    check(how)?;
    let mut report = VerifyReport {
        method: options.speculate.to_string(),
        lossy: None,
        dtype: pipeline.model().weights().to_string(),
        greedy: GreedyTest {
            prompts: how.prompts,
            equal: 0,
            differences: Vec::new(),
            drafted: 0,
            accepted: 0,
        },
        sampled: Vec::new(),
    };
    let mut by_accepted: Vec<(usize, &str)> = Vec::new();
    for (i, prompt) in PROMPTS.iter().take(how.prompts).enumerate() {
        stop_if(cancel)?;
        progress(&format!("greedy, prompt {} of {}", i + 1, how.prompts));
        let before = report.greedy.accepted;
        greedy(pipeline, options, how, prompt, &mut report)?;
        by_accepted.push((report.greedy.accepted - before, prompt));
    }
    if how.draws > 0 {
        // Where much is accepted, a wrong rule has most to spoil.
        by_accepted.sort_by_key(|&(accepted, _)| std::cmp::Reverse(accepted));
        for (_, prompt) in by_accepted.into_iter().take(2) {
            progress(&format!("{} draws after {prompt:?}", how.draws));
            let test = sampled(pipeline, options, how, prompt, cancel)?;
            report.sampled.push(test);
        }
    }
    Ok(report)
}

fn check(how: &VerifyOptions) -> Result<()> {
    let bad = |what: &str| Err(Error::Input(what.to_owned()));
    if !(1..=PROMPTS.len()).contains(&how.prompts) {
        return bad("the number of prompts must be from 1 to 16");
    }
    if !(2..=4096).contains(&how.tokens) {
        return bad("the number of tokens must be from 2 to 4096");
    }
    if !(2..=6).contains(&how.choices) {
        return bad("the number of choices must be from 2 to 6");
    }
    if !(how.temperature > 0.0 && how.temperature.is_finite()) {
        return bad("the temperature of the sampled test must be above 0");
    }
    Ok(())
}

fn stop_if(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) {
        Err(Error::Cancelled)
    } else {
        Ok(())
    }
}

fn greedy(
    pipeline: &TextPipeline,
    options: &TextOptions,
    how: &VerifyOptions,
    prompt: &str,
    report: &mut VerifyReport,
) -> Result<()> {
    let ids = pipeline.encode(prompt)?;
    let drafted = TextOptions {
        speculate: options.speculate.clone(),
        depth: options.depth,
        shape: options.shape,
        tree_nodes: options.tree_nodes,
        acceptance: options.acceptance,
        ignore_eos: true,
        ..TextOptions::greedy(how.tokens)
    };
    let plain = TextOptions {
        ignore_eos: true,
        ..TextOptions::greedy(how.tokens)
    };
    let expected = pipeline.stream_tokens(&ids, &plain)?.collect_all()?;
    let found = pipeline.stream_tokens(&ids, &drafted)?.collect_all()?;
    report.lossy.clone_from(&found.report.lossy);
    let g = &mut report.greedy;
    g.drafted += found.report.drafted;
    g.accepted += found.report.accepted;
    let parts = expected
        .tokens
        .iter()
        .zip(&found.tokens)
        .position(|(a, b)| a != b);
    match parts {
        None if expected.tokens.len() == found.tokens.len() => g.equal += 1,
        parts => {
            let token = parts.unwrap_or(expected.tokens.len().min(found.tokens.len()));
            let mut before = ids;
            before.extend(expected.tokens.iter().take(token));
            let scores = scores_after(pipeline, &before)?;
            let score = |t: Option<&u32>| {
                t.and_then(|&t| scores.get(t as usize))
                    .map_or(f64::NAN, |&s| f64::from(s))
            };
            let gap = score(expected.tokens.get(token)) - score(found.tokens.get(token));
            g.differences.push(Difference {
                prompt: prompt.to_owned(),
                token,
                gap,
            });
        }
    }
    Ok(())
}

/// Raw scores of the token after `tokens`.
fn scores_after(pipeline: &TextPipeline, tokens: &[u32]) -> Result<Vec<f32>> {
    let model = pipeline.model();
    let mut state = model.new_state(1)?;
    let step = Step {
        slot: 0,
        tokens,
        layout: Layout::Chain,
        logits: LogitRows::Last,
        features: false,
    };
    let outputs = model.forward(&[step], &mut state)?;
    let row = outputs.first().and_then(|o| o.logits.row(0));
    Ok(row.map(<[f32]>::to_vec).unwrap_or_default())
}

fn sampled(
    pipeline: &TextPipeline,
    options: &TextOptions,
    how: &VerifyOptions,
    prompt: &str,
    cancel: &AtomicBool,
) -> Result<SampledTest> {
    let ids = pipeline.encode(prompt)?;
    let law = exact_law(pipeline, &ids, how)?;
    let mut counts = vec![0u64; law.len()];
    let (mut drafted, mut accepted, mut impossible) = (0, 0, 0);
    for seed in 0..how.draws as u64 {
        stop_if(cancel)?;
        let options = TextOptions {
            speculate: options.speculate.clone(),
            depth: options.depth,
            shape: options.shape,
            tree_nodes: options.tree_nodes,
            acceptance: options.acceptance,
            ignore_eos: true,
            top_k: Some(how.choices),
            ..TextOptions::sampling(DRAWN, how.temperature, seed)
        };
        let found = pipeline.stream_tokens(&ids, &options)?.collect_all()?;
        drafted += found.report.drafted;
        accepted += found.report.accepted;
        let cell = law.iter().position(|(path, _)| *path == found.tokens);
        match cell.and_then(|cell| counts.get_mut(cell)) {
            Some(count) => *count += 1,
            None => impossible += 1,
        }
    }
    let p_value = |probs: &[f64]| {
        if impossible > 0 {
            0.0
        } else {
            stats::chi_square(&counts, probs).p_value
        }
    };
    let probs: Vec<f64> = law.iter().map(|(_, p)| *p).collect();
    let n = how.draws as f64;
    // Mean absolute deviation of a binomial share, by its normal approximation.
    let expected = probs
        .iter()
        .map(|p| (2.0 * p * (1.0 - p) / (std::f64::consts::PI * n)).sqrt())
        .sum::<f64>()
        / 2.0;
    Ok(SampledTest {
        prompt: prompt.to_owned(),
        draws: how.draws,
        cells: law.len(),
        p_value: p_value(&probs),
        total_variation: stats::total_variation(&counts, &probs),
        expected_total_variation: expected,
        impossible,
        drafted,
        accepted,
    })
}

/// Every continuation of [`DRAWN`] tokens with its probability under plain decoding.
fn exact_law(
    pipeline: &TextPipeline,
    ids: &[u32],
    how: &VerifyOptions,
) -> Result<Vec<(Vec<u32>, f64)>> {
    let model = pipeline.model();
    let config = GenerationConfig {
        do_sample: Some(true),
        temperature: Some(how.temperature),
        top_k: Some(how.choices),
        ..GenerationConfig::default()
    };
    let processors = ProcessorList::from_config(&config)?;
    let mut state = model.new_state(1)?;
    let mut done: Vec<(Vec<u32>, f64)> = vec![(Vec::new(), 1.0)];
    for _ in 0..DRAWN {
        let mut longer = Vec::new();
        for (path, probability) in done {
            // One row at a time, as plain decoding does it.
            state.reset(0)?;
            let mut row = Vec::new();
            let tokens: Vec<u32> = ids.iter().chain(&path).copied().collect();
            let parts = [ids].into_iter().chain(path.chunks(1));
            for part in parts {
                let step = Step {
                    slot: 0,
                    tokens: part,
                    layout: Layout::Chain,
                    logits: LogitRows::Last,
                    features: false,
                };
                let outputs = model.forward(&[step], &mut state)?;
                let all: Vec<usize> = (0..part.len()).collect();
                state.commit(0, &all)?;
                let last = outputs.first().and_then(|o| o.logits.row(0));
                row = last.map(<[f32]>::to_vec).unwrap_or_default();
            }
            let around = Context {
                tokens: &tokens,
                prompt_len: ids.len(),
                unconditional: None,
                max_length: Some(ids.len() + DRAWN),
            };
            processors.process(&around, &mut row)?;
            let law = Categorical::from_scores(row.as_slice())?;
            for (token, score) in row.iter().enumerate() {
                if score.is_finite() {
                    let token = token as u32;
                    let mut path = path.clone();
                    path.push(token);
                    longer.push((path, probability * law.density(&token)));
                }
            }
        }
        done = longer;
    }
    Ok(done)
}
