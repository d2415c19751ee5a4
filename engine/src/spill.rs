//! From DRAM to the store: hands dirty blocks over, and marks them clean when they are durable.

use std::sync::Arc;

use pegaflow_tiers::{Append, RecordKind};

use crate::inner::Inner;
use crate::residency::Resident;

/// Gives a dirty block to the store. If the store cannot take it the block stays in DRAM until it has to leave, and is
/// counted as a failed write.
pub(crate) fn spill(inner: &Arc<Inner>, block: &Arc<Resident>, kind: RecordKind) {
    let Some(store) = inner.drive.store() else {
        if inner.drive.is_configured() {
            failed(inner, block, kind);
        } else {
            inner.residency.mark_clean(block);
        }
        return;
    };
    // Holding the slot, not the block: "held" blocks count the users of a block, and the store is none.
    let weak_inner = Arc::downgrade(inner);
    let written = Arc::clone(block);
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
    inner.counters.write_failed_records.add(1);
    if kind == RecordKind::Object {
        inner.residency.hide(block);
    }
    inner.residency.mark_clean(block);
}
