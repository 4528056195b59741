//! `sequor eval perplexity`.

use super::model::{load_options, resolve};
use crate::args::EvalPerplexity;
use crate::exit::{Result, failure, usage};
use sequor_text::TextPipeline;

/// Scores a text.
pub fn run(a: &EvalPerplexity) -> Result {
    let loading = load_options(&a.model)?;
    if a.stride == 0 || a.context < 2 || a.stride >= a.context {
        return Err(usage(
            "--context must be at least 2 and --stride between 1 and context - 1",
        ));
    }
    let bytes =
        std::fs::read(&a.text).map_err(|e| failure(format!("{}: {e}", a.text.display())))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        failure(format!(
            "{}: not UTF-8 (first bad byte at {})",
            a.text.display(),
            e.utf8_error().valid_up_to()
        ))
    })?;
    let pipeline = TextPipeline::load(&resolve(&a.model.model, a.model.offline)?, &loading)?;
    let score = pipeline.perplexity(&text, a.context, a.stride, a.max_tokens)?;
    let (l, bits) = (&score.likelihood, score.bits_per_byte());
    println!(
        "{} tokens, {} bytes: {:.4} nats/token, perplexity {:.3}, {bits:.4} bits/byte",
        l.tokens,
        score.bytes,
        l.per_token(),
        l.perplexity(),
    );
    if a.json {
        let line = serde_json::json!({"tokens": l.tokens, "bytes": score.bytes, "nats_per_token": l.per_token(),
            "perplexity": l.perplexity(), "bits_per_byte": bits, "dtype": super::model::weights(&a.model).map_err(usage)?.to_string(), "model": a.model.model});
        println!("{line}");
    }
    Ok(())
}
