use std::fs;
use std::io::Write;

use super::*;

const CANON: [BookSpec; 3] = [
    BookSpec {
        name: "First",
        osis: "A",
        verses: &[2, 1],
    },
    BookSpec {
        name: "Second",
        osis: "B",
        verses: &[1],
    },
    BookSpec {
        name: "Third",
        osis: "C",
        verses: &[2],
    },
];
const ONE_MORE: [(&str, usize); 1] = [("C", 1)];

fn open(dir: &Path) -> Result<Bible> {
    Bible::open_as(dir, &CANON, 2, &ONE_MORE)
}

/// Writes a testament: `blocks[b]` are the texts of consecutive slots.
fn write(dir: &Path, testament: &str, blocks: &[&[&str]]) {
    let (mut index, mut data, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for (b, slots) in blocks.iter().enumerate() {
        let text = slots.concat();
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        zlib.write_all(text.as_bytes()).unwrap();
        let packed = zlib.finish().unwrap();
        for n in [data.len(), packed.len(), text.len()] {
            index.extend((n as u32).to_le_bytes());
        }
        data.extend(packed);
        let mut start = 0;
        for slot in *slots {
            rows.extend((b as u32).to_le_bytes());
            rows.extend((start as u32).to_le_bytes());
            rows.extend((slot.len() as u16).to_le_bytes());
            start += slot.len();
        }
    }
    for (extension, bytes) in [("bzs", index), ("bzz", data), ("bzv", rows)] {
        fs::write(dir.join(format!("{testament}.{extension}")), bytes).unwrap();
    }
}

const MARK_A1: &str = r#"<chapter osisID="A.1" sID="A.1"/>"#;
const MARK_A2: &str = r#"<div/><chapter osisID="A.2" sID="A.2"/>"#;

fn old(dir: &Path) {
    write(
        dir,
        "ot",
        &[
            &["", "<milestone type=\"x-importer\"/>"],
            &[
                "Preface",
                MARK_A1,
                "One <w>one</w>.",
                "One<note>n</note>two.",
                MARK_A2,
                "Twó&amp;one.",
            ],
            &["", "", "Second <l/>one."],
            &[
                r#"<div type="book" sID="x"/>Intro"#,
                r#"<chapter osisID="X.1" sID="X.1"/>"#,
                "Extra one.",
            ],
        ],
    );
}

fn new(dir: &Path, verses: &[&str]) {
    let mut slots = vec!["", "", "", ""];
    slots.extend(verses);
    write(dir, "nt", &[&slots]);
}

#[test]
fn books_chapters_verses_and_what_follows() {
    let tmp = tempfile::tempdir().unwrap();
    old(tmp.path());
    new(
        tmp.path(),
        &["Third one.", "Third two. <chapter eID=\"C.1\"/>Glossary"],
    );
    let bible = open(tmp.path()).unwrap();
    assert_eq!(bible.versification(), Some(Versification::Kjv));
    let names: Vec<_> = bible
        .books()
        .iter()
        .map(|b| (b.name, b.testament, b.verses.len()))
        .collect();
    assert_eq!(
        names,
        [
            ("First", Testament::Old, 3),
            ("Second", Testament::Old, 1),
            ("Third", Testament::New, 2)
        ]
    );
    assert_eq!(bible.book("A").unwrap().verse(1, 2), Some("One two."));
    assert_eq!(bible.book("First").unwrap().verse(2, 1), Some("Twó&one."));
    assert_eq!(bible.book("Third").unwrap().verse(1, 2), Some("Third two."));
    assert_eq!(bible.book("Third").unwrap().verse(2, 1), None);
    assert_eq!(bible.other(), ["Extra one."]);
    let documents = bible.documents("\n").unwrap();
    assert_eq!(documents.len(), 4);
    assert_eq!(
        (documents[0].name.as_str(), documents[0].group.as_str()),
        ("First 1", "First")
    );
    assert_eq!(documents[0].text, "One one.\nOne two.");
}

#[test]
fn the_other_way_of_counting_and_missing_verses() {
    let tmp = tempfile::tempdir().unwrap();
    new(tmp.path(), &["one", "", "three"]);
    let bible = open(tmp.path()).unwrap();
    assert_eq!(bible.versification(), Some(Versification::Nrsv));
    let third = &bible.books()[0];
    assert_eq!(
        (third.verse(1, 2), third.verse(1, 3)),
        (None, Some("three"))
    );
}

#[test]
fn unknown_countings_give_flat_verses() {
    let tmp = tempfile::tempdir().unwrap();
    new(tmp.path(), &["one"]);
    let bible = open(tmp.path()).unwrap();
    assert_eq!((bible.versification(), bible.books().len()), (None, 0));
    assert_eq!(bible.other(), ["one"]);
    assert!(matches!(bible.documents(" "), Err(Error::Unsupported(_))));

    // The number of slots fits, the text's own marks do not.
    old(tmp.path());
    let rows = fs::read(tmp.path().join("ot.bzv")).unwrap();
    let mut shifted = rows[10..].to_vec();
    shifted.extend(&rows[..10]);
    fs::write(tmp.path().join("ot.bzv"), shifted).unwrap();
    new(tmp.path(), &["one", "two"]);
    assert_eq!(open(tmp.path()).unwrap().versification(), None);
}

/// Every change of one file either is an error or is read; nothing panics.
fn damage(change: impl Fn(&[u8], usize) -> Option<Vec<u8>>) -> usize {
    let tmp = tempfile::tempdir().unwrap();
    old(tmp.path());
    let mut errors = 0;
    for file in ["ot.bzs", "ot.bzv", "ot.bzz"] {
        let path = tmp.path().join(file);
        let whole = fs::read(&path).unwrap();
        for n in 0..whole.len() {
            let Some(bytes) = change(&whole, n) else {
                continue;
            };
            // A new file: overwriting makes some file systems wait for the disk.
            fs::remove_file(&path).unwrap();
            fs::write(&path, bytes).unwrap();
            errors += usize::from(open(tmp.path()).is_err());
        }
        fs::write(&path, whole).unwrap();
    }
    errors
}

#[test]
fn every_prefix_and_every_changed_byte_is_survived() {
    let prefixes = damage(|whole, n| Some(whole[..n].to_vec()));
    assert!(prefixes > 100, "{prefixes}");
    for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
        damage(|whole, n| {
            let mut bytes = whole.to_vec();
            bytes[n] ^= value;
            Some(bytes)
        });
    }
}

#[test]
fn bombs_and_missing_files_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    assert!(matches!(Bible::open(tmp.path()), Err(Error::Input(_))));
    old(tmp.path());
    let index = tmp.path().join("ot.bzs");
    let mut bytes = fs::read(&index).unwrap();
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    fs::write(&index, &bytes).unwrap();
    assert!(
        open(tmp.path())
            .unwrap_err()
            .to_string()
            .contains("too much")
    );
    fs::remove_file(&index).unwrap();
    assert!(matches!(open(tmp.path()), Err(Error::Io { .. })));
}
