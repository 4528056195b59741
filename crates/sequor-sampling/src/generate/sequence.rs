//! One request as a state machine over forward passes.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sequor_kernels::cost::CostCurve;
use sequor_kernels::rng::{Key, Purpose};
use sequor_nn::Tensor;

use super::depth::{DepthController, Round};
use super::options::Options;
use super::report::{FinishReason, Generation, Report};
use super::walk::{Sampler, Walk};
use crate::distribution::{Law, best_score};
use crate::draft::{Budget, DraftContext, Drafter, Feedback, NoDraft};
use crate::mirostat::Mirostat;
use crate::state::SequenceState;
use crate::target::{Layout, LogitRows, Output, Step, TargetModel};
use crate::tree::DraftTree;
use crate::verify::{self, Acceptance, Draws, Neighbours, Verdict};
use crate::{Error, Result};

/// Is told every token in order; `Break` ends the sequence after it. Stop strings are
/// implemented with it by whoever owns the tokenizer.
pub type OnToken<'d> = Box<dyn FnMut(u32) -> ControlFlow<()> + 'd>;

/// What a sequence has to know about the model.
#[derive(Clone, Debug)]
pub struct ModelLimits {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Largest number of tokens in a sequence.
    pub context_len: usize,
    /// Price of a forward pass by rows.
    pub cost_curve: Option<CostCurve>,
}

impl ModelLimits {
    /// Those of `model`.
    #[must_use]
    pub fn of<M: TargetModel>(model: &M) -> Self {
        Self {
            vocab_size: model.vocab_size(),
            context_len: model.context_len(),
            cost_curve: model.cost_curve(),
        }
    }
}

/// One request: prompt, progress and everything that decides what comes next.
///
/// Drive it with [`plan`](Self::plan), [`step`](Self::step), a forward pass, and
/// [`absorb`](Self::absorb), until `plan` says that it is finished. It owns one slot of a
/// state.
pub struct Sequence<'d> {
    slot: usize,
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Largest total length.
    end: usize,
    vocab: usize,
    context: usize,
    draft_nodes: Option<usize>,
    /// Tokens whose rows are committed in the state.
    cached: usize,
    chunk: usize,
    sampler: Sampler,
    acceptance: Acceptance,
    neighbours: Option<Arc<dyn Neighbours>>,
    key: Key,
    eos: Vec<u32>,
    stop_ids: Vec<u32>,
    drafter: Option<Box<dyn Drafter + 'd>>,
    on_token: Option<OnToken<'d>>,
    depth: DepthController,
    /// Features of rows committed since the last proposal.
    features: Option<Tensor>,
    planned: Option<Planned>,
    /// Scores of a row while they are processed.
    scratch: Vec<f32>,
    started: Instant,
    deadline: Option<Instant>,
    report: Report,
}

/// A forward pass that was asked for.
struct Planned {
    tokens: Vec<u32>,
    /// `None` for a chain.
    parents: Option<Vec<Option<usize>>>,
    /// Leading tokens that are part of the sequence already; the rest are drafts.
    known: usize,
    tree: DraftTree,
    logits: LogitRows,
    asked: bool,
    draft_seconds: f64,
}

impl<'d> Sequence<'d> {
    /// A sequence in `slot`. The first `cached` tokens of the prompt are in the state
    /// already.
    ///
    /// # Errors
    /// `Input` for an empty prompt, tokens outside the vocabulary or options out of
    /// range; `Limits` when the prompt is longer than the context.
    pub fn new(
        slot: usize,
        prompt: &[u32],
        cached: usize,
        options: &Options,
        model: &ModelLimits,
        drafter: Option<Box<dyn Drafter + 'd>>,
    ) -> Result<Self> {
        options.validate(model.vocab_size)?;
        check_prompt(prompt, model)?;
        if cached >= prompt.len() {
            return Err(Error::input(
                "cached",
                cached,
                format!("fewer than the prompt's {} tokens", prompt.len()),
            ));
        }
        let config = &options.config;
        let asked = config
            .total_limit(prompt.len())
            .unwrap_or(model.context_len);
        let end = asked.min(model.context_len);
        let greedy = config.is_greedy();
        let lossy = options.acceptance.changes_output(greedy);
        let random = drafter.as_ref().is_some_and(|d| d.is_random());
        let repeatable = !lossy && (greedy || !random);
        let started = Instant::now();
        let deadline = config
            .max_time
            .and_then(|s| Duration::try_from_secs_f64(s).ok());
        Ok(Self {
            slot,
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            end,
            vocab: model.vocab_size,
            context: model.context_len,
            draft_nodes: options.draft_nodes,
            cached,
            chunk: options.prefill_chunk,
            sampler: Sampler {
                greedy,
                processors: options.processor_list()?,
                mirostat: options.mirostat.map(Mirostat::new).transpose()?,
                prompt_len: prompt.len(),
                max_length: asked,
            },
            acceptance: options.acceptance,
            neighbours: None,
            key: Key::new(options.seed, options.request),
            eos: if options.ignore_eos {
                Vec::new()
            } else {
                config.eos_ids().to_vec()
            },
            stop_ids: options.stop_token_ids.clone(),
            depth: DepthController::new(options.depth, model.cost_curve.clone(), repeatable),
            report: Report {
                drafter: drafter
                    .as_ref()
                    .map_or(NoDraft.name(), |d| d.name())
                    .to_owned(),
                prompt_tokens: prompt.len(),
                lossy: lossy.then(|| options.acceptance.to_string()),
                ..Report::default()
            },
            drafter,
            on_token: None,
            features: None,
            planned: None,
            scratch: Vec::new(),
            started,
            // A limit too far away to be represented is no limit.
            deadline: deadline.and_then(|d| started.checked_add(d)),
        })
    }

    /// Tells `on_token` every token.
    #[must_use]
    pub fn on_token(mut self, on_token: OnToken<'d>) -> Self {
        self.on_token = Some(on_token);
        self
    }

    /// Says which tokens are near which, for [`Acceptance::Lantern`].
    #[must_use]
    pub fn neighbours(mut self, neighbours: Option<Arc<dyn Neighbours>>) -> Self {
        self.neighbours = neighbours;
        self
    }

    /// Prompt and generated tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens after the prompt.
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        self.tokens.get(self.prompt_len..).unwrap_or_default()
    }

    /// Tokens whose rows are committed in the state.
    #[must_use]
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Why the sequence ended, once it has.
    #[must_use]
    pub fn finish(&self) -> Option<FinishReason> {
        self.report.finish
    }

    /// What it took so far.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Ends the sequence from outside; an earlier reason stays.
    pub fn end(&mut self, reason: FinishReason) {
        self.report.finish.get_or_insert(reason);
    }

    /// The result so far.
    #[must_use]
    pub fn into_generation(self) -> Generation {
        let finish = self.report.finish.unwrap_or(FinishReason::Cancelled);
        let report = Report {
            finish: Some(finish),
            ..self.report
        };
        let mut tokens = self.tokens;
        Generation {
            tokens: tokens.split_off(self.prompt_len.min(tokens.len())),
            finish,
            report,
        }
    }

    /// Decides what the next forward pass evaluates, drafting if that is worth while.
    /// False if the sequence is finished.
    ///
    /// # Errors
    /// Those of the drafter; the sequence is then finished.
    pub fn plan(&mut self) -> Result<bool> {
        self.planned = None;
        if self.tokens.len() >= self.end {
            self.end(FinishReason::Length);
        } else if self.deadline.is_some_and(|d| Instant::now() >= d) {
            self.end(FinishReason::Time);
        }
        if self.finish().is_some() {
            return Ok(false);
        }
        let planned = self.next_pass();
        self.planned = Some(self.or_fail(planned)?);
        Ok(true)
    }

    fn next_pass(&mut self) -> Result<Planned> {
        let fresh = self.tokens.get(self.cached..).unwrap_or_default();
        let known = fresh.len().min(self.chunk);
        let mut tokens: Vec<u32> = fresh.iter().take(known).copied().collect();
        let start = Instant::now();
        let (tree, asked) = if known == 1 && !self.generated().is_empty() {
            self.draft()?
        } else {
            Default::default()
        };
        let draft_seconds = start.elapsed().as_secs_f64();
        tokens.extend_from_slice(tree.units());
        let logits = match () {
            () if self.cached + known < self.tokens.len() => LogitRows::None,
            () if tree.is_empty() => LogitRows::Last,
            () => LogitRows::All,
        };
        let parents = (!tree.is_chain()).then(|| {
            let known_parents = (0..known).map(|i| i.checked_sub(1));
            let drafted = tree
                .parents()
                .iter()
                .map(|parent| Some(parent.map_or(known - 1, |p| known + p)));
            known_parents.chain(drafted).collect()
        });
        Ok(Planned {
            tokens,
            parents,
            known,
            tree,
            logits,
            asked,
            draft_seconds,
        })
    }

    /// A proposal within the limits, and whether one was asked for.
    fn draft(&mut self) -> Result<(DraftTree, bool)> {
        // The target adds a token of its own to whatever is accepted.
        let cap = self.end - self.tokens.len() - 1;
        let (Some(drafter), true) = (&mut self.drafter, cap > 0) else {
            return Ok(Default::default());
        };
        // Every node takes a row of the state.
        let room = self.context - self.tokens.len();
        let ctx = DraftContext {
            tokens: &self.tokens,
            prompt_len: self.prompt_len,
            max_length: self.end,
            eos: &self.eos,
            key: self.key,
            features: self.features.as_ref(),
        };
        let (depth, nodes) = match (self.draft_nodes, drafter.chances(&ctx)) {
            (None, Some(chances)) => self.depth.choose_tree(cap, room, &chances),
            // The size of the tree is what is paid for; its depth costs nothing more.
            (Some(nodes), Some(_)) => (cap.min(self.depth.max()), nodes.min(room)),
            (nodes, None) => {
                let depth = self.depth.choose(cap);
                (depth, nodes.unwrap_or(depth).min(room))
            }
        };
        Report::count(&mut self.report.depth_histogram, depth);
        if depth == 0 {
            self.report.switched_off += usize::from(self.depth.max() > 0);
            return Ok(Default::default());
        }
        let proposed = drafter.propose(&ctx, Budget { depth, nodes });
        self.features = None;
        let tree = proposed?.cut(depth, nodes);
        if let Some(token) = tree.units().iter().find(|&&t| t as usize >= self.vocab) {
            let what = format!(
                "proposed token {token}, the target's vocabulary has {}",
                self.vocab
            );
            return Err(Error::contract(drafter.name(), what));
        }
        if self.walk_is_relaxed() {
            verify::check_relaxed(&tree)?;
        }
        Ok((tree, true))
    }

    /// The forward pass that was planned.
    #[must_use]
    pub fn step(&self) -> Option<Step<'_>> {
        let planned = self.planned.as_ref()?;
        Some(Step {
            slot: self.slot,
            tokens: &planned.tokens,
            layout: planned
                .parents
                .as_deref()
                .map_or(Layout::Chain, Layout::Tree),
            logits: planned.logits,
            features: self.wants_features(),
        })
    }

    /// Takes in the result of the planned forward pass, which took `seconds`: decides
    /// which tokens are added, and commits their rows in `state`. Gives the number of new
    /// tokens; 0 while the prompt is not finished.
    ///
    /// # Errors
    /// `Logits` for a row that cannot be sampled from, `Contract` for a wrong number of
    /// rows, and those of the state. The sequence is then finished and nothing is pending.
    pub fn absorb<S: SequenceState>(
        &mut self,
        output: &Output,
        seconds: f64,
        state: &mut S,
    ) -> Result<usize> {
        let absorbed = self.try_absorb(output, seconds, state);
        if absorbed.is_err() {
            state.discard(self.slot)?;
        }
        self.or_fail(absorbed)
    }

    /// Marks the sequence as failed: its forward pass did not come back.
    pub fn fail(&mut self) {
        self.planned = None;
        self.end(FinishReason::Error);
    }

    fn or_fail<T>(&mut self, result: Result<T>) -> Result<T> {
        result.inspect_err(|_| self.fail())
    }

    fn try_absorb<S: SequenceState>(
        &mut self,
        output: &Output,
        seconds: f64,
        state: &mut S,
    ) -> Result<usize> {
        let Some(planned) = self.planned.take() else {
            return Err(Error::contract(
                "the caller",
                "absorbed a forward pass that was not planned",
            ));
        };
        let start = Instant::now();
        let prefill = self.generated().is_empty();
        check_output(output, &planned, self.vocab)?;
        if planned.logits == LogitRows::None {
            let rows: Vec<usize> = (0..planned.known).collect();
            self.commit(&rows, output, state)?;
            self.report.prefill_calls += 1;
            self.report.prefill_seconds += seconds + start.elapsed().as_secs_f64();
            return Ok(0);
        }

        let verdict = self.verify(output, &planned)?;
        let accepted = verdict
            .path
            .iter()
            .filter_map(|&node| planned.tree.units().get(node));
        let offered: Vec<u32> = accepted.copied().chain(verdict.emitted).collect();
        let before = self.tokens.len();
        for token in offered {
            self.add(token);
            if self.finish().is_some() {
                break;
            }
        }
        let added = self.tokens.len() - before;
        // The newest token has no row yet, or must not have one.
        let drafts = verdict
            .path
            .iter()
            .take(added.saturating_sub(1))
            .map(|node| planned.known + node);
        let rows: Vec<usize> = (0..planned.known).chain(drafts).collect();
        self.commit(&rows, output, state)?;
        let best = self.best_tokens(output, &planned);
        self.account(
            &planned,
            &verdict,
            added,
            prefill,
            best.as_deref(),
            [seconds, start.elapsed().as_secs_f64()],
        );
        Ok(added)
    }

    fn verify(&mut self, output: &Output, planned: &Planned) -> Result<Verdict<u32>> {
        let tree = &planned.tree;
        let root_row = if planned.logits == LogitRows::All {
            planned.known - 1
        } else {
            0
        };
        let relaxed = self.walk_is_relaxed();
        let (logits, scratch) = (&output.logits, &mut self.scratch);
        let mut walk = Walk::new(&self.sampler, tree, logits, root_row, &self.tokens, scratch);
        let draws = Draws::new(self.key, self.tokens.len() as u64);
        let ends = |token: u32| self.eos.contains(&token) || self.stop_ids.contains(&token);
        let verdict = match self.acceptance {
            Acceptance::Synthetic { rate } if self.sampler.greedy => {
                verify::synthetic(tree, |path| walk.best(path), &draws, rate, ends)
            }
            Acceptance::Synthetic { rate } => {
                let own = |path: &[usize]| {
                    let mut stream = draws.stream(path.len(), Purpose::Sample);
                    walk.law(path).map(|law| law.sample(&mut stream))
                };
                verify::synthetic(tree, own, &draws, rate, ends)
            }
            _ if self.sampler.greedy => {
                verify::greedy(tree, |path| walk.best(path), |&token| ends(token))
            }
            Acceptance::Typical { epsilon, delta } => {
                verify::typical(tree, |path| walk.law(path), (epsilon, delta), ends)
            }
            acceptance if relaxed => {
                let neighbours = self.neighbours.as_deref();
                verify::relaxed(
                    tree,
                    |path| walk.law(path),
                    &draws,
                    acceptance,
                    neighbours,
                    ends,
                )
            }
            _ if self.sampler.mirostat.is_none() && tree.is_one_hot() => {
                // Sample and walk: a draw decides like a best token does.
                let draw = |path: &[usize]| {
                    walk.draw(path, draws.stream(path.len(), Purpose::Sample).uniform())
                };
                verify::greedy(tree, draw, |&token| ends(token))
            }
            acceptance if tree.is_chain() => {
                let ends = |&token: &u32| ends(token);
                verify::chain(tree, |path| walk.law(path), &draws, acceptance, ends)
            }
            _ => verify::tree(tree, |path| walk.law(path), &draws, ends),
        }?;
        self.sampler.mirostat = walk.finish(&verdict);
        Ok(verdict)
    }

    /// Whether drafts are accepted by [`verify::relaxed`].
    fn walk_is_relaxed(&self) -> bool {
        let relaxed = matches!(
            self.acceptance,
            Acceptance::Ensemble { .. } | Acceptance::Lantern { .. } | Acceptance::Tolerance { .. }
        );
        relaxed && self.acceptance.changes_output(self.sampler.greedy)
    }

    /// Appends a token and applies the stop rules in their order: end-of-sequence, stop
    /// tokens, the callback, the length.
    fn add(&mut self, token: u32) {
        self.tokens.push(token);
        let asked_to_stop = self
            .on_token
            .as_mut()
            .is_some_and(|tell| tell(token).is_break());
        if self.eos.contains(&token) || self.stop_ids.contains(&token) || asked_to_stop {
            self.end(FinishReason::Stop);
        } else if self.tokens.len() >= self.end {
            self.end(FinishReason::Length);
        }
    }

    fn commit<S: SequenceState>(
        &mut self,
        rows: &[usize],
        output: &Output,
        state: &mut S,
    ) -> Result<()> {
        state.commit(self.slot, rows)?;
        self.cached += rows.len();
        if let Some(features) = output.features.as_ref().filter(|_| self.wants_features()) {
            self.features = Some(append_rows(self.features.take(), features, rows)?);
        }
        Ok(())
    }

    fn wants_features(&self) -> bool {
        self.drafter.as_ref().is_some_and(|d| d.wants_features())
    }

    /// The best raw token of the root's row and of every node's, if the drafter asks.
    fn best_tokens(&self, output: &Output, planned: &Planned) -> Option<Vec<u32>> {
        let wanted = self.drafter.as_ref().is_some_and(|d| d.wants_best());
        (wanted && !planned.tree.is_empty()).then(|| {
            let rows = planned.known - 1..planned.tokens.len();
            let best = |row| best_score(output.logits.row(row)?).ok();
            rows.map(|row| best(row).map_or(0, |(token, _)| token))
                .collect()
        })
    }

    fn account(
        &mut self,
        planned: &Planned,
        verdict: &Verdict<u32>,
        added: usize,
        prefill: bool,
        best: Option<&[u32]>,
        [forward_seconds, sampling_seconds]: [f64; 2],
    ) {
        let report = &mut self.report;
        report.emitted += added;
        if prefill {
            report.prefill_calls += 1;
            report.prefill_seconds += forward_seconds + sampling_seconds;
            report.first_token_seconds = self.started.elapsed().as_secs_f64();
            return;
        }
        report.target_calls += 1;
        report.draft_seconds += planned.draft_seconds;
        report.verify_seconds += forward_seconds;
        report.sampling_seconds += sampling_seconds;
        report.decode_seconds += planned.draft_seconds + forward_seconds + sampling_seconds;
        report.count_pass(planned.tokens.len(), forward_seconds);
        let depth = planned.tree.depths().into_iter().max().map_or(0, |d| d + 1);
        if depth > 0 {
            report.rounds += 1;
            report.drafted += planned.tree.len();
            report.accepted += verdict.path.len();
            Report::count(&mut report.rounds_by_accepted, verdict.path.len());
            (0..depth).for_each(|d| Report::count(&mut report.drafted_by_depth, d));
            (0..verdict.path.len()).for_each(|d| Report::count(&mut report.accepted_by_depth, d));
            let first = self.tokens.len() - added;
            let added = self.tokens.get(first..).unwrap_or_default();
            if let Some(drafter) = &mut self.drafter {
                drafter.observe(&Feedback {
                    tree: &planned.tree,
                    path: &verdict.path,
                    added,
                    best,
                });
            }
        }
        self.depth.record(Round {
            asked: planned.asked,
            rows: planned.tokens.len(),
            nodes: planned.tree.len(),
            depth,
            accepted: verdict.path.len(),
            rejected: verdict.rejected,
            emitted: added,
            draft_seconds: planned.draft_seconds,
            verify_seconds: forward_seconds,
        });
        self.report.plain_step_seconds = self.depth.plain_step_seconds();
    }
}

fn check_prompt(prompt: &[u32], model: &ModelLimits) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::input("prompt", "empty", "at least one token"));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= model.vocab_size) {
        return Err(Error::input(
            "prompt",
            format!("token {id}"),
            format!("ids below {}", model.vocab_size),
        ));
    }
    if prompt.len() > model.context_len {
        return Err(Error::Limits {
            what: "the number of prompt tokens",
            found: prompt.len(),
            limit: model.context_len,
            advice: "shorten the prompt or take a model with a longer context",
        });
    }
    Ok(())
}

fn check_output(output: &Output, planned: &Planned, vocab: usize) -> Result<()> {
    let expected = match planned.logits {
        LogitRows::None => return Ok(()),
        LogitRows::Last => 1,
        LogitRows::All => planned.tokens.len(),
    };
    let (rows, width) = (output.logits.rows(), output.logits.vocab());
    if rows != expected || width != vocab {
        let what = format!("gave logits [{rows}, {width}], expected [{expected}, {vocab}]");
        return Err(Error::contract("the model", what));
    }
    Ok(())
}

/// `rows` of `features` `[n, dim]` behind those that were kept before.
fn append_rows(before: Option<Tensor>, features: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    let index = Tensor::f_from_slice(&index).map_err(sequor_nn::Error::from)?;
    let index = index
        .f_to_device(features.device())
        .map_err(sequor_nn::Error::from)?;
    let picked = features
        .f_index_select(0, &index)
        .map_err(sequor_nn::Error::from)?;
    match before {
        None => Ok(picked),
        Some(before) => Ok(Tensor::f_cat(&[before, picked], 0).map_err(sequor_nn::Error::from)?),
    }
}
