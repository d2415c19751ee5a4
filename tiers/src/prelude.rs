//! The whole public API of the crate, on one screen.

pub use crate::block::{
    BlockKey, Fragment, GroupGeometry, KEY_CHAIN_VERSION, KeyChain, MemoryLayout, NamespaceDescriptor, NamespaceHandle,
    NamespaceId, RecordId, RecordKind,
};
pub use crate::codec::{CHUNK_BYTES, Codec, CodecChoice, CodecHint, Decoder, Encoded, Encoder};
pub use crate::dram::{Arena, ArenaConfig, ArenaId, ArenaView, ClassUsage, HEADER_BYTES, HugePages, Place, Slot};
pub use crate::error::{Error, ErrorKind, Result};
pub use crate::gpu::{
    BlockCopy, CopyBatch, CopyDirection, CopyDone, CudaMemory, CudaScratch, DeviceMemory, Fence, HostMemory, KvCache,
    LocalKvCache, PlacedCopy, RangeFragment, gpu_count,
};
pub use crate::index::{
    IndexChange, IndexLog, IndexRow, Location, NamespaceEnd, NamespaceRow, RegionMark, Table, TableEntry, Uses,
};
pub use crate::latency::{Latencies, LatencyHistogram};
pub use crate::nvme::{
    Append, AppendDone, BlockIo, DepthOrigin, DriveConfig, DriveHealth, DriveSpeed, DriveUse, EncryptionKey,
    ExportReport, ExportedRecord, FileId, FsckFinding, FsckProblem, FsckProgress, FsckReport, HealthReader, IndexFill,
    IndexState, IoBuffer, IoChoice, IoCompletion, IoDone, IoKind, IoPriority, IoRequest, KnownRecord, Pages,
    PoisonHook, PoisonReason, PurgeReport, ReadDepth, ReadDone, ReclaimPolicy, RecordInfo, RecoveryReport, RegionInfo,
    RegionPins, RegionState, ResidentBlock, ScrubFrom, ScrubPace, ScrubStep, Store, StoreConfig, StorePaths,
    StoreStats, StoreUse, Verified, VerifyProgress, VerifyReport, WriteVolume, controllers_of, fsck, fsck_with_key,
    open_direct, open_engine,
};
#[cfg(any(test, feature = "fault-injection"))]
pub use crate::nvme::{
    DamageTally, Fault, FaultAction, FaultPlan, Faulty, FuzzTarget, Sabotage, SavedImages, SimBias, SimCrash, SimDisk,
    SimFailure, SimFailureKind, SimIo, SimOperation, SimOptions, SimTally, Simulator, SweepTally,
};
