//! The card of trained routers: what they are, from measured numbers.

use super::recipe::RouterRecipe;
use super::{Prefill, RouterReport};

/// The text of `README.md`.
pub(super) fn card(recipe: &RouterRecipe, report: &RouterReport, command: &str) -> String {
    let order = [
        ("full", "all layers"),
        ("routers", "chosen by the routers"),
        (
            "static best",
            "the same layers for every prompt, by mean score",
        ),
        ("evenly spaced", "evenly spaced"),
        ("random", "random"),
        (
            "routers + adapter",
            "chosen by the routers, with the adapter",
        ),
    ];
    let rows: String = order
        .iter()
        .filter_map(|(key, name)| {
            report
                .losses
                .get(*key)
                .map(|loss| format!("| {name} | {loss:.3} |\n"))
        })
        .collect();
    let prompt = match recipe.prefill {
        Prefill::Full => "All layers run on the prompt.",
        Prefill::Gated => "A layer that is left out is left out on the prompt too.",
    };
    let adapter = if report.adapter_parameters > 0 {
        format!(
            " The adapter (LoRA, rank {}, {:.2} M parameters, `adapter_model.safetensors` in the layout of PEFT) was trained with the layers left out.",
            recipe.rank,
            report.adapter_parameters as f64 / 1e6
        )
    } else {
        String::new()
    };
    format!(
        "---
base_model: {base}
license: {licence}
---

# Routers for {base}

Routers (FiRST, Jain et al. 2024) look at a prompt and choose the layers that decoding runs: {kept:.1} of {layers}. \
{prompt} The text is not that of the whole model: quality is traded for speed. As a draft that the whole model checks, \
nothing is lost.

{params:.1} k parameters, {size:.1} MB in all, stored in bf16.{adapter}

## How they were made

```sh
{command}
```

It took {minutes:.1} minutes on {threads} thread(s) of {processor}: {steps} steps of the routers, {adapter_steps} of the \
adapter, {batch} texts of at most {context} tokens each, all written by the model itself.

## Measured

Cross-entropy of the model's own text, in nats per token, on {texts} texts that nothing was trained on, at the same \
number of layers ({choices} different sets were chosen for these prompts):

| layers | loss |
|---|---|
{rows}
The numbers are of the stored weights. The first token behind a prompt comes from the pass over the prompt.
",
        base = report.base,
        licence = if report.licence.is_empty() { "other" } else { &report.licence },
        kept = report.layers_kept,
        layers = report.layers,
        params = report.parameters as f64 / 1e3,
        size = report.bytes as f64 / 1e6,
        minutes = report.seconds / 60.0,
        threads = report.threads,
        processor = report.processor,
        steps = report.steps,
        adapter_steps = report.adapter_steps,
        batch = recipe.batch,
        context = recipe.context,
        texts = report.texts,
        choices = report.choices,
    )
}
