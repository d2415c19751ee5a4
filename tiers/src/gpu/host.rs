//! The host-memory device: vLLM on CPU, shared memory of a worker, and every test. A copy is a `memcpy`, done on the
//! calling thread; a batch has ended when it is returned.
#![expect(unsafe_code, reason = "copies between registered memories and arena slots")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use super::{BlockCopy, CopyBatch, CopyDirection, Device, DeviceMemory};
use crate::block::{Fragment, MemoryLayout};
use crate::dram::HEADER_BYTES;
use crate::error::{Error, ErrorKind, Result};

/// A fragment of every block in one of several allocations: vLLM on CPU has one for each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeFragment {
    /// Which of the ranges it lies in, from 0.
    pub range: u32,
    /// Where it lies; the offset counts from the start of the range.
    pub fragment: Fragment,
}

/// Host memory that somebody else allocated, in one or more ranges, kept alive by `owner`.
///
/// The layout numbers the bytes of all ranges one after the other, as if they were one memory.
pub struct HostMemory {
    /// For every fragment of the layout: where its range starts, and the number of that byte in the layout.
    places: Vec<(NonNull<u8>, u64)>,
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
        fragments: Vec<Fragment>,
        blocks: u32,
        owner: Box<dyn std::any::Any + Send + Sync>,
    ) -> Result<Self> {
        let fragments = fragments.into_iter().map(|fragment| RangeFragment { range: 0, fragment }).collect();
        // SAFETY: the caller's promise, for one range.
        unsafe { Self::from_ranges(&[(start, bytes)], fragments, blocks, owner) }
    }

    /// Describes several memories, each with its start and its number of bytes, as one.
    ///
    /// # Errors
    /// `InvalidInput` if a fragment leaves its range or names none.
    ///
    /// # Safety
    /// As [`HostMemory::new`], for every range.
    pub unsafe fn from_ranges(
        ranges: &[(NonNull<u8>, u64)],
        fragments: Vec<RangeFragment>,
        blocks: u32,
        owner: Box<dyn std::any::Any + Send + Sync>,
    ) -> Result<Self> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let mut numbered = Vec::with_capacity(ranges.len());
        let mut total = 0u64;
        for (start, bytes) in ranges {
            numbered.push((*start, total, *bytes));
            total = total.checked_add(*bytes).ok_or_else(|| bad("the ranges are larger than 2^64 bytes".into()))?;
        }
        let mut places = Vec::with_capacity(fragments.len());
        let mut flat = Vec::with_capacity(fragments.len());
        for RangeFragment { range, fragment } in fragments {
            let (start, base, bytes) = *usize::try_from(range)
                .ok()
                .and_then(|range| numbered.get(range))
                .ok_or_else(|| bad(format!("a fragment names range {range}; there are {}", ranges.len())))?;
            // Inside its own range, not only inside the sum of them.
            MemoryLayout::new(vec![fragment], blocks, bytes)?;
            places.push((start, base));
            flat.push(Fragment { offset: base + fragment.offset, ..fragment });
        }
        Ok(Self { places, layout: MemoryLayout::new(flat, blocks, total)?, _owner: owner })
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
        let outside = |block: u32, blocks: u32| {
            bad(format!("block {block} is outside the registered {blocks}; give a lower one"))
        };
        let mut sources = self.pieces_of(block).ok_or_else(|| outside(block, self.layout.blocks()))?;
        let targets = target.pieces_of(target_block).ok_or_else(|| outside(target_block, target.layout.blocks()))?;
        let mut source: (*mut u8, usize) = (std::ptr::null_mut(), 0);
        for (mut to, mut wanted) in targets {
            while wanted > 0 {
                if source.1 == 0 {
                    // Both blocks have the same length, so the source cannot run out first.
                    let Some(next) = sources.next() else { break };
                    source = next;
                }
                let (from, left) = source;
                let step = wanted.min(left);
                // SAFETY: `step` stays inside one piece of each block, and the owners of both memories live during this
                // call. The two may be the same memory, so this is a move that allows overlap. Writers at the same time
                // are the caller's, see `HostMemory::new`.
                unsafe {
                    std::ptr::copy(from, to, step);
                    source = (from.add(step), left - step);
                    to = to.add(step);
                }
                wanted -= step;
            }
        }
        Ok(())
    }

    /// Where the pieces of a block lie, and how long each is; `None` if there is no such block. The layout has checked
    /// that every piece lies in its range.
    fn pieces_of(&self, block: u32) -> Option<impl Iterator<Item = (*mut u8, usize)> + '_> {
        let fragments = self.layout.fragments_of(block)?;
        Some(fragments.zip(&self.places).map(|((offset, bytes), (start, base))| {
            // SAFETY: `MemoryLayout` has checked that the fragment lies in its range.
            (unsafe { start.as_ptr().add((offset - base) as usize) }, bytes as usize)
        }))
    }

    fn copy_block(&self, direction: CopyDirection, copy: &BlockCopy) -> Result<()> {
        let outside = || {
            Error::new(
                ErrorKind::InvalidInput,
                format!("block {} is outside the registered {}", copy.block, self.layout.blocks()),
            )
        };
        let mut at = HEADER_BYTES;
        for (device, bytes) in self.pieces_of(copy.block).ok_or_else(outside)? {
            // SAFETY: `HostDevice::copy` has checked that the slot is large enough; the slot and the owner of the memory
            // are held by the caller during this call. The two do not overlap: a slot lies in the arena's own mapping.
            unsafe {
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
    fn a_block_in_several_ranges_stays_in_them() {
        let mut layers: Vec<Vec<u8>> = (0..3u8).map(|layer| (0..=255).map(|i| i ^ (layer * 85)).collect()).collect();
        let original = layers.clone();
        let ranges: Vec<_> =
            layers.iter_mut().map(|l| (NonNull::new(l.as_mut_ptr()).expect("not null"), l.len() as u64)).collect();
        let fragments = |bytes, range_of_last| {
            [0, 1, range_of_last]
                .map(|range| RangeFragment { range, fragment: Fragment { offset: 0, stride: 32, bytes } })
                .to_vec()
        };
        // SAFETY: `layers` outlive the memory and are not touched while copies run.
        let make = |fragments| unsafe { HostMemory::from_ranges(&ranges, fragments, 8, Box::new(())) };
        for refused in [make(fragments(48, 2)), make(fragments(32, 3))] {
            assert_eq!(refused.map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::InvalidInput));
        }
        let memory: Arc<dyn DeviceMemory> = Arc::new(make(fragments(32, 2)).expect("fits"));
        let arena = Arena::new(ArenaConfig::new(4 << 20)).expect("memory");
        let slot = Arc::new(arena.alloc(96).expect("room"));
        for (direction, block) in [(CopyDirection::ToSlots, 1), (CopyDirection::ToDevice, 7)] {
            let copies = vec![BlockCopy { block, slot: Arc::clone(&slot) }];
            HostDevice.copy(&memory, direction, copies).map(|_| ()).expect("in range");
        }
        for (layer, before) in layers.iter().zip(&original) {
            assert_eq!(layer[224..], before[32..64]);
            assert_eq!(layer[..224], before[..224]);
        }
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
