//! Token selection on plain slices of scores.
//!
//! A row of scores (logits, in nats) is a slice with one entry per token; an
//! entry of minus infinity is *removed* and stays removed. The `keep_*` functions
//! remove entries and leave the others as they are, with the semantics of the
//! processors of the same name in Hugging Face `transformers`, so that a chain of
//! them can be compared entry for entry.
//!
//! **Nothing here sorts the vocabulary.** Best-k keeps a small buffer behind a
//! rising threshold; top-p orders what is not too light to matter where that is little;
//! else it and typical sum probability mass in a histogram of scores and order only the
//! one bucket in which the mass is reached.
//!
//! **Bad rows are reported, not repaired.** A row that holds NaN or plus infinity,
//! or nothing but removed entries, has no distribution: the functions return
//! `false` or `None` and leave it unchanged. `min_keep` is the number of entries
//! that survive in any case (at least 1).
//!
//! **Ties.** Where equal scores compete for the last place, the lower index wins
//! and the result is a function of the row alone. Top-k, typical, epsilon and eta
//! keep every entry that ties with the last one, as Hugging Face does.
//!
//! **Accuracy.** Weights `exp(score - max)` are f32 with a relative error below
//! 2e-7 (plus that of the subtraction) and zero below e^-87; sums are f64, in one
//! fixed order, with no dependence on the machine's vector width.

mod best;
mod draw;
mod keep;
pub(crate) mod lanes;
mod mass;
#[cfg(test)]
mod tests;
mod wide;

pub use best::{top_k_threshold, top_n};
pub use draw::{sample, sample_probs};
pub use keep::{
    Nucleus, keep_epsilon, keep_eta, keep_min_p, keep_top_h, keep_top_k, keep_top_p, keep_typical,
};
pub use lanes::{
    argmax, divide_in_place, entropy, largest_finite, log_softmax_in_place, log_sum_exp,
    softmax_in_place,
};
