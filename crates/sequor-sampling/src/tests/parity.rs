//! Reference vectors of Hugging Face `transformers`.

use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::distribution::DiagonalGaussian;
use crate::draft::PromptLookup;
use crate::processors::{Context, LogitsProcessor, ProcessorList};
use crate::verify::{
    self, Acceptance, AlignedRule, GroupRule, LastStep, grouped_window, speculative_sampling,
    squared_distances, typical_paths,
};
use crate::{Categorical, GenerationConfig};

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/parity")
        .join(case)
}

/// Whether a case that the repository may not hold is there. `SEQUOR_PARITY` names a
/// folder of further cases.
fn optional(case: &str) -> Option<PathBuf> {
    let further = std::env::var_os("SEQUOR_PARITY").map(|root| PathBuf::from(root).join(case));
    let found = std::iter::once(folder(case))
        .chain(further)
        .find(|path| path.is_dir());
    if found.is_none() {
        println!("skipped: no folder tests/parity/{case}");
    }
    found
}

fn json(case: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(case).join(file)).unwrap()).unwrap()
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn open(case: &str, file: &str) -> Self {
        Self(std::fs::read(folder(case).join(file)).unwrap())
    }
    fn at(path: PathBuf) -> Self {
        Self(std::fs::read(path).unwrap())
    }
    fn bytes(&self, name: &str) -> (Vec<u8>, usize) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        (
            view.data().to_vec(),
            view.shape().last().copied().unwrap_or(1),
        )
    }
    /// Rows along the last dimension.
    fn floats(&self, name: &str) -> Vec<Vec<f32>> {
        let (bytes, width) = self.bytes(name);
        let all: Vec<f32> = bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        all.chunks(width).map(<[f32]>::to_vec).collect()
    }
    /// Numbers of a tensor of bf16.
    fn halves(&self, name: &str) -> Vec<f32> {
        let (bytes, _) = self.bytes(name);
        let wide = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        bytes.chunks(2).map(wide).collect()
    }
    fn integers(&self, name: &str) -> Vec<Vec<i64>> {
        let (bytes, width) = self.bytes(name);
        let all: Vec<i64> = bytes
            .chunks(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
            .collect();
        all.chunks(width).map(<[i64]>::to_vec).collect()
    }
}

fn ids(row: &[i64]) -> Vec<u32> {
    row.iter()
        .take_while(|&&t| t >= 0)
        .map(|&t| t as u32)
        .collect()
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 5e-4 + 2e-3 * expected.abs()
}

#[test]
fn hugging_face_processors() {
    let case = json("hf_processors", "case.json");
    let inputs = Tensors::open("hf_processors", "inputs.safetensors");
    let expected = Tensors::open("hf_processors", "expected.safetensors");
    let (scores, keep) = (inputs.floats("scores"), inputs.integers("scores_keep"));
    let (history, unconditional) = (
        inputs.integers("history"),
        inputs.floats("unconditional_scores"),
    );
    let configs = case["configs"].as_array().unwrap();
    assert_eq!(configs.len(), 49);
    for config in configs {
        let name = config["name"].as_str().unwrap();
        let options =
            GenerationConfig::from_json(&config["generation_config"].to_string()).unwrap();
        options.validate(48).unwrap();
        let list = ProcessorList::from_config(&options).unwrap();
        // The list survives being written down.
        let list: ProcessorList =
            serde_json::from_str(&serde_json::to_string(&list).unwrap()).unwrap();
        let (want, want_keep) = (
            expected.floats(&format!("scores_{name}")),
            expected.integers(&format!("keep_{name}")),
        );
        for (i, row) in config["rows"].as_array().unwrap().iter().enumerate() {
            let row = row.as_u64().unwrap() as usize;
            let input = scores[row].iter().zip(&keep[row]);
            let mut found: Vec<f32> = input
                .map(|(&s, &k)| if k == 1 { s } else { f32::NEG_INFINITY })
                .collect();
            let tokens = ids(&history[row][..config["length"].as_u64().unwrap() as usize]);
            let ctx = Context {
                tokens: &tokens,
                prompt_len: config["prompt_len"].as_u64().unwrap() as usize,
                unconditional: Some(&unconditional[row]),
                max_length: options.max_length,
            };
            list.process(&ctx, &mut found).unwrap();
            for (token, &score) in found.iter().enumerate() {
                let at = format!("config {name}, row {row}, token {token}");
                assert_eq!(
                    score > f32::NEG_INFINITY,
                    want_keep[i][token] == 1,
                    "{at}: kept"
                );
                if score > f32::NEG_INFINITY {
                    let want = want[i][token];
                    assert!(
                        close(f64::from(score), f64::from(want)),
                        "{at}: {score} instead of {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn hugging_face_prompt_lookup() {
    let case = json("hf_prompt_lookup", "case.json");
    let inputs = Tensors::open("hf_prompt_lookup", "inputs.safetensors");
    let expected = Tensors::open("hf_prompt_lookup", "expected.safetensors");
    let lengths: Vec<i64> = inputs.integers("lengths").concat();
    let counts: Vec<i64> = expected.integers("counts").concat();
    for (i, options) in case["options"].as_array().unwrap().iter().enumerate() {
        let number = |name: &str| options[name].as_u64().unwrap() as usize;
        let lookup = PromptLookup {
            num_output_tokens: number("num_output_tokens"),
            max_matching_ngram_size: number("max_matching_ngram_size"),
        };
        let eos: Vec<u32> = options["eos_token_id"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect();
        let history = ids(&inputs.integers("histories")[i][..lengths[i] as usize]);
        let found = lookup.candidates(&history, number("max_length"), &eos);
        assert_eq!(
            found,
            ids(&expected.integers("candidates")[i]),
            "history {i}"
        );
        assert_eq!(found.len() as i64, counts[i]);
    }
}

#[test]
fn hugging_face_speculative_sampling() {
    let weight = json("hf_speculative", "config.json")["ensemble_weight"]
        .as_f64()
        .unwrap();
    let inputs = Tensors::open("hf_speculative", "inputs.safetensors");
    let expected = Tensors::open("hf_speculative", "expected.safetensors");
    let laws = |name: &str| -> Vec<Categorical> {
        inputs
            .floats(name)
            .into_iter()
            .map(|row| Categorical::from_scores(row).unwrap())
            .collect()
    };
    let (q, p) = (laws("candidate_logits"), laws("new_logits"));
    let draw: Vec<f32> = inputs.floats("draw_uniforms").concat();
    for (prefix, acceptance) in [
        ("", Acceptance::Exact),
        ("ensemble_", Acceptance::Ensemble { weight }),
    ] {
        let matches: Vec<i64> = expected.integers(&format!("{prefix}n_matches")).concat();
        for i in 0..matches.len() {
            let candidates = ids(&inputs.integers("candidate_ids")[i]);
            let uniforms: Vec<f64> = inputs.floats("accept_uniforms")[i]
                .iter()
                .map(|&u| f64::from(u))
                .collect();
            let (q, p) = (&q[4 * i..4 * i + 4], &p[5 * i..5 * i + 5]);
            let found =
                speculative_sampling(&candidates, q, p, &uniforms, f64::from(draw[i]), acceptance)
                    .unwrap();
            assert_eq!(found.n_matches as i64, matches[i], "{prefix}row {i}");
            assert_eq!(
                found.tokens,
                ids(&expected.integers(&format!("{prefix}tokens"))[i]),
                "{prefix}row {i}"
            );
            let want = &expected.floats(&format!("{prefix}next_distribution"))[i];
            for (f, &w) in found.next.to_probs().iter().zip(want) {
                assert!(close(*f, f64::from(w)), "{prefix}row {i}");
            }
        }
    }
}

#[test]
fn grouped_speculative_decoding() {
    let Some(case) = optional("gsd") else { return };
    let inputs = Tensors::at(case.join("inputs.safetensors"));
    let expected = Tensors::at(case.join("expected.safetensors"));
    let embeddings =
        Tensors::at(case.join("model.safetensors")).halves("model.embed_tokens.weight");
    let distances = squared_distances(&embeddings, 8).unwrap();
    for (found, want) in distances
        .iter()
        .flatten()
        .zip(expected.floats("distances").concat())
    {
        assert!(close(f64::from(*found), f64::from(want)));
    }
    let laws = |name: &str| -> Vec<Categorical> {
        let rows = inputs.floats(name).into_iter();
        rows.map(|row| Categorical::from_scores(row).unwrap())
            .collect()
    };
    let (p, q) = (laws("target_logits"), laws("draft_logits"));
    let drafts = ids(&inputs.integers("draft_tokens")[0]);
    let fresh = ids(&inputs.integers("target_tokens")[0]);
    let rule = GroupRule {
        alone_at_the_bottom: true,
        ..GroupRule::default()
    };
    let group = |slot: usize| {
        let token = drafts[slot + 1];
        let distance = |id: u32| f64::from(distances[token as usize][id as usize]);
        rule.group(&p[slot].to_probs(), token, distance)
    };
    let groups: Vec<Vec<u32>> = (0..drafts.len() - 1).map(group).collect();
    let chances = expected.floats("accept_probability").concat();
    for (slot, group) in groups.iter().enumerate() {
        let row = &expected.integers("groups")[slot];
        let want: Vec<u32> = (0..48).filter(|&id| row[id as usize] == 1).collect();
        assert_eq!(*group, want, "slot {slot}");
        let chance = verify::group_acceptance(&p[slot], &q[slot + 1], group);
        assert!(
            close(chance, f64::from(chances[slot])),
            "slot {slot}: {chance}"
        );
    }
    let draw = inputs.floats("draw_uniforms").concat();
    let first_rejected = expected.integers("first_rejected").concat();
    for run in 0..draw.len() {
        let accept: Vec<f64> = inputs.floats("accept_uniforms")[run]
            .iter()
            .map(|&u| f64::from(u))
            .collect();
        let redraw = f64::from(draw[run]);
        let found = grouped_window(&drafts, &fresh, (&p, &q), &groups, &accept, redraw).unwrap();
        assert_eq!(
            found.first_rejected as i64, first_rejected[run],
            "run {run}"
        );
        assert_eq!(
            found.tokens,
            ids(&expected.integers("tokens")[run]),
            "run {run}"
        );
    }
}

#[test]
fn continuous_speculative_decoding() {
    let Some(case) = optional("cspd") else { return };
    let inputs = Tensors::at(case.join("inputs.safetensors"));
    let expected = Tensors::at(case.join("expected.safetensors"));
    let wide = |name: &str| -> Vec<Vec<f64>> {
        let rows = inputs.floats(name).into_iter();
        rows.map(|row| row.into_iter().map(f64::from).collect())
            .collect()
    };
    let steps = |side: &str| -> Vec<LastStep> {
        let (mean, std) = (wide(&format!("{side}_mean")), wide(&format!("{side}_std")));
        let logs = wide(&format!("{side}_sum_log_std"));
        let laws = mean
            .into_iter()
            .zip(std)
            .map(|(m, s)| DiagonalGaussian::new(m, s).unwrap());
        laws.zip(logs)
            .map(|(law, logs)| LastStep::new(law, logs.iter().sum()).unwrap())
            .collect()
    };
    let (p, q) = (steps("target"), steps("draft"));
    let rule = AlignedRule::published();
    let x = wide("draft_sample");
    let accept = wide("accept_uniforms").concat();
    let normals = wide("proposal_normals");
    let uniforms = wide("proposal_uniforms");
    let proposal = |t: usize, i: usize| -> (Vec<f64>, f64) {
        let law = p[i].law();
        let noise = &normals[t * p.len() + i];
        let y = noise
            .iter()
            .zip(law.mean().iter().zip(law.std()))
            .map(|(z, (m, s))| m + s * z);
        (y.collect(), uniforms[t][i])
    };
    let pairs: Vec<_> = p.iter().zip(&q).collect();
    let (replaced, tries) = rule.replacements(&pairs, proposal);
    assert_eq!(tries as i64, expected.integers("tries_used").concat()[0]);
    let check = |name: &str, found: &[f64]| {
        let want = expected.floats(name).concat();
        assert_eq!(found.len(), want.len(), "{name}");
        for (i, (f, w)) in found.iter().zip(want).enumerate() {
            assert!(close(*f, f64::from(w)), "{name} {i}: {f} instead of {w}");
        }
    };
    let each = |f: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..p.len()).map(f).collect() };
    check(
        "fixed_term",
        &each(&|i| rule.log_fixed_term(&p[i], &q[i]).exp()),
    );
    check(
        "ratio",
        &each(&|i| rule.log_ratio(&p[i], &q[i], &x[i]).exp()),
    );
    check(
        "residual_keep_probability",
        &each(&|i| rule.keep_probability(&p[i], &q[i], &proposal(0, i).0)),
    );
    // What never succeeded is left at zero by the published program.
    let replaced: Vec<Vec<f64>> = replaced
        .into_iter()
        .map(|y| y.unwrap_or(vec![0.0; 16]))
        .collect();
    check("residual_samples", &replaced.concat());
    let accepted: Vec<bool> = (0..p.len())
        .map(|i| rule.accepts(&p[i], &q[i], &x[i], accept[i]))
        .collect();
    let want = expected.integers("accepted").concat();
    assert_eq!(
        accepted.iter().map(|&a| i64::from(a)).collect::<Vec<_>>(),
        want
    );
    let tokens: Vec<Vec<f64>> = (0..p.len())
        .map(|i| if accepted[i] { &x[i] } else { &replaced[i] }.clone())
        .collect();
    check("tokens", &tokens.concat());
}

#[test]
fn medusa_typical_acceptance() {
    let Some(case) = optional("medusa") else {
        return;
    };
    let inputs = Tensors::at(case.join("inputs.safetensors"));
    let expected = Tensors::at(case.join("expected.safetensors"));
    let logits = inputs.floats("typical_logits");
    let candidates = inputs.integers("typical_candidates");
    let best = expected.integers("typical_best").concat();
    let lengths = expected.integers("typical_accept_length").concat();
    let (paths, depth) = (candidates.len() / best.len(), candidates[0].len());
    for set in 0..best.len() {
        let rows = set * paths..(set + 1) * paths;
        let law = |row: &Vec<f32>| {
            let scores: Vec<f32> = row.iter().map(|s| s / 0.8).collect();
            Categorical::from_scores(scores).unwrap()
        };
        let laws: Vec<Vec<Categorical>> = rows
            .clone()
            .map(|path| {
                logits[path * depth..(path + 1) * depth]
                    .iter()
                    .map(law)
                    .collect()
            })
            .collect();
        let tokens: Vec<Vec<u32>> = rows.map(|path| ids(&candidates[path])).collect();
        let found = typical_paths(&laws, &tokens, (0.09, 0.3));
        assert_eq!(
            (found.0 as i64, found.1 as i64),
            (best[set], lengths[set]),
            "set {set}"
        );
    }
}
