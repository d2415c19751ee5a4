//! What marks a directory as a store of this format: the file `VERSION`, the version number in every structure, and the
//! random identity that every header of one store carries.

use std::fmt;
use std::io::Read;

use crate::error::{Error, ErrorKind, Result};

/// The version of the format that this build reads and writes.
pub(super) const FORMAT_VERSION: u16 = 1;
const NAME: &str = "pegaflow-store";
/// Longer files named `VERSION` are not ours.
const VERSION_BYTES_MAX: usize = 64;

/// The text of the file `VERSION`.
pub(super) fn version_text() -> String {
    format!("{NAME} {FORMAT_VERSION}\n")
}

/// Checks the text of the file `VERSION`.
///
/// # Errors
/// `ForeignFormat` if it is not ours, `NewerFormat` if it is of a later version.
pub(super) fn check_version_text(text: &[u8]) -> Result<()> {
    let foreign = || {
        let shown = String::from_utf8_lossy(text.get(..VERSION_BYTES_MAX).unwrap_or(text)).into_owned();
        let message = format!("VERSION reads {shown:?}, not \"{NAME} {FORMAT_VERSION}\"; give an empty directory");
        Error::new(ErrorKind::ForeignFormat, message)
    };
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= VERSION_BYTES_MAX).ok_or_else(foreign)?;
    let version = text.trim_end().strip_prefix(NAME).and_then(|rest| rest.strip_prefix(' ')).ok_or_else(foreign)?;
    match version.parse::<u64>().map_err(|_| foreign())? {
        0 => Err(foreign()),
        version if version == u64::from(FORMAT_VERSION) => Ok(()),
        version => Err(unknown_version(version, "VERSION")),
    }
}

/// The error for a structure of a version that this build does not know.
pub(super) fn unknown_version(found: u64, structure: &'static str) -> Error {
    let message = format!(
        "the store has format version {found} ({structure}), this build reads version {FORMAT_VERSION}; use the build that wrote it, or give an empty directory"
    );
    Error::new(ErrorKind::NewerFormat, message)
}

/// The random identity of a store: a page of another store is never taken for one of this.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct StoreUuid([u8; 16]);

impl StoreUuid {
    /// A new one, from the kernel's random numbers.
    ///
    /// # Errors
    /// `Io` where `/dev/urandom` cannot be read.
    pub(super) fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
        read.map_err(|source| Error::from_io("reading /dev/urandom", source))?;
        Ok(Self(bytes))
    }

    /// From its 16 bytes.
    pub(super) const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub(super) const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// The random identity of a drive besides the home: another directory is never taken for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DriveUuid([u8; 16]);

impl DriveUuid {
    /// A new one, from the kernel's random numbers.
    ///
    /// # Errors
    /// `Io` where `/dev/urandom` cannot be read.
    pub(super) fn random() -> Result<Self> {
        StoreUuid::random().map(|uuid| Self(uuid.0))
    }

    /// From its 16 bytes.
    pub(super) const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub(super) const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for DriveUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for StoreUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_version_is_taken() {
        let kind = |text: &[u8]| check_version_text(text).map_err(|error| error.kind());
        assert_eq!(kind(version_text().as_bytes()), Ok(()));
        assert_eq!(kind(b"pegaflow-store 1"), Ok(()));
        assert_eq!(kind(b"pegaflow-store 2\n"), Err(ErrorKind::NewerFormat));
        for foreign in [&b""[..], b"pegaflow-store", b"pegaflow-store x", b"pegaflow-store 0", b"1\n", &[0xff; 9]] {
            assert_eq!(kind(foreign), Err(ErrorKind::ForeignFormat), "{foreign:?}");
        }
        let both = check_version_text(b"pegaflow-store 9").map_err(|error| error.to_string()).expect_err("newer");
        assert!(both.contains("version 9") && both.contains("version 1"), "{both}");
    }

    #[test]
    fn identities_differ() {
        assert_ne!(StoreUuid::random().expect("random"), StoreUuid::random().expect("random"));
    }
}
