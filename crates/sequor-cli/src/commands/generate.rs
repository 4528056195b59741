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
    let pipeline = load(&a.model, &loading, &options, a.speculate.heads.as_deref())?;
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

/// What speed and speculation came to: a line, and a table of rounds where drafts were
/// checked.
pub fn summary(g: &Generation) -> String {
    let r = &g.report;
    let mut text = format!(
        "[{} tokens, {:.1} tokens/s, first token after {:.0} ms, seed {}]",
        g.tokens.len(),
        g.tokens_per_second(),
        1e3 * r.first_token_seconds,
        g.seed
    );
    if let Some(layers) = &g.layers {
        text += &format!("\n[layers {layers}: ANOTHER MODEL, the text is not the full one's]");
    }
    if let Some(rule) = &r.lossy {
        text += &format!(
            "\n[acceptance {rule}: LOSSY, the text does not follow the model's distribution]"
        );
    }
    if r.drafted > 0 {
        text += &format!("\n[{}] {}", g.method, rounds(g));
    } else if g.method != "off" {
        text += &format!(" [{}: nothing was drafted]", g.method);
    }
    text
}

fn rounds(g: &Generation) -> String {
    let r = &g.report;
    let list = |counts: &[usize]| {
        let shown: Vec<String> = counts.iter().map(ToString::to_string).collect();
        shown.join(" ")
    };
    let mut text = format!(
        "{:.2} tokens per target call: {} rounds in {} calls, {} of {} drafted tokens accepted",
        r.tokens_per_call(),
        r.rounds,
        r.target_calls,
        r.accepted,
        r.drafted
    );
    text += &format!(
        "\n  accepted by depth: {}; rounds by number accepted (0, 1, ..): {}",
        list(&r.accepted_by_depth),
        list(&r.rounds_by_accepted)
    );
    text += &format!(
        "\n  drafting {:.2} s, target {:.2} s, the rest {:.2} s of {:.2} s",
        r.draft_seconds, r.verify_seconds, r.sampling_seconds, r.decode_seconds
    );
    if let Some(plain) = r.plain_step_seconds.filter(|s| *s > 0.0) {
        let costs: Vec<String> = r
            .forward_by_rows
            .iter()
            .map(|c| format!("{}: {:.2}", c.rows, c.seconds / plain))
            .collect();
        text += &format!(
            "\n  cost of a pass by rows, in plain steps: {}",
            costs.join(", ")
        );
    }
    if let (Some(plain), Some(speedup)) = (r.plain_seconds(), r.speedup()) {
        let verdict = if speedup < 1.0 {
            " (slower here: --speculate auto would leave it)"
        } else {
            ""
        };
        text += &format!(
            "\n  plain decoding would have taken {plain:.2} s: {speedup:.2} times as fast{verdict}"
        );
    }
    text
}
