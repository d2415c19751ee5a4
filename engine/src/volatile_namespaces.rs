//! The namespaces of an engine without a store: which number stands for which identity, as long as the engine lives.
//! Says yes and no to the same registrations as a store does.

use std::collections::HashMap;

use parking_lot::Mutex;
use pegaflow_tiers::{Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, Result};

/// The most namespaces, as of a store.
const NAMESPACES_MAX: usize = 65_536;

/// Number and groups, sorted, of every namespace by its identity. The number 0 is for objects.
#[derive(Default)]
pub(crate) struct VolatileNamespaces {
    known: Mutex<HashMap<NamespaceId, (NamespaceHandle, Vec<GroupGeometry>)>>,
}

impl VolatileNamespaces {
    /// The number of a namespace, which is known afterwards. The groups have been checked.
    ///
    /// # Errors
    /// `GeometryMismatch` if it is known with other groups, `Busy` when there are 65,536 already.
    pub(crate) fn register(
        &self,
        descriptor: &NamespaceDescriptor,
        groups: &[GroupGeometry],
    ) -> Result<NamespaceHandle> {
        let id = descriptor.id();
        let mut groups = groups.to_vec();
        groups.sort_by_key(|geometry| geometry.group);
        let mut known = self.known.lock();
        if let Some((handle, registered)) = known.get(&id) {
            let is_same = *registered == groups;
            return if is_same { Ok(*handle) } else { Err(GroupGeometry::mismatch(id, registered, &groups)) };
        }
        if known.len() >= NAMESPACES_MAX {
            let message = format!("the engine has {NAMESPACES_MAX} namespaces, the limit; restart it");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        // None is ever removed.
        let handle = NamespaceHandle(known.len() as u32 + 1);
        known.insert(id, (handle, groups));
        Ok(handle)
    }
}
