//! `sequor verify`.

use super::model::{acceptance, load, load_options};
use crate::args::Verify;
use crate::exit::{Result, cancel_flag, failure, usage};
use sequor_text::TextOptions;
use sequor_text::verify::{VerifyOptions, verify};

/// Tests a method on the user's models; fails when it is not lossless.
pub fn run(a: &Verify) -> Result {
    let loading = load_options(&a.model)?;
    let method = match (a.method.as_str(), &a.draft) {
        ("draft", Some(model)) => format!("draft={model}"),
        ("draft", None) => return Err(usage("--method draft needs --draft MODEL")),
        (_, Some(_)) => return Err(usage("--draft is for --method draft")),
        (method, None) => method.to_owned(),
    };
    let options = TextOptions {
        speculate: method.parse()?,
        depth: a.draft_depth.parse()?,
        shape: a.topology.parse()?,
        tree_nodes: a.tree_nodes,
        acceptance: acceptance(&a.acceptance)?,
        ..TextOptions::default()
    };
    options.validate()?;
    let how = VerifyOptions {
        prompts: a.prompts,
        tokens: a.tokens,
        draws: a.draws,
        choices: a.choices,
        ..VerifyOptions::default()
    };
    let cancel = cancel_flag()?;
    let pipeline = load(&a.model, &loading, &options, a.heads.as_deref())?;
    let mut progress = |line: &str| eprintln!("{line}");
    let report = verify(&pipeline, &options, &how, &mut progress, &cancel)?;
    println!("{report}");
    if a.json {
        println!("{}", serde_json::to_string(&report).map_err(failure)?);
    }
    if report.passes() {
        Ok(())
    } else {
        Err(failure("the method is not proved lossless on these models"))
    }
}
