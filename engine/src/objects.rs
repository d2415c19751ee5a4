//! Named objects: `PegaEngine.put`, `get` and `remove`. The same DRAM and store as blocks, in a namespace of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use pegaflow_tiers::{Append, BlockKey, Error, ErrorKind, IoPriority, NamespaceHandle, RecordId, RecordKind, Result};

use crate::api::SessionId;
use crate::engine::ObjectBytes;
use crate::inner::Inner;
use crate::residency::Resident;
use crate::scheduler::Asked;
use crate::spill::spill;

/// How long a put waits for room in DRAM.
const PUT_PATIENCE: Duration = Duration::from_secs(30);

fn id(name: &[u8]) -> RecordId {
    RecordId { namespace: NamespaceHandle(0), group: 0, shard: 0, key: BlockKey::from_name(name) }
}

pub(crate) fn put(inner: &Arc<Inner>, name: &[u8], bytes: &[u8]) -> Result<()> {
    let limit = inner.object_bytes_max();
    if bytes.is_empty() || bytes.len() as u64 > limit {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "an object of {} bytes; give 1 to {limit} (a quarter of DRAM, and less than a region of the store)",
                bytes.len()
            ),
        ));
    }
    let busy = || {
        Error::new(
            ErrorKind::Busy,
            "DRAM is full of bytes that are not durable yet or in use; try again or give more dram",
        )
    };
    let mut slot = inner.residency.alloc_until(bytes.len(), true, Instant::now() + PUT_PATIENCE).ok_or_else(busy)?;
    let (content, padding) = slot.payload_mut().split_at_mut(bytes.len());
    content.copy_from_slice(bytes);
    padding.fill(0);
    let has_store = inner.drive.is_configured();
    let object = Resident::new(id(name), (BlockKey::ROOT, 0), Arc::new(slot), bytes.len() as u64, has_store);
    // One object after the other from here on: the store must see versions in the order in which readers do.
    let _order = inner.object_order.lock();
    drop(inner.residency.insert(Arc::clone(&object), true));
    spill(inner, &object, RecordKind::Object);
    Ok(())
}

pub(crate) fn get(inner: &Arc<Inner>, name: &[u8]) -> Result<Option<ObjectBytes>> {
    let id = id(name);
    if let Some(resident) = inner.residency.get(&id) {
        let slot_bytes = resident.slot.bytes();
        inner.residency.touch_chain(std::iter::once((&id, slot_bytes)));
        inner.note_uses([id]);
        let prefixes = vec![id.key.prefix()];
        let (session, tag) = (SessionId(0), id.fingerprint());
        inner.requests.push(Asked { session, tag, place: id, shards: 1, slot_bytes, prefixes });
        return Ok(Some(ObjectBytes::new(&resident)));
    }
    let Some(store) = inner.drive.store() else { return Ok(None) };
    let Some(location) = store.locate(&id) else { return Ok(None) };
    if inner.residency.is_removed(&id) {
        return Ok(None);
    }
    let deadline = Instant::now() + inner.config.load_timeout();
    let Ok(_pins) = store.pin(&[location]) else { return Ok(None) };
    let payload_bytes = (location.bytes() as usize).saturating_sub(pegaflow_tiers::HEADER_BYTES);
    let busy = || Error::new(ErrorKind::Busy, "all of DRAM is in use; drop objects or give more dram");
    let slot = Arc::new(inner.residency.alloc_until(payload_bytes, false, deadline).ok_or_else(busy)?);
    let (sender, receiver) = bounded(1);
    let done = Box::new(move |result| drop(sender.try_send(result)));
    match store.read(id, location, Arc::clone(&slot), IoPriority::Demand, done) {
        // The store went out of use meanwhile: nothing is there.
        Err(error) if error.kind() == ErrorKind::Closed && !inner.is_closed() => return Ok(None),
        started => started?,
    }
    let verified = match receiver.recv_deadline(deadline) {
        Ok(Ok(verified)) => verified,
        Ok(Err(error)) => {
            tracing::debug!(%error, "an object did not come back from the drive");
            return Ok(None);
        }
        Err(_) => return Err(Error::new(ErrorKind::Timeout, "the drive did not answer in time")),
    };
    let object = Resident::new(id, (verified.parent, verified.depth), slot, verified.payload_bytes, false);
    let _order = inner.object_order.lock();
    // It may have been replaced or removed in the meantime: then what was read is over.
    if let Some(newer) = inner.residency.get(&id) {
        return Ok(Some(ObjectBytes::new(&newer)));
    }
    let is_over = !inner.drive.is_current(&store) || store.locate(&id) != Some(location);
    if inner.residency.is_removed(&id) || is_over {
        return Ok(Some(ObjectBytes::new(&object)));
    }
    Ok(Some(ObjectBytes::new(&inner.residency.insert(object, false))))
}

pub(crate) fn remove(inner: &Arc<Inner>, name: &[u8]) -> Result<bool> {
    let id = id(name);
    let _order = inner.object_order.lock();
    let was_there = contains_id(inner, &id);
    if !was_there {
        return Ok(false);
    }
    let (taken, removal) = inner.residency.remove(&id);
    if let Some(taken) = &taken {
        // Whether or not its write has ended: nobody waits for its room any more.
        inner.residency.mark_clean(taken);
    }
    let Some(store) = inner.drive.store() else {
        if inner.drive.is_configured() {
            // Hidden for as long as this engine runs, and removed when the store is back.
            return Ok(true);
        }
        inner.residency.end_removal(&id, removal);
        return Ok(true);
    };
    let weak = Arc::downgrade(inner);
    let done = Box::new(move |outcome: Result<_>| {
        // A removal that could not be made durable goes on hiding the object for as long as this engine runs.
        if let (Some(inner), Ok(_)) = (weak.upgrade(), outcome) {
            inner.residency.end_removal(&id, removal);
        }
    });
    let append = Append {
        id,
        kind: RecordKind::Tombstone,
        parent: BlockKey::ROOT,
        depth: 0,
        slot: None,
        payload_bytes: 0,
        done,
    };
    store.append(append).map_err(|(_, error)| error)?;
    Ok(true)
}

pub(crate) fn contains(inner: &Inner, name: &[u8]) -> bool {
    contains_id(inner, &id(name))
}

fn contains_id(inner: &Inner, id: &RecordId) -> bool {
    inner.residency.contains(id)
        || (inner.drive.store().is_some_and(|store| store.locate(id).is_some()) && !inner.residency.is_removed(id))
}
