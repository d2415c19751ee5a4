//! The host-memory device: vLLM on CPU, and every test. A copy is a `memcpy`, done on the calling thread.
#![expect(unsafe_code, reason = "copies between registered memories and arena slots")]

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::ranges::{RangeFragment, Ranges};
use super::{CopyDirection, DeviceMemory, PlacedCopy};
use crate::block::{Fragment, MemoryLayout};
use crate::error::{Error, ErrorKind, Result};

/// Host memory that somebody else allocated, in one or more ranges, kept alive by `owner`.
///
/// The layout numbers the bytes of all ranges one after the other, as if they were one memory.
pub struct HostMemory {
    /// For every fragment of the layout: where its range starts, and the number of that byte in the layout.
    places: Vec<(NonNull<u8>, u64)>,
    layout: MemoryLayout,
    owner: Box<dyn std::any::Any + Send + Sync>,
}

/// The bytes of [`HostMemory::owned`].
struct OwnedBytes(UnsafeCell<Vec<u8>>);

// SAFETY: whoever shares it has no way to the bytes but through the memory that owns it, whose copies hold that memory.
unsafe impl Sync for OwnedBytes {}

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

    /// Memory of its own with these bytes, for blocks of `block_bytes` that lie one after the other; what is left at the end belongs to
    /// none. [`HostMemory::into_bytes`] gives it back.
    ///
    /// # Errors
    /// `InvalidInput` for blocks of no bytes, or for less than one block.
    pub fn owned(bytes: Vec<u8>, block_bytes: u64) -> Result<Self> {
        let blocks = u32::try_from(bytes.len() as u64 / block_bytes.max(1)).unwrap_or(u32::MAX);
        let fragments = vec![Fragment { offset: 0, stride: block_bytes, bytes: block_bytes }];
        let bytes = OwnedBytes(UnsafeCell::new(bytes));
        // SAFETY: there is no other reference to bytes that were given away.
        let (start, length) = unsafe { ((*bytes.0.get()).as_mut_ptr(), (*bytes.0.get()).len()) };
        let start = NonNull::new(start).unwrap_or(NonNull::dangling());
        // SAFETY: the memory owns the bytes, whose place does not change when the vector moves, and nobody else can get at them.
        unsafe { Self::new(start, length as u64, fragments, blocks, Box::new(bytes)) }
    }

    /// The bytes of [`HostMemory::owned`]; `None` for memory of somebody else. Nothing copies any more: copies hold the memory.
    pub fn into_bytes(self) -> Option<Vec<u8>> {
        self.owner.downcast::<OwnedBytes>().ok().map(|owned| owned.0.into_inner())
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
        let lengths: Vec<u64> = ranges.iter().map(|(_, bytes)| *bytes).collect();
        let Ranges { layout, places } = Ranges::new(&lengths, fragments, blocks)?;
        let start_of = |(range, base): (usize, u64)| ranges.get(range).map(|(start, _)| (*start, base));
        Ok(Self { places: places.into_iter().filter_map(start_of).collect(), layout, owner })
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

    /// Copies one block, fragments in order, between the memory and a payload of the arena.
    fn copy_block(&self, direction: CopyDirection, block: u32, payload: NonNull<u8>) {
        let mut at = 0;
        for (device, bytes) in self.pieces_of(block).into_iter().flatten() {
            // SAFETY: `PlacedCopy::check` has checked that all of the block lies in the arena, which the copy holds, and that
            // the block lies in this memory, whose owner lives as long as it. The two do not overlap: the arena is a
            // mapping of its own.
            unsafe {
                let slot = payload.as_ptr().add(at);
                match direction {
                    CopyDirection::ToSlots => std::ptr::copy_nonoverlapping(device, slot, bytes),
                    CopyDirection::ToDevice => std::ptr::copy_nonoverlapping(slot, device, bytes),
                }
            }
            at += bytes;
        }
    }

    fn copy_all(&self, copy: &PlacedCopy) -> Result<()> {
        copy.check(&self.layout)?;
        for (block, place) in &copy.blocks {
            if copy.cancelled.load(Ordering::Acquire) {
                return Err(Error::new(ErrorKind::Cancelled, "the copy was cancelled"));
            }
            let payload = copy.arena.payload(*place, self.layout.block_bytes())?;
            self.copy_block(copy.direction, *block, payload);
        }
        Ok(())
    }
}

impl DeviceMemory for HostMemory {
    fn device(&self) -> &'static str {
        "host"
    }

    fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    fn start(self: Arc<Self>, copy: PlacedCopy) {
        let result = self.copy_all(&copy);
        (copy.done)(result);
    }

    fn load_before(self: Arc<Self>, copy: PlacedCopy, _stream: u64) -> Result<()> {
        self.copy_all(&copy)?;
        (copy.done)(Ok(()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dram::{Arena, ArenaConfig, ArenaView, Place, Slot};
    use crate::error::ErrorKind;

    fn slot() -> (Arc<ArenaView>, Slot) {
        let arena = Arena::new(ArenaConfig::new(4 << 20)).expect("memory");
        (arena.view(), arena.alloc(96).expect("room"))
    }

    fn copy(
        memory: &Arc<HostMemory>,
        direction: CopyDirection,
        block: u32,
        (arena, place): (&Arc<ArenaView>, Place),
    ) -> Result<(), ErrorKind> {
        let (done, ended) = crossbeam_channel::bounded(1);
        Arc::clone(memory).start(PlacedCopy {
            arena: Arc::clone(arena),
            direction,
            blocks: vec![(block, place)],
            after: None,
            cancelled: Arc::default(),
            done: Box::new(move |result| drop(done.try_send(result))),
        });
        ended.try_recv().expect("host memory copies at once").map_err(|error| error.kind())
    }

    #[test]
    fn a_block_in_fragments_comes_back_bit_for_bit() {
        let mut bytes: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 251) as u8).collect();
        let original = bytes.clone();
        let fragments =
            vec![Fragment { offset: 0, stride: 64, bytes: 64 }, Fragment { offset: 2048, stride: 128, bytes: 32 }];
        let start = NonNull::new(bytes.as_mut_ptr()).expect("not null");
        // SAFETY: `bytes` outlives the memory and is not touched while copies run.
        let memory = unsafe { HostMemory::new(start, 4096, fragments, 16, Box::new(())) }.expect("fits");
        let memory = Arc::new(memory);
        let (arena, slot) = slot();
        let at = (&arena, slot.place());
        copy(&memory, CopyDirection::ToSlots, 3, at).expect("in range");
        copy(&memory, CopyDirection::ToDevice, 5, at).expect("in range");
        assert_eq!(copy(&memory, CopyDirection::ToDevice, 16, at), Err(ErrorKind::InvalidInput));
        assert_eq!(copy(&memory, CopyDirection::ToDevice, 5, (&arena, Place(9999))), Err(ErrorKind::InvalidInput));
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
        let memory = Arc::new(make(fragments(32, 2)).expect("fits"));
        let (arena, slot) = slot();
        for (direction, block) in [(CopyDirection::ToSlots, 1), (CopyDirection::ToDevice, 7)] {
            copy(&memory, direction, block, (&arena, slot.place())).expect("in range");
        }
        for (layer, original) in layers.iter().zip(&original) {
            assert_eq!(layer[7 * 32..8 * 32], original[32..64]);
            assert_eq!(layer[..7 * 32], original[..7 * 32]);
        }
    }

    #[test]
    fn owned_memory_is_given_back_as_it_was_left() {
        let bytes: Vec<u8> = (0..=255).collect();
        let memory = HostMemory::owned(bytes.clone(), 96).expect("two blocks");
        assert_eq!((memory.layout().blocks(), memory.layout().block_bytes()), (2, 96));
        assert_eq!(memory.into_bytes(), Some(bytes));
        assert!(HostMemory::owned(vec![0; 95], 96).is_err(), "less than a block");
        assert!(HostMemory::owned(vec![0; 99], 0).is_err(), "blocks of nothing");
    }
}
