//! `sequor systems`.

use crate::args::Systems;
use crate::exit::{Result, failure, usage};
use sequor_data::{Resolver, human_bytes};
use sequor_eval::systems;
use sequor_nn::weights::write_atomic;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What the table stands between in a Markdown file.
const MARKS: [&str; 2] = ["<!-- systems: begin -->", "<!-- systems: end -->"];
/// Where results lie in a checkout.
const RESULTS: &str = "docs/results";

/// Prints all systems with the verdicts of their proofs.
pub fn run(a: &Systems) -> Result {
    let bundled = Resolver::from_env().bundled_dirs;
    let results = match &a.results {
        Some(dir) if !dir.is_dir() => {
            let what = format!("--results {}: there is no such folder", dir.display());
            return Err(usage(what));
        }
        Some(dir) => dir.clone(),
        // `models/` lies in the root of the checkout.
        None => bundled
            .iter()
            .filter_map(|models| models.parent())
            .map(|root| root.join(RESULTS))
            .find(|dir| dir.is_dir())
            .unwrap_or_else(|| PathBuf::from(RESULTS)),
    };
    if let Some(file) = &a.update {
        return update(file, &systems::markdown(&results));
    }
    if a.markdown {
        print!("{}", systems::markdown(&results));
    } else if a.json {
        println!("{}", systems::json(&results));
    } else {
        print!("{}", systems::plain(&results));
        if let Some(models) = bundled.first() {
            let bytes = size(models, 8).map_err(failure)?;
            println!("\nbundled models: {}", human_bytes(bytes));
        }
    }
    Ok(())
}

/// Bytes of the files in a folder, at most `depth` folders deep; links are not followed.
fn size(dir: &Path, depth: usize) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_file() {
            bytes += meta.len();
        } else if meta.is_dir() && depth > 0 {
            bytes += size(&entry.path(), depth - 1)?;
        }
    }
    Ok(bytes)
}

/// Replaces what stands between the marks of a file.
fn update(file: &Path, table: &str) -> Result {
    let text =
        std::fs::read_to_string(file).map_err(|e| failure(format!("{}: {e}", file.display())))?;
    let [begin, end] = MARKS;
    let parts = text
        .split_once(begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let Some((before, after)) = parts else {
        return Err(usage(format!(
            "{} has no lines '{begin}' and '{end}' for the table to stand between",
            file.display()
        )));
    };
    let new = format!("{before}{begin}\n{table}{end}{after}");
    if new == text {
        return Ok(());
    }
    write_atomic(file, |out| {
        out.write_all(new.as_bytes())
            .map_err(|e| sequor_nn::Error::io(file, e))
    })
    .map_err(failure)
}
