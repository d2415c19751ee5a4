//! The thread that finds out which records of a region are written again, reads and checks them, and hands them to the
//! writer. It works on one region at a time, holds a bounded amount of memory, and nobody waits for it.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex};
use xxhash_rust::xxh3::xxh3_64;

use super::reinsert::Reinsert;
use crate::block::{RecordId, RecordKind};
use crate::codec::Codec;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexLog, Location, TableEntry};
use crate::nvme::append::{Done, Form, QueuedRecord};
use crate::nvme::inbox::Copied;
use crate::nvme::page::{PAGE_BYTES, pages_of};
use crate::nvme::policy::{RecordInfo, ResidentBlock};
use crate::nvme::read::is_drive_gone;
use crate::nvme::record_header::RecordHeader;
use crate::nvme::shared::Shared;
use crate::nvme::stats::add;

/// Bytes of records that were read and whose write has not ended, at most (but always one record).
const WINDOW_BYTES: u64 = 16 << 20;

/// A region to go through.
pub(super) struct Job {
    pub(super) region: u32,
    pub(super) generation: u64,
    /// What may be written again at most.
    pub(super) budget_bytes: u64,
    pub(super) window: Arc<Window>,
}

/// How much of one job is on its way, and whether the job was given up.
#[derive(Default)]
pub(super) struct Window {
    state: Mutex<WindowState>,
    changed: Condvar,
}

#[derive(Default)]
struct WindowState {
    bytes: u64,
    is_cancelled: bool,
}

impl Window {
    /// Gives the job up: the region is needed.
    pub(super) fn cancel(&self) {
        self.state.lock().is_cancelled = true;
        self.changed.notify_all();
    }

    /// Room for one record, when there is; `None` once the job was given up.
    fn enter(self: &Arc<Self>, bytes: u64) -> Option<Permit> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| {
            !state.is_cancelled && state.bytes > 0 && state.bytes + bytes > WINDOW_BYTES
        });
        if state.is_cancelled {
            return None;
        }
        state.bytes += bytes;
        Some(Permit { window: Arc::clone(self), bytes })
    }
}

/// A record's share of a [`Window`].
pub(in crate::nvme) struct Permit {
    window: Arc<Window>,
    bytes: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.window.state.lock().bytes -= self.bytes;
        self.window.changed.notify_all();
    }
}

/// The way to the thread, which ends when this goes.
pub(super) struct Reinserter {
    jobs: Sender<Job>,
}

impl Reinserter {
    /// Starts the thread.
    ///
    /// # Errors
    /// `Io` if the system gives no thread.
    pub(super) fn start(shared: &Arc<Shared>, index: &Arc<IndexLog>) -> Result<(Self, JoinHandle<()>)> {
        let (jobs, receiver): (_, Receiver<Job>) = bounded(1);
        let (shared, index) = (Arc::clone(shared), Arc::clone(index));
        let work = move || receiver.iter().for_each(|job| Work { shared: &shared, index: &index, job: &job }.run());
        let thread = std::thread::Builder::new().name("pega-reinsert".into()).spawn(work);
        let thread = thread.map_err(|source| Error::from_io("starting the store's re-insertion thread", source))?;
        Ok((Self { jobs }, thread))
    }

    /// Hands a region over; false if the thread is busy or gone.
    pub(super) fn start_job(&self, job: Job) -> bool {
        self.jobs.try_send(job).is_ok()
    }
}

struct Work<'a> {
    shared: &'a Arc<Shared>,
    index: &'a IndexLog,
    job: &'a Job,
}

impl Work<'_> {
    fn run(&self) {
        let copies = self.reinsert();
        let Job { region, generation, .. } = *self.job;
        self.shared.inbox.push_copied(Copied { region, generation, copies });
    }

    /// Queues what is worth it; how many records.
    fn reinsert(&self) -> u64 {
        let entries = self.shared.table.in_region(self.job.region, self.job.generation);
        let epoch = self.shared.regions.epoch();
        let infos: Vec<RecordInfo> = entries.iter().map(|entry| info(entry, epoch)).collect();
        let mut left = self.job.budget_bytes;
        let mut queued = 0;
        for wanted in self.shared.policy.keep(&infos, self.job.budget_bytes) {
            let (Some(entry), Some(info)) = (entries.get(wanted), infos.get(wanted)) else { continue };
            if info.bytes > left {
                break;
            }
            let Some(permit) = self.job.window.enter(info.bytes) else { break };
            let Some(record) = self.prepare(entry, permit) else { continue };
            self.shared.table.age_uses(entry.fingerprint);
            if !self.shared.inbox.push_copy(record) {
                break;
            }
            left -= info.bytes;
            queued += 1;
        }
        queued
    }

    /// A record to be queued; `None` if it is gone, bad, or worthless without its parent.
    fn prepare(&self, entry: &TableEntry, permit: Permit) -> Option<Box<QueuedRecord>> {
        let from = self.shared.regions.resolve(entry.location)?;
        // What is encrypted is copied as it lies there: the table does not know it under the name that the policy has.
        let is_plain = self.shared.keyring.is_none();
        let resident = is_plain.then(|| self.shared.policy.resident(entry.fingerprint)).flatten();
        let mut record = match resident.and_then(|block| self.take_resident(block, from)) {
            Some(record) => record,
            None => self.read_stored(entry, from)?,
        };
        let parent = record.parent;
        if !parent.is_root() && self.shared.locate(&record.id.with_key(parent)).is_none() {
            return None;
        }
        if let Some(reinsert) = &mut record.reinsert {
            reinsert.permit = Some(permit);
        }
        Some(Box::new(record))
    }

    /// The same bytes as the store has: a block's bytes follow from its key. What its header says is in the index.
    fn take_resident(&self, block: ResidentBlock, from: Location) -> Option<QueuedRecord> {
        let ResidentBlock { id, slot } = block;
        let row = self.index.get(&id).ok().flatten();
        let row = row.filter(|row| row.location == from && row.kind == RecordKind::Kv)?;
        let shards = self.shared.namespaces.group(id.namespace, id.group)?.shards;
        let is_whole = row.payload_bytes > 0 && row.payload_bytes <= slot.payload_bytes() as u64;
        let identity = self.shared.namespaces.identity(&id).filter(|_| is_whole)?;
        // If it is encoded, its stored bytes are fewer.
        let pages = u32::try_from(pages_of(row.payload_bytes) + 1).ok().filter(|pages| *pages == from.pages)?;
        Some(QueuedRecord {
            id,
            identity,
            shards,
            kind: row.kind.into(),
            hides: None,
            parent: row.parent,
            sealing: None,
            depth: row.depth,
            slot: Some(slot),
            payload_bytes: row.payload_bytes,
            form: Form::Stored,
            pages,
            charged_bytes: 0,
            is_retry: false,
            is_for_reclaim: false,
            reinsert: Some(Box::new(Reinsert { from, permit: None })),
            done: Done::new(Box::new(drop)),
        })
    }

    /// Reads the record as it is stored and checks it as a read would, but for decoding. A bad one is quarantined.
    fn read_stored(&self, entry: &TableEntry, from: Location) -> Option<QueuedRecord> {
        let pins = self.shared.regions.pin(&[from]).ok()?;
        let read = self.shared.drive.read(from.region, from.page, from.pages);
        drop(pins);
        if read.is_ok() {
            self.shared.poison.note_good_read();
        }
        let found = read.and_then(|image| self.identify(entry, from, image.as_slice()).map(|found| (image, found)));
        let (image, (id, header)) = match found {
            Ok(found) => found,
            Err(error) => {
                self.quarantine(entry, None, from, &error);
                return None;
            }
        };
        let stored = image.as_slice().get(PAGE_BYTES..PAGE_BYTES + header.stored_bytes as usize);
        if stored.map(xxh3_64) != Some(header.stored_xxh3) {
            self.quarantine(entry, Some(id), from, &corrupt("has a payload with another checksum"));
            return None;
        }
        Some(QueuedRecord {
            id,
            identity: header.identity,
            shards: header.shards,
            kind: header.kind,
            hides: None,
            parent: header.parent,
            sealing: None,
            depth: header.depth,
            slot: None,
            payload_bytes: header.raw_bytes,
            form: Form::Copied(image, Box::new(header)),
            pages: header.location.pages,
            charged_bytes: 0,
            is_retry: false,
            is_for_reclaim: false,
            reinsert: Some(Box::new(Reinsert { from, permit: None })),
            done: Done::new(Box::new(drop)),
        })
    }

    /// Whose record it is, by its header, which must be the one that the table means.
    fn identify(&self, entry: &TableEntry, from: Location, image: &[u8]) -> Result<(RecordId, RecordHeader)> {
        let header = RecordHeader::decode(image.get(..PAGE_BYTES).unwrap_or_default(), self.shared.header_key())?;
        header.check_place(self.shared.uuid, from.region, from.generation, from.page)?;
        let is_readable = header.kind.has_payload() && Codec::from_number(header.codec).is_some();
        if header.location.pages != from.pages || !is_readable {
            return Err(corrupt("has other pages than expected, or no payload that can be read"));
        }
        let identity = header.identity;
        let namespace = self.shared.namespaces.handle_at(&identity.namespace, header.sequence);
        let unknown = || Error::new(ErrorKind::NotFound, "a record is of a namespace that is not known, or was purged");
        let namespace = namespace.ok_or_else(unknown)?;
        let id = RecordId { namespace, group: identity.group, shard: identity.shard, key: identity.key };
        if let (Some(keyring), Some(seal)) = (&self.shared.keyring, &header.seal) {
            keyring.numbered(seal.key)?;
        }
        if id.fingerprint() == entry.fingerprint { Ok((id, header)) } else { Err(corrupt("is another one")) }
    }

    /// As a read that fails: no longer found, and soon forgotten by the log too. Of a record whose header is not to be
    /// believed only the fingerprint is known; its row goes with the region. Of a drive that is gone no record is to blame.
    fn quarantine(&self, entry: &TableEntry, id: Option<RecordId>, from: Location, error: &Error) {
        match error.kind() {
            ErrorKind::Io if is_drive_gone(self.shared, &from, error) => return,
            ErrorKind::Corrupt | ErrorKind::Io => {}
            _ => return,
        }
        add(&self.shared.counts.bad_reads, 1);
        tracing::warn!(?id, ?from, error = format!("{error:#}"), "a record can not be used; it is quarantined");
        if self.shared.table.remove_if(entry.fingerprint, &from) {
            self.shared.regions.count_out(&from);
        }
        if let Some(id) = id {
            self.shared.inbox.push_bad_record(id, from);
        }
    }
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("a record {what}"))
}

fn info(entry: &TableEntry, epoch: u16) -> RecordInfo {
    RecordInfo {
        fingerprint: entry.fingerprint,
        parent: entry.parent,
        bytes: entry.location.bytes(),
        uses: entry.uses.count(),
        idle_epochs: entry.uses.idle_epochs(epoch),
    }
}
