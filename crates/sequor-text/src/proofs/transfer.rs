//! System 19, Hidden Transfer: do states that finish their way through the model guess
//! later tokens better than heads after its end, and than an early exit?

use std::collections::BTreeMap;
use std::path::Path;

use sequor_backbone::heads::{HeadDrafter, Heads, HeadsKind};
use sequor_backbone::subnetwork::Subnetwork;
use sequor_backbone::transfer::{HiddenTransfer, TransferDrafter, TransferLm};
use sequor_eval::proof::{Claim, Outcome, Proof, Recorder};
use sequor_nn::device::DType;
use sequor_sampling::Topology;
use sequor_sampling::draft::{DraftMode, DraftModel};

use super::bench::Bench;
use super::decode::{Arm, Ask, Decode, EXACT, compare, metrics, sweep};
use super::heads::find;
use super::hydra::shared_tree;
use crate::{Result, TextPipeline};

const TRANSFER: &str = "hidden transfer";
const MEDUSA: &str = "medusa";
const EARLY: &str = "early exit, a third";
const LATE: &str = "early exit, two thirds";
/// Depth and nodes of the trees: as many offsets as are transferred.
const TREE: (usize, usize) = (3, 32);
/// An early exit drafts a chain.
const CHAIN: (usize, usize) = (3, 3);

fn proof() -> Proof {
    let per_call = |b: &str| Claim::ratio("tokens_per_call", TRANSFER, b);
    metrics(Proof::new(
        19,
        "Hidden Transfer: guessed states run through the upper layers",
        "Wu et al., \"Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration\", 2024",
    ))
    .claim(
        Claim::level("equal", EXACT)
            .always(1.0)
            .text("Greedy text is that of plain decoding, token for token (f32)"),
    )
    .claim(
        per_call(MEDUSA)
            .text("It gives more tokens per call than Medusa with the same tree")
            .paper("better than Medusa (no figure in the abstract)"),
    )
    .claim(
        per_call(EARLY)
            .text("It gives more tokens per call than self-speculation that leaves after a third of the layers")
            .paper("better than self-speculative decoding (no figure in the abstract)"),
    )
    .claim(
        Claim::ratio("speedup", TRANSFER, LATE)
            .median()
            .text("It is faster than self-speculation that leaves after two thirds of the layers"),
    )
    .claim(
        Claim::difference("accepted_2", TRANSFER, MEDUSA)
            .text("Drafts two tokens ahead are accepted more often than Medusa's"),
    )
    .claim(
        Claim::difference("accepted_3", TRANSFER, MEDUSA)
            .text("Drafts three tokens ahead are accepted more often than Medusa's"),
    )
    .claim(
        Claim::level("speedup", TRANSFER)
            .median()
            .above(1.0)
            .text("Decoding is faster than plain decoding")
            .paper("1.9x to 3x (the follow-up FIRP)"),
    )
}

/// What was trained.
struct Loaded {
    medusa: Heads,
    transfer: HiddenTransfer,
}

impl Loaded {
    fn new(pipeline: &TextPipeline, medusa: &Path, transfer: &Path, dtype: DType) -> Result<Self> {
        let model = pipeline.model();
        Ok(Self {
            medusa: Heads::load(medusa, dtype, model.decoder().device(), model)?,
            transfer: HiddenTransfer::load(transfer, model)?,
        })
    }

    /// Plain decoding first. The trees of Medusa and hidden transfer have the shape that is
    /// best for Medusa.
    fn arms<'m>(&'m self, pipeline: &'m TextPipeline) -> Result<Vec<Box<dyn Arm + 'm>>> {
        let model = pipeline.model();
        let tree = self.tree();
        let layers = model.config().layers;
        let early = |part: usize| -> Result<DraftModel<Subnetwork<'m>>> {
            let exit = Subnetwork::early_exit(model, (layers * part / 3).max(1))?;
            Ok(DraftModel::new(exit, DraftMode::Greedy)?)
        };
        let medusa = HeadDrafter::new(model, &self.medusa, tree.clone())?;
        let target = TransferLm::new(model, &self.transfer)?;
        let transfer = TransferDrafter::new(model, &self.transfer, tree)?;
        Ok(vec![
            Box::new(Decode::plain(model)),
            Box::new(Decode::new(MEDUSA, model, medusa, TREE)),
            Box::new(Decode::owning(TRANSFER, target, transfer, TREE)),
            Box::new(Decode::new(EARLY, model, early(1)?, CHAIN)),
            Box::new(Decode::new(LATE, model, early(2)?, CHAIN)),
        ])
    }

    fn tree(&self) -> Topology {
        shared_tree(&self.medusa.config().accuracies, TREE)
    }
}

pub(super) fn run(bench: &mut Bench<'_>, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let medusa = find(bench, HeadsKind::Medusa, say)?;
    let transfer = find(bench, HeadsKind::HiddenTransfer, say)?;
    let folders = BTreeMap::from([medusa.clone(), transfer.clone()]);
    let mut recorder = Recorder::start(proof(), bench.setup(&folders, say)?)?;
    let load =
        |pipeline: &TextPipeline, dtype| Loaded::new(pipeline, &medusa.1, &transfer.1, dtype);
    let loaded = load(&bench.pipeline, bench.options.load.weights.dtype())?;
    let config = loaded.transfer.config();
    recorder.setting("tree_depth_nodes", vec![TREE.0, TREE.1]);
    recorder.setting("transfer_layers", config.transfer_layers.clone());
    let json = |accuracies: &Vec<Vec<f64>>| serde_json::to_value(accuracies).unwrap_or_default();
    recorder.setting("held_out_accuracies_transfer", json(&config.accuracies));
    recorder.setting(
        "held_out_accuracies_medusa",
        json(&loaded.medusa.config().accuracies),
    );
    let ask = Ask {
        new_tokens: bench.size.new_tokens,
        temperature: 0.0,
        eos: bench.pipeline.eos(),
        cancel: bench.options.cancel.clone(),
    };
    let mut arms = loaded.arms(&bench.pipeline)?;
    sweep(&mut recorder, &mut arms, &bench.prompts, &ask, "", say)?;
    bench.check_cancelled()?;

    let exact = bench.exact()?;
    let loaded = load(&exact, DType::F32)?;
    let ask = Ask {
        new_tokens: bench.size.exact.1,
        ..ask
    };
    compare(
        &mut recorder,
        &mut loaded.arms(&exact)?,
        bench.exact_prompts(),
        &ask,
        say,
    )?;
    Ok(recorder.finish(&bench.options.out)?)
}
