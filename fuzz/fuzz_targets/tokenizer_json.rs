//! A `tokenizer.json`, and the text after its first NUL byte through it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sequor_tokenizers::Tokenizer;

const MAX_TEXT: usize = 256;

fuzz_target!(|bytes: &[u8]| {
    let cut = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let (json, text) = bytes.split_at(cut);
    let Ok(tokenizer) = Tokenizer::from_json_bytes(json) else {
        return;
    };
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_TEXT)]);
    let Ok(ids) = tokenizer.encode(&text, true) else {
        return;
    };
    let _ = tokenizer.decode(&ids, false);
    let mut stream = tokenizer.decode_stream(true);
    for id in ids {
        if stream.push(id).is_err() {
            return;
        }
    }
    let _ = stream.finish();
});
