//! Which drafter a method means, and where its heads are found.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sequor_backbone::heads::{self, HeadDrafter, Heads, HeadsKind};
use sequor_backbone::transfer::{HiddenTransfer, TransferDrafter};
use sequor_backbone::{CausalLm, Subnetwork};
use sequor_data::Resolver;
use sequor_nn::{Kind, Tensor};
use sequor_sampling::draft::{
    Copying, DraftMode, Jacobi, Joined, Lookahead, LookaheadOptions, StaticTree, Topology, Trigram,
    TrigramOptions,
};
use sequor_sampling::verify::Neighbours;
use sequor_sampling::{DepthPolicy, DraftModel, Drafter, Options, PromptLookup};

use crate::options::{Depth, HeadKind, LoadOptions, Shape, Speculate, TextOptions};
use crate::pipeline::TextPipeline;
use crate::{Error, Result};

/// Nodes of the largest static tree that is searched; the loop takes as many of them as pay.
const TREE_NODES: usize = 64;
/// Branches of a dynamic tree.
const DYNAMIC_TOP_K: usize = 8;
/// Guesses of a Jacobi block when nothing else is said.
const JACOBI_WINDOW: usize = 8;
/// What automatic speculation looks for, best first.
pub(crate) const PREFERRED: [HeadKind; 4] = [
    HeadKind::HydraPlus,
    HeadKind::Eagle,
    HeadKind::Hydra,
    HeadKind::Medusa,
];

/// Heads in memory.
#[derive(Debug)]
pub enum DraftHeads {
    /// Medusa, Hydra, Hydra++ or EAGLE.
    Tree(HeadKind, Box<Heads>),
    /// Hidden transfer.
    Transfer(HiddenTransfer),
}

impl DraftHeads {
    /// Loads a folder of heads made for `target`.
    ///
    /// # Errors
    /// When a file is absent or damaged, or the heads were made for another model.
    pub fn load(folder: &Path, options: &LoadOptions, target: &CausalLm) -> Result<Self> {
        let kind = match heads::read_config(folder)?.kind {
            HeadsKind::Medusa => HeadKind::Medusa,
            HeadsKind::Hydra => HeadKind::Hydra,
            HeadsKind::HydraPlus => HeadKind::HydraPlus,
            HeadsKind::Eagle => HeadKind::Eagle,
            HeadsKind::HiddenTransfer => {
                return Ok(Self::Transfer(HiddenTransfer::load(folder, target)?));
            }
            HeadsKind::Router => {
                return Err(Error::Input(format!(
                    "{}: routers choose layers and draft nothing: use --layers router",
                    folder.display()
                )));
            }
        };
        let heads = Heads::load(folder, options.weights.dtype(), options.device, target)?;
        Ok(Self::Tree(kind, Box::new(heads)))
    }

    /// Their kind.
    pub fn kind(&self) -> HeadKind {
        match self {
            Self::Tree(kind, _) => *kind,
            Self::Transfer(_) => HeadKind::HiddenTransfer,
        }
    }

    /// Held-out accuracies `[depth][rank]`, given that the path so far is right.
    pub fn accuracies(&self) -> &[Vec<f64>] {
        match self {
            Self::Tree(_, heads) => &heads.config().accuracies,
            Self::Transfer(transfer) => &transfer.config().accuracies,
        }
    }

    /// A shape as these heads know it; a tree where their accuracies are known.
    pub fn topology(&self, shape: Shape) -> Topology {
        let searched = || {
            let tree = StaticTree::search(self.accuracies(), TREE_NODES);
            if tree.is_empty() {
                Topology::Chain
            } else {
                Topology::Static(tree)
            }
        };
        match shape {
            Shape::Default | Shape::Static => searched(),
            Shape::Chain => Topology::Chain,
            Shape::Dynamic => Topology::Dynamic {
                top_k: DYNAMIC_TOP_K,
            },
        }
    }
}

/// The folder of heads of a kind for `model`: `given`, or one beside the models whose
/// `heads.json` names the model's fingerprint.
pub(crate) fn find(
    resolver: &Resolver,
    given: Option<&Path>,
    kind: &str,
    model: &CausalLm,
) -> Result<PathBuf> {
    if let Some(folder) = given {
        return Ok(folder.to_path_buf());
    }
    let fingerprint = model.fingerprint()?;
    let fits = |folder: &PathBuf| {
        heads::read_config(folder)
            .is_ok_and(|c| c.kind.name() == kind && c.base.fingerprint == fingerprint)
    };
    let folders = resolver.model_folders_with("heads.json");
    folders.into_iter().find(fits).ok_or_else(|| {
        Error::Input(format!(
            "there are no {kind} heads for {} (fingerprint {fingerprint}); train them with `sequor train heads --kind {kind} --model MODEL --out DIR`, or say where they are with --heads DIR",
            model.source().display()
        ))
    })
}

/// The drafter of `options`; adjusts what the method itself decides of `sampling`.
pub(crate) fn drafter<'p>(
    pipeline: &'p TextPipeline,
    options: &TextOptions,
    sampling: &mut Options,
) -> Result<Option<Box<dyn Drafter + 'p>>> {
    let model = pipeline.model();
    let shaped = options.speculate.heads().is_some() || options.speculate == Speculate::Auto;
    if options.shape != Shape::Default && !shaped {
        return Err(Error::Input(format!(
            "the shape of drafts can be chosen for heads; {} has its own",
            options.speculate
        )));
    }
    let loaded = |kind: HeadKind| {
        pipeline.heads(kind).ok_or_else(|| {
            Error::Input(format!(
                "{} heads have not been loaded: call load_heads or prepare first",
                kind.name()
            ))
        })
    };
    let with_copies = |heads| -> Result<Box<dyn Drafter + 'p>> {
        let heads = from_heads(model, heads, options.shape)?;
        Ok(Box::new(Joined::new(Copying::default(), heads)?))
    };
    Ok(Some(match &options.speculate {
        Speculate::Off => return Ok(None),
        Speculate::Auto => match PREFERRED.iter().find_map(|&kind| pipeline.heads(kind)) {
            Some(heads) => with_copies(heads)?,
            None => Box::new(Copying::default()),
        },
        Speculate::Copy => Box::new(Copying::default()),
        Speculate::PromptLookup => Box::new(PromptLookup::default()),
        Speculate::Trigram => Box::new(Trigram::new(TrigramOptions::default())?),
        Speculate::Jacobi => {
            let window = match options.depth {
                Depth::Fixed(n) => n,
                Depth::Adaptive => JACOBI_WINDOW,
            };
            // A shorter block would forget guesses that only need another pass.
            sampling.depth = DepthPolicy::Fixed(window);
            Box::new(Jacobi::new(window)?)
        }
        Speculate::Lookahead => {
            let lookahead = LookaheadOptions::default();
            sampling.depth = DepthPolicy::Fixed(lookahead.depth());
            sampling.draft_nodes.get_or_insert(lookahead.nodes());
            Box::new(Lookahead::new(lookahead)?)
        }
        Speculate::EarlyExit(layers) => {
            let layers = layers.unwrap_or(model.config().layers.div_ceil(3));
            let exit = Subnetwork::early_exit(model, layers)?;
            Box::new(DraftModel::new(exit, DraftMode::Greedy)?)
        }
        Speculate::Draft(name) => {
            let draft = pipeline.draft().ok_or_else(|| {
                Error::Input(format!(
                    "the draft model '{name}' has not been loaded: call load_draft first"
                ))
            })?;
            Box::new(DraftModel::new(draft, DraftMode::Greedy)?)
        }
        Speculate::Heads(kind) => from_heads(model, loaded(*kind)?, options.shape)?,
        Speculate::CopyAndHeads(kind) => with_copies(loaded(*kind)?)?,
    }))
}

fn from_heads<'p>(
    model: &'p CausalLm,
    heads: &'p DraftHeads,
    shape: Shape,
) -> Result<Box<dyn Drafter + 'p>> {
    let topology = heads.topology(shape);
    Ok(match heads {
        DraftHeads::Tree(_, heads) => Box::new(HeadDrafter::new(model, heads, topology)?),
        DraftHeads::Transfer(transfer) => {
            Box::new(TransferDrafter::new(model, transfer, topology)?)
        }
    })
}

/// Tokens are near each other when their input embeddings are (squared L2 distance, as for
/// the codebooks of LANTERN). Lists are made when they are first asked for.
pub(crate) struct EmbeddingNeighbours {
    /// Embeddings of all tokens, one after the other.
    table: Vec<f32>,
    dim: usize,
    k: usize,
    lists: Vec<OnceLock<Vec<u32>>>,
}

impl EmbeddingNeighbours {
    pub fn new(model: &CausalLm, k: usize) -> Result<Self> {
        let vocab = model.config().vocab_size;
        let ids = Tensor::f_arange(vocab, (Kind::Int64, model.decoder().device()))
            .map_err(sequor_nn::Error::from)?;
        let table = model.decoder().embed(&ids)?;
        let dim = table.size().last().copied().unwrap_or(1).max(1) as usize;
        let table = sequor_kernels::bridge::to_vec(&table)
            .map_err(|e| sequor_nn::Error::Input(e.to_string()))?;
        Ok(Self {
            table,
            dim,
            k: k.min(vocab.max(1) as usize - 1),
            lists: (0..vocab).map(|_| OnceLock::new()).collect(),
        })
    }

    /// The nearest other tokens of `token`, nearest first.
    fn list(&self, token: u32) -> Vec<u32> {
        let rows = || self.table.chunks_exact(self.dim);
        let Some(own) = rows().nth(token as usize) else {
            return Vec::new();
        };
        let squared = |row: &[f32]| -> f32 {
            let gaps = row.iter().zip(own).map(|(a, b)| a - b);
            gaps.map(|gap| gap * gap).sum()
        };
        let mut others: Vec<(f32, u32)> = rows()
            .enumerate()
            .map(|(id, row)| (squared(row), id as u32))
            .filter(|&(_, id)| id != token)
            .collect();
        let nearer = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if self.k < others.len() {
            others.select_nth_unstable_by(self.k, nearer);
            others.truncate(self.k);
        }
        others.sort_unstable_by(nearer);
        others.into_iter().map(|(_, id)| id).collect()
    }
}

impl Neighbours for EmbeddingNeighbours {
    fn nearest(&self, token: u32, k: usize) -> &[u32] {
        let Some(cell) = self.lists.get(token as usize) else {
            return &[];
        };
        let list = cell.get_or_init(|| self.list(token));
        list.get(..k.min(list.len())).unwrap_or_default()
    }
}
