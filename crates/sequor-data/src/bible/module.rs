//! The container: a SWORD `zText` module keeps each testament in three files.
//!
//! `.bzz` holds zlib streams, one after the other. `.bzs` says where each lies:
//! rows of offset, compressed size and size. `.bzv` says where each slot's text
//! lies: rows of block (`u32`), start within the unpacked block (`u32`) and size
//! (`u16`). All numbers are little-endian.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Largest file that is read.
const MAX_FILE: u64 = 256 << 20;
/// Most text that the blocks of a testament, or its slots, may hold; the World
/// English Bible's Old Testament holds 22 MB with its markup.
const MAX_TEXT: usize = 128 << 20;
/// The most that zlib can compress.
const MAX_RATIO: usize = 1032;

const BLOCK_ROW: usize = 12;
const SLOT_ROW: usize = 10;

/// The three files of a testament, in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TestamentFiles {
    /// Where each block lies (`ot.bzs`).
    pub bzs: Vec<u8>,
    /// The compressed blocks (`ot.bzz`).
    pub bzz: Vec<u8>,
    /// Where each slot lies (`ot.bzv`).
    pub bzv: Vec<u8>,
}

impl TestamentFiles {
    /// Reads `ot` or `nt` below `dir`; `None` when the module lacks it.
    ///
    /// # Errors
    /// [`Error::Limits`], [`Error::Io`].
    pub(super) fn read(dir: &Path, testament: &str) -> Result<Option<Self>> {
        let paths = ["bzs", "bzz", "bzv"].map(|e| dir.join(testament).with_extension(e));
        if paths.iter().all(|p| !p.exists()) {
            return Ok(None);
        }
        let [bzs, bzz, bzv] = paths.map(|p| read(&p));
        Ok(Some(Self {
            bzs: bzs?,
            bzz: bzz?,
            bzv: bzv?,
        }))
    }
}

/// The slots of one testament.
#[derive(Debug)]
pub(super) struct Slots {
    path: PathBuf,
    /// All blocks, unpacked, one after the other.
    text: Vec<u8>,
    slots: Vec<Range<usize>>,
}

impl Slots {
    /// Unpacks a testament; `path`, without extension, leads its errors.
    ///
    /// # Errors
    /// [`Error::Format`] for damaged files, [`Error::Limits`].
    pub fn new(files: &TestamentFiles, path: &Path) -> Result<Self> {
        let [index_path, data_path, slot_path] =
            ["bzs", "bzz", "bzv"].map(|e| path.with_extension(e));
        let (index, data, rows) = (&files.bzs, &files.bzz, &files.bzv);

        let mut text = Vec::new();
        let mut blocks = Vec::new();
        for (i, row) in rows_of(index, BLOCK_ROW, &index_path)?.enumerate() {
            let start = text.len();
            unpack(row, data, &mut text)
                .map_err(|reason| Error::format(&data_path, format!("block {i}: {reason}")))?;
            blocks.push(start..text.len());
        }

        let mut slots = Vec::with_capacity(rows.len() / SLOT_ROW);
        let mut total = 0;
        for (i, row) in rows_of(rows, SLOT_ROW, &slot_path)?.enumerate() {
            let (start, size) = (number(row, 4, 4), number(row, 8, 2));
            if size == 0 {
                slots.push(0..0);
                continue;
            }
            let slot = blocks
                .get(number(row, 0, 4))
                .and_then(|b| Some((b, b.start.checked_add(start)?)))
                .and_then(|(b, from)| {
                    Some(from..from.checked_add(size).filter(|end| *end <= b.end)?)
                })
                .ok_or_else(|| {
                    Error::format(&slot_path, format!("slot {i} lies outside of the text"))
                })?;
            total += size;
            if total > MAX_TEXT {
                return Err(Error::Limits(format!(
                    "{} describes more than {MAX_TEXT} bytes",
                    slot_path.display()
                )));
            }
            slots.push(slot);
        }
        Ok(Self {
            path: data_path,
            text,
            slots,
        })
    }

    /// Number of slots: headings and verses.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// The text of a slot with its markup; empty when there is none.
    ///
    /// # Errors
    /// [`Error::Format`] when the text is not UTF-8.
    pub fn get(&self, i: usize) -> Result<&str> {
        let bytes = self
            .slots
            .get(i)
            .and_then(|r| self.text.get(r.clone()))
            .unwrap_or_default();
        std::str::from_utf8(bytes).map_err(|e| {
            Error::format(
                &self.path,
                format!(
                    "the text of slot {i} is not UTF-8 (byte {} of it)",
                    e.valid_up_to()
                ),
            )
        })
    }
}

/// Appends the block that a row of the index describes.
fn unpack(row: &[u8], data: &[u8], text: &mut Vec<u8>) -> Result<(), String> {
    let (offset, packed, size) = (number(row, 0, 4), number(row, 4, 4), number(row, 8, 4));
    let stream = offset
        .checked_add(packed)
        .and_then(|end| data.get(offset..end))
        .ok_or_else(|| {
            format!(
                "bytes {offset}..+{packed} lie outside of a file of {} bytes",
                data.len()
            )
        })?;
    if size > packed.saturating_mul(MAX_RATIO) || text.len() + size > MAX_TEXT {
        return Err(format!("it claims to hold {size} bytes, which is too much"));
    }
    let before = text.len();
    flate2::read::ZlibDecoder::new(stream)
        .take(size as u64 + 1)
        .read_to_end(text)
        .map_err(|e| format!("it cannot be unpacked ({e})"))?;
    match text.len() - before {
        found if found == size => Ok(()),
        found => Err(format!(
            "it should hold {size} bytes and holds {found}{}",
            if found > size { " or more" } else { "" }
        )),
    }
}

/// A little-endian number of a row. Rows are cut to length before.
fn number(row: &[u8], at: usize, bytes: usize) -> usize {
    row.iter()
        .skip(at)
        .take(bytes)
        .rev()
        .fold(0, |n, &b| n << 8 | usize::from(b))
}

fn rows_of<'a>(
    bytes: &'a [u8],
    row: usize,
    path: &Path,
) -> Result<std::slice::ChunksExact<'a, u8>> {
    if bytes.len().is_multiple_of(row) {
        return Ok(bytes.chunks_exact(row));
    }
    Err(Error::format(
        path,
        format!(
            "{} bytes are not a whole number of rows of {row} bytes; the file is damaged",
            bytes.len()
        ),
    ))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::Limits(format!(
            "{} is larger than {MAX_FILE} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}
