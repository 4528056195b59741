//! System 23, Hydra: do heads that see the tokens drafted before them draft better than
//! Medusa's, which do not?
//!
//! All heads draft the same static tree first, the one that is best for Medusa by its own
//! held-out accuracies. Dynamic trees of the same size and trees whose size follows the cost
//! on this machine come after, and with them Hydra++ joined with copies, the fastest method
//! of this library.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sequor_backbone::heads::{HeadDrafter, Heads, HeadsKind};
use sequor_eval::proof::{Claim, Outcome, Proof, Recorder};
use sequor_nn::device::DType;
use sequor_sampling::draft::{Copying, Joined};
use sequor_sampling::{StaticTree, Topology};

use super::bench::Bench;
use super::decode::{Arm, Ask, Decode, EXACT, PLAIN, compare, metrics, sweep};
use super::heads::find;
use crate::prompts::Encoded;
use crate::{Result, TextPipeline};

/// Heads that are compared, with the names of their arms.
const KINDS: [(HeadsKind, &str); 4] = [
    (HeadsKind::Medusa, "medusa"),
    (HeadsKind::Hydra, "hydra"),
    (HeadsKind::HydraPlus, "hydra++"),
    (HeadsKind::Eagle, "eagle"),
];
const MEDUSA: &str = "medusa";
const HYDRA: &str = "hydra";
const PLUS: &str = "hydra++";
const JOINED: &str = "copy+hydra++";
/// Added to the names of arms.
const DYNAMIC: &str = ", dynamic tree";
const SIZED: &str = ", sized by cost";
const WARM: &str = " T=0.7";
/// Depth and nodes of the trees.
const TREE: (usize, usize) = (4, 64);
/// Longest path of copies and heads together.
const JOINED_DEPTH: usize = 10;
/// Continuations per node of a dynamic tree.
const TOP_K: usize = 8;

fn proof() -> Proof {
    let warm = |arm: &str| format!("{arm}{WARM}");
    let sized = |arm: &str| format!("{arm}{SIZED}");
    let per_call = |a: &str, b: &str| Claim::ratio("tokens_per_call", a, b);
    metrics(Proof::new(
        23,
        "Hydra: draft heads that see what was drafted",
        "Ankner et al., \"Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding\", COLM 2024",
    ))
    .claim(
        Claim::level("equal", EXACT)
            .always(1.0)
            .text("Greedy text is that of plain decoding, token for token (f32)"),
    )
    .claim(per_call(HYDRA, MEDUSA).text("Hydra gives more tokens per call than Medusa with the same tree"))
    .claim(
        per_call(PLUS, MEDUSA)
            .text("Hydra++ gives more tokens per call than Medusa with the same tree")
            .paper("1.31x (throughput)"),
    )
    .claim(per_call(PLUS, HYDRA).text("Hydra++ gives more tokens per call than Hydra with the same tree"))
    .claim(
        per_call(&warm(PLUS), &warm(MEDUSA))
            .text("Hydra++ gives more tokens per call than Medusa at temperature 0.7, losslessly"),
    )
    .claim(
        Claim::level("tokens_per_call", PLUS)
            .at_least(2.0)
            .text("Hydra++ gives at least 2.0 tokens per call"),
    )
    .claim(
        Claim::level("tokens_per_call", MEDUSA)
            .at_least(1.7)
            .text("Medusa gives at least 1.7 tokens per call"),
    )
    .claim(
        Claim::ratio("speedup", sized(PLUS), sized(MEDUSA))
            .median()
            .text("Hydra++ is faster than Medusa, each with trees sized by cost")
            .paper("1.31x"),
    )
    .claim(
        Claim::level("speedup", sized(PLUS))
            .median()
            .at_least(1.5)
            .text("Hydra++ is at least 1.5 times as fast as plain decoding")
            .paper("2.71x"),
    )
    .claim(
        Claim::level("speedup", sized(JOINED))
            .median()
            .at_least(1.5)
            .text("Copies and Hydra++ in one tree are at least 1.5 times as fast as plain decoding"),
    )
    .claim(
        per_call(&sized(JOINED), &sized(PLUS))
            .text("Copies beside Hydra++ give more tokens per call than Hydra++ alone"),
    )
}

/// Heads of every kind, loaded for one pipeline.
struct Loaded(Vec<(&'static str, Heads)>);

impl Loaded {
    fn new(
        pipeline: &TextPipeline,
        folders: &BTreeMap<String, PathBuf>,
        names: &[(HeadsKind, &'static str, String)],
        dtype: DType,
    ) -> Result<Self> {
        let model = pipeline.model();
        let mut loaded = Vec::new();
        for (_, arm, name) in names {
            if let Some(folder) = folders.get(name) {
                let heads = Heads::load(folder, dtype, model.decoder().device(), model)?;
                loaded.push((*arm, heads));
            }
        }
        Ok(Self(loaded))
    }

    /// The tree that is best for Medusa's measured accuracies.
    fn shared_tree(&self) -> Topology {
        let medusa = self.0.iter().find(|(arm, _)| *arm == MEDUSA);
        let accuracies = medusa.map(|(_, h)| h.config().accuracies.as_slice());
        shared_tree(accuracies.unwrap_or_default(), TREE)
    }

    /// Plain decoding, and every kind with `topology`.
    fn same_tree<'m>(
        &'m self,
        pipeline: &'m TextPipeline,
        topology: &Topology,
    ) -> Result<Arms<'m>> {
        let model = pipeline.model();
        let mut arms: Arms<'m> = vec![Box::new(Decode::plain(model))];
        for (arm, heads) in &self.0 {
            let drafter = HeadDrafter::new(model, heads, topology.clone())?;
            arms.push(Box::new(Decode::new(arm, model, drafter, TREE)));
        }
        Ok(arms)
    }

    /// Trees that follow the draft's confidence, and trees sized by what they cost.
    fn other_trees<'m>(&'m self, pipeline: &'m TextPipeline) -> Result<Arms<'m>> {
        let model = pipeline.model();
        let mut arms: Arms<'m> = Vec::new();
        for (arm, heads) in &self.0 {
            let dynamic = || HeadDrafter::new(model, heads, Topology::Dynamic { top_k: TOP_K });
            if [PLUS, "eagle"].contains(arm) {
                let name = format!("{arm}{DYNAMIC}");
                arms.push(Box::new(Decode::new(&name, model, dynamic()?, TREE)));
            }
            if [PLUS, MEDUSA].contains(arm) {
                let tree = shared_tree(&heads.config().accuracies, TREE);
                let drafter = HeadDrafter::new(model, heads, tree)?;
                let sized = Decode::new(&format!("{arm}{SIZED}"), model, drafter, TREE);
                arms.push(Box::new(sized.adaptive(TREE.0)));
            }
            if *arm == PLUS {
                let tree = shared_tree(&heads.config().accuracies, TREE);
                let heads = HeadDrafter::new(model, heads, tree)?;
                let both = Joined::new(Copying::default(), heads)?;
                let sized = Decode::new(&format!("{JOINED}{SIZED}"), model, both, TREE);
                arms.push(Box::new(sized.adaptive(JOINED_DEPTH)));
            }
        }
        Ok(arms)
    }
}

type Arms<'m> = Vec<Box<dyn Arm + 'm>>;

/// The best static tree for these accuracies; where none were measured, one for accuracies
/// that fall as they commonly do.
pub(super) fn shared_tree(accuracies: &[Vec<f64>], (depth, nodes): (usize, usize)) -> Topology {
    let typical = || -> Vec<Vec<f64>> {
        let by_rank = |d: i32| (0..10).map(move |r| 0.6 * 0.85_f64.powi(d) * 0.35_f64.powi(r));
        (0..depth as i32).map(|d| by_rank(d).collect()).collect()
    };
    let measured: Vec<Vec<f64>> = accuracies.iter().take(depth).cloned().collect();
    let tree = StaticTree::search(&measured, nodes);
    if tree.is_empty() {
        Topology::Static(StaticTree::search(&typical(), nodes))
    } else {
        Topology::Static(tree)
    }
}

pub(super) fn run(bench: &mut Bench<'_>, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let mut folders = BTreeMap::new();
    let mut names = Vec::new();
    for (kind, arm) in KINDS {
        let (name, folder) = find(bench, kind, say)?;
        folders.insert(name.clone(), folder);
        names.push((kind, arm, name));
    }
    let mut recorder = Recorder::start(proof(), bench.setup(&folders, say)?)?;
    let loaded = Loaded::new(
        &bench.pipeline,
        &folders,
        &names,
        bench.options.load.weights.dtype(),
    )?;
    let tree = loaded.shared_tree();
    recorder.setting("tree_depth_nodes", vec![TREE.0, TREE.1]);
    recorder.setting("tree", serde_json::to_value(&tree).unwrap_or_default());
    for (arm, heads) in &loaded.0 {
        let accuracies = serde_json::to_value(&heads.config().accuracies).unwrap_or_default();
        recorder.setting(&format!("held_out_accuracies_{arm}"), accuracies);
    }
    let ask = Ask {
        new_tokens: bench.size.new_tokens,
        temperature: 0.0,
        eos: bench.pipeline.eos(),
        cancel: bench.options.cancel.clone(),
    };
    let mut arms = loaded.same_tree(&bench.pipeline, &tree)?;
    arms.extend(loaded.other_trees(&bench.pipeline)?);
    sweep(&mut recorder, &mut arms, &bench.prompts, &ask, "", say)?;

    // At temperature 0.7, with half of the prompts.
    let mut arms = loaded.same_tree(&bench.pipeline, &tree)?;
    arms.retain(|arm| [PLAIN, MEDUSA, PLUS].contains(&arm.name()));
    let half = if bench.options.quick {
        bench.prompts.len()
    } else {
        bench.prompts.len() / 2
    };
    let some: Vec<Encoded> = bench.prompts.iter().take(half).cloned().collect();
    let warm = Ask {
        temperature: 0.7,
        ..ask.clone()
    };
    sweep(&mut recorder, &mut arms, &some, &warm, WARM, say)?;
    bench.check_cancelled()?;

    let exact = bench.exact()?;
    let loaded = Loaded::new(&exact, &folders, &names, DType::F32)?;
    let mut arms = loaded.same_tree(&exact, &tree)?;
    arms.extend(loaded.other_trees(&exact)?);
    let ask = Ask {
        new_tokens: bench.size.exact.1,
        ..ask
    };
    compare(&mut recorder, &mut arms, bench.exact_prompts(), &ask, say)?;
    Ok(recorder.finish(&bench.options.out)?)
}
