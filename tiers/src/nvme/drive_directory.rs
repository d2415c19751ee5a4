//! The directory of a drive besides the home: who may use it and what lies in it. Owns its names, its lock and the file
//! that says whose drive it is; never looks inside the file of regions.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::directory::{
    IDENTITY, LOCK, LOST_AND_FOUND, REGIONS, VERSION, lock_new, make, note_holder, refuse_network_file_systems,
    refused_by_system, try_lock,
};
use super::drive_identity::{DriveIdentity, Membership};
use super::version::{DriveUuid, StoreUuid};
use crate::error::{Error, ErrorKind, Result};

/// Stands in for the identity while that is written.
const IDENTITY_NEW: &str = "drive.new";

/// A locked directory. The lock ends with the value, or with the process.
pub(super) struct DriveDirectory {
    path: PathBuf,
    _lock: File,
    identity: Option<DriveIdentity>,
    /// Whether this value has begun to make a drive of it.
    is_begun: bool,
}

impl DriveDirectory {
    /// Creates the directory if it is missing, locks it and finds out whose drive it is. A directory that is refused is
    /// left as it was.
    ///
    /// # Errors
    /// `Locked` naming the process that holds it, `ForeignFormat`, `NewerFormat`, `Corrupt` for a damaged identity,
    /// `PermissionDenied`, `Unsupported` for a network file system, `Io`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        make(path)?;
        refuse_network_file_systems(path)?;
        let lock = match try_lock(path, false)? {
            Some(lock) => lock,
            None => {
                content(path)?;
                lock_new(path)?
            }
        };
        let identity = content(path)?;
        note_holder(path, &lock)?;
        Ok(Self { path: path.to_owned(), _lock: lock, identity, is_begun: false })
    }

    /// Locks the directory of a drive that is one; changes nothing else.
    ///
    /// # Errors
    /// `InvalidInput` if it is none, otherwise as [`DriveDirectory::open`].
    pub(super) fn open_existing(path: &Path) -> Result<Self> {
        if !path.join(IDENTITY).is_file() {
            return Err(super::fsck::no_store(path));
        }
        Self::open(path)
    }

    /// The file of regions.
    pub(super) fn regions(&self) -> PathBuf {
        self.path.join(REGIONS)
    }

    /// Whose drive it is; `None` if nobody's.
    pub(super) fn identity(&self) -> Option<DriveIdentity> {
        self.identity
    }

    /// Makes an empty drive, which is nobody's yet, of a directory that holds none.
    ///
    /// # Errors
    /// `PermissionDenied`, `Io`.
    pub(super) fn begin(&mut self) -> Result<()> {
        if self.identity.is_some() {
            return Ok(());
        }
        self.is_begun = true;
        let (store, drive) = (StoreUuid::from_bytes([0; 16]), DriveUuid::random()?);
        self.write(DriveIdentity { membership: Membership::Joining, store, drive, opens: 0 })?;
        let path = self.regions();
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map(drop).map_err(|source| refused_by_system(&format!("making {}", path.display()), source))
    }

    /// Says whose drive it is; durable when it returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn write(&mut self, identity: DriveIdentity) -> Result<()> {
        let (new, path) = (self.path.join(IDENTITY_NEW), self.path.join(IDENTITY));
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
        let written = opened
            .and_then(|mut file| {
                file.write_all(&identity.encode())?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| File::open(&self.path)?.sync_all());
        written.map_err(|source| refused_by_system(&format!("writing {}", path.display()), source))?;
        self.identity = Some(identity);
        Ok(())
    }

    /// Undoes what [`DriveDirectory::begin`] did, as far as possible.
    pub(super) fn abandon(&self) {
        if self.is_begun {
            // The identity goes last: as long as it is there, what lies beside it is known to be ours.
            for name in [REGIONS, IDENTITY_NEW, IDENTITY] {
                let _ = fs::remove_file(self.path.join(name));
            }
        }
    }
}

/// Finds out whose drive a directory is; `None` if it holds nothing.
fn content(path: &Path) -> Result<Option<DriveIdentity>> {
    let failed = |source| refused_by_system(&format!("reading {}", path.display()), source);
    let identity = match fs::read(path.join(IDENTITY)) {
        Ok(bytes) => Some(DriveIdentity::decode(&bytes).map_err(|error| {
            let remedy = "take the directory out of the configuration, or empty it";
            Error::new(error.kind(), format!("{}: {}; {remedy}", path.display(), error.message()))
        })?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => return Err(failed(source)),
    };
    let ours: &[&str] = match identity {
        Some(_) => &[LOCK, LOST_AND_FOUND, IDENTITY, IDENTITY_NEW, REGIONS],
        None => &[LOCK, LOST_AND_FOUND, IDENTITY_NEW],
    };
    if path.join(VERSION).exists() {
        let message = format!(
            "{} is the home of a store, not a further drive; list the home first, and further drives as they joined",
            path.display()
        );
        return Err(Error::new(ErrorKind::ForeignFormat, message));
    }
    for entry in fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if !ours.iter().any(|known| name == OsStr::new(known)) {
            let message =
                format!("{} holds {name:?}, so it is no drive of a store; give an empty directory", path.display());
            return Err(Error::new(ErrorKind::ForeignFormat, message));
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_is_made_and_kept_and_an_undone_one_leaves_nothing() {
        let at = tempfile::tempdir().expect("a directory");
        let path = at.path().join("deep/drive");
        let mut first = DriveDirectory::open(&path).expect("made");
        assert_eq!(first.identity(), None);
        assert_eq!(DriveDirectory::open(&path).err().map(|error| error.kind()), Some(ErrorKind::Locked));
        first.begin().expect("begun");
        assert!(first.regions().exists());
        first.abandon();
        drop(first);
        let mut second = DriveDirectory::open(&path).expect("opened");
        assert_eq!((second.identity(), second.regions().exists()), (None, false));
        second.begin().expect("begun");
        let store = StoreUuid::from_bytes([7; 16]);
        let begun = second.identity().expect("begun");
        let identity = DriveIdentity { membership: Membership::Joined, store, opens: 3, ..begun };
        second.write(identity).expect("written");
        drop(second);
        let third = DriveDirectory::open(&path).expect("opened");
        third.abandon();
        assert!(third.identity() == Some(identity) && third.regions().exists(), "what was there before stays");
    }

    #[test]
    fn a_refused_directory_is_left_as_it_was() {
        let cases: [&[(&str, &[u8])]; 5] = [
            &[("thesis.tex", b"precious")],
            &[(REGIONS, b"precious")],
            &[(VERSION, b"pegaflow-store 1\n"), (REGIONS, b"precious")],
            &[(IDENTITY, b"my own notes")],
            &[(IDENTITY, b"PEGADRIVtorn"), (REGIONS, b"half")],
        ];
        for files in cases {
            let at = tempfile::tempdir().expect("a directory");
            for (name, bytes) in files {
                fs::write(at.path().join(name), bytes).expect("written");
            }
            let kind = DriveDirectory::open(at.path()).err().map(|error| error.kind());
            assert!(matches!(kind, Some(ErrorKind::ForeignFormat | ErrorKind::Corrupt)), "{files:?}: {kind:?}");
            assert_eq!(fs::read_dir(at.path()).expect("read").count(), files.len(), "{files:?}");
            for (name, bytes) in files {
                assert_eq!(fs::read(at.path().join(name)).expect("there"), *bytes);
            }
        }
    }
}
