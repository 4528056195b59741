//! A chat template, and a conversation whose turns NUL bytes divide.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sequor_tokenizers::{ChatOptions, ChatTemplate, Message};

fuzz_target!(|text: &str| {
    let mut parts = text.split('\0');
    let Ok(template) = ChatTemplate::new(parts.next().unwrap_or_default()) else {
        return;
    };
    let roles = ["system", "user", "assistant"].into_iter().cycle();
    let messages: Vec<Message> = roles
        .zip(parts.take(8))
        .map(|(r, c)| Message::new(r, c))
        .collect();
    let mut options = ChatOptions::default();
    options.bos_token = Some("<s>".into());
    options.eos_token = Some("</s>".into());
    // The clock would make a finding impossible to repeat.
    options.now = Some(0);
    let _ = template.render(&messages, &options);
});
