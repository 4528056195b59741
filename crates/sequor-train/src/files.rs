//! Files that are either there whole or not at all.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use sequor_nn::weights;

use crate::{Error, Result};

/// Writes `bytes` under a temporary name, makes them durable, and renames.
///
/// # Errors
/// When the file cannot be written; what `path` held before is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    weights::write_atomic(path, |file| {
        file.write_all(bytes)
            .map_err(|e| sequor_nn::Error::io(path, e))
    })?;
    Ok(())
}

/// Makes the names in a folder durable.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be opened.
pub fn sync_dir(dir: &Path) -> Result<()> {
    // Only Unix can flush a folder.
    #[cfg(unix)]
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io(dir, e))?;
    Ok(())
}
