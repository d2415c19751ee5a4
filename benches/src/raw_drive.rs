//! What a drive gives to a program that does nothing but I/O: one thread, one io_uring, one preallocated file opened past
//! the page cache, registered memory. The ceiling that benches measure the store against. Knows nothing of the store.
#![expect(unsafe_code, reason = "hands mapped memory to the kernel through the ring")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, squeue, types};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

/// The most requests in flight.
pub const DEPTH_MAX: usize = 256;
/// The `user_data` of a sync; transfers have the number of their memory.
const SYNC: u64 = u64::MAX;

/// How requests are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of a request; a multiple of 4096.
    pub request_bytes: u64,
    /// Requests in flight, 1 to [`DEPTH_MAX`].
    pub depth: usize,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {} KiB", self.depth, self.request_bytes >> 10)
    }
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the drive.
    Read,
    /// To the drive, with an `fdatasync` each time so many bytes have been written, beside the writes, and one at the end.
    Write {
        /// Bytes between two syncs.
        sync_bytes: u64,
    },
}

/// See the module.
pub struct RawDrive {
    ring: IoUring,
    memory: Memory,
    file: File,
    file_bytes: u64,
}

impl RawDrive {
    /// Makes `path`, takes `file_bytes` for it from the file system, and registers `memory_bytes` of memory full of
    /// random bytes.
    ///
    /// # Errors
    /// Where the system refuses one of these.
    pub fn create(path: &Path, file_bytes: u64, memory_bytes: usize) -> Result<Self> {
        let file = direct(OpenOptions::new().create_new(true), path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, file_bytes)
            .with_context(|| format!("taking {file_bytes} bytes from the file system"))?;
        file.sync_all()?;
        Self::of(file, memory_bytes)
    }

    /// As [`RawDrive::create`], of a file that is there, with other memory.
    ///
    /// # Errors
    /// Where the system refuses one of these.
    pub fn open(path: &Path, memory_bytes: usize) -> Result<Self> {
        Self::of(direct(&mut OpenOptions::new(), path)?, memory_bytes)
    }

    fn of(file: File, memory_bytes: usize) -> Result<Self> {
        let file_bytes = file.metadata()?.len();
        let memory = Memory::new(memory_bytes)?;
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(DEPTH_MAX as u32 * 2)
            .context("making a ring")?;
        ring.submitter().register_files(&[file.as_raw_fd()]).context("registering the file")?;
        let part = libc::iovec { iov_base: memory.start.as_ptr().cast(), iov_len: memory.bytes };
        // SAFETY: the memory is mapped until after the ring is closed: fields are dropped in their order.
        unsafe { ring.submitter().register_buffers(&[part]) }.context("registering memory (see ulimit -l)")?;
        Ok(Self { ring, memory, file, file_bytes })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Moves one request at each of `offsets`, in their order, and says how long that took.
    ///
    /// # Errors
    /// What the kernel reports. A short transfer is an error too.
    pub fn run(&mut self, transfer: Transfer, shape: Shape, offsets: &[u64]) -> Result<Duration> {
        let request_bytes = usize::try_from(shape.request_bytes)?;
        let places = self.memory.bytes / request_bytes;
        ensure!(places >= shape.depth && (1..=DEPTH_MAX).contains(&shape.depth), "{shape} does not fit in memory");
        ensure!(offsets.iter().all(|offset| offset + shape.request_bytes <= self.file_bytes), "a request past the end");
        // All of the memory is used in turn, as whoever keeps what it reads does.
        let mut free: std::collections::VecDeque<usize> = (0..places).collect();
        let (mut next, mut in_flight, mut ended, mut unsynced) = (0, 0, 0, 0);
        let mut is_syncing = false;
        let start = Instant::now();
        while ended < offsets.len() || in_flight > 0 {
            while in_flight < shape.depth
                && next < offsets.len()
                && let Some(place) = free.pop_front()
            {
                self.push(transfer, place, request_bytes, offsets[next])?;
                next += 1;
                in_flight += 1;
            }
            if let Transfer::Write { sync_bytes } = transfer
                && !is_syncing
                && unsynced >= sync_bytes
            {
                let sync = opcode::Fsync::new(types::Fixed(0)).flags(types::FsyncFlags::DATASYNC).build();
                self.push_entry(&sync.user_data(SYNC))?;
                (is_syncing, unsynced) = (true, 0);
                in_flight += 1;
            }
            self.ring.submit_and_wait(1)?;
            for completion in self.ring.completion() {
                in_flight -= 1;
                let result = completion.result();
                if completion.user_data() == SYNC {
                    ensure!(result == 0, "fdatasync: {}", std::io::Error::from_raw_os_error(-result));
                    is_syncing = false;
                    continue;
                }
                match usize::try_from(result) {
                    Ok(moved) if moved == request_bytes => {}
                    Ok(moved) => bail!("{moved} of {request_bytes} bytes were moved"),
                    Err(_) => bail!("{transfer:?}: {}", std::io::Error::from_raw_os_error(-result)),
                }
                ended += 1;
                unsynced += shape.request_bytes;
                free.push_back(usize::try_from(completion.user_data())?);
            }
        }
        if matches!(transfer, Transfer::Write { .. }) {
            self.file.sync_data()?;
        }
        Ok(start.elapsed())
    }

    fn push(&mut self, transfer: Transfer, place: usize, bytes: usize, offset: u64) -> Result<()> {
        // The place lies inside the memory, of which there are `places`.
        let start = self.memory.start.as_ptr().wrapping_add(place * bytes);
        let (file, length) = (types::Fixed(0), u32::try_from(bytes)?);
        let entry = match transfer {
            Transfer::Read => opcode::ReadFixed::new(file, start, length, 0).offset(offset).build(),
            Transfer::Write { .. } => opcode::WriteFixed::new(file, start, length, 0).offset(offset).build(),
        };
        self.push_entry(&entry.user_data(place as u64))
    }

    fn push_entry(&mut self, entry: &squeue::Entry) -> Result<()> {
        // SAFETY: an entry points into the memory, which stays mapped until after the ring is closed; nothing else uses
        // that memory, and `run` returns an error only after which nothing is read from it.
        unsafe { self.ring.submission().push(entry) }.context("the submission queue is full")
    }
}

fn direct(options: &mut OpenOptions, path: &Path) -> Result<File> {
    let options = options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(path).with_context(|| format!("opening {} for direct I/O", path.display()))
}

/// Private memory of large pages where the system has them, unmapped when dropped.
struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

impl Memory {
    fn new(bytes: usize) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        ensure!(start != libc::MAP_FAILED, "mapping {bytes} bytes: {}", std::io::Error::last_os_error());
        let start = NonNull::new(start.cast::<u8>()).context("a mapping at zero")?;
        // SAFETY: the mapping made above; a hint.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        // SAFETY: the mapping made above, which nobody else knows yet.
        let content = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), bytes) };
        SmallRng::seed_from_u64(1).fill_bytes(content);
        Ok(Self { start, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the ring that used it is closed.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
