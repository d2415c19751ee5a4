//! The writer: the one thread that decides what lies where. It gives every record its sequence and its place in the
//! open region, keeps many writes in flight, and makes them durable in groups: data, then `fdatasync`, then the index,
//! then lookups, then the callbacks. It sleeps when there is nothing to do.
//!
//! `pending` holds everything submitted and not yet durable, in the order of sequences. Only a prefix of it that is
//! written without a gap is ever committed, so that recovery, which reads forward, finds whatever was reported durable.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use xxhash_rust::xxh3::xxh3_64;

use super::append::{Done, QueuedRecord};
use super::config::StoreConfig;
use super::counters::Counters;
use super::drive::{REGION_FILE, one_page};
use super::inbox::{Ending, Entry, News};
use super::io::{IoBuffer, IoCompletion, IoKind, IoPriority, IoRequest};
use super::page::PAGE_BYTES;
use super::record_header::{CODEC_STORED, HeaderKind, RecordHeader};
use super::shared::Shared;
use super::stats::add;
use crate::block::{KEY_CHAIN_VERSION, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexLog, Location, RegionMark};

mod commit;
mod reclaim;

pub(super) use commit::hiding_name;

/// How long to wait before a request that met a full queue of the engine is offered again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// How long records wait for a region before they fail: pins may go.
const REGION_WAIT: Duration = Duration::from_secs(2);

/// What the writer needs besides what it shares.
pub(super) struct WriterConfig {
    pub(super) queue_depth: usize,
    pub(super) commit_interval: Duration,
    pub(super) commit_bytes: u64,
}

impl WriterConfig {
    pub(super) fn new(config: &StoreConfig) -> Self {
        Self {
            queue_depth: config.queue_depth,
            commit_interval: config.commit_interval,
            // Well before the bound on what is not durable makes appends fail.
            commit_bytes: config.commit_bytes.min(config.write_queue_bytes / 2).max(1),
        }
    }
}

/// The region that records go to.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenRegion {
    pub(super) region: u32,
    pub(super) generation: u64,
    pub(super) next_page: u32,
}

/// Where recovery hands over.
pub(super) struct Handover {
    pub(super) counters: Counters,
    pub(super) index: Arc<IndexLog>,
    pub(super) open: Option<OpenRegion>,
    pub(super) free: VecDeque<u32>,
    /// The slot of each region that holds its current header.
    pub(super) header_slots: Vec<u32>,
}

/// How far a write has come.
enum Write {
    InFlight,
    Written,
    Failed(Error),
}

/// Something on its way to being durable.
struct Pending {
    since: Instant,
    what: What,
}

enum What {
    Record {
        record: Box<QueuedRecord>,
        location: Location,
        sequence: u64,
        replaces: bool,
        write: Write,
    },
    /// The region will take no more records; the last one has this sequence.
    Seal {
        region: u32,
        generation: u64,
        sequence: u64,
    },
    /// The index forgets a record up to this sequence.
    Forget {
        id: RecordId,
        sequence: u64,
    },
    Flush(Done<()>),
}

impl Pending {
    fn new(what: What) -> Self {
        Self { since: Instant::now(), what }
    }

    fn is_written(&self) -> bool {
        !matches!(self.what, What::Record { write: Write::InFlight | Write::Failed(_), .. })
    }

    /// Whether somebody waits for it now.
    fn is_urgent(&self) -> bool {
        match &self.what {
            What::Flush(_) => true,
            What::Record { record, .. } => record.is_for_reclaim,
            What::Seal { .. } | What::Forget { .. } => false,
        }
    }

    fn bytes(&self) -> u64 {
        match &self.what {
            What::Record { location, .. } => u64::from(location.pages) * PAGE_BYTES as u64,
            _ => 0,
        }
    }
}

/// The writer's state; see the module's documentation.
pub(super) struct Writer {
    shared: Arc<Shared>,
    config: WriterConfig,
    counters: Counters,
    index: Arc<IndexLog>,
    queue: VecDeque<Entry>,
    pending: VecDeque<Pending>,
    /// How much of `pending`, from the front on, is written, and what that comes to.
    written: usize,
    written_bytes: u64,
    is_written_urgent: bool,
    in_flight: usize,
    has_failed_write: bool,
    /// What the sync in flight covers.
    syncing: Option<Vec<Pending>>,
    open: Option<OpenRegion>,
    last_sequence: u64,
    free: VecDeque<u32>,
    header_slots: Vec<u32>,
    /// Marks that go into the next commit.
    marks: Vec<RegionMark>,
    reclaim: Option<reclaim::Reclaim>,
    reclaim_again_at: Option<Instant>,
    starving_since: Option<Instant>,
    busy_until: Option<Instant>,
    slots_in_flight: HashSet<usize>,
    /// Objects that are queued behind this point in the log but not found by lookups yet, by fingerprint.
    objects_pending: HashMap<u64, u32>,
    stale_records: u64,
    lives_since_sweep: u64,
    ending: Option<Ending>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, config: WriterConfig, handover: Handover) -> Self {
        Self {
            shared,
            config,
            last_sequence: handover.counters.sequence().saturating_sub(1),
            counters: handover.counters,
            index: handover.index,
            queue: VecDeque::new(),
            pending: VecDeque::new(),
            written: 0,
            written_bytes: 0,
            is_written_urgent: false,
            in_flight: 0,
            has_failed_write: false,
            syncing: None,
            open: handover.open,
            free: handover.free,
            header_slots: handover.header_slots,
            marks: Vec::new(),
            reclaim: None,
            reclaim_again_at: None,
            starving_since: None,
            busy_until: None,
            slots_in_flight: HashSet::new(),
            objects_pending: HashMap::new(),
            stale_records: 0,
            lives_since_sweep: 0,
            ending: None,
        }
    }

    /// Works until the store ends; then closes it in order, if it was drained.
    ///
    /// # Errors
    /// Why it could not be closed in order. What was reported durable is durable all the same.
    pub(super) fn run(mut self) -> Result<()> {
        loop {
            let news = self.shared.inbox.wait(self.deadline());
            self.take(news);
            self.fail_if_poisoned();
            self.repair_failed_writes();
            self.submit();
            self.sync_if_due();
            self.keep_a_spare_region();
            self.fail_if_starved();
            if self.is_finished() {
                return self.finish();
            }
        }
    }

    /// When to look again though nothing has happened.
    fn deadline(&self) -> Option<Instant> {
        let has_work = !self.queue.is_empty() || !self.pending.is_empty();
        if has_work && self.in_flight == 0 && self.syncing.is_none() && self.shared.poisoned().is_some() {
            return Some(Instant::now());
        }
        let commit = self.pending.front().filter(|_| self.syncing.is_none() && self.written > 0);
        let commit = commit.map(|oldest| oldest.since + self.config.commit_interval);
        let starved = self.starving_since.filter(|_| !self.queue.is_empty()).map(|since| since + REGION_WAIT);
        [commit, starved, self.busy_until].into_iter().flatten().min()
    }

    fn take(&mut self, news: News) {
        self.busy_until = None;
        self.queue.extend(news.entries);
        self.ending = news.ending.or(self.ending);
        for (sequence, result) in news.written {
            self.note_written(sequence, result);
        }
        self.advance_written();
        for (id, location) in news.bad_records {
            self.quarantine(id, location);
        }
        if let Some(result) = news.synced {
            self.finish_sync(result);
        }
    }

    fn note_written(&mut self, sequence: u64, result: Result<()>) {
        self.in_flight -= 1;
        let ended = self.pending.iter_mut().skip(self.written).find_map(|pending| match &mut pending.what {
            What::Record { record, sequence: of, write, .. } if *of == sequence => Some((record, write)),
            _ => None,
        });
        let Some((record, write)) = ended else {
            debug_assert!(false, "a write ended that is not pending");
            return;
        };
        if let Some(address) = record.slot_address() {
            self.slots_in_flight.remove(&address);
        }
        *write = match result {
            Ok(()) => {
                self.shared.poison.note_write(None);
                Write::Written
            }
            Err(error) => {
                self.shared.poison.note_write(Some(&error));
                tracing::warn!(sequence, error = format!("{error:#}"), "a write to the store failed");
                self.has_failed_write = true;
                Write::Failed(error)
            }
        };
    }

    fn advance_written(&mut self) {
        while let Some(next) = self.pending.get(self.written).filter(|next| next.is_written()) {
            self.written_bytes += next.bytes();
            self.is_written_urgent |= next.is_urgent();
            self.written += 1;
        }
    }

    /// Forgets a record that failed its checks, unless the log has another one by now.
    fn quarantine(&mut self, id: RecordId, location: Location) {
        let row = match self.index.get(&id) {
            Ok(Some(row)) if row.location == location => row,
            Ok(_) => return,
            Err(error) => return tracing::warn!(%error, "the row of a bad record could not be read"),
        };
        let identity = self.shared.namespaces.identity(&id);
        // An older version of an object must not come back when the index is rebuilt; blocks of a key are all the same.
        match identity.filter(|_| row.kind == crate::block::RecordKind::Object) {
            Some(identity) => {
                let tombstone = QueuedRecord::tombstone(id, identity, row.sequence, false);
                self.queue.push_front(Entry::Record(Box::new(tombstone)));
            }
            None => {
                self.pending.push_back(Pending::new(What::Forget { id, sequence: row.sequence }));
                self.advance_written();
            }
        }
    }

    /// Submits what is queued, as far as the drive, the regions and the order allow.
    fn submit(&mut self) {
        while !self.has_failed_write && self.in_flight < self.config.queue_depth && self.busy_until.is_none() {
            match self.queue.pop_front() {
                None => break,
                Some(Entry::Flush(done)) => self.pending.push_back(Pending::new(What::Flush(done))),
                Some(Entry::Record(record)) => {
                    if let Err(record) = self.submit_record(record) {
                        self.queue.push_front(Entry::Record(record));
                        break;
                    }
                }
            }
        }
        self.advance_written();
    }

    /// Submits one record, or gives it back when it has to wait.
    fn submit_record(&mut self, record: Box<QueuedRecord>) -> Result<(), Box<QueuedRecord>> {
        if record.slot_address().is_some_and(|address| self.slots_in_flight.contains(&address)) {
            return Err(record);
        }
        let Some(open) = self.room_for(record.pages) else { return Err(record) };
        let sequence = match self.counters.next_sequence() {
            Ok(sequence) => sequence,
            Err(error) => {
                self.shared.poison("reserving sequences failed", &error);
                return Err(record);
            }
        };
        let location =
            Location { region: open.region, generation: open.generation, page: open.next_page, pages: record.pages };
        let replaces = record.kind == HeaderKind::Object && self.is_known(record.id.fingerprint());
        let buffer = self.image(&record, location, sequence, replaces);
        let inbox = Arc::clone(&self.shared.inbox);
        let request = IoRequest {
            file: REGION_FILE,
            kind: IoKind::Write,
            offset: self.shared.drive.offset(location.region, location.page),
            buffer: Some(buffer),
            priority: IoPriority::Write,
            done: Box::new(move |completion: IoCompletion| inbox.push_written(sequence, completion.result)),
        };
        let write = match self.shared.drive.io().submit(request) {
            Ok(()) => Write::InFlight,
            Err((_, error)) if error.kind() == ErrorKind::Busy => {
                self.busy_until = Some(Instant::now() + BUSY_PAUSE);
                return Err(record);
            }
            Err((_, error)) => Write::Failed(error),
        };
        match &write {
            Write::InFlight => {
                self.in_flight += 1;
                self.slots_in_flight.extend(record.slot_address());
            }
            _ => self.has_failed_write = true,
        }
        if record.kind == HeaderKind::Object {
            *self.objects_pending.entry(record.id.fingerprint()).or_default() += 1;
        }
        self.last_sequence = sequence;
        self.open = Some(OpenRegion { next_page: open.next_page + record.pages, ..open });
        self.shared.regions.set_used(open.region, open.next_page + record.pages);
        self.pending.push_back(Pending::new(What::Record { record, location, sequence, replaces, write }));
        Ok(())
    }

    fn is_known(&self, fingerprint: u64) -> bool {
        self.objects_pending.contains_key(&fingerprint) || self.shared.locate(fingerprint).is_some()
    }

    /// What goes to the drive: the slot, with its header page filled, or a page with the header alone.
    fn image(&self, record: &QueuedRecord, location: Location, sequence: u64, replaces: bool) -> IoBuffer {
        let payload = record.slot.as_ref().and_then(|slot| slot.payload().get(..record.payload_bytes as usize));
        let checksum = payload.map_or(0, xxh3_64);
        let header = RecordHeader {
            kind: record.kind,
            replaces,
            store: self.shared.uuid,
            location,
            sequence,
            hides: if record.kind == HeaderKind::Tombstone { record.hides.unwrap_or(sequence) } else { 0 },
            identity: record.identity,
            shards: record.shards,
            codec: CODEC_STORED,
            key_version: KEY_CHAIN_VERSION,
            parent: record.parent,
            depth: record.depth,
            raw_bytes: record.payload_bytes,
            stored_bytes: record.payload_bytes,
            stored_xxh3: checksum,
            raw_xxh3: checksum,
            created_unix_ms: unix_ms(),
        };
        let page = header.encode();
        match &record.slot {
            Some(slot) => {
                slot.write_header(&page);
                IoBuffer::Slot { slot: Arc::clone(slot), bytes: record.pages as usize * PAGE_BYTES }
            }
            None => one_page(&page),
        }
    }

    /// After a failed write everything from it on is written once more, in another region. All writes have ended then:
    /// a slot's header may not change under a write.
    fn repair_failed_writes(&mut self) {
        if !self.has_failed_write || self.in_flight > 0 {
            return;
        }
        self.has_failed_write = false;
        let is_failed = |p: &Pending| matches!(p.what, What::Record { write: Write::Failed(_), .. });
        let Some(first) = self.pending.iter().position(is_failed) else { return };
        let rest = self.pending.split_off(first);
        let open = self.open.map(|open| (open.region, open.generation));
        let is_open_bad = |p: &Pending| {
            matches!(&p.what, What::Record { location, write: Write::Failed(_), .. }
                if Some((location.region, location.generation)) == open)
        };
        if rest.iter().any(is_open_bad) {
            self.seal_open_region();
        }
        let mut again = VecDeque::new();
        for pending in rest {
            match pending.what {
                What::Record { record, write: Write::Failed(error), .. } if record.is_retry => {
                    self.resolve(record, Err(error));
                }
                What::Record { record, .. } => again.push_back(Entry::Record(self.prepare_retry(record))),
                What::Flush(done) => again.push_back(Entry::Flush(done)),
                What::Seal { .. } | What::Forget { .. } => self.pending.push_back(pending),
            }
        }
        again.append(&mut self.queue);
        self.queue = again;
        self.advance_written();
    }

    fn prepare_retry(&mut self, mut record: Box<QueuedRecord>) -> Box<QueuedRecord> {
        add(&self.shared.counts.retried_appends, 1);
        record.is_retry = true;
        self.forget_pending_object(&record);
        record
    }

    fn forget_pending_object(&mut self, record: &QueuedRecord) {
        let fingerprint = record.id.fingerprint();
        if record.kind == HeaderKind::Object
            && let Some(count) = self.objects_pending.get_mut(&fingerprint)
        {
            *count -= 1;
            if *count == 0 {
                self.objects_pending.remove(&fingerprint);
            }
        }
    }

    /// Ends a record that was submitted.
    fn resolve(&mut self, record: Box<QueuedRecord>, result: Result<Location>) {
        self.forget_pending_object(&record);
        self.end(record, result);
    }

    /// Ends a record: its bytes no longer count, and whoever waits is told.
    fn end(&mut self, record: Box<QueuedRecord>, result: Result<Location>) {
        if record.is_for_reclaim {
            self.note_kept_tombstone(result.is_ok());
        } else if result.is_err() {
            add(&self.shared.counts.failed_appends, 1);
        }
        self.shared.inbox.release(record.charged_bytes);
        record.done.call(result);
    }

    /// Fails everything that is not durable, once nothing is in flight.
    fn fail_if_poisoned(&mut self) {
        let abandoned = || Error::new(ErrorKind::Closed, "the store was closed before this was durable");
        let abandoned = (self.ending == Some(Ending::Abandon)).then(abandoned);
        let Some(error) = self.shared.poisoned().or(abandoned) else { return };
        for entry in std::mem::take(&mut self.queue) {
            match entry {
                Entry::Record(record) => self.end(record, Err(error.clone())),
                Entry::Flush(done) => done.call(Err(error.clone())),
            }
        }
        if self.in_flight > 0 || self.syncing.is_some() {
            return;
        }
        self.has_failed_write = false;
        self.reset_written();
        for pending in std::mem::take(&mut self.pending) {
            self.fail(pending, &error);
        }
    }

    fn fail(&mut self, pending: Pending, error: &Error) {
        match pending.what {
            What::Record { record, .. } => self.resolve(record, Err(error.clone())),
            What::Flush(done) => done.call(Err(error.clone())),
            What::Seal { .. } | What::Forget { .. } => {}
        }
    }

    fn is_finished(&self) -> bool {
        self.ending.is_some()
            && self.queue.is_empty()
            && self.pending.is_empty()
            && self.syncing.is_none()
            && self.in_flight == 0
            && self.reclaim.is_none()
    }

    fn finish(self) -> Result<()> {
        if let Some(error) = self.shared.poisoned() {
            return Err(error);
        }
        if self.ending == Some(Ending::Abandon) {
            return Ok(());
        }
        if !self.marks.is_empty() {
            self.index.commit(&[], &self.marks)?;
        }
        self.index.sync()?;
        self.counters.finish()
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
