//! Which engine serves a store: asked for by name, or found out by a real read through a ring.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::files::Files;
use super::psync::PsyncIo;
use super::uring::{DEPTH_MAX, RingOptions, UringIo};
use super::{BlockIo, FileId, IO_ALIGN, IoBuffer, IoKind, Pages, sync_blocking, transfer_blocking};
use crate::dram::Arena;
use crate::error::{Error, ErrorKind, Result};

/// How long a drive may take to answer the probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// Which engine to use; `auto`, `io_uring` or `psync` in configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum IoChoice {
    /// io_uring if a read through a ring works, otherwise `psync` after a warning. The default.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// io_uring or an error.
    #[serde(rename = "io_uring")]
    IoUring,
    /// `pread` and `pwrite` on four threads.
    #[serde(rename = "psync")]
    Psync,
}

/// Opens an engine on `files`, whose descriptors it duplicates; [`FileId`] is the place in `files`. `depth` is the most
/// operations in flight, 1 to 4096 (`psync` has never more than four). The slots of `arena` are registered with the
/// kernel where it takes them; other memory works too.
///
/// # Errors
/// For [`IoChoice::IoUring`] why the kernel gives no ring, with the remedy. `InvalidInput` for a depth outside the
/// limits. `Timeout` if the drive does not answer.
pub fn open_engine(
    choice: IoChoice,
    files: &[impl AsFd],
    arena: &Arc<Arena>,
    depth: usize,
) -> Result<Arc<dyn BlockIo>> {
    if !(1..=DEPTH_MAX).contains(&depth) {
        let message = format!("an I/O queue depth of {depth} is outside 1 to {DEPTH_MAX}; 64 suits one drive");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let psync = || -> Result<Arc<dyn BlockIo>> { Ok(Arc::new(PsyncIo::open(Files::adopt(files)?, depth)?)) };
    if choice == IoChoice::Psync {
        return psync();
    }
    match open_ring(files, arena, depth) {
        Ok(engine) => Ok(engine),
        // A drive that does not answer would not answer another engine either.
        Err(error) if choice == IoChoice::IoUring || error.kind() == ErrorKind::Timeout => Err(error),
        Err(error) => {
            tracing::warn!(%error, "io_uring is not used; falling back to pread and pwrite");
            psync()
        }
    }
}

fn open_ring(files: &[impl AsFd], arena: &Arc<Arena>, depth: usize) -> Result<Arc<dyn BlockIo>> {
    let engine: Arc<dyn BlockIo> = Arc::new(UringIo::open(Files::adopt(files)?, arena, RingOptions::new(depth))?);
    if files.is_empty() {
        return Ok(engine);
    }
    match probe(&*engine, arena) {
        Ok(()) => Ok(engine),
        Err(error) => {
            if error.kind() == ErrorKind::Timeout {
                // Closing waits for the drive, which does not answer: the thread and its memory are left behind.
                std::mem::forget(engine);
            }
            Err(error)
        }
    }
}

/// A read from the first file, into registered memory and into other memory, and a sync.
fn probe(engine: &dyn BlockIo, arena: &Arc<Arena>) -> Result<()> {
    let slot = arena.alloc(IO_ALIGN).map(|slot| IoBuffer::Slot { slot: Arc::new(slot), bytes: IO_ALIGN });
    for buffer in slot.into_iter().chain([IoBuffer::Pages(Pages::new(IO_ALIGN))]) {
        match transfer_blocking(engine, FileId(0), IoKind::Read, 0, buffer, PROBE_TIMEOUT) {
            Ok(_) => {}
            // A file that is still empty: the kernel has answered, which is all that was asked.
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            Err(error) => return Err(error),
        }
    }
    sync_blocking(engine, FileId(0), PROBE_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::tests::{arena, directory, is_denied};
    use super::*;

    #[test]
    fn each_choice_opens_its_engine() {
        let directory = directory();
        let path = directory.path().join("region");
        std::fs::write(&path, [0; 8192]).expect("a file");
        let (file, ..) = super::super::open_direct(&path).expect("opened");
        let arena = arena(1);
        let open = |choice, depth| open_engine(choice, &[&file], &arena, depth);
        let psync = open(IoChoice::Psync, 64).expect("psync");
        assert_eq!((psync.name(), psync.depth()), ("psync", 4));
        match open(IoChoice::IoUring, 64) {
            Ok(ring) => {
                assert_eq!((ring.name(), ring.depth()), ("io_uring", 64));
                assert_eq!(open(IoChoice::Auto, 64).expect("a ring").name(), "io_uring");
            }
            Err(error) => {
                assert!(is_denied(&error), "{error}");
                assert_eq!(open(IoChoice::Auto, 64).expect("the fallback").name(), "psync");
            }
        }
        for depth in [0, DEPTH_MAX + 1] {
            assert_eq!(open(IoChoice::Auto, depth).err().map(|error| error.kind()), Some(ErrorKind::InvalidInput));
        }
        assert_eq!(arena.used_bytes(), 0, "the probe gave its memory back");
    }

    #[test]
    fn a_read_that_cannot_work_leads_to_the_fallback() {
        let directory = directory();
        let unreadable = File::create(directory.path().join("write-only")).expect("a file");
        let arena = arena(1);
        assert!(open_engine(IoChoice::IoUring, &[&unreadable], &arena, 8).is_err());
        assert_eq!(open_engine(IoChoice::Auto, &[&unreadable], &arena, 8).expect("the fallback").name(), "psync");
    }

    #[test]
    fn an_empty_file_is_enough_for_the_probe() {
        let file = tempfile::tempfile_in(directory().path()).expect("a file");
        let engine = open_engine(IoChoice::Auto, &[file], &arena(1), 8).expect("an engine");
        engine.close();
    }

    #[test]
    fn choices_have_names_in_configuration() {
        for (choice, name) in [(IoChoice::Auto, "auto"), (IoChoice::IoUring, "io_uring"), (IoChoice::Psync, "psync")] {
            assert_eq!(serde_json::to_value(choice).expect("a name"), name);
            assert_eq!(serde_json::from_value::<IoChoice>(name.into()).expect("a choice"), choice);
        }
    }
}
