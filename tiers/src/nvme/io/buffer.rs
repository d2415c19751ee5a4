//! The bytes of an I/O request, owned by it.
#![expect(unsafe_code, reason = "plain aligned memory outside the arena, and ranges of slots")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::dram::Slot;

const ALIGN: usize = 4096;

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
    /// Memory of its own, for superblocks, headers and scans.
    Pages(Pages),
}

impl IoBuffer {
    /// The first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        match self {
            Self::Slot { slot, .. } => slot.as_ptr(),
            Self::Pages(pages) => pages.start,
        }
    }

    /// The number of bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Slot { slot, bytes } => (*bytes).min(slot.bytes()),
            Self::Pages(pages) => pages.bytes,
        }
    }
}

/// Zeroed memory at a multiple of 4096.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: `Pages` owns its memory like a `Box<[u8]>`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `bytes` bytes, rounded up to whole pages of 4096, at least one.
    pub fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(ALIGN).max(ALIGN);
        let layout = Self::layout(bytes);
        // SAFETY: the layout has a size above zero.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(start) => Self { start, bytes },
            None => handle_alloc_error(layout),
        }
    }

    fn layout(bytes: usize) -> Layout {
        #[expect(clippy::expect_used, reason = "the alignment is a power of two and sizes come from slots and pages")]
        Layout::from_size_align(bytes, ALIGN).expect("invariant: a size below isize::MAX")
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is ours and initialised.
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
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) };
    }
}
