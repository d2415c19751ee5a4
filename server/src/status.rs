//! Errors on the wire: an `Error` becomes a gRPC status with the kind in its metadata, and back.

use pegaflow_engine::{Error, ErrorKind};
use tonic::{Code, Status};

/// The metadata entry that names the kind of an error.
pub const ERROR_KIND: &str = "pegaflow-error-kind";

/// The status for an error.
pub(crate) fn to_status(error: &Error) -> Status {
    let code = match error.kind() {
        ErrorKind::InvalidInput => Code::InvalidArgument,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::GeometryMismatch
        | ErrorKind::Poisoned
        | ErrorKind::Locked
        | ErrorKind::ForeignFormat
        | ErrorKind::NewerFormat => Code::FailedPrecondition,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::NoSpace | ErrorKind::Busy => Code::ResourceExhausted,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Closed => Code::Unavailable,
        _ => Code::Internal,
    };
    let mut status = Status::new(code, format!("{error:#}"));
    if let Ok(kind) = error.kind().as_str().parse() {
        status.metadata_mut().insert(ERROR_KIND, kind);
    }
    status
}

/// The kind that a peer of ours gave; `None` if the status comes from the transport instead.
pub(crate) fn kind_of(status: &Status) -> Option<ErrorKind> {
    let name = status.metadata().get(ERROR_KIND)?.to_str().ok()?;
    ErrorKind::ALL.into_iter().find(|kind| kind.as_str() == name)
}

/// The error for a status. One without our metadata comes from the transport: its code decides.
pub(crate) fn from_status(status: &Status) -> Error {
    let kind = kind_of(status).unwrap_or(match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidInput,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::PermissionDenied,
        Code::ResourceExhausted => ErrorKind::Busy,
        Code::NotFound => ErrorKind::NotFound,
        Code::DeadlineExceeded => ErrorKind::Timeout,
        Code::Unavailable | Code::Cancelled | Code::Unknown => ErrorKind::Closed,
        _ => ErrorKind::Io,
    });
    let message = match status.message() {
        "" => format!("the server answered {:?}", status.code()),
        message => message.to_owned(),
    };
    Error::new(kind, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_comes_back_as_it_was() {
        for kind in ErrorKind::ALL {
            let status = to_status(&Error::new(kind, "what").with("file", "x"));
            assert_ne!(status.code(), Code::Ok);
            let back = from_status(&status);
            assert_eq!((back.kind(), back.message()), (kind, "what, file=x"));
        }
    }

    #[test]
    fn kinds_have_the_documented_codes() {
        let code = |kind| to_status(&Error::new(kind, "")).code();
        assert_eq!(code(ErrorKind::InvalidInput), Code::InvalidArgument);
        assert_eq!(code(ErrorKind::GeometryMismatch), Code::FailedPrecondition);
        assert_eq!(code(ErrorKind::NotFound), Code::NotFound);
        assert_eq!(code(ErrorKind::Busy), Code::ResourceExhausted);
        assert_eq!(code(ErrorKind::Timeout), Code::DeadlineExceeded);
        assert_eq!(code(ErrorKind::Closed), Code::Unavailable);
    }

    #[test]
    fn a_status_of_the_transport_keeps_its_meaning() {
        assert_eq!(from_status(&Status::unavailable("gone")).kind(), ErrorKind::Closed);
        assert_eq!(from_status(&Status::out_of_range("too long")).kind(), ErrorKind::InvalidInput);
        assert_eq!(kind_of(&Status::unavailable("gone")), None);
    }
}
