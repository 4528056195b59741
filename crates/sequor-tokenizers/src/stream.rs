//! Text from ids that arrive one at a time.

use std::borrow::Cow;

use crate::{Result, Tokenizer};

/// Decodes ids as they arrive. A piece of text is handed out as soon as no
/// later id can change it: never half a character, and together always what
/// [`Tokenizer::decode`] makes of all the ids at once.
///
/// A piece can belong to several ids, and an id can complete no text at all.
/// Time and memory per id do not grow with the length of the stream.
///
/// ```
/// # use sequor_tokenizers::Tokenizer;
/// let tokenizer = Tokenizer::bytes(&[])?;
/// let mut stream = tokenizer.decode_stream(false);
/// assert_eq!(stream.push(0xc3)?, None); // the first half of "é"
/// assert_eq!(stream.push(0xa9)?.as_deref(), Some("é"));
/// assert_eq!(stream.finish()?, "");
/// # Ok::<(), sequor_tokenizers::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: Cow<'a, Tokenizer>,
    skip_special: bool,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Tokens are bytes, and a UTF-8 decoder is all there is to it.
    Bytes(Utf8Stream),
    /// A token's text depends on the ones before it.
    Window(Window),
}

impl<'a> DecodeStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self::with(Cow::Borrowed(tokenizer), skip_special)
    }

    fn with(tokenizer: Cow<'a, Tokenizer>, skip_special: bool) -> Self {
        let pieces = tokenizer.pieces();
        let state = match pieces {
            crate::pieces::Pieces::Opaque => State::Window(Window::default()),
            _ => State::Bytes(Utf8Stream::new(pieces.strip())),
        };
        Self {
            tokenizer,
            skip_special,
            state,
        }
    }

    /// Takes one id; returns the text that is now certain, if any.
    ///
    /// # Errors
    /// [`Error::TokenId`](crate::Error::TokenId) for an id beyond the
    /// vocabulary; the stream is as it was before.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let mut text = String::new();
        match &mut self.state {
            State::Bytes(utf8) => {
                utf8.push(&self.tokenizer.piece(id, self.skip_special)?, &mut text)
            }
            State::Window(window) => {
                window.push(id, &self.tokenizer, self.skip_special, &mut text)?
            }
        }
        Ok((!text.is_empty()).then_some(text))
    }

    /// Ends the stream: what was held back, an unfinished character as U+FFFD.
    /// The stream is then as new.
    ///
    /// # Errors
    /// [`Error::Backend`](crate::Error::Backend) when the engine fails.
    pub fn finish(&mut self) -> Result<String> {
        let mut text = String::new();
        match &mut self.state {
            State::Bytes(utf8) => {
                utf8.finish(&mut text);
                *utf8 = Utf8Stream::new(self.tokenizer.pieces().strip());
            }
            State::Window(window) => {
                window.settle(&self.tokenizer, self.skip_special, &mut text)?;
                *window = Window::default();
            }
        }
        Ok(text)
    }
}

impl DecodeStream<'static> {
    /// A stream that keeps its own handle of the tokenizer, for use where a
    /// borrow would be in the way.
    #[must_use]
    pub fn owned(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self::with(Cow::Owned(tokenizer), skip_special)
    }
}

/// Decodes UTF-8 from chunks of bytes exactly as
/// [`String::from_utf8_lossy`] decodes all of them.
#[derive(Debug, Clone)]
pub(crate) struct Utf8Stream {
    /// The beginning of a character: at most three bytes.
    pending: Vec<u8>,
    /// A byte taken off the start of the text, and how often it still may be.
    strip: Option<(u8, usize)>,
}

impl Utf8Stream {
    pub fn new(strip: Option<(u8, usize)>) -> Self {
        Self {
            pending: Vec::new(),
            strip,
        }
    }

    /// Takes bytes and appends the text that is now certain.
    pub fn push(&mut self, mut bytes: &[u8], text: &mut String) {
        while let (Some((byte, left)), Some((first, rest))) = (self.strip, bytes.split_first()) {
            self.strip = (left > 1 && *first == byte).then(|| (byte, left - 1));
            if left > 0 && *first == byte {
                bytes = rest;
            }
        }
        self.pending.extend_from_slice(bytes);
        let mut start = 0;
        loop {
            let rest = self.pending.get(start..).unwrap_or_default();
            let error = match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    start = self.pending.len();
                    break;
                }
                Err(error) => error,
            };
            let (valid, _) = rest.split_at(error.valid_up_to());
            // Valid as just found; lossy only in name.
            text.push_str(&String::from_utf8_lossy(valid));
            start += valid.len();
            match error.error_len() {
                Some(length) => {
                    text.push(char::REPLACEMENT_CHARACTER);
                    start += length;
                }
                None => break,
            }
        }
        self.pending.drain(..start);
    }

    /// Appends what an unfinished character becomes.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// The last ids, for decoders that look at neighbours. The text of
/// `ids[..read]` is out; it is decoded again with what follows, and the
/// difference is new.
#[derive(Debug, Clone, Default)]
struct Window {
    ids: Vec<u32>,
    read: usize,
}

impl Window {
    /// Ids held back at most while the text ends in U+FFFD: a character has at
    /// most four bytes, so after four ids it is a U+FFFD to stay.
    const MAX_HELD: usize = 4;

    fn push(
        &mut self,
        id: u32,
        tokenizer: &Tokenizer,
        skip: bool,
        text: &mut String,
    ) -> Result<()> {
        tokenizer.check(id)?;
        if skip && tokenizer.is_special(id) {
            return Ok(());
        }
        self.ids.push(id);
        let held = self.ids.len() - self.read;
        let new = self.unread(tokenizer, skip)?;
        if !new.ends_with(char::REPLACEMENT_CHARACTER) || held >= Self::MAX_HELD {
            self.advance();
            text.push_str(&new);
        }
        Ok(())
    }

    /// Appends the text of the ids held back.
    fn settle(&mut self, tokenizer: &Tokenizer, skip: bool, text: &mut String) -> Result<()> {
        if self.ids.len() > self.read {
            text.push_str(&self.unread(tokenizer, skip)?);
            self.advance();
        }
        Ok(())
    }

    /// The text that the ids from `read` on add.
    fn unread(&self, tokenizer: &Tokenizer, skip: bool) -> Result<String> {
        let (before, new) = self.ids.split_at(self.read);
        let known = tokenizer.decode_opaque(before, skip)?;
        let all = tokenizer.decode_opaque(&self.ids, skip)?;
        match all.strip_prefix(&known) {
            Some(text) => Ok(text.to_owned()),
            // The decoder changed its mind about text that is already out.
            None => tokenizer.decode_opaque(new, skip),
        }
    }

    fn advance(&mut self) {
        self.ids.drain(..self.read);
        self.read = self.ids.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utf8_stream_decodes_as_the_standard_library_does() {
        // Every kind of damage: stray and missing continuations, overlong
        // forms, surrogates, bytes that are never valid.
        let alphabet = [
            0x00, 0x41, 0x80, 0xbf, 0xc0, 0xc3, 0xa9, 0xe0, 0xed, 0xa0, 0xef, 0xbf, 0xbd, 0xf0,
            0x9f, 0x98, 0xf4, 0x90, 0xff,
        ];
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from((state >> 33) % below).unwrap()
        };
        for _ in 0..5000 {
            let bytes: Vec<u8> = (0..random(14)).map(|_| alphabet[random(19)]).collect();
            let mut stream = Utf8Stream::new(None);
            let (mut text, mut rest) = (String::new(), bytes.as_slice());
            while !rest.is_empty() {
                let (chunk, later) = rest.split_at(1 + random(rest.len() as u64));
                stream.push(chunk, &mut text);
                assert!(stream.pending.len() < 4);
                rest = later;
            }
            stream.finish(&mut text);
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
        }
    }

    #[test]
    fn leading_characters_are_taken_off_once() {
        for (strip, chunks, expected) in [
            (Some((b' ', 1)), vec![" a", " b"], "a b"),
            (Some((b' ', 1)), vec!["", " ", " b"], " b"),
            (Some((b' ', 2)), vec![" ", " ", " b"], " b"),
            (Some((b' ', 2)), vec![" a", " b"], "a b"),
            (Some((b' ', 0)), vec![" a"], " a"),
            (None, vec![" a"], " a"),
        ] {
            let mut stream = Utf8Stream::new(strip);
            let mut text = String::new();
            chunks
                .iter()
                .for_each(|c| stream.push(c.as_bytes(), &mut text));
            assert_eq!(text, expected, "{chunks:?}");
        }
    }
}
