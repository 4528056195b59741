//! `sequor inspect`.

use super::model::resolve;
use crate::args::Inspect;
use crate::exit::{Exit, Result, failure};
use std::io::Write;

/// Shows what is in a model and whether it would load.
pub fn run(a: &Inspect) -> Result {
    let path = resolve(&a.model, a.offline)?;
    let i = sequor_text::inspect(&path)?;
    let mut out = std::io::stdout().lock();
    if a.json {
        let mut json = serde_json::to_value(&i).map_err(failure)?;
        json["path"] = path.display().to_string().into();
        writeln!(out, "{json}")?;
        return Ok(());
    }
    writeln!(out, "{}", path.display())?;
    let width = i.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
    for t in &i.tensors {
        writeln!(
            out,
            "  {:width$}  {:<6} {:>12}  {:?}",
            t.name, t.dtype, t.bytes, t.shape
        )?;
    }
    if let Some(config) = &i.config {
        let text = serde_json::to_string_pretty(config).map_err(failure)?;
        writeln!(out, "config\n  {}", text.replace('\n', "\n  "))?;
    }
    writeln!(
        out,
        "{} tensors, {:.2} M parameters, {:.1} MB",
        i.tensors.len(),
        i.parameters as f64 / 1e6,
        i.bytes as f64 / 1e6
    )?;
    for (dtype, (bytes, n)) in &i.dtypes {
        writeln!(out, "  {dtype}: {n} tensors, {:.1} MB", *bytes as f64 / 1e6)?;
    }
    writeln!(out, "{}", i.verdict)?;
    if i.loads {
        Ok(())
    } else {
        Err(Exit::Failure(format!(
            "{}: the loader would refuse this model (see above)",
            path.display()
        )))
    }
}
