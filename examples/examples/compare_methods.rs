//! Decoding methods side by side: one model, one prompt, one seed.
//!
//! `cargo run --release -p sequor-examples --example compare_methods [MODEL]`

use sequor::text::{Result, Speculate, TextOptions, TextPipeline};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "smollm2".into());
    let pipeline = TextPipeline::from_pretrained(&model)?;
    let prompt =
        "A list of fruit, twice. First: apple, pear, plum, cherry, grape. Again: apple, pear,";
    println!(
        "{:<14} {:>11} {:>10} {:>16} {:>9}",
        "method", "temperature", "tokens/s", "tokens per call", "accepted"
    );
    for temperature in [0.0, 0.7] {
        let mut first: Option<Vec<u32>> = None;
        for speculate in [Speculate::Off, Speculate::PromptLookup, Speculate::Auto] {
            let name = speculate.to_string();
            let options = TextOptions {
                speculate,
                ..TextOptions::sampling(48, temperature, 3)
            };
            let g = pipeline.generate(prompt, &options)?;
            let same = first.get_or_insert_with(|| g.tokens.clone()) == &g.tokens;
            println!(
                "{name:<14} {temperature:>11} {:>10.1} {:>16.2} {:>8.0}%{}",
                g.tokens_per_second(),
                g.report.tokens_per_call(),
                100.0 * g.report.acceptance_rate(),
                if same { "" } else { "  (another text!)" }
            );
        }
    }
    Ok(())
}
