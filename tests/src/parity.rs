//! `parity CASE_DIR OUT.safetensors`: computes a reference case and writes its outputs.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [case, out] = &args[..] else {
        eprintln!("usage: parity CASE_DIR OUT.safetensors");
        return ExitCode::from(2);
    };
    match run(Path::new(case), Path::new(out)) {
        Ok(n) => {
            println!("{n} tensors written to {out}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("parity: {case}: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(case: &Path, out: &Path) -> sequor_tests::Result<usize> {
    let outputs = sequor_tests::run(case)?;
    let list: Vec<(&str, &sequor_nn::Tensor)> =
        outputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    sequor_nn::weights::write_safetensors(out, &list, &Default::default())?;
    Ok(list.len())
}
