//! What several processes that train one model do together.

use sequor_nn::Tensor;

use crate::Result;

/// Processes that train replicas of one model on different data. The trainer sums
/// gradients, losses and counts through it, once per step.
pub trait Collective {
    /// Number of this process, from 0. Process 0 writes files.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world(&self) -> usize;

    /// Replaces `tensor` by its sum over all processes, the same bits in each.
    ///
    /// # Errors
    /// When another process is gone or does not answer.
    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()>;
}

/// One process alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }
}
