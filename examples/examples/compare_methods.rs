//! Choosing a decoding method by measurement: one model, one prompt, one seed, every method.
//!
//! `cargo run --release -p sequor-examples --example compare_methods [MODEL]`
//!
//! `sequor bench speculate` does the same over many prompts of six kinds of task.

use sequor::data::Resolver;
use sequor::nn::device::DType;
use sequor::text::{LoadOptions, Result, Speculate, TextOptions, TextPipeline};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "smollm2".into());
    let resolver = Resolver::from_env();
    // On a CPU several rows cost least beside one in bf16, and that is what drafts need.
    let load = LoadOptions {
        weights: DType::Bf16.into(),
        ..LoadOptions::default()
    };
    let mut pipeline = TextPipeline::load(&resolver.resolve_model(&model)?.path, &load)?;
    let prompt =
        "A list of fruit, twice. First: apple, pear, plum, cherry, grape. Again: apple, pear,";
    let mut methods = vec!["off"];
    methods.extend(Speculate::BARE);
    methods.extend(["medusa", "hydra", "hydra++", "copy+hydra++", "auto"]);
    let mut fastest = (0.0, "");
    println!(
        "{:<14} {:>9} {:>16} {:>9}",
        "method", "tokens/s", "tokens per call", "accepted"
    );
    for name in methods {
        let options = TextOptions {
            speculate: name.parse()?,
            ..TextOptions::sampling(64, 0.7, 3)
        };
        // Heads are looked up by the model's fingerprint; not every model has them.
        if let Err(why) = pipeline.prepare(&options, &load, &resolver, None) {
            println!("{name:<14} left out: {why}");
            continue;
        }
        let g = pipeline.generate(prompt, &options)?;
        println!(
            "{name:<14} {:>9.1} {:>16.2} {:>8.0}%",
            g.tokens_per_second(),
            g.report.tokens_per_call(),
            100.0 * g.report.acceptance_rate()
        );
        if g.tokens_per_second() > fastest.0 {
            fastest = (g.tokens_per_second(), name);
        }
    }
    println!("fastest here: {}", fastest.1);
    Ok(())
}
