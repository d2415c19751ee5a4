//! The whole public API of the crate, on one screen.

pub use crate::api::{
    BlockSave, HitTier, InstanceId, InstanceSpec, LeaseId, LoadBlock, LoadOutcome, LoadRequest, LookupReply,
    LookupRequest, OperationId, SaveOutcome, SaveRequest, SessionId, Stats,
};
pub use crate::config::{ByteSize, EngineConfig, IoEngineChoice, NvmeConfig};
pub use crate::engine::{Engine, ObjectBytes};
pub use pegaflow_tiers::{
    BlockKey, DeviceMemory, Error, ErrorKind, Fragment, GroupGeometry, HostMemory, KEY_CHAIN_VERSION, KeyChain,
    MemoryLayout, NamespaceDescriptor, NamespaceId, RangeFragment, Result,
};
