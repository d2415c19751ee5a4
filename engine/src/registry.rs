//! Who is connected: sessions, and the instances that their workers have registered.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::RwLock;
use pegaflow_tiers::{Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, Result};

use crate::api::{InstanceId, InstanceSpec, SessionId};

const GROUPS_MAX: usize = 64;
const INSTANCE_BYTES_MAX: usize = 256;

/// What an instance looks up, loads and saves under.
#[derive(Debug, Clone)]
pub(crate) struct InstanceView {
    pub(crate) namespace: NamespaceHandle,
    pub(crate) identity: Arc<Identity>,
    pub(crate) geometry: GroupGeometry,
    /// Whether all shards have registered.
    pub(crate) is_complete: bool,
    /// Whether admission is passed by.
    pub(crate) keeps_all: bool,
}

/// What decides whether the bytes of two instances are exchangeable.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) descriptor: NamespaceDescriptor,
    pub(crate) groups: Vec<GroupGeometry>,
    id: NamespaceId,
}

struct Instance {
    namespace: NamespaceHandle,
    identity: Arc<Identity>,
    /// Which sessions hold which shard: a restarted worker may come before its predecessor has gone, and neither takes
    /// the shard from the other.
    workers: HashMap<u16, HashSet<SessionId>>,
    keeps_all: bool,
}

impl Identity {
    fn is_of(&self, spec: &InstanceSpec) -> bool {
        self.id == spec.namespace.id() && self.groups == spec.groups
    }
}

impl Instance {
    fn shards(&self) -> u16 {
        self.identity.groups.iter().map(|group| group.shards).max().unwrap_or(1)
    }

    fn is_complete(&self) -> bool {
        self.workers.len() >= usize::from(self.shards())
    }
}

#[derive(Default)]
struct State {
    last_session: u64,
    sessions: HashSet<SessionId>,
    instances: HashMap<InstanceId, Instance>,
}

/// Sessions and instances.
#[derive(Default)]
pub(crate) struct Registry {
    state: RwLock<State>,
}

impl Registry {
    pub(crate) fn start_session(&self) -> SessionId {
        let mut state = self.state.write();
        state.last_session += 1;
        let session = SessionId(state.last_session);
        state.sessions.insert(session);
        session
    }

    /// Forgets a session and its workers; instances without workers go too.
    pub(crate) fn end_session(&self, session: SessionId) {
        let mut state = self.state.write();
        state.sessions.remove(&session);
        state.instances.retain(|_, instance| {
            instance.workers.retain(|_, sessions| {
                sessions.remove(&session);
                !sessions.is_empty()
            });
            !instance.workers.is_empty()
        });
    }

    pub(crate) fn has_session(&self, session: SessionId) -> bool {
        self.state.read().sessions.contains(&session)
    }

    /// Checks what a worker says against the limits and against what its instance has said before.
    ///
    /// # Errors
    /// `InvalidInput`, `GeometryMismatch`, or `NotFound` for an unknown session.
    pub(crate) fn check(&self, session: SessionId, spec: &InstanceSpec) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if !self.has_session(session) {
            return Err(Error::new(ErrorKind::NotFound, format!("session {} is not known; open one first", session.0)));
        }
        if spec.instance.0.is_empty() || spec.instance.0.len() > INSTANCE_BYTES_MAX {
            return bad(format!(
                "the instance's name has {} bytes; give 1 to {INSTANCE_BYTES_MAX}",
                spec.instance.0.len()
            ));
        }
        if spec.namespace == NamespaceDescriptor::objects() {
            return bad("the namespace is the one of objects; describe one of your own".into());
        }
        if spec.groups.is_empty() || spec.groups.len() > GROUPS_MAX {
            return bad(format!("{} groups; give 1 to {GROUPS_MAX}", spec.groups.len()));
        }
        let mut seen = HashSet::new();
        for group in &spec.groups {
            group.validate()?;
            if !seen.insert(group.group) {
                return bad(format!("group {} is given twice", group.group));
            }
            if spec.shard >= group.shards {
                return bad(format!(
                    "shard {} of group {} is not below its {} shards",
                    spec.shard, group.group, group.shards
                ));
            }
        }
        let state = self.state.read();
        if let Some(known) = state.instances.get(&spec.instance)
            && known.workers.values().flatten().any(|worker| *worker != session)
            && !known.identity.is_of(spec)
        {
            return Err(Error::new(
                ErrorKind::GeometryMismatch,
                format!(
                    "instance {} has workers with another namespace or geometry; all workers of an instance must be alike",
                    spec.instance
                ),
            ));
        }
        Ok(())
    }

    /// Notes the worker; to be called after [`Registry::check`].
    pub(crate) fn add_worker(&self, session: SessionId, spec: &InstanceSpec, namespace: NamespaceHandle) {
        let mut state = self.state.write();
        if !state.sessions.contains(&session) {
            return;
        }
        let fresh = || {
            let (descriptor, groups) = (spec.namespace.clone(), spec.groups.clone());
            let identity = Arc::new(Identity { id: descriptor.id(), descriptor, groups });
            Instance { namespace, identity, workers: HashMap::new(), keeps_all: false }
        };
        let instance = state.instances.entry(spec.instance.clone()).or_insert_with(fresh);
        if !instance.identity.is_of(spec) {
            *instance = fresh();
        }
        instance.workers.entry(spec.shard).or_default().insert(session);
        instance.keeps_all |= spec.keeps_all;
    }

    /// A namespace has another number from now on.
    pub(crate) fn move_namespace(&self, from: NamespaceHandle, to: NamespaceHandle) {
        let mut state = self.state.write();
        let affected = state.instances.values_mut().filter(|instance| instance.namespace == from);
        affected.for_each(|instance| instance.namespace = to);
    }

    /// A namespace has this number from now on, whatever it had before.
    pub(crate) fn set_namespace(&self, id: &NamespaceId, to: NamespaceHandle) {
        let mut state = self.state.write();
        let affected = state.instances.values_mut().filter(|instance| instance.identity.id == *id);
        affected.for_each(|instance| instance.namespace = to);
    }

    /// How many instances use each namespace.
    pub(crate) fn instances_by_namespace(&self) -> HashMap<NamespaceId, u32> {
        let mut counted = HashMap::new();
        for instance in self.state.read().instances.values() {
            *counted.entry(instance.identity.id).or_default() += 1;
        }
        counted
    }

    /// Whether an instance uses a namespace.
    pub(crate) fn uses(&self, id: &NamespaceId) -> bool {
        self.state.read().instances.values().any(|instance| instance.identity.id == *id)
    }

    /// What is registered under a name, for one group.
    ///
    /// # Errors
    /// `NotFound` for an unknown instance or group.
    pub(crate) fn view(&self, instance: &InstanceId, group: u16) -> Result<InstanceView> {
        let state = self.state.read();
        let known = state.instances.get(instance).ok_or_else(|| unknown(instance))?;
        let geometry = known
            .identity
            .groups
            .iter()
            .find(|geometry| geometry.group == group)
            .copied()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("instance {instance} has no group {group}")))?;
        Ok(InstanceView {
            namespace: known.namespace,
            identity: Arc::clone(&known.identity),
            geometry,
            is_complete: known.is_complete(),
            keeps_all: known.keeps_all,
        })
    }

    /// The namespace of an instance.
    ///
    /// # Errors
    /// `NotFound` for an unknown instance.
    pub(crate) fn namespace_of(&self, instance: &InstanceId) -> Result<NamespaceId> {
        let state = self.state.read();
        state.instances.get(instance).map(|known| known.identity.id).ok_or_else(|| unknown(instance))
    }

    pub(crate) fn is_complete(&self, instance: &InstanceId) -> bool {
        self.state.read().instances.get(instance).is_some_and(Instance::is_complete)
    }

    /// (sessions, instances)
    pub(crate) fn counts(&self) -> (u64, u64) {
        let state = self.state.read();
        (state.sessions.len() as u64, state.instances.len() as u64)
    }
}

fn unknown(instance: &InstanceId) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("instance {instance} is not registered; its workers register when they have their KV cache"),
    )
}
