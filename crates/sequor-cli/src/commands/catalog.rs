//! `sequor models` and `sequor data`.

use crate::args::{Catalog, CatalogAction, CatalogKind};
use crate::exit::Result;
use sequor_data::{Kind, Resolver};
use std::io::Write;

/// Lists or fetches.
pub fn run(kind: CatalogKind, a: &Catalog) -> Result {
    let kind = match kind {
        CatalogKind::Models => Kind::Model,
        CatalogKind::Data => Kind::Dataset,
    };
    match &a.action {
        CatalogAction::List { json } => list(kind, *json),
        CatalogAction::Fetch { name, offline } => {
            let resolver = Resolver::from_env().offline(*offline);
            let found = match kind {
                Kind::Model => resolver.resolve_model(name),
                _ => resolver.resolve_data(name),
            };
            let found = found.map_err(sequor_text::Error::from)?;
            println!("{}", found.path.display());
            Ok(())
        }
    }
}

fn list(kind: Kind, json: bool) -> Result {
    let listed = Resolver::from_env().list(kind);
    let mut out = std::io::stdout().lock();
    if json {
        let rows: Vec<_> = listed
            .iter()
            .map(|l| serde_json::json!({"name": l.name, "description": l.description, "licence": l.licence, "bytes": l.size_bytes, "path": l.path}))
            .collect();
        writeln!(out, "{}", serde_json::Value::Array(rows))?;
        return Ok(());
    }
    let width = listed.iter().map(|l| l.name.len()).max().unwrap_or(0);
    for l in listed {
        let size = format!("{:.1} MB", l.size_bytes as f64 / 1e6);
        let here = if l.path.is_some() { "here" } else { "to fetch" };
        let licence = l.licence.unwrap_or_else(|| "no licence stated".into());
        writeln!(
            out,
            "{:width$}  {size:>9}  {here:8}  {licence}\n{:width$}  {}",
            l.name, "", l.description
        )?;
    }
    Ok(())
}
