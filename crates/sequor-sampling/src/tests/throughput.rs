//! Tokens per call follow the formula; what the loop costs besides the models.

use std::cell::Cell;
use std::ops::ControlFlow;

use std::time::Instant;

use super::toy::{Markov, ToyState};
use crate::draft::{
    Budget, DraftContext, DraftMode, DraftModel, Drafter, TreeSearch, Trigram, TrigramOptions,
    TrigramTable, Vocabulary,
};
use crate::target::{LogitRows, Logits, Output, Step};
use crate::{
    DepthPolicy, DraftTree, GenerationConfig, Generator, Key, Options, Result, TargetModel,
};

/// On a target and a draft without memory, the chance of acceptance is `a = 1 - TV(p, q)`
/// at every position, and a call gives `(1 - a^(g+1)) / (1 - a)` tokens.
#[test]
fn expected_tokens_per_call() {
    let (target, guess) = (Markov::new(8, 0, 1.0, 1), Markov::new(8, 0, 1.0, 2));
    let a = 1.0 - target.law(&[]).total_variation(&guess.law(&[]));
    assert!((0.3..0.9).contains(&a), "{a}");
    for depth in [1, 2, 4, 7] {
        let mut total = crate::Report::default();
        let (mut tested, mut accepted) = (0, 0);
        for request in 0..20 {
            let options = Options::from(GenerationConfig::sampling(1.0))
                .request(request)
                .max_new_tokens(1500)
                .depth(DepthPolicy::Fixed(depth));
            let drafter = DraftModel::new(&guess, DraftMode::Sampled).unwrap();
            let generator = Generator::new(&target, options).unwrap();
            let report = generator
                .generate(&[1], Some(Box::new(drafter)), |_| ControlFlow::Continue(()))
                .unwrap()
                .report;
            total.emitted += report.emitted - 1;
            total.target_calls += report.target_calls;
            tested += report.drafted_by_depth[0];
            accepted += report.accepted_by_depth[0];
        }
        let expected = (1.0 - a.powi(depth as i32 + 1)) / (1.0 - a);
        let found = total.emitted as f64 / total.target_calls as f64;
        assert!(
            (found / expected - 1.0).abs() < 0.02,
            "{depth}: {found}, not {expected}"
        );
        let first = accepted as f64 / tested as f64;
        assert!((first / a - 1.0).abs() < 0.02, "{first} instead of {a}");
    }
}

/// Vocabulary of the overhead measurements.
const WIDE: usize = 49_152;
/// Seconds of a forward pass that the overhead is compared with.
const FORWARD: f64 = 13e-3;

/// A target with a large vocabulary whose rows are made beforehand. The best token, far
/// above the others, is one more than the one before.
struct Wide {
    toy: Markov,
    row: Vec<f32>,
    /// Seconds of the last forward pass.
    spent: Cell<f64>,
}

/// The middle one: what is seldom interrupted, on a busy machine too.
fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

impl Wide {
    fn new() -> Self {
        let mut stream = Key::new(1, 1).stream(0, crate::Purpose::Test);
        Self {
            toy: Markov::new(WIDE, 0, 1.0, 1),
            row: (0..WIDE).map(|_| stream.normal() as f32).collect(),
            spent: Cell::default(),
        }
    }
}

impl TargetModel for Wide {
    type State = ToyState;
    fn vocab_size(&self) -> usize {
        WIDE
    }
    fn context_len(&self) -> usize {
        1 << 20
    }
    fn new_state(&self, slots: usize) -> Result<ToyState> {
        self.toy.new_state(slots)
    }
    fn forward(&self, steps: &[Step<'_>], state: &mut ToyState) -> Result<Vec<Output>> {
        let start = Instant::now();
        let run = |step: &Step<'_>| {
            let only_state = Step {
                logits: LogitRows::None,
                ..*step
            };
            self.toy.forward(&[only_state], state)?;
            let rows = match step.logits {
                LogitRows::None => &[],
                LogitRows::Last => &step.tokens[step.tokens.len() - 1..],
                LogitRows::All => step.tokens,
            };
            let mut data = Vec::with_capacity(rows.len() * WIDE);
            for &token in rows {
                let start = data.len();
                data.extend_from_slice(&self.row);
                data[start + (token as usize + 1) % WIDE] = 25.0;
            }
            Ok(Output {
                logits: Logits::new(data, WIDE)?,
                features: None,
            })
        };
        let outputs = steps.iter().map(run).collect();
        self.spent.set(start.elapsed().as_secs_f64());
        outputs
    }
}

/// Counts up; a tree has wrong siblings besides.
struct Counter {
    tree: bool,
}

impl Drafter for Counter {
    fn name(&self) -> &str {
        "counter"
    }
    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        let mut tree = DraftTree::new();
        let mut parent = None;
        let mut token = ctx.tokens[ctx.tokens.len() - 1];
        while tree.len() < budget.nodes {
            if self.tree && tree.len() + 1 < budget.nodes {
                tree.push(parent, 0, crate::Proposal::OneHot)?;
            }
            token = (token + 1) % WIDE as u32;
            parent = Some(tree.push(parent, token, crate::Proposal::OneHot)?);
        }
        Ok(tree)
    }
    fn reset(&mut self) {}
}

/// Prints what a round costs besides target and draft.
#[test]
fn overhead_of_a_round() {
    let target = Wide::new();
    let sampled = |top_p| GenerationConfig {
        top_p,
        ..GenerationConfig::sampling(0.8)
    };
    let penalty = GenerationConfig {
        repetition_penalty: Some(1.1),
        ..GenerationConfig::greedy()
    };
    println!("overhead per round, vocabulary {WIDE}, share of a round with a 13 ms forward pass");
    for (mode, config) in [
        ("greedy", GenerationConfig::greedy()),
        ("greedy, repetition penalty", penalty),
        ("temperature", sampled(None)),
        ("temperature, top-p", sampled(Some(0.95))),
    ] {
        for (shape, tree, nodes) in [
            ("plain", false, 0),
            ("chain", false, 4),
            ("chain", false, 16),
            ("tree", true, 16),
        ] {
            let options = Options::from(config.clone())
                .max_new_tokens(200)
                .depth(DepthPolicy::Fixed(nodes))
                .draft_nodes(nodes);
            let generator = Generator::new(&target, options).unwrap();
            let drafter: Box<dyn Drafter> = Box::new(Counter { tree });
            let mut session = generator.session(&[7], Some(drafter)).unwrap();
            let mut rounds = Vec::new();
            while session.finish().is_none() {
                let start = Instant::now();
                session.step().unwrap();
                rounds.push(start.elapsed().as_secs_f64() - target.spent.get());
            }
            let (report, seconds) = (session.report(), median(rounds));
            let accepted = if tree { nodes / 2 } else { nodes };
            assert!(
                report.accepted + accepted >= report.rounds * accepted,
                "{report}"
            );
            println!(
                "  {mode:28} {shape:5} {nodes:2} nodes, {accepted:2} accepted: {:6.0} us, {:.2} %",
                1e6 * seconds,
                100.0 * seconds / (seconds + FORWARD),
            );
        }
    }
}

/// Prints what a proposal of the trigram table costs.
#[test]
fn cost_of_the_tree_search() {
    let mut stream = Key::new(3, 3).stream(0, crate::Purpose::Test);
    // Words of a vocabulary with a few likely successors each.
    let mut text = vec![1_u32];
    for _ in 0..200_000 {
        let last = text[text.len() - 1];
        text.push((last * 31 + 7 * stream.below(10) as u32) % 2048);
    }
    let vocabulary = Vocabulary {
        size: 2048,
        hash: [0; 32],
    };
    let table = TrigramTable::from_tokens(&text, vocabulary, 12).unwrap();
    for (name, search) in [
        ("150 iterations", Some(TreeSearch::default())),
        ("top weight", None),
    ] {
        let options = TrigramOptions {
            search,
            ..TrigramOptions::default()
        };
        let mut drafter = Trigram::new(options).unwrap().with_table(table.clone());
        let mut nodes = 0;
        let mut seconds = Vec::new();
        for at in 0..300 {
            let ctx = DraftContext {
                tokens: &text[at..at + 500],
                prompt_len: 1,
                max_length: 1000,
                eos: &[],
                key: Key::new(1, at as u64),
                features: None,
            };
            let start = Instant::now();
            nodes += drafter
                .propose(
                    &ctx,
                    Budget {
                        depth: 5,
                        nodes: 64,
                    },
                )
                .unwrap()
                .len();
            seconds.push(start.elapsed().as_secs_f64());
        }
        assert!(nodes > 300 * 20, "{nodes}");
        println!(
            "trigram, {name}: {:.0} us and {} nodes per proposal",
            1e6 * median(seconds),
            nodes / 300
        );
    }
}
