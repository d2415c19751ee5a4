//! The file that `pegaflow pack` makes of a namespace: how it is written, signed, read and checked. The commands are the
//! program's.

mod format;
pub mod keys;
mod read;
mod write;

use std::path::Path;

use pegaflow_engine::{Error, ErrorKind};

pub use format::{Footer, Head};
#[cfg(feature = "fuzzing")]
pub(crate) use read::fuzzing;
pub use read::{Blocks, Pack};
pub use write::PackWriter;

/// The error of a file that was named and cannot be read: `NotFound`, or what the system says.
#[must_use]
pub fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("there is no file {}", path.display())),
        _ => Error::from_io(format!("cannot read {}", path.display()), error),
    }
}
