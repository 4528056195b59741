//! The card of a trained model: what it is, from measured numbers.

use super::corpus::Corpus;
use super::lm::LmReport;
use super::recipe::LmRecipe;

/// The text of `README.md`.
pub(super) fn card(
    recipe: &LmRecipe,
    corpus: &Corpus,
    report: &LmReport,
    command: Option<&str>,
) -> String {
    let origin = &corpus.origin;
    let (m, t) = (&recipe.model, &recipe.train);
    let default = format!(
        "sequor train lm models/{0}/recipe.toml --out models/{0}",
        recipe.name
    );
    let command = command.unwrap_or(&default);
    let books: String = report
        .held_out
        .iter()
        .map(|(name, bits)| format!("| {name} | {bits:.3} |\n"))
        .collect();
    let names: Vec<&str> = report.held_out.keys().map(String::as_str).collect();
    let ended = if report.stopped_early {
        "stopped when the held-out text was no longer predicted better"
    } else {
        "ran to its last step"
    };
    let attribution = match (origin.attribution.as_str(), origin.homepage.as_str()) {
        ("", _) => String::new(),
        (by, home) => format!(" {by} {home}"),
    };
    format!(
        "---
license: {licence_tag}
pipeline_tag: text-generation
---

# {name}

{description}

A decoder of the Llama kind with {params:.2} M parameters: {layers} layers, width {dim}, {heads} query and \
{kv} key/value heads, feed-forward width {ffn}, {tied} head, a byte-level BPE vocabulary of {vocab} tokens, a context of \
{context} tokens. Weights are stored in bf16 ({size:.1} MB).

## Data

{data}. Licence: {licence}.{attribution}

{train_bytes:.2} MB of it ({train_tokens} tokens) were trained on. Held out, and never seen in training or by the \
tokenizer's vocabulary: {held_names} ({held_kb:.1} kB).

## How it was made

```sh
{command}
```

It took {minutes:.1} minutes on {threads} thread(s) of {processor}: {steps} steps of {per_step} tokens, {epochs:.1} passes \
over the text; it {ended}. The weights are those of step {best}. Everything is in `recipe.toml`; `training/` has the log \
and its picture.

![loss](training/loss.png)

## Measured

By the stored weights, on the held-out text, in windows of {window} tokens that overlap by half; the end of each chapter or \
file is predicted too:

| held out | bits per byte |
|---|---|
{books}| **all** | **{bits:.3}** |

Perplexity per token: {perplexity:.2}.

## Limits

It continues text in the manner of what it read, and knows nothing else: it does not answer questions, follow \
instructions or state facts. At this size it loses the thread after a sentence or two. It exists to show training, \
sampling and speculative decoding on a model that anyone can make again in less than an hour.
",
        licence_tag = if origin.licence == "public domain" { "cc0-1.0" } else { "other" },
        name = recipe.name,
        description = recipe.description,
        params = report.parameters as f64 / 1e6,
        layers = m.num_hidden_layers,
        dim = m.hidden_size,
        heads = m.num_attention_heads,
        kv = m.num_key_value_heads,
        ffn = m.intermediate_size,
        tied = if m.tie_word_embeddings { "a tied" } else { "an untied" },
        vocab = corpus.tokenizer.vocab_size(),
        context = m.max_position_embeddings,
        size = report.parameters as f64 * 2.0 / 1e6,
        data = origin.description,
        licence = origin.licence,
        train_bytes = report.train_bytes as f64 / 1e6,
        train_tokens = report.train_tokens,
        held_names = names.join(", "),
        held_kb = report.held_out_bytes as f64 / 1e3,
        minutes = report.seconds / 60.0,
        threads = report.threads,
        processor = report.processor,
        steps = report.steps,
        per_step = t.batch * t.context * t.accumulation,
        epochs = report.epochs,
        best = report.best_step,
        window = t.context,
        bits = report.bits_per_byte,
        perplexity = report.perplexity,
    )
}
