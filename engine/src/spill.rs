//! From DRAM to the store: hands dirty blocks over, and marks them clean when they are durable. Blocks of a KV cache pass
//! admission first; what is refused is clean at once, and asked about again when it is used.

use std::sync::Arc;
use std::time::Instant;

use pegaflow_tiers::{Append, RecordId, RecordKind, Store};

use crate::admission::{Offer, Refusal};
use crate::inner::Inner;
use crate::policy::PolicyBlock;
use crate::residency::Resident;

/// Gives a dirty block to the store. If the store cannot take it the block stays in DRAM until it has to leave, and is
/// counted as a failed write.
pub(crate) fn spill(inner: &Arc<Inner>, block: &Arc<Resident>, kind: RecordKind) {
    give(inner, block, kind, kind == RecordKind::Kv);
}

/// As [`spill`], for a block of a KV cache that is not to be refused; also for one that was.
pub(crate) fn spill_for_sure(inner: &Arc<Inner>, block: &Arc<Resident>) {
    give(inner, block, RecordKind::Kv, false);
}

fn give(inner: &Arc<Inner>, block: &Arc<Resident>, kind: RecordKind, may_be_refused: bool) {
    let Some(store) = inner.drive.store() else {
        if inner.drive.is_configured() {
            failed(inner, block, kind);
        } else {
            inner.residency.mark_clean(block);
        }
        return;
    };
    if may_be_refused && admit(inner, &store, block).is_err() {
        block.refuse();
        inner.residency.mark_clean(block);
        return;
    }
    if kind == RecordKind::Kv && !may_be_refused {
        accept(inner, block);
    }
    // Holding the slot, not the block: "held" blocks count the users of a block, and the store is none.
    let weak_inner = Arc::downgrade(inner);
    let (written, visible) = (Arc::clone(block), Instant::now());
    let append = Append {
        id: block.id,
        kind,
        parent: block.parent,
        depth: block.depth,
        slot: Some(Arc::clone(&block.slot)),
        payload_bytes: block.payload_bytes,
        done: Box::new(move |outcome| {
            let Some(inner) = weak_inner.upgrade() else { return };
            if outcome.is_err() {
                return failed(&inner, &written, kind);
            }
            inner.counters.times.durable.record(visible.elapsed());
            if kind == RecordKind::Object {
                inner.residency.end_hiding(&written);
            }
            inner.residency.mark_clean(&written);
        }),
    };
    if let Err((_, error)) = store.append(append) {
        tracing::debug!(%error, "the store did not take a block");
        failed(inner, block, kind);
    }
}

/// The store does not have the block: it may leave all the same. What the store still has of an object is older, and
/// stays hidden from then on.
fn failed(inner: &Inner, block: &Arc<Resident>, kind: RecordKind) {
    // What was purged meanwhile is not to be written.
    if !inner.residency.is_purged(block.id.namespace) {
        inner.counters.write_failed_records.add(1);
    }
    if kind == RecordKind::Object {
        inner.residency.hide(block);
    } else if let Some(policy) = &inner.drive_policy {
        let on_drive = |store: Arc<Store>| store.fingerprint_of(&block.id, block.id.key.prefix());
        policy.lose(inner.drive.store().map_or_else(|| block.id.fingerprint(), on_drive));
    }
    inner.residency.mark_clean(block);
}

/// The name of the ledger of the write budget in the store.
pub(crate) const BUDGET_NOTE: &str = "write-budget";

/// Whether a block is worth a drive write, now.
fn admit(inner: &Inner, store: &Store, block: &Resident) -> Result<(), Refusal> {
    let Some(admission) = &inner.admission else { return Ok(()) };
    let parent = block.id.with_key(block.parent);
    let is_on_its_way = || inner.residency.get(&parent).is_some_and(|parent| parent.is_dirty());
    let has_parent = block.parent.is_root() || store.locate(&parent).is_some() || is_on_its_way();
    let fingerprint_of = |id: &RecordId| store.fingerprint_of(id, id.key.prefix());
    let fingerprint = fingerprint_of(&block.id);
    let judged = PolicyBlock { key: fingerprint, bytes: u32::try_from(block.slot.bytes()).unwrap_or(u32::MAX) };
    let judged_parent = (!block.parent.is_root()).then(|| fingerprint_of(&parent));
    let worth = match &inner.drive_policy {
        None => None,
        Some(policy) => match policy.judge(&judged, judged_parent, has_parent) {
            Ok(worth) => Some(worth),
            Err(refusal) => {
                admission.count(refusal);
                return Err(refusal);
            }
        },
    };
    let (verdict, note) = admission.offer(&Offer { fingerprint, has_parent, worth }, inner.drive.write_volume());
    if let Some(error) = note.and_then(|note| store.put_note(BUDGET_NOTE, &note).err()) {
        tracing::warn!(%error, "the ledger of the write budget could not be kept; a crash would forget what was spent");
    }
    if let (Ok(()), Some(policy)) = (verdict, &inner.drive_policy) {
        policy.accept(&judged, judged_parent);
    }
    verdict
}

/// The drive's policy knows a block that nobody asked it about.
fn accept(inner: &Inner, block: &Resident) {
    if let Some(policy) = &inner.drive_policy {
        let bytes = u32::try_from(block.slot.bytes()).unwrap_or(u32::MAX);
        let judged = PolicyBlock { key: block.id.fingerprint(), bytes };
        let parent = (!block.parent.is_root()).then(|| block.id.with_key(block.parent).fingerprint());
        // It learns of the block by judging it; what it says does not count.
        policy.judge(&judged, parent, true).ok();
        policy.accept(&judged, parent);
    }
}

/// Blocks were used, ancestors first: those of them that were refused may be worth a write by now.
pub(crate) fn offer_again<'a>(inner: &Arc<Inner>, used: impl Iterator<Item = &'a Arc<Resident>>) {
    for block in used {
        if block.take_refused() {
            inner.residency.mark_dirty(block);
            spill(inner, block, RecordKind::Kv);
        }
    }
}
