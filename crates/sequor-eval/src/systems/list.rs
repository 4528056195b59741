//! The 51 systems.

use super::Modality::{Image, Other, Speech, Text, Video};
use super::System;

const fn planned(
    number: u32,
    name: &'static str,
    modality: super::Modality,
    summary: &'static str,
) -> System {
    System {
        number,
        name,
        modality,
        summary,
        module: None,
        page: None,
    }
}

const fn built(system: System, module: &'static str, page: &'static str) -> System {
    System {
        module: Some(module),
        page: Some(page),
        ..system
    }
}

/// Every system, by number.
pub const SYSTEMS: [System; 51] = [
    planned(
        1,
        "LEMAS",
        Speech,
        "speech in ten languages by flow matching; words edited in place by a codec model",
    ),
    planned(
        2,
        "AutoTimes",
        Other,
        "a frozen language model forecasts time series, one segment per token",
    ),
    planned(
        3,
        "Architecture and objective",
        Text,
        "causal, prefix and encoder-decoder models under three objectives, compared on equal terms",
    ),
    planned(
        4,
        "MeshAnything",
        Other,
        "triangle meshes with few faces, token by token, from a point cloud",
    ),
    planned(
        5,
        "I2-World",
        Other,
        "occupancy of a street scene, rolled forward in time from compressed tokens",
    ),
    planned(
        6,
        "OWSM-CTC",
        Speech,
        "recognition, translation and language identification by an encoder alone",
    ),
    planned(
        7,
        "Return of the Encoder",
        Text,
        "small encoder-decoder models distilled from a decoder",
    ),
    planned(
        8,
        "Learn2PD",
        Text,
        "a tiny learned filter decides which tokens of a diffusion model are final",
    ),
    planned(
        9,
        "CrossNovo",
        Other,
        "peptides from mass spectra: a decoder that reads a parallel decoder's features",
    ),
    planned(
        10,
        "WeDLM",
        Text,
        "diffusion decoding with plain causal attention and a streaming window",
    ),
    planned(
        11,
        "CPPD",
        Image,
        "reads a word in a picture in one pass, helped by counting and ordering letters",
    ),
    planned(
        12,
        "GSD",
        Image,
        "speculative decoding of image codes that accepts groups of like codes",
    ),
    planned(
        13,
        "SDAR",
        Text,
        "an autoregressive model turned into one that fills blocks in parallel",
    ),
    planned(
        14,
        "ParallelBench",
        Text,
        "what is lost when tokens are decided in parallel: bounds and tasks",
    ),
    built(
        planned(
            15,
            "ADED",
            Text,
            "drafts from a table of token triples that learns while it decodes, searched as a tree",
        ),
        "sequor_sampling::draft",
        "15-aded.md",
    ),
    planned(
        16,
        "D-AR",
        Image,
        "pictures as a sequence of diffusion steps' tokens",
    ),
    planned(
        17,
        "ARRA",
        Image,
        "an image model whose states are aligned with a vision encoder in training",
    ),
    planned(
        18,
        "CSpD",
        Image,
        "speculative decoding of continuous tokens by ratios of densities",
    ),
    built(
        planned(
            19,
            "Hidden Transfer",
            Text,
            "states of future tokens, predicted half-way up, finish their way through the model",
        ),
        "sequor_backbone::transfer",
        "19-hidden-transfer.md",
    ),
    planned(
        20,
        "MambaMixer",
        Other,
        "selective state spaces over tokens and over channels, for pictures and series",
    ),
    planned(
        21,
        "STree",
        Text,
        "draft trees checked by state-space and hybrid models in one pass",
    ),
    planned(
        22,
        "ControlAR",
        Image,
        "edges, depth or segments steer an autoregressive image model",
    ),
    built(
        planned(
            23,
            "Hydra",
            Text,
            "draft heads that see the tokens drafted before them; beside Medusa and EAGLE",
        ),
        "sequor_backbone::heads",
        "23-hydra.md",
    ),
    planned(
        24,
        "Paraformer",
        Speech,
        "recognition in one decoder pass with a learned count of tokens",
    ),
    planned(
        25,
        "MuLo-SD",
        Image,
        "a picture drafted at low resolution and corrected locally at high",
    ),
    planned(
        26,
        "FlowAR",
        Image,
        "scale after scale, each finished by flow matching",
    ),
    built(
        planned(
            27,
            "FiRST",
            Text,
            "routers read the prompt and choose the layers that decoding runs",
        ),
        "sequor_backbone::routers",
        "27-first.md",
    ),
    planned(
        28,
        "Encoder-decoder speech efficiency",
        Speech,
        "bucketed batches in training and a shallow decoder for speed",
    ),
    planned(
        29,
        "PIM-GPT",
        Other,
        "a simulator of token generation inside memory chips",
    ),
    planned(
        30,
        "QTTS / QDAC",
        Speech,
        "speech from all codebooks of a codec, in depth or with delay",
    ),
    planned(
        31,
        "Axial Transformers",
        Image,
        "exact likelihood of pictures and videos with attention along one axis at a time",
    ),
    planned(32, "NFIG", Image, "pictures from low to high frequencies"),
    planned(
        33,
        "Lumos-1",
        Video,
        "video frame after frame, each frame unmasked in parallel",
    ),
    planned(
        34,
        "NAR",
        Image,
        "all neighbours of what is known at once, diagonal by diagonal",
    ),
    planned(
        35,
        "CLEAR",
        Speech,
        "speech from continuous latents with a rectified-flow head",
    ),
    planned(
        36,
        "Token-Shuffle",
        Image,
        "neighbouring image tokens folded into one position",
    ),
    planned(
        37,
        "Ettin",
        Text,
        "encoders and decoders that differ in the objective alone",
    ),
    planned(
        38,
        "ASSD",
        Text,
        "any subset of tokens filled in, drafted and checked by one model",
    ),
    planned(
        39,
        "DiCoDe",
        Video,
        "a clip as a few deep tokens that a diffusion model renders",
    ),
    planned(
        40,
        "EAR",
        Image,
        "a concept erased from an image model by fine-tuning",
    ),
    planned(
        41,
        "VA-pi",
        Image,
        "image models trained after the fact on what their pixels look like",
    ),
    planned(
        42,
        "Flover",
        Text,
        "requests fused into a running batch at any step",
    ),
    planned(
        43,
        "M-VAR",
        Image,
        "attention within a scale, a state space across scales",
    ),
    planned(
        44,
        "xAR",
        Image,
        "cells of a picture by flow matching, trained on noisy context",
    ),
    planned(
        45,
        "Distilled Decoding",
        Image,
        "an image model distilled into one that needs one or two passes",
    ),
    planned(
        46,
        "Fast-dLLM v2",
        Text,
        "a language model turned into block diffusion with an exact cache",
    ),
    planned(
        47,
        "AdaBlock-dLLM",
        Text,
        "blocks of a diffusion model that end where a sentence does",
    ),
    planned(
        48,
        "GEAR",
        Text,
        "a compressed cache: few bits, a low-rank correction and exact outliers",
    ),
    planned(
        49,
        "TiDAR",
        Text,
        "drafts by diffusion and checks by autoregression in one pass",
    ),
    planned(
        50,
        "SpecVLM",
        Image,
        "speculation for models that look at pictures, with compressed pictures for the draft",
    ),
    planned(
        51,
        "CTF",
        Image,
        "coarse code clusters first, exact codes of all positions after",
    ),
];
