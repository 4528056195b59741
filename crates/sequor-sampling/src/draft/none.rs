//! No drafts: plain decoding.

use super::{Budget, DraftContext, Drafter};
use crate::Result;
use crate::tree::DraftTree;

/// Proposes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDraft;

impl Drafter for NoDraft {
    fn name(&self) -> &str {
        "none"
    }

    fn propose(&mut self, _ctx: &DraftContext<'_>, _budget: Budget) -> Result<DraftTree> {
        Ok(DraftTree::new())
    }

    fn reset(&mut self) {}
}
