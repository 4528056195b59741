//! `sequor generate text`.

use super::model::{load, load_options, text_options};
use crate::args::GenerateText;
use crate::exit::{Exit, Result, cancel_flag};
use sequor_text::{Generation, Message, TextOptions, TextPipeline};
use std::io::Write;

/// Streams a text to standard output.
pub fn run(a: &GenerateText) -> Result {
    let loading = load_options(&a.model)?;
    let mut options = text_options(&a.sampling, &a.speculate)?;
    if a.prompt.is_empty() {
        return Err(Exit::Usage(
            "the prompt is empty: give the text to continue".into(),
        ));
    }
    options.cancel = Some(cancel_flag()?);
    let pipeline = load(&a.model, &loading, &options)?;
    let prompt = if a.chat {
        let system = a.system.iter().map(|s| Message::system(s.clone()));
        pipeline.chat_prompt(
            &system
                .chain([Message::user(a.prompt.clone())])
                .collect::<Vec<_>>(),
        )?
    } else {
        pipeline.encode(&a.prompt)?
    };
    let done = stream(&pipeline, &prompt, &options)?;
    eprintln!("{}", summary(&done));
    if a.json {
        println!("{}", done.to_json());
    }
    if done.cancelled() {
        Err(Exit::Interrupted)
    } else {
        Ok(())
    }
}

/// Generates, printing the text as it comes, and ends the line.
pub fn stream(
    pipeline: &TextPipeline,
    prompt: &[u32],
    options: &TextOptions,
) -> Result<Generation> {
    let mut out = std::io::stdout().lock();
    let mut stream = pipeline.stream_tokens(prompt, options)?;
    for piece in &mut stream {
        out.write_all(piece?.as_bytes())?;
        out.flush()?;
    }
    writeln!(out)?;
    Ok(stream.finish())
}

/// One line about speed and speculation.
pub fn summary(g: &Generation) -> String {
    let r = &g.report;
    let mut line = format!(
        "[{} tokens, {:.1} tokens/s, first token after {:.0} ms, seed {}]",
        g.tokens.len(),
        g.tokens_per_second(),
        1e3 * r.first_token_seconds,
        g.seed
    );
    if r.drafted > 0 {
        line += &format!(
            " [{}: {:.2} tokens per target call, {} of {} drafted tokens accepted]",
            g.method,
            r.tokens_per_call(),
            r.accepted,
            r.drafted
        );
    } else if g.method != "off" {
        line += &format!(" [{}: nothing was drafted]", g.method);
    }
    line
}
