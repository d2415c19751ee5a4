//! A slot: the image of one record in DRAM, `[header page | payload]`, so that one aligned read or write moves a
//! whole record between the drive and its place, without a copy.
#![expect(unsafe_code, reason = "the arena's memory is handed out as raw ranges; each slot owns its own")]

use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

use super::arena::Arena;
use super::view::Place;

/// The bytes at the start of a slot that are kept for the record's header.
pub const HEADER_BYTES: usize = 4096;

/// A range of the arena, given back when dropped. The header page comes first, the payload after it; both start at
/// multiples of 4096.
///
/// While it is not shared its payload can be written ([`Slot::payload_mut`]); once in an `Arc` the payload is read-only
/// to everybody but the kernel and a device copy that was started before it was shared.
pub struct Slot {
    arena: Arc<Arena>,
    start: NonNull<u8>,
    bytes: usize,
    chunk: u32,
    header: Mutex<()>,
}

// SAFETY: a slot is the only owner of its range of the arena, which the `Arc<Arena>` keeps mapped. Shared access to the
// payload is read-only, shared access to the header page goes through the mutex.
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

impl Slot {
    /// Owns `[start, start + bytes)`, which the arena has just taken off its free list.
    pub(super) fn new(arena: Arc<Arena>, start: NonNull<u8>, bytes: usize, chunk: u32) -> Self {
        Self { arena, start, bytes, chunk, header: Mutex::new(()) }
    }

    /// The whole length, header page included; a multiple of 4096.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The length of the payload area.
    pub fn payload_bytes(&self) -> usize {
        self.bytes - HEADER_BYTES
    }

    /// The arena chunk that it lies in.
    pub fn chunk(&self) -> u32 {
        self.chunk
    }

    /// Where it lies in its arena.
    pub fn place(&self) -> Place {
        let offset = self.start.as_ptr() as usize - self.arena.range().0.as_ptr() as usize;
        Place((offset / 4096) as u32)
    }

    /// The first byte, for I/O and device copies. Whoever uses it holds the slot until the operation has ended.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// The payload area.
    pub fn payload(&self) -> &[u8] {
        // SAFETY: the range belongs to this slot and stays mapped as long as it lives; the payload is only written
        // through `&mut self`, or by an operation that was given the slot before it was shared with readers.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(HEADER_BYTES), self.payload_bytes()) }
    }

    /// The payload area, to fill it before it is shared.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `payload`, and `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(HEADER_BYTES), self.payload_bytes()) }
    }

    /// All of it, header page included, to the store's reading side alone: while a read has not been reported, whoever
    /// asked for it leaves the slot alone, so a record that was read into it can be decoded to its place.
    pub(crate) fn with_all<T>(&self, change: impl FnOnce(&mut [u8]) -> T) -> T {
        let _held = self.header.lock();
        // SAFETY: the range belongs to this slot and stays mapped as long as it lives. Until a read into the slot is
        // reported its payload is shared with nobody (`Store::read`), as for the kernel, which writes there before; the
        // mutex keeps header pages from being read or written.
        change(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) })
    }

    /// A copy of the header page.
    pub fn read_header(&self) -> [u8; HEADER_BYTES] {
        let _held = self.header.lock();
        let mut page = [0; HEADER_BYTES];
        // SAFETY: the header page lies in this slot's range; the mutex keeps `write_header` away.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr(), page.as_mut_ptr(), HEADER_BYTES) };
        page
    }

    /// Replaces the header page. Not to be called while a write of this slot is in flight: the store's writer, the only
    /// caller, waits for its own writes.
    pub fn write_header(&self, page: &[u8; HEADER_BYTES]) {
        let _held = self.header.lock();
        // SAFETY: as in `read_header`.
        unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), self.start.as_ptr(), HEADER_BYTES) };
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.arena.give_back(self.start, self.bytes, self.chunk);
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("start", &self.start).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
