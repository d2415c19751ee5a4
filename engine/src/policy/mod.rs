//! Which blocks stay in a tier, and which are worth being written to it. Pure logic behind one trait: no clock, no
//! threads, no I/O; time and the seed of random choices come from outside, so that a trace replays to the same result.
//!
//! A policy keeps order, not bytes: whoever owns the tier asks [`Policy::admits`], makes room with [`Policy::evict`] and
//! tells with [`Policy::insert`] and [`Policy::remove`] what is there. What somebody holds is the owner's answer to
//! `may_leave`; what is pinned the owner takes out for that time.

mod adaptive;
mod fifo;
mod least_recent;
mod pegaflow;
mod random;
mod s3fifo;

use std::fmt;
use std::hash::BuildHasherDefault;
use std::str::FromStr;

pub use pegaflow::{PegaflowConfig, PegaflowPolicy};

use serde::{Deserialize, Serialize};

use crate::residency::KeyHasher;
pub(crate) use random::SplitMix;

/// Hashes of keys, which are hashes already.
pub(crate) type Build = BuildHasherDefault<KeyHasher>;

/// A block as a policy sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyBlock {
    /// The fingerprint of its identity. It covers all blocks before it in its chain.
    pub key: u64,
    /// What it takes in the tier, in bytes; or 1, where the capacity is counted in blocks.
    pub bytes: u32,
}

/// What a policy remembers of the past of a block: enough to tell its worth again after a restart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockMemory {
    /// Seconds since it was used last.
    pub idle_s: u32,
    /// What was known of it then, in the policy's own words.
    pub evidence: u32,
    /// Requests that used it; 255 stands for more, too.
    pub uses: u8,
    /// The turn of the conversation that brought it.
    pub first_turn: u8,
    /// That of its last use.
    pub turn: u8,
    /// Blocks after it in the last request; 255 stands for more, too.
    pub blocks_after: u8,
}

/// What a block takes along from one policy to another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Past {
    /// The block before it in its chain.
    pub parent: Option<u64>,
    /// What requests have said of it.
    pub memory: Option<BlockMemory>,
}

/// A request for a chain of blocks.
#[derive(Debug, Clone, Copy)]
pub struct PolicyRequest<'a> {
    /// Its blocks, from the first of the chain to the last: those that are there and those that are not.
    pub chain: &'a [PolicyBlock],
    /// Whose it is: a hash of its cache salt or namespace; 0 if nobody says.
    pub tenant: u64,
    /// When it arrived, in ms since any fixed time. Time never runs backwards.
    pub now_ms: u64,
}

/// Decides who stays in one tier.
///
/// For each request the owner calls [`Policy::request`] with the whole chain, then for each of its blocks either
/// [`Policy::touch`] (it is there) or [`Policy::admits`], [`Policy::evict`] until there is room, and [`Policy::insert`].
/// Blocks may also come later, or never.
pub trait Policy: Send {
    /// A request arrives.
    fn request(&mut self, request: &PolicyRequest<'_>);

    /// A block that is there is used by the request.
    fn touch(&mut self, _key: u64) {}

    /// Whether a block that is not there is worth a write; `is_full` says whether another one would have to leave for it.
    /// `parent` is the block before it in its chain. Default: always.
    fn admits(&mut self, _block: &PolicyBlock, _parent: Option<u64>, _is_full: bool) -> bool {
        true
    }

    /// The block is there from now on. No request need have named it: then it goes on where its parent's request ended.
    fn insert(&mut self, block: &PolicyBlock, parent: Option<u64>);

    /// Takes out the block that is worth least among those that `may_leave`; `None` if there is none, or none was found
    /// in a bounded search.
    fn evict(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64>;

    /// As [`Policy::evict`], for a block that comes before a request needs it: only if the one that would leave is worth
    /// less. The newcomer is worth `least`, in expected uses per second of occupation, or what the policy says, if that is
    /// more. `None` where the policy only knows an order.
    fn evict_for(
        &mut self,
        _newcomer: &PolicyBlock,
        _least: f32,
        _may_leave: &mut dyn FnMut(u64) -> bool,
    ) -> Option<u64> {
        None
    }

    /// Takes out any block that is there, for another policy: with the block before it and its past, where it knows them.
    /// As [`Policy::evict`], with everybody allowed to leave.
    fn hand_over(&mut self) -> Option<(u64, Past)> {
        Some((self.evict(&mut |_| true)?, Past::default()))
    }

    /// The same for a block of that name.
    fn hand_over_one(&mut self, key: u64) -> Option<Past> {
        let is_here = self.contains(key);
        self.remove(key);
        is_here.then(Past::default)
    }

    /// The block has gone for another reason.
    fn remove(&mut self, key: u64);

    /// Whether the block is there.
    fn contains(&self, key: u64) -> bool;

    /// Blocks that are there.
    fn len(&self) -> usize;

    /// Whether nothing is there.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a place in the tier is worth to the block, in expected uses per second of occupation; `None` where the policy
    /// only knows an order, or nothing of the block.
    fn worth(&mut self, _block: &PolicyBlock) -> Option<f32> {
        None
    }

    /// What was learned, a few kilobytes to be kept for the next run; empty if this policy does not learn.
    fn note(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Begins with what an earlier run had learned. False, and nothing changed, if `note` is none of this policy's.
    fn restore(&mut self, _note: &[u8]) -> bool {
        false
    }

    /// What it remembers of a block that requests have named, here or not; `None` where it only knows an order.
    fn memory(&self, _key: u64) -> Option<BlockMemory> {
        None
    }

    /// A block that was inserted just now has this past; what was thought of it before is forgotten.
    fn recall(&mut self, _key: u64, _memory: &BlockMemory) {}

    /// Blocks that left or were refused are remembered up to this number, where the policy remembers any and its
    /// configuration allows as many. Those that are remembered already may be forgotten later.
    fn remember_at_most(&mut self, _blocks: usize) {}

    /// Whether the owner hands over the blocks of a request from the last to the first. Policies that know only the order
    /// of arrival need that, or else roots would leave before their leaves. One that knows the tree takes them as they
    /// come.
    fn takes_last_first(&self) -> bool {
        true
    }
}

/// Which policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyChoice {
    /// Least recently used leaves first.
    Lru,
    /// In order of arrival.
    Fifo,
    /// S3-FIFO (Yang and others, "FIFO queues are all you need for cache eviction", SOSP 2023).
    S3Fifo,
    /// ARC (Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003).
    Arc,
    /// Ours, see [`PegaflowPolicy`].
    #[default]
    Pegaflow,
}

impl PolicyChoice {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 5] = [Self::Lru, Self::Fifo, Self::S3Fifo, Self::Arc, Self::Pegaflow];

    /// Its name in configuration and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Fifo => "fifo",
            Self::S3Fifo => "s3fifo",
            Self::Arc => "arc",
            Self::Pegaflow => "pegaflow",
        }
    }

    /// An empty policy for a tier of `capacity_bytes`; `config` is for ours only.
    pub fn build(self, capacity_bytes: u64, config: PegaflowConfig) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(least_recent::LeastRecent::new()),
            Self::Fifo => Box::new(fifo::Fifo::new()),
            Self::S3Fifo => Box::new(s3fifo::S3Fifo::new(capacity_bytes)),
            Self::Arc => Box::new(adaptive::Adaptive::new(capacity_bytes)),
            Self::Pegaflow => Box::new(PegaflowPolicy::new(config)),
        }
    }
}

impl fmt::Display for PolicyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PolicyChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|choice| choice.name() == text);
        found.ok_or_else(|| format!("'{text}' is no policy; there are {}", known()))
    }
}

#[cfg(test)]
mod tests;
