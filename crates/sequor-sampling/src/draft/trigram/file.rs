//! Tables on disk.
//!
//! Little endian: `SQ3GRAM1`, vocabulary size u32, its hash (32 bytes), number of rows by
//! pair and by single token (u64 each), then the rows, keys ascending: key u64, number of
//! successors u16, and for each of them token u32 and weight f32, heaviest first.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use super::table::{MAX_ROW, MAX_ROWS, Row, Rows, TrigramTable, Vocabulary};
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"SQ3GRAM1";
/// Weights in files are not larger.
const MAX_WEIGHT: f32 = 1e6;

impl TrigramTable {
    /// Writes the table. The file appears whole or not at all.
    ///
    /// # Errors
    /// `File` naming the path and the operating system's reason.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = PathBuf::from(partial);
        let written = File::create(&partial)
            .and_then(|file| {
                let mut out = BufWriter::new(file);
                self.write(&mut out)?;
                out.into_inner()
                    .map_err(std::io::IntoInnerError::into_error)?
                    .sync_all()
            })
            .and_then(|()| std::fs::rename(&partial, path));
        written.map_err(|e| {
            // The first error is the one to report.
            let _ = std::fs::remove_file(&partial);
            Error::file(path, e)
        })
    }

    /// Writes the table to `out`.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let vocabulary = self.vocabulary();
        out.write_all(MAGIC)?;
        out.write_all(&vocabulary.size.to_le_bytes())?;
        out.write_all(&vocabulary.hash)?;
        for rows in [&self.pairs, &self.singles] {
            out.write_all(&(rows.len() as u64).to_le_bytes())?;
        }
        for rows in [&self.pairs, &self.singles] {
            for (key, row) in rows.sorted() {
                out.write_all(&key.to_le_bytes())?;
                out.write_all(&(row.len() as u16).to_le_bytes())?;
                for (token, weight) in row {
                    out.write_all(&token.to_le_bytes())?;
                    out.write_all(&weight.to_le_bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Reads a table that was made for `vocabulary`.
    ///
    /// # Errors
    /// `File` when it cannot be read, is damaged, or belongs to another vocabulary.
    pub fn load(path: impl AsRef<Path>, vocabulary: &Vocabulary) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        Self::read(BufReader::new(file), vocabulary).map_err(|problem| Error::file(path, problem))
    }

    /// Reads a table that was made for `vocabulary`. No more memory is taken than the
    /// bytes that are there ask for.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn read(mut input: impl Read, vocabulary: &Vocabulary) -> std::io::Result<Self> {
        if take::<8>(&mut input)? != *MAGIC {
            return Err(damaged("not a trigram table of this version"));
        }
        let size = u32::from_le_bytes(take(&mut input)?);
        let hash = take::<32>(&mut input)?;
        if (Vocabulary { size, hash }) != *vocabulary {
            return Err(damaged(format!(
                "made for another vocabulary ({size} tokens, expected {} and the same \
                 tokenizer); build it again with this tokenizer",
                vocabulary.size
            )));
        }
        let counts = [take(&mut input)?, take(&mut input)?].map(u64::from_le_bytes);
        if counts.iter().any(|&n| n > MAX_ROWS as u64) {
            return Err(damaged(format!(
                "{counts:?} rows, at most {MAX_ROWS} are allowed"
            )));
        }
        let mut table = Self::new(*vocabulary);
        for (rows, count) in [&mut table.pairs, &mut table.singles]
            .into_iter()
            .zip(counts)
        {
            read_rows(&mut input, rows, count, size)?;
        }
        if input.read(&mut [0])? != 0 {
            return Err(damaged("bytes after the last row"));
        }
        Ok(table)
    }
}

fn read_rows(input: &mut impl Read, rows: &mut Rows, count: u64, size: u32) -> std::io::Result<()> {
    let mut last = None;
    for _ in 0..count {
        let key = u64::from_le_bytes(take(input)?);
        if Some(key) <= last {
            return Err(damaged("keys are not in order"));
        }
        last = Some(key);
        let (a, b) = ((key >> 32) as u32, key as u32);
        let len = usize::from(u16::from_le_bytes(take(input)?));
        if !(1..=MAX_ROW).contains(&len) {
            return Err(damaged(format!(
                "a row of {len} tokens, expected 1 to {MAX_ROW}"
            )));
        }
        let mut row = Row::with_capacity(len);
        for _ in 0..len {
            let token = u32::from_le_bytes(take(input)?);
            let weight = f32::from_le_bytes(take(input)?);
            if a.max(b).max(token) >= size {
                return Err(damaged(format!("a token outside the vocabulary of {size}")));
            }
            if !(weight > 0.0 && weight <= MAX_WEIGHT) {
                return Err(damaged(format!(
                    "weight {weight}, expected 0 to {MAX_WEIGHT}"
                )));
            }
            let falls = row.last().is_none_or(|&(_, above)| weight <= above);
            if !falls || row.iter().any(|&(t, _)| t == token) {
                return Err(damaged("a row is out of order or names a token twice"));
            }
            row.push((token, weight));
        }
        rows.insert(key, row);
    }
    Ok(())
}

fn take<const N: usize>(input: &mut impl Read) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => damaged("it ends too early"),
        _ => e,
    })?;
    Ok(bytes)
}

fn damaged(what: impl Into<String>) -> std::io::Error {
    std::io::Error::new(ErrorKind::InvalidData, what.into())
}
