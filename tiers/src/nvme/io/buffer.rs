//! The bytes of an I/O request, owned by it.
#![expect(unsafe_code, reason = "plain aligned memory outside the arena, and ranges of slots")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::IO_ALIGN;
use crate::dram::Slot;

/// Memory that an operation reads from or writes to. The operation owns it until its completion has run.
#[derive(Debug)]
pub enum IoBuffer {
    /// The first `bytes` bytes of a slot: header page and payload.
    Slot {
        /// The slot.
        slot: Arc<Slot>,
        /// How many bytes; a multiple of 4096, at most the slot's length.
        bytes: usize,
    },
    /// The last `bytes` bytes of a slot: a record that is decoded to the front of it.
    SlotEnd {
        /// The slot.
        slot: Arc<Slot>,
        /// How many bytes; a multiple of 4096, at most the slot's length.
        bytes: usize,
    },
    /// Memory of its own, for superblocks, headers, scans and encoded records.
    Pages(Pages),
}

impl IoBuffer {
    /// The first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        match self {
            Self::Slot { slot, .. } => slot.as_ptr(),
            // SAFETY: the offset is at most the length of the slot.
            Self::SlotEnd { slot, bytes } => unsafe { slot.as_ptr().add(slot.bytes().saturating_sub(*bytes)) },
            Self::Pages(pages) => pages.start,
        }
    }

    /// The number of bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Slot { slot, bytes } | Self::SlotEnd { slot, bytes } => (*bytes).min(slot.bytes()),
            Self::Pages(pages) => pages.bytes,
        }
    }

    /// One `pread` of at most `bytes` bytes at `offset` of the file, to `from` bytes into the buffer.
    pub(super) fn read_at(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        from: usize,
        bytes: usize,
    ) -> io::Result<usize> {
        let (start, bytes) = self.part(from, bytes);
        // SAFETY: `part` lies inside the buffer, which this call borrows until the kernel is done. A slot that is being
        // read into is not yet shared with readers of its payload.
        let moved = unsafe { libc::pread(file.as_raw_fd(), start.as_ptr().cast(), bytes, offset.cast_signed()) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// One `pwrite` of at most `bytes` bytes, from `from` bytes into the buffer, to `offset` of the file.
    pub(super) fn write_at(&self, file: BorrowedFd<'_>, offset: u64, from: usize, bytes: usize) -> io::Result<usize> {
        let (start, bytes) = self.part(from, bytes);
        // SAFETY: `part` lies inside the buffer, which this call borrows until the kernel is done.
        let moved = unsafe { libc::pwrite(file.as_raw_fd(), start.as_ptr().cast(), bytes, offset.cast_signed()) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// The part `[from, from + bytes)`, cut to the buffer.
    pub(super) fn part(&self, from: usize, bytes: usize) -> (NonNull<u8>, usize) {
        let from = from.min(self.bytes());
        // SAFETY: `from` is at most the length of the buffer.
        (unsafe { self.as_ptr().add(from) }, bytes.min(self.bytes() - from))
    }

    /// A copy of its first `bytes` bytes, rounded up to whole pages of zeros.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(super) fn copy_of(&self, bytes: usize) -> Pages {
        let copy = Pages::new(bytes);
        let bytes = bytes.min(self.bytes());
        // SAFETY: both ranges are at least that long and the copy is new memory.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().as_ptr(), copy.start.as_ptr(), bytes) };
        copy
    }

    /// Copies `bytes` to `from` bytes into the buffer, as far as they fit.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(super) fn fill(&mut self, from: usize, bytes: &[u8]) {
        let (start, room) = self.part(from, bytes.len());
        // SAFETY: `part` lies inside the buffer, which the operation owns until its completion has run.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.as_ptr(), room) };
    }

    /// Changes one bit; a byte past the end counts from the start again.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(super) fn flip_bit(&mut self, byte: usize, bit: u8) {
        let byte = byte % self.bytes().max(1);
        // SAFETY: the byte lies inside the buffer, whose operation has just ended and which nobody reads before the
        // completion has run.
        unsafe { *self.as_ptr().add(byte).as_ptr() ^= 1 << (bit % 8) };
    }
}

/// Zeroed memory at a multiple of 4096.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    /// What is used of it.
    bytes: usize,
    allocated_bytes: usize,
}

// SAFETY: `Pages` owns its memory like a `Box<[u8]>`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `bytes` bytes, rounded up to whole pages of 4096, at least one.
    pub fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(IO_ALIGN).max(IO_ALIGN);
        let layout = Self::layout(bytes);
        // SAFETY: the layout has a size above zero.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(start) => Self { start, bytes, allocated_bytes: bytes },
            None => handle_alloc_error(layout),
        }
    }

    fn layout(bytes: usize) -> Layout {
        #[expect(clippy::expect_used, reason = "the alignment is a power of two and sizes come from slots and pages")]
        Layout::from_size_align(bytes, IO_ALIGN).expect("invariant: a size below isize::MAX")
    }

    /// How many bytes there are room for.
    pub fn allocated_bytes(&self) -> usize {
        self.allocated_bytes
    }

    /// Uses the first `bytes` bytes, rounded up to whole pages, as far as there is room. What is in them stays.
    pub fn set_bytes(&mut self, bytes: usize) {
        self.bytes = bytes.next_multiple_of(IO_ALIGN).clamp(IO_ALIGN, self.allocated_bytes);
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is ours and initialised, and at most what was allocated is used.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.allocated_bytes)) };
    }
}
