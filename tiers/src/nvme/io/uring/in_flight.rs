//! The runs that the kernel holds, by number, and how much of them each file has. What is still in it when it is dropped
//! is leaked, not freed: a closed ring does not mean that the drive has stopped writing to memory.

use super::super::{FileId, IoKind};
use super::run::Run;
use crate::error::{Error, ErrorKind};

/// Runs by number; the numbers are the `user_data` of the ring.
pub(super) struct InFlight {
    places: Vec<Option<Place>>,
    free: Vec<usize>,
    /// By file.
    loads: Vec<FileLoad>,
}

/// A run, and as what it was counted in.
struct Place {
    run: Run,
    file: FileId,
    kind: IoKind,
    bytes: usize,
}

/// What the kernel holds of one file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FileLoad {
    pub(super) reads: Load,
    pub(super) writes: Load,
}

/// Runs, and their bytes as they came in. Syncs do not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) runs: usize,
    pub(super) bytes: usize,
}

impl InFlight {
    /// Room for `depth` runs on `files` files; takes more runs if it must.
    pub(super) fn new(depth: usize, files: usize) -> Self {
        let loads = vec![FileLoad::default(); files];
        Self { places: (0..depth).map(|_| None).collect(), free: (0..depth).rev().collect(), loads }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the kernel holds of a file.
    pub(super) fn load(&self, file: FileId) -> FileLoad {
        self.loads.get(file.0 as usize).copied().unwrap_or_default()
    }

    fn load_mut(&mut self, file: FileId, kind: IoKind) -> Option<&mut Load> {
        let load = self.loads.get_mut(file.0 as usize)?;
        match kind {
            IoKind::Read => Some(&mut load.reads),
            IoKind::Write => Some(&mut load.writes),
            IoKind::Sync => None,
        }
    }

    /// Keeps a run and returns its number.
    pub(super) fn insert(&mut self, run: Run) -> usize {
        let number = self.free.pop().unwrap_or(self.places.len());
        let (file, kind) = run.first().map_or((FileId(u32::MAX), IoKind::Sync), |first| (first.file(), first.kind()));
        let bytes = run.bytes();
        if let Some(load) = self.load_mut(file, kind) {
            load.runs += 1;
            load.bytes += bytes;
        }
        let place = Some(Place { run, file, kind, bytes });
        match self.places.get_mut(number) {
            Some(free) => *free = place,
            None => self.places.push(place),
        }
        number
    }

    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut Run> {
        self.places.get_mut(number)?.as_mut().map(|place| &mut place.run)
    }

    pub(super) fn remove(&mut self, number: usize) -> Option<Run> {
        let Place { run, file, kind, bytes } = self.places.get_mut(number)?.take()?;
        self.free.push(number);
        if let Some(load) = self.load_mut(file, kind) {
            load.runs -= 1;
            load.bytes -= bytes;
        }
        Some(run)
    }

    /// Completes all that is left with an error and leaks its buffers.
    pub(super) fn abandon(&mut self, error: &Error) {
        for number in 0..self.places.len() {
            if let Some(run) = self.remove(number) {
                tracing::error!(%error, "an I/O operation is given up; its memory is kept from reuse");
                run.abandon(error);
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.abandon(&Error::new(ErrorKind::Poisoned, "the I/O thread ended with operations in flight"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::super::operation::Operation;
    use super::super::super::{FileId, IoBuffer, IoKind, IoPriority, IoRequest};
    use super::*;
    use crate::dram::{Arena, ArenaConfig};

    #[test]
    fn memory_of_operations_given_up_is_never_reused() {
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(2 << 20) }).expect("memory");
        let ended = Arc::new(AtomicUsize::new(0));
        let mut in_flight = InFlight::new(3, 1);
        for offset in 0..2 {
            let slot = Arc::new(arena.alloc(4096).expect("room"));
            let buffer = Some(IoBuffer::Slot { slot, bytes: 8192 });
            let done = Box::new({
                let ended = Arc::clone(&ended);
                move |completion: super::super::super::IoCompletion| {
                    assert!(completion.buffer.is_none());
                    assert_eq!(completion.result.expect_err("given up").kind(), ErrorKind::Poisoned);
                    ended.fetch_add(1, Ordering::SeqCst);
                }
            });
            let priority = IoPriority::Demand;
            let request = IoRequest { file: FileId(0), kind: IoKind::Read, offset, buffer, priority, done };
            in_flight.insert(Run::new(vec![Operation::new(request, true, 4096)]));
        }
        assert_eq!((in_flight.len(), in_flight.is_empty()), (2, false));
        let (reads, writes) = (Load { runs: 2, bytes: 2 * 8192 }, Load::default());
        assert_eq!(in_flight.load(FileId(0)), FileLoad { reads, writes });
        drop(in_flight);
        assert_eq!((ended.load(Ordering::SeqCst), arena.used_bytes()), (2, 2 * 8192));
    }
}
