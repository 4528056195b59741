//! The command line.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Generative models that predict the next X: token, codebook layer, scale, frame.
#[derive(Debug, Parser)]
#[command(name = "sequor", version, about, propagate_version = true)]
pub struct Cli {
    /// Say more about what is going on (or set SEQUOR_LOG=debug)
    #[arg(long, short, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate something
    #[command(subcommand)]
    Generate(Generate),
    /// Talk with a model
    Chat(Chat),
    /// List the tensors, config and sizes of a model, and what the loader would do
    Inspect(Inspect),
    /// Write a model in another format: smaller files that load as they are
    Quantize(Quantize),
    /// Check libtorch, CPU, threads and folders, and say how to fix what is wrong
    Doctor(Doctor),
    /// Run a model's reference forward on named inputs
    Forward(Forward),
    /// Measure speed on this machine
    #[command(subcommand)]
    Bench(Bench),
    /// Find out whether a speculation method is lossless on your models
    Verify(Verify),
    /// Train a model from a recipe
    #[command(subcommand)]
    Train(Train),
    /// Measure the quality of a model
    #[command(subcommand)]
    Eval(Eval),
    /// Measure what a system's paper claims; writes docs/results/NN.json, NN.csv and NN.png
    Reproduce(Reproduce),
    /// The 51 systems, and what their proofs found
    Systems(Systems),
    /// Models that can be used by name
    Models(Catalog),
    /// Data sets that can be used by name
    Data(Catalog),
    /// Show what this workspace does, with a real model; writes out/index.html
    Demo(Demo),
}

#[derive(Debug, Subcommand)]
pub enum Generate {
    /// Continue a text, or answer with --chat
    Text(Box<GenerateText>),
}

/// Which model, and how it is run.
#[derive(Debug, Args, Clone)]
pub struct ModelArgs {
    /// Model folder, GGUF file, a name of `sequor models list`, or hf:owner/name
    #[arg(long, default_value = "smollm2", value_name = "MODEL")]
    pub model: String,
    /// Number format of plain weights: f32, f16 or bf16 [default: f32]
    #[arg(long, value_name = "DTYPE", conflicts_with = "weights")]
    pub dtype: Option<String>,
    /// How weights are kept: auto (as the file has them), f32, f16, bf16, int8, q8_0, q4_0,
    /// q4_1 or q4_k
    #[arg(long, value_name = "FORMAT")]
    pub weights: Option<String>,
    /// Threads for arithmetic [default: the machine's cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Where to run: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
}

/// How the next token is chosen.
#[derive(Debug, Args, Clone)]
pub struct SamplingArgs {
    /// Randomness: 0 takes the best token each time [default: the model's, else 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Choose among the K best tokens only (0: off)
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the best tokens that hold this much probability (1: off)
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Drop tokens less likely than this share of the best one (0: off)
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Keep tokens of typical surprise that hold this much probability (1: off)
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub typical_p: Option<f64>,
    /// Make tokens seen before less likely (above 1) or more (below 1)
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
    /// Seed of all randomness; the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Longest answer in tokens
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_new_tokens: usize,
    /// Stop before this text appears (may be given several times)
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Go on after the model's end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
}

/// Speculative decoding.
#[derive(Debug, Args, Clone)]
pub struct SpeculateArgs {
    /// off, auto, prompt-lookup, trigram, jacobi, lookahead, early-exit[=LAYERS],
    /// draft=MODEL, medusa, hydra, hydra++, eagle or hidden-transfer
    #[arg(long, default_value = "off", value_name = "METHOD")]
    pub speculate: String,
    /// Tokens drafted per round: a number, or adaptive
    #[arg(long, default_value = "adaptive", value_name = "N|adaptive")]
    pub draft_depth: String,
    /// Shape of the drafts of heads: default, chain, static or dynamic
    #[arg(long, default_value = "default", value_name = "SHAPE")]
    pub topology: String,
    /// Nodes of a draft tree [default: as many as pay]
    #[arg(long, value_name = "N")]
    pub tree_nodes: Option<usize>,
    /// When a draft is accepted: lossless; or, changing the text's distribution, typical,
    /// lantern, tolerance[=R] or synthetic=RATE
    #[arg(long, default_value = "lossless", value_name = "RULE")]
    pub acceptance: String,
    /// Folder of draft heads or routers [default: found by the model's fingerprint]
    #[arg(long, value_name = "DIR")]
    pub heads: Option<PathBuf>,
    /// Layers that run: all; or, as another model, router or even=N
    #[arg(long, default_value = "all", value_name = "LAYERS")]
    pub layers: String,
}

#[derive(Debug, Args)]
pub struct GenerateText {
    /// The prompt
    pub prompt: String,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Put the prompt into the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// System message for --chat [default: the template's own]
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub speculate: SpeculateArgs,
    /// End standard output with one line of JSON: text, token ids, counts, times, seed
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelArgs,
    /// System message [default: the template's own]
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub speculate: SpeculateArgs,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// Model folder, weight file, or a name of `sequor models list`
    pub model: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
}

#[derive(Debug, Args)]
pub struct Quantize {
    /// Model folder, GGUF file, a name of `sequor models list`, or hf:owner/name
    pub model: String,
    /// Format of the matrices: f32, f16, bf16, int8, q8_0, q4_0, q4_1 or q4_k
    #[arg(long, value_name = "FORMAT")]
    pub to: String,
    /// Where it goes: a file ending in .gguf, or a folder for safetensors
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Format of embeddings and head [default: q8_0 where --to has 4 bits, else as --to]
    #[arg(long, value_name = "FORMAT")]
    pub tables: Option<String>,
    /// Replace what is there already
    #[arg(long)]
    pub overwrite: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Forward {
    /// Model folder
    pub model: PathBuf,
    /// Inputs by name (safetensors)
    pub inputs: PathBuf,
    /// Where the outputs go (safetensors)
    pub outputs: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Decoding speed per number format, with the fraction of memory bandwidth reached
    Decode(BenchDecode),
    /// Products of a few rows with packed weights, against memory bandwidth and libtorch
    Kernels(BenchKernels),
    /// Speculation methods against kinds of task: tokens per target call and speed
    Speculate(BenchSpeculate),
}

#[derive(Debug, Args)]
pub struct BenchSpeculate {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Methods as for --speculate, a shape behind a slash (medusa/chain); or all: those that
    /// need nothing, and all heads that are there
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "all",
        value_name = "LIST"
    )]
    pub methods: Vec<String>,
    /// Prompts (Spec-Bench's question.jsonl or lines like it) [default: Spec-Bench where it is
    /// found, else the bundled ones]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Prompts per kind of task
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub per_kind: usize,
    /// Longest prompt in tokens; from longer ones the middle is cut out
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub prompt_tokens: usize,
    /// Tokens generated per prompt
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub tokens: usize,
    /// Nodes of draft trees [default: as many as pay]
    #[arg(long, value_name = "N")]
    pub tree_nodes: Option<usize>,
    /// Randomness: 0 takes the best token each time
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    pub temperature: f64,
    /// End standard output with one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The method, as for --speculate of generate
    #[arg(long, value_name = "METHOD")]
    pub method: String,
    /// A draft model, for --method draft
    #[arg(long, value_name = "MODEL")]
    pub draft: Option<String>,
    /// Folder of draft heads [default: found by the model's fingerprint]
    #[arg(long, value_name = "DIR")]
    pub heads: Option<PathBuf>,
    /// Shape of the drafts of heads: default, chain, static or dynamic
    #[arg(long, default_value = "default", value_name = "SHAPE")]
    pub topology: String,
    /// Tokens drafted per round: a number, or adaptive
    #[arg(long, default_value = "adaptive", value_name = "N|adaptive")]
    pub draft_depth: String,
    /// Nodes of a draft tree [default: as many as pay]
    #[arg(long, value_name = "N")]
    pub tree_nodes: Option<usize>,
    /// When a draft is accepted: lossless, or a lossy rule, which the test should find out
    #[arg(long, default_value = "lossless", value_name = "RULE")]
    pub acceptance: String,
    /// Prompts of the greedy test, at most 16
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub prompts: usize,
    /// Tokens per prompt
    #[arg(long, default_value_t = 48, value_name = "N")]
    pub tokens: usize,
    /// Continuations drawn per prompt of the sampled test; 0 leaves it out
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub draws: usize,
    /// Tokens left to choose from in the sampled test, 2 to 6
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub choices: usize,
    /// End standard output with one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchKernels {
    /// Formats of the weights
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bf16,int8,q8_0,q4_0,q4_1,q4_k",
        value_name = "LIST"
    )]
    pub formats: Vec<String>,
    /// Shapes, outputs x inputs [default: 4096x4096 and those of SmolLM2-135M]
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "4096x4096,960x576,576x576,3072x576,576x1536,49152x576",
        hide_default_value = true,
        value_name = "LIST"
    )]
    pub shapes: Vec<String>,
    /// Numbers of rows
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,128",
        value_name = "LIST"
    )]
    pub rows: Vec<usize>,
    /// Repeats; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeats: usize,
    /// Threads for arithmetic [default: the machine's cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// End standard output with one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchDecode {
    /// Model folder, GGUF file, or a name of `sequor models list`
    #[arg(long, default_value = "smollm2", value_name = "MODEL")]
    pub model: String,
    /// Formats to measure, as for --weights of generate
    #[arg(
        long,
        visible_alias = "dtypes",
        value_delimiter = ',',
        default_value = "f32,bf16,int8,q8_0,q4_0,auto",
        value_name = "LIST"
    )]
    pub weights: Vec<String>,
    /// Tokens generated per repeat
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub tokens: usize,
    /// Repeats; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeats: usize,
    /// Threads for arithmetic [default: the machine's cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Without the speculative arms
    #[arg(long)]
    pub plain: bool,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
    /// End standard output with one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Train {
    /// A language model
    Lm(TrainLm),
    /// A corpus of a model's own generations, which draft heads learn from
    Corpus(TrainCorpus),
    /// Draft heads for a model, from its own generations: faster text, the same text
    Heads(TrainHeads),
}

#[derive(Debug, Args)]
pub struct TrainHeads {
    /// medusa, hydra, hydra++, eagle, hidden-transfer or router
    #[arg(long, value_name = "KIND")]
    pub kind: String,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder of the corpus; one that is not there is made first [default: heads/MODEL/corpus]
    #[arg(long, value_name = "DIR")]
    pub corpus: Option<PathBuf>,
    /// Folder to write [default: heads/MODEL/KIND]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Updates [default: the kind's]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// As many updates as fit into this many minutes here
    #[arg(
        long,
        value_name = "M",
        conflicts_with = "steps",
        allow_negative_numbers = true
    )]
    pub minutes: Option<f64>,
    /// Highest learning rate [default: the kind's]
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Drafted vocabulary, the most frequent tokens of the model's own text (0: all)
    #[arg(long, default_value_t = 6144, value_name = "N")]
    pub draft_vocab: usize,
    /// Seed of all random numbers
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Begin again: checkpoints of an earlier run are removed
    #[arg(long)]
    pub restart: bool,
    /// Seconds between checkpoints
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub save_every: u64,
    /// Leave the checkpoints in the folder when training is done
    #[arg(long)]
    pub keep_checkpoints: bool,
}

#[derive(Debug, Args)]
pub struct TrainCorpus {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder of the corpus; a part that is there already is kept
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Tokens in all, at least
    #[arg(long, default_value_t = 400_000, value_name = "N")]
    pub tokens: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 224, value_name = "N")]
    pub answer: usize,
    /// Seed of all random numbers
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct TrainLm {
    /// The recipe (TOML)
    pub recipe: PathBuf,
    /// Model folder to write [default: the recipe's folder]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Begin again: checkpoints of an earlier run are removed
    #[arg(long)]
    pub restart: bool,
    /// Seconds between checkpoints
    #[arg(long, default_value_t = 180, value_name = "SECONDS")]
    pub save_every: u64,
    /// Leave the checkpoints in the folder when training is done
    #[arg(long)]
    pub keep_checkpoints: bool,
    /// Threads for arithmetic [default: the recipe's, else the machine's cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
}

#[derive(Debug, Subcommand)]
pub enum Eval {
    /// Perplexity and bits per byte of a language model on a text
    Perplexity(EvalPerplexity),
}

#[derive(Debug, Args)]
pub struct EvalPerplexity {
    /// Text file
    pub text: PathBuf,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of context per window
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub context: usize,
    /// Tokens scored per window
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub stride: usize,
    /// Stop after this many tokens
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// End standard output with one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Reproduce {
    /// Number of the system (see `sequor systems`)
    #[arg(value_name = "NN")]
    pub system: u32,
    /// Few prompts and short answers: a minute or two, with preliminary verdicts
    #[arg(long)]
    pub quick: bool,
    /// Train the heads that are needed first, into heads/ below the folder of the results
    #[arg(long)]
    pub train: bool,
    /// Folder of the results
    #[arg(long, default_value = "docs/results", value_name = "DIR")]
    pub out: PathBuf,
    /// Prompts, one JSON object per line [default: Spec-Bench where it is found, else the
    /// bundled ones]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Model folder, GGUF file, or a name of `sequor models list`
    #[arg(long, default_value = "smollm2", value_name = "MODEL")]
    pub model: String,
    /// Number format of the arms that are timed: bf16, f16 or f32
    #[arg(long, default_value = "bf16", value_name = "DTYPE")]
    pub dtype: String,
    /// Threads for arithmetic [default: the machine's cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Never use the network
    #[arg(long)]
    pub offline: bool,
    /// End standard output with one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Systems {
    /// Print a Markdown table, as in the README
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Put the Markdown table between the marker comments of this file
    #[arg(long, value_name = "FILE")]
    pub update: Option<PathBuf>,
    /// Folder of the results [default: docs/results of the checkout]
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Catalog {
    #[command(subcommand)]
    pub action: CatalogAction,
}

#[derive(Debug, Subcommand)]
pub enum CatalogAction {
    /// What there is, its licence and size, and whether it is here already
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Fetch by name into the cache folder
    Fetch {
        /// A name of the list
        name: String,
        /// Never use the network: only say where it is
        #[arg(long)]
        offline: bool,
    },
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Folder for what is made
    #[arg(long, default_value = "out", value_name = "DIR")]
    pub out: PathBuf,
    /// Never use the network (uses the bundled model when SmolLM2 is not cached)
    #[arg(long)]
    pub offline: bool,
    /// Number format of the weights
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub dtype: String,
}

/// Kinds of catalogue.
#[derive(Debug, Clone, Copy)]
pub enum CatalogKind {
    /// Models.
    Models,
    /// Data sets.
    Data,
}
