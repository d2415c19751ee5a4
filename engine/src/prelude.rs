//! The whole public API of the crate, on one screen.

pub use crate::api::{
    BlockSave, ComputedTokens, DecisionRecord, DramAccount, DriveWear, FetchTotals, HitTier, InstanceId, InstanceSpec,
    LatencyStats, LeaseId, LoadBlock, LoadOutcome, LoadQuestion, LoadRequest, LocateRequest, LookupReply,
    LookupRequest, OperationId, Places, SaveOutcome, SaveRequest, SaveTarget, SessionId, SizeEstimate, Stats,
    WarmProgress, WarmState, Whose,
};
pub use crate::arbiter::{Arbiter, ArbiterConfig, Choice, Decision, FoundPrefix, LoadPolicy, Reason, TierSpeeds};
pub use crate::choice::{BlockChoice, KeyPrefix};
pub use crate::config::{ByteSize, EngineConfig, IoEngineChoice, NvmeConfig, NvmeDrive};
pub use crate::engine::{Engine, ObjectBytes};
pub use crate::hot_set::{WarmRun, WarmRunState};
pub use crate::miss_ratio::MissRatioCurve;
pub use crate::pins::{PinInfo, Unpinned};
pub use crate::placed::PlacedLoads;
pub use crate::policy::{
    BlockMemory, Past, PegaflowConfig, PegaflowPolicy, Policy, PolicyBlock, PolicyChoice, PolicyRequest,
};
pub use crate::prefixes::PrefixInfo;
pub use crate::purge::{EvictOutcome, NamespaceInfo, PurgeOutcome};
pub use crate::replay::{
    PrefetchModel, PrefetchOutcome, ReplayOutcome, ReplayTier, Synthetic, TierOutcome, Trace, TraceRequest, replay,
    replay_optimal, replay_prefetch,
};
pub use crate::scheduler::{Clock, SizePolicies};
pub use crate::scrub::{ScrubProgress, ScrubState};
pub use crate::tenants::{TENANT_FIELD, TenantId};
pub use crate::transfer::{ImportBlock, ImportReport, KnownNamespace};
pub use crate::write_budget::WriteBudget;
pub use pegaflow_tiers::{
    ArenaId, ArenaView, BlockCopy, BlockKey, CodecChoice, CodecHint, CopyBatch, CopyDirection, CopyDone, CudaMemory,
    CudaScratch, DepthOrigin, DeviceMemory, DriveSpeed, DriveUse, EncryptionKey, Error, ErrorKind, ExportReport,
    ExportedRecord, Fence, Fragment, FsckFinding, FsckProblem, FsckProgress, FsckReport, GroupGeometry, HostMemory,
    IndexState, KEY_CHAIN_VERSION, KeyChain, KvCache, Latencies, LocalKvCache, MemoryLayout, NamespaceDescriptor,
    NamespaceId, Place, PlacedCopy, PoisonReason, RangeFragment, Result, Slot, StorePaths, StoreUse, fsck,
    fsck_with_key,
};
