//! Encoding blocks on their way to the drive, on a few threads of the store. A record takes its place in the writer's queue
//! first and is encoded while it waits there, so that the order of records, flushes and the bound of the queue are the
//! same for all. The writer waits for a record that is being encoded; when the encoders have too much to do, records are
//! stored as they are. Slots are only read: what is encoded lies in buffers of its own.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, RwLock};
use xxhash_rust::xxh3::xxh3_64;

use super::append::{Form, QueuedRecord, Sealing};
use super::encryption::{Seal, SealedAs};
use super::io::Pages;
use super::page::PAGE_BYTES;
use super::record_header::HeaderKind;
use super::shared::Shared;
use super::stats::add;
use super::switches::is_simulated;
use crate::block::NamespaceHandle;
use crate::codec::{Codec, CodecChoice, CodecHint, Encoder, Lane, Skip};
use crate::dram::Slot;
use crate::error::{Error, ErrorKind, Result};

/// Threads that encode: a quarter of the machine, which has other things to do; half of it where all is encrypted.
const ENCODERS_MAX: usize = 4;
/// Bytes of records that are encoded and not yet written; the encoders wait beyond it (but one record always goes).
const IMAGE_BYTES_MAX: u64 = if cfg!(test) { 256 << 10 } else { 256 << 20 };
/// Bytes of records that wait for the encoders, above which records are stored as they are: this share of what the writer's
/// queue holds, but not less than the second. While it is the drive that is behind there is time to encode all of them.
const WAITING_SHARE: u64 = 4;
const WAITING_BYTES_MIN: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };
/// Bytes of buffers that are kept for the next records. Where all records go through buffers, as many as are ever in use:
/// memory that is new to the process costs as much as encrypting what is put there.
const SPARE_BYTES_MAX: usize = 64 << 20;
const SPARE_BYTES_SEALED_MAX: usize = IMAGE_BYTES_MAX as usize;

/// A record as it goes to the drive, but for its header: the first page of `pages` is left for that.
pub(super) struct Image {
    pub(super) pages: Pages,
    pub(super) head: ImageHead,
}

/// What a record's header says of its encoded payload, and the room that it takes until it is written.
pub(super) struct ImageHead {
    /// `None` for one that the writer sealed itself.
    pub(super) _room: Option<Room>,
    pub(super) codec: Codec,
    pub(super) stored_bytes: u64,
    pub(super) stored_xxh3: u64,
    /// 0 if it is sealed.
    pub(super) raw_xxh3: u64,
    pub(super) seal: Option<Seal>,
}

/// What becomes of a record that is being encoded.
#[derive(Default)]
pub(super) struct Encoding(Mutex<Progress>);

#[derive(Default)]
enum Progress {
    #[default]
    Running,
    /// With no image it is stored as it is.
    Ended(Option<Image>),
}

impl Encoding {
    /// The outcome, once; `None` while it is being encoded.
    pub(super) fn take(&self) -> Option<Form> {
        match &mut *self.0.lock() {
            Progress::Running => None,
            Progress::Ended(image) => Some(image.take().map_or(Form::Stored, Form::Encoded)),
        }
    }
}

/// Buffers for encoded records. What is in use is bounded by the writer's queue.
pub(super) struct Spares {
    kept: Mutex<Kept>,
    is_sealing: bool,
}

#[derive(Default)]
struct Kept {
    pages: Vec<Pages>,
    bytes: usize,
}

impl Spares {
    /// For a store that is encrypted, or is not.
    pub(super) fn new(is_sealing: bool) -> Self {
        Self { kept: Mutex::default(), is_sealing }
    }

    fn take(&self, bytes: usize) -> Pages {
        let mut kept = self.kept.lock();
        let fitting = kept.pages.iter().rposition(|pages| (bytes..=2 * bytes).contains(&pages.allocated_bytes()));
        let spare = fitting.map(|at| kept.pages.swap_remove(at));
        kept.bytes -= spare.as_ref().map_or(0, Pages::allocated_bytes);
        drop(kept);
        let mut pages = spare.unwrap_or_else(|| Pages::new(bytes));
        pages.set_bytes(bytes);
        pages
    }

    /// Gives a buffer back.
    pub(super) fn put(&self, pages: Pages) {
        let mut kept = self.kept.lock();
        let most = if self.is_sealing { SPARE_BYTES_SEALED_MAX } else { SPARE_BYTES_MAX };
        if kept.bytes + pages.allocated_bytes() <= most {
            kept.bytes += pages.allocated_bytes();
            kept.pages.push(pages);
        }
    }
}

/// What the encoders have to do, in the order of the writer's queue: so whoever waits for room waits for records that are
/// written before his own.
#[derive(Default)]
struct Jobs {
    state: Mutex<JobState>,
    changed: Condvar,
}

#[derive(Default)]
struct JobState {
    waiting: VecDeque<Job>,
    waiting_bytes: u64,
    /// Of records that are being encoded, or are encoded and not yet written.
    image_bytes: u64,
    is_ended: bool,
}

impl JobState {
    fn has_room(&self, bytes: u64) -> bool {
        self.image_bytes == 0 || self.image_bytes + bytes <= IMAGE_BYTES_MAX
    }
}

impl Jobs {
    /// The next job with room for its image; `None` when there will be no more.
    fn next(self: &Arc<Self>) -> Option<(Job, Room)> {
        let mut state = self.state.lock();
        loop {
            let first = state.waiting.front().map(|job| job.payload_bytes as u64);
            match first {
                Some(bytes) if state.has_room(bytes) => {
                    let job = state.waiting.pop_front()?;
                    state.waiting_bytes -= bytes;
                    state.image_bytes += bytes;
                    return Some((job, Room { jobs: Arc::clone(self), bytes }));
                }
                None if state.is_ended => return None,
                _ => self.changed.wait(&mut state),
            }
        }
    }

    /// Lets the threads end; what still waits is stored as it is.
    fn end(&self) {
        let mut state = self.state.lock();
        state.is_ended = true;
        let left = std::mem::take(&mut state.waiting);
        state.waiting_bytes = 0;
        drop(state);
        self.changed.notify_all();
        drop(left);
    }
}

/// Room for an image, given back when dropped.
pub(super) struct Room {
    jobs: Arc<Jobs>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.jobs.state.lock().image_bytes -= self.bytes;
        self.jobs.changed.notify_one();
    }
}

/// The threads that encode, and who decides what they get.
pub(super) struct Encoders {
    shared: Arc<Shared>,
    choice: CodecChoice,
    jobs: Arc<Jobs>,
    /// Whether there are threads; without them the writer seals.
    has_threads: bool,
    waiting_bytes_max: u64,
    lanes: RwLock<HashMap<(NamespaceHandle, u16), Arc<Lane>>>,
}

impl Encoders {
    /// Starts the threads; none if nothing is to be encoded. The writer's queue holds `queue_bytes`. Dropping the result
    /// lets the threads end.
    ///
    /// # Errors
    /// `Io` if the system gives no threads.
    pub(super) fn start(
        shared: &Arc<Shared>,
        choice: CodecChoice,
        queue_bytes: u64,
    ) -> Result<(Self, Vec<JoinHandle<()>>)> {
        let jobs: Arc<Jobs> = Arc::default();
        let is_sealing = shared.keyring.is_some() && !is_simulated();
        let threads = match choice {
            CodecChoice::None if !is_sealing => 0,
            // Whatever goes to the drive goes through them.
            _ if is_sealing => super::cores().div_ceil(2).min(ENCODERS_MAX),
            _ => super::cores().div_ceil(4).min(ENCODERS_MAX),
        };
        let encoders = Self {
            shared: Arc::clone(shared),
            choice,
            jobs: Arc::clone(&jobs),
            has_threads: threads > 0,
            waiting_bytes_max: (queue_bytes / WAITING_SHARE).max(WAITING_BYTES_MIN),
            lanes: RwLock::default(),
        };
        let start = |number| {
            let jobs = Arc::clone(&jobs);
            std::thread::Builder::new().name(format!("pega-encode-{number}")).spawn(move || encode_all(&jobs))
        };
        let threads: std::io::Result<Vec<_>> = (0..threads).map(start).collect();
        let threads = threads.map_err(|source| Error::from_io("starting the store's encoder threads", source))?;
        Ok((encoders, threads))
    }

    /// Lets `push` put a record into the writer's queue, and has it encoded there if that is worth it.
    pub(super) fn push<E>(
        &self,
        mut record: Box<QueuedRecord>,
        push: impl FnOnce(Box<QueuedRecord>) -> Result<(), E>,
    ) -> Result<(), E> {
        let plan = self.plan(&mut record);
        match plan {
            Plan::Store => push(record),
            Plan::Skip(skip) => push(record).map(|()| self.shared.counts.skip(skip)),
            Plan::Encode(job) => {
                // Both queues have the same order.
                let mut state = self.jobs.state.lock();
                let pushed = push(record);
                if pushed.is_ok() && !state.is_ended {
                    state.waiting_bytes += job.payload_bytes as u64;
                    state.waiting.push_back(job);
                    drop(state);
                    self.jobs.changed.notify_one();
                } else {
                    drop(state);
                    drop(job);
                }
                pushed
            }
        }
    }

    /// Whether and how a record is to be encoded, and sealed.
    fn plan(&self, record: &mut QueuedRecord) -> Plan {
        let Some(slot) = record.slot.as_ref().filter(|_| self.has_threads) else { return Plan::Store };
        let (codec, lane, skip) = match self.choose(record) {
            Choice::Encode(codec, lane) => (codec, Some(lane), None),
            Choice::Skip(skip) => (Codec::Stored, None, Some(skip)),
            Choice::Store => (Codec::Stored, None, None),
        };
        if codec == Codec::Stored && record.sealing.is_none() {
            return skip.map_or(Plan::Store, Plan::Skip);
        }
        if let Some(skip) = skip {
            self.shared.counts.skip(skip);
        }
        let encoding = Arc::new(Encoding::default());
        let job = Job {
            shared: Arc::clone(&self.shared),
            encoding: Arc::clone(&encoding),
            slot: Arc::clone(slot),
            payload_bytes: record.payload_bytes as usize,
            codec,
            lane,
            sealing: record.sealing.clone(),
        };
        record.form = Form::Encoding(encoding);
        Plan::Encode(job)
    }

    /// Whether and how a record is to be compressed.
    fn choose(&self, record: &QueuedRecord) -> Choice {
        if record.kind != HeaderKind::Kv || self.choice == CodecChoice::None {
            return Choice::Store;
        }
        let Some(lane) = self.lane(record) else { return Choice::Store };
        if self.choice == CodecChoice::Auto && !self.shared.pays_to_decode() {
            return Choice::Skip(Skip::Speed);
        }
        let state = self.jobs.state.lock();
        let are_encoders_behind =
            state.waiting_bytes + record.payload_bytes > self.waiting_bytes_max && state.has_room(record.payload_bytes);
        drop(state);
        if are_encoders_behind {
            return Choice::Skip(Skip::Queue);
        }
        lane.next().map_or(Choice::Skip(Skip::Ratio), |codec| Choice::Encode(codec, lane))
    }

    fn lane(&self, record: &QueuedRecord) -> Option<Arc<Lane>> {
        let name = (record.id.namespace, record.id.group);
        if let Some(lane) = self.lanes.read().get(&name) {
            return Some(Arc::clone(lane));
        }
        let hint = self.shared.namespaces.descriptor(name.0).map(|descriptor| CodecHint::of(&descriptor))?;
        Some(Arc::clone(self.lanes.write().entry(name).or_insert_with(|| Arc::new(Lane::new(hint)))))
    }
}

impl Drop for Encoders {
    fn drop(&mut self) {
        self.jobs.end();
    }
}

/// How a record is to be compressed.
enum Choice {
    /// It is none that is ever compressed.
    Store,
    Skip(Skip),
    Encode(Codec, Arc<Lane>),
}

/// What is to become of a record.
enum Plan {
    /// It goes as it is; what has to be sealed is sealed by the writer.
    Store,
    Skip(Skip),
    Encode(Job),
}

/// A record to encode or to seal. Its end, whichever, tells the writer.
struct Job {
    shared: Arc<Shared>,
    encoding: Arc<Encoding>,
    slot: Arc<Slot>,
    payload_bytes: usize,
    codec: Codec,
    /// `None` if it is only sealed.
    lane: Option<Arc<Lane>>,
    sealing: Option<Arc<Sealing>>,
}

impl Job {
    fn run(&self, encoder: &mut Encoder, room: Room) {
        let began = Instant::now();
        let counts = &self.shared.counts;
        let mut image = None;
        let mut room = Some(room);
        if let Some(lane) = &self.lane {
            image = self.encode(encoder, &mut room);
            add(&counts.encode_ns, began.elapsed().as_nanos() as u64);
            let raw_bytes = self.payload_bytes as u64;
            lane.note(raw_bytes, image.as_ref().map_or(raw_bytes, |image| image.head.stored_bytes));
            if image.is_none() {
                counts.skip(Skip::Ratio);
            }
        }
        if let Some(sealing) = &self.sealing {
            let payload = self.slot.payload().get(..self.payload_bytes);
            let image_to_seal = image.take().or_else(|| Some(copied(&self.shared, payload?, room.take())));
            image = image_to_seal.and_then(|image| {
                // What can not be sealed here can not be sealed by the writer either, who then fails the record.
                seal(&self.shared, sealing, image).inspect_err(|error| tracing::warn!(%error, "not sealed")).ok()
            });
        }
        *self.encoding.0.lock() = Progress::Ended(image);
    }

    fn encode(&self, encoder: &mut Encoder, room: &mut Option<Room>) -> Option<Image> {
        let payload = self.slot.payload().get(..self.payload_bytes)?;
        let mut pages = self.shared.spares.take(PAGE_BYTES + self.payload_bytes);
        let Some(encoded) = encoder.encode(self.codec, payload, pages.as_mut_slice(), PAGE_BYTES) else {
            self.shared.spares.put(pages);
            return None;
        };
        let stored = &pages.as_slice()[encoded.frame.clone()];
        // Of what is sealed the sealed bytes are summed up.
        let stored_xxh3 = if self.sealing.is_some() { 0 } else { xxh3_64(stored) };
        let stored_bytes = stored.len() as u64;
        pages.set_bytes(encoded.frame.end);
        let (room, raw_xxh3) = (room.take(), xxh3_64(payload));
        let head = ImageHead { _room: room, codec: self.codec, stored_bytes, stored_xxh3, raw_xxh3, seal: None };
        Some(Image { pages, head })
    }
}

/// A payload as it is, in a buffer of its own, to be sealed there.
fn copied(shared: &Shared, payload: &[u8], room: Option<Room>) -> Image {
    let end = PAGE_BYTES + payload.len();
    let mut pages = shared.spares.take(end.next_multiple_of(PAGE_BYTES));
    pages.as_mut_slice()[PAGE_BYTES..end].copy_from_slice(payload);
    // Nothing that lay in the buffer before goes to the drive.
    pages.as_mut_slice()[end..].fill(0);
    let stored_bytes = payload.len() as u64;
    let codec = Codec::Stored;
    let head = ImageHead { _room: room, codec, stored_bytes, stored_xxh3: 0, raw_xxh3: 0, seal: None };
    Image { pages, head }
}

/// Seals an image, in place.
fn seal(shared: &Shared, sealing: &Sealing, mut image: Image) -> Result<Image> {
    let keyring = shared.keyring.as_ref();
    let keyring = keyring.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the store has no keys"))?;
    let head = &mut image.head;
    let (raw_bytes, stored_bytes) = (sealing.raw_bytes, head.stored_bytes);
    let form = SealedAs { codec: head.codec.number(), raw_bytes, stored_bytes, raw_xxh3: head.raw_xxh3 };
    let began = Instant::now();
    let Sealing { key, subject, names, .. } = sealing;
    let bytes = image.pages.as_mut_slice();
    head.seal = Some(keyring.seal(key, subject, &form, names, bytes)?);
    head.raw_xxh3 = 0;
    head.stored_xxh3 = xxh3_64(&bytes[PAGE_BYTES..PAGE_BYTES + stored_bytes as usize]);
    add(&shared.counts.seal_ns, began.elapsed().as_nanos() as u64);
    Ok(image)
}

/// Seals a payload as it is, for a writer whose record no encoder has sealed.
///
/// # Errors
/// `InvalidInput` for a payload that can not be sealed.
pub(super) fn seal_stored(shared: &Shared, sealing: &Sealing, payload: &[u8]) -> Result<Image> {
    seal(shared, sealing, copied(shared, payload, None))
}

impl Drop for Job {
    /// Also when it was never run: the writer waits for it.
    fn drop(&mut self) {
        let mut progress = self.encoding.0.lock();
        if matches!(*progress, Progress::Running) {
            *progress = Progress::Ended(None);
        }
        drop(progress);
        self.shared.inbox.poke();
    }
}

fn encode_all(jobs: &Arc<Jobs>) {
    let mut encoder = Encoder::new();
    while let Some((job, room)) = jobs.next() {
        if catch_unwind(AssertUnwindSafe(|| job.run(&mut encoder, room))).is_err() {
            tracing::error!("encoding a record panicked; it is stored as it is");
            encoder = Encoder::new();
        }
    }
}
