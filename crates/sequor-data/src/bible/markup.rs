//! From OSIS markup to plain text.

/// Elements whose content is not the text itself.
const DROPPED: [&str; 3] = ["note", "title", "speaker"];
/// Elements within a word or a line; all others stand for a break.
const INLINE: [&str; 10] = [
    "w",
    "q",
    "seg",
    "name",
    "hi",
    "transChange",
    "divineName",
    "foreign",
    "inscription",
    "reference",
];

/// What stands between the last character and the next.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Between {
    Nothing,
    /// Something was dropped here; words on both sides must not run together.
    Gap,
    Space,
}

struct Out {
    text: String,
    between: Between,
}

impl Out {
    fn part(&mut self, between: Between) {
        if between > self.between {
            self.between = between;
        }
    }

    fn push(&mut self, c: char) {
        if c.is_whitespace() {
            return self.part(Between::Space);
        }
        let space = match self.between {
            Between::Nothing => false,
            Between::Gap => {
                let word_ends = self
                    .text
                    .ends_with(|p: char| p.is_alphanumeric() || ",.;:!?)”’".contains(p));
                word_ends && (c.is_alphanumeric() || "(“‘".contains(c))
            }
            Between::Space => true,
        };
        if space && !self.text.is_empty() {
            self.text.push(' ');
        }
        self.between = Between::Nothing;
        self.text.push(c);
    }
}

/// The text of a slot: tags, notes and headings removed, entities replaced, each
/// run of white space one space, and nothing after the end of the chapter.
pub(super) fn plain(osis: &str) -> String {
    let mut out = Out {
        text: String::with_capacity(osis.len() / 4),
        between: Between::Nothing,
    };
    let mut depth = 0_usize;
    let mut rest = osis;
    while let Some(at) = rest.find(['<', '&']) {
        if depth == 0 {
            rest[..at].chars().for_each(|c| out.push(c));
        }
        rest = &rest[at..];
        if rest.starts_with('&') {
            let (c, length) = entity(rest);
            if depth == 0 {
                out.push(c);
            }
            rest = &rest[length..];
            continue;
        }
        // A tag without an end takes the rest with it.
        let Some(end) = rest.find('>') else {
            return out.text;
        };
        let tag = Tag::read(&rest[1..end]);
        rest = &rest[end + 1..];
        if tag.name == "chapter" && tag.inside.contains("eID=") {
            return out.text;
        }
        if DROPPED.contains(&tag.name) {
            out.part(Between::Gap);
            depth = match (tag.closing, tag.empty) {
                (true, _) => depth.saturating_sub(1),
                (false, true) => depth,
                (false, false) => depth + 1,
            };
        } else if depth == 0 && !INLINE.contains(&tag.name) {
            out.part(Between::Space);
        }
    }
    if depth == 0 {
        rest.chars().for_each(|c| out.push(c));
    }
    out.text
}

struct Tag<'a> {
    name: &'a str,
    inside: &'a str,
    closing: bool,
    empty: bool,
}

impl<'a> Tag<'a> {
    fn read(inside: &'a str) -> Self {
        let closing = inside.starts_with('/');
        let bare = inside.trim_start_matches('/');
        let name = bare
            .split(|c: char| c.is_whitespace() || c == '/')
            .next()
            .unwrap_or_default();
        Self {
            name,
            inside,
            closing,
            empty: inside.ends_with('/'),
        }
    }
}

/// The character of an entity at the start of `text`, and the bytes it takes. An
/// ampersand that begins none stands for itself.
fn entity(text: &str) -> (char, usize) {
    let itself = ('&', 1);
    let Some(end) = text.bytes().take(12).position(|b| b == b';') else {
        return itself;
    };
    let c = match &text[1..end] {
        "amp" => Some('&'),
        "lt" => Some('<'),
        "gt" => Some('>'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        "nbsp" => Some(' '),
        name => name
            .strip_prefix('#')
            .and_then(|n| match n.strip_prefix('x') {
                Some(hex) => u32::from_str_radix(hex, 16).ok(),
                None => n.parse().ok(),
            })
            .and_then(char::from_u32),
    };
    c.map_or(itself, |c| (c, end + 1))
}

/// The chapter that begins in a slot: the `Gen.2` of its `<chapter osisID="Gen.2" sID="Gen.2"/>`.
pub(super) fn chapter_start(osis: &str) -> Option<&str> {
    let mut rest = osis;
    while let Some((_, tail)) = rest.split_once("<chapter ") {
        let (tag, after) = tail.split_once('>')?;
        if tag.contains(" sID=") {
            return tag.split_once("osisID=\"")?.1.split('"').next();
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_go_and_words_stay_apart() {
        let cases = [
            (
                r#"<w lemma="x">In</w> <w>the</w>  beginning<note placement="foot"><reference>1:1 </reference>A note.</note><w>God</w>"#,
                "In the beginning God",
            ),
            (r#"men<note>x</note>, and"#, "men, and"),
            (r#"“<note>x</note>But he said.<note/>”"#, "“But he said.”"),
            (
                r#"<div sID="a" type="x-p"/>One,<l eID="b"/><l sID="c"/>two<lb/>three <title>No<note>x</note> no</title>"#,
                "One, two three",
            ),
            ("the L<seg>ORD</seg>’s", "the LORD’s"),
            (
                "a &lt;b&gt; &amp; c &#233;&#xe9; &unknown; d & e",
                "a <b> & c éé &unknown; d & e",
            ),
            (r#"Amen.  <chapter eID="Rev.22"/> A glossary"#, "Amen."),
            ("  \n\t ", ""),
            ("cut <tag", "cut"),
            ("note <note>never ends", "note"),
            ("</note>odd", "odd"),
            ("é<é/>é", "é é"),
        ];
        for (osis, text) in cases {
            assert_eq!(plain(osis), text, "{osis}");
        }
    }

    #[test]
    fn every_prefix_and_suffix_is_read_without_complaint() {
        let osis = r#"“<w a="é">Né</w>&#233;<note>“x</note>&amp;<chapter eID="x"/>rest"#;
        for (i, _) in osis.char_indices() {
            plain(&osis[..i]);
            plain(&osis[i..]);
            chapter_start(&osis[i..]);
        }
    }

    #[test]
    fn chapter_starts() {
        let start = chapter_start(
            r#"<div/><chapter eID="Gen.1"/><chapter n="2" osisID="Gen.2" sID="Gen.2"/>"#,
        );
        assert_eq!(start, Some("Gen.2"));
        assert_eq!(chapter_start("<chapter "), None);
        assert_eq!(chapter_start("text"), None);
    }
}
