//! How a client finds its server and how long it waits.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::{DeviceMemory, Error, ErrorKind, HostMemory, InstanceSpec, Result};

use crate::limits::{GROUPS_MAX, NAME_BYTES_MAX};

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket; the server must run as the same user or as root.
    Unix(PathBuf),
    /// A loopback TCP address: lookups and counters only, no loads and saves.
    Tcp(SocketAddr),
}

impl Default for Endpoint {
    fn default() -> Self {
        Self::Unix(crate::default_socket_path())
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// How a client works. Start from `ClientConfig::new`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// The server. Default: the default Unix socket.
    pub endpoint: Endpoint,
    /// The client's name in the server's log. At most 256 bytes.
    pub name: String,
    /// The longest wait for a lookup; it stands in the way of the model. Default: 50 ms.
    pub lookup_timeout: Duration,
    /// The longest wait for any other answer. Default: 5 s.
    pub rpc_timeout: Duration,
    /// The longest life of a load or a save; then it is cancelled and its blocks fail. Default: 60 s.
    pub operation_timeout: Duration,
    /// Bytes of memory shared with the server, for workers only; at least one block of every size is taken.
    /// Default: 256 MiB. The server's limit is 1 GiB by default.
    pub staging_bytes: u64,
}

impl ClientConfig {
    /// The defaults, for a client of that name.
    pub fn new(endpoint: Endpoint, name: impl Into<String>) -> Self {
        Self {
            endpoint,
            name: name.into(),
            lookup_timeout: Duration::from_millis(50),
            rpc_timeout: Duration::from_secs(5),
            operation_timeout: Duration::from_secs(60),
            staging_bytes: 256 << 20,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if self.name.len() > NAME_BYTES_MAX {
            return bad(format!("the client's name has {} bytes; give at most {NAME_BYTES_MAX}", self.name.len()));
        }
        for (name, timeout) in [
            ("lookup_timeout", self.lookup_timeout),
            ("rpc_timeout", self.rpc_timeout),
            ("operation_timeout", self.operation_timeout),
        ] {
            if timeout.is_zero() || timeout > Duration::from_secs(3600) {
                return bad(format!("{name} is {timeout:?}; give more than zero, at most an hour"));
            }
        }
        Ok(())
    }
}

/// The memory that holds one group's blocks in a worker.
#[derive(Clone)]
pub struct GroupMemory {
    /// The group, as in the instance's geometry.
    pub group: u16,
    /// The memory; its blocks are as long as the geometry says. Kept alive until no copy uses it any more.
    pub memory: Arc<HostMemory>,
}

/// A worker: what it says of itself, and its memory. Repeated to every new server.
#[derive(Clone)]
pub(super) struct Registration {
    pub(super) spec: InstanceSpec,
    pub(super) memories: Vec<GroupMemory>,
}

impl Registration {
    /// # Errors
    /// `InvalidInput` if a memory does not fit its group.
    pub(super) fn new(spec: InstanceSpec, memories: Vec<GroupMemory>) -> Result<Self> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if spec.groups.is_empty() || spec.groups.len() > GROUPS_MAX {
            return bad(format!("{} groups; give 1 to {GROUPS_MAX}", spec.groups.len()));
        }
        for (index, GroupMemory { group, memory }) in memories.iter().enumerate() {
            let Some(geometry) = spec.groups.iter().find(|geometry| geometry.group == *group) else {
                return bad(format!("there is memory for group {group}, which the geometry does not have"));
            };
            if memory.layout().block_bytes() != geometry.block_bytes {
                return bad(format!(
                    "the memory of group {group} has blocks of {} bytes, the geometry {}",
                    memory.layout().block_bytes(),
                    geometry.block_bytes
                ));
            }
            if memories.iter().take(index).any(|earlier| earlier.group == *group) {
                return bad(format!("there are two memories for group {group}; give one"));
            }
        }
        Ok(Self { spec, memories })
    }

    pub(super) fn memory(&self, group: u16) -> Option<&Arc<HostMemory>> {
        self.memories.iter().find(|memory| memory.group == group).map(|memory| &memory.memory)
    }

    /// Whether the other one says the same of the same memory.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let key = |r: &Self| -> Vec<_> { r.memories.iter().map(|m| (m.group, Arc::as_ptr(&m.memory))).collect() };
        let (a, b) = (&self.spec, &other.spec);
        (&a.instance, &a.namespace, &a.groups, a.shard) == (&b.instance, &b.namespace, &b.groups, b.shard)
            && key(self) == key(other)
    }

    /// The slot sizes that staging memory is needed for, with the number of slots that `bytes` in all allow: each size
    /// gets an equal share, at least one slot, and no more slots than there are blocks.
    pub(super) fn staging(&self, bytes: u64) -> Vec<(u64, u32)> {
        let mut sizes: Vec<(u64, u64)> = Vec::new();
        for GroupMemory { memory, .. } in &self.memories {
            let (size, blocks) = (memory.layout().block_bytes(), u64::from(memory.layout().blocks()));
            match sizes.iter_mut().find(|(known, _)| *known == size) {
                Some((_, sum)) => *sum += blocks,
                None => sizes.push((size, blocks)),
            }
        }
        let share = bytes / (sizes.len() as u64).max(1);
        let slots = |size: u64, blocks: u64| u32::try_from((share / size).clamp(1, blocks)).unwrap_or(u32::MAX);
        sizes.iter().map(|&(size, blocks)| (size, slots(size, blocks))).collect()
    }
}
