//! Reference vectors of Hugging Face `transformers`.

use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::draft::PromptLookup;
use crate::processors::{Context, LogitsProcessor, ProcessorList};
use crate::verify::{Acceptance, speculative_sampling};
use crate::{Categorical, GenerationConfig};

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/parity")
        .join(case)
}

fn json(case: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(case).join(file)).unwrap()).unwrap()
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn open(case: &str, file: &str) -> Self {
        Self(std::fs::read(folder(case).join(file)).unwrap())
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
