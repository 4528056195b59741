//! `sequor bench speculate`.

use super::model::{load_options, resolve};
use crate::args::BenchSpeculate;
use crate::exit::{Result, cancel_flag, failure, usage};
use sequor_data::Resolver;
use sequor_text::matrix::{MatrixBench, bench_matrix};
use sequor_text::prompts::PromptSet;
use sequor_text::{HeadKind, LoadOptions, Speculate, TextOptions, TextPipeline};

/// Prints the matrix of methods and kinds of task.
pub fn run(a: &BenchSpeculate) -> Result {
    let loading = load_options(&a.model)?;
    let mut named = Vec::new();
    for name in a.methods.iter().filter(|m| *m != "all") {
        let (method, shape) = name.split_once('/').unwrap_or((name, "default"));
        let options = TextOptions {
            speculate: method.parse()?,
            shape: shape.parse()?,
            tree_nodes: a.tree_nodes,
            ..TextOptions::default()
        };
        options.validate()?;
        named.push((name.clone(), options));
    }
    let prompts = match &a.prompts {
        Some(file) => PromptSet::load(file)?,
        None => PromptSet::find()?,
    };
    let cancel = cancel_flag()?;
    let mut pipeline = TextPipeline::load(&resolve(&a.model.model, a.model.offline)?, &loading)?;
    let resolver = Resolver::from_env().offline(a.model.offline);
    for (_, options) in &named {
        pipeline.prepare(options, &loading, &resolver, None)?;
    }
    if a.methods.iter().any(|m| m == "all") {
        named.extend(everything(
            &mut pipeline,
            &loading,
            &resolver,
            a.tree_nodes,
        )?);
    }
    if named.is_empty() {
        return Err(usage("--methods names no method"));
    }
    let bench = MatrixBench {
        methods: named,
        per_kind: a.per_kind,
        prompt_tokens: a.prompt_tokens,
        tokens: a.tokens,
        temperature: a.temperature,
    };
    let mut progress = |line: &str| eprintln!("{line}");
    let matrix = bench_matrix(&pipeline, &prompts, &bench, &mut progress, &cancel)?;
    print!("{matrix}");
    if a.json {
        println!("{}", serde_json::to_string(&matrix).map_err(failure)?);
    }
    Ok(())
}

/// Methods that need nothing but the model, and the heads that are there for it.
fn everything(
    pipeline: &mut TextPipeline,
    loading: &LoadOptions,
    resolver: &Resolver,
    tree_nodes: Option<usize>,
) -> Result<Vec<(String, TextOptions)>> {
    let mut methods: Vec<Speculate> = Speculate::BARE
        .iter()
        .map(|name| name.parse())
        .collect::<sequor_text::Result<_>>()?;
    methods.extend(HeadKind::ALL.map(Speculate::Heads));
    methods.push(Speculate::CopyAndHeads(HeadKind::HydraPlus));
    methods.push(Speculate::Auto);
    let mut found = Vec::new();
    for speculate in methods {
        let options = TextOptions {
            speculate,
            tree_nodes,
            ..TextOptions::default()
        };
        let name = options.speculate.to_string();
        match pipeline.prepare(&options, loading, resolver, None) {
            Ok(()) => found.push((name, options)),
            Err(e) => eprintln!("{name} is left out: {e}"),
        }
    }
    Ok(found)
}
