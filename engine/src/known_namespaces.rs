//! The namespaces that an engine knows: which number stands for which identity, as long as the engine lives. Without a
//! store it gives the numbers itself. Beside a store the store gives them; while that is out of use, numbers are given
//! here that no store gives, so that two namespaces never share one. Says yes and no to the same registrations as a
//! store does.

use std::collections::HashMap;

use parking_lot::Mutex;
use pegaflow_tiers::{Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, Result};

/// The most namespaces, as of a store.
const NAMESPACES_MAX: usize = 65_536;
/// Above all numbers of a store.
pub(crate) const BESIDE_STORE: u32 = 1 << 31;

/// One namespace.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) descriptor: NamespaceDescriptor,
    /// Sorted.
    pub(crate) groups: Vec<GroupGeometry>,
    pub(crate) handle: NamespaceHandle,
    /// Whether the number is the store's.
    pub(crate) is_of_store: bool,
}

/// See the module. The number 0 is for objects.
pub(crate) struct KnownNamespaces {
    base: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: HashMap<NamespaceId, Known>,
    /// How many numbers were given here; none is given twice.
    given: u32,
}

impl KnownNamespaces {
    /// Of an engine that has no store.
    pub(crate) fn without_store() -> Self {
        Self { base: 0, state: Mutex::default() }
    }

    /// Of an engine whose store may be out of use.
    pub(crate) fn beside_store() -> Self {
        Self { base: BESIDE_STORE, state: Mutex::default() }
    }

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
        let groups = sorted(groups);
        let mut state = self.state.lock();
        if let Some(found) = state.known.get(&id) {
            let is_same = found.groups == groups;
            return if is_same { Ok(found.handle) } else { Err(GroupGeometry::mismatch(id, &found.groups, &groups)) };
        }
        if state.known.len() >= NAMESPACES_MAX {
            let message = format!("the engine has {NAMESPACES_MAX} namespaces, the limit; restart it");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let handle = self.next_handle(&mut state);
        state.known.insert(id, Known { descriptor: descriptor.clone(), groups, handle, is_of_store: false });
        Ok(handle)
    }

    /// Gives a namespace another number, that was never given; `None` if it is not known.
    pub(crate) fn renumber(&self, id: &NamespaceId) -> Option<NamespaceHandle> {
        let mut state = self.state.lock();
        let handle = state.known.contains_key(id).then(|| self.next_handle(&mut state))?;
        let known = state.known.get_mut(id)?;
        (known.handle, known.is_of_store) = (handle, false);
        Some(handle)
    }

    fn next_handle(&self, state: &mut State) -> NamespaceHandle {
        state.given += 1;
        NamespaceHandle(self.base + state.given)
    }

    /// Forgets a namespace that nobody uses.
    pub(crate) fn forget(&self, id: &NamespaceId) {
        self.state.lock().known.remove(id);
    }

    /// What is known under this digest.
    pub(crate) fn get(&self, id: &NamespaceId) -> Option<Known> {
        self.state.lock().known.get(id).cloned()
    }

    /// The store has given a namespace this number.
    pub(crate) fn note(&self, descriptor: &NamespaceDescriptor, groups: &[GroupGeometry], handle: NamespaceHandle) {
        let noted = Known { descriptor: descriptor.clone(), groups: sorted(groups), handle, is_of_store: true };
        self.state.lock().known.insert(descriptor.id(), noted);
    }

    /// The number that a namespace has now.
    pub(crate) fn handle_of(&self, id: &NamespaceId) -> Option<NamespaceHandle> {
        self.state.lock().known.get(id).map(|known| known.handle)
    }

    /// The names behind these numbers, as far as they are known.
    pub(crate) fn ids(&self, handles: &[NamespaceHandle]) -> HashMap<NamespaceHandle, NamespaceId> {
        let state = self.state.lock();
        let meant = state.known.iter().filter(|(_, known)| handles.contains(&known.handle));
        meant.map(|(id, known)| (known.handle, *id)).collect()
    }

    /// How many there are of a kind.
    pub(crate) fn count(&self, is_counted: &dyn Fn(&NamespaceDescriptor) -> bool) -> usize {
        self.state.lock().known.values().filter(|known| is_counted(&known.descriptor)).count()
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Known> {
        self.state.lock().known.values().cloned().collect()
    }
}

fn sorted(groups: &[GroupGeometry]) -> Vec<GroupGeometry> {
    let mut groups = groups.to_vec();
    groups.sort_by_key(|geometry| geometry.group);
    groups
}
