//! A sequence of requests, packed.

use crate::policy::{PolicyBlock, SplitMix};

/// Requests in the order of their arrival.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    blocks: Vec<PolicyBlock>,
    requests: Vec<(u64, u64, usize)>,
}

/// One request of a [`Trace`].
#[derive(Debug, Clone, Copy)]
pub struct TraceRequest<'a> {
    /// When it arrived, in ms.
    pub now_ms: u64,
    /// Whose it is; 0 if nobody says.
    pub tenant: u64,
    /// Its blocks, first to last.
    pub blocks: &'a [PolicyBlock],
}

impl Trace {
    /// Adds a request for blocks named by any numbers of which each stands for all blocks before it too. Time does not run
    /// backwards: an earlier time counts as the one before.
    pub fn push(&mut self, now_ms: u64, tenant: u64, ids: impl IntoIterator<Item = u64>) {
        self.blocks.extend(ids.into_iter().map(|id| PolicyBlock { key: SplitMix::mix(id), bytes: 1 }));
        let now_ms = self.requests.last().map_or(now_ms, |(before, _, _)| now_ms.max(*before));
        self.requests.push((now_ms, tenant, self.blocks.len()));
    }

    /// The requests.
    pub fn requests(&self) -> impl ExactSizeIterator<Item = TraceRequest<'_>> {
        (0..self.requests.len()).map(|at| {
            let begin = at.checked_sub(1).map_or(0, |before| self.requests[before].2);
            let (now_ms, tenant, end) = self.requests[at];
            TraceRequest { now_ms, tenant, blocks: &self.blocks[begin..end] }
        })
    }

    /// Requests.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// References to blocks.
    pub fn references(&self) -> usize {
        self.blocks.len()
    }

    /// Different blocks.
    pub fn unique_blocks(&self) -> usize {
        let mut keys: Vec<u64> = self.blocks.iter().map(|block| block.key).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.len()
    }
}
