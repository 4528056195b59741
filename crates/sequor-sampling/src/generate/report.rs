//! What a generation did and what it cost.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// End-of-sequence, a stop token, or the caller's callback.
    Stop,
    /// The length limit of the request or the context length of the model.
    Length,
    /// The cancel flag.
    Cancelled,
    /// The time limit.
    Time,
    /// An error; it was returned where it occurred.
    Error,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Time => "time",
            Self::Error => "error",
        })
    }
}

/// A finished sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The tokens after the prompt, the one that ended the sequence included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// What it took.
    pub report: Report,
}

/// Forward passes of one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RowCost {
    /// Rows per pass.
    pub rows: usize,
    /// Number of passes.
    pub passes: usize,
    /// Mean time of a pass.
    pub seconds: f64,
}

/// Counts and times of one generation. Times are wall-clock seconds; in a batch, the time
/// of a forward pass counts for every sequence in it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Name of the drafter.
    pub drafter: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens after the prompt.
    pub emitted: usize,
    /// Forward passes over the prompt; the last of them gives the first token.
    pub prefill_calls: usize,
    /// Forward passes of the target after that.
    pub target_calls: usize,
    /// Those of them that checked drafts.
    pub rounds: usize,
    /// Drafted nodes.
    pub drafted: usize,
    /// Accepted drafts. The token that the target adds to every round is not counted.
    pub accepted: usize,
    /// `drafted_by_depth[d]`: rounds with a draft at depth `d`.
    pub drafted_by_depth: Vec<usize>,
    /// `accepted_by_depth[d]`: rounds in which the draft at depth `d` was accepted.
    pub accepted_by_depth: Vec<usize>,
    /// `rounds_by_accepted[n]`: rounds in which `n` drafts were accepted.
    pub rounds_by_accepted: Vec<usize>,
    /// Name of the rule if the acceptance of drafts changed the distribution of the output.
    pub lossy: Option<String>,
    /// `depth_histogram[d]`: how often depth `d` was chosen.
    pub depth_histogram: Vec<usize>,
    /// Calls in which drafting was switched off because it would not have paid.
    pub switched_off: usize,
    /// Time of the passes over the prompt and the choice of the first token.
    pub prefill_seconds: f64,
    /// Time of everything after that.
    pub decode_seconds: f64,
    /// Part of `decode_seconds` spent drafting.
    pub draft_seconds: f64,
    /// Part of `decode_seconds` spent in the target's forward passes.
    pub verify_seconds: f64,
    /// Part of `decode_seconds` spent on processors, sampling and commits.
    pub sampling_seconds: f64,
    /// Forward passes after the prompt by number of rows, rows ascending.
    pub forward_by_rows: Vec<RowCost>,
    /// Time of a forward pass over one row: as the model's cost curve says, else the mean
    /// of this generation; `None` if neither is known.
    pub plain_step_seconds: Option<f64>,
    /// From the start to the first token.
    pub first_token_seconds: f64,
    /// Why the sequence ended; `None` while it has not.
    pub finish: Option<FinishReason>,
}

impl Report {
    /// Tokens per forward pass of the target after the prompt; plain decoding has 1.
    #[must_use]
    pub fn tokens_per_call(&self) -> f64 {
        // The first token came from the prompt.
        share(self.emitted.saturating_sub(1), self.target_calls)
    }

    /// Share of drafted nodes that were accepted.
    #[must_use]
    pub fn acceptance_rate(&self) -> f64 {
        share(self.accepted, self.drafted)
    }

    /// Accepted drafts per round that had drafts.
    #[must_use]
    pub fn accepted_per_round(&self) -> f64 {
        share(self.accepted, self.rounds)
    }

    /// Tokens per second after the first.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        if self.decode_seconds > 0.0 {
            self.emitted.saturating_sub(1) as f64 / self.decode_seconds
        } else {
            0.0
        }
    }

    /// What plain decoding would have taken after the first token, in seconds, as far as
    /// the price of a plain step is known.
    #[must_use]
    pub fn plain_seconds(&self) -> Option<f64> {
        let steps = self.emitted.saturating_sub(1) as f64;
        self.plain_step_seconds.map(|step| step * steps)
    }

    /// How many times faster than plain decoding it was, as far as that is known.
    #[must_use]
    pub fn speedup(&self) -> Option<f64> {
        let plain = self.plain_seconds()?;
        (self.decode_seconds > 0.0).then(|| plain / self.decode_seconds)
    }

    /// Share of the decoding time that went neither into the target's forward passes nor
    /// into drafting.
    #[must_use]
    pub fn overhead(&self) -> f64 {
        if self.decode_seconds > 0.0 {
            self.sampling_seconds / self.decode_seconds
        } else {
            0.0
        }
    }

    pub(super) fn count_pass(&mut self, rows: usize, seconds: f64) {
        let at = self
            .forward_by_rows
            .binary_search_by_key(&rows, |cost| cost.rows);
        let at = at.unwrap_or_else(|at| {
            let cost = RowCost {
                rows,
                ..RowCost::default()
            };
            self.forward_by_rows.insert(at, cost);
            at
        });
        if let Some(cost) = self.forward_by_rows.get_mut(at) {
            cost.passes += 1;
            cost.seconds += (seconds - cost.seconds) / cost.passes as f64;
        }
    }

    pub(super) fn count(histogram: &mut Vec<usize>, index: usize) {
        if histogram.len() <= index {
            histogram.resize(index + 1, 0);
        }
        if let Some(n) = histogram.get_mut(index) {
            *n += 1;
        }
    }
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} tokens in {:.2} s ({:.1} tokens/s, first after {:.2} s)",
            self.emitted,
            self.prefill_seconds + self.decode_seconds,
            self.tokens_per_second(),
            self.first_token_seconds
        )?;
        if self.rounds > 0 || self.switched_off > 0 {
            write!(
                f,
                "; {}: {:.2} tokens per call over {} calls, {} of {} drafts accepted by depth {:?}",
                self.drafter,
                self.tokens_per_call(),
                self.target_calls,
                self.accepted,
                self.drafted,
                self.accepted_by_depth
            )?;
        }
        if let Some(speedup) = self.speedup().filter(|_| self.rounds > 0) {
            write!(f, ", {speedup:.2} times plain decoding")?;
        }
        if let Some(rule) = &self.lossy {
            write!(f, ", LOSSY acceptance: {rule}")?;
        }
        if self.switched_off > 0 {
            write!(f, ", drafting switched off in {} calls", self.switched_off)?;
        }
        Ok(())
    }
}
