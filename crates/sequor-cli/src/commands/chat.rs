//! `sequor chat`.

use super::generate::{stream, summary};
use super::model::{load, load_options, text_options};
use crate::args::Chat;
use crate::exit::{Result, cancel_flag};
use sequor_text::Message;
use std::io::{BufRead, IsTerminal, Write};
use std::sync::atomic::Ordering;

/// Keeps a conversation until end of input or `/quit`.
pub fn run(a: &Chat) -> Result {
    let loading = load_options(&a.model)?;
    let mut options = text_options(&a.sampling, &a.speculate)?;
    let cancel = cancel_flag()?;
    options.cancel = Some(cancel.clone());
    let pipeline = load(&a.model, &loading, &options, a.speculate.heads.as_deref())?;
    let mut messages: Vec<Message> = a
        .system
        .iter()
        .map(|s| Message::system(s.clone()))
        .collect();
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        eprintln!(
            "{} is listening. /reset begins anew, /quit ends, Ctrl-C stops an answer.",
            a.model.model
        );
    }
    for line in prompts(terminal) {
        let line = line?;
        match line.trim() {
            "" => continue,
            "/quit" => break,
            "/reset" => {
                messages.retain(|m| m.role == "system");
                continue;
            }
            text => messages.push(Message::user(text.to_owned())),
        }
        let prompt = pipeline.chat_prompt(&messages)?;
        let done = stream(&pipeline, &prompt, &options)?;
        eprintln!("{}", summary(&done));
        messages.push(Message::assistant(done.text.clone()));
        cancel.store(false, Ordering::SeqCst); // Ctrl-C stopped the answer, not the conversation
    }
    Ok(())
}

/// Lines of standard input, each asked for with a prompt on a terminal.
fn prompts(terminal: bool) -> impl Iterator<Item = std::io::Result<String>> {
    let mut lines = std::io::stdin().lock().lines();
    std::iter::from_fn(move || {
        if terminal {
            eprint!("> ");
            let _ = std::io::stderr().flush();
        }
        lines.next()
    })
}
