//! `sequor reproduce`.

use crate::args::Reproduce;
use crate::exit::{Result, cancel_flag, failure, usage};
use sequor_nn::device::DType;
use sequor_text::LoadOptions;
use sequor_text::proofs::{ReproduceOptions, check, reproduce};

/// Runs the proof of a system and prints its verdicts.
pub fn run(a: &Reproduce) -> Result {
    check(a.system)?;
    if a.threads == Some(0) {
        return Err(usage("--threads must be at least 1"));
    }
    if let Some(prompts) = a.prompts.as_ref().filter(|p| !p.is_file()) {
        return Err(usage(format!(
            "--prompts {}: there is no such file",
            prompts.display()
        )));
    }
    let options = ReproduceOptions {
        quick: a.quick,
        train: a.train,
        out: a.out.clone(),
        prompts: a.prompts.clone(),
        model: a.model.clone(),
        load: LoadOptions {
            weights: a.dtype.parse::<DType>().map_err(usage)?.into(),
            threads: a.threads,
            ..LoadOptions::default()
        },
        offline: a.offline,
        command: command(a),
        cancel: cancel_flag()?,
    };
    let outcome = reproduce(a.system, &options, &mut |line| eprintln!("{line}"))?;
    println!("{}", outcome.result);
    let png = outcome.png.as_ref().map(|p| format!(", {}", p.display()));
    println!(
        "{}, {}{}",
        outcome.json.display(),
        outcome.csv.display(),
        png.unwrap_or_default()
    );
    if a.json {
        println!(
            "{}",
            serde_json::to_string(&outcome.result).map_err(failure)?
        );
    }
    Ok(())
}

/// The command that takes the numbers again. Folders of this machine are nobody else's
/// business.
fn command(a: &Reproduce) -> String {
    let mut text = format!("sequor reproduce {}", a.system);
    let mut add = |what: &str| {
        text.push(' ');
        text.push_str(what);
    };
    if a.quick {
        add("--quick");
    }
    if a.train {
        add("--train");
    }
    if a.prompts.is_some() {
        add("--prompts FILE");
    }
    if a.model != "smollm2" {
        add("--model MODEL");
    }
    if a.dtype != "bf16" {
        add(&format!("--dtype {}", a.dtype));
    }
    if let Some(threads) = a.threads {
        add(&format!("--threads {threads}"));
    }
    text
}
