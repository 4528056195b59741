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
    /// Check libtorch, CPU, threads and folders, and say how to fix what is wrong
    Doctor(Doctor),
    /// Run a model's reference forward on named inputs
    Forward(Forward),
    /// Measure speed on this machine
    #[command(subcommand)]
    Bench(Bench),
    /// Train a model from a recipe
    #[command(subcommand)]
    Train(Train),
    /// Measure the quality of a model
    #[command(subcommand)]
    Eval(Eval),
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
    /// Number format of the weights: f32, f16 or bf16
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub dtype: String,
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
    /// off, auto, prompt-lookup, or draft=MODEL
    #[arg(long, default_value = "off", value_name = "METHOD")]
    pub speculate: String,
    /// Tokens drafted per round: a number, or adaptive
    #[arg(long, default_value = "adaptive", value_name = "N|adaptive")]
    pub draft_depth: String,
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
}

#[derive(Debug, Args)]
pub struct BenchDecode {
    /// Model folder, GGUF file, or a name of `sequor models list`
    #[arg(long, default_value = "smollm2", value_name = "MODEL")]
    pub model: String,
    /// Number formats to measure
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "f32,f16,bf16",
        value_name = "LIST"
    )]
    pub dtypes: Vec<String>,
    /// Tokens generated per repeat
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub tokens: usize,
    /// Repeats; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeats: usize,
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

#[derive(Debug, Subcommand)]
pub enum Train {
    /// A language model
    Lm(TrainLm),
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
