//! The host-memory device: vLLM on CPU, shared memory of a worker, and every test. A copy is a `memcpy`, done on the
//! calling thread; a batch has ended when it is returned.
#![expect(unsafe_code, reason = "copies between registered memories and arena slots")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use super::{BlockCopy, CopyBatch, CopyDirection, Device, DeviceMemory};
use crate::block::MemoryLayout;
use crate::dram::HEADER_BYTES;
use crate::error::{Error, ErrorKind, Result};

/// Host memory that somebody else allocated, kept alive by `owner`.
pub struct HostMemory {
    start: NonNull<u8>,
    layout: MemoryLayout,
    _owner: Box<dyn std::any::Any + Send + Sync>,
}

// SAFETY: `HostMemory::new` requires memory that any thread may use as long as the owner lives.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Describes `bytes` bytes of memory at `start`.
    ///
    /// # Errors
    /// `InvalidInput` if the layout was made for a larger memory.
    ///
    /// # Safety
    /// The memory is readable and writable for as long as `owner` lives, and whoever writes a block at the same time as
    /// a copy of it accepts torn bytes: a worker that does so harms only itself, because bytes are copied into private
    /// memory before they are checksummed.
    pub unsafe fn new(
        start: NonNull<u8>,
        bytes: u64,
        fragments: Vec<crate::block::Fragment>,
        blocks: u32,
        owner: Box<dyn std::any::Any + Send + Sync>,
    ) -> Result<Self> {
        Ok(Self { start, layout: MemoryLayout::new(fragments, blocks, bytes)?, _owner: owner })
    }

    /// Copies one block to a block of another host memory, fragments of both in order, whatever their cut. The copy
    /// has ended when this returns.
    ///
    /// # Errors
    /// `InvalidInput` if a block is outside its memory, or the two memories have blocks of different length.
    pub fn copy_block_to(&self, block: u32, target: &HostMemory, target_block: u32) -> Result<()> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let (from_bytes, to_bytes) = (self.layout.block_bytes(), target.layout.block_bytes());
        if from_bytes != to_bytes {
            return Err(bad(format!("a block of {from_bytes} bytes cannot be copied to one of {to_bytes} bytes")));
        }
        let outside =
            |block: u32, blocks: u32| bad(format!("block {block} is outside the registered {blocks}; give a lower one"));
        let mut sources =
            self.layout.fragments_of(block).ok_or_else(|| outside(block, self.layout.blocks()))?;
        let targets = target
            .layout
            .fragments_of(target_block)
            .ok_or_else(|| outside(target_block, target.layout.blocks()))?;
        let (mut from, mut left) = (0usize, 0usize);
        for (offset, bytes) in targets {
            let (mut to, mut wanted) = (offset as usize, bytes as usize);
            while wanted > 0 {
                if left == 0 {
                    // Both blocks have the same length, so the source cannot run out first.
                    let Some((offset, bytes)) = sources.next() else { break };
                    (from, left) = (offset as usize, bytes as usize);
                    continue;
                }
                let step = wanted.min(left);
                // SAFETY: both layouts were checked to lie in their memories, whose owners `self` and `target` hold
                // during this call; `step` stays inside one fragment of each. The two may be the same memory, so this
                // is a move that allows overlap. Writers at the same time are the caller's, see `HostMemory::new`.
                unsafe {
                    std::ptr::copy(self.start.as_ptr().add(from), target.start.as_ptr().add(to), step);
                }
                (from, to) = (from + step, to + step);
                (left, wanted) = (left - step, wanted - step);
            }
        }
        Ok(())
    }

    fn copy_block(&self, direction: CopyDirection, copy: &BlockCopy) -> Result<()> {
        let outside = || {
            Error::new(
                ErrorKind::InvalidInput,
                format!("block {} is outside the registered {}", copy.block, self.layout.blocks()),
            )
        };
        let fragments = self.layout.fragments_of(copy.block).ok_or_else(outside)?;
        let mut at = HEADER_BYTES;
        for (offset, bytes) in fragments {
            let (offset, bytes) = (offset as usize, bytes as usize);
            // SAFETY: `MemoryLayout` has checked that the fragment lies in the memory, `HostDevice::copy` that the slot
            // is large enough; the slot and the owner of the memory are held by the caller during this call. The two do
            // not overlap: a slot lies in the arena's own mapping.
            unsafe {
                let device = self.start.as_ptr().add(offset);
                let slot = copy.slot.as_ptr().as_ptr().add(at);
                match direction {
                    CopyDirection::ToSlots => std::ptr::copy_nonoverlapping(device, slot, bytes),
                    CopyDirection::ToDevice => std::ptr::copy_nonoverlapping(slot, device, bytes),
                }
            }
            at += bytes;
        }
        Ok(())
    }
}

impl DeviceMemory for HostMemory {
    fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    fn as_host(&self) -> Option<&HostMemory> {
        Some(self)
    }
}

/// The host backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostDevice;

struct Ended;

impl CopyBatch for Ended {
    fn wait(&mut self, _deadline: Instant) -> Result<()> {
        Ok(())
    }
}

impl Device for HostDevice {
    fn name(&self) -> &'static str {
        "host"
    }

    fn copy(
        &self,
        memory: &Arc<dyn DeviceMemory>,
        direction: CopyDirection,
        copies: Vec<BlockCopy>,
    ) -> Result<Box<dyn CopyBatch>> {
        let layout = memory.layout();
        let host = memory
            .as_host()
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the host device cannot copy a GPU's memory"))?;
        for copy in &copies {
            if copy.block >= layout.blocks() || (copy.slot.payload_bytes() as u64) < layout.block_bytes() {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "block {} of {} bytes does not fit: the memory has {} blocks, the slot {} bytes",
                        copy.block,
                        layout.block_bytes(),
                        layout.blocks(),
                        copy.slot.payload_bytes()
                    ),
                ));
            }
        }
        copies.iter().try_for_each(|copy| host.copy_block(direction, copy))?;
        Ok(Box::new(Ended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Fragment;
    use crate::dram::{Arena, ArenaConfig};

    #[test]
    fn a_block_in_fragments_comes_back_bit_for_bit() {
        let mut bytes: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 251) as u8).collect();
        let original = bytes.clone();
        let fragments =
            vec![Fragment { offset: 0, stride: 64, bytes: 64 }, Fragment { offset: 2048, stride: 128, bytes: 32 }];
        let start = NonNull::new(bytes.as_mut_ptr()).expect("not null");
        // SAFETY: `bytes` outlives the memory and is not touched while copies run.
        let memory = unsafe { HostMemory::new(start, 4096, fragments, 16, Box::new(())) }.expect("fits");
        let memory: Arc<dyn DeviceMemory> = Arc::new(memory);
        let arena = Arena::new(ArenaConfig::new(4 << 20)).expect("memory");
        let slot = Arc::new(arena.alloc(96).expect("room"));
        let copy = |direction, block| {
            HostDevice
                .copy(&memory, direction, vec![BlockCopy { block, slot: Arc::clone(&slot) }])
                .map(|_| ())
                .map_err(|e| e.kind())
        };
        copy(CopyDirection::ToSlots, 3).expect("in range");
        copy(CopyDirection::ToDevice, 5).expect("in range");
        assert_eq!(copy(CopyDirection::ToDevice, 16), Err(ErrorKind::InvalidInput));
        assert_eq!(bytes[5 * 64..6 * 64], original[3 * 64..4 * 64]);
        assert_eq!(bytes[2048 + 5 * 128..2048 + 5 * 128 + 32], original[2048 + 3 * 128..2048 + 3 * 128 + 32]);
        assert_eq!(bytes[..5 * 64], original[..5 * 64]);
    }

    #[test]
    fn blocks_cut_differently_are_copied_between_memories() {
        let mut bytes: Vec<u8> = (0..4096u32).map(|i| (i * 13 % 251) as u8).collect();
        let mut staging = vec![0u8; 4 * 96];
        let fragments =
            vec![Fragment { offset: 0, stride: 64, bytes: 64 }, Fragment { offset: 2048, stride: 128, bytes: 32 }];
        let other = vec![
            Fragment { offset: 0, stride: 96, bytes: 16 },
            Fragment { offset: 16, stride: 96, bytes: 64 },
            Fragment { offset: 80, stride: 96, bytes: 16 },
        ];
        let memory = |bytes: &mut Vec<u8>, fragments: Vec<Fragment>, blocks| {
            let start = NonNull::new(bytes.as_mut_ptr()).expect("not null");
            // SAFETY: the vectors outlive the memories and are not touched while copies run.
            unsafe { HostMemory::new(start, bytes.len() as u64, fragments, blocks, Box::new(())) }.expect("fits")
        };
        let kv = memory(&mut bytes, fragments, 16);
        let slots = memory(&mut staging, other, 4);
        kv.copy_block_to(3, &slots, 1).expect("in range");
        slots.copy_block_to(1, &kv, 9).expect("in range");
        assert_eq!(kv.copy_block_to(16, &slots, 0).map_err(|e| e.kind()), Err(ErrorKind::InvalidInput));
        assert_eq!(kv.copy_block_to(0, &slots, 4).map_err(|e| e.kind()), Err(ErrorKind::InvalidInput));
        let (head, tail) = (bytes[3 * 64..4 * 64].to_vec(), bytes[2048 + 3 * 128..2048 + 3 * 128 + 32].to_vec());
        assert_eq!(staging[96..192], [head.clone(), tail.clone()].concat());
        assert_eq!(staging[..96], [0; 96]);
        assert_eq!((&bytes[9 * 64..10 * 64], &bytes[2048 + 9 * 128..2048 + 9 * 128 + 32]), (&head[..], &tail[..]));
        let mut short = vec![0u8; 64];
        let short = memory(&mut short, vec![Fragment { offset: 0, stride: 64, bytes: 64 }], 1);
        assert_eq!(kv.copy_block_to(0, &short, 0).map_err(|e| e.kind()), Err(ErrorKind::InvalidInput));
    }
}
