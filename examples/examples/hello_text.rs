//! A pipeline in three lines: load, stream, print.
//!
//! `cargo run --release -p sequor-examples --example hello_text [MODEL] [PROMPT]`

use sequor::text::{Result, TextOptions, TextPipeline};
use std::io::Write;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "smollm2".into());
    let prompt = args
        .next()
        .unwrap_or_else(|| "The capital of France is".into());

    let pipeline = TextPipeline::from_pretrained(&model)?;
    for piece in pipeline.stream(&prompt, &TextOptions::greedy(32))? {
        print!("{}", piece?);
        let _ = std::io::stdout().flush();
    }
    println!();
    Ok(())
}
