//! `sequor doctor`: what was found, and the fix for each failing line.

use crate::args::Doctor;
use crate::exit::{Exit, Result};
use sequor_kernels::matmul::{Format, Isa};
use sequor_kernels::{cpu, cuda, memory, team, threads};
use sequor_nn::{Device, Kind, Tensor, tch};
use std::io::Write;
use std::time::Duration;

/// The libtorch this release is made for.
const LIBTORCH: &str = "2.11.0";

struct Line {
    what: &'static str,
    ok: bool,
    found: String,
    fix: &'static str,
}

/// Prints one line per check.
pub fn run(a: &Doctor) -> Result {
    let lines = checks();
    let mut out = std::io::stdout().lock();
    if a.json {
        let rows: Vec<_> =
            lines.iter().map(|l| serde_json::json!({"check": l.what, "ok": l.ok, "found": l.found, "fix": if l.ok { "" } else { l.fix }})).collect();
        writeln!(out, "{}", serde_json::Value::Array(rows))?;
    } else {
        for l in &lines {
            writeln!(
                out,
                "{} {:<12} {}",
                if l.ok { "ok  " } else { "FAIL" },
                l.what,
                l.found
            )?;
            if !l.ok {
                writeln!(out, "     {:<12} fix: {}", "", l.fix)?;
            }
        }
    }
    match lines.iter().filter(|l| !l.ok).count() {
        0 => Ok(()),
        n => Err(Exit::Failure(format!("{n} check(s) failed"))),
    }
}

fn checks() -> Vec<Line> {
    let mut lines = Vec::new();
    let mut add = |what, ok, found: String, fix| {
        lines.push(Line {
            what,
            ok,
            found,
            fix,
        })
    };

    let library = loaded_library("libtorch_cpu")
        .unwrap_or_else(|| "loaded (path unknown on this system)".into());
    let sum = Tensor::f_ones([2, 3], (Kind::Float, Device::Cpu))
        .and_then(|t| t.f_sum(Kind::Float))
        .and_then(|t| t.f_double_value(&[]));
    let works = matches!(sum, Ok(6.0));
    add(
        "libtorch",
        works,
        library.clone(),
        "run `make setup`, or set LIBTORCH to a libtorch 2.11.0 folder and build again",
    );

    let version = library_version(&library);
    let right = version.as_deref().is_none_or(|v| v.starts_with(LIBTORCH));
    let text =
        version.unwrap_or_else(|| "unknown (no build-version file beside the library)".into());
    add(
        "version",
        right,
        format!("{text} (this release is made for {LIBTORCH}, tch 0.24)"),
        "run `scripts/setup --force`, then build again",
    );
    add(
        "abi",
        true,
        "C++11 (libstdc++ strings), as libtorch 2.11 is built".into(),
        "",
    );

    let found = cuda::find(&cuda::default_dirs());
    let cuda_text = match &found {
        None => "not there: --device cuda is off, everything else works".to_owned(),
        Some(path) => match cuda::open(&cuda::default_dirs()) {
            Ok(_) if tch::Cuda::is_available() => {
                format!("{} ({} GPU(s))", path.display(), tch::Cuda::device_count())
            }
            Ok(_) => format!("{}: opens, and sees no GPU", path.display()),
            Err(e) => format!("{}: {e}", path.display()),
        },
    };
    add("cuda", true, cuda_text, "");

    let features = cpu::Features::detect();
    let model = cpu::model_name().unwrap_or_else(|| "unknown processor".into());
    add(
        "cpu",
        true,
        format!(
            "{model}, {} cores ({} logical): {features}",
            cpu::physical_cores(),
            cpu::logical_cores()
        ),
        "",
    );

    let kernels = if Isa::serve() {
        let team = if team::available() {
            "on libtorch's threads"
        } else {
            "on one thread: libtorch's OpenMP was not found"
        };
        format!(
            "{} (bf16: {}), {team}",
            Isa::chosen(),
            Isa::chosen().serving(Format::Bf16)
        )
    } else {
        "none for this processor, or switched off: libtorch computes plain weights".into()
    };
    add("kernels", true, kernels, "");

    let n = threads::default_count();
    threads::set(n);
    let probe = threads::probe();
    let text = format!(
        "{n}; a parallel region takes {:.0} us",
        probe.parallel_region_us
    );
    add(
        "threads",
        !probe.busy,
        text,
        "other programs keep the cores busy: wait for them, or use --threads 1",
    );

    let bandwidth = sequor_kernels::bandwidth::measure_read(n, Duration::from_millis(500));
    add(
        "memory",
        bandwidth > 0.0,
        format!(
            "reads at {:.1} GB/s, {} MB in use",
            bandwidth / 1e9,
            memory::current_rss_bytes().unwrap_or(0) >> 20
        ),
        "",
    );

    let cache = sequor_data::Cache::from_env();
    match cache {
        Ok(cache) => {
            let root = cache.root().to_path_buf();
            let writable = std::fs::create_dir_all(&root).and_then(|()| {
                let probe = root.join(format!(".doctor-{}", std::process::id()));
                std::fs::write(&probe, b"")?;
                std::fs::remove_file(&probe)
            });
            let text = match &writable {
                Ok(()) => root.display().to_string(),
                Err(e) => format!("{}: {e}", root.display()),
            };
            add(
                "cache",
                writable.is_ok(),
                text,
                "make the folder writable, or set XDG_CACHE_HOME to one that is",
            );
        }
        Err(e) => add("cache", false, e.to_string(), "set HOME or XDG_CACHE_HOME"),
    }

    let models = sequor_data::Resolver::from_env()
        .offline(true)
        .list(sequor_data::Kind::Model);
    let here: Vec<&str> = models
        .iter()
        .filter(|m| m.path.is_some())
        .map(|m| m.name.as_str())
        .collect();
    let text = if here.is_empty() {
        "none fetched yet (sequor models list)".to_owned()
    } else {
        here.join(", ")
    };
    add("models", true, text, "");
    lines
}

/// Path of a loaded library, on Linux.
fn loaded_library(name: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|l| l.split_whitespace().last())
        .find(|p| p.contains(name))
        .map(str::to_owned)
}

/// The version written beside the library.
fn library_version(library: &str) -> Option<String> {
    let lib = std::path::Path::new(library).parent()?;
    let text = std::fs::read_to_string(lib.parent()?.join("build-version")).ok()?;
    text.lines().next().map(str::to_owned)
}
