//! Tests over several modules.
