//! `sequor bench kernels`.

use crate::args::BenchKernels;
use crate::exit::{Result, failure, usage};
use sequor_kernels::matmul::measure::measure;
use sequor_kernels::matmul::{Format, Isa};
use sequor_kernels::{bandwidth, cpu, threads};
use serde_json::json;
use std::time::Duration;

/// Most rows and numbers of a matrix that are measured: 1 GB in f32.
const MOST_ROWS: usize = 4096;
const MOST_NUMBERS: usize = 1 << 28;

/// Times products of packed weights and prints a table.
pub fn run(a: &BenchKernels) -> Result {
    let formats = a
        .formats
        .iter()
        .map(|f| f.parse::<Format>().map_err(usage))
        .collect::<Result<Vec<_>>>()?;
    let shapes = a
        .shapes
        .iter()
        .map(|s| shape(s).ok_or_else(|| usage(format!("--shapes: '{s}' is not OUTPUTSxINPUTS, such as 4096x4096, of at most {MOST_NUMBERS} numbers"))))
        .collect::<Result<Vec<_>>>()?;
    if a.repeats == 0 || a.threads == Some(0) {
        return Err(usage("--repeats and --threads must be at least 1"));
    }
    if a.rows.is_empty() || a.rows.iter().any(|r| !(1..=MOST_ROWS).contains(r)) {
        return Err(usage(format!("--rows must be between 1 and {MOST_ROWS}")));
    }
    let isa = Isa::forced().map_err(usage)?.unwrap_or_else(Isa::best);
    let n = a.threads.unwrap_or_else(threads::default_count);
    threads::set(n);
    let load = std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|s| s.split(' ').next().and_then(|x| x.parse::<f64>().ok()));
    let memory = || bandwidth::measure_read(n, Duration::from_millis(500));
    println!(
        "{}; {isa}, {n} thread(s), load {}, medians of {} repeats\n",
        cpu::summary(),
        load.map_or_else(|| "unknown".into(), |l| l.to_string()),
        a.repeats
    );
    println!(
        "| weights | shape | rows | us | GB/s | of bandwidth | c(rows) | GFLOP/s | libtorch us | times as fast |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    for &(outputs, inputs) in &shapes {
        for &format in &formats {
            if format.row_bytes(inputs).is_none() {
                eprintln!("{format} {outputs}x{inputs}: left out, rows are not whole blocks");
                continue;
            }
            // Before each, for it changes with what else the memory serves.
            let limit = memory();
            let all = measure(format, outputs, inputs, &a.rows, a.repeats, n).map_err(failure)?;
            let one = all.first().map_or(f64::NAN, |m| m.seconds);
            for m in &all {
                let rate = m.bytes as f64 / m.seconds;
                let flops = 2.0 * (m.rows * outputs * inputs) as f64 / m.seconds;
                let c = m.seconds / one;
                let (their, times) = match m.libtorch {
                    Some(s) => (format!("{:.0}", 1e6 * s), format!("{:.2}", s / m.seconds)),
                    None => (String::new(), String::new()),
                };
                println!(
                    "| {format} | {outputs}x{inputs} | {} | {:.0} | {:.1} | {:.0} % | {c:.2} | {:.0} | {their} | {times} |",
                    m.rows,
                    1e6 * m.seconds,
                    rate / 1e9,
                    100.0 * rate / limit,
                    flops / 1e9,
                );
                lines.push(
                    json!({"weights": format.to_string(), "outputs": outputs, "inputs": inputs,
                    "rows": m.rows, "seconds": m.seconds, "bytes": m.bytes, "bandwidth": limit,
                    "bandwidth_fraction": rate / limit, "cost": c, "libtorch_seconds": m.libtorch}),
                );
            }
        }
    }
    if a.json {
        println!(
            "{}",
            json!({"machine": cpu::summary(), "isa": isa.to_string(), "threads": n, "load": load,
                "repeats": a.repeats, "products": lines})
        );
    }
    Ok(())
}

/// Reads `4096x576`.
fn shape(s: &str) -> Option<(usize, usize)> {
    let (outputs, inputs) = s.split_once('x')?;
    let (outputs, inputs) = (
        outputs.parse::<usize>().ok()?,
        inputs.parse::<usize>().ok()?,
    );
    let numbers = outputs.checked_mul(inputs)?;
    (1..=MOST_NUMBERS)
        .contains(&numbers)
        .then_some((outputs, inputs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_or_refused() {
        assert_eq!(shape("4096x576"), Some((4096, 576)));
        for bad in [
            "",
            "4096",
            "x5",
            "5x",
            "0x5",
            "-1x5",
            "99999999x99999999",
            "1e3x5",
        ] {
            assert_eq!(shape(bad), None, "{bad}");
        }
    }
}
