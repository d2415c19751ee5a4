//! Blocks that leave the engine for another one, or come from one: whole namespaces, under their own keys.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{
    BlockKey, Error, ErrorKind, ExportReport, ExportedRecord, GroupGeometry, NamespaceDescriptor, NamespaceHandle,
    NamespaceId, RecordId, Result, Store,
};

use crate::engine::Engine;
use crate::inner::Inner;
use crate::residency::Resident;
use crate::spill::spill_for_sure;

/// How long a block waits for room in DRAM, and for the last ones to be durable.
const ROOM_PATIENCE: Duration = Duration::from_secs(60);
const FLUSH_PATIENCE: Duration = Duration::from_secs(600);

/// A namespace that the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownNamespace {
    /// The digest of its fields.
    pub id: NamespaceId,
    /// Its fields.
    pub descriptor: NamespaceDescriptor,
    /// Its groups.
    pub groups: Vec<GroupGeometry>,
}

/// A block from elsewhere.
#[derive(Debug, Clone)]
pub struct ImportBlock {
    /// The KV cache group.
    pub group: u16,
    /// The shard.
    pub shard: u16,
    /// Its key.
    pub key: BlockKey,
    /// The key of the block before it.
    pub parent: BlockKey,
    /// How many blocks come before it.
    pub depth: u32,
    /// Its bytes: as many as the group's blocks have.
    pub payload: Vec<u8>,
}

/// What an import did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImportReport {
    /// Blocks that were saved.
    pub imported: u64,
    /// Blocks that were there already.
    pub present: u64,
}

impl Engine {
    /// The namespaces of the store.
    ///
    /// # Errors
    /// `Unsupported` without a store, `Poisoned` while it is out of use, `Closed`.
    pub fn namespaces(&self) -> Result<Vec<KnownNamespace>> {
        namespaces(self.inner()?)
    }

    /// Hands every durable block of a namespace to `each`, as it was saved, in the order of the drive. Blocks that are
    /// saved meanwhile may be missing, and so are those that are damaged.
    ///
    /// # Errors
    /// `NotFound` for a namespace that the store does not have, as of [`Engine::namespaces`], and what `each` returns.
    pub fn export(
        &self,
        namespace: &NamespaceId,
        each: &mut dyn FnMut(ExportedRecord<'_>) -> Result<()>,
    ) -> Result<ExportReport> {
        export(self.inner()?, namespace, each)
    }

    /// Saves blocks from elsewhere, whatever policy and write budget say, until `next` has no more. They are durable when it
    /// returns.
    ///
    /// # Errors
    /// `GeometryMismatch` if the namespace is known with other groups, or a block is of another size; `InvalidInput` for a
    /// group or shard that there is not; `Busy` if DRAM stays full; `Io` if a block could not be written; as of
    /// [`Engine::namespaces`], and what `next` returns. What was imported before stays.
    pub fn import(
        &self,
        descriptor: &NamespaceDescriptor,
        groups: &[GroupGeometry],
        next: &mut dyn FnMut() -> Result<Option<ImportBlock>>,
    ) -> Result<ImportReport> {
        import(self.inner()?, descriptor, groups, next)
    }
}

fn store(inner: &Inner) -> Result<Arc<Store>> {
    if let Some(degraded) = inner.drive.degraded() {
        return Err(Error::new(ErrorKind::Poisoned, format!("the store is out of use: {:#}", degraded.error)));
    }
    inner.drive.store().ok_or_else(|| Error::new(ErrorKind::Unsupported, "there is no store; give path"))
}

fn namespaces(inner: &Inner) -> Result<Vec<KnownNamespace>> {
    let rows = store(inner)?.namespaces().into_iter();
    let known = |row: pegaflow_tiers::NamespaceRow| KnownNamespace {
        id: row.id,
        descriptor: row.descriptor,
        groups: row.groups,
    };
    Ok(rows.filter(|row| row.handle != NamespaceHandle(0)).map(known).collect())
}

fn export(
    inner: &Inner,
    namespace: &NamespaceId,
    each: &mut dyn FnMut(ExportedRecord<'_>) -> Result<()>,
) -> Result<ExportReport> {
    let store = store(inner)?;
    let known = store.namespaces().into_iter().find(|row| row.id == *namespace);
    let unknown = || Error::new(ErrorKind::NotFound, format!("the store has no namespace {namespace}"));
    store.export(known.ok_or_else(unknown)?.handle, each)
}

fn import(
    inner: &Arc<Inner>,
    descriptor: &NamespaceDescriptor,
    groups: &[GroupGeometry],
    next: &mut dyn FnMut() -> Result<Option<ImportBlock>>,
) -> Result<ImportReport> {
    store(inner)?;
    let namespace = inner.drive.namespace(descriptor, groups)?;
    let failed_before = inner.counters.write_failed_records.get();
    let mut report = ImportReport::default();
    while let Some(block) = next()? {
        let geometry = check(groups, &block)?;
        let id = RecordId { namespace, group: block.group, shard: block.shard, key: block.key };
        if inner.is_present(&id) {
            report.present += 1;
            continue;
        }
        let bytes = geometry.block_bytes as usize;
        let full = || Error::new(ErrorKind::Busy, "DRAM stays full of bytes that are not durable; give more dram");
        let slot = inner.residency.alloc_until(bytes, true, Instant::now() + ROOM_PATIENCE);
        let mut slot = slot.ok_or_else(full)?;
        let (content, padding) = slot.payload_mut().split_at_mut(bytes);
        content.copy_from_slice(&block.payload);
        padding.fill(0);
        let fresh = Resident::new(id, (block.parent, block.depth), Arc::new(slot), geometry.block_bytes, true);
        let visible = inner.residency.insert(Arc::clone(&fresh), false);
        if !Arc::ptr_eq(&visible, &fresh) {
            report.present += 1;
            continue;
        }
        drop(visible);
        spill_for_sure(inner, &fresh);
        report.imported += 1;
    }
    store(inner)?.flush(Instant::now() + FLUSH_PATIENCE)?;
    match inner.counters.write_failed_records.get() - failed_before {
        0 => Ok(report),
        failed => Err(Error::new(ErrorKind::Io, format!("{failed} blocks could not be written to the drive"))),
    }
}

/// The geometry of a block that has it.
fn check<'a>(groups: &'a [GroupGeometry], block: &ImportBlock) -> Result<&'a GroupGeometry> {
    let geometry = groups.iter().find(|geometry| geometry.group == block.group && block.shard < geometry.shards);
    let Some(geometry) = geometry else {
        let (group, shard) = (block.group, block.shard);
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("a block of shard {shard} of group {group}, which there is not"),
        ));
    };
    if block.payload.len() as u64 != geometry.block_bytes {
        let (found, expected) = (block.payload.len(), geometry.block_bytes);
        return Err(Error::new(ErrorKind::GeometryMismatch, format!("a block of {found} bytes, expected {expected}")));
    }
    Ok(geometry)
}
