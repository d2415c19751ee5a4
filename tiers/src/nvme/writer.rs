//! The writer: the one thread that decides what lies where. It gives every record its sequence and its place in an
//! open region, one on each drive, keeps many writes in flight, and makes them durable in groups: data, then `fdatasync`, then the index,
//! then lookups, then the callbacks. It sleeps when there is nothing to do.
//!
//! `pending` holds everything submitted and not yet durable, in the order of sequences. Only a prefix of it that is
//! written without a gap is ever committed, so that recovery, which reads forward, finds whatever was reported durable.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use xxhash_rust::xxh3::xxh3_64;

use super::append::{Done, Form, QueuedRecord};
use super::config::StoreConfig;
use super::counters::Counters;
use super::drive::one_page;
use super::encoding::{Image, seal_stored};
use super::inbox::{Ending, Entry, News};
use super::io::{IoBuffer, IoCompletion, IoKind, IoPriority, IoRequest};
use super::page::{PAGE_BYTES, Page};
use super::record_header::{CODEC_STORED, HeaderKind, RecordHeader};
use super::region_header::HEADER_SLOTS;
use super::shared::Shared;
use super::stats::add;
use super::switches::is_off;
use crate::block::{KEY_CHAIN_VERSION, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexLog, Location, RegionMark};
use reinsert::CopyRoom;

mod commit;
mod lanes;
mod reclaim;
mod reinsert;
mod reinserter;

pub(super) use commit::hiding_name;
pub(super) use reinsert::Reinsert;

/// How long to wait before a request that met a full queue of the engine is offered again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// How long records wait for a region before they fail: pins may go.
const REGION_WAIT: Duration = Duration::from_secs(2);

/// What the writer needs besides what it shares.
pub(super) struct WriterConfig {
    pub(super) commit_interval: Duration,
    pub(super) commit_bytes: u64,
    pub(super) reinsert_percent: u32,
}

impl WriterConfig {
    pub(super) fn new(config: &StoreConfig) -> Self {
        Self {
            commit_interval: config.commit_interval,
            // Well before the bound on what is not durable makes appends fail.
            commit_bytes: config.commit_bytes.min(config.write_queue_bytes / 2).max(1),
            reinsert_percent: config.reinsert_percent,
        }
    }
}

/// A region that records go to.
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
    /// By drive: the region to go on with, and the free ones.
    pub(super) lanes: Vec<(Option<OpenRegion>, VecDeque<u32>)>,
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
    /// The header of a region that was opened, with which its records count. It goes into the log before the first of
    /// them, so that the sync that makes them durable comes after it.
    Opened {
        region: u32,
        header: Box<Page>,
        /// A number of the log that no record has.
        sequence: u64,
        write: Write,
    },
    /// The header of a region that was given up: it is free when this is durable.
    Freed {
        region: u32,
        generation: u64,
        sequence: u64,
        write: Write,
    },
    /// The region will take no more records; the last one has this sequence. What counts in it ends at this page: the
    /// end of the region, or where something was written once more.
    Seal {
        region: u32,
        generation: u64,
        sequence: u64,
        page: u32,
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
        match &self.what {
            What::Opened { .. } if is_off!(SkipRegionHeader) => true,
            What::Record { write, .. } | What::Opened { write, .. } => matches!(write, Write::Written),
            // A region that could not be given up holds up nobody.
            What::Freed { write, .. } => !matches!(write, Write::InFlight),
            What::Seal { .. } | What::Forget { .. } | What::Flush(_) => true,
        }
    }

    /// The write that it stands for, and where that goes.
    fn write(&mut self) -> Option<(u64, u32, &mut Write)> {
        match &mut self.what {
            What::Record { sequence, write, location, .. } => Some((*sequence, location.region, write)),
            What::Opened { sequence, write, region, .. } | What::Freed { sequence, write, region, .. } => {
                Some((*sequence, *region, write))
            }
            What::Seal { .. } | What::Forget { .. } | What::Flush(_) => None,
        }
    }

    /// The region that it was written to, if it was.
    fn region(&self) -> Option<u32> {
        match &self.what {
            What::Record { location, .. } => Some(location.region),
            What::Opened { region, .. } | What::Freed { region, .. } => Some(*region),
            What::Seal { .. } | What::Forget { .. } | What::Flush(_) => None,
        }
    }

    /// Whether its write failed, and what lies behind it has to go elsewhere.
    fn has_failed(&self) -> bool {
        matches!(self.what, What::Record { write: Write::Failed(_), .. } | What::Opened { write: Write::Failed(_), .. })
    }

    /// Whether somebody waits for it now.
    fn is_urgent(&self) -> bool {
        match &self.what {
            What::Flush(_) => true,
            What::Record { record, .. } => record.is_for_reclaim,
            What::Opened { .. } | What::Freed { .. } | What::Seal { .. } | What::Forget { .. } => false,
        }
    }

    fn bytes(&self) -> u64 {
        match &self.what {
            What::Record { location, .. } => location.bytes(),
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
    syncing: Option<commit::Syncing>,
    /// By drive.
    lanes: Vec<lanes::Lane>,
    /// The drive whose turn it is among equals.
    next_lane: usize,
    last_sequence: u64,
    header_slots: Vec<u32>,
    /// By its number, the region whose second header is being written.
    header_copies: HashMap<u64, u32>,
    /// Marks that go into the next commit.
    marks: Vec<RegionMark>,
    reclaim: Option<reclaim::Reclaim>,
    starving_since: Option<Instant>,
    busy_until: Option<Instant>,
    slots_in_flight: HashSet<usize>,
    /// Records to be written again before their region goes; they go before the queue.
    copies: VecDeque<Box<QueuedRecord>>,
    reinserter: Option<reinserter::Reinserter>,
    reinsertion: Option<reinsert::Reinsertion>,
    /// By drive: the region, with its generation, whose records were written again last.
    reinserted_last: Vec<Option<(u32, u64)>>,
    /// Objects and tombstones that have their place in the log and that lookups do not show yet, by fingerprint.
    changes_pending: HashMap<u64, u32>,
    stale_records: u64,
    lives_since_sweep: u64,
    ending: Option<Ending>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, config: WriterConfig, handover: Handover) -> Self {
        let drives = handover.lanes.len();
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
            lanes: handover
                .lanes
                .into_iter()
                .map(|(open, free)| lanes::Lane { open, free, ..lanes::Lane::default() })
                .collect(),
            next_lane: 0,
            header_slots: handover.header_slots,
            header_copies: HashMap::new(),
            marks: Vec::new(),
            reclaim: None,
            starving_since: None,
            busy_until: None,
            slots_in_flight: HashSet::new(),
            copies: VecDeque::new(),
            reinserter: None,
            reinsertion: None,
            reinserted_last: vec![None; drives],
            changes_pending: HashMap::new(),
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
        let starved = self.starving_since.filter(|_| !self.queue.is_empty() && !self.is_freeing_a_region());
        let starved = starved.map(|since| since + REGION_WAIT);
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
        self.copies.extend(news.copies);
        if let Some(copied) = news.copied {
            self.note_copied(copied);
        }
        for (id, location) in news.bad_records {
            self.quarantine(id, location);
        }
        for result in news.synced {
            self.note_synced(result);
        }
        for question in news.sequence_questions {
            question.call(Ok(self.counters.sequence().saturating_sub(1)));
        }
    }

    fn note_written(&mut self, sequence: u64, result: Result<()>) {
        self.in_flight -= 1;
        let has_failed = result.is_err();
        if let Some(region) = self.header_copies.remove(&sequence) {
            self.note_ended(region, 0, has_failed);
            return result.unwrap_or_else(|error| tracing::warn!(%error, "a region's second header was not written"));
        }
        let is_of = |pending: &mut Pending| pending.write().is_some_and(|(of, ..)| of == sequence);
        let Some(ended) = self.pending.iter_mut().skip(self.written).find_map(|p| is_of(p).then_some(p)) else {
            debug_assert!(false, "a write ended that is not pending");
            return;
        };
        match &mut ended.what {
            What::Record { record, .. } => {
                record.slot_address().map(|address| self.slots_in_flight.remove(&address));
                if let Form::Sent(head) = &mut record.form {
                    // Its buffer is free again.
                    drop(head.take());
                }
            }
            What::Opened { region, .. } | What::Freed { region, .. } if !has_failed => {
                let slot = &mut self.header_slots[*region as usize];
                *slot = (*slot + 1) % HEADER_SLOTS;
            }
            _ => {}
        }
        let bytes = ended.bytes();
        let Some((_, region, write)) = ended.write() else { return };
        *write = match result {
            Ok(()) => {
                self.shared.poison.note_write(None);
                Write::Written
            }
            Err(_) if is_off!(IgnoreFailedWrite) => Write::Written,
            Err(error) => {
                let in_a_row = self.shared.poison.note_write(Some(&error));
                // A queue full of writes fails at once where a drive is gone.
                if in_a_row.is_power_of_two() {
                    tracing::warn!(sequence, in_a_row, error = format!("{error:#}"), "a write to the store failed");
                }
                Write::Failed(error)
            }
        };
        self.has_failed_write |= ended.has_failed();
        self.note_ended(region, bytes, has_failed);
    }

    fn advance_written(&mut self) {
        while let Some(next) =
            self.pending.get(self.written).filter(|next| next.is_written() || is_off!(CommitPastHoles))
        {
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
        let has_older = row.kind == crate::block::RecordKind::Object && !is_off!(QuarantineWithoutTombstone);
        match identity.filter(|_| has_older) {
            Some(identity) => {
                let tombstone = QueuedRecord::tombstone(id, identity, row.sequence, false);
                self.put_back(Box::new(tombstone));
            }
            None => {
                self.pending.push_back(Pending::new(What::Forget { id, sequence: row.sequence }));
                self.advance_written();
            }
        }
    }

    /// Submits what is queued, as far as the drive, the regions and the order allow.
    fn submit(&mut self) {
        while !self.has_failed_write && self.busy_until.is_none() {
            // What a region that is being given up waits for comes first: for that there is room.
            if !self.has_copies_queued()
                && let Some(copy) = self.copies.pop_front()
            {
                if let Err(copy) = self.submit_record(copy) {
                    self.copies.push_front(copy);
                    break;
                }
                continue;
            }
            match self.queue.pop_front() {
                None => break,
                Some(Entry::Flush(done)) => self.pending.push_back(Pending::new(What::Flush(done))),
                Some(Entry::Record(record)) => {
                    let was_for_reclaim = record.is_for_reclaim;
                    if let Err(record) = self.submit_record(record) {
                        self.put_back(record);
                        // It may have to wait for a region to be given up, which needs others written first.
                        if was_for_reclaim || !self.has_copies_queued() {
                            break;
                        }
                    }
                }
            }
        }
        self.advance_written();
    }

    /// To the front of the queue, but behind what a region that is being given up waits for: for that there is room.
    fn put_back(&mut self, record: Box<QueuedRecord>) {
        let is_copy = |entry: &&Entry| matches!(entry, Entry::Record(record) if record.is_for_reclaim);
        let copies = if record.is_for_reclaim { 0 } else { self.queue.iter().take_while(is_copy).count() };
        self.queue.insert(copies, Entry::Record(record));
    }

    /// Whether tombstones that a region waits for are next.
    fn has_copies_queued(&self) -> bool {
        matches!(self.queue.front(), Some(Entry::Record(record)) if record.is_for_reclaim)
    }

    /// Submits one record, or gives it back when it has to wait.
    fn submit_record(&mut self, mut record: Box<QueuedRecord>) -> Result<(), Box<QueuedRecord>> {
        if self.is_purged(&record) {
            self.end(record, Err(commit::purged()));
            return Ok(());
        }
        // Its encoder lets the writer look again.
        if !record.settle_form() {
            return Err(record);
        }
        if record.slot_address().is_some_and(|address| self.slots_in_flight.contains(&address)) {
            return Err(record);
        }
        let room = match &record.reinsert {
            None => self.room_for(&record),
            Some(reinsert) => match self.room_for_copy(&record, reinsert) {
                CopyRoom::Never => {
                    self.drop_copy(record);
                    return Ok(());
                }
                CopyRoom::Later => None,
                CopyRoom::Here(lane, open) => Some((lane, open)),
            },
        };
        let Some((lane, open)) = room else { return Err(record) };
        if let Err(error) = self.seal_if_needed(&mut record) {
            self.end(record, Err(error));
            return Ok(());
        }
        let sequence = match self.counters.next_sequence() {
            Ok(sequence) => sequence,
            Err(error) => {
                self.shared.poison("reserving sequences failed", &error);
                return Err(record);
            }
        };
        let location =
            Location { region: open.region, generation: open.generation, page: open.next_page, pages: record.pages };
        let is_replacing = record.kind == HeaderKind::Object && self.is_known(&record.id);
        let replaces = is_replacing && !is_off!(ForgetReplaced);
        let header = self.header(&record, location, sequence, replaces);
        let buffer = fill(&mut record, &header.encode(self.shared.header_key()));
        let is_encoded = matches!(record.form, Form::Sent(_));
        let permit = record.reinsert.as_mut().and_then(|reinsert| reinsert.permit.take());
        let shared = Arc::clone(&self.shared);
        let (file, offset) = self.shared.drive.locate(location.region, location.page);
        let request = IoRequest {
            file,
            kind: IoKind::Write,
            offset,
            buffer: Some(buffer),
            priority: IoPriority::Write,
            done: Box::new(move |completion: IoCompletion| {
                if let Some(IoBuffer::Pages(pages)) = completion.buffer.filter(|_| is_encoded) {
                    shared.spares.put(pages);
                }
                // Its memory is free.
                drop(permit);
                shared.inbox.push_written(sequence, completion.result);
            }),
        };
        let write = match self.shared.drive.io().submit(request) {
            Ok(()) => Write::InFlight,
            Err((request, error)) if error.kind() == ErrorKind::Busy => {
                self.busy_until = Some(Instant::now() + BUSY_PAUSE);
                if record.reinsert.is_some() {
                    // Its image went with the request.
                    self.drop_copy(record);
                    return Ok(());
                }
                take_back(&mut record, request.buffer);
                return Err(record);
            }
            Err((_, error)) => Write::Failed(error),
        };
        match &write {
            Write::InFlight => {
                self.note_started(lane, location.bytes());
                self.slots_in_flight.extend(record.slot_address());
            }
            _ => self.has_failed_write = true,
        }
        if changes_identity(record.kind) {
            *self.changes_pending.entry(record.id.fingerprint()).or_default() += 1;
        }
        self.last_sequence = sequence;
        self.lanes[lane].open = Some(OpenRegion { next_page: open.next_page + record.pages, ..open });
        self.shared.regions.set_used(open.region, open.next_page + record.pages);
        self.pending.push_back(Pending::new(What::Record { record, location, sequence, replaces, write }));
        Ok(())
    }

    /// In an encrypted store nothing goes to the drive as it is: seals what the encoders did not, because a write failed and
    /// it goes once more, or because there are none.
    fn seal_if_needed(&self, record: &mut QueuedRecord) -> Result<()> {
        let (Form::Stored, Some(slot)) = (&record.form, &record.slot) else { return Ok(()) };
        let Some(sealing) = record.sealing.as_ref() else {
            return match self.shared.keyring {
                None => Ok(()),
                Some(_) => Err(Error::new(ErrorKind::InvalidInput, "a record of an encrypted store has no key")),
            };
        };
        let payload = slot.payload().get(..record.payload_bytes as usize).unwrap_or_default();
        record.form = Form::Encoded(seal_stored(&self.shared, sealing, payload)?);
        Ok(())
    }

    /// Whether there may be an older version: also if its region is being given up, or the index can not say.
    fn is_known(&self, id: &RecordId) -> bool {
        let is_there = || match is_off!(ForgetWhatIsReclaimed) {
            true => self.shared.try_locate(id).map(|found| found.is_some()),
            false => self.shared.may_be_there(id),
        };
        self.changes_pending.contains_key(&id.fingerprint()) || is_there().unwrap_or(true)
    }

    /// The header that a record gets at its place.
    fn header(&self, record: &QueuedRecord, location: Location, sequence: u64, replaces: bool) -> RecordHeader {
        if let Form::Copied(_, header) = &record.form {
            // Stored bytes are copied as they are, whatever they are encoded with.
            return RecordHeader { location, sequence, replaces, created_unix_ms: unix_ms(), ..**header };
        }
        let raw_bytes = record.payload_bytes;
        let (codec, stored_bytes, stored_xxh3, raw_xxh3, seal) = match &record.form {
            Form::Encoded(Image { head, .. }) => {
                (head.codec.number(), head.stored_bytes, head.stored_xxh3, head.raw_xxh3, head.seal)
            }
            _ => {
                let payload = record.slot.as_ref().and_then(|slot| slot.payload().get(..raw_bytes as usize));
                let checksum = payload.map_or(0, xxh3_64);
                (CODEC_STORED, raw_bytes, checksum, checksum, None)
            }
        };
        RecordHeader {
            kind: record.kind,
            replaces,
            store: self.shared.uuid,
            location,
            sequence,
            hides: if record.kind == HeaderKind::Tombstone { record.hides.unwrap_or(sequence) } else { 0 },
            identity: record.identity,
            shards: record.shards,
            codec,
            key_version: KEY_CHAIN_VERSION,
            parent: record.parent,
            depth: record.depth,
            raw_bytes,
            stored_bytes,
            stored_xxh3,
            raw_xxh3,
            created_unix_ms: unix_ms(),
            seal,
        }
    }

    /// After a failed write everything from it on is written once more, in another region. All writes have ended then:
    /// a slot's header may not change under a write.
    fn repair_failed_writes(&mut self) {
        if !self.has_failed_write || self.in_flight > 0 {
            return;
        }
        self.has_failed_write = false;
        let Some(first) = self.pending.iter().position(Pending::has_failed) else { return };
        let mut rest = self.pending.split_off(first);
        // What is written once more leaves its first copy behind: where that is, nothing more may follow.
        for lane in 0..self.lanes.len() {
            let open = self.lanes[lane].open.map(|open| open.region);
            let goes_elsewhere = |p: &Pending| matches!(p.what, What::Record { .. }) || p.has_failed();
            if rest.iter().any(|p| goes_elsewhere(p) && open.is_some() && p.region() == open) {
                self.seal_open_region(lane);
                rest.extend(self.pending.pop_back());
            }
        }
        end_before_copies(&mut rest);
        let mut again = VecDeque::new();
        for pending in rest {
            match pending.what {
                What::Record { record, write: Write::Failed(error), .. } if record.is_retry => {
                    self.resolve(record, Err(error));
                }
                // Its image went with its first write; the region that it was in still has it, or it is a miss.
                What::Record { record, .. } if record.reinsert.is_some() => {
                    self.resolve(record, Err(Error::new(ErrorKind::Io, "the write failed")));
                }
                What::Record { record, .. } => again.push_back(Entry::Record(self.prepare_retry(record))),
                What::Flush(done) => again.push_back(Entry::Flush(done)),
                // Nothing is written to it but what goes elsewhere now.
                What::Opened { write: Write::Failed(_), .. } => {}
                What::Opened { .. } | What::Freed { .. } | What::Seal { .. } | What::Forget { .. } => {
                    self.pending.push_back(pending);
                }
            }
        }
        again.append(&mut self.queue);
        self.queue = again;
        self.advance_written();
    }

    fn prepare_retry(&mut self, mut record: Box<QueuedRecord>) -> Box<QueuedRecord> {
        add(&self.shared.counts.retried_appends, 1);
        record.is_retry = true;
        record.store_plain();
        self.forget_pending_change(&record);
        record
    }

    fn forget_pending_change(&mut self, record: &QueuedRecord) {
        let fingerprint = record.id.fingerprint();
        if changes_identity(record.kind)
            && let Some(count) = self.changes_pending.get_mut(&fingerprint)
        {
            *count -= 1;
            if *count == 0 {
                self.changes_pending.remove(&fingerprint);
            }
        }
    }

    /// Ends a record that was submitted.
    fn resolve(&mut self, record: Box<QueuedRecord>, result: Result<Location>) {
        self.forget_pending_change(&record);
        self.end(record, result);
    }

    /// Ends a record: its bytes no longer count, and whoever waits is told.
    fn end(&mut self, record: Box<QueuedRecord>, result: Result<Location>) {
        if record.is_for_reclaim {
            self.note_kept_tombstone(result.is_ok());
        } else if let Some(reinsert) = &record.reinsert {
            self.note_copy_ended(reinsert.from);
        } else if result.is_err() && !self.is_purged(&record) {
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
        for copy in std::mem::take(&mut self.copies) {
            self.end(copy, Err(error.clone()));
        }
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
            What::Freed { region, .. } => self.fail_reclaim(region, error),
            What::Opened { .. } | What::Seal { .. } | What::Forget { .. } => {}
        }
    }

    fn is_finished(&self) -> bool {
        self.ending.is_some()
            && self.queue.is_empty()
            && self.copies.is_empty()
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
        if let Err(error) = self.index.flush() {
            tracing::warn!(%error, "the index was closed without a flush; the next open takes longer");
        }
        self.counters.finish()
    }
}

/// Whether a record says something else of its identity than what came before, which must not come again behind it.
fn changes_identity(kind: HeaderKind) -> bool {
    matches!(kind, HeaderKind::Object | HeaderKind::Tombstone)
}

/// What goes to the drive: the slot, or the buffer of an encoded record, with its header page filled; or a page with the
/// header alone.
fn fill(record: &mut QueuedRecord, page: &Page) -> IoBuffer {
    match (std::mem::replace(&mut record.form, Form::Stored), &record.slot) {
        (Form::Encoded(Image { mut pages, head }), _) => {
            record.form = Form::Sent(Some(head));
            pages.as_mut_slice()[..PAGE_BYTES].copy_from_slice(page);
            IoBuffer::Pages(pages)
        }
        (Form::Copied(mut pages, _), _) => {
            pages.as_mut_slice()[..PAGE_BYTES].copy_from_slice(page);
            IoBuffer::Pages(pages)
        }
        (_, Some(slot)) => {
            slot.write_header(page);
            IoBuffer::Slot { slot: Arc::clone(slot), bytes: record.pages as usize * PAGE_BYTES }
        }
        (_, None) => one_page(page),
    }
}

/// Undoes [`fill`] when the drive did not take it.
fn take_back(record: &mut QueuedRecord, buffer: Option<IoBuffer>) {
    if let (Form::Sent(head), Some(IoBuffer::Pages(pages))) = (&mut record.form, buffer)
        && let Some(head) = head.take()
    {
        record.form = Form::Encoded(Image { pages, head });
    }
}

/// First copies of what is written once more may be whole, and must never count: the index does not cover them, so that
/// the next open puts a fence before them.
fn end_before_copies(rest: &mut VecDeque<Pending>) {
    let mut ends: HashMap<(u32, u64), u32> = HashMap::new();
    for pending in &*rest {
        if let What::Record { location, .. } = &pending.what {
            let end = ends.entry((location.region, location.generation)).or_insert(location.page);
            *end = location.page.min(*end);
        }
    }
    for pending in rest {
        if let What::Seal { region, generation, page, .. } = &mut pending.what
            && let Some(end) = ends.get(&(*region, *generation))
            && !is_off!(CoverFailedWrites)
        {
            *page = *end;
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
