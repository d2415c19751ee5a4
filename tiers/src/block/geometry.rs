//! Where the bytes of a block lie in a device's memory: a list of affine fragments, checked once when registered,
//! so that no block number can ever form an address outside the registered memory.

use super::namespace::NamespaceId;
use crate::error::{Error, ErrorKind, Result};

/// The most fragments a layout may have. vLLM's deepest models have fewer than 256 layers, each with K and V.
const FRAGMENTS_MAX: usize = 4096;
/// The largest block, in bytes.
const BLOCK_BYTES_MAX: u64 = 1 << 30;
/// Fragments are whole multiples of this: a vector register's worth.
const FRAGMENT_ALIGN: u64 = 16;

/// One piece of every block: block `b` has `bytes` bytes at `offset + b * stride` of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Where the fragment of block 0 starts, in bytes from the start of the memory.
    pub offset: u64,
    /// How far apart the fragments of neighbouring blocks are, in bytes; at least `bytes`.
    pub stride: u64,
    /// The length of the fragment in bytes; a multiple of 16.
    pub bytes: u64,
}

/// The place of every block of one group in one registered memory. Valid by construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    fragments: Vec<Fragment>,
    blocks: u32,
    block_bytes: u64,
}

impl MemoryLayout {
    /// Checks that every fragment of every block lies inside a memory of `memory_bytes`.
    ///
    /// # Errors
    /// `InvalidInput` with the fragment, the value and the limit.
    pub fn new(fragments: Vec<Fragment>, blocks: u32, memory_bytes: u64) -> Result<Self> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if fragments.is_empty() || fragments.len() > FRAGMENTS_MAX {
            return bad(format!("a layout has {} fragments; it must have 1 to {FRAGMENTS_MAX}", fragments.len()));
        }
        if blocks == 0 {
            return bad("a layout has 0 blocks; it must have at least 1".into());
        }
        let mut block_bytes = 0u64;
        for (index, fragment) in fragments.iter().enumerate() {
            if fragment.bytes == 0 || !fragment.bytes.is_multiple_of(FRAGMENT_ALIGN) {
                return bad(format!(
                    "fragment {index} has {} bytes; it must be a positive multiple of {FRAGMENT_ALIGN}",
                    fragment.bytes
                ));
            }
            if blocks > 1 && fragment.stride < fragment.bytes {
                return bad(format!(
                    "fragment {index} has a stride of {} bytes, less than its {} bytes",
                    fragment.stride, fragment.bytes
                ));
            }
            let end = u64::from(blocks - 1)
                .checked_mul(fragment.stride)
                .and_then(|last| last.checked_add(fragment.offset))
                .and_then(|last| last.checked_add(fragment.bytes));
            match end {
                Some(end) if end <= memory_bytes => {}
                _ => {
                    return bad(format!(
                        "fragment {index} of {blocks} blocks ends outside the registered {memory_bytes} bytes"
                    ));
                }
            }
            block_bytes = block_bytes.saturating_add(fragment.bytes);
        }
        if block_bytes > BLOCK_BYTES_MAX {
            return bad(format!("a block has {block_bytes} bytes; the limit is {BLOCK_BYTES_MAX}"));
        }
        Ok(Self { fragments, blocks, block_bytes })
    }

    /// Blocks lying one after the other: block `b` at `b * stride`, `block_bytes` long.
    ///
    /// # Errors
    /// As [`MemoryLayout::new`].
    pub fn contiguous(block_bytes: u64, stride: u64, blocks: u32, memory_bytes: u64) -> Result<Self> {
        Self::new(vec![Fragment { offset: 0, stride, bytes: block_bytes }], blocks, memory_bytes)
    }

    /// The number of blocks; valid block numbers are below it.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The bytes of one block, all fragments together.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// The `(offset, bytes)` of every fragment of `block`, in order; `None` if there is no such block.
    pub fn fragments_of(&self, block: u32) -> Option<impl Iterator<Item = (u64, u64)> + '_> {
        (block < self.blocks)
            .then(|| self.fragments.iter().map(move |f| (f.offset + u64::from(block) * f.stride, f.bytes)))
    }
}

/// What is fixed for one KV cache group of a namespace: every record of the group has this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupGeometry {
    /// The group, from 0.
    pub group: u16,
    /// The bytes of one block in one shard; a multiple of 16, at most 1 GiB.
    pub block_bytes: u64,
    /// How many shards make a block; a block is found only if all are.
    pub shards: u16,
}

impl GroupGeometry {
    /// Checks the limits.
    ///
    /// # Errors
    /// `InvalidInput` with the value and the limit.
    pub fn validate(&self) -> Result<()> {
        if self.block_bytes == 0
            || !self.block_bytes.is_multiple_of(FRAGMENT_ALIGN)
            || self.block_bytes > BLOCK_BYTES_MAX
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "a block of group {} has {} bytes; give a multiple of {FRAGMENT_ALIGN} from {FRAGMENT_ALIGN} to {BLOCK_BYTES_MAX}",
                    self.group, self.block_bytes
                ),
            ));
        }
        if self.shards == 0 || self.shards > 1024 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("group {} has {} shards; give 1 to 1024", self.group, self.shards),
            ));
        }
        Ok(())
    }

    /// The error for a namespace that is registered with other groups than it is known with.
    pub fn mismatch(namespace: NamespaceId, known: &[Self], given: &[Self]) -> Error {
        let show = |groups: &[Self]| {
            let each = groups.iter().map(|g| format!("{}: {} bytes in {} shards", g.group, g.block_bytes, g.shards));
            each.collect::<Vec<_>>().join(", ")
        };
        let message = format!(
            "namespace {namespace} is known with the groups [{}], not [{}]; register these, or add to its descriptor what makes them differ",
            show(known),
            show(given)
        );
        Error::new(ErrorKind::GeometryMismatch, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_block_number_forms_an_address_outside_the_memory() {
        let layout = MemoryLayout::new(
            vec![Fragment { offset: 0, stride: 64, bytes: 32 }, Fragment { offset: 640, stride: 32, bytes: 32 }],
            10,
            640 + 320,
        )
        .expect("fits");
        assert_eq!(layout.block_bytes(), 64);
        for block in 0..10 {
            for (offset, bytes) in layout.fragments_of(block).expect("a block") {
                assert!(offset + bytes <= 960);
            }
        }
        assert!(layout.fragments_of(10).is_none());
    }

    #[test]
    fn a_layout_that_leaves_the_memory_is_refused() {
        let refused = |offset, stride, bytes, blocks, memory| {
            MemoryLayout::new(vec![Fragment { offset, stride, bytes }], blocks, memory).map_err(|e| e.kind())
                == Err(ErrorKind::InvalidInput)
        };
        assert!(!refused(0, 64, 64, 4, 256));
        assert!(refused(0, 64, 64, 4, 255));
        assert!(refused(16, 64, 64, 4, 256));
        assert!(refused(0, 32, 64, 4, 4096));
        assert!(refused(0, u64::MAX, 64, 4, 256));
        assert!(refused(0, 64, 0, 4, 256));
        assert!(refused(0, 64, 10, 4, 256));
        assert!(refused(0, 64, 64, 0, 256));
    }
}
