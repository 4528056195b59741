//! Bibles as SWORD modules (`zText`, OSIS markup): verses as plain text.
//!
//! Each testament is a list of slots in a fixed order: a heading of the module,
//! one of the testament, and for each book its heading and, chapter by chapter,
//! a heading and the verses. Which verse a slot is follows from the versification
//! alone. The King James one and that of the New Revised Standard Version are
//! known; chapter marks in the text confirm the choice. Whatever follows the 66
//! books, and modules of other versifications, give flat verses.

mod canon;
mod markup;
mod module;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::text::Document;
use canon::{BookSpec, KJV, NRSV_ONE_MORE, OLD};
use module::Slots;
pub use module::TestamentFiles;

/// How the verses of a module are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Versification {
    /// King James Version.
    Kjv,
    /// New Revised Standard Version: one verse more in 3 John 1 and Revelation 12.
    Nrsv,
}

/// A part of the Bible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Testament {
    /// Genesis to Malachi.
    Old,
    /// Matthew to Revelation.
    New,
}

/// One verse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verse {
    /// Chapter, from 1.
    pub chapter: u16,
    /// Verse, from 1.
    pub verse: u16,
    /// Plain text, never empty.
    pub text: String,
}

/// One book.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Book {
    /// English name, as in "1 Samuel".
    pub name: &'static str,
    /// OSIS abbreviation, as in "1Sam".
    pub osis: &'static str,
    /// The testament it belongs to.
    pub testament: Testament,
    /// The verses that the translation has, in order.
    pub verses: Vec<Verse>,
}

impl Book {
    /// The text of a verse.
    pub fn verse(&self, chapter: u16, verse: u16) -> Option<&str> {
        let at = self
            .verses
            .binary_search_by_key(&(chapter, verse), |v| (v.chapter, v.verse))
            .ok()?;
        Some(&self.verses[at].text)
    }

    /// The chapters in order, each with its verses.
    pub fn chapters(&self) -> impl Iterator<Item = (u16, &[Verse])> {
        self.verses
            .chunk_by(|a, b| a.chapter == b.chapter)
            .filter_map(|c| Some((c.first()?.chapter, c)))
    }
}

/// A Bible.
///
/// ```no_run
/// # fn main() -> sequor_data::Result<()> {
/// use sequor_data::{Resolver, bible::Bible};
/// let bible = Bible::open(&Resolver::from_env().resolve_data("bible-web")?.path)?;
/// let john = bible.book("John").and_then(|b| b.verse(3, 16));
/// println!("{}", john.unwrap_or("this translation has no such verse"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Bible {
    versification: Option<Versification>,
    books: Vec<Book>,
    other: Vec<String>,
}

impl Bible {
    /// Reads a module: a folder with `ot.*` or `nt.*` files, or one that holds
    /// such a folder at `modules/texts/ztext/NAME`, as SWORD lays them out.
    ///
    /// # Errors
    /// [`Error::Format`] for damaged files, [`Error::Limits`] for files of absurd
    /// size, [`Error::Io`], and [`Error::Input`] when there is no module.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_as(&module_folder(dir)?, &KJV, OLD, &NRSV_ONE_MORE)
    }

    /// Reads a module whose files are in memory already.
    ///
    /// # Errors
    /// As [`Bible::open`].
    pub fn from_files(old: Option<&TestamentFiles>, new: Option<&TestamentFiles>) -> Result<Self> {
        Self::new(old, new, Path::new(""), &KJV, OLD, &NRSV_ONE_MORE)
    }

    fn open_as(
        dir: &Path,
        canon: &[BookSpec],
        old_books: usize,
        one_more: &[(&str, usize)],
    ) -> Result<Self> {
        let [old, new] = ["ot", "nt"].map(|t| TestamentFiles::read(dir, t));
        Self::new(
            old?.as_ref(),
            new?.as_ref(),
            dir,
            canon,
            old_books,
            one_more,
        )
    }

    fn new(
        old: Option<&TestamentFiles>,
        new: Option<&TestamentFiles>,
        dir: &Path,
        canon: &[BookSpec],
        old_books: usize,
        one_more: &[(&str, usize)],
    ) -> Result<Self> {
        let slots = |files: Option<&TestamentFiles>, name: &str| {
            files.map(|f| Slots::new(f, &dir.join(name))).transpose()
        };
        let (old_specs, new_specs) = canon.split_at(old_books);
        let parts = [
            (slots(old, "ot")?, old_specs, Testament::Old),
            (slots(new, "nt")?, new_specs, Testament::New),
        ];
        // Both testaments must agree on one way of counting.
        let fits = |v: Versification| -> Result<bool> {
            let mut all = true;
            for (slots, specs, testament) in &parts {
                if let Some(slots) = slots {
                    let layout = layout(
                        specs,
                        if v == Versification::Nrsv {
                            one_more
                        } else {
                            &[]
                        },
                    );
                    // Only the Old Testament has books after the last one here.
                    let length = match testament {
                        Testament::Old => slots.len() >= layout.len(),
                        Testament::New => slots.len() == layout.len(),
                    };
                    all = all && length && marks_agree(slots, specs, &layout)?;
                }
            }
            Ok(all)
        };
        let mut versification = None;
        for v in [Versification::Kjv, Versification::Nrsv] {
            if fits(v)? {
                versification = Some(v);
                break;
            }
        }

        let mut bible = Self {
            versification,
            books: Vec::new(),
            other: Vec::new(),
        };
        for (slots, specs, testament) in &parts {
            let Some(slots) = slots else { continue };
            let layout = match versification {
                Some(Versification::Nrsv) => layout(specs, one_more),
                Some(Versification::Kjv) => layout(specs, &[]),
                None => Vec::new(),
            };
            if versification.is_some() {
                bible
                    .books
                    .extend(read_books(slots, specs, *testament, &layout)?);
            }
            for i in layout.len()..slots.len() {
                bible.other.extend(flat_verse(slots.get(i)?));
            }
        }
        Ok(bible)
    }

    /// How the verses are counted; `None` when the module counts in a way that is
    /// not known, and then there are no [`books`](Self::books).
    pub fn versification(&self) -> Option<Versification> {
        self.versification
    }

    /// The books of the 66 that the module has, in order.
    pub fn books(&self) -> &[Book] {
        &self.books
    }

    /// A book by its English name or OSIS abbreviation.
    pub fn book(&self, name: &str) -> Option<&Book> {
        self.books.iter().find(|b| b.name == name || b.osis == name)
    }

    /// The text of the slots whose place is not known, in order: deuterocanonical
    /// books, or everything when the versification is not known.
    pub fn other(&self) -> &[String] {
        &self.other
    }

    /// One document for each chapter, its verses joined by `separator`, its
    /// [`group`](Document::group) the book, so that whole books can be held out.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the versification is not known.
    pub fn documents(&self, separator: &str) -> Result<Vec<Document>> {
        if self.versification.is_none() {
            return Err(Error::Unsupported(
                "this module counts its verses in a way that is not known, so it has no chapters; use its flat verses".into(),
            ));
        }
        let document = |book: &Book, chapter: u16, verses: &[Verse]| Document {
            name: format!("{} {chapter}", book.name),
            group: book.name.to_owned(),
            text: verses
                .iter()
                .map(|v| v.text.as_str())
                .collect::<Vec<_>>()
                .join(separator),
        };
        Ok(self
            .books
            .iter()
            .flat_map(|b| b.chapters().map(|(c, v)| document(b, c, v)))
            .collect())
    }
}

/// What a slot of a known versification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Of the module, the testament, or a book.
    Heading,
    /// Book (within the testament) and chapter.
    Chapter(usize, u16),
    /// Book (within the testament), chapter and verse.
    Verse(usize, u16, u16),
}

fn layout(books: &[BookSpec], one_more: &[(&str, usize)]) -> Vec<Slot> {
    let mut slots = vec![Slot::Heading, Slot::Heading];
    for (book, spec) in books.iter().enumerate() {
        slots.push(Slot::Heading);
        for (chapter, &verses) in (1_u16..).zip(spec.verses) {
            let more = one_more
                .iter()
                .any(|&(osis, c)| osis == spec.osis && c == usize::from(chapter));
            slots.push(Slot::Chapter(book, chapter));
            slots.extend(
                (1..=u16::from(verses) + u16::from(more))
                    .map(|verse| Slot::Verse(book, chapter, verse)),
            );
        }
    }
    slots
}

/// Whether every chapter that the text itself marks is where the layout says.
/// The heading of a book may hold anything, even all of another book.
fn marks_agree(slots: &Slots, specs: &[BookSpec], layout: &[Slot]) -> Result<bool> {
    for (i, slot) in layout.iter().enumerate() {
        let Some(mark) = markup::chapter_start(slots.get(i)?) else {
            continue;
        };
        let agrees = match *slot {
            Slot::Heading => true,
            Slot::Chapter(book, chapter) => mark == format!("{}.{chapter}", specs[book].osis),
            Slot::Verse(..) => false,
        };
        if !agrees {
            return Ok(false);
        }
    }
    Ok(true)
}

fn read_books(
    slots: &Slots,
    specs: &[BookSpec],
    testament: Testament,
    layout: &[Slot],
) -> Result<Vec<Book>> {
    let mut books: Vec<Book> = specs
        .iter()
        .map(|s| Book {
            name: s.name,
            osis: s.osis,
            testament,
            verses: Vec::new(),
        })
        .collect();
    for (i, slot) in layout.iter().enumerate() {
        if let Slot::Verse(book, chapter, verse) = *slot {
            let text = markup::plain(slots.get(i)?);
            if !text.is_empty() {
                books[book].verses.push(Verse {
                    chapter,
                    verse,
                    text,
                });
            }
        }
    }
    books.retain(|b| !b.verses.is_empty());
    Ok(books)
}

/// The text of a slot that may be a heading.
fn flat_verse(osis: &str) -> Option<String> {
    let heading = markup::chapter_start(osis).is_some()
        || osis.contains("x-importer")
        || is_book_heading(osis);
    (!heading)
        .then(|| markup::plain(osis))
        .filter(|text| !text.is_empty())
}

fn is_book_heading(osis: &str) -> bool {
    osis.split('<').any(|tag| {
        let tag = tag.split('>').next().unwrap_or_default();
        tag.starts_with("div ") && tag.contains("type=\"book\"") && tag.contains("sID=")
    })
}

/// The folder with a module's files.
fn module_folder(dir: &Path) -> Result<PathBuf> {
    let has_files = |d: &Path| ["ot.bzs", "nt.bzs"].iter().any(|f| d.join(f).is_file());
    if has_files(dir) {
        return Ok(dir.to_owned());
    }
    let found: Vec<PathBuf> = ["modules/texts/ztext", "usr/share/sword/modules/texts/ztext"]
        .iter()
        .filter_map(|below| std::fs::read_dir(dir.join(below)).ok())
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|d| has_files(d))
        .collect();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Error::Input(format!(
            "{} holds no SWORD zText module (files ot.bzs, ot.bzv, ot.bzz or nt.*)",
            dir.display()
        ))),
        _ => Err(Error::Input(format!(
            "{} holds {} modules; name the folder of one",
            dir.display(),
            found.len()
        ))),
    }
}

#[cfg(test)]
mod tests;
