//! The thread that keeps the store in use. It sleeps until the store takes no more writes, says so in one line, and then
//! tries to open it again, at growing intervals: it sees first whether the file system takes writes at all, closes what
//! is left of the old store and opens a new one. A failed sync is never repeated: what was not durable is written anew,
//! as new records, out of DRAM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_tiers::{
    Append, BlockKey, Error, ErrorKind, NamespaceHandle, PoisonReason, RecordId, RecordKind, RecoveryReport, Result,
    Store,
};

use crate::drive_tier::DriveTier;
use crate::inner::Inner;
use crate::spill::spill;

/// The first attempt comes after this time; each that fails doubles it.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The longest time between attempts. A store that stayed in use for less goes on with the interval that it had.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How long an attempt waits for the old store to end.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that are written anew before it waits for them to be durable: loads need room meanwhile.
const AGAIN_BYTES: u64 = 64 << 20;
/// How long it waits for that.
const AGAIN_PATIENCE: Duration = Duration::from_secs(60);

/// The body of the thread.
pub(crate) fn keep(inner: &Arc<Inner>) {
    let tier = &inner.drive;
    let mut pause = RETRY_FIRST;
    let mut in_use_since = Instant::now();
    while wait_degraded(tier) {
        if in_use_since.elapsed() > RETRY_MAX {
            pause = RETRY_FIRST;
        }
        say_degraded(tier, pause);
        while tier.degraded().is_some() {
            if !wait_attempt(tier, pause) {
                break;
            }
            match reopen(inner) {
                Ok(report) => {
                    in_use_since = Instant::now();
                    tracing::info!(?report, "the store is in use again");
                    write_anew(inner);
                    tier.set_renewing(false);
                }
                Err(error) => {
                    pause = (pause * 2).min(RETRY_MAX);
                    note_failure(tier, &error);
                    tracing::warn!(error = format!("{error:#}"), retry_in = ?pause, "the store can not be opened yet");
                }
            }
        }
    }
    tier.end_helper();
}

/// Waits until the store is out of use; false when the engine closes.
fn wait_degraded(tier: &DriveTier) -> bool {
    let mut state = tier.state.lock();
    while state.degraded.is_none() && !state.is_closing {
        tier.changed.wait(&mut state);
    }
    !state.is_closing
}

/// Waits until the next attempt is due or wanted; false when the engine closes.
fn wait_attempt(tier: &DriveTier, pause: Duration) -> bool {
    let due = Instant::now() + pause;
    let mut state = tier.state.lock();
    while !state.is_closing && !std::mem::take(&mut state.is_wanted) {
        if tier.changed.wait_until(&mut state, due).timed_out() {
            break;
        }
    }
    !state.is_closing
}

fn say_degraded(tier: &DriveTier, pause: Duration) {
    let Some(degraded) = tier.degraded() else { return };
    tracing::error!(
        reason = degraded.reason.as_str(),
        error = %degraded.error,
        retry_in = ?pause,
        "degraded: blocks live in DRAM only until the store can be opened again"
    );
    if degraded.reason == PoisonReason::DeviceGone {
        // What lookups found there would only fail to load.
        tier.detach();
    }
}

fn note_failure(tier: &DriveTier, error: &Error) {
    let mut state = tier.state.lock();
    state.failed_attempts += 1;
    state.last_failure = Some(error.clone());
    drop(state);
    tier.changed.notify_all();
}

/// One attempt.
fn reopen(inner: &Arc<Inner>) -> Result<RecoveryReport> {
    let tier = &inner.drive;
    let source = tier.source.as_ref().ok_or_else(|| Error::new(ErrorKind::Closed, "there is no store"))?;
    // Until it is worth it the old store stays: it may still be read.
    Store::check_writable(&source.path)?;
    close_old(tier)?;
    let (store, report) = (source.open)()?;
    if let Err(error) = check_same(tier, &store).and_then(|()| move_namespaces(inner, &store)) {
        drop(store.close(Instant::now() + CLOSE_PATIENCE));
        return Err(error);
    }
    // Removals and replacements of objects that come now see either store, and none comes between.
    let _order = inner.object_order.lock();
    // Before: whoever sees the store in use and flushes waits for it.
    tier.set_renewing(true);
    tier.attach(Arc::clone(&store));
    renew_objects(inner, &store);
    // What was registered between the first time and the store's coming back.
    if let Err(error) = move_namespaces(inner, &store) {
        tracing::warn!(%error, "a namespace of the time without a store stays in DRAM only");
    }
    Ok(report)
}

/// Ends the old store; nothing of it is used afterwards.
fn close_old(tier: &DriveTier) -> Result<()> {
    tier.detach();
    tier.wait_scrub_ended(Instant::now() + CLOSE_PATIENCE)?;
    let Some(old) = tier.state.lock().retired.clone() else { return Ok(()) };
    match old.close(Instant::now() + CLOSE_PATIENCE) {
        Err(error) if error.kind() == ErrorKind::Timeout => return Err(error),
        // That it could not be closed in order is known.
        ended => tracing::debug!(?ended, "the old store has ended"),
    }
    let stats = old.stats();
    let mut state = tier.state.lock();
    state.past = state.past.plus(&stats);
    state.retired = None;
    Ok(())
}

/// Another store gives its numbers to other namespaces: blocks in DRAM would be taken for something else.
fn check_same(tier: &DriveTier, store: &Store) -> Result<()> {
    let expected = tier.state.lock().uuid;
    if expected.is_some_and(|uuid| uuid != store.uuid()) {
        let message = "there is another store in its place now; restart the server to use it";
        return Err(Error::new(ErrorKind::ForeignFormat, message));
    }
    Ok(())
}

/// Registers with the store what was registered while it was away, and sees that the others have kept their numbers.
fn move_namespaces(inner: &Inner, store: &Store) -> Result<()> {
    for known in inner.drive.namespaces.all() {
        let handle = match store.namespace(&known.descriptor, &known.groups) {
            Ok(handle) => handle,
            Err(error) if !known.is_of_store && error.kind() == ErrorKind::GeometryMismatch => {
                tracing::warn!(%error, "a namespace of the time without a store stays in DRAM only");
                continue;
            }
            Err(error) => return Err(error),
        };
        if known.is_of_store && handle != known.handle {
            let message = "the store has lost a namespace, whose number may be another's now; restart the server";
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        if !known.is_of_store {
            // The store may have kept what was purged, if that had not become durable.
            inner.residency.revive(handle);
            inner.drive.namespaces.note(&known.descriptor, &known.groups, handle);
            inner.registry.move_namespace(known.handle, handle);
        }
    }
    Ok(())
}

/// Objects that were put or removed while the store was away, or whose write failed: the store may know older versions,
/// which stay hidden until this is durable.
fn renew_objects(inner: &Arc<Inner>, store: &Arc<Store>) {
    for (id, removal) in inner.residency.removed() {
        if let Some(object) = inner.residency.get(&id) {
            spill(inner, &object, RecordKind::Object);
            continue;
        }
        if store.locate(&id).is_none() {
            inner.residency.end_removal(&id, removal);
            continue;
        }
        let weak = Arc::downgrade(inner);
        let done = Box::new(move |outcome: Result<_>| {
            if let (Some(inner), Ok(_)) = (weak.upgrade(), outcome) {
                inner.residency.end_removal(&id, removal);
            }
        });
        let (kind, parent) = (RecordKind::Tombstone, BlockKey::ROOT);
        let tombstone = Append { id, kind, parent, depth: 0, slot: None, payload_bytes: 0, done };
        if let Err((_, error)) = store.append(tombstone) {
            tracing::warn!(%error, "the removal of an object could not be made durable; it stays hidden");
        }
    }
}

/// Writes what is in DRAM and not in the store, as long as there is a store that takes it.
fn write_anew(inner: &Arc<Inner>) {
    let (mut blocks, mut bytes) = (0u64, 0);
    for id in inner.residency.ids() {
        let Some(store) = inner.drive.store().filter(|store| store.poison_reason().is_none()) else { return };
        if inner.is_closed() || inner.drive.state.lock().is_closing {
            return;
        }
        if store.locate(&id).is_some() || id.namespace.0 >= crate::known_namespaces::BESIDE_STORE {
            continue;
        }
        bytes += write_one(inner, &id);
        blocks += 1;
        if bytes >= AGAIN_BYTES {
            bytes = 0;
            if let Err(error) = store.flush(Instant::now() + AGAIN_PATIENCE) {
                return tracing::warn!(%error, "not all blocks in DRAM were written to the store");
            }
        }
    }
    tracing::info!(blocks, "blocks that came while the store was out of use are being written");
}

/// Bytes that this takes.
fn write_one(inner: &Arc<Inner>, id: &RecordId) -> u64 {
    let is_object = id.namespace == NamespaceHandle(0);
    // Of an object only the newest version, and none that is removed meanwhile.
    let _order = is_object.then(|| inner.object_order.lock());
    let Some(block) = inner.residency.get(id) else { return 0 };
    spill(inner, &block, if is_object { RecordKind::Object } else { RecordKind::Kv });
    block.slot.bytes() as u64
}
