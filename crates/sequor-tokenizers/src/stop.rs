//! Stop strings in streamed text.

/// Finds stop strings in text that arrives in pieces, and holds back what
/// might become one.
///
/// The stop string that ends first wins, and of those that end at the same
/// place the longest; where the text was cut into pieces makes no difference.
/// Held-back text is never longer than the longest stop string.
///
/// ```
/// # use sequor_tokenizers::StopMatcher;
/// let mut stop = StopMatcher::new(vec!["\nUser:".to_owned()]);
/// assert_eq!(stop.push("Fine.\nUs"), ("Fine.".to_owned(), None));
/// assert_eq!(stop.push("er: And"), (String::new(), Some("\nUser:".to_owned())));
/// ```
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// The end of the text so far, as long as the longest beginning of a stop
    /// string that it could be.
    held: String,
    stopped: Option<usize>,
}

/// A stop string as an automaton of Knuth, Morris and Pratt.
#[derive(Debug, Clone)]
struct Stop {
    text: String,
    /// `fallback[n]`: the longest proper prefix of `text[..=n]` that is also
    /// its suffix.
    fallback: Vec<usize>,
    /// How many bytes of the stop string the text so far ends with.
    matched: usize,
}

impl Stop {
    fn new(text: String) -> Self {
        let mut stop = Self {
            fallback: vec![0; text.len()],
            text,
            matched: 0,
        };
        for n in 1..stop.text.len() {
            let byte = stop.byte(n);
            stop.advance(byte);
            if let Some(entry) = stop.fallback.get_mut(n) {
                *entry = stop.matched;
            }
        }
        stop.matched = 0;
        stop
    }

    fn byte(&self, n: usize) -> Option<u8> {
        self.text.as_bytes().get(n).copied()
    }

    fn advance(&mut self, byte: Option<u8>) {
        while self.byte(self.matched) != byte && self.matched > 0 {
            self.matched = self.fallback.get(self.matched - 1).copied().unwrap_or(0);
        }
        if self.byte(self.matched) == byte {
            self.matched += 1;
        }
    }
}

impl StopMatcher {
    /// Looks for any of `stops`. Empty strings are left out: they would stop
    /// every text before it begins.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops
            .into_iter()
            .filter(|s| !s.is_empty())
            .map(Stop::new)
            .collect();
        Self {
            stops,
            held: String::new(),
            stopped: None,
        }
    }

    /// Takes the next piece of text. Returns the text that is certain to come
    /// before any stop string, and the stop string if one was completed. The
    /// text after a stop string is dropped, and so is everything pushed later.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if self.stopped.is_none() {
            let before = self.held.len();
            self.held.push_str(piece);
            for (n, byte) in piece.bytes().enumerate() {
                self.stops
                    .iter_mut()
                    .for_each(|stop| stop.advance(Some(byte)));
                let complete = self
                    .stops
                    .iter()
                    .enumerate()
                    .filter(|(_, s)| s.matched == s.text.len());
                if let Some((index, stop)) =
                    complete.max_by_key(|(index, s)| (s.text.len(), usize::MAX - index))
                {
                    self.held
                        .truncate((before + n + 1).saturating_sub(stop.text.len()));
                    self.stopped = Some(index);
                    return (std::mem::take(&mut self.held), self.stopped());
                }
            }
            // A beginning of a stop string starts with a whole character, so
            // this never cuts one in half.
            let keep = self.stops.iter().map(|s| s.matched).max().unwrap_or(0);
            let tail = self.held.split_off(self.held.len().saturating_sub(keep));
            return (std::mem::replace(&mut self.held, tail), None);
        }
        (String::new(), self.stopped())
    }

    /// Ends the text: returns what was held back, which is no stop string.
    pub fn finish(&mut self) -> String {
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        std::mem::take(&mut self.held)
    }

    fn stopped(&self) -> Option<String> {
        self.stopped
            .and_then(|index| self.stops.get(index))
            .map(|stop| stop.text.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, spelled out: the first place where the text so far ends
    /// with a stop string.
    fn naive(text: &str, stops: &[String]) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|&n| text.is_char_boundary(n)) {
            let ending = stops
                .iter()
                .filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some(stop) = ending.max_by_key(|s| s.len()) {
                return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    fn run(pieces: &[&str], stops: &[String]) -> (String, Option<String>) {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut text = String::new();
        for piece in pieces {
            let (emitted, stopped) = matcher.push(piece);
            text.push_str(&emitted);
            assert!(matcher.held.len() < longest.max(1), "held back too much");
            if stopped.is_some() {
                assert_eq!(matcher.push("more"), (String::new(), stopped.clone()));
                assert_eq!(matcher.finish(), "");
                return (text, stopped);
            }
        }
        text.push_str(&matcher.finish());
        (text, None)
    }

    #[test]
    fn every_split_agrees_with_the_definition() {
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from((state >> 33) % below).unwrap()
        };
        let letters = ["a", "b", "é", "😀", "\n"];
        for _ in 0..400 {
            let mut word = |n: u64| {
                (0..random(n))
                    .map(|_| letters[random(5)])
                    .collect::<String>()
            };
            let text = word(14);
            let stops: Vec<String> = (0..3).map(|_| word(5)).collect();
            let expected = naive(&text, &stops);
            let cuts: Vec<usize> = (0..=text.len())
                .filter(|&n| text.is_char_boundary(n))
                .collect();
            for &i in &cuts {
                for &j in cuts.iter().filter(|&&j| j >= i) {
                    let pieces = [&text[..i], &text[i..j], &text[j..]];
                    assert_eq!(run(&pieces, &stops), expected, "{pieces:?} {stops:?}");
                }
            }
            let characters: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            assert_eq!(run(&characters, &stops), expected, "{text:?} {stops:?}");
        }
    }

    #[test]
    fn no_stop_strings_hold_nothing_back() {
        let mut matcher = StopMatcher::new(vec![String::new()]);
        assert_eq!(matcher.push("abc"), ("abc".to_owned(), None));
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn long_stops_and_texts_take_linear_time() {
        let stop = "a".repeat(100_000) + "b";
        let text = "a".repeat(1_000_000);
        assert_eq!(
            run(&[&text], std::slice::from_ref(&stop)),
            (text.clone(), None)
        );
        let (_, stopped) = run(&[&text, "b!"], std::slice::from_ref(&stop));
        assert_eq!(stopped, Some(stop));
    }
}
