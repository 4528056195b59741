//! What a template may cost.

use super::{Fault, Result};

/// Longest string, in bytes.
const MAX_STRING: usize = 64 << 20;
/// Memory that one step pays for, in bytes.
const BYTES_PER_STEP: usize = 256;
/// Memory of one item of a list, in bytes.
const ITEM_BYTES: usize = 32;
/// Deepest recursion of evaluation.
const MAX_DEPTH: usize = 200;

/// What one rendering may cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Operations, and 256 bytes each of strings and lists made.
    pub steps: u64,
    /// Length of the output, in bytes.
    pub output: usize,
}

/// What is left of the limits. All memory that a template can make a rendering
/// hold is paid for, so it is at most 256 bytes for each step.
pub(super) struct Budget {
    steps: u64,
    depth: usize,
}

impl Budget {
    pub fn new(limits: Limits) -> Self {
        Self { steps: limits.steps, depth: 0 }
    }

    /// Pays for `steps` operations.
    pub fn pay(&mut self, steps: u64) -> Result<()> {
        match self.steps.checked_sub(steps) {
            Some(left) => {
                self.steps = left;
                Ok(())
            }
            None => {
                self.steps = 0;
                Err(Fault::limit("the chat template takes too many steps; as it is, it does not come to an end"))
            }
        }
    }

    /// Pays for making or reading through a string of `bytes` bytes. To be
    /// called before it is made.
    pub fn pay_string(&mut self, bytes: usize) -> Result<()> {
        if bytes > MAX_STRING {
            return Err(Fault::limit(format!("the chat template makes a string longer than {MAX_STRING} bytes")));
        }
        self.pay((bytes / BYTES_PER_STEP) as u64)
    }

    /// Pays for making or reading through a list of `items` items. To be called
    /// before it is made.
    pub fn pay_list(&mut self, items: usize) -> Result<()> {
        self.pay((items / (BYTES_PER_STEP / ITEM_BYTES)) as u64)
    }

    /// Enters a level of recursion, and pays a step for it.
    pub fn enter(&mut self) -> Result<()> {
        if self.depth >= MAX_DEPTH {
            return Err(Fault::limit(format!("the chat template is nested more than {MAX_DEPTH} levels deep")));
        }
        self.depth += 1;
        self.pay(1)
    }

    /// Leaves a level of recursion.
    pub fn leave(&mut self) {
        self.depth = self.depth.saturating_sub(1);
    }
}
