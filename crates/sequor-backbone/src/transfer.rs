//! Hidden transfer: a decoder guesses later tokens inside its own pass (Wu et al., 2024).
//!
//! Behind layer `t_j` a linear map makes of the state of the last token `x_n` a *pseudo
//! state*: a guess at the state that the unknown token `x_{n+j}` will have there. It runs
//! through the remaining layers as one more row, at position `n + j`, seeing what `x_n` sees,
//! the pseudo states of smaller offsets, and itself. The ordinary norm and head then give a
//! law for `x_{n+j+1}`. Nothing but the maps is trained. No row of a real token ever sees a
//! pseudo row and no pseudo row is kept, so that the decoder's own laws stay what they are.
//!
//! One pass checks a draft tree and makes the next draft: every node carries its own pseudo
//! rows. With `k` offsets behind layer `t` of `L` a node costs `1 + k (L - t) / L` rows.
//!
//! | | |
//! |---|---|
//! | [`HiddenTransfer`] | the maps, loaded or in training |
//! | [`TransferLm`] | the decoder with pseudo rows, a [`TargetModel`](sequor_sampling::TargetModel) |
//! | [`TransferDrafter`] | turns its features into draft trees |
//! | [`Reading`] | whole texts at once, for training and measuring |

mod attend;
mod config;
mod drafter;
mod lm;
mod maps;
mod reading;

#[cfg(test)]
mod tests;

pub use config::TransferConfig;
pub use drafter::TransferDrafter;
pub use lm::TransferLm;
pub use maps::HiddenTransfer;
pub use reading::Reading;
