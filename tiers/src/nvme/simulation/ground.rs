//! What a simulated store stands on: the drive in memory, the twin of RocksDB, the file of namespaces on the same drive.
//! Names and the lock are real and lie in a real directory, in memory where there is such a file system.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::dram::Arena;
use crate::error::{Error, Result};
use crate::index::{IndexLog, TwinEvents, TwinIndex};
use crate::nvme::backing::{Backing, SmallFile, open_small_file};
use crate::nvme::calibration::CalibrationPlan;
use crate::nvme::config::StoreConfig;
use crate::nvme::io::{BlockIo, SimDisk, SimIo, SimOperation};

/// The drive, and the index on it.
#[derive(Clone)]
pub(in crate::nvme) struct SimBacking {
    pub(in crate::nvme) disk: Arc<SimDisk>,
    pub(in crate::nvme) index: TwinIndex,
}

impl Backing for SimBacking {
    fn engine(&self, config: &StoreConfig, files: &[File], _arena: &Arc<Arena>) -> Result<Arc<dyn BlockIo>> {
        let engine = SimIo::open(&self.disk, files, config.depth_of_all());
        Ok(Arc::new(engine.map_err(|source| Error::from_io("looking at the files of the store", source))?))
    }

    fn index(&self, path: &Path) -> Result<IndexLog> {
        // The directory stands for the database: whoever removes it removes what was in there.
        if !path.exists() {
            std::fs::create_dir(path).map_err(|source| Error::from_io("making the index", source))?;
            self.index.clear();
        }
        self.index.open(Arc::new(Events(Arc::clone(&self.disk))))
    }

    fn small_file(&self, path: &Path) -> Result<Box<dyn SmallFile>> {
        let file = open_small_file(path)?;
        let file = file.metadata().map_err(|source| Error::from_io("looking at a small file", source))?;
        Ok(Box::new(OnDisk { disk: Arc::clone(&self.disk), number: file.ino() }))
    }

    fn calibration(&self) -> Option<CalibrationPlan> {
        None
    }
}

struct Events(Arc<SimDisk>);

impl TwinEvents for Events {
    fn before(&self, is_write: bool) -> Result<()> {
        self.0.count(if is_write { SimOperation::IndexWrite } else { SimOperation::IndexRead })
    }
}

/// A small file on the simulated drive.
struct OnDisk {
    disk: Arc<SimDisk>,
    number: u64,
}

impl SmallFile for OnDisk {
    fn read_all(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.disk.with_file(self.number, |file, _| file.live().to_vec()))
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let write = self.disk.with_file(self.number, |file, now| file.begin_write(offset, bytes.to_vec(), now));
        self.disk.count(SimOperation::SmallFile).map_err(io::Error::other)?;
        self.disk.with_file(self.number, |file, now| file.end_write(write, 0..bytes.len(), now));
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.count(SimOperation::SmallFile).map_err(io::Error::other)?;
        self.disk.with_file(self.number, |file, now| file.sync(now));
        Ok(())
    }
}
