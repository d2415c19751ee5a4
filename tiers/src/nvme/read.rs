//! Reading a record: pinned, read into a slot, verified, and only then handed on. The engine's thread only passes what
//! it has read to the verifiers, a few threads of the store that compute checksums, decode and run the callbacks.
//!
//! A block that takes fewer pages than its slot has is read to the end of the slot, since it may be encoded: its frame is
//! decoded to the front, in the slot itself.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use xxhash_rust::xxh3::xxh3_64;

use super::append::Done;
use super::encryption::{Names, Seal};
use super::io::{IoBuffer, IoCompletion, IoKind, IoPriority, IoRequest};
use super::page::PAGE_BYTES;
use super::record_header::{DiskIdentity, RecordHeader};
use super::regions::RegionPins;
use super::shared::Shared;
use super::stats::add;
use super::switches::{self, is_off};
use crate::block::{BlockKey, NamespaceHandle, RecordId, RecordKind};
use crate::codec::{CHUNK_BYTES, Codec, Decoder, Encoder};
use crate::dram::Slot;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Threads that verify: half of the machine, within these.
const VERIFIERS_MIN: usize = 2;
const VERIFIERS_MAX: usize = 8;
/// Reads that are on the drive or being verified at most.
const READS_MAX: usize = 4096;

thread_local! {
    /// One to a thread, as long as the thread: its memory is not made anew for each record.
    static DECODER: RefCell<Decoder> = RefCell::default();
    /// Where records are decrypted whose bytes are not to be kept.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How many threads verify.
pub(super) fn verifiers() -> usize {
    (super::cores() / 2).clamp(VERIFIERS_MIN, VERIFIERS_MAX)
}

/// Bytes of payload per second that the verifiers decode together where there are cores for all of them: measured on a
/// few chunks of made-up bfloat16, in about two milliseconds. 0 if these can not be encoded.
pub(super) fn measure_decoding() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let exponents = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0xd120_2e8c_bcdb_4a35).wrapping_add(1);
        // Few exponents, each half as frequent as the next: like those of numbers around zero.
        let exponent = 126 - ((state >> 40) as u32 | 1 << 16).trailing_zeros() as u16;
        (exponent << 7 | (state >> 57) as u16).to_le_bytes()
    });
    let payload: Vec<u8> = exponents.take(CHUNK_BYTES).flatten().collect();
    let mut frame = vec![0; payload.len()];
    let Some(encoded) = Encoder::new().encode(Codec::Bf16, &payload, &mut frame, 0) else { return 0 };
    let (mut decoder, frame) = (Decoder::new(), &frame[encoded.frame]);
    let mut once = || {
        let began = Instant::now();
        let decoded = decoder.decode_each(Codec::Bf16, frame, payload.len() as u64, &mut |_| ());
        decoded.is_ok().then(|| began.elapsed().as_nanos())
    };
    // The first one warms up; the best of the others was disturbed least.
    let best = (0..5).filter_map(|_| once()).skip(1).min().unwrap_or(u128::MAX).max(1);
    let threads = verifiers().min(super::cores());
    u64::try_from(payload.len() as u128 * 1_000_000_000 / best).unwrap_or(0) * threads as u64
}

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

/// Called exactly once for every read that was accepted, on one of the store's verifier threads, without any lock.
/// Should be short: the next read is verified when it returns.
pub type ReadDone = Box<dyn FnOnce(Result<Verified>) + Send>;

/// A read on its way. Its pins keep the region from being overwritten under it.
struct Reading {
    /// As the store knows it.
    id: RecordId,
    /// The key that was asked for.
    key: BlockKey,
    identity: DiskIdentity,
    location: Location,
    slot: Arc<Slot>,
    /// Whether it is read to the end of the slot.
    at_end: bool,
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
            let work = switches::inherited(move || receiver.iter().for_each(|reading| verify(&shared, *reading)));
            std::thread::Builder::new().name(format!("pega-verify-{number}")).spawn(work)
        };
        let threads: std::io::Result<Vec<_>> = (0..verifiers()).map(start).collect();
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
        let bytes = location.bytes() as usize;
        let is_inside =
            location.is_valid() && location.pages > 0 && location.page + location.pages <= shared.drive.region_pages();
        if bytes > slot.bytes() || !is_inside {
            let message = format!("a record of {bytes} bytes at {location:?} into a slot of {}", slot.bytes());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let block_bytes = shared.namespaces.group(id.namespace, id.group).map_or(0, |group| group.block_bytes);
        if block_bytes > slot.payload_bytes() as u64 {
            let message = format!("a block of {block_bytes} bytes into a slot for {}", slot.payload_bytes());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let unknown =
            || Error::new(ErrorKind::NotFound, format!("namespace {} is not known to the store", id.namespace.0));
        let (key, id) = (id.key, shared.named(&id).ok_or_else(unknown)?);
        let identity = shared.namespaces.identity(&id).ok_or_else(unknown)?;
        let pins = shared.regions.pin(&[location])?;
        shared.regions.touch(location.region, shared.regions.next_tick());
        shared.note_use(&id);
        let in_flight = self.enter()?;
        let sender = self.sender.clone();
        let at_end = id.namespace != NamespaceHandle(0) && bytes < slot.bytes();
        let buffer = match at_end {
            false => IoBuffer::Slot { slot: Arc::clone(&slot), bytes },
            true => IoBuffer::SlotEnd { slot: Arc::clone(&slot), bytes },
        };
        let done = Done::new(done);
        let reading = Box::new(Reading {
            id,
            key,
            identity,
            location,
            slot,
            at_end,
            _pins: pins,
            in_flight,
            result: Ok(()),
            done,
        });
        let (hand_over, take_back) = parts(reading);
        let (file, offset) = shared.drive.locate(location.region, location.page);
        let request = IoRequest {
            file,
            kind: IoKind::Read,
            offset,
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
    let Reading { id, key, identity, location, slot, at_end, _pins, in_flight, result, done } = reading;
    let outcome = result.and_then(|()| match at_end {
        true => slot.with_all(|all| {
            let start = all.len() - location.bytes() as usize;
            check_in_place(shared, &identity, &location, key, all, start)
        }),
        false if shared.keyring.is_some() => {
            slot.with_all(|all| check_in_place(shared, &identity, &location, key, all, 0))
        }
        false => check(shared, &identity, &location, &slot.read_header(), slot.payload()),
    });
    add(&shared.counts.reads, 1);
    match &outcome {
        Ok(verified) => {
            shared.poison.note_good_read();
            add(&shared.counts.read_bytes, verified.payload_bytes);
            let pages_bytes = (location.pages as usize - 1) * PAGE_BYTES;
            add(&shared.counts.read_stored_bytes, verified.payload_bytes.min(pages_bytes as u64));
        }
        Err(error) if error.kind() == ErrorKind::Io && is_drive_gone(shared, &location, error) => {
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
        // Its key was destroyed: it is not damaged, and never found again.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            shared.forget_at(&id, &location);
            shared.inbox.push_bad_record(id, location);
        }
        Err(_) => {}
    }
    drop((_pins, in_flight));
    done.call(outcome);
}

/// Whether a read failed because of the whole drive.
pub(super) fn is_drive_gone(shared: &Shared, location: &Location, error: &Error) -> bool {
    shared.poison.note_failed_read(error, || shared.drive.is_alive(location.region))
}

/// Everything that must hold before bytes from a drive are believed: `payload` starts after the header page. What is encoded
/// is decoded too, and thrown away.
pub(super) fn check(
    shared: &Shared,
    identity: &DiskIdentity,
    location: &Location,
    header: &[u8],
    payload: &[u8],
) -> Result<Verified> {
    let checked = Checked::new(shared, identity, location, header, payload)?;
    if let Some(seal) = &checked.header.seal {
        let stored = checked.stored(payload)?;
        return SCRATCH.with_borrow_mut(|scratch| {
            scratch.clear();
            scratch.extend_from_slice(header);
            scratch.extend_from_slice(stored);
            let raw_xxh3 = checked.unseal(shared, seal, None, scratch)?.1;
            if checked.codec != Codec::Stored {
                let frame = scratch.get(PAGE_BYTES..).unwrap_or_default();
                checked.decoded(shared, raw_xxh3, |decoder, raw_bytes| {
                    decoder.decode_each(checked.codec, frame, raw_bytes, &mut |_| ())
                })?;
            }
            Ok(checked.verified)
        });
    }
    if checked.codec != Codec::Stored {
        let frame = checked.stored(payload)?;
        checked.decoded(shared, checked.header.raw_xxh3, |decoder, raw_bytes| {
            decoder.decode_each(checked.codec, frame, raw_bytes, &mut |_| ())
        })?;
    }
    Ok(checked.verified)
}

/// As [`check`], of a record that lies in a slot from `start` on: afterwards the payload, decrypted and decoded, is where
/// a slot has it. `key` is the key that was asked for.
fn check_in_place(
    shared: &Shared,
    identity: &DiskIdentity,
    location: &Location,
    key: BlockKey,
    all: &mut [u8],
    start: usize,
) -> Result<Verified> {
    let (header, payload) = all[start..].split_at(PAGE_BYTES);
    let mut checked = Checked::new(shared, identity, location, header, payload)?;
    let mut raw_xxh3 = checked.header.raw_xxh3;
    if let Some(seal) = checked.header.seal {
        let (names, sealed_xxh3) = checked.unseal(shared, &seal, Some(key), &mut all[start..])?;
        (checked.verified.parent, raw_xxh3) = (names.parent, sealed_xxh3);
    }
    let frame = start + PAGE_BYTES..start + PAGE_BYTES + checked.header.stored_bytes as usize;
    match checked.codec {
        Codec::Stored => all.copy_within(frame, PAGE_BYTES),
        codec => checked.decoded(shared, raw_xxh3, |decoder, raw_bytes| {
            decoder.decode_in_place(codec, all, frame.clone(), PAGE_BYTES, raw_bytes)
        })?,
    }
    Ok(checked.verified)
}

/// As [`check`], of a record whose name nobody asked for: `image` is header and stored bytes (decrypted in place), `payload`
/// becomes what was saved. Without encryption the key is the one that the store knows it by.
pub(super) fn read_whole(
    shared: &Shared,
    identity: &DiskIdentity,
    location: &Location,
    key: BlockKey,
    image: &mut [u8],
    payload: &mut Vec<u8>,
) -> Result<(Names, Verified)> {
    let (header, stored) = image.split_at(PAGE_BYTES);
    let checked = Checked::new(shared, identity, location, header, stored)?;
    let (mut names, mut raw_xxh3) = (Names { key, parent: checked.verified.parent }, checked.header.raw_xxh3);
    if let Some(seal) = checked.header.seal {
        (names, raw_xxh3) = checked.unseal(shared, &seal, None, image)?;
    }
    let frame = checked.stored(image.get(PAGE_BYTES..).unwrap_or_default())?;
    payload.clear();
    match checked.codec {
        Codec::Stored => payload.extend_from_slice(frame),
        codec => checked.decoded(shared, raw_xxh3, |decoder, raw_bytes| {
            decoder.decode_each(codec, frame, raw_bytes, &mut |piece| payload.extend_from_slice(piece))
        })?,
    }
    Ok((names, checked.verified))
}

/// A record whose header and stored bytes are what they should be.
struct Checked {
    header: RecordHeader,
    codec: Codec,
    verified: Verified,
}

impl Checked {
    fn new(
        shared: &Shared,
        identity: &DiskIdentity,
        location: &Location,
        header: &[u8],
        payload: &[u8],
    ) -> Result<Self> {
        let header = RecordHeader::decode(header, shared.header_key())?;
        header.check_place(shared.uuid, location.region, location.generation, location.page)?;
        header.check_identity(identity)?;
        if header.location.pages != location.pages {
            let (found, expected) = (header.location.pages, location.pages);
            return Err(corrupt(format!("a record has {found} pages, expected {expected}")));
        }
        let kind = header.kind.record_kind().filter(|_| header.kind.has_payload());
        let kind = kind.ok_or_else(|| corrupt(format!("a record is a {:?}, which has no payload", header.kind)))?;
        let codec = Codec::from_number(header.codec);
        let codec = codec.ok_or_else(|| corrupt(format!("a record has codec {}, which is not known", header.codec)))?;
        let payload_bytes = header.raw_bytes;
        let verified = Verified { payload_bytes, parent: header.parent, depth: header.depth, kind };
        let checked = Self { header, codec, verified };
        let checksum = xxh3_64(checked.stored(payload)?);
        let expected = checked.header.stored_xxh3;
        // What is sealed has the checksum of its sealed bytes alone in clear.
        let is_plain = codec == Codec::Stored && checked.header.seal.is_none();
        let is_right = checksum == expected && (!is_plain || checksum == checked.header.raw_xxh3);
        if !is_right && !is_off!(SkipPayloadChecksum) {
            return Err(corrupt(format!("a record's payload has checksum {checksum:#x}, expected {expected:#x}")));
        }
        Ok(checked)
    }

    /// The stored bytes in what lies behind the header.
    fn stored<'a>(&self, payload: &'a [u8]) -> Result<&'a [u8]> {
        let stored = payload.get(..self.header.stored_bytes as usize);
        stored.ok_or_else(|| corrupt("a record is longer than its pages".into()))
    }

    /// Decrypts the payload in `image`, header and stored bytes, in place: the record's names, and the checksum of the
    /// decoded payload. `key` is the key that was asked for, if somebody asked.
    fn unseal(&self, shared: &Shared, seal: &Seal, key: Option<BlockKey>, image: &mut [u8]) -> Result<(Names, u64)> {
        let keyring = shared.keyring.as_ref().ok_or_else(|| corrupt("a record is sealed, the store is not".into()))?;
        let began = Instant::now();
        let data_key = keyring.numbered(seal.key)?;
        let opened = data_key.open(&self.header.subject(), &self.header.sealed_as(), seal, image)?;
        add(&shared.counts.unseal_ns, began.elapsed().as_nanos() as u64);
        if key.is_some_and(|key| key != opened.0.key) {
            return Err(corrupt("a record has the name of another one".into()));
        }
        Ok(opened)
    }

    /// Decodes, and compares what came out with what went in.
    fn decoded(
        &self,
        shared: &Shared,
        raw_xxh3: u64,
        decode: impl FnOnce(&mut Decoder, u64) -> Result<u64>,
    ) -> Result<()> {
        let began = Instant::now();
        let checksum = DECODER.with_borrow_mut(|decoder| decode(decoder, self.header.raw_bytes))?;
        add(&shared.counts.decode_ns, began.elapsed().as_nanos() as u64);
        match raw_xxh3 {
            expected if checksum == expected => Ok(()),
            expected => {
                Err(corrupt(format!("a record's payload decodes to checksum {checksum:#x}, expected {expected:#x}")))
            }
        }
    }
}

fn corrupt(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, what)
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
