//! Cases of draft heads: Medusa, Hydra, EAGLE-2.

use crate::{Outputs, Result, load_all};
use sequor_backbone::decoder::Input;
use sequor_backbone::heads::{HeadDrafter, Heads};
use sequor_backbone::{CausalLm, Decoder, DecoderConfig, causal_lm, keys};
use sequor_nn::attention::Dense;
use sequor_nn::device::DType;
use sequor_nn::mask::Mask;
use sequor_nn::{Device, Kind, ParamBuilder, Tensor, tch, weights};
use sequor_sampling::draft::{Budget, DraftContext, Drafter};
use sequor_sampling::tree::{ancestor_mask, depths, path_to};
use sequor_sampling::{
    DepthPolicy, DraftTree, Event, Generator, Key, Options, StaticTree, Topology,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Classes that this module runs.
pub const CLASSES: [&str; 3] = ["MedusaModelLlama", "HydraModel", "EaModel"];

type Inputs = BTreeMap<String, Tensor>;

/// Runs a case of one of [`CLASSES`].
pub fn run(class: &str, dir: &Path, inputs: &Inputs) -> Result<Outputs> {
    let _no_grad = tch::no_grad_guard();
    let config = causal_lm::read_json(&dir.join("config.json"))?;
    if class == "EaModel" {
        return eagle(dir, &config, inputs);
    }
    let target = base(dir, &config)?;
    let heads = Heads::load(dir, DType::F32, Device::Cpu, &target)?;
    let ids = input(inputs, "input_ids")?;
    let (hidden, logits) = base_forward(&target, ids)?;
    let mut outputs = Outputs::from([("hidden".into(), hidden), ("logits".into(), logits)]);
    if class == "MedusaModelLlama" {
        let given = input(inputs, "given_hidden")?;
        let states = heads.train_forward(given, given, 0.0)?;
        let all = head_logits(&heads, &states, &target)?;
        outputs.insert("medusa_logits".into(), Tensor::f_stack(&all, 0)?);
        typical_acceptance(inputs, &mut outputs)?;
    } else {
        let given = input(inputs, "given_hidden")?;
        let ids = input(inputs, "given_ids")?;
        let states = heads.train_forward(given, &target.decoder().embed(ids)?, 0.0)?;
        for (i, logits) in head_logits(&heads, &states, &target)?.iter().enumerate() {
            // Later rows lack the tokens of their path.
            let rows = logits.size()[1] - 1 - i as i64;
            let known = logits.f_get(0)?.f_narrow(0, 0, rows)?;
            outputs.insert(format!("head{i}_logits"), known);
        }
    }
    for tree in ["a", "b"] {
        let choices: Vec<Vec<usize>> =
            serde_json::from_value(config[format!("tree_{tree}")].clone())?;
        let buffers = Buffers::new(choices)?;
        let mut add = |name: &str, value: Tensor| outputs.insert(format!("{tree}_{name}"), value);
        add("attn_mask", mask(&buffers.rows)?);
        add("position_ids", vector(&positions(&buffers.rows))?);
        add("retrieve_indices", matrix(&buffers.retrieve())?);
        let proposed = if class == "MedusaModelLlama" {
            add("tree_indices", vector(&buffers.tree_indices())?);
            None
        } else {
            let [children, to_expand] = buffers.children();
            add("children_per_head", vector(&children)?);
            add("children_to_expand_per_head", vector(&to_expand)?);
            add("beam_sizes", vector(&buffers.beam_sizes())?);
            add("max_accepts", vector(&buffers.max_accepts())?);
            Some(buffers.propose(&target, &heads, &tokens(ids)?)?)
        };
        if let Some(proposed) = proposed {
            let last = proposed.last().copied().unwrap_or(0);
            let shown = |i: &i64| proposed.get(*i as usize).copied().unwrap_or(last);
            let rows = buffers.retrieve();
            let rows: Vec<Vec<i64>> = rows.iter().map(|r| r.iter().map(shown).collect()).collect();
            add("candidates", matrix(&rows)?);
            add("tree_tokens", vector(&proposed)?);
        }
        let rounds = config["max_steps"].as_u64().ok_or("max_steps is missing")?;
        let (generated, after) = buffers.generate(&target, &heads, &tokens(ids)?, rounds)?;
        add("generated", vector(&generated)?);
        add("tokens_after_round", vector(&after)?);
    }
    Ok(outputs)
}

fn input<'a>(inputs: &'a Inputs, name: &str) -> Result<&'a Tensor> {
    inputs
        .get(name)
        .ok_or_else(|| format!("the inputs hold no tensor {name}").into())
}

fn tokens(ids: &Tensor) -> Result<Vec<u32>> {
    let ids: Vec<i64> = sequor_kernels::bridge::to_vec(ids)?;
    Ok(ids.into_iter().map(|t| t as u32).collect())
}

fn vector(values: &[i64]) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?)
}

fn matrix(rows: &[Vec<i64>]) -> Result<Tensor> {
    let flat: Vec<i64> = rows.iter().flatten().copied().collect();
    Ok(Tensor::f_from_slice(&flat)?.f_reshape([rows.len() as i64, -1])?)
}

/// The config of the decoder that a class of heads stands on.
fn llama(config: &Value) -> Result<DecoderConfig> {
    let mut config = config.clone();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    Ok(DecoderConfig::from_json(&config)?)
}

/// The decoder that the heads of a case were made for.
fn base(dir: &Path, config: &Value) -> Result<CausalLm> {
    let config = llama(config)?;
    let source = weights::open(&dir.join("model.safetensors"))?;
    let source = keys::canonical(source, &config)?;
    let params = ParamBuilder::load(source, Kind::Float, Device::Cpu);
    let decoder = Decoder::new(&params, &config)?;
    params.finish()?;
    Ok(CausalLm::new(decoder, dir, DType::F32))
}

/// States after the final norm and logits, `[batch, time, ..]`.
fn base_forward(target: &CausalLm, ids: &Tensor) -> Result<(Tensor, Tensor)> {
    let [batch, time] = ids.size()[..] else {
        return Err("input_ids must be [batch, time]".into());
    };
    let positions: Vec<i64> = (0..batch).flat_map(|_| 0..time).collect();
    let flat = ids.f_reshape([-1])?;
    let mut attend = Dense::new(batch, time, Mask::Causal);
    let hidden = target
        .decoder()
        .forward(&Input::Ids(&flat), &positions, &mut attend, 0.0, &[])?;
    let hidden = hidden.last.f_reshape([batch, time, -1])?;
    let logits = target.decoder().logits(&hidden)?;
    Ok((hidden, logits))
}

/// The scores of every head for its states.
fn head_logits(heads: &Heads, states: &[Tensor], target: &CausalLm) -> Result<Vec<Tensor>> {
    let head = target.decoder().head();
    let scores = states.iter().enumerate();
    Ok(scores
        .map(|(i, states)| heads.logits(i, states, head))
        .collect::<sequor_nn::Result<_>>()?)
}

/// The ancestor mask of tree rows (the root's row among them), `[rows, rows]` of 0 and 1.
fn mask(parents: &[Option<usize>]) -> Result<Tensor> {
    let rows = ancestor_mask(parents);
    let rows: Vec<Vec<i64>> = rows
        .outer_iter()
        .map(|row| row.iter().map(|&seen| i64::from(seen)).collect())
        .collect();
    matrix(&rows)
}

fn positions(parents: &[Option<usize>]) -> Vec<i64> {
    depths(parents).into_iter().map(|d| d as i64).collect()
}

/// Rows from the root to every leaf, the leaves in the given order, padded with -1.
fn leaf_rows(parents: &[Option<usize>], order: impl Iterator<Item = usize>) -> Vec<Vec<i64>> {
    let leaf = |row: &usize| !parents.contains(&Some(*row));
    let mut rows: Vec<Vec<i64>> = order
        .filter(leaf)
        .map(|row| {
            path_to(parents, row)
                .into_iter()
                .map(|r| r as i64)
                .collect()
        })
        .collect();
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    rows.iter_mut().for_each(|row| row.resize(width, -1));
    rows
}

/// The parents of a tree's rows: the root is row 0, node `n` is row `n + 1`.
fn with_root(parents: &[Option<usize>]) -> Vec<Option<usize>> {
    let nodes = parents.iter().map(|p| Some(p.map_or(0, |p| p + 1)));
    std::iter::once(None).chain(nodes).collect()
}

/// What the publishers precompute for a list of choices.
struct Buffers {
    shape: StaticTree,
    /// Parents of the rows, the root's included.
    rows: Vec<Option<usize>>,
}

impl Buffers {
    /// Nodes stand by depth, then by their ranks.
    fn new(mut choices: Vec<Vec<usize>>) -> Result<Self> {
        choices.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        let shape = StaticTree::new(choices)?;
        let rows = with_root(shape.parents());
        Ok(Self { shape, rows })
    }

    /// Leaves come last first.
    fn retrieve(&self) -> Vec<Vec<i64>> {
        leaf_rows(&self.rows, (0..self.rows.len()).rev())
    }

    /// Where each row's token stands in the list of the root and ten candidates per head.
    fn tree_indices(&self) -> Vec<i64> {
        let place = |path: &Vec<usize>| {
            let rank = path.last().copied().unwrap_or(0);
            (rank + 10 * (path.len() - 1) + 1) as i64
        };
        let nodes = self.shape.paths().iter().map(place);
        std::iter::once(0).chain(nodes).collect()
    }

    fn children_of(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.rows.len()).filter(move |&r| self.rows.get(r) == Some(&Some(row)))
    }

    /// For every row that is expanded, by depth: how many children it has, and how many of
    /// these are expanded in turn.
    fn children(&self) -> [Vec<i64>; 2] {
        let expanded = |&row: &usize| self.children_of(row).next().is_some();
        let rows: Vec<usize> = (0..self.rows.len()).filter(expanded).collect();
        let count = |row: &usize| self.children_of(*row).count() as i64;
        let again = |row: &usize| self.children_of(*row).filter(expanded).count() as i64;
        [
            rows.iter().map(count).collect(),
            rows.iter().map(again).collect(),
        ]
    }

    /// Most children of a row, by depth.
    fn beam_sizes(&self) -> Vec<i64> {
        let depths = depths(&self.rows);
        let rows = (0..self.rows.len()).zip(&depths);
        let mut most = vec![0; self.shape.depth()];
        for (row, &depth) in rows {
            if let Some(most) = most.get_mut(depth) {
                *most = (*most).max(self.children_of(row).count() as i64);
            }
        }
        most
    }

    /// Drafted tokens on the path to each leaf.
    fn max_accepts(&self) -> Vec<i64> {
        let drafted = |row: &Vec<i64>| row.iter().filter(|r| **r > 0).count() as i64;
        self.retrieve().iter().map(drafted).collect()
    }

    fn budget(&self) -> Budget {
        Budget {
            depth: self.shape.depth(),
            nodes: self.shape.len(),
        }
    }

    fn drafter<'m>(&self, target: &'m CausalLm, heads: &'m Heads) -> Result<HeadDrafter<'m>> {
        let topology = Topology::Static(self.shape.clone());
        Ok(HeadDrafter::new(target, heads, topology)?)
    }

    /// The root and the proposal behind `prompt`.
    fn propose(&self, target: &CausalLm, heads: &Heads, prompt: &[u32]) -> Result<Vec<i64>> {
        let ids: Vec<i64> = prompt.iter().map(|&t| i64::from(t)).collect();
        let (hidden, logits) = base_forward(target, &vector(&ids)?.f_unsqueeze(0)?)?;
        let best = logits.f_get(0)?.f_argmax(-1, false)?;
        let root = tokens(&best)?.last().copied().ok_or("an empty prompt")?;
        let mut known = prompt.to_vec();
        known.push(root);
        let tree = propose(
            &mut self.drafter(target, heads)?,
            &known,
            &hidden.f_get(0)?,
            self.budget(),
        )?;
        Ok(known[prompt.len()..]
            .iter()
            .chain(tree.units())
            .map(|&t| i64::from(t))
            .collect())
    }

    /// Greedy rounds: all tokens that were verified, and how many there were after each.
    fn generate(
        &self,
        target: &CausalLm,
        heads: &Heads,
        prompt: &[u32],
        rounds: u64,
    ) -> Result<(Vec<i64>, Vec<i64>)> {
        let options = Options {
            draft_nodes: Some(self.shape.len()),
            ignore_eos: true,
            ..Options::default().depth(DepthPolicy::Fixed(self.shape.depth()))
        };
        let generator = Generator::new(target, options)?;
        let drafter = self.drafter(target, heads)?;
        let mut session = generator.session(prompt, Some(Box::new(drafter)))?;
        let mut after = Vec::new();
        // The prompt's own pass gives the first root.
        for _ in 0..=rounds {
            if let Event::Finished(reason) = session.step()? {
                return Err(format!("the text ended: {reason:?}").into());
            }
            // The newest token is the root of a round to come.
            after.push(session.generated().len() as i64 - 1);
        }
        let tokens = session.generated().iter().map(|&t| i64::from(t));
        let count = after.last().copied().unwrap_or(0) as usize;
        Ok((tokens.take(count).collect(), after.split_off(1)))
    }
}

fn propose(
    drafter: &mut HeadDrafter<'_>,
    tokens: &[u32],
    features: &Tensor,
    budget: Budget,
) -> Result<DraftTree> {
    let context = DraftContext {
        tokens,
        prompt_len: tokens.len(),
        max_length: usize::MAX,
        eos: &[],
        key: Key::new(0, 0),
        features: Some(features),
    };
    Ok(drafter.propose(&context, budget)?)
}

/// Medusa's lossy acceptance on logits `[sets, paths, depth, vocab]` (Cai et al., 2024): a
/// token is taken if its probability is above the smaller of `eps` and `delta exp(-entropy)`;
/// the longest path wins, and among these the likeliest.
fn typical_acceptance(inputs: &Inputs, outputs: &mut Outputs) -> Result<()> {
    let (temperature, eps, delta) = (0.8, 0.09, 0.3);
    let logits = input(inputs, "typical_logits")?;
    let candidates = input(inputs, "typical_candidates")?;
    let depth = logits.size()[2];
    let laws = logits
        .f_narrow(2, 0, depth - 1)?
        .f_div_scalar(temperature)?
        .f_softmax(-1, Kind::Float)?;
    let guessed = candidates.f_narrow(2, 1, depth - 1)?.f_unsqueeze(-1)?;
    let chances = laws.f_gather(-1, &guessed, false)?.f_squeeze_dim(-1)?;
    let entropy = laws
        .f_mul(&laws.f_add_scalar(1e-5)?.f_log()?)?
        .f_sum_dim_intlist([-1i64].as_slice(), false, None)?
        .f_neg()?;
    let bar = entropy
        .f_neg()?
        .f_exp()?
        .f_mul_scalar(delta)?
        .f_clamp_max(eps)?;
    let (chances, bar) = (crate::numbers(&chances)?, crate::numbers(&bar)?);
    let [sets, paths, _, _] = logits.size()[..] else {
        return Err("typical_logits must have four dimensions".into());
    };
    let steps = (depth - 1) as usize;
    let (mut best, mut lengths) = (Vec::new(), Vec::new());
    for set in 0..sets as usize {
        let mut winner = (0, 0, f64::NEG_INFINITY);
        for path in 0..paths as usize {
            let at = (set * paths as usize + path) * steps;
            let pairs = chances[at..at + steps].iter().zip(&bar[at..at + steps]);
            let taken: Vec<f64> = pairs.take_while(|(p, b)| p > b).map(|(p, _)| *p).collect();
            let likelihood: f64 = taken.iter().map(|p| p.ln()).sum();
            let longer = taken.len() > winner.1;
            if longer || taken.len() == winner.1 && winner.1 > 0 && likelihood > winner.2 {
                winner = (path, taken.len(), likelihood);
            }
        }
        best.push(winner.0 as i64);
        lengths.push(winner.1 as i64);
    }
    outputs.insert("typical_best".into(), vector(&best)?);
    outputs.insert("typical_accept_length".into(), vector(&lengths)?);
    Ok(())
}

/// A decoder of no layers with the embedding and the output head of an EAGLE case: all of
/// its target that EAGLE reads.
fn bare_target(dir: &Path, config: &Value) -> Result<CausalLm> {
    let mut config = llama(config)?;
    (config.layers, config.windows, config.final_norm) = (0, Vec::new(), false);
    let params = ParamBuilder::init(0, Kind::Float, Device::Cpu);
    let decoder = Decoder::new(&params, &config)?;
    let embed = load_all(&dir.join("model.safetensors"))?;
    let head = load_all(&dir.join("lm_head.safetensors"))?;
    for mut param in params.params() {
        let value = match &param.name[..] {
            "model.embed_tokens.weight" => embed.get("embed_tokens.weight"),
            name => head.get(name),
        };
        let value = value.ok_or_else(|| format!("the case holds no {}", param.name))?;
        param.tensor.f_copy_(value)?;
    }
    Ok(CausalLm::new(decoder, dir, DType::F32))
}

fn eagle(dir: &Path, config: &Value, inputs: &Inputs) -> Result<Outputs> {
    let target = bare_target(dir, config)?;
    let heads = Heads::load(dir, DType::F32, Device::Cpu, &target)?;
    let embeds = target.decoder().embed(input(inputs, "input_ids")?)?;
    // Entry t reads the embedding of t + 1; the case pairs both at t.
    let embeds = embeds.f_roll([1i64].as_slice(), [1i64].as_slice())?;
    let features = heads.train_forward(input(inputs, "hidden_states")?, &embeds, 0.0)?;
    let logits = head_logits(&heads, &features, &target)?;
    let mut outputs = Outputs::new();
    let first = |list: Vec<Tensor>| list.into_iter().next().ok_or("no head");
    outputs.insert("features".into(), first(features)?);
    outputs.insert("logits".into(), first(logits)?);

    let number = |name: &str| -> Result<usize> {
        let n = config[name].as_u64().ok_or(format!("{name} is missing"))?;
        Ok(n as usize)
    };
    let topology = Topology::Dynamic {
        top_k: number("top_k")?,
    };
    // The published total counts the root, and the published depth does not count the root's
    // own continuations.
    let budget = Budget {
        depth: number("depth")? + 1,
        nodes: number("total_tokens")? - 1,
    };
    let mut drafter = HeadDrafter::new(&target, &heads, topology)?;
    for (round, ids, hidden) in [
        (1, "prompt_ids", "prompt_hidden"),
        (2, "round2_ids", "round2_hidden"),
    ] {
        let known = tokens(input(inputs, ids)?)?;
        let features = input(inputs, hidden)?.f_get(0)?;
        let tree = propose(&mut drafter, &known, &features, budget)?;
        let rows = with_root(tree.parents());
        let root = known.last().copied().unwrap_or(0);
        let all: Vec<i64> = std::iter::once(&root)
            .chain(tree.units())
            .map(|&t| i64::from(t))
            .collect();
        let parents: Vec<i64> = rows.iter().map(|p| p.map_or(-1, |p| p as i64)).collect();
        let paths = leaf_rows(&rows, 0..rows.len());
        // With a logits processor the published code sorts the paths, padding last.
        let mut sorted = paths.clone();
        sorted.sort_by_key(|row| {
            let last = |&r: &i64| if r < 0 { i64::MAX } else { r };
            row.iter().map(last).collect::<Vec<_>>()
        });
        let mut add = |name: &str, value: Tensor| {
            outputs.insert(format!("round{round}_{name}"), value);
        };
        add("tokens", vector(&all)?);
        add("parents", vector(&parents)?);
        add("position_ids", vector(&positions(&rows))?);
        add("mask", mask(&rows)?);
        add("retrieve_indices", matrix(&paths)?);
        add("retrieve_indices_sampling", matrix(&sorted)?);
    }
    Ok(outputs)
}
