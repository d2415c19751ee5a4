//! Named objects: `PegaEngine.put`, `get` and `remove`. The same DRAM and store as blocks, in a namespace of their own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use pegaflow_tiers::{
    Append, BlockKey, Error, ErrorKind, IoPriority, Location, NamespaceHandle, RecordId, RecordKind, RegionPins,
    Result, Slot, Store, Verified,
};

use crate::api::SessionId;
use crate::engine::ObjectBytes;
use crate::inner::Inner;
use crate::residency::Resident;
use crate::scheduler::Asked;
use crate::spill::spill;

/// How long a put waits for room in DRAM.
const PUT_PATIENCE: Duration = Duration::from_secs(30);

/// Reads in flight for one call that gets many objects.
const READS_MAX: usize = 64;

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

/// What became of the start of a get.
enum Start {
    /// It is in DRAM, or nowhere.
    Ended(Option<ObjectBytes>),
    Reading(Reading),
    NoRoom,
}

/// A read of an object that is under way.
struct Reading {
    id: RecordId,
    store: Arc<Store>,
    location: Location,
    slot: Arc<Slot>,
    deadline: Instant,
    /// Its region is not reclaimed under the read.
    _pins: RegionPins,
}

pub(crate) fn get(inner: &Arc<Inner>, name: &[u8]) -> Result<Option<ObjectBytes>> {
    let mut got = Ok(None);
    get_each(inner, &[name], &mut |_, result| got = result);
    got
}

/// Gets objects, [`READS_MAX`] of them at a time from the drives, and hands each on as it comes, with its place among the
/// names. Every place is handed on once.
pub(crate) fn get_each(inner: &Arc<Inner>, names: &[&[u8]], each: &mut dyn FnMut(usize, Result<Option<ObjectBytes>>)) {
    // Room for all: one that comes after it was given up takes none of another's.
    let (sender, receiver) = bounded(names.len());
    let mut reading: HashMap<usize, Reading> = HashMap::new();
    // One of the objects waits for room that nobody gives back, not all of them.
    let mut may_wait = true;
    for (place, name) in names.iter().enumerate() {
        let id = id(name);
        loop {
            if reading.len() < READS_MAX {
                match start_get(inner, id, &sender, place, may_wait && reading.is_empty()) {
                    Ok(Start::Reading(started)) => drop(reading.insert(place, started)),
                    Ok(Start::Ended(found)) => each(place, Ok(found)),
                    Ok(Start::NoRoom) if !reading.is_empty() => {
                        take_in(inner, &mut reading, &receiver, each);
                        continue;
                    }
                    Ok(Start::NoRoom) => {
                        may_wait = false;
                        each(place, Err(no_room()));
                    }
                    Err(error) => each(place, Err(error)),
                }
                break;
            }
            take_in(inner, &mut reading, &receiver, each);
        }
    }
    while !reading.is_empty() {
        take_in(inner, &mut reading, &receiver, each);
    }
}

fn no_room() -> Error {
    Error::new(ErrorKind::Busy, "all of DRAM is in use; drop objects or give more dram")
}

/// Finds an object, and starts to read it if it is on a drive. Waits for room only if it `may_wait`: reads that have ended
/// give theirs back when they are taken in.
fn start_get(
    inner: &Arc<Inner>,
    id: RecordId,
    sender: &Sender<(usize, Result<Verified>)>,
    place: usize,
    may_wait: bool,
) -> Result<Start> {
    if let Some(resident) = inner.residency.get(&id) {
        let slot_bytes = resident.slot.bytes();
        inner.residency.touch_chain(std::iter::once((&id, slot_bytes)));
        inner.note_uses([id]);
        let prefixes = vec![id.key.prefix()];
        let (session, tag) = (SessionId(0), id.fingerprint());
        inner.requests.push(Asked { session, tag, place: id, shards: 1, slot_bytes, prefixes });
        return Ok(Start::Ended(Some(ObjectBytes::new(&resident))));
    }
    let Some(store) = inner.drive.store() else { return Ok(Start::Ended(None)) };
    let Some(location) = store.locate(&id) else { return Ok(Start::Ended(None)) };
    if inner.residency.is_removed(&id) {
        return Ok(Start::Ended(None));
    }
    let deadline = Instant::now() + inner.config.load_timeout();
    let Ok(pins) = store.pin(&[location]) else { return Ok(Start::Ended(None)) };
    let payload_bytes = (location.bytes() as usize).saturating_sub(pegaflow_tiers::HEADER_BYTES);
    let slot = if may_wait {
        inner.residency.alloc_until(payload_bytes, false, deadline)
    } else {
        inner.residency.alloc(payload_bytes)
    };
    let Some(slot) = slot.map(Arc::new) else { return Ok(Start::NoRoom) };
    let sender = sender.clone();
    let done = Box::new(move |result| drop(sender.try_send((place, result))));
    match store.read(id, location, Arc::clone(&slot), IoPriority::Demand, done) {
        // The store went out of use meanwhile: nothing is there.
        Err(error) if error.kind() == ErrorKind::Closed && !inner.is_closed() => return Ok(Start::Ended(None)),
        started => started?,
    }
    Ok(Start::Reading(Reading { id, store, location, slot, deadline, _pins: pins }))
}

/// Waits for the next read that ends, and hands it on; at their deadline those that have not.
fn take_in(
    inner: &Arc<Inner>,
    reading: &mut HashMap<usize, Reading>,
    receiver: &Receiver<(usize, Result<Verified>)>,
    each: &mut dyn FnMut(usize, Result<Option<ObjectBytes>>),
) {
    let Some(deadline) = reading.values().map(|read| read.deadline).min() else { return };
    match receiver.recv_deadline(deadline) {
        // One that was given up at its deadline is no more among them.
        Ok((place, result)) => {
            if let Some(read) = reading.remove(&place) {
                each(place, Ok(end_get(inner, read, result)));
            }
        }
        Err(_) => {
            let now = Instant::now();
            for (place, _) in reading.extract_if(|_, read| read.deadline <= now) {
                each(place, Err(Error::new(ErrorKind::Timeout, "the drive did not answer in time")));
            }
        }
    }
}

fn end_get(inner: &Inner, read: Reading, result: Result<Verified>) -> Option<ObjectBytes> {
    let Reading { id, store, location, slot, .. } = read;
    let verified = match result {
        Ok(verified) => verified,
        Err(error) => {
            tracing::debug!(%error, "an object did not come back from the drive");
            return None;
        }
    };
    let object = Resident::new(id, (verified.parent, verified.depth), slot, verified.payload_bytes, false);
    let _order = inner.object_order.lock();
    // It may have been replaced or removed in the meantime: then what was read is over.
    if let Some(newer) = inner.residency.get(&id) {
        return Some(ObjectBytes::new(&newer));
    }
    let is_over = !inner.drive.is_current(&store) || store.locate(&id) != Some(location);
    if inner.residency.is_removed(&id) || is_over {
        return Some(ObjectBytes::new(&object));
    }
    Some(ObjectBytes::new(&inner.residency.insert(object, false)))
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
