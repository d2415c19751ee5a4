//! What the system knows of this process.

use std::time::{SystemTime, UNIX_EPOCH};

/// Memory and descriptors. 0 where the system does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Process {
    pub(crate) start_unix_seconds: f64,
    pub(crate) resident_bytes: u64,
    pub(crate) open_fds: u64,
    pub(crate) max_fds: u64,
}

impl Process {
    /// As it is now; it was started at `start`.
    pub(crate) fn read(start: SystemTime) -> Self {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        Self {
            start_unix_seconds: start.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            resident_bytes: pages * rustix::param::page_size() as u64,
            open_fds: std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64),
            max_fds: limit.current.unwrap_or(0),
        }
    }
}
