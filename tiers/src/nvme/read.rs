//! Reading a record: pinned, read into a slot, verified, and only then handed on. The engine's thread only passes what
//! it has read to the verifiers, a few threads of the store that compute checksums and run the callbacks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use xxhash_rust::xxh3::xxh3_64;

use super::append::Done;
use super::drive::{Drive, REGION_FILE};
use super::io::{IoBuffer, IoCompletion, IoKind, IoPriority, IoRequest};
use super::page::PAGE_BYTES;
use super::record_header::{CODEC_STORED, DiskIdentity, RecordHeader};
use super::regions::RegionPins;
use super::shared::Shared;
use super::stats::add;
use crate::block::{BlockKey, RecordId, RecordKind};
use crate::dram::Slot;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Threads that verify.
const VERIFIERS: usize = 2;
/// Reads that are on the drive or being verified at most.
const READS_MAX: usize = 4096;

/// What a verified record's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Bytes of the payload; they start after the slot's header page.
    pub payload_bytes: u64,
    /// The key of the block before it.
    pub parent: BlockKey,
    /// How many blocks come before it in its chain.
    pub depth: u32,
    /// What the record is for.
    pub kind: RecordKind,
}

/// Called exactly once for every read that was accepted, on one of the store's two verifier threads, without any lock.
/// Should be short: the next read is verified when it returns.
pub type ReadDone = Box<dyn FnOnce(Result<Verified>) + Send>;

/// A read on its way. Its pins keep the region from being overwritten under it.
struct Reading {
    id: RecordId,
    identity: DiskIdentity,
    location: Location,
    slot: Arc<Slot>,
    _pins: RegionPins,
    in_flight: InFlight,
    result: Result<()>,
    done: Done<Verified>,
}

/// Counts a read until it has ended.
struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The threads that verify, and the way to them. They end when every sender is gone.
pub(super) struct Verifiers {
    sender: Sender<Box<Reading>>,
    in_flight: Arc<AtomicUsize>,
}

impl Verifiers {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Io` if the system gives no threads.
    pub(super) fn start(shared: &Arc<Shared>) -> Result<(Self, Vec<JoinHandle<()>>)> {
        let (sender, receiver) = bounded::<Box<Reading>>(READS_MAX);
        let start = |number| {
            let (shared, receiver): (_, Receiver<Box<Reading>>) = (Arc::clone(shared), receiver.clone());
            let work = move || receiver.iter().for_each(|reading| verify(&shared, *reading));
            std::thread::Builder::new().name(format!("pega-verify-{number}")).spawn(work)
        };
        let threads: std::io::Result<Vec<_>> = (0..VERIFIERS).map(start).collect();
        let threads = threads.map_err(|source| Error::from_io("starting the store's verifier threads", source))?;
        Ok((Self { sender, in_flight: Arc::new(AtomicUsize::new(0)) }, threads))
    }

    /// Starts a read.
    ///
    /// # Errors
    /// `NotFound` if the region is no longer in that generation or the namespace is not known, `InvalidInput` for a slot
    /// that is too small, `Busy` when too many reads are on their way. Then `done` is not called.
    pub(super) fn read(
        &self,
        shared: &Arc<Shared>,
        id: RecordId,
        location: Location,
        slot: Arc<Slot>,
        priority: IoPriority,
        done: ReadDone,
    ) -> Result<()> {
        let bytes = location.pages as usize * PAGE_BYTES;
        let is_inside =
            location.is_valid() && location.pages > 0 && location.page + location.pages <= shared.drive.region_pages();
        if bytes > slot.bytes() || !is_inside {
            let message = format!("a record of {bytes} bytes at {location:?} into a slot of {}", slot.bytes());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let identity = shared.namespaces.identity(&id).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("namespace {} is not known to the store", id.namespace.0))
        })?;
        let pins = shared.regions.pin(&[location])?;
        shared.regions.touch(location.region, shared.regions.next_tick());
        let in_flight = self.enter()?;
        let sender = self.sender.clone();
        let buffer = IoBuffer::Slot { slot: Arc::clone(&slot), bytes };
        let done = Done::new(done);
        let reading = Box::new(Reading { id, identity, location, slot, _pins: pins, in_flight, result: Ok(()), done });
        let (hand_over, take_back) = parts(reading);
        let request = IoRequest {
            file: REGION_FILE,
            kind: IoKind::Read,
            offset: shared.drive.offset(location.region, location.page),
            buffer: Some(buffer),
            priority,
            done: Box::new(move |completion: IoCompletion| {
                if let Some(mut reading) = hand_over.take() {
                    reading.result = completion.result;
                    // There is room: the channel holds as many as may be on their way. Without a receiver the store is
                    // closed, and the reading's end calls `done`.
                    drop(sender.try_send(reading));
                }
            }),
        };
        shared.drive.io().submit(request).map_err(|(_, error)| {
            drop(take_back.take().map(|reading| reading.done.into_inner()));
            error
        })
    }

    fn enter(&self) -> Result<InFlight> {
        let entered = InFlight(Arc::clone(&self.in_flight));
        if self.in_flight.fetch_add(1, Ordering::AcqRel) >= READS_MAX {
            let message = format!("{READS_MAX} reads are on their way, the limit; try again when some have ended");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        Ok(entered)
    }
}

fn verify(shared: &Shared, reading: Reading) {
    let Reading { id, identity, location, slot, _pins, in_flight, result, done } = reading;
    let outcome = result.and_then(|()| check(shared, &identity, &location, &slot.read_header(), slot.payload()));
    add(&shared.counts.reads, 1);
    match &outcome {
        Ok(verified) => {
            shared.poison.note_good_read();
            add(&shared.counts.read_bytes, verified.payload_bytes);
        }
        Err(error) if error.kind() == ErrorKind::Io && is_drive_gone(shared, error) => {
            tracing::debug!(
                ?id,
                ?location,
                error = format!("{error:#}"),
                "the drive is gone; the record is not to blame"
            );
        }
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) => {
            add(&shared.counts.bad_reads, 1);
            tracing::warn!(?id, ?location, error = format!("{error:#}"), "a record can not be used; it is quarantined");
            shared.forget_at(&id, &location);
            shared.inbox.push_bad_record(id, location);
        }
        Err(_) => {}
    }
    drop((_pins, in_flight));
    done.call(outcome);
}

/// Whether a read failed because of the whole drive.
pub(super) fn is_drive_gone(shared: &Shared, error: &Error) -> bool {
    shared.poison.note_failed_read(error, || Drive::read_superblock(shared.drive.io()).is_ok())
}

/// Everything that must hold before bytes from a drive are believed: `payload` starts after the header page.
pub(super) fn check(
    shared: &Shared,
    identity: &DiskIdentity,
    location: &Location,
    header: &[u8],
    payload: &[u8],
) -> Result<Verified> {
    let header = RecordHeader::decode(header)?;
    header.check_place(shared.uuid, location.region, location.generation, location.page)?;
    header.check_identity(identity)?;
    let corrupt = |what: String| Error::new(ErrorKind::Corrupt, what);
    if header.location.pages != location.pages {
        let (found, expected) = (header.location.pages, location.pages);
        return Err(corrupt(format!("a record has {found} pages, expected {expected}")));
    }
    let kind = header.kind.record_kind().filter(|_| header.kind.has_payload());
    let kind = kind.ok_or_else(|| corrupt(format!("a record is a {:?}, which has no payload", header.kind)))?;
    if header.codec != CODEC_STORED {
        return Err(corrupt(format!("a record has codec {}, this build knows none", header.codec)));
    }
    let payload = payload.get(..header.stored_bytes as usize);
    let payload = payload.ok_or_else(|| corrupt("a record is longer than its pages".into()))?;
    let checksum = xxh3_64(payload);
    if checksum != header.stored_xxh3 || checksum != header.raw_xxh3 {
        let expected = header.stored_xxh3;
        return Err(corrupt(format!("a record's payload has checksum {checksum:#x}, expected {expected:#x}")));
    }
    Ok(Verified { payload_bytes: header.raw_bytes, parent: header.parent, depth: header.depth, kind })
}

/// Two handles to one value, of which the first one used gets it: a refused request must not call `done`.
fn parts<T>(value: T) -> (Part<T>, Part<T>) {
    let shared = Arc::new(parking_lot::Mutex::new(Some(value)));
    (Part(Arc::clone(&shared)), Part(shared))
}

struct Part<T>(Arc<parking_lot::Mutex<Option<T>>>);

impl<T> Part<T> {
    fn take(&self) -> Option<T> {
        self.0.lock().take()
    }
}
