//! Made-up prompts: chains of keys as random as hashes, and the smallest blocks that a worker may have.

use std::sync::Arc;

use pegaflow_engine::{
    BlockKey, DeviceMemory, GroupGeometry, HostMemory, InstanceId, InstanceSpec, NamespaceDescriptor, Result,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::records::PROMPT_BLOCKS;

/// Bytes of a block: three layers of the least that a layer may have.
pub const BLOCK_BYTES: u64 = 48;

/// Prompts of [`PROMPT_BLOCKS`] blocks each. The same seed gives the same prompts.
pub struct Prompts {
    keys: Vec<BlockKey>,
}

impl Prompts {
    /// `count` prompts.
    pub fn new(count: usize, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        Self { keys: (0..count * PROMPT_BLOCKS).map(|_| BlockKey::from_bytes(random.random())).collect() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.keys.len() / PROMPT_BLOCKS
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// How many keys all of them have.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Each key of a prompt with the one before it.
    pub fn chain(&self, number: usize) -> impl Iterator<Item = (BlockKey, BlockKey)> + '_ {
        let keys = self.keys.iter().copied().skip(number * PROMPT_BLOCKS).take(PROMPT_BLOCKS);
        let parents = std::iter::once(BlockKey::ROOT).chain(keys.clone());
        keys.zip(parents)
    }

    /// The number of a prompt drawn at random.
    pub fn random(&self, random: &mut impl Rng) -> usize {
        random.random_range(0..self.len().max(1))
    }
}

/// What the bench's worker registers.
pub fn spec() -> InstanceSpec {
    InstanceSpec {
        instance: InstanceId("bench".into()),
        namespace: NamespaceDescriptor::new().with("model", "bench").with("block", BLOCK_BYTES.to_string()),
        groups: vec![GroupGeometry { group: 0, block_bytes: BLOCK_BYTES, shards: 1 }],
        shard: 0,
        keeps_all: false,
    }
}

/// Memory for `blocks` blocks, all zero.
///
/// # Errors
/// `InvalidInput` for no blocks.
pub fn block_memory(blocks: u32) -> Result<Arc<dyn DeviceMemory>> {
    memory_of(BLOCK_BYTES, vec![0u8; (BLOCK_BYTES * u64::from(blocks)) as usize])
}

/// These bytes as memory for blocks of `block_bytes`.
///
/// # Errors
/// `InvalidInput` for no blocks.
pub fn memory_of(block_bytes: u64, bytes: Vec<u8>) -> Result<Arc<dyn DeviceMemory>> {
    Ok(Arc::new(HostMemory::owned(bytes, block_bytes)?))
}
