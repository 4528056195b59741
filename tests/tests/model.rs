//! The real model, where it is at hand: SmolLM2-135M-Instruct from its GGUF file.

use sequor_data::Resolver;
use sequor_nn::device::{DType, Weights};
use sequor_text::{Depth, LoadOptions, Message, Speculate, TextOptions, TextPipeline};
use std::path::PathBuf;

/// Where SmolLM2 is; a test that needs it says so and ends when it is not there.
pub fn smollm2() -> Option<PathBuf> {
    match Resolver::from_env().offline(true).resolve_model("smollm2") {
        Ok(found) => Some(found.path),
        Err(e) => {
            eprintln!("skipped, SmolLM2 is not here: {e}");
            None
        }
    }
}

fn pipeline(weights: impl Into<Weights>) -> Option<TextPipeline> {
    let options = LoadOptions {
        weights: weights.into(),
        ..LoadOptions::default()
    };
    Some(TextPipeline::load(&smollm2()?, &options).unwrap())
}

#[test]
fn it_knows_a_capital_however_weights_are_kept() {
    // (Of France it is less sure: there the best answer is ahead by 0.08 nats, which is less than
    // rounding to 16 bits may change.)
    for weights in ["f32", "f16", "bf16", "auto", "int8", "q8_0", "q4_0"] {
        let Some(p) = pipeline(weights.parse::<Weights>().unwrap()) else {
            return;
        };
        let prompt = p
            .chat_prompt(&[Message::user("What is the capital of Germany?")])
            .unwrap();
        let g = p
            .stream_tokens(&prompt, &TextOptions::greedy(16))
            .unwrap()
            .collect_all()
            .unwrap();
        assert_eq!(g.text, "The capital of Germany is Berlin.", "{weights}");
    }
}

#[test]
fn a_draft_changes_no_text_however_our_kernels_keep_weights() {
    if !sequor_kernels::matmul::Isa::serve() {
        return eprintln!(
            "skipped: libtorch computes here, whose 16-bit rows differ by their number"
        );
    }
    for weights in ["bf16", "auto", "int8", "q8_0", "q4_0"] {
        let Some(p) = pipeline(weights.parse::<Weights>().unwrap()) else {
            return;
        };
        let text = "Repeat word by word: the old mill stands by the river, and the river runs past the old mill to the sea.";
        let prompt = p.chat_prompt(&[Message::user(text)]).unwrap();
        let run = |speculate| {
            let options = TextOptions {
                speculate,
                ignore_eos: true,
                ..TextOptions::greedy(96)
            };
            p.stream_tokens(&prompt, &options)
                .unwrap()
                .collect_all()
                .unwrap()
        };
        let plain = run(Speculate::Off);
        for method in [Speculate::PromptLookup, Speculate::Trigram] {
            let drafted = run(method);
            assert_eq!(drafted.tokens, plain.tokens, "{weights}");
            assert!(
                drafted.report.target_calls < plain.report.target_calls,
                "{weights}"
            );
        }
    }
}

#[test]
fn lookup_gives_the_same_text_with_fewer_calls() {
    let Some(p) = pipeline(DType::F32) else {
        return;
    };
    let text = "Repeat word by word: the old mill stands by the river, and the river runs past the old mill to the sea.";
    let prompt = p.chat_prompt(&[Message::user(text)]).unwrap();
    let run = |speculate, depth| {
        let options = TextOptions {
            speculate,
            depth,
            ..TextOptions::greedy(40)
        };
        p.stream_tokens(&prompt, &options)
            .unwrap()
            .collect_all()
            .unwrap()
    };
    let plain = run(Speculate::Off, Depth::Adaptive);
    let lookup = run(Speculate::PromptLookup, Depth::Fixed(6));
    assert_eq!(lookup.tokens, plain.tokens);
    assert!(
        lookup.report.accepted > 0 && lookup.report.tokens_per_call() > 1.2,
        "{}",
        lookup.report
    );
}

#[test]
fn pieces_of_the_stream_make_the_text_and_seeds_repeat() {
    let Some(p) = pipeline(DType::F32) else {
        return;
    };
    let options = TextOptions::sampling(24, 0.9, 17);
    let pieces: String = p
        .stream("Une fête à Genève, 東京 🎉:", &options)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let whole = p.generate("Une fête à Genève, 東京 🎉:", &options).unwrap();
    assert_eq!(pieces, whole.text);
    let other = p
        .generate(
            "Une fête à Genève, 東京 🎉:",
            &TextOptions {
                seed: 18,
                ..options
            },
        )
        .unwrap();
    assert_ne!(other.tokens, whole.tokens);
}

/// Ids that the publisher's tokenizer gives.
const GOLDEN: [(&str, &[u32]); 8] = [
    ("Hello, world!", &[19556, 28, 905, 17]),
    (
        "The capital of France is Paris.",
        &[504, 3575, 282, 4649, 314, 7042, 30],
    ),
    (
        "  leading   and trailing spaces   ",
        &[216, 2899, 256, 284, 35079, 5600, 333],
    ),
    (
        "line one\nline two\r\n\n\ttabbed\n",
        &[1311, 582, 198, 1311, 827, 201, 1116, 197, 15999, 5776, 198],
    ),
    (
        "I'm you're they've we'll he'd CAN'T",
        &[
            57, 5248, 346, 2316, 502, 3543, 392, 3060, 384, 6737, 27190, 23, 68,
        ],
    ),
    (
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        &[1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198],
    ),
    (
        "naïve café — “quotes” Ünïcödé",
        &[
            3546, 46494, 37366, 1841, 619, 385, 2346, 573, 5549, 246, 94, 25972, 83, 7466, 84, 2756,
        ],
    ),
    (
        "def f(x):\n    return x**2  # comment\n\nprint(f(12))\n",
        &[
            1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 5189, 198, 198, 3272, 24,
            86, 24, 33, 34, 1292, 198,
        ],
    ),
];

#[test]
fn the_tokenizer_in_the_file_gives_the_published_ids() {
    let Some(p) = pipeline(DType::F32) else {
        return;
    };
    let ids = |text: &str| p.tokenizer().encode(text, false).unwrap();
    for text in [
        "Hello, world!",
        "a  b\n\n\tc 1234567",
        "naïve café — 東京 🎉👩‍🚀",
        "<|im_start|>user\nhi<|im_end|>\n",
    ] {
        assert_eq!(p.tokenizer().decode(&ids(text), false).unwrap(), text);
    }
    for (text, golden) in GOLDEN {
        assert_eq!(ids(text), golden, "{text:?}");
    }
    assert_eq!(ids("<|im_start|>").len(), 1);
    assert_eq!(ids("123").len(), 3, "digits are split one by one");
}
