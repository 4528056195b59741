//! The card of trained maps: what they are, from measured numbers.

use super::recipe::TransferRecipe;
use crate::train::conduct::{HeadsReport, licence_text};

/// The text of `README.md`.
pub(super) fn card(
    recipe: &TransferRecipe,
    report: &HeadsReport,
    divergences: &[f64],
    command: &str,
) -> String {
    let rows: String = (report.heads.iter().zip(divergences).zip(&recipe.layers))
        .enumerate()
        .map(|(j, ((a, divergence), layers))| {
            let [top1, top3, top10] = [a.top1, a.top3, a.top10].map(|x| x * 100.0);
            format!(
                "| {} | {layers} | {top1:.1} % | {top3:.1} % | {top10:.1} % | {divergence:.3} |\n",
                j + 2
            )
        })
        .collect();
    let vocabulary = match report.draft_vocab {
        Some(n) => format!(
            "The {n} most frequent tokens of the corpus's answers are drafted ({:.2} % of these answers; `d2t` holds their ids), scored by the rows of the model's own output head that belong to them.",
            report.coverage * 100.0
        ),
        None => "All tokens are drafted, scored by the model's own output head.".to_owned(),
    };
    let apart = if recipe.linked {
        ""
    } else {
        " They were trained and measured without seeing each other, for comparison only: drafting lets them."
    };
    format!(
        "---
base_model: {base}
license: {licence}
---

# Hidden transfer for {base}

Linear maps (hidden transfer, Wu et al., 2024) that make of the state of the last token, in the middle of the model, guesses \
at the states of the next ones; these run through the remaining layers as further rows of the same pass.{apart} They make \
generation faster and never change what is generated, because the model itself checks every guess and no row of a real token \
sees a guessed one.

{params:.2} M parameters, stored in bf16 ({size:.1} MB). {vocabulary}

## How they were made

```sh
{command}
```

Data: {tokens} tokens in {sequences} sequences that {base} wrote itself, partly taking its best token, partly drawing; no other \
text. Every 20th sequence was held out. Loss: the Kullback-Leibler divergence from the model's own laws over the drafted tokens; \
each offset weighs {decay} of the one before. The maps began as identities.

{steps} updates of {batch} sequence(s) of at most {context} tokens, {anchors:.0} % of the answers' tokens guessing \
({positions} positions, {epochs:.1} passes), AdamW with learning rate {lr}, a cosine and no weight decay, seed {seed}, \
{minutes:.1} minutes on {threads} thread(s) of {processor}. The weights are those of step {best}. `training/` has the log, \
its picture and the report.

## Measured

How often the true token of a held-out answer was the best guess, among the best three, among the best ten, by the stored \
weights, and the divergence from the model's law in nats; {measured} positions:

| tokens ahead | made after layer | top 1 | top 3 | top 10 | divergence |
|---|---|---|---|---|---|
{rows}
`accuracies` in `heads.json` are the same counts by rank, given that the tokens before were among the ten best: static trees \
are searched in them.

## Licence

{licence_text}
",
        base = report.base,
        licence = if report.licence.is_empty() { "other" } else { &report.licence },
        params = report.parameters as f64 / 1e6,
        size = report.bytes as f64 / 1e6,
        tokens = report.corpus_tokens,
        sequences = report.corpus_sequences,
        decay = recipe.decay,
        steps = report.steps,
        batch = recipe.batch,
        context = recipe.context,
        anchors = recipe.anchors * 100.0,
        positions = report.positions,
        epochs = report.epochs,
        lr = recipe.learning_rate,
        seed = recipe.seed,
        minutes = report.seconds / 60.0,
        threads = report.threads,
        processor = report.processor,
        best = report.best_step,
        measured = report.measured,
        licence_text = licence_text(report),
    )
}
