//! Heads of every kind: as networks, as drafters, as files.

use super::config::{Base, HeadsConfig, HeadsKind, LayerConfig};
use super::expand::{HydraBranches, Nets};
use super::network::Network;
use super::{HeadDrafter, Heads};
use crate::{CausalLm, Decoder, DecoderConfig};
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::device::DType;
use sequor_nn::weights::{self, write_safetensors};
use sequor_nn::{Device, Kind, ParamBuilder, Tensor, tch};
use sequor_sampling::draft::{Budget, DraftContext, Drafter, Expander};
use sequor_sampling::tree::{path_to, validate};
use sequor_sampling::{
    DepthPolicy, DraftTree, Error, Generation, GenerationConfig, Generator, Layout, LogitRows,
    Options, StaticTree, Step, TargetModel, Topology,
};
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

const VOCAB: u32 = 14;
const DIM: i64 = 16;
const KINDS: [HeadsKind; 4] = [
    HeadsKind::Medusa,
    HeadsKind::Hydra,
    HeadsKind::HydraPlus,
    HeadsKind::Eagle,
];

/// A random model whose greedy texts do not fall into a loop at once.
fn model(seed: u64) -> CausalLm {
    let config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": DIM, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 96});
    let mut c = DecoderConfig::from_json(&config).unwrap();
    c.init_std = 0.4;
    let params = ParamBuilder::init(seed, Kind::Float, Device::Cpu);
    CausalLm::new(
        Decoder::new(&params, &c).unwrap(),
        Path::new("random"),
        DType::F32,
    )
}

fn config(kind: HeadsKind, target: &CausalLm) -> HeadsConfig {
    let base = Base {
        name: "random".into(),
        fingerprint: target.fingerprint().unwrap(),
    };
    HeadsConfig::small(kind, target.config(), base)
}

fn normal(seed: u64, shape: &[i64]) -> Tensor {
    let n = shape.iter().product::<i64>() as usize;
    let mut values = vec![0f32; n];
    Key::new(seed, 0)
        .stream(0, Purpose::Test)
        .fill_normal_f32(&mut values);
    Tensor::from_slice(&values).reshape(shape)
}

fn set(p: &ParamBuilder, name: &str, value: &Tensor) {
    let _no_grad = tch::no_grad_guard();
    let mut param = p.params().into_iter().find(|x| x.name == name).unwrap();
    assert_eq!(param.tensor.size(), value.size(), "{name}");
    param.tensor.copy_(value);
}

/// Trainable heads with random numbers in all parameters.
fn random(config: &HeadsConfig, seed: u64) -> (ParamBuilder, Heads) {
    let p = ParamBuilder::init(seed, Kind::Float, Device::Cpu);
    let heads = Heads::new(&p, config).unwrap();
    for (i, param) in p.params().iter().enumerate() {
        let noise = normal(seed + 1000 * i as u64, &param.tensor.size()) * 0.3;
        let norm = param.name.contains("norm");
        set(&p, &param.name, &if norm { noise + 1.0 } else { noise });
    }
    (p, heads)
}

fn tensors(p: &ParamBuilder) -> Vec<(String, Tensor)> {
    let detached = |x: sequor_nn::params::Param| (x.name, x.tensor.detach());
    p.params().into_iter().map(detached).collect()
}

fn write(path: &Path, tensors: &[(String, Tensor)]) {
    let list: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (&n[..], t)).collect();
    write_safetensors(path, &list, &BTreeMap::new()).unwrap();
}

/// Writes a folder as training does.
fn save(dir: &Path, config: &HeadsConfig, p: &ParamBuilder, draft_tokens: Option<&[i64]>) {
    let mut list = tensors(p);
    if let Some(ids) = draft_tokens {
        list.push(("d2t".into(), Tensor::from_slice(ids)));
    }
    write(&dir.join("heads.safetensors"), &list);
    std::fs::write(dir.join("heads.json"), serde_json::to_vec(config).unwrap()).unwrap();
}

fn load(dir: &Path, target: &CausalLm) -> sequor_nn::Result<Heads> {
    Heads::load(dir, DType::F32, Device::Cpu, target)
}

/// Random heads of a kind, as they come from a file.
fn loaded(kind: HeadsKind, target: &CausalLm, seed: u64) -> Heads {
    let dir = tempfile::tempdir().unwrap();
    let config = config(kind, target);
    save(dir.path(), &config, &random(&config, seed).0, None);
    load(dir.path(), target).unwrap()
}

fn close(a: &Tensor, b: &Tensor, what: &str) {
    let worst = (a - b).abs().max().double_value(&[]);
    assert!(a.size() == b.size() && worst < 1e-5, "{what}: {worst}");
}

/// The states of `tokens` after the final norm, `[tokens, dim]`.
fn states(target: &CausalLm, tokens: &[u32]) -> Tensor {
    let mut state = target.new_state(1).unwrap();
    let step = Step {
        slot: 0,
        tokens,
        layout: Layout::Chain,
        logits: LogitRows::None,
        features: true,
    };
    let mut outputs = target.forward(&[step], &mut state).unwrap();
    outputs.remove(0).features.unwrap()
}

fn text(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i + 3 * i + 1) % VOCAB).collect()
}

fn context<'a>(tokens: &'a [u32], features: Option<&'a Tensor>) -> DraftContext<'a> {
    DraftContext {
        tokens,
        prompt_len: 1,
        max_length: 96,
        eos: &[],
        key: Key::new(0, 0),
        features,
    }
}

fn topologies() -> Vec<(Topology, Budget)> {
    let paths = [
        &[0][..],
        &[1],
        &[0, 0],
        &[2],
        &[0, 1],
        &[1, 0],
        &[0, 0, 0],
        &[0, 1, 0],
    ];
    let paths = paths.iter().map(|p| p.to_vec()).collect();
    vec![
        (Topology::Chain, Budget::chain(3)),
        (
            Topology::Static(StaticTree::new(paths).unwrap()),
            Budget { depth: 4, nodes: 8 },
        ),
        (
            Topology::Dynamic { top_k: 3 },
            Budget {
                depth: 4,
                nodes: 12,
            },
        ),
    ]
}

fn embeds(target: &CausalLm, tokens: &[u32]) -> Tensor {
    let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    target
        .decoder()
        .embed(&Tensor::from_slice(&ids).unsqueeze(0))
        .unwrap()
        .detach()
}

// Networks.

#[test]
fn training_starts_where_heads_give_back_the_state() {
    let target = model(1);
    let features = normal(5, &[2, 7, DIM]);
    let embeds = normal(6, &[2, 7, DIM]);
    for kind in KINDS {
        let p = ParamBuilder::init(3, Kind::Float, Device::Cpu);
        let heads = Heads::new(&p, &config(kind, &target)).unwrap();
        let out = heads.train_forward(&features, &embeds, 0.0).unwrap();
        assert_eq!(out.len(), if kind == HeadsKind::Eagle { 1 } else { 4 });
        for state in &out {
            if kind == HeadsKind::Eagle {
                assert_eq!(state.size(), features.size());
            } else {
                close(state, &features, kind.name());
            }
        }
        // Every parameter that matters at first has a gradient (up-projections and the like).
        out.iter()
            .map(|x| (x * &embeds).sum(Kind::Float))
            .reduce(|a, b| a + b)
            .unwrap()
            .backward();
        let moved = |x: &sequor_nn::params::Param| {
            x.tensor.grad().defined() && x.tensor.grad().abs().max().double_value(&[]) > 0.0
        };
        assert!(p.params().iter().any(moved), "{}", kind.name());
    }
    let p = ParamBuilder::init(3, Kind::Float, Device::Cpu);
    let heads = Heads::new(&p, &config(HeadsKind::Medusa, &target)).unwrap();
    let wide = normal(1, &[2, 7, DIM + 1]);
    assert!(heads.train_forward(&wide, &wide, 0.0).is_err());
    assert!(heads.train_forward(&features, &wide, 0.0).is_err());
    let dropped = heads.train_forward(&features, &embeds, 0.5).unwrap();
    close(
        &dropped[0],
        &features,
        "nothing is dropped from the state itself",
    );
    for kind in [HeadsKind::HiddenTransfer, HeadsKind::Router] {
        let p = ParamBuilder::init(3, Kind::Float, Device::Cpu);
        assert!(
            Heads::new(
                &p,
                &HeadsConfig {
                    kind,
                    ..config(HeadsKind::Medusa, &target)
                }
            )
            .is_err()
        );
    }
}

#[test]
fn hydra_without_its_path_is_medusa() {
    let target = model(1);
    let medusa_config = HeadsConfig {
        rank: None,
        ..config(HeadsKind::Medusa, &target)
    };
    let hydra_config = HeadsConfig {
        rank: None,
        ..config(HeadsKind::Hydra, &target)
    };
    let (medusa_params, medusa) = random(&medusa_config, 4);
    let (hydra_params, hydra) = random(&hydra_config, 5);
    let widened = |i: i64, weight: &Tensor| {
        Tensor::cat(
            &[
                weight,
                &Tensor::zeros([DIM, DIM * (i + 1)], (Kind::Float, Device::Cpu)),
            ],
            1,
        )
    };
    for i in 0..4 {
        let block = format!("heads.{i}.blocks.0");
        let all = tensors(&medusa_params);
        let get = |what: &str| {
            let name = format!("{block}.linear.{what}");
            all.iter()
                .find(|(n, _)| *n == name)
                .unwrap()
                .1
                .shallow_clone()
        };
        set(
            &hydra_params,
            &format!("{block}.linear.weight"),
            &widened(i, &get("weight")),
        );
        set(&hydra_params, &format!("{block}.linear.bias"), &get("bias"));
        let one = Tensor::eye(DIM, (Kind::Float, Device::Cpu));
        set(
            &hydra_params,
            &format!("{block}.residual.weight"),
            &widened(i, &one),
        );
        set(
            &hydra_params,
            &format!("{block}.residual.bias"),
            &(get("bias") * 0.0),
        );
    }
    let (features, embeds) = (normal(5, &[2, 7, DIM]), normal(6, &[2, 7, DIM]));
    let a = medusa.train_forward(&features, &embeds, 0.0).unwrap();
    let b = hydra.train_forward(&features, &embeds, 0.0).unwrap();
    for (a, b) in a.iter().zip(&b) {
        close(a, b, "states");
    }
    let tokens = text(9);
    let features = states(&target, &tokens[..8]);
    for (topology, budget) in topologies() {
        let propose = |heads: &Heads| {
            let mut drafter = HeadDrafter::new(&target, heads, topology.clone()).unwrap();
            drafter
                .propose(&context(&tokens, Some(&features)), budget)
                .unwrap()
        };
        assert_eq!(propose(&medusa), propose(&hydra));
    }
}

#[test]
fn hydra_continues_a_node_from_its_own_path() {
    let target = model(1);
    let heads = loaded(HeadsKind::Hydra, &target, 9);
    let Network::Hydra { heads: list, .. } = &heads.network else {
        panic!("hydra heads are hydra heads");
    };
    let nets = Nets {
        target: &target,
        heads: &heads,
    };
    let state = normal(3, &[1, DIM]);
    let children = |tokens: Vec<u32>| {
        let tree = DraftTree::tree(tokens, &[None, None]).unwrap();
        let mut branches = HydraBranches::new(nets, list, &state, 2);
        let _no_grad = tch::no_grad_guard();
        branches.expand(&tree, &[Some(0), Some(1)], 5).unwrap()
    };
    let (ab, ba) = (children(vec![3, 8]), children(vec![8, 3]));
    let ids = |list: &[(u32, f32)]| list.iter().map(|(t, _)| *t).collect::<Vec<_>>();
    assert_ne!(ids(&ab[0]), ids(&ab[1]), "other parents, other children");
    assert_eq!((ids(&ab[0]), ids(&ab[1])), (ids(&ba[1]), ids(&ba[0])));
    let total: f32 = children(vec![3, 8])[0].iter().map(|(_, p)| p.exp()).sum();
    assert!(total < 1.0 && total > 5.0 / VOCAB as f32);
    let tree = DraftTree::tree(
        vec![1, 2, 3, 4, 5],
        &[None, Some(0), Some(1), Some(2), Some(3)],
    );
    let mut branches = HydraBranches::new(nets, list, &state, 2);
    assert_eq!(branches.max_depth(), 4);
    let beyond = branches.expand(&tree.unwrap(), &[Some(4)], 5).unwrap();
    assert!(beyond[0].is_empty(), "there is no fifth head");
}

#[test]
fn drafting_computes_what_training_computed() {
    let target = model(2);
    let tokens = text(11);
    let all = states(&target, &tokens);
    let known = all.narrow(0, 0, 10);
    for kind in KINDS {
        let heads = loaded(kind, &target, 21);
        let _no_grad = tch::no_grad_guard();
        let trained = heads
            .train_forward(&all.unsqueeze(0), &embeds(&target, &tokens), 0.0)
            .unwrap();
        // Entry 9 of head 0 has read token 10, the root, and guesses token 11.
        let state = trained[0].get(0).get(9);
        let best = target.decoder().logits(&state).unwrap().argmax(0, false);
        let mut drafter = HeadDrafter::new(&target, &heads, Topology::Chain).unwrap();
        let tree = drafter
            .propose(&context(&tokens, Some(&known)), Budget::chain(1))
            .unwrap();
        assert_eq!(
            i64::from(tree.units()[0]),
            best.int64_value(&[]),
            "{}",
            kind.name()
        );
    }
}

// Drafters.

fn generate<'d>(
    target: &CausalLm,
    prompt: &[u32],
    budget: Budget,
    chunk: usize,
    drafter: Option<Box<dyn Drafter + 'd>>,
) -> Generation {
    let config = GenerationConfig {
        max_new_tokens: Some(48),
        ..GenerationConfig::default()
    };
    let options = Options {
        draft_nodes: Some(budget.nodes),
        prefill_chunk: chunk,
        ignore_eos: true,
        ..Options::from(config).depth(DepthPolicy::Fixed(budget.depth))
    };
    let generator = Generator::new(target, options).unwrap();
    generator
        .generate(prompt, drafter, |_| std::ops::ControlFlow::Continue(()))
        .unwrap()
}

#[test]
fn every_drafter_and_topology_keeps_the_greedy_text() {
    for kind in KINDS {
        let mut accepted = 0;
        for seed in [1, 2] {
            let target = model(seed);
            let prompt = text(7);
            let plain = generate(&target, &prompt, Budget::chain(1), 512, None).tokens;
            assert!(plain.iter().collect::<HashSet<_>>().len() > 2, "{plain:?}");
            let heads = loaded(kind, &target, 31);
            for (topology, budget) in topologies() {
                let drafter = HeadDrafter::new(&target, &heads, topology.clone()).unwrap();
                let out = generate(&target, &prompt, budget, 512, Some(Box::new(drafter)));
                let what = format!("{} {topology:?}", kind.name());
                assert_eq!(out.tokens, plain, "{what}");
                assert_eq!(out.report.drafter, kind.name());
                assert!(out.report.drafted > 40, "{what}");
                accepted += out.report.accepted;
            }
        }
        assert!(accepted > 10, "{}: {accepted}", kind.name());
    }
}

/// Compares every proposal with that of a drafter that is new to the sequence.
struct Compared<'m> {
    inner: HeadDrafter<'m>,
    target: &'m CausalLm,
    heads: &'m Heads,
    features: Option<Tensor>,
    rounds: usize,
}

impl Drafter for Compared<'_> {
    fn name(&self) -> &str {
        "compared"
    }
    fn propose(
        &mut self,
        ctx: &DraftContext<'_>,
        budget: Budget,
    ) -> sequor_sampling::Result<DraftTree> {
        let new = ctx.features.unwrap();
        let all = match &self.features {
            Some(old) => Tensor::cat(&[old, new], 0),
            None => new.shallow_clone(),
        };
        assert_eq!(all.size()[0] as usize, ctx.tokens.len() - 1);
        let topology = self.inner.topology().clone();
        let mut fresh = HeadDrafter::new(self.target, self.heads, topology)?;
        let everything = DraftContext {
            features: Some(&all),
            ..*ctx
        };
        let expected = fresh.propose(&everything, budget)?;
        let tree = self.inner.propose(ctx, budget)?;
        assert_eq!(tree, expected, "round {}", self.rounds);
        // Asking again without news gives the same answer.
        let again = DraftContext {
            features: None,
            ..*ctx
        };
        assert_eq!(self.inner.propose(&again, budget)?, expected);
        self.features = Some(all);
        self.rounds += 1;
        Ok(tree)
    }
    fn reset(&mut self) {}
    fn wants_features(&self) -> bool {
        true
    }
}

#[test]
fn many_rounds_leave_what_one_pass_would() {
    let target = model(2);
    for kind in KINDS {
        let heads = loaded(kind, &target, 31);
        for (topology, budget) in topologies() {
            let compared = Compared {
                inner: HeadDrafter::new(&target, &heads, topology).unwrap(),
                target: &target,
                heads: &heads,
                features: None,
                rounds: 0,
            };
            generate(&target, &text(9), budget, 4, Some(Box::new(compared)));
        }
    }
}

#[test]
fn a_dynamic_tree_is_connected_and_exactly_as_large_as_asked() {
    let target = model(2);
    let heads = loaded(HeadsKind::Eagle, &target, 31);
    let tokens = text(9);
    let features = states(&target, &tokens[..8]);
    for nodes in [1, 7, 20, 40] {
        let mut drafter =
            HeadDrafter::new(&target, &heads, Topology::Dynamic { top_k: 4 }).unwrap();
        let budget = Budget { depth: 5, nodes };
        let tree = drafter
            .propose(&context(&tokens, Some(&features)), budget)
            .unwrap();
        assert_eq!(tree.len(), nodes);
        validate(tree.parents()).unwrap();
        let paths: HashSet<Vec<u32>> = (0..nodes)
            .map(|n| {
                let path = path_to(tree.parents(), n);
                path.into_iter().map(|n| tree.units()[n]).collect()
            })
            .collect();
        assert_eq!(paths.len(), nodes, "every path once");
        assert!(paths.iter().all(|p| p.len() <= 5));
    }
}

#[test]
fn a_node_of_eagle_equals_a_committed_row() {
    // What the layer says about a drafted path is what it would say had the target taken that
    // path and given the predicted states.
    let target = model(2);
    let heads = loaded(HeadsKind::Eagle, &target, 31);
    let Network::Eagle(eagle) = &heads.network else {
        panic!("eagle heads are eagle heads");
    };
    let tokens = text(9);
    let features = states(&target, &tokens[..8]);
    let mut drafter = HeadDrafter::new(&target, &heads, Topology::Dynamic { top_k: 3 }).unwrap();
    let budget = Budget {
        depth: 4,
        nodes: 30,
    };
    let tree = drafter
        .propose(&context(&tokens, Some(&features)), budget)
        .unwrap();
    let _no_grad = tch::no_grad_guard();
    let dense = |tokens: &[u32], features: &Tensor| {
        // Pairs of a state and the token after it, all at once.
        let next = embeds(&target, &tokens[1..]).get(0);
        let x = eagle.pairs(&next, features).unwrap();
        let n = x.size()[0];
        let positions: Vec<i64> = (0..n).collect();
        let mut attend = sequor_nn::attention::Dense::new(1, n, sequor_nn::mask::Mask::Causal);
        let y = eagle
            .layer
            .forward(&x, &positions, &mut attend, 0.0)
            .unwrap();
        y.narrow(0, n - 1, 1)
    };
    let mut checked = 0;
    for node in 0..tree.len() {
        let (mut tokens, mut features) = (tokens.clone(), features.shallow_clone());
        let mut state = dense(&tokens, &features);
        for n in path_to(tree.parents(), node) {
            let logits = target.decoder().logits(&state).unwrap().get(0);
            let (_, best) = logits.topk(3, 0, true, true);
            let best: Vec<i64> = Vec::try_from(best).unwrap();
            let token = tree.units()[n];
            assert!(
                best.contains(&i64::from(token)),
                "node {n}: {token} of {best:?}"
            );
            tokens.push(token);
            features = Tensor::cat(&[&features, &state], 0);
            state = dense(&tokens, &features);
            checked += 1;
        }
    }
    assert!(checked > 30);
}

#[test]
fn a_drafter_may_change_sequences_and_start_in_the_middle() {
    let target = model(2);
    for kind in KINDS {
        let heads = loaded(kind, &target, 31);
        let (topology, budget) = topologies().remove(2);
        let new = || HeadDrafter::new(&target, &heads, topology.clone()).unwrap();
        let mut carried = new();
        for prompt in [text(7), text(12)[3..].to_vec(), text(7)] {
            let out = generate(&target, &prompt, budget, 3, Some(Box::new(&mut carried)));
            let fresh = generate(&target, &prompt, budget, 3, Some(Box::new(new())));
            assert_eq!(out.tokens, fresh.tokens);
            assert_eq!(
                out.report.accepted,
                fresh.report.accepted,
                "{}",
                kind.name()
            );
        }
        // The first states are unknown: those of the last three tokens must do.
        let tokens = text(10);
        let tail = states(&target, &tokens[..9]).narrow(0, 6, 3);
        let resumed = carried
            .propose(&context(&tokens, Some(&tail)), budget)
            .unwrap();
        assert_eq!(resumed.len(), 12);
        // No states and nothing remembered: no idea.
        carried.reset();
        let nothing = carried.propose(&context(&tokens, None), budget).unwrap();
        assert!(nothing.is_empty());
        // A gap in what was told: no idea either.
        carried
            .propose(&context(&tokens, Some(&tail)), budget)
            .unwrap();
        let longer = text(14);
        let gap = carried.propose(&context(&longer, None), budget).unwrap();
        assert!(gap.is_empty());
        assert!(
            carried
                .propose(&context(&[], None), budget)
                .unwrap()
                .is_empty()
        );
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let target = model(2);
    let tokens = text(5);
    let budget = Budget::chain(2);
    for kind in KINDS {
        let heads = loaded(kind, &target, 31);
        let mut drafter = HeadDrafter::new(&target, &heads, Topology::Chain).unwrap();
        let mut refused = |features: Tensor| {
            let e = drafter.propose(&context(&tokens, Some(&features)), budget);
            assert!(matches!(e, Err(Error::Contract { .. })), "{e:?}");
        };
        refused(normal(1, &[4, DIM + 1]));
        refused(normal(1, &[5, DIM]));
        refused(normal(1, &[DIM]));
        refused(normal(1, &[4, DIM]) * f64::NAN);
        // After all that the drafter is as good as new.
        let good = drafter
            .propose(
                &context(&tokens, Some(&states(&target, &tokens[..4]))),
                budget,
            )
            .unwrap();
        assert_eq!(good.len(), 2);
    }
    let other = {
        let mut c = target.config().clone();
        c.vocab_size = 15;
        let params = ParamBuilder::init(1, Kind::Float, Device::Cpu);
        CausalLm::new(
            Decoder::new(&params, &c).unwrap(),
            Path::new("other"),
            DType::F32,
        )
    };
    let heads = loaded(HeadsKind::Medusa, &target, 1);
    assert!(HeadDrafter::new(&other, &heads, Topology::Chain).is_err());
    assert!(HeadDrafter::new(&target, &heads, Topology::Dynamic { top_k: 0 }).is_err());
}

// Files.

#[test]
fn a_folder_comes_back_and_drafts_its_own_tokens() {
    let target = model(2);
    let tokens = text(9);
    let features = states(&target, &tokens[..8]);
    let drafted = [9i64, 2, 5, 11, 0, 3];
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let config = HeadsConfig {
            draft_vocab_size: Some(6),
            accuracies: vec![vec![0.5, 0.25], vec![0.4]],
            ..config(kind, &target)
        };
        let (p, trained) = random(&config, 7);
        save(dir.path(), &config, &p, Some(&drafted));
        let heads = load(dir.path(), &target).unwrap();
        let read = heads.config();
        assert_eq!(
            (read.kind, &read.base, &read.accuracies),
            (kind, &config.base, &config.accuracies)
        );
        let _no_grad = tch::no_grad_guard();
        let (f, e) = (normal(5, &[2, 7, DIM]), normal(6, &[2, 7, DIM]));
        let (a, b) = (
            trained.train_forward(&f, &e, 0.0).unwrap(),
            heads.train_forward(&f, &e, 0.0).unwrap(),
        );
        a.iter().zip(&b).for_each(|(a, b)| close(a, b, kind.name()));
        let head = target.decoder().head();
        assert_eq!(heads.logits(0, &b[0], head).unwrap().size(), [2, 7, 6]);
        assert!(heads.logits(4, &b[0], head).is_err());
        let topology = Topology::Dynamic { top_k: 6 };
        let mut drafter = HeadDrafter::new(&target, &heads, topology.clone()).unwrap();
        let budget = Budget {
            depth: 2,
            nodes: 20,
        };
        let tree = drafter
            .propose(&context(&tokens, Some(&features)), budget)
            .unwrap();
        let used: HashSet<i64> = tree.units().iter().map(|&t| i64::from(t)).collect();
        assert_eq!(used, drafted.into_iter().collect(), "{}", kind.name());
        // Heads in training have to be told which tokens.
        assert!(HeadDrafter::new(&target, &trained, topology.clone()).is_err());
        let mut trained = trained;
        let ids: Vec<u32> = drafted.iter().map(|&t| t as u32).collect();
        assert!(
            trained
                .set_draft_tokens(vec![1], target.decoder().head())
                .is_err()
        );
        trained
            .set_draft_tokens(ids, target.decoder().head())
            .unwrap();
        let mut drafter = HeadDrafter::new(&target, &trained, topology).unwrap();
        let same = drafter.propose(&context(&tokens, Some(&features)), budget);
        assert_eq!(same.unwrap(), tree);
    }
}

#[test]
fn folders_that_do_not_fit_are_refused_with_reasons() {
    let target = model(2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let refused = |word: &str| {
        let e = load(path, &target).unwrap_err().to_string();
        assert!(e.contains(word), "{word}: {e}");
    };
    refused("holds no draft heads");
    let good = config(HeadsKind::HydraPlus, &target);
    let (p, _) = random(&good, 7);
    let with = |change: fn(&mut HeadsConfig)| {
        let mut c = good.clone();
        change(&mut c);
        save(path, &c, &p, None);
    };
    with(|c| {
        c.base = Base {
            name: "another-model".into(),
            fingerprint: "00".into(),
        }
    });
    refused("made for 'another-model'");
    with(|c| c.hidden_size = 32);
    refused("states of 32");
    with(|c| c.heads = 5);
    refused("heads.4.blocks.0.linear_down.weight");
    with(|c| c.rank = Some(5));
    refused("shape: heads.0.blocks.0.linear_down.weight");
    with(|c| c.rank = Some(0));
    refused("rank must be");
    with(|c| c.heads = 1 << 40);
    refused("heads must be");
    with(|c| c.layer = None);
    refused("layer is missing");
    with(|c| c.layer.as_mut().unwrap().kv_heads = 3);
    refused("cannot share");
    with(|c| c.layer.as_mut().unwrap().head_dim = 5);
    refused("even number");
    with(|c| c.accuracies = vec![vec![1.5]]);
    refused("probabilities");
    with(|c| c.kind = HeadsKind::Router);
    refused("router");
    with(|c| c.draft_vocab_size = Some(2));
    refused("d2t");
    let cut = HeadsConfig {
        draft_vocab_size: Some(2),
        ..good.clone()
    };
    for (ids, word) in [
        (&[1i64, 2, 3][..], "has shape [3]"),
        (&[1, 1], "twice"),
        (&[1, 14], "outside the vocabulary"),
        (&[1, -1], "outside the vocabulary"),
    ] {
        save(path, &cut, &p, Some(ids));
        refused(word);
    }
    std::fs::write(path.join("heads.json"), "{\"kind\": \"crystal-ball\"}").unwrap();
    refused("crystal-ball");
    std::fs::write(path.join("heads.json"), "{").unwrap();
    refused("not valid JSON");
    assert!(load(&path.join("heads.json"), &target).is_err());
    let kinds = [
        "medusa",
        "hydra",
        "hydra++",
        "eagle",
        "hidden-transfer",
        "router",
    ];
    for name in kinds {
        let kind: HeadsKind = serde_json::from_value(json!(name)).unwrap();
        assert_eq!(kind.name(), name);
    }
}

/// Heads as published: own output matrices and full first blocks.
fn published(kind: HeadsKind, target: &CausalLm) -> HeadsConfig {
    let layer = LayerConfig {
        final_norm: kind == HeadsKind::HydraPlus,
        ..LayerConfig::copy_of(target.config()).unwrap()
    };
    HeadsConfig {
        rank: None,
        own_outputs: kind != HeadsKind::Eagle,
        layers: 2,
        layer: matches!(kind, HeadsKind::HydraPlus | HeadsKind::Eagle).then_some(layer),
        ..config(kind, target)
    }
}

/// Does the folder hold the same heads?
fn same(dir: &Path, target: &CausalLm, expected: &Heads) -> Heads {
    let found = load(dir, target).unwrap();
    let _no_grad = tch::no_grad_guard();
    let (f, e) = (normal(5, &[2, 7, DIM]), normal(6, &[2, 7, DIM]));
    let a = expected.train_forward(&f, &e, 0.0).unwrap();
    let b = found.train_forward(&f, &e, 0.0).unwrap();
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).for_each(|(a, b)| close(a, b, "states"));
    let tokens = text(6);
    let features = states(target, &tokens[..5]);
    let propose = |heads: &Heads| {
        let mut drafter = HeadDrafter::new(target, heads, Topology::Dynamic { top_k: 3 }).unwrap();
        let budget = Budget { depth: 4, nodes: 9 };
        drafter
            .propose(&context(&tokens, Some(&features)), budget)
            .unwrap()
    };
    if found.draft_tokens().is_none() {
        assert_eq!(propose(&found), propose(expected));
    }
    found
}

#[test]
fn published_folders_are_read() {
    let target = model(2);
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let (p, expected) = random(&published(kind, &target), 17);
        let plus = kind == HeadsKind::HydraPlus;
        let rename = |name: &str| -> String {
            let name = name.replace(".residual.", ".res_connection.");
            let parts: Vec<&str> = name.split('.').collect();
            match (kind, &parts[..]) {
                (HeadsKind::Medusa, ["heads", i, "output", "weight"]) => format!("{i}.2.weight"),
                (HeadsKind::Medusa, ["heads", i, "blocks", j, rest @ ..]) => {
                    format!("{i}.{j}.{}", rest.join("."))
                }
                (_, ["heads", i, "output", what]) if plus => format!("hydra_lm_head.{i}.1.{what}"),
                (_, ["heads", i, "output", what]) => format!("hydra_lm_head.{i}.{what}"),
                (_, ["heads", i, "blocks", j, rest @ ..]) => {
                    let j: usize = j.parse().unwrap();
                    let index = if plus { 2 * j + 1 } else { j };
                    format!("hydra_mlp.{i}.{index}.{}", rest.join("."))
                }
                (_, ["prefix", "norm", "weight"]) => "prefix_embeding_layer.norm.weight".into(),
                (_, ["prefix", rest @ ..]) => {
                    format!("prefix_embeding_layer.layers.0.{}", rest.join("."))
                }
                (_, ["layer", rest @ ..]) => format!("layers.0.{}", rest.join(".")),
                _ => name.clone(),
            }
        };
        let mut list: Vec<(String, Tensor)> = tensors(&p)
            .into_iter()
            .map(|(name, t)| (rename(&name), t))
            .collect();
        let llama = json!({"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "architectures": ["EaModel"]});
        let (file, options) = match kind {
            HeadsKind::Medusa => ("medusa_lm_head.safetensors", json!({"medusa_num_heads": 2})),
            HeadsKind::Eagle => {
                list.push((
                    "embed_tokens.weight".into(),
                    normal(1, &[i64::from(VOCAB), DIM]),
                ));
                ("model.safetensors", llama.clone())
            }
            _ => {
                list.push((
                    "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq".into(),
                    normal(1, &[2]),
                ));
                if plus {
                    list.push((
                        "prefix_embeding_layer.embed_tokens.weight".into(),
                        normal(1, &[3, 3]),
                    ));
                } else {
                    list.pop();
                }
                (
                    "hydra_lm_head.pt",
                    json!({"hydra_head_arch": if plus {"prefix-mlp"} else {"mlp"}, "hidden_state_offset": 0,
                    "grounded_heads": true, "base_model_name_or_path": "the-base"}),
                )
            }
        };
        write(&dir.path().join(file), &list);
        let put = |options: &serde_json::Value| {
            std::fs::write(dir.path().join("config.json"), options.to_string()).unwrap();
        };
        put(&options);
        let found = same(dir.path(), &target, &expected);
        assert_eq!(found.config().kind, kind);
        assert!(found.config().base.fingerprint.is_empty());

        // A model of another width.
        let mut c = target.config().clone();
        (c.dim, c.embed_dim) = (8, 8);
        let params = ParamBuilder::init(1, Kind::Float, Device::Cpu);
        let small = CausalLm::new(
            Decoder::new(&params, &c).unwrap(),
            Path::new("small"),
            DType::F32,
        );
        let e = load(dir.path(), &small).unwrap_err().to_string();
        assert!(
            e.contains("states of 16") && e.contains("states of 8"),
            "{e}"
        );

        let lacking: Vec<_> = list
            .iter()
            .filter(|(n, _)| !n.contains("1.linear.bias") && !n.contains("q_proj"))
            .map(|(n, t)| (n.clone(), t.shallow_clone()))
            .collect();
        if lacking.len() < list.len() {
            write(&dir.path().join(file), &lacking);
            let e = load(dir.path(), &target).unwrap_err().to_string();
            assert!(e.contains("missing"), "{e}");
        }
        match kind {
            HeadsKind::Medusa => {
                let prefixed = list
                    .iter()
                    .map(|(n, t)| (format!("medusa_head.{n}"), t.shallow_clone()));
                write(&dir.path().join(file), &prefixed.collect::<Vec<_>>());
                same(dir.path(), &target, &expected);
            }
            HeadsKind::Eagle => {
                // Distances from draft id to target id, as EAGLE-3 stores them.
                let mut cut: Vec<_> = list
                    .iter()
                    .map(|(n, t)| (n.clone(), t.shallow_clone()))
                    .collect();
                cut.push(("d2t".into(), Tensor::from_slice(&[2i64, 2, 5])));
                write(&dir.path().join(file), &cut);
                let found = same(dir.path(), &target, &expected);
                assert_eq!(found.draft_tokens(), Some(&[2u32, 3, 7][..]));
                cut.push((
                    "midlayer.self_attn.q_proj.weight".into(),
                    normal(1, &[2, 2]),
                ));
                write(&dir.path().join(file), &cut);
                let e = load(dir.path(), &target).unwrap_err().to_string();
                assert!(e.contains("EAGLE-3"), "{e}");
            }
            _ => {
                assert_eq!(found.config().base.name, "the-base");
                for (key, value) in [
                    ("hydra_head_arch", json!("eagle-attn")),
                    ("hidden_state_offset", json!(2)),
                ] {
                    let mut changed = options.clone();
                    changed[key] = value;
                    put(&changed);
                    let e = load(dir.path(), &target).unwrap_err().to_string();
                    assert!(e.starts_with("not supported"), "{e}");
                }
            }
        }
    }
}

#[test]
fn heads_in_sixteen_bits_draft_too() {
    let target = model(2);
    let config = config(HeadsKind::Eagle, &target);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &config, &random(&config, 7).0, None);
    assert!(weights::open(&dir.path().join("heads.safetensors")).is_ok());
    let heads = Heads::load(dir.path(), DType::Bf16, Device::Cpu, &target).unwrap();
    let (topology, budget) = topologies().remove(2);
    let drafter = HeadDrafter::new(&target, &heads, topology).unwrap();
    let plain = generate(&target, &text(7), budget, 512, None).tokens;
    let out = generate(&target, &text(7), budget, 512, Some(Box::new(drafter)));
    assert_eq!(out.tokens, plain);
}
