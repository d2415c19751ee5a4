//! The block store: regions in a preallocated file, written as a log with O_DIRECT, found through an index.
//! Owns the format, the data plane and recovery. Decides nothing: which region to reclaim is asked of a policy.
//! A write goes store -> inbox (-> encoders) -> writer -> io -> commit -> index; a read goes store -> read -> io ->
//! verifiers, which also decode.

mod append;
mod backing;
mod calibration;
mod config;
mod counters;
mod directory;
mod drive;
mod drive_directory;
mod drive_identity;
mod drive_table;
mod encoding;
mod encryption;
mod export;
mod fill;
mod fsck;
#[cfg(any(test, feature = "fault-injection"))]
mod fuzzing;
mod inbox;
mod io;
mod membership;
mod namespace_end;
mod namespaces;
mod page;
mod poison;
mod policy;
mod read;
mod record_header;
mod recovery;
mod region_header;
mod regions;
mod scan;
mod shared;
#[cfg(any(test, feature = "fault-injection"))]
mod simulation;
mod stats;
mod store;
mod superblock;
mod switches;
#[cfg(test)]
mod tests;
mod verify;
mod version;
mod wear;
mod writer;

/// Cores that this process may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

pub use append::{Append, AppendDone};
pub use calibration::{DepthOrigin, DriveSpeed, DriveUse};
pub use config::{DriveConfig, StoreConfig};
pub use encryption::EncryptionKey;
pub use export::{ExportReport, ExportedRecord};
pub use fill::IndexFill;
pub use fsck::{FsckFinding, FsckProblem, FsckProgress, FsckReport, IndexState, StorePaths, fsck, fsck_with_key};
#[cfg(any(test, feature = "fault-injection"))]
pub use fuzzing::FuzzTarget;
pub use io::{
    BlockIo, FileId, IoBuffer, IoChoice, IoCompletion, IoDone, IoKind, IoPriority, IoRequest, Pages, ReadDepth,
    open_direct, open_engine,
};
#[cfg(any(test, feature = "fault-injection"))]
pub use io::{Fault, FaultAction, FaultPlan, Faulty, SavedImages, SimCrash, SimDisk, SimIo, SimOperation};
pub use poison::{PoisonHook, PoisonReason};
pub use policy::{ReclaimPolicy, RecordInfo, RegionInfo, RegionState, ResidentBlock};
pub use read::{ReadDone, Verified};
pub use recovery::RecoveryReport;
pub use regions::RegionPins;
#[cfg(any(test, feature = "fault-injection"))]
pub use simulation::{DamageTally, SimBias, SimFailure, SimFailureKind, SimOptions, SimTally, Simulator, SweepTally};
pub use stats::{StoreStats, WriteVolume};
pub use store::{KnownRecord, PurgeReport, Store, StoreUse};
#[cfg(any(test, feature = "fault-injection"))]
pub use switches::Sabotage;
pub use verify::{ScrubFrom, ScrubPace, ScrubStep, VerifyProgress, VerifyReport};
pub use wear::{DriveHealth, HealthReader, controllers_of};
