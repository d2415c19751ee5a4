#![expect(missing_docs, reason = "stub")]
use crate::*;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    pub region: u32,
    pub generation: u64,
    pub page: u32,
    pub pages: u32,
}
#[derive(Clone, Copy, Debug)]
pub enum IoChoice {
    Auto,
    IoUring,
    Psync,
}
pub struct StoreConfig {
    pub path: PathBuf,
    pub capacity_bytes: u64,
    pub region_bytes: u64,
    pub io: IoChoice,
    pub queue_depth: usize,
    pub commit_interval: Duration,
    pub commit_bytes: u64,
    pub write_queue_bytes: u64,
}
pub struct Store;
pub struct RegionPins;
#[derive(Debug)]
pub struct RecoveryReport {
    pub recovered_records: u64,
}
pub struct RegionInfo {
    pub region: u32,
    pub last_access: u64,
    pub first_sequence: u64,
}
pub struct Verified {
    pub payload_bytes: u64,
    pub parent: BlockKey,
}
pub type AppendDone = Box<dyn FnOnce(Result<Location>) + Send>;
pub type ReadDone = Box<dyn FnOnce(Result<Verified>) + Send>;
pub struct Append {
    pub id: RecordId,
    pub kind: RecordKind,
    pub parent: BlockKey,
    pub depth: u32,
    pub slot: Option<Arc<Slot>>,
    pub payload_bytes: u64,
    pub done: AppendDone,
}
pub struct StoreStats {
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub records: u64,
    pub index_bytes: u64,
    pub io_engine: &'static str,
    pub durable_records: u64,
    pub quarantined_records: u64,
    pub reclaimed_regions: u64,
}
pub trait ReclaimPolicy: Send + Sync {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32>;
}
impl Store {
    pub fn open(_: StoreConfig, _: Arc<Arena>, _: Arc<dyn ReclaimPolicy>) -> Result<(Arc<Store>, RecoveryReport)> {
        Err(Error::new(ErrorKind::Closed, "stub"))
    }
    pub fn namespace(&self, _: &NamespaceDescriptor, _: &[GroupGeometry]) -> Result<NamespaceHandle> {
        Ok(NamespaceHandle(1))
    }
    pub fn append(&self, a: Append) -> Result<(), (Append, Error)> {
        (a.done)(Err(Error::new(ErrorKind::Closed, "stub")));
        Ok(())
    }
    pub fn flush(&self, _: Instant) -> Result<()> {
        Ok(())
    }
    pub fn locate(&self, _: &RecordId) -> Option<Location> {
        None
    }
    pub fn locate_prefix(&self, _: &[u64], _: &mut Vec<Location>) {}
    pub fn pin(&self, _: &[Location]) -> Result<RegionPins> {
        Ok(RegionPins)
    }
    pub fn read(&self, _: RecordId, _: Location, _: Arc<Slot>, _: IoPriority, _: ReadDone) -> Result<()> {
        Ok(())
    }
    pub fn stats(&self) -> StoreStats {
        StoreStats {
            capacity_bytes: 0,
            used_bytes: 0,
            records: 0,
            index_bytes: 0,
            io_engine: "psync",
            durable_records: 0,
            quarantined_records: 0,
            reclaimed_regions: 0,
        }
    }
    pub fn poisoned(&self) -> Option<Error> {
        None
    }
    pub fn close(&self, _: Instant) -> Result<()> {
        Ok(())
    }
}
