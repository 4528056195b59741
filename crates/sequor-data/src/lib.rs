#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bible;
mod cache;
pub mod catalog;
mod error;
mod fetch;
mod resolve;
pub mod sampler;
pub mod text;

pub use cache::Cache;
pub use catalog::Kind;
pub use error::{Error, Result};
pub use fetch::hub::{Hub, HubRef};
pub use fetch::package::Clients;
pub use fetch::progress::{Progress, Silent, Terminal, human_bytes};
pub use resolve::{Found, Listed, Resolved, ResolvedModel, Resolver};
