//! A drafter of one's own. This one remembers which token followed which in the text so
//! far, and proposes the chain of last successors. What it proposes can only change the
//! speed: the verifier keeps the text what plain decoding would have made of it.
//!
//! `cargo run --release -p sequor-examples --example custom_drafter [MODEL]`

use sequor::sampling::draft::{Budget, DraftContext, Drafter};
use sequor::sampling::{
    DepthPolicy, DraftTree, Error, GenerationConfig, Generator, Options, Result,
};
use sequor::text::TextPipeline;
use std::collections::HashMap;
use std::ops::ControlFlow;

/// Proposes for each token the one that followed it last.
#[derive(Default)]
struct LastSuccessor {
    successor: HashMap<u32, u32>,
    seen: usize,
}

impl Drafter for LastSuccessor {
    fn name(&self) -> &str {
        "last-successor"
    }

    fn propose(&mut self, ctx: &DraftContext<'_>, budget: Budget) -> Result<DraftTree> {
        for pair in ctx.tokens[self.seen.min(ctx.tokens.len())..].windows(2) {
            self.successor.insert(pair[0], pair[1]);
        }
        self.seen = ctx.tokens.len().saturating_sub(1);
        let mut chain = Vec::new();
        let mut last = ctx.tokens.last().copied();
        while let Some(&next) = last
            .and_then(|t| self.successor.get(&t))
            .filter(|_| chain.len() < budget.depth)
        {
            chain.push(next);
            last = Some(next);
        }
        Ok(DraftTree::chain(chain))
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "smollm2".into());
    let pipeline = TextPipeline::from_pretrained(&model)?;
    let prompt = pipeline.encode(
        "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat. The cat sat",
    )?;
    // Four tokens every time; the default would draft only where that pays.
    let options = Options::from(GenerationConfig::greedy())
        .max_new_tokens(48)
        .depth(DepthPolicy::Fixed(4));
    let generator = Generator::new(pipeline.model(), options)?;
    let go_on = |_| ControlFlow::Continue(());
    let plain = generator.generate(&prompt, None, go_on)?;
    let drafted = generator.generate(&prompt, Some(Box::new(LastSuccessor::default())), go_on)?;
    println!("{}", pipeline.tokenizer().decode(&drafted.tokens, true)?);
    println!("{}", drafted.report);
    if plain.tokens != drafted.tokens {
        return Err(Box::new(Error::Backend(
            "the drafter changed the text".into(),
        )));
    }
    println!("the same text as plain decoding");
    Ok(())
}
