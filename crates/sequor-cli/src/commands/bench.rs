//! `sequor bench decode`.

use super::model::resolve;
use crate::args::BenchDecode;
use crate::exit::{Result, usage};
use sequor_nn::device::DType;
use sequor_text::bench::{DecodeBench, bench_decode};

/// Measures decoding speed and prints a table.
pub fn run(a: &BenchDecode) -> Result {
    if a.tokens == 0 || a.repeats == 0 || a.threads == Some(0) {
        return Err(usage(
            "--tokens, --repeats and --threads must be at least 1",
        ));
    }
    let dtypes = a
        .dtypes
        .iter()
        .map(|d| d.parse::<DType>().map_err(usage))
        .collect::<Result<Vec<_>>>()?;
    let path = resolve(&a.model, a.offline)?;
    let bench = DecodeBench {
        dtypes,
        tokens: a.tokens,
        repeats: a.repeats,
        threads: a.threads,
    };
    let report = bench_decode(&path, &bench, |line| eprintln!("{line}"))?;
    println!("{report}");
    if a.json {
        println!("{}", report.to_json());
    }
    Ok(())
}
