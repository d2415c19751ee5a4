//! The mapping of an arena: address range, pages, where they lie. Unmapped when dropped. It reads and writes no byte.
#![expect(unsafe_code, reason = "maps, places, populates and unmaps the arena's memory")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::arena::HugePages;
use super::numa::Placement;
use super::view::seals;
use crate::error::{Error, Result};

pub(super) const HUGE_PAGE: usize = 2 << 20;
/// More do not make the kernel zero pages faster.
const POPULATE_THREADS_MAX: usize = 8;
/// Bytes that one call takes: two huge pages.
const POPULATE_PIECE: usize = 2 * HUGE_PAGE;

/// A mapped range, zeroed at first.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    fd: Option<OwnedFd>,
    is_reserved: bool,
}

// SAFETY: the mapping is plain memory that any thread may use; who may use which part is decided by the arena.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`; takes no memory yet.
    pub(super) fn new(bytes: usize, huge_pages: HugePages, is_shared: bool) -> Result<Self> {
        let mapping = match huge_pages {
            HugePages::Reserved => Self::of_pages(bytes, is_shared, true).or_else(|error| {
                tracing::warn!(bytes, %error, "no reserved 2 MiB pages (see vm.nr_hugepages); using the usual pages");
                Self::of_pages(bytes, is_shared, false)
            }),
            HugePages::Transparent => Self::of_pages(bytes, is_shared, false),
        };
        let mapping = mapping.map_err(|source| {
            let remedy = match source.kind() {
                io::ErrorKind::FileTooLarge => " (shared memory counts as a file: raise ulimit -f, or give less)",
                _ => "",
            };
            Error::from_io(format!("mapping {bytes} bytes of DRAM{remedy}"), source)
        })?;
        let start = mapping.start.as_ptr().cast();
        if !mapping.is_reserved {
            // SAFETY: the range was just mapped. A refused hint changes nothing.
            unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        }
        // The text of users is in these bytes: keep it out of core dumps.
        // SAFETY: the range is mapped and ours.
        if unsafe { libc::madvise(start, bytes, libc::MADV_DONTDUMP) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "the arena could not be kept out of core dumps");
        }
        Ok(mapping)
    }

    fn of_pages(bytes: usize, is_shared: bool, is_reserved: bool) -> io::Result<Self> {
        let fd = is_shared.then(|| memfd(bytes, is_reserved)).transpose()?;
        let kind = match (&fd, is_reserved) {
            (Some(_), _) => libc::MAP_SHARED,
            (None, true) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            (None, false) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        // Reserved pages are counted off here, so that too few of them are noticed while there is another choice.
        let reserve = if is_reserved { 0 } else { libc::MAP_NORESERVE };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let descriptor = fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a mapping at an address of the kernel's choice touches nothing that exists; a file's length is sealed.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, kind | reserve, descriptor, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, bytes, fd, is_reserved }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Whether it consists of reserved 2 MiB pages.
    pub(super) fn is_reserved(&self) -> bool {
        self.is_reserved
    }

    /// Says on which NUMA nodes the memory is to be taken; before any is.
    pub(super) fn place(&self, placement: &Placement) {
        let (mode, nodes) = match placement {
            Placement::Anywhere => return,
            Placement::Preferred(node) => (libc::MPOL_PREFERRED, vec![*node]),
            Placement::Interleaved(nodes) => (libc::MPOL_INTERLEAVE, nodes.iter().copied().collect()),
        };
        let mut mask = vec![0_u64; nodes.iter().max().map_or(0, |last| *last as usize / 64 + 1)];
        for node in &nodes {
            if let Some(word) = mask.get_mut(*node as usize / 64) {
                *word |= 1 << (node % 64);
            }
        }
        // The kernel takes one bit less than it is told of.
        let bits = mask.len() * 64 + 1;
        let (start, flags) = (self.start.as_ptr(), 0);
        // SAFETY: the range is mapped and ours; the mask lives until the call returns; no byte changes.
        if unsafe { libc::syscall(libc::SYS_mbind, start, self.bytes, mode, mask.as_ptr(), bits, flags) } == 0 {
            tracing::info!(?nodes, "the arena's memory is taken near the GPUs");
        } else {
            let error = io::Error::last_os_error();
            tracing::warn!(?nodes, %error, "the arena's memory could not be placed near the GPUs; copies may be slower");
        }
    }

    /// Takes the memory of a part, on several threads. What is there already stays as it is.
    pub(crate) fn populate(&self, part: Range<usize>) -> io::Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(POPULATE_THREADS_MAX);
        let share = part.len().div_ceil(threads).next_multiple_of(HUGE_PAGE);
        let shares = part.clone().step_by(share).map(|from| from..part.end.min(from + share));
        std::thread::scope(|scope| {
            let mut running = Vec::with_capacity(threads);
            for share in shares {
                let thread = std::thread::Builder::new().name("pega-populate".into());
                match thread.spawn_scoped(scope, {
                    let share = share.clone();
                    move || self.take(share)
                }) {
                    Ok(thread) => running.push(thread),
                    // No more threads: this one does it.
                    Err(_) => self.take(share)?,
                }
            }
            running.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        })
    }

    /// In pieces: the kernel keeps the list of the process's mappings locked as long as one call runs, and every thread that
    /// starts, maps or allocates much waits for it.
    fn take(&self, part: Range<usize>) -> io::Result<()> {
        debug_assert!(part.start <= part.end && part.end <= self.bytes, "a part lies inside the mapping");
        for from in part.clone().step_by(POPULATE_PIECE) {
            let start = self.start.as_ptr().wrapping_add(from);
            let bytes = POPULATE_PIECE.min(part.end - from);
            // SAFETY: the range lies in the mapping, see the assertion; populating changes no byte.
            if unsafe { libc::madvise(start.cast(), bytes, libc::MADV_POPULATE_WRITE) } != 0 {
                return match io::Error::last_os_error() {
                    // Before Linux 5.14: pages are then taken at their first use.
                    error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                    error => Err(error),
                };
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its owner is going: no slot is left, each holds an `Arc` of the arena.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A memory that other processes can map, of a length that nobody can change. Not bound by the size of `/dev/shm`.
fn memfd(bytes: usize, is_huge: bool) -> io::Result<OwnedFd> {
    let huge = if is_huge { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    // SAFETY: the name is a C string; the call makes a new descriptor or fails.
    let fd =
        unsafe { libc::memfd_create(c"pegaflow-arena".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::fs::ftruncate(&fd, bytes as u64)?;
    rustix::fs::fcntl_add_seals(&fd, seals())?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Bytes of the mapping that have memory behind them.
    fn resident(mapping: &Mapping) -> usize {
        let mut pages = vec![0_u8; mapping.bytes / 4096];
        // SAFETY: one byte for each page of the mapping, which lives.
        let told = unsafe { libc::mincore(mapping.start.as_ptr().cast(), mapping.bytes, pages.as_mut_ptr()) };
        assert_eq!(told, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 == 1).count() * 4096
    }

    #[test]
    fn only_what_is_populated_takes_memory() {
        for is_shared in [false, true] {
            let mapping = Mapping::new(4 * HUGE_PAGE, HugePages::Transparent, is_shared).expect("mapped");
            assert_eq!(resident(&mapping), 0);
            mapping.populate(0..2 * HUGE_PAGE).expect("memory");
            assert_eq!(resident(&mapping), 2 * HUGE_PAGE);
            mapping.populate(2 * HUGE_PAGE..4 * HUGE_PAGE).expect("memory");
            assert_eq!(resident(&mapping), mapping.bytes());
        }
    }

    #[test]
    fn memory_can_be_had_whatever_becomes_of_its_placement() {
        let nodes = BTreeSet::from([0, 200]);
        for placement in [Placement::Preferred(0), Placement::Preferred(900), Placement::Interleaved(nodes)] {
            let mapping = Mapping::new(HUGE_PAGE, HugePages::Transparent, true).expect("mapped");
            mapping.place(&placement);
            mapping.populate(0..HUGE_PAGE).expect("memory");
        }
    }
}
