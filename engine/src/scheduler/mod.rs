//! What the policy is told, and what it is asked: who leaves DRAM, what is worth a drive write, what is written again.
//!
//! Lookups queue what they were asked for ([`requests`]) and go on; one thread ([`run`]) hands it to the policies
//! ([`sizes`], [`drive`]) and to the miss-ratio curve ([`curve`]), and keeps what they learned ([`learned`]). Nothing here moves bytes or is waited for by a lookup.

mod curve;
mod drive;
mod learned;
mod requests;
mod run;
mod shares;
mod sizes;

pub(crate) use curve::LiveCurve;
pub(crate) use drive::DrivePolicy;
pub(crate) use learned::first_learned;
pub(crate) use requests::{Asked, Requests};
pub(crate) use run::{LEARNED_NOTE, keep_learned, run};
pub(crate) use shares::{AccountState, ShareTotals};
pub(crate) use sizes::GUARANTEED_PERCENT;
pub use sizes::{Clock, SizePolicies};

#[cfg(test)]
mod tests;
