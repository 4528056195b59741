//! Draft heads: small networks beside a frozen decoder that guess its next tokens.
//!
//! A head reads the decoder's last state `h_n` (after the final norm, what the output head
//! reads) and gives a state from which the output head guesses a later token. The decoder
//! itself says `x_{n+1}`, the newest token; head `i` guesses `x_{n+2+i}`.
//!
//! | kind | reads | paper |
//! |---|---|---|
//! | Medusa | `h_n` | Cai et al., 2024 |
//! | Hydra | `h_n` and the embeddings of the tokens on its own path | Ankner et al., 2024 |
//! | Hydra++ | as Hydra, after one decoder layer over all `h` | the same |
//! | EAGLE | predicts the next `h` with one decoder layer, again and again | Li et al., 2024 |
//!
//! [`Heads`] is the network, loaded ([`Heads::load`]) or in training ([`Heads::new`],
//! [`Heads::train_forward`]); [`HeadDrafter`] drafts with it.

mod config;
mod draft;
mod expand;
mod layer;
mod load;
mod network;

pub use config::{Base, HeadsConfig, HeadsKind, LayerConfig};
pub use draft::HeadDrafter;
pub use load::read_config;
pub use network::Heads;

#[cfg(test)]
mod tests;
