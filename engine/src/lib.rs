//! What moves when: lookup, save, load, leases and eviction of KV-cache blocks over the tiers below.
//! Policy lives here; no file is opened and no device is called here but through `pegaflow_tiers`.
//! The same [`Engine`] runs embedded in vLLM's process and behind the server.
#![deny(unsafe_code)]

mod admission;
mod api;
mod arbiter;
mod choice;
mod config;
mod counters;
mod dram_shares;
mod drive_tier;
mod engine;
mod fetch;
mod hot_set;
mod inner;
mod known_namespaces;
mod lease;
mod load;
mod load_choice;
mod locate;
mod look_aside;
mod lookup;
mod miss_ratio;
mod namespace_uses;
mod objects;
mod operations;
mod pins;
mod placed;
mod policy;
mod prefixes;
mod prelude;
mod purge;
mod reclaim;
mod registry;
mod replay;
mod residency;
mod save;
mod scheduler;
mod scrub;
mod spares;
mod spill;
mod store_keeper;
mod store_totals;
mod tenants;
mod transfer;
mod wear;
mod write_budget;

pub use prelude::*;
