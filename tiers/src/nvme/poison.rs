//! Why a store takes no more writes. The first reason stays until the store is opened again: after a failed sync nobody
//! knows what reached the drive, so nothing may be written on top of it. Also tells a drive that is gone from records
//! that are damaged: the records of a drive that does not answer are not to blame.

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use crate::error::{Error, ErrorKind};

/// After so many failures in a row, with nothing that went well in between, it is the drive and not a page of it.
pub(super) const FAILURES_MAX: u32 = 16;

/// What ended the writing of a store, to match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PoisonReason {
    /// The file system is full, or a quota or the limit on file sizes was met.
    NoSpace,
    /// The file system was made read-only.
    ReadOnly,
    /// The device does not answer any more, or refuses everything.
    DeviceGone,
    /// A sync or a write of the store's own structures failed.
    IoError,
    /// A part of the store broke down: a bug, or a kernel that broke the I/O engine.
    Broken,
}

impl PoisonReason {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::NoSpace, Self::ReadOnly, Self::DeviceGone, Self::IoError, Self::Broken];

    /// The stable name, in snake case, as it stands in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoSpace => "no_space",
            Self::ReadOnly => "read_only",
            Self::DeviceGone => "device_gone",
            Self::IoError => "io_error",
            Self::Broken => "broken",
        }
    }

    /// What an error says of the drive.
    pub fn of(cause: &Error) -> Self {
        match (cause.kind(), cause.os_code()) {
            (_, Some(libc::ENXIO | libc::ENODEV)) => Self::DeviceGone,
            (ErrorKind::NoSpace, _) => Self::NoSpace,
            // The files are open: their rights do not change any more.
            (ErrorKind::PermissionDenied, _) => Self::ReadOnly,
            (ErrorKind::Poisoned, _) => Self::Broken,
            _ => Self::IoError,
        }
    }

    /// Whether one such failure is enough to stop: another place on the drive would fail alike.
    fn is_everywhere(self) -> bool {
        matches!(self, Self::NoSpace | Self::ReadOnly | Self::DeviceGone)
    }
}

/// Told why when the store stops to take writes, on the thread that found out: must be short and must not call the store.
pub type PoisonHook = Box<dyn Fn(PoisonReason, &Error) + Send + Sync>;

#[derive(Default)]
struct State {
    cause: Option<(PoisonReason, Error)>,
    hook: Option<PoisonHook>,
}

/// Whether the store takes writes, and how its drive does.
#[derive(Default)]
pub(super) struct Poison {
    state: Mutex<State>,
    failed_writes: AtomicU32,
    failed_reads: AtomicU32,
}

impl Poison {
    /// Why the store takes no more writes, if so.
    pub(super) fn get(&self) -> Option<(PoisonReason, Error)> {
        self.state.lock().cause.clone()
    }

    /// Ends all writing; the first reason stays.
    pub(super) fn set(&self, reason: PoisonReason, why: &str, cause: &Error) {
        let mut state = self.state.lock();
        if state.cause.is_some() {
            return;
        }
        let (reason_name, cause_text) = (reason.as_str(), format!("{cause:#}"));
        tracing::error!(reason = reason_name, cause = cause_text, "{why}: the store takes no more writes");
        let message = format!("{why} ({cause}); the store takes no more writes until it is opened again");
        let error = Error::new(ErrorKind::Poisoned, message);
        if let Some(hook) = &state.hook {
            hook(reason, &error);
        }
        state.cause = Some((reason, error));
    }

    /// Has `hook` called when writing ends; at once if it has.
    pub(super) fn on_set(&self, hook: PoisonHook) {
        let mut state = self.state.lock();
        if let Some((reason, error)) = &state.cause {
            hook(*reason, error);
        }
        state.hook = Some(hook);
    }

    /// Notes how a write ended, and ends all writing if it is the drive that fails. Returns how many in a row have failed.
    pub(super) fn note_write(&self, failed: Option<&Error>) -> u32 {
        let Some(error) = failed else {
            self.failed_writes.store(0, Ordering::Relaxed);
            return 0;
        };
        let reason = PoisonReason::of(error);
        let failures = self.failed_writes.fetch_add(1, Ordering::Relaxed) + 1;
        if reason.is_everywhere() {
            self.set(reason, "the drive takes no writes", error);
        } else if failures >= FAILURES_MAX && error.kind() != ErrorKind::Closed {
            self.set(PoisonReason::DeviceGone, "many writes in a row have failed", error);
        }
        failures
    }

    /// Notes that a read went well.
    pub(super) fn note_good_read(&self) {
        // Most of the time there is nothing to change: the line stays shared between the processors.
        if self.failed_reads.load(Ordering::Relaxed) != 0 {
            self.failed_reads.store(0, Ordering::Relaxed);
        }
    }

    /// Notes a read that the drive failed; whether the drive is to blame instead of the record. `is_drive_alive` reads
    /// elsewhere: it is asked after many failures in a row.
    pub(super) fn note_failed_read(&self, error: &Error, is_drive_alive: impl FnOnce() -> bool) -> bool {
        if self.get().is_some_and(|(reason, _)| reason == PoisonReason::DeviceGone) {
            return true;
        }
        let failures = self.failed_reads.fetch_add(1, Ordering::Relaxed) + 1;
        if PoisonReason::of(error) == PoisonReason::DeviceGone {
            self.set(PoisonReason::DeviceGone, "the drive does not answer", error);
            return true;
        }
        if failures < FAILURES_MAX {
            return false;
        }
        if is_drive_alive() {
            self.failed_reads.store(0, Ordering::Relaxed);
            return false;
        }
        self.set(PoisonReason::DeviceGone, "the drive can not be read", error);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;

    fn os(code: i32) -> Error {
        Error::from_io("writing", io::Error::from_raw_os_error(code)).with("offset", 0)
    }

    #[test]
    fn causes_have_their_reasons() {
        for (code, reason) in [
            (libc::ENOSPC, PoisonReason::NoSpace),
            (libc::EDQUOT, PoisonReason::NoSpace),
            (libc::EFBIG, PoisonReason::NoSpace),
            (libc::EROFS, PoisonReason::ReadOnly),
            (libc::ENXIO, PoisonReason::DeviceGone),
            (libc::ENODEV, PoisonReason::DeviceGone),
            (libc::EIO, PoisonReason::IoError),
        ] {
            assert_eq!(PoisonReason::of(&os(code)), reason, "{code}");
        }
        assert_eq!(PoisonReason::of(&Error::new(ErrorKind::Poisoned, "a panic")), PoisonReason::Broken);
    }

    #[test]
    fn single_bad_pages_do_not_end_writing_and_a_drive_that_refuses_all_does() {
        let poison = Poison::default();
        for _ in 0..10 {
            (1..FAILURES_MAX).for_each(|_| assert_ne!(poison.note_write(Some(&os(libc::EIO))), 0));
            poison.note_write(None);
        }
        assert!(poison.get().is_none());
        (0..FAILURES_MAX).for_each(|_| assert_ne!(poison.note_write(Some(&os(libc::EIO))), 0));
        assert_eq!(poison.get().map(|(reason, _)| reason), Some(PoisonReason::DeviceGone));
        let full = Poison::default();
        full.note_write(Some(&os(libc::ENOSPC)));
        full.note_write(Some(&os(libc::ENXIO)));
        assert_eq!(full.get().map(|(reason, _)| reason), Some(PoisonReason::NoSpace), "the first reason stays");
    }

    #[test]
    fn records_are_not_blamed_for_a_drive_that_is_gone() {
        let poison = Poison::default();
        let note = |code, is_alive| poison.note_failed_read(&os(code), || is_alive);
        assert!((1..FAILURES_MAX).all(|_| !note(libc::EIO, false)), "a few bad pages");
        poison.note_good_read();
        assert!((0..2 * FAILURES_MAX).all(|_| !note(libc::EIO, true)), "a bad area of a drive that answers");
        assert!((1..FAILURES_MAX).all(|_| !note(libc::EIO, false)));
        assert!(note(libc::EIO, false) && poison.get().is_some());
        assert!(note(libc::EIO, true), "gone is gone");
        let removed = Poison::default();
        assert!(removed.note_failed_read(&os(libc::ENXIO), || true) && removed.get().is_some());
    }

    #[test]
    fn the_hook_is_called_once_also_when_it_comes_late() {
        let called = Arc::new(AtomicU32::new(0));
        let hook = || -> PoisonHook {
            let called = Arc::clone(&called);
            Box::new(move |_, _| {
                called.fetch_add(1, Ordering::Relaxed);
            })
        };
        let poison = Poison::default();
        poison.on_set(hook());
        poison.set(PoisonReason::IoError, "a sync failed", &os(libc::EIO));
        poison.set(PoisonReason::IoError, "a sync failed", &os(libc::EIO));
        assert_eq!(called.load(Ordering::Relaxed), 1);
        poison.on_set(hook());
        assert_eq!(called.load(Ordering::Relaxed), 2);
    }
}
