//! `sequor quantize`.

use super::model::resolve;
use crate::args::Quantize;
use crate::exit::{Result, failure, usage};
use sequor_nn::device::Weights;
use sequor_text::QuantiseOptions;
use std::io::Write;

/// Writes a model in another format.
pub fn run(a: &Quantize) -> Result {
    let format = |name: &String| match name.parse::<Weights>() {
        Ok(Weights::Auto) => Err(usage(
            "auto keeps a file as it is: name the format to write",
        )),
        other => other.map_err(usage),
    };
    let options = QuantiseOptions {
        to: format(&a.to)?,
        tables: a.tables.as_ref().map(format).transpose()?,
        overwrite: a.overwrite,
    };
    let from = resolve(&a.model, a.offline)?;
    let bar = indicatif::ProgressBar::new(0);
    let report = sequor_text::quantise(&from, &a.out, &options, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if a.json {
        let json = serde_json::to_string(&report).map_err(failure)?;
        writeln!(out, "{json}")?;
        return Ok(());
    }
    writeln!(out, "{}", report.path.display())?;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    writeln!(
        out,
        "{:.1} MB, {:.1} MB before",
        mb(report.bytes.1),
        mb(report.bytes.0)
    )?;
    for (format, (count, bytes)) in &report.formats {
        writeln!(out, "  {format}: {count} tensors, {:.1} MB", mb(*bytes))?;
    }
    if let Some((name, format)) = report.other.first() {
        writeln!(
            out,
            "{} matrices have rows that {} cannot keep (whole blocks are needed); {name} is {format}",
            report.other.len(),
            a.to
        )?;
    }
    if report.relative_error > 0.0 {
        writeln!(
            out,
            "rounding changed the converted matrices by {:.2} % (root mean square)",
            100.0 * report.relative_error
        )?;
    }
    Ok(())
}
