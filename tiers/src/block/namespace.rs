//! Namespaces: the full identity under which bytes are exchangeable. Two engines share a block only if every
//! field of their descriptors is equal.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, ErrorKind, Result};

const NAMESPACE_CONTEXT: &str = "pegaflow 2026-11-22 namespace v1";
const DESCRIPTOR_BYTES_MAX: usize = 64 * 1024;

/// The digest of a [`NamespaceDescriptor`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId([u8; 32]);

impl NamespaceId {
    /// An id from its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamespaceId({self})")
    }
}

/// The number of a namespace in one store: small, dense, kept across restarts. 0 is for named objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceHandle(pub u32);

/// The fields that together decide whether bytes are exchangeable: digest of the weights, model configuration,
/// KV type and scales, block size, group geometry and layout, attention backend and instruction set, parallel
/// shape, key chain version. Names and values are text; order does not matter. At most 64 KiB in all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamespaceDescriptor {
    fields: BTreeMap<String, String>,
}

impl NamespaceDescriptor {
    /// An empty descriptor.
    pub fn new() -> Self {
        Self::default()
    }

    /// The descriptor of the namespace of named objects (`PegaEngine.put`).
    pub fn objects() -> Self {
        Self::new().with("kind", "objects")
    }

    /// Sets a field.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.fields.insert(name.into(), value.into());
        self
    }

    /// The fields, by name.
    pub fn fields(&self) -> &BTreeMap<String, String> {
        &self.fields
    }

    /// The digest: BLAKE3 over every name and value, each with its length before it.
    pub fn id(&self) -> NamespaceId {
        let mut hasher = blake3::Hasher::new_derive_key(NAMESPACE_CONTEXT);
        for text in self.fields.iter().flat_map(|(name, value)| [name, value]) {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        NamespaceId(*hasher.finalize().as_bytes())
    }

    /// The canonical JSON form, as it is kept in the index.
    pub fn to_json(&self) -> String {
        serde_json::Value::from_iter(self.fields.iter().map(|(k, v)| (k.clone(), v.clone()))).to_string()
    }

    /// Reads the canonical JSON form.
    ///
    /// # Errors
    /// `InvalidInput` if it is no JSON object of texts, or larger than 64 KiB.
    pub fn from_json(text: &str) -> Result<Self> {
        let bad = |why: String| {
            Error::new(ErrorKind::InvalidInput, format!("a namespace descriptor is a JSON object of texts: {why}"))
        };
        if text.len() > DESCRIPTOR_BYTES_MAX {
            return Err(bad(format!("{} bytes are more than {DESCRIPTOR_BYTES_MAX}", text.len())));
        }
        let fields = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        Ok(Self { fields })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_depends_on_every_field_and_not_on_their_order() {
        let a = NamespaceDescriptor::new().with("model", "m").with("dtype", "bf16");
        let b = NamespaceDescriptor::new().with("dtype", "bf16").with("model", "m");
        assert_eq!(a.id(), b.id());
        assert_ne!(a.id(), a.clone().with("dtype", "fp8").id());
        assert_ne!(NamespaceDescriptor::new().with("ab", "c").id(), NamespaceDescriptor::new().with("a", "bc").id());
    }

    #[test]
    fn json_round_trips() {
        let a = NamespaceDescriptor::new().with("model", "m \"quoted\"").with("dtype", "bf16");
        assert_eq!(NamespaceDescriptor::from_json(&a.to_json()).map_err(|e| e.to_string()), Ok(a));
    }
}
