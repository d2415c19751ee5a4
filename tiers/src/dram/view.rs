//! An arena as somebody sees it who copies blocks: a mapped range and places in it. A server's arena is seen so by the
//! workers that map it, and by the process that owns it. A view never says who may use a place; leases do.
#![expect(unsafe_code, reason = "maps and unmaps a shared arena")]

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::SealFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::slot::HEADER_BYTES;
use crate::error::{Error, ErrorKind, Result};

const PAGE: u64 = 4096;

/// Names one arena; random, so that an arena that was made anew is never taken for the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ArenaId(pub u128);

/// Where a slot lies in its arena: the number of its first page of 4096 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place(pub u32);

/// A mapped arena. The mapping lives as long as the view; whoever has a copy in flight holds it.
pub struct ArenaView {
    id: ArenaId,
    start: NonNull<u8>,
    bytes: usize,
    is_foreign: bool,
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the owner keeps the range mapped, and nobody forms references into it: copies go through raw pointers.
unsafe impl Send for ArenaView {}
// SAFETY: as above.
unsafe impl Sync for ArenaView {}

struct Mapping {
    start: usize,
    bytes: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `ArenaView::map` with this length, and its view, the only holder, is gone.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start as *mut _, self.bytes) } {
            tracing::error!(%error, bytes = self.bytes, "cannot unmap the arena; it stays until the process ends");
        }
    }
}

/// The seals of a shared arena: its length never changes, so no side can make the other fault.
pub(super) fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

impl ArenaView {
    pub(super) fn new(id: ArenaId, start: NonNull<u8>, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { id, start, bytes, is_foreign: false, _owner: owner }
    }

    /// Maps the arena of another process by its descriptor.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is no memory of `bytes` bytes with sealed length, `Io` if it cannot be mapped.
    pub fn map(fd: BorrowedFd<'_>, id: ArenaId, bytes: u64) -> Result<Arc<Self>> {
        let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
        let sealed = rustix::fs::fcntl_get_seals(fd).map_err(|error| bad(format!("no sealed memory: {error}")))?;
        let length = rustix::fs::fstat(fd).map_err(|error| Error::from_io("fstat of the arena", error.into()))?.st_size;
        if !sealed.contains(seals()) || u64::try_from(length) != Ok(bytes) || bytes == 0 {
            return Err(bad(format!(
                "the arena has {length} bytes and seals {sealed:?}; {bytes} bytes of sealed length were expected"
            )));
        }
        let bytes = usize::try_from(bytes).map_err(|_| bad(format!("{bytes} bytes do not fit in memory")))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file whose length is sealed.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd.as_fd(), 0) }
                .map_err(|error| Error::from_io(format!("mapping {bytes} bytes of the arena"), error.into()))?;
        let mapping = Mapping { start: start as usize, bytes };
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| Error::new(ErrorKind::Io, "the kernel mapped the arena at address 0"))?;
        // SAFETY: the range is the mapping just made; the advice changes no content.
        if let Err(error) = unsafe { rustix::mm::madvise(start.as_ptr().cast(), bytes, Advice::LinuxDontDump) } {
            tracing::warn!(%error, "the arena may show up in core dumps: the kernel refused MADV_DONTDUMP");
        }
        Ok(Arc::new(Self { is_foreign: true, ..Self::new(id, start, bytes, Box::new(mapping)) }))
    }

    /// Which arena it is.
    pub fn id(&self) -> ArenaId {
        self.id
    }

    /// Whether it was mapped by its descriptor, so that this process has no use for its bytes but to copy them.
    pub fn is_foreign(&self) -> bool {
        self.is_foreign
    }

    /// The mapping: start and length.
    pub fn range(&self) -> (NonNull<u8>, usize) {
        (self.start, self.bytes)
    }

    /// Where the payload of the slot at `place` starts, if `bytes` of it lie in the arena.
    ///
    /// # Errors
    /// `InvalidInput` if they do not.
    pub fn payload(&self, place: Place, bytes: u64) -> Result<NonNull<u8>> {
        let start = u64::from(place.0) * PAGE + HEADER_BYTES as u64;
        match start.checked_add(bytes) {
            // SAFETY: the offset is inside the mapping, as just checked.
            Some(end) if end <= self.bytes as u64 => Ok(unsafe { self.start.add(start as usize) }),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("place {} with {bytes} bytes lies outside the arena of {} bytes", place.0, self.bytes),
            )),
        }
    }
}

impl std::fmt::Debug for ArenaView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArenaView").field("id", &self.id).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dram::{Arena, ArenaConfig};

    #[test]
    fn both_sides_of_a_shared_arena_see_the_same_bytes() {
        let arena = Arena::new(ArenaConfig { is_shared: true, ..ArenaConfig::new(4 << 20) }).expect("memory");
        let fd = arena.fd().expect("shared");
        let view = ArenaView::map(fd, arena.id(), arena.capacity_bytes()).expect("mapped");
        let mut slot = arena.alloc(5000).expect("room");
        slot.payload_mut().fill(7);
        let payload = view.payload(slot.place(), 5000).expect("inside");
        // SAFETY: the view keeps the range mapped, and nobody writes it now.
        assert!(unsafe { std::slice::from_raw_parts(payload.as_ptr(), 5000) }.iter().all(|byte| *byte == 7));
        assert!(rustix::fs::ftruncate(fd, 0).is_err(), "shrinking would make the other side fault");
        assert!(ArenaView::map(fd, arena.id(), arena.capacity_bytes() - 4096).is_err(), "another length");
    }

    #[test]
    fn no_address_outside_the_arena_is_formed() {
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(4 << 20) }).expect("memory");
        let view = arena.view();
        let pages = (4 << 20) / PAGE as u32;
        for (place, bytes, is_inside) in [
            (0, (4 << 20) - 4096, true),
            (0, (4 << 20) - 4095, false),
            (pages - 2, 4096, true),
            (pages - 1, 1, false),
            (u32::MAX, 0, false),
            (0, u64::MAX, false),
        ] {
            assert_eq!(view.payload(Place(place), bytes).is_ok(), is_inside, "{bytes} bytes at {place}");
        }
    }
}
