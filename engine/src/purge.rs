//! Namespaces as an operator sees them: what there is of each in DRAM and on the drive, and how to get rid of one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{
    Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, Result, Store, StoreUse,
};

use crate::choice::BlockChoice;
use crate::engine::Engine;
use crate::inner::Inner;
use crate::residency::InDram;

/// One namespace, and what there is of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NamespaceInfo {
    /// The digest of its fields.
    pub id: NamespaceId,
    /// Its fields.
    pub descriptor: NamespaceDescriptor,
    /// Its groups; none for named objects.
    pub groups: Vec<GroupGeometry>,
    /// Instances that are registered for it now.
    pub instances: u32,
    /// Blocks in DRAM; each shard of a block counts.
    pub dram_blocks: u64,
    /// Bytes of these, as they were saved.
    pub dram_bytes: u64,
    /// Those of them that are pinned.
    pub pinned_blocks: u64,
    /// Bytes of these.
    pub pinned_bytes: u64,
    /// What it takes on the drive; `None` where that was not counted: without a store, while it is out of use, or because more was
    /// counted before than was asked for. The index is counted, which lags behind saves by the commit interval.
    pub drive: Option<StoreUse>,
    /// How long ago it was looked up or saved last, since the engine was opened; `None`: not since then.
    pub idle: Option<Duration>,
    /// Blocks that lookups asked for since the engine was opened, or the namespace was purged.
    pub lookup_blocks: u64,
    /// Of these, blocks that were found.
    pub hit_blocks: u64,
}

/// What a purge has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PurgeOutcome {
    /// Blocks that were in DRAM; each shard of a block counts. Some of them may be on the drive as well.
    pub dram_blocks: u64,
    /// Bytes of these, as they were saved.
    pub dram_bytes: u64,
    /// Blocks that were on the drive.
    pub drive_blocks: u64,
    /// Bytes of these, as they lie there.
    pub drive_bytes: u64,
    /// Data keys that were destroyed: 1 if the store is encrypted, else 0.
    pub destroyed_keys: u64,
    /// Whether the index has no rows of it any more. If not, for want of time, the next open of the store takes them out; until
    /// then they take space, and `drive_blocks` and `drive_bytes` lack them.
    pub is_swept: bool,
}

/// What an eviction has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EvictOutcome {
    /// Namespaces that it was about.
    pub namespaces: u32,
    /// Blocks that have left DRAM; each shard of a block counts.
    pub dram_blocks: u64,
    /// Bytes of these, as they were saved.
    pub dram_bytes: u64,
    /// Blocks that stay: the drive does not have them yet, or a load, a lease or a pin holds them.
    pub kept_blocks: u64,
}

impl Engine {
    /// Has the blocks that are meant leave DRAM but for those that the store does not have yet and those that somebody holds or
    /// has pinned. What the store has is found there from here on; what it was not given, and all without one, is gone. Named
    /// objects stay.
    ///
    /// # Errors
    /// `NotFound` for a namespace that is not known and a prefix that is not in DRAM, `InvalidInput` for a prefix that is not
    /// clear, `Closed`.
    pub fn evict(&self, choice: &BlockChoice) -> Result<EvictOutcome> {
        evict(self.inner()?, choice)
    }

    /// All namespaces, by their digests: those that are registered, and those that the store has. Those of named objects are
    /// there if there are any. At most `most`, from the one behind `after` on. Of the index at most `rows_max` rows are counted in
    /// all (and what one namespace has of its last 8,192), about a million in a second; 0: the drive is not looked at.
    ///
    /// # Errors
    /// `Closed`. A drive that can not be read is not counted.
    pub fn list_namespaces(
        &self,
        after: Option<&NamespaceId>,
        most: usize,
        rows_max: u64,
    ) -> Result<Vec<NamespaceInfo>> {
        Ok(list(self.inner()?, after, most, rows_max))
    }

    /// Whether a namespace was looked up or saved to within this time, as far as it is known: since the engine was opened.
    /// Before so much time has gone by that is taken for granted.
    ///
    /// # Errors
    /// `NotFound` for a namespace that is not known, `Closed`.
    pub fn was_used_within(&self, namespace: &NamespaceId, time: Duration) -> Result<bool> {
        let inner = self.inner()?;
        let uses = numbers(inner, &[*namespace])?.into_keys().filter_map(|handle| inner.namespace_uses.get(handle));
        let idle = uses.map(|used| used.idle()).min();
        Ok(idle.unwrap_or_else(|| inner.residency.age()) < time)
    }

    /// Purges a namespace: nothing of it is found from here on, by nobody, whatever comes. Blocks in DRAM go at once, those
    /// that a load or a lease holds when it ends; in the store it is durable when this returns, and an encrypted store has
    /// destroyed its data key. Instances that are registered for it go on with an empty namespace; saves of theirs that are on
    /// their way are lost. `None` if there is no such namespace.
    ///
    /// # Errors
    /// `InvalidInput` for the namespace of objects; `Poisoned` while the store is out of use (nothing was done then); `Timeout` at
    /// `deadline`, and what the store reports: then nothing of it is found until the store is opened again, and it may come
    /// back with that; purge it again. `Closed`.
    pub fn purge(&self, namespace: &NamespaceId, deadline: Instant) -> Result<Option<PurgeOutcome>> {
        purge(self.inner()?, namespace, deadline)
    }
}

fn list(inner: &Inner, after: Option<&NamespaceId>, most: usize, rows_max: u64) -> Vec<NamespaceInfo> {
    let store = inner.drive.store();
    let in_dram = inner.residency.by_namespace();
    let instances = inner.registry.instances_by_namespace();
    let info = |handle: NamespaceHandle, descriptor: NamespaceDescriptor, groups: Vec<GroupGeometry>| {
        let id = descriptor.id();
        let InDram { blocks: dram_blocks, bytes: dram_bytes, pinned_blocks, pinned_bytes } =
            in_dram.get(&handle).copied().unwrap_or_default();
        let asked = inner.namespace_uses.get(handle);
        let info = NamespaceInfo {
            id,
            descriptor,
            groups,
            instances: instances.get(&id).copied().unwrap_or(0),
            dram_blocks,
            dram_bytes,
            pinned_blocks,
            pinned_bytes,
            drive: None,
            idle: asked.map(|asked| asked.idle()),
            lookup_blocks: asked.map_or(0, |asked| asked.lookup_blocks),
            hit_blocks: asked.map_or(0, |asked| asked.hit_blocks),
        };
        (id, (handle, info))
    };
    let rows = store.as_ref().map(|store| store.namespaces()).unwrap_or_default().into_iter();
    let of_store = rows.map(|row| info(row.handle, row.descriptor, row.groups));
    let mut found: BTreeMap<NamespaceId, (NamespaceHandle, NamespaceInfo)> = of_store.collect();
    let known = inner.drive.namespaces.all().into_iter();
    found.extend(known.map(|known| info(known.handle, known.descriptor, known.groups)));
    found.extend([info(NamespaceHandle(0), NamespaceDescriptor::objects(), Vec::new())]);
    let mut left = rows_max;
    let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
    let counted = found.range_mut::<NamespaceId, _>(behind).map(|(_, (handle, info))| {
        info.drive = store.as_ref().filter(|_| left > 0).and_then(|store| count(store, *handle, left));
        left = left.saturating_sub(info.drive.map_or(0, |counted| counted.records));
        info.clone()
    });
    // Named objects are told of if there are any.
    let on_drive = |info: &NamespaceInfo| info.drive.map_or(0, |counted| counted.records);
    counted.filter(|info| !info.groups.is_empty() || info.dram_blocks + on_drive(info) > 0).take(most).collect()
}

fn count(store: &Store, namespace: NamespaceHandle, rows_max: u64) -> Option<StoreUse> {
    let counted = store.usage(namespace, rows_max);
    counted.inspect_err(|error| tracing::warn!(%error, "what a namespace takes on the drive can not be counted")).ok()
}

fn purge(inner: &Arc<Inner>, id: &NamespaceId, deadline: Instant) -> Result<Option<PurgeOutcome>> {
    if *id == NamespaceDescriptor::objects().id() {
        let message = "named objects are not purged as a namespace; remove them one by one";
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let busy = || Error::new(ErrorKind::Timeout, "another namespace is being purged; try again");
    let _one = inner.purging.try_lock_until(deadline).ok_or_else(busy)?;
    let store = match (inner.drive.degraded(), inner.drive.store()) {
        (Some(degraded), _) => {
            let message = format!("the store is out of use, nothing was purged: {:#}", degraded.error);
            return Err(Error::new(ErrorKind::Poisoned, message));
        }
        (None, None) if inner.drive.is_configured() => {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "the store is being opened again, nothing was purged; try again",
            ));
        }
        (None, store) => store,
    };
    let known = inner.drive.namespaces.get(id);
    let rows = store.as_ref().map(|store| store.namespaces()).unwrap_or_default();
    let of_store = rows.into_iter().find(|row| row.id == *id).map(|row| row.handle);
    let handles: HashSet<NamespaceHandle> =
        known.as_ref().map(|known| known.handle).into_iter().chain(of_store).collect();
    if handles.is_empty() {
        return Ok(None);
    }
    let mut outcome = PurgeOutcome { is_swept: true, ..PurgeOutcome::default() };
    for handle in handles {
        let dropped = inner.residency.purge(handle);
        outcome.dram_blocks += dropped.blocks;
        outcome.dram_bytes += dropped.bytes;
        inner.namespace_uses.forget(handle);
    }
    let purged = store.as_ref().map(|store| store.purge(id, deadline)).transpose().inspect_err(|error| {
        tracing::error!(namespace = %id, error = format!("{error:#}"), "a purge has not become durable; purge it again");
        // Whatever the store says of it when it is opened again: no block under the old number is in use.
        if let Some(number) = inner.drive.namespaces.renumber(id) {
            inner.registry.set_namespace(id, number);
        }
    })?;
    if let Some(of_store) = purged.flatten() {
        (outcome.drive_blocks, outcome.drive_bytes) = (of_store.records, of_store.bytes);
        (outcome.destroyed_keys, outcome.is_swept) = (of_store.destroyed_keys, of_store.is_swept);
    }
    if let Some(known) = known {
        go_on(inner, id, &known.descriptor, &known.groups);
    }
    tracing::info!(namespace = %id, ?outcome, "a namespace was purged");
    Ok(Some(outcome))
}

fn evict(inner: &Inner, choice: &BlockChoice) -> Result<EvictOutcome> {
    let numbers = numbers(inner, &choice.namespaces)?;
    let namespaces = numbers.values().collect::<HashSet<_>>().len() as u32;
    let meant =
        inner.residency.meant(numbers.into_keys().collect(), (choice.prefix.as_ref(), false), choice.unused_for)?;
    let (InDram { blocks: dram_blocks, bytes: dram_bytes, .. }, kept_blocks) = inner.residency.evict(&meant);
    let outcome = EvictOutcome { namespaces, dram_blocks, dram_bytes, kept_blocks };
    tracing::info!(?choice, ?outcome, "blocks were evicted from DRAM");
    Ok(outcome)
}

/// The numbers that these namespaces have or had, of all if none is given. Named objects are in none.
///
/// # Errors
/// `NotFound` for one that is not known.
pub(crate) fn numbers(inner: &Inner, ids: &[NamespaceId]) -> Result<HashMap<NamespaceHandle, NamespaceId>> {
    let rows = inner.drive.store().map(|store| store.namespaces()).unwrap_or_default().into_iter();
    let known = inner.drive.namespaces.all().into_iter().map(|known| (known.handle, known.descriptor.id()));
    let mut all: HashMap<_, _> = rows.map(|row| (row.handle, row.id)).chain(known).collect();
    all.retain(|handle, id| *handle != NamespaceHandle(0) && (ids.is_empty() || ids.contains(id)));
    let found: HashSet<NamespaceId> = all.values().copied().collect();
    if let Some(unknown) = ids.iter().find(|id| !found.contains(*id)) {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no namespace {unknown}")));
    }
    Ok(all)
}

/// Instances of a purged namespace get it anew, empty; without any it is forgotten.
fn go_on(inner: &Inner, id: &NamespaceId, descriptor: &NamespaceDescriptor, groups: &[GroupGeometry]) {
    if !inner.registry.uses(id) {
        return inner.drive.namespaces.forget(id);
    }
    // Numbers that are given beside the store must not be the old one either.
    let beside = inner.drive.namespaces.renumber(id);
    let number = match inner.drive.namespace(descriptor, groups) {
        Ok(number) => Some(number),
        Err(error) => {
            tracing::warn!(namespace = %id, %error, "a purged namespace lives in DRAM only for now");
            beside
        }
    };
    if let Some(number) = number {
        inner.registry.set_namespace(id, number);
    }
}
