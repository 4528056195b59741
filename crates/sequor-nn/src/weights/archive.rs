//! The directory of a zip archive as `torch.save` writes it: entries stored
//! without compression, so that each is a plain byte range of the file.
//!
//! Reading only this much keeps a checkpoint mapped instead of unpacked, and
//! reserves no memory on the word of a header: every entry that is remembered
//! was really there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};

/// Where the content of one archive member lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Member {
    /// Stored as it is, at this position in the file.
    Stored(Range<usize>),
    /// Compressed or encrypted; the number is zip's compression method.
    Packed(u16),
}

/// Start of a zip file with at least one member.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

const END: &[u8] = b"PK\x05\x06";
const END_LEN: usize = 22;
const END64: &[u8] = b"PK\x06\x06";
const END64_LOCATOR: &[u8] = b"PK\x06\x07";
const END64_LOCATOR_LEN: usize = 20;
const CENTRAL: &[u8] = b"PK\x01\x02";
const CENTRAL_LEN: usize = 46;
const LOCAL_LEN: usize = 30;
/// In a 32-bit field: the real value is in the zip64 extra field.
const IN_ZIP64: u64 = 0xFFFF_FFFF;
const ZIP64_EXTRA: u16 = 1;
const ENCRYPTED: u16 = 1;

/// Reads the directory of `file`, with at most `max_members` members.
pub(super) fn members(
    path: &Path,
    file: &[u8],
    max_members: usize,
) -> Result<BTreeMap<String, Member>> {
    let zip = Zip { path, file };
    let (count, mut at) = zip.end()?;
    if count > max_members as u64 {
        return Err(Error::Limits(format!(
            "{}: {count} archive members, at most {max_members} are allowed",
            path.display()
        )));
    }
    let mut members = BTreeMap::new();
    for _ in 0..count {
        let (name, member, next) = zip.central(at)?;
        at = next;
        if members.contains_key(&name) {
            return Err(zip.bad(&format!("the member '{name}' occurs twice")));
        }
        members.insert(name, member);
    }
    Ok(members)
}

struct Zip<'a> {
    path: &'a Path,
    file: &'a [u8],
}

impl<'a> Zip<'a> {
    fn bad(&self, what: &str) -> Error {
        Error::weights(
            self.path,
            format!("{what}; the zip archive is truncated or damaged, fetch or save it again"),
        )
    }

    /// `len` bytes at `at`, which must start with `magic`.
    fn record(&self, at: u64, len: usize, magic: &[u8], what: &str) -> Result<&'a [u8]> {
        usize::try_from(at)
            .ok()
            .and_then(|at| self.file.get(at..)?.get(..len))
            .filter(|record| record.starts_with(magic))
            .ok_or_else(|| self.bad(&format!("no {what} at byte {at}")))
    }

    /// Number of members and position of the central directory.
    fn end(&self) -> Result<(u64, u64)> {
        // The end record is last, but for a comment of up to 64 KB.
        let last = self.file.len().saturating_sub(END_LEN);
        let first = last.saturating_sub(usize::from(u16::MAX));
        let at = (first..=last).rev().find(|&at| {
            self.file.get(at..).is_some_and(|tail| {
                tail.starts_with(END)
                    && tail.len() >= END_LEN
                    && tail.len() == END_LEN + usize::from(u16_at(tail, 20))
            })
        });
        let Some(at) = at else {
            return Err(self.bad("the end of the archive directory is missing"));
        };
        let end = &self.file[at..];
        let locator = at
            .checked_sub(END64_LOCATOR_LEN)
            .map(|at| &self.file[at..])
            .filter(|locator| locator.starts_with(END64_LOCATOR));
        if let Some(locator) = locator {
            let end64 = self.record(u64_at(locator, 8), 56, END64, "zip64 directory end")?;
            return Ok((u64_at(end64, 32), u64_at(end64, 48)));
        }
        Ok((u16_at(end, 10).into(), u32_at(end, 16).into()))
    }

    /// The central directory entry at `at`: name, content, position of the next.
    fn central(&self, at: u64) -> Result<(String, Member, u64)> {
        let head = self.record(at, CENTRAL_LEN, CENTRAL, "directory entry")?;
        let [name_len, extra_len, comment_len] =
            [28, 30, 32].map(|field| usize::from(u16_at(head, field)));
        let whole = self.record(
            at,
            CENTRAL_LEN + name_len + extra_len + comment_len,
            CENTRAL,
            "entry",
        )?;
        let (name, rest) = whole[CENTRAL_LEN..].split_at(name_len);
        let name = std::str::from_utf8(name)
            .map_err(|_| self.bad(&format!("the member name at byte {at} is not UTF-8")))?;

        let [packed_len, len, local] = self.sizes(
            name,
            [20, 24, 42].map(|field| u32_at(head, field)),
            &rest[..extra_len],
        )?;
        let (flags, method) = (u16_at(head, 8), u16_at(head, 10));
        let member = if method == 0 && flags & ENCRYPTED == 0 {
            if packed_len != len {
                return Err(self.bad(&format!("'{name}' is stored but has two sizes")));
            }
            Member::Stored(self.content(name, local, len)?)
        } else {
            Member::Packed(method)
        };
        Ok((name.to_owned(), member, at + whole.len() as u64))
    }

    /// Replaces the 32-bit fields that overflowed by their zip64 values, which
    /// the extra field lists in the order size, packed size, local position.
    fn sizes(&self, name: &str, fields: [u32; 3], extra: &[u8]) -> Result<[u64; 3]> {
        let [mut packed_len, mut len, mut local] = fields.map(u64::from);
        let mut wide = zip64_extra(extra).chunks_exact(8);
        for field in [&mut len, &mut packed_len, &mut local] {
            if *field == IN_ZIP64 {
                let value = wide.next().map(|bytes| u64_at(bytes, 0));
                *field = value.ok_or_else(|| self.bad(&format!("'{name}' lacks its size")))?;
            }
        }
        Ok([packed_len, len, local])
    }

    /// Position of the content whose local header is at `local`.
    fn content(&self, name: &str, local: u64, len: u64) -> Result<Range<usize>> {
        let head = self.record(local, LOCAL_LEN, MAGIC, "local header")?;
        let skip = LOCAL_LEN + usize::from(u16_at(head, 26)) + usize::from(u16_at(head, 28));
        let start = local.checked_add(skip as u64);
        let end = start.and_then(|start| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.file.len() as u64 => {
                Ok(start as usize..end as usize)
            }
            _ => Err(self.bad(&format!("'{name}' ends beyond the file"))),
        }
    }
}

/// The content of the zip64 extra field, empty when there is none.
fn zip64_extra(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_first_chunk::<4>() {
        let Some((content, next)) = rest.split_at_checked(usize::from(u16_at(head, 2))) else {
            break;
        };
        if u16_at(head, 0) == ZIP64_EXTRA {
            return content;
        }
        extra = next;
    }
    &[]
}

// The callers below have checked that the record is long enough.

fn u16_at(record: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([record[at], record[at + 1]])
}

fn u32_at(record: &[u8], at: usize) -> u32 {
    u32::from(u16_at(record, at)) | u32::from(u16_at(record, at + 2)) << 16
}

fn u64_at(record: &[u8], at: usize) -> u64 {
    u64::from(u32_at(record, at)) | u64::from(u32_at(record, at + 4)) << 32
}
