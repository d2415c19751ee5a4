//! The exit status of the programs: stable, documented in `docs/operations.md`.

use pegaflow_engine::ErrorKind;

/// How a program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Everything done; everything accepted before is durable.
    Ok = 0,
    /// It failed, for any reason that has no number of its own: no space, an input or output error, problems found.
    Failed = 1,
    /// The command line or the configuration is invalid.
    Usage = 2,
    /// What was named is not there.
    NotFound = 3,
    /// Refused: lack of rights, or it is something else than what it should be (a foreign store, a newer format).
    Refused = 4,
    /// Unavailable: no server, no answer in time, too busy, or another process holds the store or the socket.
    Unavailable = 5,
}

impl From<ErrorKind> for ExitStatus {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidInput => Self::Usage,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::PermissionDenied
            | ErrorKind::ForeignFormat
            | ErrorKind::NewerFormat
            | ErrorKind::GeometryMismatch => Self::Refused,
            ErrorKind::Locked | ErrorKind::Closed | ErrorKind::Timeout | ErrorKind::Busy => Self::Unavailable,
            _ => Self::Failed,
        }
    }
}

impl From<ExitStatus> for std::process::ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}
