//! Made-up prompts: chains of keys as random as hashes, and the smallest blocks that a worker may have.
#![expect(unsafe_code, reason = "registers this process's memory as KV memory")]

use std::ptr::NonNull;
use std::sync::Arc;

use pegaflow_engine::{
    BlockKey, DeviceMemory, Fragment, GroupGeometry, HostMemory, InstanceId, InstanceSpec, NamespaceDescriptor, Result,
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
    let mut bytes = bytes.into_boxed_slice();
    let start = NonNull::new(bytes.as_mut_ptr()).unwrap_or(NonNull::dangling());
    let length = bytes.len() as u64;
    let blocks = u32::try_from(length / block_bytes.max(1)).unwrap_or(u32::MAX);
    let fragments = vec![Fragment { offset: 0, stride: block_bytes, bytes: block_bytes }];
    // SAFETY: the memory owns the bytes, whose place does not change when the box moves, and nobody else uses them.
    let memory = unsafe { HostMemory::new(start, length, fragments, blocks, Box::new(bytes)) }?;
    Ok(Arc::new(memory))
}
