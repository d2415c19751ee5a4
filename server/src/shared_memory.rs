//! Memory shared between the server and one worker: a sealed memfd, mapped by both. The server makes it, the worker gets
//! the descriptor over the second socket. Its length can never change, so neither side can make the other fault.
//! A mapping lives as long as anybody holds it: whoever has a copy in flight does.
#![expect(unsafe_code, reason = "maps and unmaps the shared memory")]

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pegaflow_engine::{Error, ErrorKind, Fragment, HostMemory, Result};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::limits::{SLOT_ALIGN, SLOT_BYTES_MAX};

const PAGE: u64 = 4096;

fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

/// The length of a memory of `slots` slots, in bytes.
///
/// # Errors
/// `InvalidInput` for sizes outside the limits.
pub(crate) fn memory_bytes(slot_bytes: u64, slots: u32) -> Result<u64> {
    let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
    if slot_bytes == 0 || slot_bytes > SLOT_BYTES_MAX || !slot_bytes.is_multiple_of(SLOT_ALIGN) {
        return bad(format!("slots of {slot_bytes} bytes; give a multiple of {SLOT_ALIGN}, at most {SLOT_BYTES_MAX}"));
    }
    if slots == 0 {
        return bad("0 slots; give at least 1".into());
    }
    Ok((slot_bytes * u64::from(slots)).next_multiple_of(PAGE))
}

/// One mapping of a shared memory.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    _budget: Option<Charge>,
}

// SAFETY: the mapping is plain memory that any thread may use as long as it lives; nobody forms references into it,
// copies go through `HostMemory`, whose callers accept torn bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: &OwnedFd, bytes: u64, budget: Option<Charge>) -> Result<Self> {
        let bytes = usize::try_from(bytes)
            .map_err(|_| Error::new(ErrorKind::InvalidInput, format!("{bytes} bytes do not fit in memory")))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the file's length is sealed at `bytes`.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        }
        .map_err(|error| Error::from_io(format!("cannot map {bytes} bytes of shared memory"), error.into()))?;
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| Error::new(ErrorKind::Io, "the kernel mapped shared memory at address 0"))?;
        let mapping = Self { start, bytes, _budget: budget };
        // SAFETY: the range is the mapping just made; the advice changes no content.
        if let Err(error) = unsafe { rustix::mm::madvise(start.as_ptr().cast(), bytes, Advice::LinuxDontDump) } {
            tracing::warn!(%error, "shared memory may show up in core dumps: the kernel refused MADV_DONTDUMP");
        }
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the last holder is gone, so nobody uses the range any more; it was mapped by `new` with this length.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) } {
            tracing::error!(%error, bytes = self.bytes, "cannot unmap shared memory; it stays until the process ends");
        }
    }
}

fn host_memory(mapping: Mapping, slot_bytes: u64, slots: u32) -> Result<Arc<HostMemory>> {
    let (start, bytes) = (mapping.start, mapping.bytes as u64);
    let fragments = vec![Fragment { offset: 0, stride: slot_bytes, bytes: slot_bytes }];
    // SAFETY: the mapping is readable and writable, and is the memory's owner; the other process may write at any time,
    // which `HostMemory` allows: its bytes are copied into private memory before they are checked.
    unsafe { HostMemory::new(start, bytes, fragments, slots, Box::new(mapping)) }.map(Arc::new)
}

/// Makes a memory of `slots` slots, its pages taken at once so that want of memory is an error here and not a signal
/// later. Returns it with the descriptor for the other process.
///
/// # Errors
/// `InvalidInput`, `NoSpace` or `Io`.
pub(crate) fn create(slot_bytes: u64, slots: u32, budget: Option<Charge>) -> Result<(Arc<HostMemory>, OwnedFd)> {
    let bytes = memory_bytes(slot_bytes, slots)?;
    let failed = |what: &str| {
        let what = format!("cannot make {bytes} bytes of shared memory: {what}");
        move |error: rustix::io::Errno| Error::from_io(what, error.into())
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("pegaflow-staging", flags).map_err(failed("memfd_create"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes).map_err(failed("fallocate"))?;
    rustix::fs::fcntl_add_seals(&fd, seals()).map_err(failed("sealing"))?;
    let mapping = Mapping::new(&fd, bytes, budget)?;
    Ok((host_memory(mapping, slot_bytes, slots)?, fd))
}

/// Maps a memory that the server made.
///
/// # Errors
/// `InvalidInput` if the descriptor is no sealed memory of the right length.
pub(crate) fn open(fd: &OwnedFd, slot_bytes: u64, slots: u32) -> Result<Arc<HostMemory>> {
    let bytes = memory_bytes(slot_bytes, slots)?;
    let bad = |message: String| Error::new(ErrorKind::InvalidInput, message);
    let sealed = rustix::fs::fcntl_get_seals(fd).map_err(|error| bad(format!("no sealed shared memory: {error}")))?;
    if !sealed.contains(seals()) {
        return Err(bad(format!("the shared memory has seals {sealed:?}; its length must be sealed")));
    }
    let length = rustix::fs::fstat(fd).map_err(|error| Error::from_io("fstat of shared memory", error.into()))?.st_size;
    if u64::try_from(length) != Ok(bytes) {
        return Err(bad(format!("the shared memory has {length} bytes instead of {bytes}")));
    }
    host_memory(Mapping::new(fd, bytes, None)?, slot_bytes, slots)
}

/// A bound on bytes.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicU64,
    limit: u64,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), limit })
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> Result<(), u64> {
        let take = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map(|_| ())
    }
}

/// Bytes taken from the budget of a session and of the server; given back when dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    budgets: [Arc<Budget>; 2],
    bytes: u64,
}

impl Charge {
    /// Takes `bytes` from both.
    ///
    /// # Errors
    /// `InvalidInput` if it is more than the session may ever have, `Busy` if others hold too much now.
    pub(crate) fn take(session: &Arc<Budget>, all: &Arc<Budget>, bytes: u64) -> Result<Self> {
        session.take(bytes).map_err(|used| {
            Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{bytes} bytes of shared memory, {used} already taken; a session may have {}: ask for fewer slots or \
                     raise --session-shared-memory",
                    session.limit
                ),
            )
        })?;
        if let Err(used) = all.take(bytes) {
            session.used.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{bytes} bytes of shared memory, {used} of {} taken by all sessions: raise --shared-memory",
                    all.limit
                ),
            ));
        }
        Ok(Self { budgets: [Arc::clone(session), Arc::clone(all)], bytes })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        for budget in &self.budgets {
            budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use pegaflow_engine::DeviceMemory;

    use super::*;

    #[test]
    fn two_mappings_show_the_same_bytes_and_the_length_is_sealed() {
        let (server, fd) = create(64, 10, None).expect("memory");
        let worker = open(&fd, 64, 10).expect("same geometry");
        assert_eq!((server.layout().blocks(), worker.layout().block_bytes()), (10, 64));
        let (source, _keep) = create(64, 1, None).expect("memory");
        source.copy_block_to(0, &worker, 7).expect("in range");
        assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "shrinking would make the server fault");
        assert!(rustix::fs::ftruncate(&fd, 1 << 20).is_err());
        assert!(rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).is_err());
        assert!(open(&fd, 64, 100).is_err(), "another length");
    }

    #[test]
    fn sizes_are_checked_at_their_limits() {
        for (slot_bytes, slots, ok) in [
            (16, 1, true),
            (SLOT_BYTES_MAX, 1, true),
            (SLOT_BYTES_MAX + 16, 1, false),
            (0, 1, false),
            (17, 1, false),
            (16, 0, false),
            (SLOT_BYTES_MAX, u32::MAX, true),
        ] {
            assert_eq!(memory_bytes(slot_bytes, slots).is_ok(), ok, "{slots} slots of {slot_bytes}");
        }
    }

    #[test]
    fn a_charge_is_bounded_and_given_back() {
        let (session, all) = (Budget::new(100), Budget::new(150));
        let kind = |result: Result<Charge>| result.map_err(|error| error.kind());
        let first = Charge::take(&session, &all, 100).expect("fits");
        assert_eq!(kind(Charge::take(&session, &all, 1)).err(), Some(ErrorKind::InvalidInput));
        let other = Budget::new(100);
        assert_eq!(kind(Charge::take(&other, &all, 51)).err(), Some(ErrorKind::Busy));
        assert_eq!(other.used(), 0);
        drop(first);
        assert_eq!((session.used(), all.used()), (0, 0));
        assert!(Charge::take(&other, &all, u64::MAX).is_err());
    }
}
