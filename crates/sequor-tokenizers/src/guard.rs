//! The boundary to the tokenizer engine.
//!
//! The engine asserts in places that a damaged `tokenizer.json` can reach (a
//! prefix longer than a merge, a `Strip` longer than a token, a charsmap that
//! lies about its size). [`load`](crate::load) rejects what it can recognise;
//! this guard turns the rest into an error, so that no file and no text can
//! bring a program down. The engine's caches are skipped, not trusted, after
//! such an unwind.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Result};

/// Runs `f`, an operation of the engine, and turns both its error and its
/// panic into [`Error::Backend`].
pub(crate) fn guarded<T>(op: &'static str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::Backend {
            op,
            message: e.to_string(),
        }),
        Err(payload) => Err(Error::Backend {
            op,
            message: panic_message(payload.as_ref()),
        }),
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown cause".to_owned());
    format!("its definition makes the tokenizer engine fail ({text}); the file is probably damaged")
}
