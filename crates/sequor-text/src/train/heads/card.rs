//! The card of trained heads: what they are, from measured numbers.

use sequor_backbone::heads::HeadsKind;

use super::recipe::{HeadsRecipe, Labels};
use crate::train::conduct::{HeadsReport, licence_text};

/// What a kind of heads is, in a sentence.
fn what(kind: HeadsKind) -> &'static str {
    match kind {
        HeadsKind::Medusa => {
            "Medusa heads (Cai et al., 2024): each guesses one later token from the model's last state, on its own."
        }
        HeadsKind::Hydra => {
            "Hydra heads (Ankner et al., 2024): each guesses one later token from the model's last state and the tokens drafted before it."
        }
        HeadsKind::HydraPlus => {
            "Hydra++ heads (Ankner et al., 2024): a decoder layer over the model's states, and behind it heads that also read the tokens drafted before them."
        }
        HeadsKind::Eagle => {
            "An EAGLE layer (Li et al., 2024): one decoder layer that continues the model's states, drafting one token after the other."
        }
        HeadsKind::HiddenTransfer | HeadsKind::Router => "",
    }
}

/// How they were taught, in a sentence.
fn lesson(recipe: &HeadsRecipe) -> String {
    let labels = match recipe.labels {
        Labels::Laws => {
            "the cross-entropy with the model's own laws over the drafted tokens, computed from the states in the corpus"
        }
        Labels::Tokens => "the cross-entropy with the tokens of the corpus",
    };
    let mut text = if recipe.kind == HeadsKind::Eagle {
        format!(
            "{labels}, plus {} times the smooth L1 distance to the model's states; {} passes, of which all but the first read the layer's own predictions",
            recipe.state_weight, recipe.unroll
        )
    } else {
        format!(
            "{labels}; each head weighs {} of the one before",
            recipe.decay
        )
    };
    if recipe.sampled_vocab > 0 {
        text += &format!(
            "; in training over the tokens of the batch and the {} most frequent ones",
            recipe.sampled_vocab
        );
    }
    if recipe.regression {
        text += "; the linear parts began at the ridge regression of the states that follow";
    }
    text
}

/// The text of `README.md`.
pub(super) fn card(recipe: &HeadsRecipe, report: &HeadsReport, command: &str) -> String {
    let rows: String = report
        .heads
        .iter()
        .enumerate()
        .map(|(i, a)| {
            let [top1, top3, top10] = [a.top1, a.top3, a.top10].map(|x| x * 100.0);
            format!("| {} | {top1:.1} % | {top3:.1} % | {top10:.1} % |\n", i + 2)
        })
        .collect();
    let vocabulary = match report.draft_vocab {
        Some(n) => format!(
            "The {n} most frequent tokens of the corpus's answers are drafted ({:.2} % of these answers; `d2t` holds their ids), scored by the rows of the model's own output head that belong to them.",
            report.coverage * 100.0
        ),
        None => "All tokens are drafted, scored by the model's own output head.".to_owned(),
    };
    format!(
        "---
base_model: {base}
license: {licence}
---

# {kind} heads for {base}

{what} They make generation faster and never change what is generated, because the model itself checks every guess.

{params:.2} M parameters, stored in bf16 ({size:.1} MB). {vocabulary}

## How they were made

```sh
{command}
```

Data: {tokens} tokens in {sequences} sequences that {base} wrote itself, partly taking its best token, partly drawing, with \
its states; no other text. Every 19th sequence was held out. Loss: {lesson}.

{steps} updates of {batch} sequences ({positions} positions, {epochs:.1} passes), AdamW with learning rate {lr} and a cosine, \
seed {seed}, {minutes:.1} minutes on {threads} thread(s) of {processor}. The weights are those of step {best}. `training/` has \
the log, its picture and the report.

## Measured

How often the true token of a held-out answer was the best guess, among the best three, among the best ten, by the stored \
weights, given the true tokens before it{own}; {measured} positions:

| tokens ahead | top 1 | top 3 | top 10 |
|---|---|---|---|
{rows}
A draft to this depth reads {share:.1} % of the weights that a pass of the model over one token reads (counted in parameters; \
{each:.1} % per token drafted). `accuracies` in `heads.json` are the same counts by rank, given that the tokens before were \
among the ten best: static trees are searched in them.

## Licence

{licence_text}
",
        base = report.base,
        licence = if report.licence.is_empty() { "other" } else { &report.licence },
        kind = title(recipe.kind),
        what = what(recipe.kind),
        params = report.parameters as f64 / 1e6,
        size = report.bytes as f64 / 1e6,
        tokens = report.corpus_tokens,
        sequences = report.corpus_sequences,
        lesson = lesson(recipe),
        steps = report.steps,
        batch = recipe.batch,
        positions = report.positions,
        epochs = report.epochs,
        lr = recipe.learning_rate,
        seed = recipe.seed,
        minutes = report.seconds / 60.0,
        threads = report.threads,
        processor = report.processor,
        best = report.best_step,
        own = if recipe.kind == HeadsKind::Eagle { " but the layer's own states" } else { "" },
        measured = report.measured,
        share = report.cost_share * 100.0,
        each = report.cost_share * 100.0 / recipe.depth.max(1) as f64,
        licence_text = licence_text(report),
    )
}

fn title(kind: HeadsKind) -> &'static str {
    match kind {
        HeadsKind::Medusa => "Medusa",
        HeadsKind::Hydra => "Hydra",
        HeadsKind::HydraPlus => "Hydra++",
        HeadsKind::Eagle => "EAGLE",
        HeadsKind::HiddenTransfer => "Hidden transfer",
        HeadsKind::Router => "Router",
    }
}
