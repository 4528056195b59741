//! Decoding speed of a model on this machine, against the limit that memory sets.
//!
//! Every token reads every weight once, so `bytes per token / bandwidth` is the least
//! time a token can take. The report gives the fraction of measured read bandwidth that
//! decoding reaches, and what speculation makes of it, all in one run, plain and
//! speculative interleaved.

use crate::options::{LoadOptions, Speculate, TextOptions};
use crate::pipeline::TextPipeline;
use crate::stream::Generation;
use crate::{Error, Result};
use sequor_kernels::{bandwidth, cpu, memory, threads};
use sequor_nn::Device;
use sequor_nn::device::Weights;
use sequor_tokenizers::Message;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Clone, Debug)]
pub struct DecodeBench {
    /// Number formats, in this order.
    pub weights: Vec<Weights>,
    /// Tokens per repeat.
    pub tokens: usize,
    /// Repeats; medians are reported.
    pub repeats: usize,
    /// Threads for arithmetic; the machine's cores when absent.
    pub threads: Option<usize>,
    /// Measure what speculation makes of it as well.
    pub speculation: bool,
}

/// Median, smallest and largest of several measurements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        let n = values.len();
        let median = if n % 2 == 1 {
            at(n / 2)
        } else {
            (at((n / 2).wrapping_sub(1)) + at(n / 2)) / 2.0
        };
        Self {
            median,
            min: at(0),
            max: at(n.wrapping_sub(1)),
        }
    }
}

/// A speculative arm against plain decoding of the same prompt, interleaved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpeculationRow {
    /// Kind of text.
    pub task: String,
    /// Method.
    pub method: String,
    /// Tokens per forward of the target.
    pub tokens_per_call: f64,
    /// Share of drafted tokens that were accepted.
    pub acceptance: f64,
    /// Tokens per second over those of plain decoding, ratio of medians.
    pub speedup: f64,
    /// Were the tokens those of plain decoding?
    pub equal: bool,
}

/// One number format.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DecodeRow {
    /// Number format of the weights.
    pub dtype: String,
    /// Seconds to load the model, file in the page cache.
    pub load_seconds: f64,
    /// Bytes of weights read per token.
    pub bytes_per_token: usize,
    /// Tokens per second, plain greedy decoding.
    pub tokens_per_second: Spread,
    /// Bytes per second of weights over measured read bandwidth.
    pub bandwidth_fraction: f64,
    /// Seconds to the first token of a short prompt.
    pub first_token_seconds: Spread,
    /// Prompt tokens per second of a long prompt.
    pub prefill_tokens_per_second: f64,
    /// Share of a step spent on processors and sampling, with top-k, top-p and a
    /// repetition penalty on.
    pub sampling_share: f64,
    /// Largest resident memory while loading and decoding, bytes.
    pub peak_bytes: Option<u64>,
    /// The bound on it: weights in this format times 1.3 plus 300 MB.
    pub peak_bound: u64,
    /// What a forward of several rows costs relative to one row: (rows, ratio).
    pub cost: Vec<(usize, f64)>,
    /// Speculation.
    pub speculation: Vec<SpeculationRow>,
}

/// The whole measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DecodeReport {
    /// The model.
    pub model: String,
    /// Processor and its features.
    pub machine: String,
    /// Threads used.
    pub threads: usize,
    /// Measured read bandwidth, bytes per second.
    pub bandwidth: f64,
    /// Microseconds of one parallel region: above 1000 the machine is busy.
    pub parallel_region_us: f64,
    /// Load average of the last minute at the start.
    pub load: Option<f64>,
    /// Repeats per figure.
    pub repeats: usize,
    /// One row per number format.
    pub rows: Vec<DecodeRow>,
}

/// Prompts with something to copy: what lookup is made for.
const TASKS: [(&str, &str); 2] = [
    (
        "rewrite",
        "Rewrite this text, changing only the name Anna to Maria and nothing else: Anna walked to the market early in the morning. \
         Anna bought bread, two apples and a bottle of milk. On the way home Anna met her brother, who carried a basket of apples. \
         Anna and her brother walked home together, and Anna gave him one of her apples.",
    ),
    (
        "summarise",
        "Summarise this text in two sentences, using its own words: The lighthouse at the end of the bay was built in 1862 from grey stone. \
         For a hundred years a keeper climbed its 182 steps every evening to light the lamp. Since 1964 the lamp has been lit by \
         electricity, and the keeper's house has become a small museum that shows how the keepers of the lighthouse lived.",
    ),
];

/// Runs the measurement; `say` is told about progress.
///
/// # Errors
/// When the model does not load or a forward fails.
pub fn bench_decode(
    path: &Path,
    bench: &DecodeBench,
    mut say: impl FnMut(&str),
) -> Result<DecodeReport> {
    let n = bench.threads.unwrap_or_else(threads::default_count);
    threads::set(n);
    let load = std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|s| s.split(' ').next().and_then(|x| x.parse().ok()));
    let bandwidth = bandwidth::measure_read(n, Duration::from_secs(1));
    let probe = threads::probe();
    say(&format!(
        "memory reads at {:.1} GB/s with {n} thread(s)",
        bandwidth / 1e9
    ));
    if probe.busy {
        say(
            "this machine is busy: a parallel region takes over a millisecond, and the figures below will be low",
        );
    }
    let mut rows = Vec::new();
    for &weights in &bench.weights {
        say(&format!("measuring {weights}"));
        rows.push(row(path, weights, n, bench, bandwidth)?);
    }
    Ok(DecodeReport {
        model: path.display().to_string(),
        machine: format!(
            "{}, {} cores: {}",
            cpu::model_name().unwrap_or_else(|| "unknown".into()),
            cpu::physical_cores(),
            cpu::Features::detect()
        ),
        threads: n,
        bandwidth,
        parallel_region_us: probe.parallel_region_us,
        load,
        repeats: bench.repeats,
        rows,
    })
}

/// Forgets the largest resident memory so far (Linux; elsewhere the figure is that of the
/// whole run).
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn row(
    path: &Path,
    weights: Weights,
    n: usize,
    bench: &DecodeBench,
    bandwidth: f64,
) -> Result<DecodeRow> {
    let options = LoadOptions {
        weights,
        device: Device::Cpu,
        threads: Some(n),
    };
    // Bring the files into the page cache.
    let files = if path.is_dir() {
        std::fs::read_dir(path).map(|d| d.flatten().map(|e| e.path()).collect())
    } else {
        Ok(vec![path.to_path_buf()])
    };
    for file in files.unwrap_or_default() {
        if let Ok(mut file) = std::fs::File::open(file) {
            let _ = std::io::copy(&mut file, &mut std::io::sink());
        }
    }
    reset_peak();
    let start = Instant::now();
    let pipeline = TextPipeline::load(path, &options)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let prompt = pipeline.encode(
        "The history of the lighthouse begins with a storm. One night in the autumn of that year",
    )?;
    let run = |prompt: &[u32], o: &TextOptions| -> Result<Generation> {
        pipeline.stream_tokens(prompt, o)?.collect_all()
    };
    let plain = TextOptions {
        ignore_eos: true,
        ..TextOptions::greedy(bench.tokens)
    };
    run(&prompt, &TextOptions::greedy(4))?;
    let (mut speed, mut first) = (Vec::new(), Vec::new());
    for _ in 0..bench.repeats {
        let g = run(&prompt, &plain)?;
        speed.push(g.tokens_per_second());
        first.push(g.report.first_token_seconds);
    }
    let peak_bytes = memory::peak_rss_bytes();
    let sampled = TextOptions {
        top_k: Some(50),
        top_p: Some(0.9),
        repetition_penalty: Some(1.1),
        temperature: Some(0.8),
        ..plain.clone()
    };
    let r = run(&prompt, &sampled)?.report;
    let long: Vec<u32> = prompt
        .iter()
        .copied()
        .cycle()
        .take(512.min(pipeline.model().config().context / 2))
        .collect();
    let prefill = run(&long, &TextOptions::greedy(1))?.report;
    let curve = pipeline.model().measure_cost()?;
    let speculation = if bench.speculation {
        speculation(&pipeline, bench)?
    } else {
        Vec::new()
    };
    let bytes = pipeline.model().decoder().bytes_per_token();
    let tokens_per_second = Spread::of(speed);
    Ok(DecodeRow {
        dtype: weights.to_string(),
        load_seconds,
        bytes_per_token: bytes,
        tokens_per_second,
        bandwidth_fraction: tokens_per_second.median * bytes as f64 / bandwidth,
        first_token_seconds: Spread::of(first),
        prefill_tokens_per_second: long.len() as f64 / prefill.prefill_seconds,
        sampling_share: r.sampling_seconds / r.decode_seconds,
        peak_bytes,
        peak_bound: (bytes as f64 * 1.3) as u64 + 300_000_000,
        cost: curve
            .rows()
            .iter()
            .map(|&k| (k, curve.relative(k)))
            .collect(),
        speculation,
    })
}

fn speculation(pipeline: &TextPipeline, bench: &DecodeBench) -> Result<Vec<SpeculationRow>> {
    let mut rows = Vec::new();
    for (task, text) in TASKS {
        let prompt = match pipeline.chat_prompt(&[Message::user(text.to_owned())]) {
            Ok(prompt) => prompt,
            Err(Error::Unsupported(_)) => pipeline.encode(text)?,
            Err(e) => return Err(e),
        };
        let arm = |speculate: Speculate| TextOptions {
            speculate,
            ..TextOptions::greedy(2 * bench.tokens)
        };
        let methods = [Speculate::PromptLookup, Speculate::Auto];
        let mut speeds: Vec<Vec<f64>> = vec![Vec::new(); methods.len() + 1];
        let mut last: Vec<Option<Generation>> = vec![None; methods.len() + 1];
        for _ in 0..bench.repeats.min(5) {
            for (i, method) in std::iter::once(Speculate::Off)
                .chain(methods.clone())
                .enumerate()
            {
                let g = pipeline
                    .stream_tokens(&prompt, &arm(method))?
                    .collect_all()?;
                speeds[i].push(g.tokens_per_second());
                last[i] = Some(g);
            }
        }
        let plain = Spread::of(speeds[0].clone()).median;
        let reference = last[0].take();
        for (i, method) in methods.iter().enumerate() {
            let (Some(g), Some(reference)) = (&last[i + 1], &reference) else {
                continue;
            };
            rows.push(SpeculationRow {
                task: task.to_owned(),
                method: method.to_string(),
                tokens_per_call: g.report.tokens_per_call(),
                acceptance: g.report.acceptance_rate(),
                speedup: Spread::of(speeds[i + 1].clone()).median / plain,
                equal: g.tokens == reference.tokens,
            });
        }
    }
    Ok(rows)
}

impl DecodeReport {
    /// Reads what [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// [`Error::Input`] when it is something else.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|e| Error::Input(format!("not a decoding report: {e}")))
    }

    /// The report as one JSON object.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl fmt::Display for DecodeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.model)?;
        writeln!(
            f,
            "{}; {} thread(s), reads {:.1} GB/s, load {}, medians of {} repeats",
            self.machine,
            self.threads,
            self.bandwidth / 1e9,
            self.load
                .map_or_else(|| "unknown".into(), |l| format!("{l:.2}")),
            self.repeats
        )?;
        writeln!(
            f,
            "\n| weights | tokens/s (min-max) | of bandwidth | first token | prefill tokens/s | load | peak memory (bound) | sampling |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|")?;
        for r in &self.rows {
            let t = r.tokens_per_second;
            writeln!(
                f,
                "| {} | {:.1} ({:.1}-{:.1}) | {:.0} % | {:.0} ms | {:.0} | {:.2} s | {} ({} MB) | {:.1} % |",
                r.dtype,
                t.median,
                t.min,
                t.max,
                100.0 * r.bandwidth_fraction,
                1e3 * r.first_token_seconds.median,
                r.prefill_tokens_per_second,
                r.load_seconds,
                r.peak_bytes
                    .map_or_else(|| "unknown".into(), |b| format!("{} MB", b / 1_000_000)),
                r.peak_bound / 1_000_000,
                100.0 * r.sampling_share
            )?;
        }
        if self.rows.iter().any(|r| !r.speculation.is_empty()) {
            writeln!(
                f,
                "\n| weights | task | method | tokens per call | accepted | speed over plain | same text |\n|---|---|---|---|---|---|---|"
            )?;
        }
        for r in &self.rows {
            for s in &r.speculation {
                writeln!(
                    f,
                    "| {} | {} | {} | {:.2} | {:.0} % | {:.2} | {} |",
                    r.dtype,
                    s.task,
                    s.method,
                    s.tokens_per_call,
                    100.0 * s.acceptance,
                    s.speedup,
                    if s.equal { "yes" } else { "no" }
                )?;
            }
        }
        writeln!(f, "\ncost of a forward of k rows over one row:")?;
        for r in &self.rows {
            let list: Vec<String> = r
                .cost
                .iter()
                .map(|(k, c)| format!("c({k}) {c:.2}"))
                .collect();
            writeln!(f, "{}: {}", r.dtype, list.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn medians() {
        assert_eq!(
            Spread::of(vec![3.0, 1.0, 2.0]),
            Spread {
                median: 2.0,
                min: 1.0,
                max: 3.0
            }
        );
        assert_eq!(Spread::of(vec![4.0, 1.0]).median, 2.5);
    }
}
