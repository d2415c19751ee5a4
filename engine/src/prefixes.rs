//! The prefixes in DRAM as an operator sees them.

use std::time::Duration;

use pegaflow_tiers::{BlockKey, Error, ErrorKind, NamespaceId, Result};

use crate::choice::KeyPrefix;
use crate::engine::Engine;
use crate::purge::numbers;

/// The most prefixes that are told at once.
const PREFIXES_MAX: usize = 1000;

/// A prefix of requests that is in DRAM, with all that continues it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixInfo {
    /// Whose it is.
    pub namespace: NamespaceId,
    /// Its group of the KV cache.
    pub group: u16,
    /// The key of its first block: that of the request, or the first after those that it shares with others.
    pub key: BlockKey,
    /// Blocks before that.
    pub depth: u32,
    /// From its first block on, blocks that all that continue it share.
    pub common_blocks: u64,
    /// In how many ways it goes on behind these.
    pub branches: u64,
    /// Blocks in all; each shard of a block counts.
    pub blocks: u64,
    /// What they take in DRAM.
    pub bytes: u64,
    /// What pinned ones of them take.
    pub pinned_bytes: u64,
    /// How long ago one of them was saved, loaded or brought to DRAM last; to the second.
    pub idle: Duration,
    /// Requests that asked for its first block, as far as the policy remembers; 255 stands for more, too. `None` where the
    /// policy only knows an order, and of pinned blocks that were not asked for.
    pub uses: Option<u8>,
}

impl Engine {
    /// The prefixes in DRAM of these namespaces, or of all if none is given, that begin a request; or, with `under`, those in
    /// which the prefix with that key goes on. At most `most`, the largest ones first. Takes about 200 bytes of memory for each
    /// block for that moment.
    ///
    /// # Errors
    /// `NotFound` for a namespace or a key that is not there, `InvalidInput` for a key that is not clear and for more than
    /// 1,000 prefixes, `Closed`.
    pub fn list_prefixes(
        &self,
        namespaces: &[NamespaceId],
        under: Option<&KeyPrefix>,
        most: usize,
    ) -> Result<Vec<PrefixInfo>> {
        if !(1..=PREFIXES_MAX).contains(&most) {
            let message = format!("{most} prefixes; give 1 to {PREFIXES_MAX}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let inner = self.inner()?;
        let numbers = numbers(inner, namespaces)?;
        let found = inner.residency.prefixes(&numbers.keys().copied().collect(), under, most)?;
        let info = |prefix: crate::residency::Prefix| {
            Some(PrefixInfo {
                namespace: *numbers.get(&prefix.id.namespace)?,
                group: prefix.id.group,
                key: prefix.id.key,
                depth: prefix.depth,
                common_blocks: prefix.common_blocks,
                branches: prefix.branches,
                blocks: prefix.blocks,
                bytes: prefix.bytes,
                pinned_bytes: prefix.pinned_bytes,
                idle: prefix.idle,
                uses: prefix.uses,
            })
        };
        Ok(found.into_iter().filter_map(info).collect())
    }
}
