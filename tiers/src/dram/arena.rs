//! The arena: memory mapped once at start, cut into chunks, private or shared with workers by its descriptor. A chunk
//! holds slots of one size; an empty chunk may become any size again, so fixed block sizes never fragment, several of
//! them side by side. Chunks can be used from the first one on as their memory is taken: see [`growth`].
#![expect(unsafe_code, reason = "computes addresses inside the arena's mapping")]

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::mapping::{HUGE_PAGE, Mapping};
use super::slot::{HEADER_BYTES, Slot};
use super::view::{ArenaId, ArenaView};
use super::{growth, memory, numa};
use crate::error::{Error, ErrorKind, Result};

const PAGE: usize = 4096;

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
    /// Whether to take the memory before it is used, so that no access faults: the first window before the arena is
    /// returned, the others in the background. Without it all is usable at once, and taken page by page.
    pub touch: bool,
    /// Whether a touched arena keeps to its first window until [`Arena::grow_on`]: while a process maps, allocates and starts
    /// threads, each of these waits for the memory that is being taken. Default: no.
    pub stays_small: bool,
    /// Bytes of a window, the memory that is taken at once; rounded up to whole chunks. Default: 256 MiB.
    pub window_bytes: u64,
    /// Whether other processes may map it: a sealed memfd instead of private memory. Default: no.
    pub is_shared: bool,
}

impl ArenaConfig {
    /// `capacity_bytes` in chunks of 16 MiB (2 MiB where the capacity is under 256 MiB), touched from the start on.
    pub fn new(capacity_bytes: u64) -> Self {
        let chunk_bytes = if capacity_bytes < 256 << 20 { HUGE_PAGE as u64 } else { 16 << 20 };
        Self {
            capacity_bytes,
            chunk_bytes,
            huge_pages: HugePages::Transparent,
            touch: true,
            stays_small: false,
            window_bytes: 256 << 20,
            is_shared: false,
        }
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
    id: ArenaId,
    mapping: Mapping,
    chunk_bytes: usize,
    window_bytes: usize,
    state: Mutex<State>,
    /// The bytes from the start on whose memory is there; whole chunks. Only grows, by one thread.
    ready_bytes: AtomicUsize,
    /// Whom to tell of growth: what stands on the arena, a handful.
    listeners: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
}

#[derive(Default)]
struct State {
    /// Chunks that are ready and hold no slot.
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
    /// Maps the memory and takes the first window of it; a thread takes the others, one after the other, as long as the
    /// arena lives, from [`Arena::grow_on`] on if the configuration says so.
    ///
    /// # Errors
    /// `InvalidInput` for sizes outside the limits, `NoSpace` where the kernel has not the memory of the first window.
    pub fn new(config: ArenaConfig) -> Result<Arc<Self>> {
        Self::growing(config, Mapping::populate)
    }

    /// Takes the rest of the memory in the background, for an arena of [`ArenaConfig::stays_small`]. To be called once.
    ///
    /// # Errors
    /// `Io` if no thread can be started.
    pub fn grow_on(self: &Arc<Self>) -> Result<()> {
        growth::go_on(self, Mapping::populate)
    }

    /// As `new`; `populate` takes the memory of a window.
    pub(crate) fn growing(
        config: ArenaConfig,
        populate: impl Fn(&Mapping, Range<usize>) -> io::Result<()> + Send + 'static,
    ) -> Result<Arc<Self>> {
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
        let mapping = Mapping::new(bytes, config.huge_pages, config.is_shared)?;
        if config.touch {
            if !mapping.is_reserved() {
                memory::warn_if_short(bytes as u64);
            }
            mapping.place(&numa::placement(Path::new("/sys")));
        }
        let secret = [RandomState::new(), RandomState::new()].map(|secret| secret.hash_one(bytes));
        let window_chunks = usize::try_from(config.window_bytes).unwrap_or(bytes).div_ceil(chunk_bytes).clamp(1, count);
        let arena = Arc::new(Self {
            id: ArenaId((u128::from(secret[0]) << 64) | u128::from(secret[1])),
            mapping,
            chunk_bytes,
            window_bytes: window_chunks * chunk_bytes,
            state: Mutex::new(State { chunks: vec![Chunk::default(); count], ..State::default() }),
            ready_bytes: AtomicUsize::new(0),
            listeners: Mutex::default(),
        });
        if config.touch {
            growth::begin(&arena, &populate)?;
            if !config.stays_small {
                growth::go_on(&arena, populate)?;
            }
        } else {
            arena.grow(bytes);
        }
        Ok(arena)
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
        debug_assert!(offset + slot_bytes <= self.mapping.bytes(), "a slot lies inside the arena");
        // SAFETY: the offset is inside the mapping, see the assertion; the result is not null because the start is not.
        let start = unsafe { self.mapping.start().add(offset) };
        Some(Slot::new(Arc::clone(self), start, slot_bytes, chunk))
    }

    pub(super) fn give_back(&self, start: NonNull<u8>, slot_bytes: usize, chunk: u32) {
        let offset =
            start.as_ptr() as usize - self.mapping.start().as_ptr() as usize - chunk as usize * self.chunk_bytes;
        let mut state = self.state.lock();
        state.used_bytes -= slot_bytes;
        if slot_bytes <= self.chunk_bytes {
            state.put(chunk, offset, slot_bytes);
        } else {
            let chunks = slot_bytes.div_ceil(self.chunk_bytes) as u32;
            state.free_chunks.extend(chunk..chunk + chunks);
        }
    }

    /// Its name, new with every arena.
    pub fn id(&self) -> ArenaId {
        self.id
    }

    /// The descriptor by which another process can map it, if it is shared.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.mapping.fd()
    }

    /// The arena as those see it who copy blocks.
    pub fn view(self: &Arc<Self>) -> Arc<ArenaView> {
        Arc::new(ArenaView::new(self.id, self.mapping.start(), self.mapping.bytes(), Box::new(Arc::clone(self))))
    }

    /// The whole mapping, for registration with the kernel: start and length.
    pub fn range(&self) -> (NonNull<u8>, usize) {
        (self.mapping.start(), self.mapping.bytes())
    }

    /// Bytes in all, those that are not ready yet included.
    pub fn capacity_bytes(&self) -> u64 {
        self.mapping.bytes() as u64
    }

    /// The bytes from the start on that slots can be in by now. Never less than before.
    pub fn ready_bytes(&self) -> u64 {
        self.ready_bytes.load(Ordering::Acquire) as u64
    }

    /// Calls `listener` each time the arena has grown, on the thread that grows it: it only wakes others. Kept as long
    /// as the arena.
    pub fn on_growth(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.listeners.lock().push(listener);
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// What is to be populated next, if anything is.
    pub(super) fn next_window(&self) -> Option<Range<usize>> {
        let (ready, bytes) = (self.ready_bytes.load(Ordering::Acquire), self.mapping.bytes());
        (ready < bytes).then(|| ready..bytes.min(ready + self.window_bytes))
    }

    /// The memory up to `ready_bytes`, a whole number of chunks, is there. Called by one thread at a time.
    pub(super) fn grow(&self, ready_bytes: usize) {
        let before = self.ready_bytes.load(Ordering::Acquire);
        let chunks = (before / self.chunk_bytes) as u32..(ready_bytes / self.chunk_bytes) as u32;
        self.state.lock().free_chunks.extend(chunks);
        self.ready_bytes.store(ready_bytes, Ordering::Release);
        self.listeners.lock().iter().for_each(|listener| listener());
    }

    /// Bytes in slots.
    pub fn used_bytes(&self) -> u64 {
        self.state.lock().used_bytes as u64
    }

    /// The bytes of a slot for a payload, header page and rounding included.
    pub fn slot_bytes(payload_bytes: usize) -> usize {
        payload_bytes.next_multiple_of(PAGE).max(PAGE) + HEADER_BYTES
    }

    /// Chunks that are ready and hold no slot.
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
