//! `sequor demo`: a real model, plain and speculative, and a page that shows it.

use super::generate::stream;
use crate::args::Demo;
use crate::exit::{Exit, Result, cancel_flag, failure, usage};
use sequor_data::Resolver;
use sequor_nn::device::DType;
use sequor_nn::weights::write_atomic;
use sequor_text::{
    Generation, HeadKind, LoadOptions, Message, Speculate, TextOptions, TextPipeline,
};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Has something worth copying, so that looking things up in the prompt pays.
const CHAT_PROMPT: &str = "Summarise this text in two sentences, using its own words: \
The lighthouse at the end of the bay was built in 1862 from grey stone. For a hundred years \
a keeper climbed its 182 steps every evening to light the lamp. Since 1964 the lamp has been \
lit by electricity, and the keeper's house has become a small museum that shows how the \
keepers of the lighthouse lived.";
const BIBLE_PROMPT: &str = "In the beginning God created the heavens and the earth.";

/// Generates twice, compares, and writes `index.html`.
pub fn run(a: &Demo) -> Result {
    let dtype: DType = a.dtype.parse().map_err(usage)?;
    make_folder(&a.out)?;
    let cancel = cancel_flag()?;
    let (path, chat) = model(a.offline)?;
    let loading = LoadOptions {
        weights: dtype.into(),
        ..LoadOptions::default()
    };
    let mut pipeline = TextPipeline::load(&path, &loading)?;
    let prompt_text = if chat { CHAT_PROMPT } else { BIBLE_PROMPT };
    let prompt = if chat {
        pipeline.chat_prompt(&[Message::user(prompt_text.to_owned())])?
    } else {
        pipeline.encode(prompt_text)?
    };
    println!("prompt: {prompt_text}\n");
    let mut methods = vec![
        ("plain".to_owned(), Speculate::Off),
        (
            "prompt-lookup speculation".to_owned(),
            Speculate::PromptLookup,
        ),
    ];
    methods.extend(best_heads(&mut pipeline, &loading)?);
    let mut runs = Vec::new();
    for (title, speculate) in methods {
        println!("--- {title}, {dtype} ---");
        let options = TextOptions {
            max_new_tokens: 128,
            // A small model takes the best token in circles; drawn texts are equal as well.
            temperature: (!chat).then_some(0.8),
            seed: 7,
            speculate,
            cancel: Some(cancel.clone()),
            ..TextOptions::default()
        };
        let done = stream(&pipeline, &prompt, &options)?;
        if done.cancelled() {
            return Err(Exit::Interrupted);
        }
        println!(
            "[{} tokens, {:.1} tokens/s, {:.2} tokens per target call]\n",
            done.tokens.len(),
            done.tokens_per_second(),
            done.report.tokens_per_call()
        );
        runs.push((title, done));
    }
    let equal = runs.windows(2).all(|w| w[0].1.tokens == w[1].1.tokens);
    println!(
        "{}",
        if equal {
            "all texts are equal, token for token"
        } else {
            "THE TEXTS DIFFER: speculation must not change a text"
        }
    );
    let page = a.out.join("index.html");
    let name = path.file_name().map_or_else(
        || path.display().to_string(),
        |n| n.to_string_lossy().into_owned(),
    );
    let text = html(&name, dtype, prompt_text, &runs, equal);
    write_atomic(&page, |w| {
        w.write_all(text.as_bytes())
            .map_err(|e| sequor_nn::Error::io(&page, e))
    })
    .map_err(failure)?;
    println!("wrote {}", page.display());
    if equal {
        Ok(())
    } else {
        Err(failure("the texts differ"))
    }
}

/// The best heads that are there for this model.
fn best_heads(
    pipeline: &mut TextPipeline,
    loading: &LoadOptions,
) -> Result<Option<(String, Speculate)>> {
    let resolver = Resolver::from_env().offline(true);
    for kind in [HeadKind::HydraPlus, HeadKind::Eagle, HeadKind::Medusa] {
        let options = TextOptions {
            speculate: Speculate::CopyAndHeads(kind),
            ..TextOptions::default()
        };
        match pipeline.prepare(&options, loading, &resolver, None) {
            Ok(()) => {
                return Ok(Some((
                    format!("copies and {} heads", kind.name()),
                    options.speculate,
                )));
            }
            // None were trained for this model.
            Err(e) if e.is_usage() => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(None)
}

/// SmolLM2 where it can be had, else the bundled model.
fn model(offline: bool) -> Result<(PathBuf, bool)> {
    let resolver = Resolver::from_env().offline(offline);
    match resolver.resolve_model("smollm2") {
        Ok(found) => Ok((found.path, true)),
        Err(sequor_data::Error::Cancelled) => Err(Exit::Interrupted),
        Err(e) => {
            println!("SmolLM2 cannot be had ({e}); using the bundled model bible-lm\n");
            let found = resolver
                .offline(true)
                .resolve_model("bible-lm")
                .map_err(sequor_text::Error::from)?;
            Ok((found.path, false))
        }
    }
}

fn make_folder(dir: &Path) -> Result {
    let probe = dir.join(".sequor-probe");
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::write(&probe, b""))
        .and_then(|()| std::fs::remove_file(&probe))
        .map_err(|e| {
            failure(format!(
                "{}: {e}; choose a folder that can be written with --out",
                dir.display()
            ))
        })
}

fn html(
    model: &str,
    dtype: DType,
    prompt: &str,
    runs: &[(String, Generation)],
    equal: bool,
) -> String {
    let escape = |s: &str| {
        s.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
    };
    let rows: String = runs
        .iter()
        .map(|(title, g)| {
            format!(
                "<section><h2>{title}</h2><p class=\"n\">{} tokens &middot; {:.1} tokens/s &middot; {:.2} tokens per target call &middot; \
                 first token after {:.0} ms</p><blockquote>{}</blockquote></section>\n",
                g.tokens.len(),
                g.tokens_per_second(),
                g.report.tokens_per_call(),
                1e3 * g.report.first_token_seconds,
                escape(&g.text).replace('\n', "<br>")
            )
        })
        .collect();
    let verdict = if equal {
        "All texts are equal, token for token."
    } else {
        "The texts differ."
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>Sequor demo</title>\n<style>body{{font:17px/1.55 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#222}}\
         h1{{font-size:1.7rem}}h2{{font-size:1.15rem;margin-top:2rem}}.n{{color:#666;font-size:.9rem}}\
         blockquote{{margin:.5rem 0;padding:.8rem 1rem;background:#f4f4f1;border-left:4px solid #7a6}}\
         .v{{font-weight:600;color:{}}}</style>\n<h1>Sequor: what the demo made</h1>\n\
         <p>Model <b>{}</b>, weights in {dtype}. The prompt:</p><blockquote>{}</blockquote>\n{rows}<p class=\"v\">{verdict}</p>\n</html>\n",
        if equal { "#274" } else { "#a22" },
        escape(model),
        escape(prompt)
    )
}
