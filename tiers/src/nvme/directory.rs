//! The directory of a store: who may open it, what lies in it, and how it comes into being. Owns the names, the lock
//! and the preallocation; never looks inside the files.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs, statfs};

use super::encryption::KEY_FILES;
use super::version::{check_version_text, version_text};
use crate::error::{Error, ErrorKind, Result};

pub(super) const LOCK: &str = "LOCK";
pub(super) const VERSION: &str = "VERSION";
/// Stands in for `VERSION` while a store is being made; the rename is the moment in which it exists.
const VERSION_NEW: &str = "VERSION.new";
const SUPERBLOCK: &str = "superblock";
pub(super) const REGIONS: &str = "regions.0";
const NAMESPACES: &str = "namespaces";
const INDEX: &str = "index";
/// What was measured of the drives; see `calibration.rs`.
const CALIBRATION: &str = "calibration.json";
/// Taken and given back to see whether there is room; see [`check_writable`].
const PROBE: &str = "probe";
/// What RocksDB takes at once for a log, so that what passes the probe can be opened.
const PROBE_BYTES: u64 = 48 << 20;
/// Says whose drive a directory is, in directories besides the home.
pub(super) const IDENTITY: &str = "drive";
/// Not ours, and harmless: the root of an ext4 file system has it.
pub(super) const LOST_AND_FOUND: &str = "lost+found";

/// File systems on which neither locks nor `fdatasync` mean what this store needs, by their magic numbers.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 13] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9P"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
];

/// A locked directory. The lock ends with the value, or with the process.
pub(super) struct Directory {
    path: PathBuf,
    _lock: File,
    is_new: bool,
}

impl Directory {
    /// Creates the directory if it is missing, locks it and finds out what it holds. A directory that is refused is left
    /// as it was.
    ///
    /// # Errors
    /// `Locked` naming the process that holds it, `ForeignFormat`, `NewerFormat`, `PermissionDenied`, `Unsupported` for
    /// a network file system, `Io`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        make(path)?;
        refuse_network_file_systems(path)?;
        let found = try_lock(path, false)?;
        // Without a lock to take, whatever is not ours must be seen before one is made.
        let lock = match found {
            Some(lock) => lock,
            None => {
                content(path)?;
                lock_new(path)?
            }
        };
        let is_new = content(path)? == Content::Nothing;
        note_holder(path, &lock)?;
        let directory = Self { path: path.to_owned(), _lock: lock, is_new };
        if is_new {
            directory.start_over()?;
        }
        Ok(directory)
    }

    /// Locks the directory of a store that is there; changes nothing else.
    ///
    /// # Errors
    /// `InvalidInput` if there is none, otherwise as [`Directory::open`].
    pub(super) fn open_existing(path: &Path) -> Result<Self> {
        if !Self::is_store(path) {
            return Err(super::fsck::no_store(path));
        }
        Self::open(path)
    }

    /// Whether a directory is the home of a store.
    pub(super) fn is_store(path: &Path) -> bool {
        path.join(VERSION).is_file()
    }

    /// The file of superblocks of the store in `path`.
    pub(super) fn superblock_of(path: &Path) -> PathBuf {
        path.join(SUPERBLOCK)
    }

    /// Whether the store has yet to be made.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// The file of superblocks.
    pub(super) fn superblock(&self) -> PathBuf {
        self.path.join(SUPERBLOCK)
    }

    /// The file of regions.
    pub(super) fn regions(&self) -> PathBuf {
        self.path.join(REGIONS)
    }

    /// The file of namespaces.
    pub(super) fn namespaces(&self) -> PathBuf {
        self.path.join(NAMESPACES)
    }

    /// A file in it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory of the index.
    pub(super) fn index(&self) -> PathBuf {
        self.path.join(INDEX)
    }

    /// The file of what was measured of the drives.
    pub(super) fn calibration(&self) -> PathBuf {
        self.path.join(CALIBRATION)
    }

    /// Removes the index, so that it can be rebuilt.
    ///
    /// # Errors
    /// `PermissionDenied`, `Io`.
    pub(super) fn wipe_index(&self) -> Result<()> {
        match fs::remove_dir_all(self.index()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::from_io(format!("removing the damaged index {}", self.index().display()), error))
            }
            _ => Ok(()),
        }
    }

    /// Ends the making of a store: all its files are there and durable.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn complete(&mut self) -> Result<()> {
        let renamed = fs::rename(self.path.join(VERSION_NEW), self.path.join(VERSION)).and_then(|()| self.sync());
        renamed.map_err(|source| Error::from_io("completing the store", source))?;
        self.is_new = false;
        Ok(())
    }

    /// Undoes the making of a store that did not succeed, as far as possible.
    pub(super) fn abandon(&self) {
        // The mark goes last: as long as it is there, what lies beside it is known to be ours.
        for name in [REGIONS, SUPERBLOCK, NAMESPACES, KEY_FILES[0], KEY_FILES[1], VERSION_NEW] {
            let _ = fs::remove_file(self.path.join(name));
        }
    }

    /// Makes the names in the directory durable.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    /// Removes what an interrupted making left and marks that a new one has begun.
    fn start_over(&self) -> Result<()> {
        self.wipe_index()?;
        self.abandon();
        let path = self.path.join(VERSION_NEW);
        let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|mut file| {
            file.write_all(version_text().as_bytes())?;
            file.sync_all()
        });
        written
            .and_then(|()| self.sync())
            .map_err(|source| Error::from_io(format!("writing {}", path.display()), source))
    }
}

/// What a directory holds that is not refused.
#[derive(PartialEq, Eq)]
enum Content {
    Store,
    /// Nothing, or what an interrupted making left.
    Nothing,
}

pub(super) fn make(path: &Path) -> Result<()> {
    if fs::metadata(path).is_ok_and(|found| !found.is_dir()) {
        let message = format!("{} is a file, not a directory; give a directory for the store", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| refused_by_system(&format!("making the store's directory {}", path.display()), source))
}

/// The system's error, with the remedy where rights are missing.
pub(super) fn refused_by_system(doing: &str, source: std::io::Error) -> Error {
    let error = Error::from_io(doing, source);
    if error.kind() != ErrorKind::PermissionDenied {
        return error;
    }
    let user = rustix::process::geteuid().as_raw();
    let message = format!("{}; give a directory that user {user} may write, or change its owner", error.message());
    Error::new(ErrorKind::PermissionDenied, message)
}

/// Takes the lock; `None` if there is no such file and none is to be made. Changes nothing else.
pub(super) fn try_lock(path: &Path, make: bool) -> Result<Option<File>> {
    let name = path.join(LOCK);
    let opened = OpenOptions::new().read(true).write(true).create(make).truncate(false).mode(0o600).open(&name);
    let file = match opened {
        Ok(file) => file,
        Err(error) if !make && error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(refused_by_system(&format!("opening {}", name.display()), source)),
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = (&file).take(32).read_to_string(&mut holder);
            let message = format!(
                "the store in {} is in use by process {}; stop it, or use another directory",
                path.display(),
                holder.trim()
            );
            Err(Error::new(ErrorKind::Locked, message))
        }
        Err(TryLockError::Error(source)) => Err(Error::from_io(format!("locking {}", name.display()), source)),
    }
}

/// Makes the lock and takes it.
pub(super) fn lock_new(path: &Path) -> Result<File> {
    try_lock(path, true)?.ok_or_else(|| Error::new(ErrorKind::Io, "LOCK was made and is not there"))
}

/// Leaves this process's number in the lock for whoever comes second.
pub(super) fn note_holder(path: &Path, mut lock: &File) -> Result<()> {
    let written = lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
    written.map_err(|source| Error::from_io(format!("writing {}", path.join(LOCK).display()), source))
}

pub(super) fn refuse_network_file_systems(path: &Path) -> Result<()> {
    let found =
        statfs(path).map_err(|source| Error::from_io(format!("looking at {}", path.display()), source.into()))?;
    // The kernel's magic numbers have 32 bits, in a field that may be signed and wider.
    let magic = u64::from(found.f_type as u32);
    match NETWORK_FILE_SYSTEMS.iter().find(|(known, _)| *known == magic) {
        None => Ok(()),
        Some((_, name)) => {
            let message = format!("{} lies on {name}; a store needs a local file system: ext4 or XFS", path.display());
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

/// Finds out what a directory holds. Without `VERSION` that may be nothing but what an interrupted making leaves: it is
/// removed afterwards, so nobody else's file may be taken for it.
fn content(path: &Path) -> Result<Content> {
    let failed = |source| refused_by_system(&format!("reading {}", path.display()), source);
    let read = |name: &str| match fs::read(path.join(name)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed(source)),
    };
    if let Some(text) = read(VERSION)? {
        check_version_text(&text).map_err(|error| error.with("path", path.display()))?;
        return Ok(Content::Store);
    }
    let begun = read(VERSION_NEW)?;
    let ours: &[&str] = match &begun {
        Some(text) if check_version_text(text).is_ok() => {
            &[LOCK, LOST_AND_FOUND, VERSION_NEW, REGIONS, SUPERBLOCK, NAMESPACES, KEY_FILES[0], KEY_FILES[1], INDEX]
        }
        // The mark is the first file of a making: where it is torn, there is no other.
        Some(text) if version_text().as_bytes().starts_with(text) => &[LOCK, LOST_AND_FOUND, VERSION_NEW],
        _ => &[LOCK, LOST_AND_FOUND],
    };
    if path.join(IDENTITY).exists() {
        let message = format!(
            "{} is a further drive of a store, not its home; list the home first, and further drives as they joined",
            path.display()
        );
        return Err(Error::new(ErrorKind::ForeignFormat, message));
    }
    for entry in fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if !ours.iter().any(|known| name == OsStr::new(known)) {
            let message = format!(
                "{} holds {name:?} and no {VERSION}, so it is no store of this engine; give an empty directory",
                path.display()
            );
            return Err(Error::new(ErrorKind::ForeignFormat, message));
        }
    }
    Ok(Content::Nothing)
}

/// Whether files in a store's directory can be made and written, with room for what an open needs. Leaves nothing.
///
/// # Errors
/// `InvalidInput` if there is no store, `NoSpace`, `PermissionDenied`, `Io`.
pub(super) fn check_writable(path: &Path) -> Result<()> {
    // Where its file system is not mounted an open would make a new one.
    if !Directory::is_store(path) {
        return Err(super::fsck::no_store(path));
    }
    let probe = path.join(PROBE);
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&probe);
    let written = opened.and_then(|mut file| {
        match fallocate(&file, FallocateFlags::empty(), 0, PROBE_BYTES) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        file.write_all(&[0; 4096])?;
        file.sync_all()
    });
    let _ = fs::remove_file(&probe);
    written.map_err(|source| Error::from_io(format!("writing into {}", path.display()), source))
}

/// Makes a file of `bytes` bytes, or grows it to them, all taken from the file system now.
///
/// # Errors
/// `NoSpace` naming what is needed and what is free, otherwise what the file system reports.
pub(super) fn preallocate(path: &Path, bytes: u64) -> Result<()> {
    let failed =
        |source: std::io::Error| Error::from_io(format!("taking {bytes} bytes for {}", path.display()), source);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = opened.map_err(failed)?;
    let held = file.metadata().map_err(failed)?.len();
    if held >= bytes {
        return Ok(());
    }
    let needed = bytes - held;
    let space = fstatvfs(&file).map_err(|source| failed(source.into()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let no_space = || {
        let message = format!(
            "{} needs {needed} bytes more, {free} are free on its file system; free some, or give a smaller capacity",
            path.display()
        );
        Error::new(ErrorKind::NoSpace, message)
    };
    if free < needed {
        return Err(no_space());
    }
    match fallocate(&file, FallocateFlags::empty(), held, needed) {
        Ok(()) => file.sync_all().map_err(failed),
        Err(error) => {
            // Only what was just added is given back: the file may hold a store.
            let _ = file.set_len(held);
            match error {
                rustix::io::Errno::NOSPC => Err(no_space()),
                rustix::io::Errno::FBIG => {
                    let message = format!(
                        "{} of {bytes} bytes is larger than a file may be here; raise the limit (ulimit -f), or give a smaller capacity",
                        path.display()
                    );
                    Err(Error::new(ErrorKind::NoSpace, message))
                }
                error => Err(failed(error.into())),
            }
        }
    }
}

/// Gives back what a file has beyond `bytes` bytes.
///
/// # Errors
/// What the file system reports.
pub(super) fn truncate(path: &Path, bytes: u64) -> Result<()> {
    let failed = |source| Error::from_io(format!("cutting {} to {bytes} bytes", path.display()), source);
    let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() > bytes {
        file.set_len(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsString;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn temporary() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    fn kind(path: &Path) -> Option<ErrorKind> {
        Directory::open(path).err().map(|error| error.kind())
    }

    #[test]
    fn a_store_exists_when_it_is_complete_and_not_before() {
        let at = temporary();
        let path = at.path().join("deep/store");
        let first = Directory::open(&path).expect("made");
        assert!(first.is_new());
        fs::write(first.regions(), b"half").expect("written");
        drop(first);
        let mut second = Directory::open(&path).expect("an interrupted making is started over");
        assert!(second.is_new() && !second.regions().exists());
        second.complete().expect("completed");
        drop(second);
        assert!(!Directory::open(&path).expect("there").is_new());
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join(LOCK)), mode(&path.join(VERSION))), (0o700, 0o600, 0o600));
    }

    #[test]
    fn the_second_opener_is_told_who_holds_it() {
        let at = temporary();
        let held = Directory::open(at.path()).expect("made");
        let error = Directory::open(at.path()).err().expect("locked");
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.message().contains(&std::process::id().to_string()), "{error}");
        drop(held);
        assert_eq!(kind(at.path()), None);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let at = temporary();
        fs::write(at.path().join("thesis.tex"), b"precious").expect("written");
        assert_eq!(kind(at.path()), Some(ErrorKind::ForeignFormat));
        assert!(!at.path().join(LOCK).exists());
        let at = temporary();
        fs::write(at.path().join(VERSION), b"another-store 1\n").expect("written");
        assert_eq!(kind(at.path()), Some(ErrorKind::ForeignFormat));
        fs::write(at.path().join(VERSION), b"pegaflow-store 2\n").expect("written");
        assert_eq!(kind(at.path()), Some(ErrorKind::NewerFormat));
    }

    /// Every file of a directory with its content.
    fn snapshot(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
        let entries = fs::read_dir(path).expect("read").map(|entry| entry.expect("entry"));
        entries.map(|entry| (entry.file_name(), fs::read(entry.path()).expect("read"))).collect()
    }

    #[test]
    fn a_refused_directory_is_left_as_it_was() {
        let cases: [&[(&str, &str)]; 7] = [
            &[("thesis.tex", "precious")],
            &[(VERSION, "another-store 1\n"), (REGIONS, "precious")],
            &[(VERSION, "pegaflow-store 2\n"), (REGIONS, "precious")],
            &[(LOCK, ""), ("CURRENT", "precious")],
            &[(LOCK, "somebody"), (VERSION, "pegaflow-store 2\n")],
            &[(VERSION_NEW, "my own notes"), (REGIONS, "precious")],
            &[(VERSION_NEW, "pegaflow-store 1\n"), (REGIONS, "half"), ("thesis.tex", "precious")],
        ];
        for files in cases {
            let at = temporary();
            for (name, text) in files {
                fs::write(at.path().join(name), text).expect("written");
            }
            let before = snapshot(at.path());
            let kind = kind(at.path());
            assert!(matches!(kind, Some(ErrorKind::ForeignFormat | ErrorKind::NewerFormat)), "{files:?}: {kind:?}");
            assert_eq!(snapshot(at.path()), before, "{files:?}");
        }
    }

    #[test]
    fn a_making_that_was_interrupted_at_its_mark_is_started_over() {
        for text in ["", "pegaflow"] {
            let at = temporary();
            fs::write(at.path().join(VERSION_NEW), text).expect("written");
            assert_eq!(kind(at.path()), None, "{text:?}");
        }
    }

    #[test]
    fn a_directory_that_may_not_be_made_is_a_matter_of_rights() {
        let error = Directory::open(Path::new("/sys/pegaflow-test")).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let user = rustix::process::geteuid().as_raw().to_string();
        assert!(error.message().contains("/sys/pegaflow-test") && error.message().contains(&user), "{error}");
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_named() {
        let at = temporary();
        let path = at.path().join("file");
        fs::write(&path, b"precious").expect("written");
        let error = Directory::open(&path).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.message().contains("is a file"), "{error}");
        assert_eq!(fs::read(&path).expect("there"), b"precious");
    }

    #[test]
    fn a_file_larger_than_the_drive_is_refused_with_the_numbers() {
        let at = temporary();
        let path = at.path().join("large");
        preallocate(&path, 1 << 20).expect("fits");
        let error = preallocate(&path, 1 << 60).expect_err("too large");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(error.message().contains(&((1u64 << 60) - (1 << 20)).to_string()), "{error}");
        assert_eq!(fs::metadata(&path).expect("there").len(), 1 << 20);
    }
}
