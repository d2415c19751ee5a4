//! Files with secrets: nobody but their owner may read or change them, and the owner is the user of this process or root.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pegaflow_engine::{Error, ErrorKind, Result};

/// Longer files are not what they should be.
const BYTES_MAX: u64 = 1 << 20;

/// Reads such a file.
///
/// # Errors
/// `PermissionDenied` for a file that others have rights to or own, `InvalidInput` for one above 1 MiB or that is no text,
/// and what the file system reports.
pub(crate) fn read(what: &str, path: &Path) -> Result<String> {
    let failed = |source| Error::from_io(format!("reading {what} {}", path.display()), source);
    let file = std::fs::File::open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    let user = rustix::process::geteuid().as_raw();
    let denied = |why: String| Err(Error::new(ErrorKind::PermissionDenied, format!("{what} {} {why}", path.display())));
    if found.mode() & 0o077 != 0 {
        return denied(format!("has mode {:03o}: others can read or change it; chmod 600 it", found.mode() & 0o777));
    }
    if found.uid() != user && found.uid() != 0 {
        return denied(format!("belongs to user {}, not to {user} or root; chown it", found.uid()));
    }
    if found.len() > BYTES_MAX {
        let message = format!("{what} {} has {} bytes; give at most {BYTES_MAX}", path.display(), found.len());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut text = String::new();
    file.take(BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}
