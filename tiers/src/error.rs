//! The one error type of the engine: a kind to match on, a message for people, context for logs.
//! It never stands for a miss: a miss is not an error.

use std::fmt;
use std::sync::Arc;

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, to match on. Messages are for people and may change; kinds are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value is outside its limits; the message names the value, the limit and the remedy.
    InvalidInput,
    /// The kernel, the file system or the device lacks what is needed.
    Unsupported,
    /// Another process holds the store.
    Locked,
    /// The directory holds something that is not a store of this engine.
    ForeignFormat,
    /// The store was written by a newer version.
    NewerFormat,
    /// The same namespace was registered with another geometry.
    GeometryMismatch,
    /// A checksum or an identity did not match; the data is not used.
    Corrupt,
    /// The operating system refused for lack of rights.
    PermissionDenied,
    /// The file system is full, or smaller than asked for.
    NoSpace,
    /// An input/output operation failed.
    Io,
    /// A bound was reached; nothing was queued. Try again later.
    Busy,
    /// A name (instance, session, lease, namespace) is not known, or no longer.
    NotFound,
    /// The bound on waiting was reached.
    Timeout,
    /// The caller cancelled.
    Cancelled,
    /// The engine or the store is closing or closed.
    Closed,
    /// An earlier failure stopped this tier: it refuses writes until it is reopened.
    Poisoned,
}

impl ErrorKind {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::InvalidInput,
        Self::Unsupported,
        Self::Locked,
        Self::ForeignFormat,
        Self::NewerFormat,
        Self::GeometryMismatch,
        Self::Corrupt,
        Self::PermissionDenied,
        Self::NoSpace,
        Self::Io,
        Self::Busy,
        Self::NotFound,
        Self::Timeout,
        Self::Cancelled,
        Self::Closed,
        Self::Poisoned,
    ];

    /// The stable machine-readable name, in snake case, as it stands in replies and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid_input",
            Self::Unsupported => "unsupported",
            Self::Locked => "locked",
            Self::ForeignFormat => "foreign_format",
            Self::NewerFormat => "newer_format",
            Self::GeometryMismatch => "geometry_mismatch",
            Self::Corrupt => "corrupt",
            Self::PermissionDenied => "permission_denied",
            Self::NoSpace => "no_space",
            Self::Io => "io",
            Self::Busy => "busy",
            Self::NotFound => "not_found",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Closed => "closed",
            Self::Poisoned => "poisoned",
        }
    }
}

/// A failure: its kind, one sentence with value, limit and remedy, and context such as file and offset.
///
/// `Display` prints one line; `{:#}` adds the context.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `message` is one sentence without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: Vec::new(), source: None }
    }

    /// Wraps an operating-system error; `ENOSPC`, `EACCES` and `EPERM` and their like get their own kinds.
    pub fn from_io(doing: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorKind::PermissionDenied,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        let message = format!("{}: {source}", doing.into());
        Self { kind, message, context: Vec::new(), source: Some(Arc::new(source)) }
    }

    /// Adds a piece of context, for example the file or the offset.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.context.push((name, value.to_string()));
        self
    }

    /// What went wrong, to match on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The system's error number, if the failure came from a system call.
    pub fn os_code(&self) -> Option<i32> {
        self.source.as_ref()?.downcast_ref::<std::io::Error>()?.raw_os_error()
    }

    /// The sentence for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The context, in the order in which it was added.
    pub fn context(&self) -> &[(&'static str, String)] {
        &self.context
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if f.alternate() {
            for (name, value) in &self.context {
                write!(f, ", {name}={value}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as _)
    }
}
