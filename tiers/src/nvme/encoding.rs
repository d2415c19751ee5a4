//! Encoding blocks on their way to the drive, on a few threads of the store. A record takes its place in the writer's queue
//! first and is encoded while it waits there, so that the order of records, flushes and the bound of the queue are the
//! same for all. The writer waits for a record that is being encoded; when the encoders have too much to do, records are
//! stored as they are. Slots are only read: what is encoded lies in buffers of its own.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Mutex, RwLock};
use xxhash_rust::xxh3::xxh3_64;

use super::append::{Form, QueuedRecord};
use super::io::Pages;
use super::page::PAGE_BYTES;
use super::record_header::HeaderKind;
use super::shared::Shared;
use super::stats::add;
use crate::block::NamespaceHandle;
use crate::codec::{Codec, CodecChoice, CodecHint, Encoder, Lane, Skip};
use crate::dram::Slot;
use crate::error::{Error, Result};

/// Threads that encode: a quarter of the machine, which has other things to do.
const ENCODERS_MAX: usize = 4;
/// Records that wait to be encoded at most.
const JOBS_MAX: usize = 4096;
/// Bytes of buffers that are kept for the next records.
const SPARE_BYTES_MAX: usize = 64 << 20;

/// A record as it goes to the drive, but for its header: the first page of `pages` is left for that.
pub(super) struct Image {
    pub(super) pages: Pages,
    pub(super) head: ImageHead,
}

/// What a record's header says of its encoded payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageHead {
    pub(super) codec: Codec,
    pub(super) stored_bytes: u64,
    pub(super) stored_xxh3: u64,
    pub(super) raw_xxh3: u64,
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
#[derive(Default)]
pub(super) struct Spares(Mutex<Vec<Pages>>);

impl Spares {
    fn take(&self, bytes: usize) -> Pages {
        let mut spares = self.0.lock();
        let fitting = spares.iter().position(|pages| (bytes..=2 * bytes).contains(&pages.allocated_bytes()));
        let mut pages = fitting.map(|at| spares.swap_remove(at)).unwrap_or_else(|| {
            drop(spares);
            Pages::new(bytes)
        });
        pages.set_bytes(bytes);
        pages
    }

    /// Gives a buffer back.
    pub(super) fn put(&self, pages: Pages) {
        let mut spares = self.0.lock();
        let held: usize = spares.iter().map(Pages::allocated_bytes).sum();
        if held + pages.allocated_bytes() <= SPARE_BYTES_MAX {
            spares.push(pages);
        }
    }
}

/// The threads that encode, and who decides what they get.
pub(super) struct Encoders {
    shared: Arc<Shared>,
    choice: CodecChoice,
    sender: Sender<Job>,
    waiting: Arc<AtomicU64>,
    waiting_bytes_max: u64,
    is_stopped: Arc<AtomicBool>,
    lanes: RwLock<HashMap<(NamespaceHandle, u16), Arc<Lane>>>,
}

impl Encoders {
    /// Starts the threads; none if nothing is to be encoded.
    ///
    /// # Errors
    /// `Io` if the system gives no threads.
    pub(super) fn start(
        shared: &Arc<Shared>,
        choice: CodecChoice,
        write_queue_bytes: u64,
    ) -> Result<(Self, Vec<JoinHandle<()>>)> {
        let (sender, receiver) = bounded::<Job>(JOBS_MAX);
        let is_stopped = Arc::new(AtomicBool::new(false));
        let threads = match choice {
            CodecChoice::None => 0,
            CodecChoice::Auto => super::cores().div_ceil(4).min(ENCODERS_MAX),
        };
        let start = |number| {
            let (receiver, is_stopped): (Receiver<Job>, _) = (receiver.clone(), Arc::clone(&is_stopped));
            let work = move || encode_all(&receiver, &is_stopped);
            std::thread::Builder::new().name(format!("pega-encode-{number}")).spawn(work)
        };
        let threads: std::io::Result<Vec<_>> = (0..threads).map(start).collect();
        let threads = threads.map_err(|source| Error::from_io("starting the store's encoder threads", source))?;
        let encoders = Self {
            shared: Arc::clone(shared),
            choice,
            sender,
            waiting: Arc::default(),
            // Half of what may wait for the drive: the other half can be written meanwhile.
            waiting_bytes_max: write_queue_bytes / 2,
            is_stopped,
            lanes: RwLock::default(),
        };
        Ok((encoders, threads))
    }

    /// Lets what still waits be stored as it is.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
    }

    /// Whether and how a record is to be encoded: for [`Encoders::carry_out`], once it has its place in the queue.
    pub(super) fn plan(&self, record: &mut QueuedRecord) -> Plan {
        let is_block = record.kind == HeaderKind::Kv && self.choice == CodecChoice::Auto;
        let Some(slot) = record.slot.as_ref().filter(|_| is_block) else { return Plan::Store };
        let Some(lane) = self.lane(record) else { return Plan::Store };
        let skip = if !self.shared.pays_to_decode() {
            Some(Skip::Speed)
        } else if self.waiting.load(Ordering::Relaxed) + record.payload_bytes > self.waiting_bytes_max {
            Some(Skip::Queue)
        } else {
            None
        };
        if let Some(skip) = skip {
            return Plan::Skip(skip);
        }
        let Some(codec) = lane.next() else { return Plan::Skip(Skip::Ratio) };
        let encoding = Arc::new(Encoding::default());
        let job = Job {
            shared: Arc::clone(&self.shared),
            encoding: Arc::clone(&encoding),
            slot: Arc::clone(slot),
            payload_bytes: record.payload_bytes as usize,
            codec,
            lane,
            waiting: Arc::clone(&self.waiting),
        };
        self.waiting.fetch_add(record.payload_bytes, Ordering::Relaxed);
        record.form = Form::Encoding(encoding);
        Plan::Encode(Box::new(job))
    }

    /// Does what was planned for a record that was accepted. Without room for it the record is stored as it is.
    pub(super) fn carry_out(&self, plan: Plan) {
        let skip = match plan {
            Plan::Store => None,
            Plan::Skip(skip) => Some(skip),
            Plan::Encode(job) => self.sender.try_send(*job).err().map(|_| Skip::Queue),
        };
        skip.into_iter().for_each(|skip| self.shared.counts.skip(skip));
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

/// What is to become of a record.
pub(super) enum Plan {
    /// It is none that is ever encoded.
    Store,
    Skip(Skip),
    Encode(Box<Job>),
}

/// A record to encode. Its end, whichever, tells the writer.
pub(super) struct Job {
    shared: Arc<Shared>,
    encoding: Arc<Encoding>,
    slot: Arc<Slot>,
    payload_bytes: usize,
    codec: Codec,
    lane: Arc<Lane>,
    waiting: Arc<AtomicU64>,
}

impl Job {
    fn run(&self, encoder: &mut Encoder) {
        let began = Instant::now();
        let image = self.encode(encoder);
        let counts = &self.shared.counts;
        add(&counts.encode_ns, began.elapsed().as_nanos() as u64);
        let raw_bytes = self.payload_bytes as u64;
        self.lane.note(raw_bytes, image.as_ref().map_or(raw_bytes, |image| image.head.stored_bytes));
        if image.is_none() {
            counts.skip(Skip::Ratio);
        }
        *self.encoding.0.lock() = Progress::Ended(image);
    }

    fn encode(&self, encoder: &mut Encoder) -> Option<Image> {
        let payload = self.slot.payload().get(..self.payload_bytes)?;
        let mut pages = self.shared.spares.take(PAGE_BYTES + self.payload_bytes);
        let Some(encoded) = encoder.encode(self.codec, payload, pages.as_mut_slice(), PAGE_BYTES) else {
            self.shared.spares.put(pages);
            return None;
        };
        let stored = &pages.as_slice()[encoded.frame.clone()];
        let (stored_bytes, stored_xxh3) = (stored.len() as u64, xxh3_64(stored));
        pages.set_bytes(encoded.frame.end);
        let head = ImageHead { codec: self.codec, stored_bytes, stored_xxh3, raw_xxh3: xxh3_64(payload) };
        Some(Image { pages, head })
    }
}

impl Drop for Job {
    /// Also when it was never run: the writer waits for it.
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.payload_bytes as u64, Ordering::Relaxed);
        let mut progress = self.encoding.0.lock();
        if matches!(*progress, Progress::Running) {
            *progress = Progress::Ended(None);
        }
        drop(progress);
        self.shared.inbox.poke();
    }
}

fn encode_all(jobs: &Receiver<Job>, is_stopped: &AtomicBool) {
    let mut encoder = Encoder::new();
    for job in jobs {
        if is_stopped.load(Ordering::Acquire) {
            continue;
        }
        if catch_unwind(AssertUnwindSafe(|| job.run(&mut encoder))).is_err() {
            tracing::error!("encoding a record panicked; it is stored as it is");
            encoder = Encoder::new();
        }
    }
}
