//! The arena: anonymous memory taken once at start, cut into chunks. A chunk holds slots of one size; an empty chunk
//! may become any size again, so fixed block sizes never fragment, several of them side by side.
#![expect(unsafe_code, reason = "maps and unmaps the arena's memory")]

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

use super::slot::{HEADER_BYTES, Slot};
use crate::error::{Error, ErrorKind, Result};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Which pages the arena asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// The kernel's usual pages, with a hint that large ones are welcome.
    #[default]
    Transparent,
    /// Reserved 2 MiB pages; falls back to [`HugePages::Transparent`] with a warning where there are too few.
    Reserved,
}

/// How the arena is made.
#[derive(Debug, Clone, Copy)]
pub struct ArenaConfig {
    /// Bytes in all; rounded down to whole chunks. At least one chunk.
    pub capacity_bytes: u64,
    /// Bytes of a chunk; a multiple of 2 MiB. The largest slot may span several chunks. Default: 16 MiB.
    pub chunk_bytes: u64,
    /// Which pages.
    pub huge_pages: HugePages,
    /// Whether to touch every page now, in parallel, so that no later access faults.
    pub touch: bool,
}

impl ArenaConfig {
    /// `capacity_bytes` in chunks of 16 MiB (2 MiB where the capacity is under 256 MiB), touched at start.
    pub fn new(capacity_bytes: u64) -> Self {
        let chunk_bytes = if capacity_bytes < 256 << 20 { HUGE_PAGE as u64 } else { 16 << 20 };
        Self { capacity_bytes, chunk_bytes, huge_pages: HugePages::Transparent, touch: true }
    }
}

/// How much of the arena slots of one size take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassUsage {
    /// Bytes of a slot, header page included.
    pub slot_bytes: usize,
    /// Chunks that hold slots of this size.
    pub chunks: usize,
    /// Slots in use.
    pub used: usize,
    /// Slots that these chunks could hold.
    pub slots: usize,
}

/// Memory for slots. Unmapped when the arena and all of its slots are gone.
pub struct Arena {
    start: NonNull<u8>,
    bytes: usize,
    chunk_bytes: usize,
    state: Mutex<State>,
}

// SAFETY: the mapping is plain memory that any thread may use; who may use which part is decided by `state`, which is
// behind a mutex.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

#[derive(Default)]
struct State {
    /// Chunks that hold no slot.
    free_chunks: BTreeSet<u32>,
    chunks: Vec<Chunk>,
    classes: BTreeMap<usize, Class>,
    used_bytes: usize,
}

#[derive(Default)]
struct Class {
    /// Chunks of this size that have a free slot.
    open: BTreeSet<u32>,
    chunks: usize,
    used: usize,
}

#[derive(Clone, Default)]
struct Chunk {
    slot_bytes: usize,
    free: Vec<u32>,
    used: u32,
}

impl Arena {
    /// Maps the memory.
    ///
    /// # Errors
    /// `InvalidInput` for sizes outside the limits, `NoSpace` where the kernel has not that much memory.
    pub fn new(config: ArenaConfig) -> Result<Arc<Self>> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let chunk_bytes =
            usize::try_from(config.chunk_bytes).map_err(|_| bad("the chunk size does not fit in memory".into()))?;
        if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(HUGE_PAGE) {
            return Err(bad(format!("an arena chunk of {chunk_bytes} bytes is not a positive multiple of 2 MiB")));
        }
        let count = usize::try_from(config.capacity_bytes).unwrap_or(usize::MAX) / chunk_bytes;
        if count == 0 {
            return Err(bad(format!(
                "{} bytes of DRAM are less than one chunk of {chunk_bytes} bytes",
                config.capacity_bytes
            )));
        }
        let bytes = count * chunk_bytes;
        let start = map(bytes, config.huge_pages)?;
        let arena = Self {
            start,
            bytes,
            chunk_bytes,
            state: Mutex::new(State {
                free_chunks: (0..count as u32).collect(),
                chunks: vec![Chunk::default(); count],
                ..State::default()
            }),
        };
        exclude_from_core_dumps(start, bytes);
        if config.touch {
            arena.touch()?;
        }
        Ok(Arc::new(arena))
    }

    /// Takes a slot whose payload area has at least `payload_bytes` (rounded up to 4096), or `None` when there is no
    /// room. The content is whatever was there before.
    pub fn alloc(self: &Arc<Self>, payload_bytes: usize) -> Option<Slot> {
        let slot_bytes = payload_bytes.checked_next_multiple_of(PAGE)?.max(PAGE).checked_add(HEADER_BYTES)?;
        let mut state = self.state.lock();
        let (chunk, offset) = if slot_bytes <= self.chunk_bytes {
            state.take(slot_bytes, self.chunk_bytes)?
        } else {
            (state.take_span(slot_bytes, self.chunk_bytes)?, 0)
        };
        state.used_bytes += slot_bytes;
        drop(state);
        let offset = chunk as usize * self.chunk_bytes + offset;
        debug_assert!(offset + slot_bytes <= self.bytes, "a slot lies inside the arena");
        // SAFETY: the offset is inside the mapping, see the assertion; the result is not null because the start is not.
        let start = unsafe { self.start.add(offset) };
        Some(Slot::new(Arc::clone(self), start, slot_bytes, chunk))
    }

    pub(super) fn give_back(&self, start: NonNull<u8>, slot_bytes: usize, chunk: u32) {
        let offset = start.as_ptr() as usize - self.start.as_ptr() as usize - chunk as usize * self.chunk_bytes;
        let mut state = self.state.lock();
        state.used_bytes -= slot_bytes;
        if slot_bytes <= self.chunk_bytes {
            state.put(chunk, offset, slot_bytes);
        } else {
            let chunks = slot_bytes.div_ceil(self.chunk_bytes) as u32;
            state.free_chunks.extend(chunk..chunk + chunks);
        }
    }

    /// The whole mapping, for registration with the kernel: start and length.
    pub fn range(&self) -> (NonNull<u8>, usize) {
        (self.start, self.bytes)
    }

    /// Bytes in all.
    pub fn capacity_bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Bytes in slots.
    pub fn used_bytes(&self) -> u64 {
        self.state.lock().used_bytes as u64
    }

    /// The bytes of a slot for a payload, header page and rounding included.
    pub fn slot_bytes(payload_bytes: usize) -> usize {
        payload_bytes.next_multiple_of(PAGE).max(PAGE) + HEADER_BYTES
    }

    /// Chunks that hold no slot.
    pub fn free_chunks(&self) -> usize {
        self.state.lock().free_chunks.len()
    }

    /// What each slot size takes, by size.
    pub fn usage(&self) -> Vec<ClassUsage> {
        let state = self.state.lock();
        let usage = |(&slot_bytes, class): (&usize, &Class)| ClassUsage {
            slot_bytes,
            chunks: class.chunks,
            used: class.used,
            slots: class.chunks * (self.chunk_bytes / slot_bytes),
        };
        state.classes.iter().map(usage).collect()
    }

    fn touch(&self) -> Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(16);
        let share = self.bytes.div_ceil(threads).next_multiple_of(HUGE_PAGE);
        let first = self.start.as_ptr() as usize;
        let outcome = std::thread::scope(|scope| {
            let touch = |from: usize| scope.spawn(move || populate(first + from, share.min(self.bytes - from)));
            let running: Vec<_> = (0..self.bytes).step_by(share).map(touch).collect();
            running.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        });
        outcome.map_err(|source| {
            Error::from_io(format!("taking {} bytes of DRAM (give less, or free memory)", self.bytes), source)
        })
    }
}

impl State {
    fn take(&mut self, slot_bytes: usize, chunk_bytes: usize) -> Option<(u32, usize)> {
        let class = self.classes.entry(slot_bytes).or_default();
        let chunk = match class.open.first() {
            Some(&chunk) => chunk,
            None => {
                let chunk = self.free_chunks.pop_first()?;
                let slots = (chunk_bytes / slot_bytes) as u32;
                *self.chunks.get_mut(chunk as usize)? = Chunk { slot_bytes, free: (0..slots).rev().collect(), used: 0 };
                class.open.insert(chunk);
                class.chunks += 1;
                chunk
            }
        };
        let held = self.chunks.get_mut(chunk as usize)?;
        let slot = held.free.pop()?;
        held.used += 1;
        class.used += 1;
        if held.free.is_empty() {
            class.open.remove(&chunk);
        }
        Some((chunk, slot as usize * slot_bytes))
    }

    fn put(&mut self, chunk: u32, offset: usize, slot_bytes: usize) {
        let (Some(held), Some(class)) = (self.chunks.get_mut(chunk as usize), self.classes.get_mut(&slot_bytes)) else {
            return;
        };
        debug_assert_eq!(held.slot_bytes, slot_bytes, "a slot goes back to a chunk of its size");
        held.free.push((offset / slot_bytes) as u32);
        held.used -= 1;
        class.used -= 1;
        class.open.insert(chunk);
        if held.used == 0 {
            *held = Chunk::default();
            class.open.remove(&chunk);
            class.chunks -= 1;
            if class.chunks == 0 {
                self.classes.remove(&slot_bytes);
            }
            self.free_chunks.insert(chunk);
        }
    }

    /// Neighbouring free chunks for a slot larger than one chunk: the first run that is long enough.
    fn take_span(&mut self, slot_bytes: usize, chunk_bytes: usize) -> Option<u32> {
        let wanted = slot_bytes.div_ceil(chunk_bytes) as u32;
        let mut run: Option<(u32, u32)> = None;
        let first = self.free_chunks.iter().find_map(|&chunk| {
            let (first, length) = match run {
                Some((first, length)) if first + length == chunk => (first, length + 1),
                _ => (chunk, 1),
            };
            run = Some((first, length));
            (length == wanted).then_some(first)
        })?;
        for chunk in first..first + wanted {
            self.free_chunks.remove(&chunk);
        }
        Some(first)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slot is left: each holds an `Arc` of this arena.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

fn map(bytes: usize, huge_pages: HugePages) -> Result<NonNull<u8>> {
    if huge_pages == HugePages::Reserved {
        match map_with(bytes, libc::MAP_HUGETLB) {
            Ok(start) => return Ok(start),
            Err(error) => {
                tracing::warn!(bytes, %error, "no reserved 2 MiB pages (see vm.nr_hugepages); using the usual pages")
            }
        }
    }
    let start =
        map_with(bytes, 0).map_err(|source| Error::from_io(format!("mapping {bytes} bytes of DRAM"), source))?;
    // SAFETY: the range was just mapped. A refused hint changes nothing.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    Ok(start)
}

fn map_with(bytes: usize, flags: libc::c_int) -> std::io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags,
            -1,
            0,
        )
    };
    match NonNull::new(start.cast::<u8>()) {
        Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(start),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The text of users is in these bytes: keep it out of core dumps.
fn exclude_from_core_dumps(start: NonNull<u8>, bytes: usize) {
    // SAFETY: the range is mapped and ours.
    if unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_DONTDUMP) } != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "the arena could not be kept out of core dumps");
    }
}

fn populate(start: usize, bytes: usize) -> std::io::Result<()> {
    // SAFETY: the range lies in the mapping that the caller owns; populating changes no byte.
    if unsafe { libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_POPULATE_WRITE) } == 0 {
        return Ok(());
    }
    match std::io::Error::last_os_error() {
        // Before Linux 5.14: pages are then taken at their first use.
        error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(chunks: u64) -> Arc<Arena> {
        Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(chunks * HUGE_PAGE as u64) }).expect("memory")
    }

    #[test]
    fn slots_are_aligned_and_never_overlap() {
        let arena = arena(4);
        let mut slots: Vec<Slot> = (0..40).filter_map(|i| arena.alloc(1 + i % 4 * 5000)).collect();
        assert_eq!(slots.len(), 40);
        for (i, slot) in slots.iter_mut().enumerate() {
            assert!((slot.as_ptr().as_ptr() as usize).is_multiple_of(4096));
            slot.payload_mut().fill(i as u8);
        }
        for (i, slot) in slots.iter().enumerate() {
            assert!(slot.payload().iter().all(|&byte| byte == i as u8));
        }
        drop(slots);
        assert_eq!((arena.used_bytes(), arena.free_chunks()), (0, 4));
    }

    #[test]
    fn an_emptied_chunk_serves_another_size() {
        let arena = arena(1);
        let small: Vec<Slot> = std::iter::from_fn(|| arena.alloc(4096)).collect();
        assert_eq!(small.len(), HUGE_PAGE / 8192);
        assert!(arena.alloc(1 << 20).is_none());
        drop(small);
        assert!(arena.alloc(1 << 20).is_some());
    }

    #[test]
    fn a_slot_may_span_chunks() {
        let arena = arena(4);
        let small = arena.alloc(4096).expect("room");
        let large = arena.alloc(5 << 20).expect("three chunks in a row");
        assert!(arena.alloc(4 << 20).is_none());
        drop(large);
        assert!(arena.alloc(4 << 20).is_some());
        drop(small);
        assert_eq!(arena.free_chunks(), 4);
    }

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        let kind = |config| Arena::new(config).err().map(|error| error.kind());
        assert_eq!(kind(ArenaConfig::new(1)), Some(ErrorKind::InvalidInput));
        assert_eq!(kind(ArenaConfig { chunk_bytes: 4096, ..ArenaConfig::new(1 << 30) }), Some(ErrorKind::InvalidInput));
        let arena = arena(1);
        assert!(arena.alloc(usize::MAX).is_none() && arena.alloc(64 << 20).is_none());
    }
}
