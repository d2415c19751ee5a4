//! The store on a simulated drive and a simulated index, run step by step from a seed: a random workload, crashes at any
//! operation, and an oracle that knows what must be there. One seed is one history; the same seed is the same history.
//! For tests and for `make torture`; `docs/reliability.md` says what is simulated.

mod damage;
mod drives;
mod ground;
mod history;
mod model;
mod sweep;
#[cfg(test)]
mod tests;
mod world;

pub use self::damage::DamageTally;
use self::ground::SimBacking;
pub use self::history::{SimBias, SimOptions, SimTally, Simulator};
pub use self::sweep::SweepTally;

/// What a simulation found wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimFailure {
    /// The seed: the same one fails again in the same way.
    pub seed: u64,
    /// What is wrong.
    pub kind: SimFailureKind,
    /// In words.
    pub message: String,
}

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SimFailureKind {
    /// Bytes were returned that are not those of the record, or of an older version of it.
    WrongBytes,
    /// Something that was reported durable is not there, though its region was not given up.
    LostDurable,
    /// Something that was removed, replaced or cut off by a crash is there again.
    CameBack,
    /// The store refused to work, or to be opened, without a cause.
    Refused,
    /// A thread panicked.
    Panic,
    /// Something never ended.
    Hang,
}

impl std::fmt::Display for SimFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seed {}: {:?}: {}", self.seed, self.kind, self.message)
    }
}

impl std::error::Error for SimFailure {}
