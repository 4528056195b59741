//! Cases without weights: processors, drafters, verifiers.

use crate::{Outputs, Result};
use sequor_nn::{Kind, Tensor};
use sequor_sampling::draft::PromptLookup;
use sequor_sampling::processors::{Context, LogitsProcessor, ProcessorList};
use sequor_sampling::verify::{Acceptance, speculative_sampling};
use sequor_sampling::{Categorical, GenerationConfig};
use serde_json::Value;
use std::collections::BTreeMap;

/// Classes that this module runs.
pub const CLASSES: [&str; 3] = [
    "LogitsProcessorList",
    "PromptLookupCandidateGenerator",
    "SpeculativeSampling",
];

/// Runs a case of one of [`CLASSES`].
pub fn run(class: &str, case: &Value, inputs: &BTreeMap<String, Tensor>) -> Result<Outputs> {
    match class {
        "LogitsProcessorList" => processors(case, inputs),
        "PromptLookupCandidateGenerator" => prompt_lookup(case, inputs),
        "SpeculativeSampling" => speculative(case, inputs),
        _ => Err(format!("class '{class}' is not supported yet").into()),
    }
}

fn input<'a>(inputs: &'a BTreeMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    inputs
        .get(name)
        .ok_or_else(|| format!("the inputs hold no tensor {name}").into())
}

/// Rows of a matrix as numbers.
fn rows(inputs: &BTreeMap<String, Tensor>, name: &str) -> Result<Vec<Vec<f64>>> {
    let t = input(inputs, name)?.f_to_kind(Kind::Double)?;
    let t = if t.dim() == 1 { t.f_unsqueeze(-1)? } else { t };
    (0..t.size()[0])
        .map(|i| Ok(Vec::try_from(t.f_get(i)?.f_reshape([-1])?.f_contiguous()?)?))
        .collect()
}

fn ids(row: &[f64]) -> Vec<u32> {
    row.iter().map(|&x| x as u32).collect()
}

fn number(value: &Value, name: &str) -> Result<usize> {
    value[name]
        .as_u64()
        .map(|n| n as usize)
        .ok_or_else(|| format!("{name} is missing").into())
}

fn matrix<T: sequor_nn::tch::kind::Element + Copy>(rows: &[Vec<T>]) -> Result<Tensor> {
    let flat: Vec<T> = rows.iter().flatten().copied().collect();
    Ok(Tensor::f_from_slice(&flat)?.f_reshape([rows.len() as i64, -1])?)
}

fn processors(case: &Value, inputs: &BTreeMap<String, Tensor>) -> Result<Outputs> {
    let (history, scores, keep) = (
        rows(inputs, "history")?,
        rows(inputs, "scores")?,
        rows(inputs, "scores_keep")?,
    );
    let unconditional = rows(inputs, "unconditional_scores")?;
    let mut outputs = Outputs::new();
    for entry in case["configs"].as_array().ok_or("configs are missing")? {
        let name = entry["name"].as_str().ok_or("a config has no name")?;
        let config: GenerationConfig = serde_json::from_value(entry["generation_config"].clone())?;
        let list = ProcessorList::from_config(&config)?;
        let (prompt_len, length) = (number(entry, "prompt_len")?, number(entry, "length")?);
        let (mut out, mut kept) = (Vec::new(), Vec::new());
        for row in entry["rows"].as_array().ok_or("rows are missing")? {
            let row = row.as_u64().ok_or("a row is not a number")? as usize;
            let tokens = ids(&history[row][..length]);
            let raw: Vec<f32> = unconditional[row].iter().map(|&x| x as f32).collect();
            let context = Context {
                unconditional: Some(&raw),
                max_length: config.max_length,
                ..Context::new(&tokens, prompt_len)
            };
            let masked = |(&s, &k): (&f64, &f64)| {
                if k == 0.0 {
                    f32::NEG_INFINITY
                } else {
                    s as f32
                }
            };
            let mut row: Vec<f32> = scores[row].iter().zip(&keep[row]).map(masked).collect();
            list.process(&context, &mut row)?;
            kept.push(
                row.iter()
                    .map(|&s| i64::from(s != f32::NEG_INFINITY))
                    .collect::<Vec<_>>(),
            );
            out.push(
                row.into_iter()
                    .map(|s| if s == f32::NEG_INFINITY { 0.0 } else { s })
                    .collect::<Vec<f32>>(),
            );
        }
        outputs.insert(format!("scores_{name}"), matrix(&out)?);
        outputs.insert(format!("keep_{name}"), matrix(&kept)?);
    }
    Ok(outputs)
}

fn prompt_lookup(case: &Value, inputs: &BTreeMap<String, Tensor>) -> Result<Outputs> {
    let (histories, lengths) = (rows(inputs, "histories")?, rows(inputs, "lengths")?);
    let width = case["outputs"]["candidates"][1]
        .as_u64()
        .ok_or("the width of candidates is missing")? as usize;
    let options = case["options"].as_array().ok_or("options are missing")?;
    let (mut candidates, mut counts) = (Vec::new(), Vec::new());
    for ((history, length), option) in histories.iter().zip(&lengths).zip(options) {
        let lookup = PromptLookup {
            num_output_tokens: number(option, "num_output_tokens")?,
            max_matching_ngram_size: number(option, "max_matching_ngram_size")?,
        };
        let eos: Vec<u32> = match &option["eos_token_id"] {
            Value::Array(list) => list
                .iter()
                .filter_map(|v| v.as_u64().map(|n| n as u32))
                .collect(),
            v => v.as_u64().map(|n| n as u32).into_iter().collect(),
        };
        let found = lookup.candidates(
            &ids(&history[..length[0] as usize]),
            number(option, "max_length")?,
            &eos,
        );
        counts.push(found.len() as i64);
        let mut row: Vec<i64> = found.iter().map(|&t| i64::from(t)).collect();
        row.resize(width, -1);
        candidates.push(row);
    }
    let counts = Tensor::f_from_slice(&counts)?;
    Ok(BTreeMap::from([
        ("candidates".to_owned(), matrix(&candidates)?),
        ("counts".to_owned(), counts),
    ]))
}

fn speculative(case: &Value, inputs: &BTreeMap<String, Tensor>) -> Result<Outputs> {
    let candidates = rows(inputs, "candidate_ids")?;
    let (accept, draw) = (
        rows(inputs, "accept_uniforms")?,
        rows(inputs, "draw_uniforms")?,
    );
    let weight = case["ensemble_weight"]
        .as_f64()
        .ok_or("ensemble_weight is missing")?;
    let laws = |name: &str| -> Result<Vec<Vec<Categorical>>> {
        let t = input(inputs, name)?;
        (0..t.size()[0])
            .map(|i| {
                let block = BTreeMap::from([(name.to_owned(), t.f_get(i)?)]);
                rows(&block, name)?
                    .iter()
                    .map(|row| {
                        Ok(Categorical::from_scores(
                            row.iter().map(|&x| x as f32).collect::<Vec<_>>(),
                        )?)
                    })
                    .collect()
            })
            .collect()
    };
    let (q, p) = (laws("candidate_logits")?, laws("new_logits")?);
    let mut outputs = Outputs::new();
    for (prefix, acceptance) in [
        ("", Acceptance::Exact),
        ("ensemble_", Acceptance::Ensemble { weight }),
    ] {
        let (mut matches, mut tokens, mut next) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..candidates.len() {
            let drafts = ids(&candidates[i]);
            let verdict =
                speculative_sampling(&drafts, &q[i], &p[i], &accept[i], draw[i][0], acceptance)?;
            matches.push(verdict.n_matches as i64);
            let mut row: Vec<i64> = verdict.tokens.iter().map(|&t| i64::from(t)).collect();
            row.resize(drafts.len() + 1, -1);
            tokens.push(row);
            next.push(
                verdict
                    .next
                    .to_probs()
                    .iter()
                    .map(|&x| x as f32)
                    .collect::<Vec<f32>>(),
            );
        }
        outputs.insert(
            format!("{prefix}n_matches"),
            Tensor::f_from_slice(&matches)?,
        );
        outputs.insert(format!("{prefix}tokens"), matrix(&tokens)?);
        outputs.insert(format!("{prefix}next_distribution"), matrix(&next)?);
    }
    Ok(outputs)
}
