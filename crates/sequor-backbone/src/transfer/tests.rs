//! Pseudo rows change nothing, and see exactly what they should.

use super::{HiddenTransfer, TransferConfig, TransferDrafter, TransferLm};
use crate::CausalLm;
use crate::decoder::Input;
use crate::heads::Base;
use crate::tests::{assert_close, configs, feed, model, text};
use sequor_nn::attention::Dense;
use sequor_nn::mask::Mask;
use sequor_nn::{Device, Kind, KvCache, ParamBuilder, Tensor, tch};
use sequor_sampling::draft::{Budget, DraftContext, Drafter};
use sequor_sampling::generate::{DepthPolicy, Generator, Options};
use sequor_sampling::{
    GenerationConfig, Key, Layout, LogitRows, Output, SequenceState, Step, TargetModel, Topology,
};
use serde_json::Value;
use std::ops::ControlFlow;

/// A tree with two branches.
const TREE: [Option<usize>; 5] = [None, Some(0), Some(0), Some(1), Some(2)];
const NODES: [u32; 5] = [7, 8, 9, 10, 11];

/// Maps for `m` behind these layers, and the builder of their parameters.
fn maps(m: &CausalLm, layers: &[usize]) -> (HiddenTransfer, ParamBuilder) {
    let config = TransferConfig::new(m.config(), layers.to_vec(), Base::default()).unwrap();
    let p = ParamBuilder::init(3, Kind::Float, Device::Cpu);
    (HiddenTransfer::identity(&p, &config).unwrap(), p)
}

/// Writes over a parameter.
fn set(p: &ParamBuilder, name: &str, value: &Tensor) {
    let param = p.params().into_iter().find(|q| q.name == name).unwrap();
    tch::no_grad(|| param.tensor.shallow_clone().copy_(value));
}

/// Maps that are not identities.
fn stir(p: &ParamBuilder) {
    for (i, param) in p.params().into_iter().enumerate() {
        let n = param.tensor.numel() as i64;
        let noise = (Tensor::arange(n, (Kind::Float, Device::Cpu)) * (i as f64 + 1.7)).sin() * 0.2;
        let value = &param.tensor.detach() + noise.reshape(param.tensor.size());
        set(p, &param.name, &value);
    }
}

/// Offsets after the first layer, after the last, and in between.
fn layouts(config: &Value) -> (CausalLm, Vec<Vec<usize>>) {
    let m = model(config);
    let last = m.config().layers;
    (m, vec![vec![1, 1], vec![1, last - 1, last], vec![last]])
}

fn tree_step(tokens: &[u32]) -> Step<'_> {
    Step {
        slot: 0,
        tokens,
        layout: Layout::Tree(&TREE),
        logits: LogitRows::All,
        features: true,
    }
}

fn run<M: TargetModel>(m: &M, step: Step<'_>, state: &mut M::State) -> Output {
    m.forward(&[step], state).unwrap().pop().unwrap()
}

fn floats(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.detach().reshape([-1])).unwrap()
}

#[test]
fn real_rows_do_not_notice() {
    for config in configs() {
        let (m, layouts) = layouts(&config);
        for layers in layouts {
            let (t, p) = maps(&m, &layers);
            stir(&p);
            let lm = TransferLm::new(&m, &t).unwrap();
            let (mut plain, mut pseudo) = (m.new_state(2).unwrap(), lm.new_state(2).unwrap());
            for slot in 0..2 {
                feed(&m, &mut plain, slot, &text(6 + slot as u32));
                feed(&lm, &mut pseudo, slot, &text(6 + slot as u32));
            }
            // Two slots in one pass: a tree, and a chain that ends in a wanted row.
            let chain = Step {
                slot: 1,
                tokens: &[1, 2],
                layout: Layout::Chain,
                logits: LogitRows::Last,
                features: true,
            };
            let steps = [tree_step(&NODES), chain];
            let a = m.forward(&steps, &mut plain).unwrap();
            let b = lm.forward(&steps, &mut pseudo).unwrap();
            for (a, b) in a.iter().zip(&b) {
                assert_eq!(a.logits.rows(), b.logits.rows());
                for row in 0..a.logits.rows() {
                    let (a, b) = (a.logits.row(row).unwrap(), b.logits.row(row).unwrap());
                    let worst = a
                        .iter()
                        .zip(b)
                        .map(|(a, b)| (a - b).abs())
                        .fold(0.0, f32::max);
                    assert!(worst < 1e-5, "{config} {layers:?} row {row}: {worst}");
                }
            }
            let width = layers.len() as i64 * m.config().embed_dim;
            let features = b[1].features.as_ref().unwrap();
            assert_eq!(features.size(), [2, width]);
            let size = |row: i64| features.get(row).abs().max().double_value(&[]);
            assert!(size(0) == 0.0 && size(1) > 0.0, "only the last row guesses");
            // What one slot guesses does not depend on the other.
            let mut alone = lm.new_state(1).unwrap();
            feed(&lm, &mut alone, 0, &text(6));
            let single = run(&lm, tree_step(&NODES), &mut alone).features.unwrap();
            let both = b[0].features.as_ref().unwrap();
            assert_close(
                &floats(&single),
                &floats(both),
                &format!("{config} {layers:?}"),
            );
        }
    }
}

#[test]
fn an_identity_behind_the_last_layer_is_the_state_itself() {
    for config in configs() {
        let m = model(&config);
        let (t, _p) = maps(&m, &[m.config().layers]);
        let lm = TransferLm::new(&m, &t).unwrap();
        let (mut plain, mut pseudo) = (m.new_state(1).unwrap(), lm.new_state(1).unwrap());
        let a = run(&m, tree_step(&NODES), &mut plain).features.unwrap();
        let b = run(&lm, tree_step(&NODES), &mut pseudo).features.unwrap();
        let difference = (&a - &b).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "{config}: {difference}");
        let logits = m.decoder().logits(&b).unwrap();
        let own = m.decoder().logits(&a).unwrap();
        assert!((logits - own).abs().max().double_value(&[]) < 1e-4);
    }
}

/// With maps that forget their source and give the true states of the next tokens, pseudo
/// rows must become the rows of those tokens: same position, same view, each other's keys.
#[test]
fn true_states_become_the_rows_of_the_next_tokens() {
    for config in configs() {
        let (m, layouts) = layouts(&config);
        let tokens = text(12);
        let anchor = 8;
        for layers in layouts {
            let (t, p) = maps(&m, &layers);
            let _no_grad = tch::no_grad_guard();
            let taps: Vec<usize> = layers.iter().map(|t| t - 1).collect();
            let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
            let positions: Vec<i64> = (0..12).collect();
            let truth = m
                .decoder()
                .forward(
                    &Input::Ids(&Tensor::from_slice(&ids)),
                    &positions,
                    &mut Dense::new(1, 12, Mask::Causal),
                    0.0,
                    &taps,
                )
                .unwrap();
            for (j, tap) in truth.taps.iter().enumerate() {
                let dim = m.config().dim;
                set(
                    &p,
                    &format!("transfer.{j}.weight"),
                    &Tensor::zeros([dim, dim], (Kind::Float, Device::Cpu)),
                );
                set(
                    &p,
                    &format!("transfer.{j}.bias"),
                    &tap.get((anchor + 1 + j) as i64),
                );
            }
            let want: Vec<f32> = (0..layers.len())
                .flat_map(|j| floats(&truth.last.get((anchor + 1 + j) as i64)))
                .collect();
            // In generation: the anchor is the deepest node of a tree over a committed prefix.
            let lm = TransferLm::new(&m, &t).unwrap();
            let mut state = lm.new_state(1).unwrap();
            feed(&lm, &mut state, 0, &tokens[..6]);
            let nodes = [tokens[6], 1, tokens[7], 2, tokens[8]];
            let got = run(&lm, tree_step(&nodes), &mut state).features.unwrap();
            assert_close(&want, &floats(&got.get(4)), &format!("{config} {layers:?}"));
            // In training: all at once.
            let reading = t.read(&m, &tokens).unwrap();
            assert_close(
                &floats(&truth.last),
                &floats(&reading.last),
                "the reading itself",
            );
            let guess = t.guess(&m, &reading, &[3, anchor], true).unwrap();
            let guess: Vec<f32> = guess.iter().flat_map(|g| floats(&g.get(1))).collect();
            assert_close(&want, &guess, &format!("{config} {layers:?} in training"));
        }
    }
}

/// Two ways to the same pseudo states: cached trees, and whole texts.
#[test]
fn trees_guess_what_texts_guess() {
    for config in configs() {
        let (m, layouts) = layouts(&config);
        for layers in layouts {
            let (t, p) = maps(&m, &layers);
            stir(&p);
            let lm = TransferLm::new(&m, &t).unwrap();
            let mut state = lm.new_state(1).unwrap();
            feed(&lm, &mut state, 0, &text(6));
            let tree = run(&lm, tree_step(&NODES), &mut state).features.unwrap();
            for (node, path) in [
                vec![0],
                vec![0, 1],
                vec![0, 2],
                vec![0, 1, 3],
                vec![0, 2, 4],
            ]
            .iter()
            .enumerate()
            {
                let mut tokens = text(6);
                tokens.extend(path.iter().map(|&n| NODES[n]));
                let reading = t.read(&m, &tokens).unwrap();
                let guess = t.guess(&m, &reading, &[tokens.len() - 1], true).unwrap();
                let want: Vec<f32> = guess.iter().flat_map(floats).collect();
                let got = floats(&tree.get(node as i64));
                assert_close(&want, &got, &format!("{config} {layers:?} node {node}"));
            }
        }
    }
}

#[test]
fn later_offsets_see_earlier_ones() {
    let m = model(&configs()[4]);
    let (t, p) = maps(&m, &[1, 1, 1]);
    stir(&p);
    let reading = t.read(&m, &text(9)).unwrap();
    let guess = |linked: bool| t.guess(&m, &reading, &[4, 7], linked).unwrap();
    let moved = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    let (linked, apart) = (guess(true), guess(false));
    assert_eq!(moved(&linked[0], &apart[0]), 0.0);
    assert!(moved(&linked[1], &apart[1]) > 1e-3);
    assert!(
        moved(&linked[2], &apart[2]) > 1e-3,
        "without the link, offset 3 is another"
    );
    // Neither does an offset see a later one, nor another anchor.
    let dim = m.config().dim;
    set(
        &p,
        "transfer.2.bias",
        &Tensor::ones([dim], (Kind::Float, Device::Cpu)),
    );
    let changed = guess(true);
    assert_eq!(moved(&linked[0], &changed[0]), 0.0);
    assert_eq!(moved(&linked[1], &changed[1]), 0.0);
    assert!(moved(&linked[2], &changed[2]) > 1e-3);
    let alone = t.guess(&m, &reading, &[7], true).unwrap();
    assert!(moved(&alone[1], &changed[1].get(1).unsqueeze(0)) < 1e-5);
}

#[test]
fn only_the_maps_learn() {
    let m = model(&configs()[4]);
    let params = ParamBuilder::init(11, Kind::Float, Device::Cpu);
    let mut c = m.config().clone();
    c.init_std = 0.3;
    // A model whose own parameters could learn, too.
    let decoder = crate::Decoder::new(&params, &c).unwrap();
    let m = CausalLm::new(
        decoder,
        std::path::Path::new("random"),
        sequor_nn::device::DType::F32,
    );
    let frozen = params.params();
    let lower = |name: &str| name.starts_with("model.layers.0.") || name.contains("embed");
    for param in frozen.iter().filter(|p| !lower(&p.name)) {
        let _ = param.tensor.shallow_clone().set_requires_grad(false);
    }
    let (t, p) = maps(&m, &[1, 2]);
    let reading = t.read(&m, &text(9)).unwrap();
    assert!(!reading.last.requires_grad());
    let guess = t.guess(&m, &reading, &[2, 5], true).unwrap();
    let loss = Tensor::cat(&guess, 0).square().sum(Kind::Float);
    loss.backward();
    for param in &frozen {
        assert!(
            !param.tensor.grad().defined(),
            "{} has a gradient",
            param.name
        );
    }
    for param in p.params() {
        let gradient = param.tensor.grad();
        assert!(
            gradient.abs().max().double_value(&[]) > 0.0,
            "{}",
            param.name
        );
    }
}

/// Keys of every layer, committed rows only.
fn keys(state: &KvCache, layers: usize) -> Vec<f32> {
    (0..layers)
        .flat_map(|l| floats(&state.view(0, l).unwrap().0.contiguous()))
        .collect()
}

#[test]
fn after_many_rounds_the_state_is_that_of_the_text() {
    for config in [&configs()[0], &configs()[4], &configs()[5]] {
        let m = model(config);
        let (t, p) = maps(&m, &[1, m.config().layers - 1]);
        stir(&p);
        let lm = TransferLm::new(&m, &t).unwrap().with_nodes(3);
        let mut state = lm.new_state(1).unwrap();
        let mut tokens = text(4);
        feed(&lm, &mut state, 0, &tokens);
        for (round, path) in [
            vec![0, 1, 3],
            vec![0],
            vec![0, 2],
            vec![0, 2, 4],
            vec![0, 1],
        ]
        .iter()
        .enumerate()
        {
            let nodes: Vec<u32> = NODES.iter().map(|n| n + round as u32).collect();
            let out = run(&lm, tree_step(&nodes), &mut state);
            let features = out.features.unwrap();
            let size = |row: i64| features.get(row).abs().max().double_value(&[]);
            assert!(size(2) > 0.0 && size(3) == 0.0, "three nodes guess");
            SequenceState::commit(&mut state, 0, path).unwrap();
            tokens.extend(path.iter().map(|&n| nodes[n]));
            let mut fresh = m.new_state(1).unwrap();
            feed(&m, &mut fresh, 0, &tokens);
            assert_eq!(SequenceState::committed_len(&state, 0), tokens.len());
            let layers = m.config().layers;
            let what = format!("{config} round {round}");
            assert_close(&keys(&fresh, layers), &keys(&state, layers), &what);
        }
        let next = feed(&lm, &mut state, 0, &[3]);
        tokens.push(3);
        let want = crate::tests::dense(&m, &tokens);
        assert_close(want.last().unwrap(), &next[0], "the token after all rounds");
    }
}

#[test]
fn the_text_is_the_plain_text() {
    let options = Options {
        depth: DepthPolicy::Fixed(3),
        draft_nodes: Some(8),
        ignore_eos: true,
        prefill_chunk: 4,
        ..Options::from(GenerationConfig::default()).max_new_tokens(12)
    };
    let sampled = Options {
        config: GenerationConfig {
            do_sample: Some(true),
            ..options.config.clone()
        },
        ..options.clone()
    };
    for config in configs() {
        let m = model(&config);
        let last = m.config().layers;
        let (mut t, p) = maps(&m, &[1, 1, last]);
        stir(&p);
        t.set_accuracies(vec![vec![0.5, 0.3, 0.1], vec![0.4, 0.2], vec![0.3]]);
        for options in [&options, &sampled] {
            let go = |_| ControlFlow::Continue(());
            let plain = Generator::new(&m, options.clone())
                .unwrap()
                .generate(&text(6), None, go)
                .unwrap();
            for nodes in [1, usize::MAX] {
                let lm = TransferLm::new(&m, &t).unwrap().with_nodes(nodes);
                let drafter = TransferDrafter::new(&m, &t, t.topology(8)).unwrap();
                let run = Generator::new(&lm, options.clone())
                    .unwrap()
                    .generate(&text(6), Some(Box::new(drafter)), go)
                    .unwrap();
                assert_eq!(run.tokens, plain.tokens, "{config}");
                assert!(run.report.drafted > 0);
            }
        }
    }
}

/// With the true states, the draft is what the model says two, three tokens later: an offset
/// too few or too many would draft the newest token again, or skip one.
#[test]
fn offsets_are_counted_from_the_token_after_the_newest() {
    let m = model(&configs()[4]);
    let layers = [2, 2];
    let (mut t, p) = maps(&m, &layers);
    let prompt = text(6);
    let go = |_| ControlFlow::Continue(());
    let options = Options {
        ignore_eos: true,
        ..Options::from(GenerationConfig::default()).max_new_tokens(3)
    };
    let plain = Generator::new(&m, options)
        .unwrap()
        .generate(&prompt, None, go)
        .unwrap();
    let mut tokens = prompt.clone();
    tokens.extend(&plain.tokens);
    // The states of the first two new tokens behind the layer of the maps.
    let _no_grad = tch::no_grad_guard();
    let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    let mut attend = Dense::new(1, 9, Mask::Causal);
    let positions: Vec<i64> = (0..9).collect();
    let ids = Tensor::from_slice(&ids);
    let truth = m
        .decoder()
        .forward(&Input::Ids(&ids), &positions, &mut attend, 0.0, &[1])
        .unwrap();
    let dim = m.config().dim;
    for j in 0..2 {
        set(
            &p,
            &format!("transfer.{j}.weight"),
            &Tensor::zeros([dim, dim], (Kind::Float, Device::Cpu)),
        );
        set(&p, &format!("transfer.{j}.bias"), &truth.taps[0].get(6 + j));
    }
    let lm = TransferLm::new(&m, &t).unwrap();
    let mut state = lm.new_state(1).unwrap();
    let step = Step {
        slot: 0,
        tokens: &prompt,
        layout: Layout::Chain,
        logits: LogitRows::Last,
        features: true,
    };
    let features = run(&lm, step, &mut state).features;
    let draft = |t: &HiddenTransfer, depth: usize| {
        let ctx = DraftContext {
            tokens: &tokens[..7],
            prompt_len: 6,
            max_length: 99,
            eos: &[],
            key: Key::new(0, 0),
            features: features.as_ref(),
        };
        let mut drafter = TransferDrafter::new(&m, t, Topology::Chain).unwrap();
        drafter.propose(&ctx, Budget::chain(depth)).unwrap()
    };
    assert_eq!(draft(&t, 9).units(), &plain.tokens[1..3]);
    assert_eq!(draft(&t, 1).units(), &plain.tokens[1..2]);
    assert!(draft(&t, 0).is_empty());
    // A part of the vocabulary without the right tokens drafts others of it.
    let others: Vec<u32> = (0..40).filter(|t| !plain.tokens.contains(t)).collect();
    let mut config = t.config().clone();
    config.draft_vocab_size = Some(others.len() as i64);
    let q = ParamBuilder::init(3, Kind::Float, Device::Cpu);
    t = HiddenTransfer::identity(&q, &config).unwrap();
    assert!(t.set_draft_tokens(vec![1]).is_err());
    t.set_draft_tokens(others.clone()).unwrap();
    let units = draft(&t, 2);
    assert!(units.len() == 2 && units.units().iter().all(|u| others.contains(u)));
}

#[test]
fn a_folder_says_what_it_was_made_for() {
    let m = model(&configs()[4]);
    let base = Base {
        name: "random".into(),
        fingerprint: m.fingerprint().unwrap(),
    };
    let mut config = TransferConfig::new(m.config(), vec![1, 2], base).unwrap();
    config.draft_vocab_size = Some(3);
    let p = ParamBuilder::init(3, Kind::Float, Device::Cpu);
    let mut t = HiddenTransfer::identity(&p, &config).unwrap();
    t.set_draft_tokens(vec![5, 0, 9]).unwrap();
    t.set_accuracies(vec![vec![0.5, 0.25], vec![0.5]]);
    let folder = tempfile::tempdir().unwrap();
    t.save(folder.path()).unwrap();
    let back = HiddenTransfer::load(folder.path(), &m).unwrap();
    assert_eq!(back.draft_tokens().unwrap(), [5, 0, 9]);
    assert_eq!(back.config().transfer_layers, [1, 2]);
    let Topology::Static(tree) = back.topology(3) else {
        panic!("a tree was measured")
    };
    assert_eq!(tree.len(), 3);
    let reading = t.read(&m, &text(5)).unwrap();
    let (a, b) = (
        t.guess(&m, &reading, &[4], true).unwrap(),
        back.guess(&m, &reading, &[4], true).unwrap(),
    );
    assert_eq!(floats(&a[1]), floats(&b[1]));

    let refused = |m: &CausalLm, word: &str| {
        let e = HiddenTransfer::load(folder.path(), m)
            .unwrap_err()
            .to_string();
        assert!(e.contains(word), "{e}");
    };
    // Another model of the same width: more layers, another identity.
    let mut other = configs()[4].clone();
    other["num_hidden_layers"] = 4.into();
    refused(&model(&other), "fingerprint");
    other["hidden_size"] = 48.into();
    refused(&model(&other), "hidden_size");
    let path = folder.path().join("heads.json");
    let write = |key: &str, value: Value| {
        let mut json = serde_json::to_value(t.config()).unwrap();
        json[key] = value;
        std::fs::write(&path, json.to_string()).unwrap();
    };
    for (key, value) in [
        ("transfer_layers", serde_json::json!([2, 1])),
        ("transfer_layers", serde_json::json!([0])),
        ("transfer_layers", serde_json::json!([])),
        ("draft_vocab_size", 41.into()),
        ("accuracies", serde_json::json!([[2.0]])),
        ("kind", "medusa".into()),
    ] {
        write(key, value);
        refused(&m, key);
    }
    write("draft_vocab_size", 2.into());
    refused(&m, "d2t");
    write("transfer_layers", serde_json::json!([1, 1, 2]));
    refused(&m, "transfer.2.weight");
}

#[test]
fn a_model_without_pseudo_rows_cannot_feed_the_drafter() {
    let m = model(&configs()[4]);
    let (t, _p) = maps(&m, &[1, 2]);
    let go = |_| ControlFlow::Continue(());
    let drafter = TransferDrafter::new(&m, &t, Topology::Chain).unwrap();
    let options = Options {
        depth: DepthPolicy::Fixed(2),
        ignore_eos: true,
        ..Options::from(GenerationConfig::default()).max_new_tokens(4)
    };
    let e = Generator::new(&m, options)
        .unwrap()
        .generate(&text(4), Some(Box::new(drafter)), go)
        .unwrap_err();
    assert!(e.to_string().contains("TransferLm"), "{e}");
    assert!(
        t.read(&m, &[]).is_err() && t.read(&m, &[99]).is_err() && t.read(&m, &[1; 65]).is_err()
    );
    let reading = t.read(&m, &[1, 2]).unwrap();
    assert!(
        t.guess(&m, &reading, &[2], true).is_err() && t.guess(&m, &reading, &[], true).is_err()
    );
}
