//! Every family: state equals no state, trees equal chains, batches equal singles.

use crate::{CausalLm, Decoder, DecoderConfig};
use sequor_nn::device::DType;
use sequor_nn::{Device, Kind, KvCache, ParamBuilder, Tensor, tch};
use sequor_sampling::{Layout, LogitRows, SequenceState, Step, TargetModel};
use serde_json::{Value, json};
use std::path::Path;

pub(crate) const VOCAB: u32 = 40;

pub(crate) fn configs() -> Vec<Value> {
    let llama = |architecture: &str, more: Value| {
        let mut c = json!({"architectures": [architecture], "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "head_dim": 6});
        c.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        c
    };
    let opt = |before: bool, width: i64| {
        json!({"architectures": ["OPTForCausalLM"], "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": VOCAB, "max_position_embeddings": 64, "do_layer_norm_before": before, "word_embed_proj_dim": width})
    };
    vec![
        json!({"architectures": ["GPT2LMHeadModel"], "n_embd": 24, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB, "n_positions": 64,
            "scale_attn_by_inverse_layer_idx": true}),
        opt(true, 24),
        opt(false, 16),
        llama(
            "LlamaForCausalLM",
            json!({"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}),
        ),
        llama(
            "LlamaForCausalLM",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}}),
        ),
        llama("MistralForCausalLM", json!({"sliding_window": 5})),
        llama(
            "MixtralForCausalLM",
            json!({"num_local_experts": 4, "num_experts_per_tok": 2}),
        ),
        llama(
            "Qwen2ForCausalLM",
            json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1}),
        ),
        llama("Qwen3ForCausalLM", json!({})),
        llama(
            "Qwen3MoeForCausalLM",
            json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}),
        ),
    ]
}

/// A random model whose logits differ clearly from row to row.
pub(crate) fn model(config: &Value) -> CausalLm {
    let mut c = DecoderConfig::from_json(config).unwrap();
    c.init_std = 0.3;
    let params = ParamBuilder::init(11, Kind::Float, Device::Cpu);
    CausalLm::new(
        Decoder::new(&params, &c).unwrap(),
        Path::new("random"),
        DType::F32,
    )
}

/// Logits of a run over all tokens at once, without state: `[tokens][vocab]`.
pub(crate) fn dense(m: &CausalLm, tokens: &[u32]) -> Vec<Vec<f32>> {
    let _no_grad = tch::no_grad_guard();
    let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    let y = m
        .decoder()
        .forward_dense(&Tensor::from_slice(&ids).unsqueeze(0), 0.0)
        .unwrap();
    (0..tokens.len())
        .map(|i| Vec::try_from(y.get(0).get(i as i64)).unwrap())
        .collect()
}

pub(crate) fn step<'a>(slot: usize, tokens: &'a [u32], layout: Layout<'a>) -> Step<'a> {
    Step {
        slot,
        tokens,
        layout,
        logits: LogitRows::All,
        features: false,
    }
}

/// Feeds tokens as a chain and commits them all.
pub(crate) fn feed<M: TargetModel<State = KvCache>>(
    m: &M,
    state: &mut KvCache,
    slot: usize,
    tokens: &[u32],
) -> Vec<Vec<f32>> {
    let out = m
        .forward(&[step(slot, tokens, Layout::Chain)], state)
        .unwrap();
    SequenceState::commit(state, slot, &(0..tokens.len()).collect::<Vec<_>>()).unwrap();
    (0..tokens.len())
        .map(|i| out[0].logits.row(i).unwrap().to_vec())
        .collect()
}

pub(crate) fn assert_close(a: &[f32], b: &[f32], what: &str) {
    let worst = a
        .iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max);
    assert!(
        a.len() == b.len() && worst < 1e-4,
        "{what}: differs by {worst}"
    );
}

pub(crate) fn text(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i + 3 * i + 1) % VOCAB).collect()
}

#[test]
fn state_equals_no_state() {
    for config in configs() {
        let m = model(&config);
        let tokens = text(17);
        let want = dense(&m, &tokens);
        let spread = want[3]
            .iter()
            .zip(&want[9])
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(spread > 0.1, "the test model must not be flat: {config}");
        let mut state = m.new_state(1).unwrap();
        let mut got = feed(&m, &mut state, 0, &tokens[..9]);
        got.extend(feed(&m, &mut state, 0, &tokens[9..13]));
        for i in 13..17 {
            got.extend(feed(&m, &mut state, 0, &tokens[i..=i]));
        }
        // Rows dropped by truncation or discarding leave no trace.
        SequenceState::truncate(&mut state, 0, 6).unwrap();
        let _ = m
            .forward(&[step(0, &[1, 2, 3], Layout::Chain)], &mut state)
            .unwrap();
        SequenceState::discard(&mut state, 0).unwrap();
        let again = feed(&m, &mut state, 0, &tokens[6..12]);
        for (i, row) in want.iter().enumerate() {
            assert_close(row, &got[i], &format!("{config} row {i}"));
        }
        for (i, row) in again.iter().enumerate() {
            assert_close(
                &want[6 + i],
                row,
                &format!("{config} row {} after truncation", 6 + i),
            );
        }
    }
}

#[test]
fn a_tree_node_sees_its_path_alone_and_a_committed_path_is_a_chain() {
    let parents = [None, Some(0), Some(0), Some(1), Some(2), Some(2), Some(5)];
    let tokens = [7u32, 8, 9, 10, 11, 12, 13];
    for config in configs() {
        let m = model(&config);
        let prefix = text(8);
        let mut state = m.new_state(1).unwrap();
        feed(&m, &mut state, 0, &prefix);
        let out = m
            .forward(&[step(0, &tokens, Layout::Tree(&parents))], &mut state)
            .unwrap();
        for node in 0..tokens.len() {
            let mut path = vec![node];
            while let Some(p) = parents[path[path.len() - 1]] {
                path.push(p);
            }
            path.reverse();
            let chain: Vec<u32> = prefix
                .iter()
                .copied()
                .chain(path.iter().map(|&n| tokens[n]))
                .collect();
            let want = dense(&m, &chain);
            assert_close(
                want.last().unwrap(),
                out[0].logits.row(node).unwrap(),
                &format!("{config} node {node}"),
            );
        }
        SequenceState::commit(&mut state, 0, &[0, 2, 5]).unwrap();
        let next = feed(&m, &mut state, 0, &[30]);
        let chain: Vec<u32> = prefix.iter().copied().chain([7, 9, 12, 30]).collect();
        assert_close(
            dense(&m, &chain).last().unwrap(),
            &next[0],
            &format!("{config} after commit"),
        );
    }
}

#[test]
fn a_ragged_batch_equals_single_runs() {
    for config in configs() {
        let m = model(&config);
        let texts = [text(3), text(9), text(6)];
        let mut state = m.new_state(3).unwrap();
        let steps: Vec<Step<'_>> = texts
            .iter()
            .enumerate()
            .map(|(slot, t)| step(slot, t, Layout::Chain))
            .collect();
        let outs = m.forward(&steps, &mut state).unwrap();
        for (slot, t) in texts.iter().enumerate() {
            let want = dense(&m, t);
            for (i, row) in want.iter().enumerate() {
                assert_close(
                    row,
                    outs[slot].logits.row(i).unwrap(),
                    &format!("{config} slot {slot} row {i}"),
                );
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing_pending() {
    let m = model(&configs()[3]);
    let mut state = m.new_state(1).unwrap();
    let refused = |state: &mut KvCache, step: Step<'_>, word: &str| {
        let e = m.forward(&[step], state).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
        assert_eq!(SequenceState::pending_len(state, 0), 0);
    };
    refused(&mut state, step(0, &[VOCAB], Layout::Chain), "vocabulary");
    refused(&mut state, step(3, &[1], Layout::Chain), "slot 3");
    refused(
        &mut state,
        step(0, &[], Layout::Chain),
        "at least one token",
    );
    refused(
        &mut state,
        step(0, &[1, 2], Layout::Tree(&[None])),
        "parents",
    );
    refused(
        &mut state,
        step(0, &[1, 2], Layout::Tree(&[None, Some(1)])),
        "parent",
    );
    refused(
        &mut state,
        step(0, &[1; 65], Layout::Chain),
        "context of 64",
    );
    let long = Tensor::zeros([1, 65], (Kind::Int64, Device::Cpu));
    assert!(
        m.decoder()
            .forward_dense(&long, 0.0)
            .unwrap_err()
            .to_string()
            .contains("context")
    );
    assert!(
        m.decoder()
            .forward_dense(&Tensor::from_slice(&[-1i64]).unsqueeze(0), 0.0)
            .is_err()
    );
}

#[test]
fn the_future_does_not_leak() {
    for config in configs() {
        let m = model(&config);
        let (a, mut b) = (text(10), text(10));
        b[7] = (b[7] + 1) % VOCAB;
        let (a, b) = (dense(&m, &a), dense(&m, &b));
        for i in 0..7 {
            assert_close(&a[i], &b[i], &format!("{config} row {i}"));
        }
        let moved = a[7]
            .iter()
            .zip(&b[7])
            .map(|(x, y)| (x - y).abs())
            .fold(0.0, f32::max);
        assert!(moved > 1e-3, "{config}");
    }
}

#[test]
fn the_cost_of_rows_is_measured_once() {
    let m = model(&configs()[3]);
    assert!(m.cost_curve().is_none());
    let first = m.measure_cost().unwrap();
    assert_eq!(m.measure_cost().unwrap().seconds(), first.seconds());
    assert_eq!(m.cost_curve().unwrap().rows(), [1, 2, 3, 4, 6, 8, 12, 16]);
}

#[test]
fn a_fingerprint_is_of_sizes_and_norms() {
    let c = DecoderConfig::from_json(&configs()[4]).unwrap();
    let make = |c: &DecoderConfig, kind: Kind, seed: u64| {
        let params = ParamBuilder::init(seed, kind, Device::Cpu);
        let decoder = Decoder::new(&params, c).unwrap();
        let m = CausalLm::new(decoder, Path::new("random"), DType::F32);
        (m.fingerprint().unwrap(), m, params)
    };
    let (id, m, params) = make(&c, Kind::Float, 1);
    assert_eq!(id.len(), 16);
    assert_eq!(id, make(&c, Kind::BFloat16, 2).0, "matrices do not count");
    let mut wider = c.clone();
    wider.hidden += 8;
    assert_ne!(id, make(&wider, Kind::Float, 1).0);
    for name in ["model.norm.weight", "model.layers.1.input_layernorm.weight"] {
        let before = m.fingerprint().unwrap();
        let norm = params
            .params()
            .into_iter()
            .find(|p| p.name == name)
            .unwrap();
        let _ = tch::no_grad(|| norm.tensor.shallow_clone().fill_(0.5));
        assert_ne!(before, m.fingerprint().unwrap(), "{name}");
    }
}
