//! `sequor bench decode`.

use super::model::resolve;
use crate::args::BenchDecode;
use crate::exit::{Exit, Result, failure, usage};
use sequor_nn::device::Weights;
use sequor_text::bench::{DecodeBench, DecodeReport, bench_decode};
use std::process::{Command, Stdio};

/// Measures decoding speed and prints a table.
pub fn run(a: &BenchDecode) -> Result {
    if a.tokens == 0 || a.repeats == 0 || a.threads == Some(0) {
        return Err(usage(
            "--tokens, --repeats and --threads must be at least 1",
        ));
    }
    let weights = a
        .weights
        .iter()
        .map(|w| w.parse::<Weights>().map_err(usage))
        .collect::<Result<Vec<_>>>()?;
    let report = match weights[..] {
        [] => return Err(usage("--weights must name at least one format")),
        [only] => {
            let path = resolve(&a.model, a.offline)?;
            let bench = DecodeBench {
                weights: vec![only],
                tokens: a.tokens,
                repeats: a.repeats,
                threads: a.threads,
                speculation: !a.plain,
            };
            bench_decode(&path, &bench, |line| eprintln!("{line}"))?
        }
        _ => one_process_each(a, &weights)?,
    };
    println!("{report}");
    if a.json {
        println!("{}", report.to_json());
    }
    Ok(())
}

/// One process per format, so that what one leaves behind in memory does not count
/// for the next.
fn one_process_each(a: &BenchDecode, weights: &[Weights]) -> Result<DecodeReport> {
    let exe = std::env::current_exe().map_err(failure)?;
    let mut whole: Option<DecodeReport> = None;
    for weights in weights {
        let mut child = Command::new(&exe);
        child.args(["bench", "decode", "--json", "--model", &a.model]);
        child.args([
            "--weights",
            &weights.to_string(),
            "--tokens",
            &a.tokens.to_string(),
        ]);
        child.args(["--repeats", &a.repeats.to_string()]);
        child.args(
            a.threads
                .iter()
                .flat_map(|n| ["--threads".to_owned(), n.to_string()]),
        );
        child.args(a.offline.then_some("--offline"));
        child.args(a.plain.then_some("--plain"));
        let output = child.stderr(Stdio::inherit()).output().map_err(failure)?;
        if !output.status.success() {
            return Err(Exit::Failure(format!(
                "measuring {weights} failed (see above)"
            )));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let part = DecodeReport::from_json(text.lines().last().unwrap_or_default())?;
        match &mut whole {
            Some(report) => report.rows.extend(part.rows),
            None => whole = Some(part),
        }
    }
    whole.ok_or_else(|| usage("--weights must name at least one format"))
}
