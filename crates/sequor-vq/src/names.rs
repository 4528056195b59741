//! Published names of quantisers' tensors, as this crate calls them.

use sequor_nn::Result;
use sequor_nn::weights::{NewTensor, Renamed, TensorInfo, TensorSource, Transform};

/// What a tensor of a published quantiser is called here; `None` for one that nothing needs.
/// `name` begins where the quantiser begins.
///
/// | published | here |
/// |---|---|
/// | `_codebook.{embed,embed_avg,cluster_size,initted}` with a leading dimension of 1 (vector-quantize-pytorch) | `codebook.{embed,embed_avg,cluster_size,inited}` |
/// | `embedding.weight` (taming-transformers, LlamaGen, VAR) | `codebook.weight` |
/// | `quantizers.{k}.` (DAC, SNAC) | `layers.{k}.` |
/// | `in_proj`, `input_proj`, `out_proj`, `output_proj`, as linear layers or convolutions of size 1 (DAC, SNAC, Mimi) | `project_in`, `project_out` |
/// | `codebook.{embed_sum,cluster_usage,initialized}` (Mimi) | `codebook.{embed_avg,cluster_size,inited}` |
/// | `quant_resi.qresi_ls.{i}.` (VAR) | `phi.{i}.` |
/// | `mask`, `codebook_used`, `ema_vocab_hit_SV`, FSQ's `_levels`, `_basis`, `implicit_codebook` | left out |
///
/// EnCodec's names are the same as here.
pub fn published(name: &str, info: &TensorInfo) -> Option<NewTensor> {
    let parts: Vec<&str> = name.split('.').collect();
    let last = parts.last().copied().unwrap_or("");
    if matches!(
        last,
        "mask"
            | "zero"
            | "codebook_used"
            | "ema_vocab_hit_SV"
            | "_levels"
            | "_basis"
            | "implicit_codebook"
    ) {
        return None;
    }
    let of_codebook = parts.iter().any(|p| matches!(*p, "_codebook" | "codebook"));
    let mut new = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let numbered = parts.get(i + 1).is_some_and(|n| n.parse::<u32>().is_ok());
        new.push(match *part {
            "_codebook" => "codebook",
            "embedding" if parts.get(i + 1) == Some(&"weight") => "codebook",
            "quantizers" if numbered => "layers",
            "in_proj" | "input_proj" => "project_in",
            "out_proj" | "output_proj" => "project_out",
            "quant_resi" if parts.get(i + 1) == Some(&"qresi_ls") => continue,
            "qresi_ls" => "phi",
            "embed_sum" if of_codebook => "embed_avg",
            "cluster_usage" if of_codebook => "cluster_size",
            "initted" | "initialized" if of_codebook => "inited",
            same => same,
        });
    }
    let name = new.join(".");
    let mut steps = Vec::new();
    let shape = match (&info.shape[..], last) {
        // One head, or a convolution of size 1.
        ([1, rest @ ..], _) if parts.contains(&"_codebook") => Some(rest.to_vec()),
        ([rows, columns, 1] | [rows, columns, 1, 1], "weight") if name.contains("project_") => {
            Some(vec![*rows, *columns])
        }
        ([], _) if name.ends_with("inited") => Some(vec![1]),
        _ => None,
    };
    steps.extend(shape.map(Transform::Reshape));
    Some(NewTensor { name, steps })
}

/// A file that holds one published quantiser, under the names of this crate.
///
/// # Errors
/// When two tensors get the same name.
pub fn from_published<S: TensorSource>(source: S) -> Result<Renamed<S>> {
    Renamed::new(source, |name, info| {
        published(name, info).into_iter().collect()
    })
}
