//! What a store stands on: the I/O engine, the database of its index, the small file of namespaces. The system's own, or
//! simulated ones whose power can be cut. Lock, names and preallocation stay with the directory, on a real file system.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::calibration::CalibrationPlan;
use super::config::StoreConfig;
use super::io::{BlockIo, open_engine};
use crate::dram::Arena;
use crate::error::{Error, Result};
use crate::index::IndexLog;

/// Makes the parts of a store that keep bytes.
pub(super) trait Backing: Send + Sync {
    /// The engine for the files of superblocks and regions; [`FileId`](super::io::FileId) is the place in `files`.
    ///
    /// # Errors
    /// What [`open_engine`] reports.
    fn engine(&self, config: &StoreConfig, files: &[File], arena: &Arc<Arena>) -> Result<Arc<dyn BlockIo>>;

    /// The log of the index in the directory `path`, made if there is none.
    ///
    /// # Errors
    /// What [`IndexLog::open`] reports.
    fn index(&self, path: &Path) -> Result<IndexLog>;

    /// The file `path`, made if it is missing.
    ///
    /// # Errors
    /// What the file system reports.
    fn small_file(&self, path: &Path) -> Result<Box<dyn SmallFile>>;

    /// How the drives are measured; `None` where they have no speed.
    fn calibration(&self) -> Option<CalibrationPlan>;
}

/// A file that is read once and appended to now and then, by one thread at a time.
pub(super) trait SmallFile: Send {
    /// All of it.
    ///
    /// # Errors
    /// What the file system reports.
    fn read_all(&mut self) -> io::Result<Vec<u8>>;

    /// Writes at an offset.
    ///
    /// # Errors
    /// What the file system reports; then some of it may be there.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// What the file system reports; then nothing of it may be believed.
    fn sync(&mut self) -> io::Result<()>;
}

/// The system's own.
pub(super) struct System;

impl Backing for System {
    fn engine(&self, config: &StoreConfig, files: &[File], arena: &Arc<Arena>) -> Result<Arc<dyn BlockIo>> {
        open_engine(config.io, files, arena, config.depth_of_all())
    }

    fn index(&self, path: &Path) -> Result<IndexLog> {
        IndexLog::open(path)
    }

    fn small_file(&self, path: &Path) -> Result<Box<dyn SmallFile>> {
        open_small_file(path).map(|file| Box::new(file) as _)
    }

    fn calibration(&self) -> Option<CalibrationPlan> {
        Some(CalibrationPlan::default())
    }
}

/// Opens a small file, and makes it if it is missing.
pub(super) fn open_small_file(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    opened.map_err(|source| Error::from_io(format!("opening {}", path.display()), source))
}

impl SmallFile for File {
    fn read_all(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.rewind()?;
        self.read_to_end(&mut bytes).map(|_| bytes)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.seek(SeekFrom::Start(offset))?;
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}
