//! The exit status of the programs: stable, documented in `docs/operations.md`.

use pegaflow_engine::ErrorKind;

/// How a program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Everything done; everything accepted before is durable.
    Ok = 0,
    /// Anything that has no number of its own.
    Other = 1,
    /// The command line or the configuration is invalid.
    Usage = 2,
    /// Another process holds the store or the socket.
    Locked = 3,
    /// The directory holds a foreign store, or one of a newer version.
    Format = 4,
    /// The operating system refused for lack of rights.
    Permission = 5,
    /// The file system is full, or smaller than asked for.
    NoSpace = 6,
    /// Reading or writing failed.
    Io = 7,
}

impl From<ErrorKind> for ExitStatus {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidInput => Self::Usage,
            ErrorKind::Locked => Self::Locked,
            ErrorKind::ForeignFormat | ErrorKind::NewerFormat => Self::Format,
            ErrorKind::PermissionDenied => Self::Permission,
            ErrorKind::NoSpace => Self::NoSpace,
            ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::Poisoned => Self::Io,
            _ => Self::Other,
        }
    }
}

impl From<ExitStatus> for std::process::ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}
