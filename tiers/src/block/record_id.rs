//! The identity of a record: which bytes these are, whoever stored them.

use super::{BlockKey, NamespaceHandle};

/// What a record is for. Stored in its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum RecordKind {
    /// A block of a KV cache.
    Kv = 1,
    /// A named object of any size.
    Object = 2,
    /// Says that an earlier record of the same identity is removed.
    Tombstone = 3,
}

impl RecordKind {
    /// The kind for its number on disk.
    pub fn from_u16(value: u16) -> Option<Self> {
        match value {
            1 => Some(Self::Kv),
            2 => Some(Self::Object),
            3 => Some(Self::Tombstone),
            _ => None,
        }
    }
}

/// The identity of a record inside one open store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordId {
    /// The namespace, by its number in this store.
    pub namespace: NamespaceHandle,
    /// The KV cache group, from 0.
    pub group: u16,
    /// The shard (tensor- and pipeline-parallel rank), from 0.
    pub shard: u16,
    /// The block's key.
    pub key: BlockKey,
}

impl RecordId {
    /// Comes before all others in the order of identities; no record has it.
    pub const LEAST: Self = Self { namespace: NamespaceHandle(0), group: 0, shard: 0, key: BlockKey::ROOT };

    /// A 64-bit fingerprint, uniform because the key is a hash; never 0, which tables use for "empty".
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint_of(self.key.prefix())
    }

    /// The fingerprint of the record in the same place whose key has this [`BlockKey::prefix`].
    pub fn fingerprint_of(&self, prefix: u64) -> u64 {
        let place = (u64::from(self.namespace.0) << 32) | (u64::from(self.group) << 16) | u64::from(self.shard);
        (prefix ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)).max(1)
    }

    /// The same place with another key: the identity of a neighbour in the chain.
    #[must_use]
    pub fn with_key(self, key: BlockKey) -> Self {
        Self { key, ..self }
    }
}
