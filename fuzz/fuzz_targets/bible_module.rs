//! A SWORD module. Compressed data that is valid comes up rarely by chance, so
//! that half of the inputs are compressed here.
#![no_main]

use std::io::Write;

use flate2::{Compression, write::ZlibEncoder};
use libfuzzer_sys::fuzz_target;
use sequor_data::bible::{Bible, TestamentFiles};

fn compressed(text: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
    zlib.write_all(text).ok()?;
    let packed = zlib.finish().ok()?;
    let row =
        [0, packed.len(), text.len()].map(|n| u32::try_from(n).unwrap_or_default().to_le_bytes());
    Some((row.concat(), packed))
}

fuzz_target!(|parts: (bool, Vec<u8>, Vec<u8>, Vec<u8>)| {
    let (compress, bzs, data, bzv) = parts;
    let (bzs, bzz) = compressed(&data)
        .filter(|_| compress)
        .unwrap_or((bzs, data));
    let files = TestamentFiles { bzs, bzz, bzv };
    if let Ok(bible) = Bible::from_files(Some(&files), None) {
        let _ = bible.documents("\n");
    }
    let _ = Bible::from_files(None, Some(&files));
});
