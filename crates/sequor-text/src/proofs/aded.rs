//! System 15, ADED: does a table that learns while it decodes draft better than one that
//! does not, and than prompt lookup?
//!
//! The table is counted from the New Testament and used on other prompts, so that it has to
//! adapt.
//! Every prompt occurs once in the first, the middle and the last third of a session (three
//! sessions, each beginning a third later), so that early and late are compared on the same
//! prompts.

use std::collections::BTreeMap;

use sequor_data::bible::{Bible, Testament};
use sequor_eval::proof::{Claim, Outcome, Proof, Recorder, Side};
use sequor_sampling::PromptLookup;
use sequor_sampling::draft::{TreeSearch, Trigram, TrigramOptions, TrigramTable, Vocabulary};

use super::bench::Bench;
use super::decode::{Arm, Ask, Counted, Decode, EXACT, PLAIN, compare, counts, metrics, row};
use crate::prompts::Encoded;
use crate::{Result, TextPipeline};

const LOOKUP: &str = "prompt-lookup";
const STATIC: &str = "table, by weight";
const SEARCHED: &str = "table, searched";
const ADED: &str = "ADED";
const EMPTY: &str = "ADED, empty table";
/// Added to the names of arms on the table's own kind of text.
const IN_DOMAIN: &str = " (Bible)";
/// Depth and nodes of the trees; prompt lookup drafts a chain as long as it does elsewhere.
const TREE: (usize, usize) = (4, 24);
const CHAIN: (usize, usize) = (10, 10);
/// The book that prompts are taken from and the table is not.
const HELD_OUT: &str = "John";
/// Tokens of a prompt from it.
const VERSE_TOKENS: usize = 64;
/// Parts of a session.
const PHASES: [&str; 3] = ["first", "middle", "last"];

fn proof() -> Proof {
    let late = |arm: &str| Side::only(arm, "phase", "last");
    let early = |arm: &str| Side::only(arm, "phase", "first");
    let timed = |arm: &str| Side::only(arm, "timed", "yes");
    let bible = |arm: &str| format!("{arm}{IN_DOMAIN}");
    metrics(Proof::new(
        15,
        "ADED: drafts from a table of trigrams that adapts",
        "Liu et al., \"Adaptive Draft-Verification for Efficient Large Language Model Decoding\", AAAI 2025",
    ))
    .label("phase")
    .label("timed")
    .claim(
        Claim::level("equal", EXACT)
            .always(1.0)
            .text("Greedy text is that of plain decoding, token for token (f32)"),
    )
    .claim(
        Claim::ratio("tokens_per_call", late(ADED), early(ADED)).text(
            "It adapts: with a table from another text, more tokens per call in the last third of a session than in the first, on the same prompts",
        ),
    )
    .claim(
        Claim::ratio("tokens_per_call", late(EMPTY), early(EMPTY))
            .text("An empty table learns: more tokens per call in the last third than in the first"),
    )
    .claim(
        Claim::ratio("tokens_per_call", ADED, SEARCHED)
            .above(1.1)
            .text("With a table from another text, adapting gives over 10 % more tokens per call than the fixed table")
            .paper("about 20 % higher acceptance than fixed retrieval"),
    )
    .claim(
        Claim::ratio("tokens_per_call", late(ADED), LOOKUP)
            .at_least(1.0)
            .text("Once its table is warm it gives at least as many tokens per call as prompt lookup"),
    )
    .claim(
        Claim::ratio("tokens_per_call", bible(ADED), bible(SEARCHED))
            .at_least(0.97)
            .text("On the table's own kind of text, adapting loses no more than 3 %"),
    )
    .claim(
        Claim::level("draft_us", timed(ADED))
            .median()
            .below(1000.0)
            .text("A search takes less than a millisecond"),
    )
    .claim(
        Claim::level("speedup", timed(ADED))
            .median()
            .above(1.0)
            .text("Decoding is faster than plain decoding")
            .paper("up to 2.5x; 1.9x with a table of 253 MB"),
    )
}

fn trigram(table: Option<&TrigramTable>, search: bool, adapt: bool) -> Result<Trigram> {
    let defaults = TrigramOptions::default();
    let options = TrigramOptions {
        adapt: defaults.adapt.filter(|_| adapt),
        search: search.then(TreeSearch::default),
        ..defaults
    };
    let drafter = Trigram::new(options)?;
    Ok(match table {
        Some(table) => drafter.with_table(table.clone()),
        None => drafter,
    })
}

type Arms<'m> = Vec<Box<dyn Arm + 'm>>;

/// Arms that are the same at any time of a session; plain decoding first.
fn steady<'m>(pipeline: &'m TextPipeline, table: &TrigramTable) -> Result<Arms<'m>> {
    let model = pipeline.model();
    Ok(vec![
        Box::new(Decode::plain(model)),
        Box::new(Decode::new(LOOKUP, model, PromptLookup::default(), CHAIN)),
        Box::new(Decode::new(
            STATIC,
            model,
            trigram(Some(table), false, false)?,
            TREE,
        )),
        Box::new(Decode::new(
            SEARCHED,
            model,
            trigram(Some(table), true, false)?,
            TREE,
        )),
    ])
}

/// Arms at the beginning of a session.
fn adapting<'m>(pipeline: &'m TextPipeline, table: &TrigramTable) -> Result<Arms<'m>> {
    let model = pipeline.model();
    Ok(vec![
        Box::new(Decode::new(
            ADED,
            model,
            trigram(Some(table), true, true)?,
            TREE,
        )),
        Box::new(Decode::new(EMPTY, model, trigram(None, true, true)?, TREE)),
    ])
}

pub(super) fn run(bench: &mut Bench<'_>, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let mut recorder = Recorder::start(proof(), bench.setup(&BTreeMap::new(), say)?)?;
    say("counting the trigrams of the New Testament");
    let bible = Bible::open(&bench.resolver().resolve_data("bible-web")?.path)?;
    let table = table(&bench.pipeline, &bible)?;
    recorder.setting(
        "table",
        format!("World English Bible, New Testament without {HELD_OUT}"),
    );
    recorder.setting("table_pairs", table.len());
    recorder.setting("tree_depth_nodes", vec![TREE.0, TREE.1]);
    let ask = Ask {
        new_tokens: bench.size.new_tokens,
        temperature: 0.0,
        eos: bench.pipeline.eos(),
        cancel: bench.options.cancel.clone(),
    };
    sessions(bench, &mut recorder, &table, &ask, say)?;
    in_domain(bench, &mut recorder, &table, &bible, &ask, say)?;
    let exact = bench.exact()?;
    let mut arms = steady(&exact, &table)?;
    arms.extend(adapting(&exact, &table)?);
    let ask = Ask {
        new_tokens: bench.size.exact.1,
        ..ask
    };
    compare(&mut recorder, &mut arms, bench.exact_prompts(), &ask, say)?;
    Ok(recorder.finish(&bench.options.out)?)
}

/// Three sessions, each beginning a third later than the one before.
fn sessions(
    bench: &Bench<'_>,
    recorder: &mut Recorder,
    table: &TrigramTable,
    ask: &Ask<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let pipeline = &bench.pipeline;
    let mut steady = steady(pipeline, table)?;
    // What counts is known from plain decoding in the first session.
    let mut plain: BTreeMap<&str, Counted> = BTreeMap::new();
    let n = bench.prompts.len();
    for session in 0..PHASES.len() {
        let mut adapting = adapting(pipeline, table)?;
        let mut order: Vec<&Encoded> = bench.prompts.iter().collect();
        order.rotate_left((n * session / PHASES.len()).min(n));
        for (place, prompt) in order.into_iter().enumerate() {
            let phase = PHASES
                .get(place * PHASES.len() / n.max(1))
                .unwrap_or(&"last");
            let first = session == 0;
            // Random numbers of a prompt are the same in every session.
            let request = bench
                .prompts
                .iter()
                .position(|p| p.id == prompt.id)
                .unwrap_or(0) as u64;
            let arms = steady.iter_mut().filter(|_| first).chain(&mut adapting);
            for arm in arms {
                let run = arm.run(&prompt.tokens, request, ask)?;
                if arm.name() == PLAIN {
                    plain.insert(&prompt.id, run.count());
                }
                let Some(reference) = plain.get(prompt.id.as_str()).filter(|p| counts(p)) else {
                    continue;
                };
                let Some(row) = row(arm.name(), prompt, &run, reference) else {
                    continue;
                };
                let row = row.repeat(session).label("phase", *phase);
                recorder.push(row.label("timed", if first { "yes" } else { "no" }))?;
            }
            say(&format!(
                "session {} of {}, prompt {} of {n}",
                session + 1,
                PHASES.len(),
                place + 1
            ));
        }
    }
    let short = plain.values().filter(|p| !counts(p)).count();
    if short > 0 {
        recorder.note(format!(
            "{short} prompts were left out: their answers are too short before they repeat themselves"
        ));
    }
    Ok(())
}

/// The table's own kind of text: chapters that it has not seen, to be continued.
fn in_domain(
    bench: &Bench<'_>,
    recorder: &mut Recorder,
    table: &TrigramTable,
    bible: &Bible,
    ask: &Ask<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let pipeline = &bench.pipeline;
    let mut prompts = Vec::new();
    for (chapter, verses) in bible.book(HELD_OUT).into_iter().flat_map(|b| b.chapters()) {
        let text: Vec<&str> = verses.iter().map(|v| v.text.as_str()).collect();
        let mut tokens = pipeline.encode(&text.join(" "))?;
        tokens.truncate(VERSE_TOKENS);
        prompts.push(Encoded {
            id: format!("{HELD_OUT} {chapter}"),
            kind: "bible".to_owned(),
            tokens,
            cut: 0,
        });
    }
    prompts.truncate(if bench.options.quick { 5 } else { 8 });
    let plain = |arm: &dyn Arm| arm.name() == PLAIN;
    let mut arms = steady(pipeline, table)?;
    arms.retain(|arm| plain(&**arm) || arm.name() == SEARCHED);
    let mut others = adapting(pipeline, table)?;
    others.retain(|arm| arm.name() == ADED);
    arms.extend(others);
    super::decode::sweep(recorder, &mut arms, &prompts, ask, IN_DOMAIN, say)
}

/// Trigrams of the New Testament but the held-out book.
fn table(pipeline: &TextPipeline, bible: &Bible) -> Result<TrigramTable> {
    let mut tokens: Vec<u32> = Vec::new();
    let books = bible
        .books()
        .iter()
        .filter(|b| b.testament == Testament::New);
    for book in books.filter(|b| b.name != HELD_OUT) {
        for (_, verses) in book.chapters() {
            let text: Vec<&str> = verses.iter().map(|v| v.text.as_str()).collect();
            tokens.extend(pipeline.tokenizer().encode(&text.join(" "), false)?);
        }
    }
    let vocabulary = Vocabulary::default();
    let topn = TrigramOptions::default().topn;
    Ok(TrigramTable::from_tokens(&tokens, vocabulary, topn)?)
}
