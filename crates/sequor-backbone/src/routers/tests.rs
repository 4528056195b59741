use super::*;
use crate::{CausalLm, Decoder, DecoderConfig};
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::device::DType;
use sequor_nn::lora::{Adapter, LoraConfig};
use sequor_nn::params::Param;
use sequor_nn::weights::{self, write_safetensors};
use sequor_nn::{Device, tch};
use sequor_sampling::draft::{DraftMode, DraftModel};
use sequor_sampling::generate::{Generator, Options};
use sequor_sampling::{GenerationConfig, Layout, LogitRows, SequenceState, Step, TargetModel};
use serde_json::{Value, json};
use std::path::Path;

const VOCAB: u32 = 40;
const LAYERS: usize = 7;

fn config() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "head_dim": 6})
}

/// A random model in a folder.
fn save(dir: &Path, config: &Value) {
    let mut c = DecoderConfig::from_json(config).unwrap();
    c.init_std = 0.3;
    let params = ParamBuilder::init(11, Kind::Float, Device::Cpu);
    Decoder::new(&params, &c).unwrap();
    let params = params.params();
    let list: Vec<(&str, &Tensor)> = params
        .iter()
        .map(|p| (p.name.as_str(), &p.tensor))
        .collect();
    write_safetensors(&dir.join("model.safetensors"), &list, &Default::default()).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn model_of(config: &Value) -> CausalLm {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), config);
    CausalLm::load(dir.path(), DType::F32, Device::Cpu).unwrap()
}

fn model() -> CausalLm {
    model_of(&config())
}

/// Random routers that keep about half of the layers, and their parameters.
fn routers(seed: i64) -> (Routers, Vec<Param>) {
    let p = ParamBuilder::init(1, Kind::Float, Device::Cpu);
    let routers = Routers::new(&p, LAYERS, 24).unwrap();
    // Libtorch's own generator is shared by all tests that run.
    tch::no_grad(|| {
        for (number, p) in p.params().into_iter().enumerate() {
            let mut values = vec![0.0_f32; p.tensor.numel()];
            let key = Key::new(seed as u64, number as u64);
            key.stream(0, Purpose::Test).fill_normal_f32(&mut values);
            let values = Tensor::from_slice(&values).reshape(p.tensor.size()) * 0.3;
            p.tensor.shallow_clone().copy_(&values);
        }
    });
    (routers, p.params())
}

fn text(seed: u32, n: u32) -> Vec<u32> {
    (0..n)
        .map(|i| (i * i + seed * i + 3 * seed + 1) % VOCAB)
        .collect()
}

fn step<'a>(slot: usize, tokens: &'a [u32], logits: LogitRows) -> Step<'a> {
    Step {
        slot,
        tokens,
        layout: Layout::Chain,
        logits,
        features: false,
    }
}

/// Feeds and commits tokens; the last row of logits, if it was asked for.
fn feed<M: TargetModel>(
    m: &M,
    state: &mut M::State,
    slot: usize,
    tokens: &[u32],
    last: bool,
) -> Vec<f32> {
    let logits = if last {
        LogitRows::Last
    } else {
        LogitRows::None
    };
    let out = m.forward(&[step(slot, tokens, logits)], state).unwrap();
    let path: Vec<usize> = (0..tokens.len()).collect();
    state.commit(slot, &path).unwrap();
    out[0]
        .logits
        .row(0)
        .map(<[f32]>::to_vec)
        .unwrap_or_default()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max)
}

fn routed<'m>(model: &'m CausalLm, selection: LayerSelection, prefill: Prefill) -> RoutedLm<'m> {
    RoutedLm::new(model, Some(routers(5).0), &selection, prefill).unwrap()
}

fn by_routers() -> LayerSelection {
    LayerSelection::Routed(Policy::default())
}

const MODES: [Prefill; 2] = [Prefill::Full, Prefill::Gated];

#[test]
fn all_layers_are_the_base_model_bit_for_bit() {
    let base = model();
    let tokens = text(1, 20);
    for prefill in MODES {
        for selection in [
            LayerSelection::All,
            LayerSelection::Fixed((0..LAYERS).collect()),
        ] {
            let m = routed(&base, selection, prefill);
            let (mut a, mut b) = (base.new_state(1).unwrap(), m.new_state(1).unwrap());
            feed(&base, &mut a, 0, &tokens[..7], false);
            feed(&m, &mut b, 0, &tokens[..7], false);
            for range in [7..15, 15..16, 16..20] {
                let (x, y) = (&tokens[range.clone()], &tokens[range]);
                assert_eq!(
                    feed(&base, &mut a, 0, x, true),
                    feed(&m, &mut b, 0, y, true)
                );
            }
            assert_eq!(b.layers(0).unwrap().len(), LAYERS);
        }
    }
}

#[test]
fn no_layer_is_embedding_norm_and_head() {
    let base = model();
    let m = routed(&base, LayerSelection::Fixed(vec![]), Prefill::Gated);
    let mut state = m.new_state(1).unwrap();
    let got = feed(&m, &mut state, 0, &[3, 9], true);
    let _no_grad = tch::no_grad_guard();
    let d = base.decoder();
    let rows = d.embed(&Tensor::from_slice(&[9i64])).unwrap();
    let expected = d.logits(&d.finish(&rows).unwrap()).unwrap();
    assert_eq!(got, Vec::<f32>::try_from(expected.get(0)).unwrap());
    assert_eq!(state.bytes(), 0);
}

#[test]
fn a_soft_layer_ends_in_the_layer_and_in_identity() {
    let (h, y) = (
        Tensor::randn([3, 4], (Kind::Float, Device::Cpu)),
        Tensor::randn([3, 4], (Kind::Float, Device::Cpu)),
    );
    assert!(soft_layer(&h, &y, &Tensor::from(0f32)).unwrap().equal(&h));
    assert!(soft_layer(&h, &y, &Tensor::from(1f32)).unwrap().equal(&y));
    let half = soft_layer(&h, &y, &Tensor::from(0.25f32)).unwrap();
    assert!(half.allclose(&(&h * 0.75 + &y * 0.25), 1e-6, 1e-6, false));
    // Per token, too.
    let r = Tensor::from_slice(&[0f32, 1.0, 0.0]).reshape([3, 1]);
    let mixed = soft_layer(&h, &y, &r).unwrap();
    assert!(mixed.get(1).equal(&y.get(1)) && mixed.get(2).equal(&h.get(2)));
}

/// Logits behind a prompt, token by token with state.
fn decode(
    m: &RoutedLm<'_>,
    state: &mut RoutedState,
    chunks: &[&[u32]],
    rest: &[u32],
) -> Vec<Vec<f32>> {
    let (last, first) = chunks.split_last().unwrap();
    for chunk in first {
        feed(m, state, 0, chunk, false);
    }
    let mut rows = vec![feed(m, state, 0, last, true)];
    rows.extend(rest.iter().map(|&t| feed(m, state, 0, &[t], true)));
    rows
}

#[test]
fn with_state_as_without_and_skipped_layers_stay_empty() {
    let sliding = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 5});
    let mut windowed = config();
    windowed
        .as_object_mut()
        .unwrap()
        .extend(sliding.as_object().unwrap().clone());
    for config in [config(), windowed] {
        let base = model_of(&config);
        let tokens = text(2, 24);
        let selections = [
            by_routers(),
            LayerSelection::Fixed(vec![0, 2, 5]),
            LayerSelection::Routed(Policy {
                keep: Some(4),
                ..Policy::default()
            }),
            LayerSelection::Routed(Policy {
                rule: GateRule::MeanProb,
                keep: None,
                protect: false,
            }),
        ];
        for prefill in MODES {
            for selection in &selections {
                if prefill == Prefill::Gated
                    && matches!(
                        selection,
                        LayerSelection::Routed(Policy { keep: Some(_), .. })
                    )
                {
                    assert!(RoutedLm::new(&base, Some(routers(5).0), selection, prefill).is_err());
                    continue;
                }
                let m = routed(&base, selection.clone(), prefill);
                let mut state = m.new_state(1).unwrap();
                let rows = decode(&m, &mut state, &[&tokens[..10]], &tokens[10..23]);
                let kept = state.layers(0).unwrap();
                for layer in 0..LAYERS {
                    let (k, _) = state.cache().view(0, layer).unwrap();
                    let expected = if kept.contains(&layer) { 23 } else { 0 };
                    assert_eq!(k.size()[1], expected, "layer {layer} of {kept:?}");
                }
                let gating = match selection {
                    LayerSelection::Routed(policy) => Gating::Hard(*policy),
                    _ => Gating::Fixed(&[true, false, true, false, false, true, false]),
                };
                let _no_grad = tch::no_grad_guard();
                let pass =
                    gated_forward(base.decoder(), &routers(5).0, &tokens, 10, prefill, gating)
                        .unwrap();
                let gates = Vec::<f32>::try_from(&pass.gates).unwrap();
                let open: Vec<usize> = (0..LAYERS).filter(|&l| gates[l] == 1.0).collect();
                assert_eq!(open, kept);
                assert!(kept.len() < LAYERS, "something is left out: {kept:?}");
                for (i, row) in rows.iter().enumerate() {
                    let dense = Vec::<f32>::try_from(pass.logits.get(i as i64)).unwrap();
                    assert!(
                        worst(row, &dense) < 1e-4,
                        "{prefill:?} {selection:?} row {i}"
                    );
                }
                if let LayerSelection::Routed(_) = selection {
                    let mean: Vec<f64> = state.scores(0).iter().map(|s| s.mean).collect();
                    let dense = pass
                        .probabilities
                        .mean_dim([1i64].as_slice(), false, Kind::Double);
                    let dense = Vec::<f64>::try_from(dense).unwrap();
                    assert!(mean.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-5));
                }
                // A prompt in parts is the same prompt.
                let mut parts = m.new_state(1).unwrap();
                if prefill == Prefill::Full {
                    let again = decode(
                        &m,
                        &mut parts,
                        &[&tokens[..4], &tokens[4..7], &tokens[7..10]],
                        &tokens[10..23],
                    );
                    assert_eq!(parts.layers(0).unwrap(), kept);
                    assert!(rows.iter().zip(&again).all(|(a, b)| worst(a, b) < 1e-4));
                } else if matches!(selection, LayerSelection::Routed(_)) {
                    let refused = m.forward(&[step(0, &tokens[..4], LogitRows::None)], &mut parts);
                    assert!(refused.unwrap_err().to_string().contains("prefill_chunk"));
                    assert_eq!(parts.pending_len(0), 0);
                }
            }
        }
    }
}

#[test]
fn a_batch_of_different_layers_equals_single_runs() {
    let base = model();
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| text(i * 3 + 1, 6 + 3 * i)).collect();
    for prefill in MODES {
        let m = routed(&base, by_routers(), prefill);
        type Run = (Vec<Vec<f32>>, Vec<usize>, Vec<LayerScore>);
        let single: Vec<Run> = prompts
            .iter()
            .map(|p| {
                let mut state = m.new_state(1).unwrap();
                let rows = decode(&m, &mut state, &[p], &[7, 8, 9]);
                (rows, state.layers(0).unwrap(), state.scores(0))
            })
            .collect();
        let masks: std::collections::BTreeSet<_> = single.iter().map(|s| &s.1).collect();
        assert!(masks.len() > 1, "prompts choose different layers");

        // The last one begins when the others decode already; steps come in another order.
        let mut state = m.new_state(4).unwrap();
        let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); 4];
        for round in 0..5 {
            let mut parts: Vec<(usize, Vec<u32>)> = Vec::new();
            for slot in [2, 3, 0, 1] {
                let at = if slot == 3 {
                    round as i64 - 1
                } else {
                    round as i64
                };
                match at {
                    0 => parts.push((slot, prompts[slot].clone())),
                    1..=3 => parts.push((slot, vec![6 + at as u32])),
                    _ => {}
                }
            }
            let steps: Vec<Step<'_>> = parts
                .iter()
                .map(|(s, t)| step(*s, t, LogitRows::Last))
                .collect();
            let out = m.forward(&steps, &mut state).unwrap();
            for ((slot, tokens), out) in parts.iter().zip(&out) {
                rows[*slot].push(out.logits.row(0).unwrap().to_vec());
                state
                    .commit(*slot, &(0..tokens.len()).collect::<Vec<_>>())
                    .unwrap();
            }
        }
        for (slot, (expected, layers, scores)) in single.iter().enumerate() {
            assert_eq!(&state.layers(slot).unwrap(), layers);
            assert_eq!(rows[slot].len(), 4);
            for (a, b) in rows[slot].iter().zip(expected) {
                assert!(
                    worst(a, b) < 1e-5,
                    "{prefill:?} slot {slot}: {}",
                    worst(a, b)
                );
            }
            // Neighbours do not enter a score.
            for (a, b) in state.scores(slot).iter().zip(scores) {
                assert!((a.mean - b.mean).abs() < 1e-6 && a.votes == b.votes);
            }
        }
    }
}

#[test]
fn only_the_prompt_decides_and_discarded_rows_do_not_count() {
    let base = model();
    let m = routed(&base, by_routers(), Prefill::Full);
    let prompt = text(4, 9);
    let mut state = m.new_state(1).unwrap();
    assert_eq!(state.layers(0), None);
    // A pass that is taken back leaves no trace.
    m.forward(&[step(0, &[1, 2, 3], LogitRows::Last)], &mut state)
        .unwrap();
    state.discard(0).unwrap();
    assert_eq!((state.layers(0), state.committed_len(0)), (None, 0));
    feed(&m, &mut state, 0, &text(9, 4), false);
    state.truncate(0, 0).unwrap();
    feed(&m, &mut state, 0, &prompt, true);
    let (layers, scores) = (state.layers(0).unwrap(), state.scores(0));
    feed(&m, &mut state, 0, &text(8, 10), true);
    assert_eq!(
        (state.layers(0).unwrap(), state.scores(0)),
        (layers.clone(), scores.clone())
    );

    let mut other = m.new_state(1).unwrap();
    feed(&m, &mut other, 0, &prompt, true);
    feed(&m, &mut other, 0, &text(6, 10), true);
    assert_eq!(
        (other.layers(0).unwrap(), other.scores(0)),
        (layers.clone(), scores)
    );

    // Generated rows can be cut off, the prompt cannot.
    let expected = feed(&m, &mut other, 0, &[5], true);
    other.truncate(0, 19).unwrap();
    assert_eq!(feed(&m, &mut other, 0, &[5], true), expected);
    let refused = other.truncate(0, 5).unwrap_err();
    assert!(
        matches!(refused, sequor_sampling::Error::Unsupported(_)),
        "{refused}"
    );
    other.reset(0).unwrap();
    assert_eq!((other.layers(0), other.committed_len(0)), (None, 0));
    feed(&m, &mut other, 0, &prompt, true);
    assert_eq!(other.layers(0).unwrap(), layers);
}

/// The gradient of a pass's loss, by parameter name.
fn gradients(pass: &RoutedPass, params: &[Param]) -> Vec<(String, f64)> {
    let loss = pass.logits.square().mean(Kind::Float) + pass.gates.sum(Kind::Float) * 0.0;
    let tensors: Vec<Tensor> = params.iter().map(|p| p.tensor.shallow_clone()).collect();
    let grads = Tensor::f_run_backward(&[loss], &tensors, false, false).unwrap();
    let size = |g: &Tensor| {
        if g.defined() {
            g.abs().max().double_value(&[])
        } else {
            0.0
        }
    };
    params
        .iter()
        .zip(&grads)
        .map(|(p, g)| (p.name.clone(), size(g)))
        .collect()
}

#[test]
fn soft_gates_teach_routers_and_hard_gates_teach_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config());
    let base = CausalLm::load(dir.path(), DType::F32, Device::Cpu).unwrap();
    let tokens = text(3, 18);
    let (r, params) = routers(5);
    for prefill in MODES {
        for straight_through in [false, true] {
            let gating = Gating::Soft {
                protect: true,
                straight_through,
            };
            let pass = gated_forward(base.decoder(), &r, &tokens, 8, prefill, gating).unwrap();
            for (name, size) in gradients(&pass, &params) {
                let layer: usize = name.split('.').nth(1).unwrap().parse().unwrap();
                let free = (2..LAYERS - 1).contains(&layer);
                assert_eq!(size > 0.0, free, "{prefill:?} {name}: {size}");
            }
            if straight_through {
                // The forward is that of hard gates by the mean.
                let policy = Policy {
                    rule: GateRule::MeanProb,
                    ..Policy::default()
                };
                let hard = gated_forward(
                    base.decoder(),
                    &r,
                    &tokens,
                    8,
                    prefill,
                    Gating::Hard(policy),
                )
                .unwrap();
                assert!(pass.logits.allclose(&hard.logits, 1e-4, 1e-4, false));
            }
        }
    }

    let lora = LoraConfig {
        rank: 2,
        alpha: 4.0,
        dropout: 0.0,
        targets: vec!["q_proj".into(), "down_proj".into()],
    };
    let (adapted, builder) = adapt(dir.path(), lora.clone(), 3, Device::Cpu).unwrap();
    let updates = builder.params();
    assert_eq!(updates.len(), LAYERS * 4);
    assert!(updates.iter().all(|p| p.name.contains("lora_")));
    tch::no_grad(|| {
        for (i, p) in updates.iter().enumerate() {
            // A generator of this test's own: libtorch's is shared by all that run.
            let mut stream = Key::new(11, i as u64).stream(0, Purpose::Test);
            let values: Vec<f32> = (0..p.tensor.numel())
                .map(|_| 0.3 * (stream.uniform() as f32 - 0.5))
                .collect();
            let values = Tensor::from_slice(&values).reshape(p.tensor.size());
            p.tensor.shallow_clone().copy_(&values);
        }
    });
    for prefill in MODES {
        let gating = Gating::Hard(Policy::default());
        let pass = gated_forward(adapted.decoder(), &r, &tokens, 8, prefill, gating).unwrap();
        assert!(
            gradients(&pass, &params)
                .iter()
                .all(|(_, size)| *size == 0.0),
            "routers are frozen"
        );
        let gates = Vec::<f32>::try_from(&pass.gates).unwrap();
        assert!(gates.contains(&0.0));
        for (name, size) in gradients(&pass, &updates) {
            let layer: usize = name.split('.').nth(2).unwrap().parse().unwrap();
            if gates[layer] == 1.0 {
                assert!(size > 0.0, "{name}");
            } else if prefill == Prefill::Gated {
                assert_eq!(size, 0.0, "{name}: left out");
            }
        }
    }
    assert!(
        adapt(
            dir.path(),
            LoraConfig {
                targets: vec!["c_attn".into()],
                ..lora.clone()
            },
            3,
            Device::Cpu
        )
        .is_err()
    );

    // What was trained is what is loaded.
    Adapter::write(dir.path(), &lora, &updates, Kind::Float, "tiny").unwrap();
    let config_of = || RouterConfig {
        kind: crate::heads::HeadsKind::Router,
        base: crate::heads::Base {
            name: "tiny".into(),
            fingerprint: base.fingerprint().unwrap(),
        },
        hidden_size: 24,
        vocab_size: i64::from(VOCAB),
        decoder_layers: LAYERS,
        kept: 0.75,
        prefill: Prefill::Full,
        rule: GateRule::Majority,
        protect: true,
        scores: vec![0.1, 0.9, 0.2, 0.8, 0.8, 0.3, 0.0],
        adapter: true,
        training: json!({"steps": 3}),
    };
    // CausalLm::load takes the only weights of a folder, so routers have one of their own.
    let own = dir.path().join("routers");
    RouterFolder::write(&own, &config_of(), &params).unwrap();
    let folder = RouterFolder::open(&own).unwrap();
    assert_eq!(folder.config, config_of());
    assert_eq!(folder.adapter(), Some(own.as_path()));
    folder.check(&base).unwrap();
    assert_eq!(folder.config.static_best(5).unwrap(), [0, 1, 3, 4, 6]);
    assert!(folder.config.static_best(2).is_err());
    let _no_grad = tch::no_grad_guard();
    let x = Tensor::randn([5, 24], (Kind::Float, Device::Cpu));
    for layer in 0..LAYERS {
        let (a, b) = (
            r.probabilities(layer, &x).unwrap(),
            folder.routers.probabilities(layer, &x).unwrap(),
        );
        assert!(a.allclose(&b, 0.0, 0.02, false), "bf16 rounding");
    }
    let merged = load_adapted(dir.path(), dir.path(), DType::F32, Device::Cpu).unwrap();
    let ids = Tensor::from_slice(&[1i64, 5, 9, 2]).reshape([1, 4]);
    let (a, b) = (
        merged.decoder().forward_dense(&ids, 0.0).unwrap(),
        adapted.decoder().forward_dense(&ids, 0.0).unwrap(),
    );
    assert!(a.allclose(&b, 1e-4, 1e-4, false));
    assert!(!a.allclose(
        &base.decoder().forward_dense(&ids, 0.0).unwrap(),
        1e-2,
        1e-2,
        false
    ));

    let mut foreign = config_of();
    foreign.base.fingerprint = "0".into();
    RouterFolder::write(&own, &foreign, &params).unwrap();
    assert!(RouterFolder::open(&own).unwrap().check(&base).is_err());
    foreign.scores.pop();
    assert!(RouterFolder::write(&own, &foreign, &params).is_err());
    std::fs::write(own.join("heads.json"), "{}").unwrap();
    assert!(RouterFolder::open(&own).is_err());
    assert!(weights::open(&own.join("heads.safetensors")).is_ok());
}

#[test]
fn a_model_with_fewer_layers_drafts_for_the_whole_one() {
    let base = model();
    let options = || Options::from(GenerationConfig::default()).max_new_tokens(12);
    let generator = Generator::new(&base, options()).unwrap();
    let mut used = 0;
    for seed in 0..2 {
        let prompt = text(seed, 7);
        let plain = generator
            .generate(&prompt, None, |_| std::ops::ControlFlow::Continue(()))
            .unwrap();
        for prefill in MODES {
            for selection in [by_routers(), LayerSelection::EvenlySpaced(6)] {
                let draft =
                    DraftModel::new(routed(&base, selection, prefill), DraftMode::Greedy).unwrap();
                let text = generator
                    .generate(&prompt, Some(Box::new(draft)), |_| {
                        std::ops::ControlFlow::Continue(())
                    })
                    .unwrap();
                assert_eq!(text.tokens, plain.tokens);
                used += text.report.drafted;
            }
        }
    }
    assert!(used > 0, "drafts were made");
}

#[test]
fn selections_are_what_they_say_or_refused() {
    let open = |s: LayerSelection, n: usize| -> Vec<usize> {
        let gates = s.gates(n).unwrap().unwrap();
        (0..n).filter(|&l| gates[l]).collect()
    };
    assert_eq!(open(LayerSelection::EvenlySpaced(4), 10), [0, 3, 6, 9]);
    assert_eq!(open(LayerSelection::EvenlySpaced(23), 30).len(), 23);
    assert_eq!(open(LayerSelection::EvenlySpaced(1), 10), [0]);
    assert_eq!(open(LayerSelection::EvenlySpaced(0), 10), [0usize; 0]);
    let random = |seed| open(LayerSelection::Random { keep: 6, seed }, 12);
    assert_eq!(random(1), random(1));
    assert!(random(1) != random(2) && random(3).len() == 6);
    assert!(random(4).starts_with(&[0, 1]) && random(4).ends_with(&[11]));
    assert!(LayerSelection::Fixed(vec![3]).gates(3).is_err());
    assert!(LayerSelection::EvenlySpaced(4).gates(3).is_err());
    assert_eq!(by_routers().gates(3).unwrap(), None);

    let base = model();
    let refused = |routers: Option<Routers>, s: &LayerSelection| {
        RoutedLm::new(&base, routers, s, Prefill::Full)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(None, &by_routers()).contains("none were given"));
    let p = ParamBuilder::init(1, Kind::Float, Device::Cpu);
    let small = Routers::new(&p, 3, 24).unwrap();
    assert!(refused(Some(small), &LayerSelection::All).contains("3 layers"));
    let few = LayerSelection::Routed(Policy {
        keep: Some(2),
        ..Policy::default()
    });
    assert!(refused(Some(routers(1).0), &few).contains("3..=7"));
    assert_eq!(Policy::keeping(0.75, 30).keep, Some(23));

    let scores: Vec<LayerScore> = [0.9f32, 0.1, 0.6, 0.4]
        .map(|p| LayerScore::of([p, 0.3]))
        .into();
    let majority = Policy {
        protect: false,
        ..Policy::default()
    };
    assert_eq!(majority.decide(&scores), [true, false, true, false]);
    let mean = Policy {
        rule: GateRule::MeanProb,
        ..majority
    };
    assert_eq!(mean.decide(&scores), [true, false, false, false]);
    assert_eq!(
        Policy {
            keep: Some(3),
            ..majority
        }
        .decide(&scores),
        [true, false, true, true]
    );
    assert_eq!(LayerScore::of([]), LayerScore::default());

    // Nothing a caller passes may do worse than fail.
    let (r, _) = routers(5);
    for (tokens, prompt) in [
        (vec![1, 2], 0),
        (vec![1, 2], 2),
        (vec![1, VOCAB], 1),
        (vec![1; 65], 3),
    ] {
        assert!(
            gated_forward(
                base.decoder(),
                &r,
                &tokens,
                prompt,
                Prefill::Full,
                Gating::Hard(Policy::default())
            )
            .is_err()
        );
    }
    assert!(
        gated_forward(
            base.decoder(),
            &r,
            &[1, 2],
            1,
            Prefill::Full,
            Gating::Fixed(&[true])
        )
        .is_err()
    );
    let m = routed(&base, by_routers(), Prefill::Full);
    let mut state = m.new_state(1).unwrap();
    for bad in [
        vec![],
        vec![step(0, &[VOCAB], LogitRows::Last)],
        vec![step(4, &[1], LogitRows::Last)],
    ] {
        assert!(m.forward(&bad, &mut state).is_err());
        assert_eq!(state.pending_len(0), 0);
    }
    assert!(state.commit(0, &[3]).is_err() && state.reset(7).is_err());
}
