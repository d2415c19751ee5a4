//! The store: the one door to everything in this folder. Opens and closes; checks what it is asked for; hands writes to
//! the writer thread and reads to the engine and the verifiers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use parking_lot::{Mutex, RwLock};

use super::append::{Append, Done, Form, QueuedRecord};
use super::backing::{Backing, System};
use super::calibration::{self, CalibratedDrive, Calibration, DriveSpeed, DriveUse};
use super::config::StoreConfig;
use super::directory::{Directory, check_writable, preallocate, truncate};
use super::drive::Drive;
use super::drive_directory::DriveDirectory;
use super::drive_identity::{DriveIdentity, Membership};
use super::drive_table::DriveTable;
use super::encoding::Encoders;
use super::encryption::Keyring;
use super::export::{ExportReport, ExportedRecord, export};
use super::fill::{self, FillPlan};
use super::inbox::{Ending, Inbox};
use super::io::{BlockIo, IoPriority, Metered, Meters, open_direct};
use super::membership::{Listed, Plan};
use super::namespaces::Namespaces;
use super::page::{PAGE_BYTES, pages_of};
use super::poison::{PoisonHook, PoisonReason};
use super::policy::{ReclaimPolicy, RegionInfo, RegionState};
use super::read::{ReadDone, Verifiers, measure_decoding};
use super::recovery::{RecoveryReport, recover};
use super::region_header::HEADER_SLOTS;
use super::regions::{RegionPins, Regions};
use super::shared::Shared;
use super::stats::{StoreStats, WriteVolume};
use super::superblock::{SUPERBLOCK_COPIES, Superblock};
use super::switches::{self, is_off};
use super::verify::{ScrubFrom, ScrubPace, VerifyProgress, VerifyReport, scrub, scrub_state, verify};
use super::version::StoreUuid;
use super::writer::{Writer, WriterConfig};
use crate::block::{GroupGeometry, NamespaceDescriptor, NamespaceHandle, NamespaceId, RecordId, RecordKind};
use crate::codec::CodecChoice;
use crate::dram::{Arena, Slot};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexLog, Location, NamespaceRow};
use crate::latency::Latencies;

mod keys;
mod purge;
mod survey;

pub use purge::{PurgeReport, StoreUse};
pub use survey::KnownRecord;

/// How long dropping a store waits for its threads.
const DROP_TIMEOUT: Duration = Duration::from_secs(30);

/// An open store. Share it in an `Arc`; every method may be called from any thread.
///
/// Dropping it without [`Store::close`] is like a crash: what is durable stays, the rest fails with `Closed`.
pub struct Store {
    shared: Arc<Shared>,
    region_bytes: u64,
    is_direct: bool,
    verifiers: RwLock<Option<Verifiers>>,
    encoders: RwLock<Option<Encoders>>,
    running: Mutex<Option<Running>>,
    /// Held by whoever closes; nobody else waits for it.
    closing: Mutex<()>,
    own_threads: Vec<ThreadId>,
}

/// What has to be ended.
struct Running {
    writer: JoinHandle<()>,
    writer_ended: Receiver<Result<()>>,
    /// Those that verify, the one that writes records again, those that encode, and the one that measures the drives.
    helpers: Vec<JoinHandle<()>>,
    fill: Option<JoinHandle<()>>,
    index: Arc<IndexLog>,
    directory: Directory,
    more_drives: Vec<DriveDirectory>,
}

impl Store {
    /// Opens the store at the configured path, and makes it if there is none. Slots of `arena` are registered with the
    /// kernel, others work too.
    ///
    /// # Errors
    /// `InvalidInput` for a configuration outside its limits, another region size than the store has, drives that were
    /// swapped, or a new one while one of the store's is missing; `Locked`, `ForeignFormat`, `NewerFormat`,
    /// `PermissionDenied`, `NoSpace`, `Unsupported` for a network file system or a missing I/O engine; `Corrupt` if both
    /// superblocks are unreadable or a drive is of the past; `Io`.
    pub fn open(
        config: StoreConfig,
        arena: Arc<Arena>,
        policy: Arc<dyn ReclaimPolicy>,
    ) -> Result<(Arc<Self>, RecoveryReport)> {
        Self::open_through(config, &arena, policy, |io| io)
    }

    /// As [`Store::open`], with a wrapper around the I/O engine: for tests of what stands above.
    ///
    /// # Errors
    /// As [`Store::open`].
    #[cfg(any(test, feature = "fault-injection"))]
    pub fn open_wrapped(
        config: StoreConfig,
        arena: &Arc<Arena>,
        policy: Arc<dyn ReclaimPolicy>,
        wrap: impl FnOnce(Arc<dyn BlockIo>) -> Arc<dyn BlockIo>,
    ) -> Result<(Arc<Self>, RecoveryReport)> {
        Self::open_through(config, arena, policy, wrap)
    }

    /// As [`Store::open`], with a wrapper around the I/O engine.
    pub(super) fn open_through(
        config: StoreConfig,
        arena: &Arc<Arena>,
        policy: Arc<dyn ReclaimPolicy>,
        wrap: impl FnOnce(Arc<dyn BlockIo>) -> Arc<dyn BlockIo>,
    ) -> Result<(Arc<Self>, RecoveryReport)> {
        Self::open_filling(config, arena, policy, wrap, FillPlan::default())
    }

    /// As [`Store::open_through`], with another plan for filling the table.
    pub(super) fn open_filling(
        config: StoreConfig,
        arena: &Arc<Arena>,
        policy: Arc<dyn ReclaimPolicy>,
        wrap: impl FnOnce(Arc<dyn BlockIo>) -> Arc<dyn BlockIo>,
        filling: FillPlan,
    ) -> Result<(Arc<Self>, RecoveryReport)> {
        Self::open_on(&System, config, arena, policy, wrap, filling)
    }

    /// As [`Store::open_filling`], on something else than the system's own.
    pub(super) fn open_on(
        backing: &dyn Backing,
        config: StoreConfig,
        arena: &Arc<Arena>,
        policy: Arc<dyn ReclaimPolicy>,
        wrap: impl FnOnce(Arc<dyn BlockIo>) -> Arc<dyn BlockIo>,
        filling: FillPlan,
    ) -> Result<(Arc<Self>, RecoveryReport)> {
        config.validate()?;
        let mut directory = Directory::open(&config.path)?;
        let mut more_drives = Vec::new();
        let prepared = prepare(backing, &config, &directory, &mut more_drives, arena, wrap).inspect_err(|_| {
            more_drives.iter().for_each(DriveDirectory::abandon);
            if directory.is_new() {
                directory.abandon();
            }
        });
        let Prepared { io, superblock, plan, is_direct, mut keyring } = prepared?;
        if let Some(keyring) = &mut keyring {
            keyring.begin(superblock.opens)?;
        }
        let files = region_files(&directory, &more_drives);
        let calibrated = drives_to_calibrate(&files, superblock.store, &plan);
        let (io, calibration) = match backing.calibration() {
            None => (io, Calibration::off()),
            Some(how) => {
                let meters = Meters::new(1 + files.len());
                let io: Arc<dyn BlockIo> = Arc::new(Metered::new(io, Arc::clone(&meters)));
                let (cache, queue_depth) = (directory.calibration(), config.queue_depth);
                let calibration = Calibration::load(how, meters, &*io, queue_depth, cache, calibrated);
                (io, calibration)
            }
        };
        let region_pages = u32::try_from(superblock.region_bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
        let inbox = Arc::new(Inbox::new(config.write_queue_bytes));
        let places = plan.places();
        let drive_of_region = places.iter().map(|place| place.map(|place| place.drive));
        let regions = Arc::new(Regions::new(drive_of_region, Arc::clone(&inbox)));
        let shared = Arc::new(Shared::new(
            superblock.store,
            Arc::new(Drive::new(io, region_pages, plan.listed.len(), places)),
            regions,
            Namespaces::open(backing.small_file(&directory.namespaces())?, superblock.store)?,
            keyring.map(Arc::new),
            inbox,
            policy,
            filling,
            calibration,
        ));
        let (uuid, region_bytes, opens) = (superblock.store, superblock.region_bytes, superblock.opens);
        let (report, handover) = recover(&shared, backing, &directory, superblock, &plan)?;
        if directory.is_new() {
            directory.complete()?;
        }
        join(&mut more_drives, uuid, opens, &plan, Membership::Joined)?;
        for (path, place) in files.iter().zip(&plan.listed) {
            truncate(path, u64::from(plan.regions_after(*place)) * region_bytes)?;
        }
        let index = Arc::clone(&handover.index);
        let writer = Writer::new(Arc::clone(&shared), WriterConfig::new(&config), handover);
        let mut store = Self::start(shared, &config, writer, index, directory, more_drives)?;
        store.is_direct = is_direct;
        let measuring = calibration::start(&store.shared, arena, files, is_direct);
        if let Some(running) = store.running.get_mut() {
            running.helpers.extend(measuring);
        }
        tracing::info!(path = %config.path.display(), ?report, io = store.shared.drive.io().name(), "the store is open");
        Ok((Arc::new(store), report))
    }

    fn start(
        shared: Arc<Shared>,
        config: &StoreConfig,
        mut writer: Writer,
        index: Arc<IndexLog>,
        directory: Directory,
        more_drives: Vec<DriveDirectory>,
    ) -> Result<Self> {
        let (verifiers, mut helpers) = Verifiers::start(&shared)?;
        if config.codec != CodecChoice::None {
            shared.set_decode_speed(measure_decoding());
        }
        helpers.push(writer.start_reinserter()?);
        let (encoders, encoder_threads) = Encoders::start(&shared, config.codec, config.write_queue_bytes)?;
        helpers.extend(encoder_threads);
        let fill = fill::go_on(&shared)?;
        let (ended, writer_ended) = bounded(1);
        let for_writer = Arc::clone(&shared);
        let work = switches::inherited(move || {
            let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| writer.run()));
            let result = run.unwrap_or_else(|_| {
                let error = Error::new(ErrorKind::Poisoned, "the store's writer thread panicked");
                for_writer.poison("the writer broke down", &error);
                for_writer.inbox.end(Ending::Abandon);
                drop(for_writer.inbox.wait(Some(Instant::now())));
                Err(error)
            });
            for_writer.inbox.note_ended();
            drop(ended.try_send(result));
        });
        let spawned = std::thread::Builder::new().name("pega-nvme-writer".into()).spawn(work);
        let writer = spawned.map_err(|source| Error::from_io("starting the store's writer thread", source))?;
        let own_threads = helpers.iter().chain([&writer]).map(|thread| thread.thread().id()).collect();
        let running = Running { writer, writer_ended, helpers, fill, index, directory, more_drives };
        let region_bytes = u64::from(shared.drive.region_pages()) * PAGE_BYTES as u64;
        Ok(Self {
            shared,
            region_bytes,
            is_direct: true,
            verifiers: RwLock::new(Some(verifiers)),
            encoders: RwLock::new(Some(encoders)),
            running: Mutex::new(Some(running)),
            closing: Mutex::new(()),
            own_threads,
        })
    }

    /// The number of a namespace in this store; a new one is durable when this returns.
    ///
    /// # Errors
    /// `GeometryMismatch` if it is known with other groups, `InvalidInput` for groups outside their limits or blocks
    /// larger than a region, `Closed`, `NoSpace`, `Io`.
    pub fn namespace(&self, descriptor: &NamespaceDescriptor, groups: &[GroupGeometry]) -> Result<NamespaceHandle> {
        let index = self.index()?;
        for geometry in groups {
            self.pages_of_record(geometry.block_bytes)?;
        }
        let known = self.shared.namespaces.register(descriptor, groups).and_then(|(handle, row)| {
            row.map_or(Ok(()), |row| index.put_namespace(&row))?;
            if let Some(keyring) = &self.shared.keyring {
                keyring.key_for(descriptor.id())?;
            }
            Ok(handle)
        });
        known.inspect_err(|error| {
            if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::PermissionDenied | ErrorKind::Io) {
                self.shared.poison("a namespace could not be written", error);
            }
        })
    }

    /// The geometry of a group of a namespace that was ever registered; `None` for any other number.
    pub fn group(&self, namespace: NamespaceHandle, group: u16) -> Option<GroupGeometry> {
        self.shared.namespaces.group(namespace, group)
    }

    /// Accepts a record for the log; its `done` runs exactly once, when it is durable and found, or has failed. A failed
    /// record may still be there after the next open: it is then one that nobody was promised.
    ///
    /// # Errors
    /// The request comes back, its `done` uncalled: `Busy` when too many bytes are not durable yet, `InvalidInput` for a
    /// payload that fits neither slot, geometry nor region, `NotFound` for an unknown namespace or group, `Poisoned`,
    /// `Closed`.
    #[expect(clippy::result_large_err, reason = "a refused request comes back whole to its caller")]
    pub fn append(&self, append: Append) -> Result<(), (Append, Error)> {
        self.shared.calibration.disturb();
        let prepared = match self.shared.poisoned() {
            Some(error) => Err(error),
            None => self.check(&append).and_then(|(identity, shards, pages)| {
                let (identity, sealing) = self.seal_as(&append, identity, shards)?;
                Ok((identity, shards, pages, sealing))
            }),
        };
        let (identity, shards, pages, sealing) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Err((append, error)),
        };
        let Append { id, kind, parent, depth, slot, payload_bytes, done } = append;
        let given = (id, parent);
        let (id, parent) = sealing.as_ref().map_or(given, |(id, parent, _)| (*id, *parent));
        let record = QueuedRecord {
            id,
            identity,
            shards,
            kind: kind.into(),
            hides: None,
            parent,
            sealing: sealing.and_then(|(.., sealing)| sealing),
            depth,
            slot,
            payload_bytes,
            form: Form::Stored,
            pages,
            charged_bytes: u64::from(pages) * PAGE_BYTES as u64,
            is_retry: false,
            is_for_reclaim: false,
            reinsert: None,
            done: Done::new(done),
        };
        let (record, push) = (Box::new(record), |record| self.shared.inbox.push_record(record));
        let pushed = match &*self.encoders.read() {
            Some(encoders) => encoders.push(record, push),
            None => push(record),
        };
        pushed.map_err(|(record, error)| {
            let QueuedRecord { slot, done, .. } = *record;
            let done = done.into_inner().unwrap_or_else(|| Box::new(drop));
            let (id, parent) = given;
            (Append { id, kind, parent, depth, slot, payload_bytes, done }, error)
        })
    }

    /// What the record is on disk: its identity, its shards, its pages.
    fn check(&self, append: &Append) -> Result<(super::record_header::DiskIdentity, u16, u32)> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        let unknown = |what: String| Error::new(ErrorKind::NotFound, format!("{what} is not known to the store"));
        let namespace = append.id.namespace;
        let identity = self.shared.namespaces.identity(&append.id);
        let identity = identity.ok_or_else(|| unknown(format!("namespace {}", namespace.0)))?;
        let payload_bytes = append.payload_bytes;
        if append.kind == RecordKind::Tombstone {
            return match append.slot {
                None if payload_bytes == 0 => Ok((identity, 1, 1)),
                _ => bad(format!("a tombstone with {payload_bytes} bytes; it has neither slot nor payload")),
            };
        }
        let slot_bytes = append.slot.as_ref().map_or(0, |slot| slot.payload_bytes());
        if payload_bytes == 0 || payload_bytes > slot_bytes as u64 {
            return bad(format!(
                "a payload of {payload_bytes} bytes in a slot for {slot_bytes}; give 1 to {slot_bytes}"
            ));
        }
        let pages = self.pages_of_record(payload_bytes)?;
        match (append.kind, namespace) {
            (RecordKind::Object, NamespaceHandle(0)) => Ok((identity, 1, pages)),
            (RecordKind::Kv, handle) if handle.0 > 0 => {
                let group = self.shared.namespaces.group(handle, append.id.group);
                let group = group.ok_or_else(|| unknown(format!("group {} of the namespace", append.id.group)))?;
                if append.id.shard >= group.shards || payload_bytes != group.block_bytes {
                    let shard = append.id.shard;
                    return bad(format!(
                        "a block of {payload_bytes} bytes in shard {shard}; the group has {} of {} shards",
                        group.block_bytes, group.shards
                    ));
                }
                Ok((identity, group.shards, pages))
            }
            (kind, handle) => bad(format!("a {kind:?} in namespace {}; 0 is for objects, others for blocks", handle.0)),
        }
    }

    /// Pages of a record on disk.
    fn pages_of_record(&self, payload_bytes: u64) -> Result<u32> {
        let limit = u64::from(self.shared.drive.region_pages() - HEADER_SLOTS);
        let pages = pages_of(payload_bytes).saturating_add(1);
        u32::try_from(pages).ok().filter(|_| pages <= limit).ok_or_else(|| {
            let most = (limit - 1) * PAGE_BYTES as u64;
            let message =
                format!("{payload_bytes} bytes do not fit in a region; give at most {most}, or larger regions");
            Error::new(ErrorKind::InvalidInput, message)
        })
    }

    /// Lets nobody find the record at `location` again; durable with the next flush.
    pub(super) fn quarantine(&self, id: RecordId, location: Location) {
        self.shared.forget_at(&id, &location);
        self.shared.inbox.push_bad_record(id, location);
    }

    /// Makes everything accepted before durable. Not to be called from a callback of the store.
    ///
    /// # Errors
    /// `Timeout` at `deadline`, `Io` if records failed meanwhile, `Poisoned`, `Closed`.
    pub fn flush(&self, deadline: Instant) -> Result<()> {
        let failed = || self.shared.counts.snapshot().failed_appends;
        let failed_before = failed();
        let (sender, receiver) = bounded(1);
        self.shared.inbox.push_flush(Done::new(Box::new(move |result| drop(sender.try_send(result)))));
        match receiver.recv_deadline(deadline) {
            Ok(result) => result?,
            Err(RecvTimeoutError::Timeout) => {
                let message = "the drive did not take everything before the deadline; try again with more time";
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(closed()),
        }
        match failed() - failed_before {
            0 => Ok(()),
            records => Err(Error::new(ErrorKind::Io, format!("{records} records could not be written"))),
        }
    }

    /// Where a record lies, if it is durable and its region is not given up. In memory, once the table is full.
    pub fn locate(&self, id: &RecordId) -> Option<Location> {
        let location = self.shared.locate(&self.shared.named(id)?)?;
        self.shared.regions.touch(location.region, self.shared.regions.next_tick());
        Some(location)
    }

    /// Whether lookups find a record with this fingerprint, without counting as one; `None` while the table in memory is
    /// being filled.
    pub fn has_fingerprint(&self, fingerprint: u64) -> Option<bool> {
        let found = self.shared.table.get(fingerprint).and_then(|location| self.shared.regions.resolve(location));
        (found.is_some() || self.shared.fill.progress().is_full).then_some(found.is_some())
    }

    /// The locations of the longest run of records that are there, from the first on. Clears `out`. In memory, once the
    /// table is full; before that it may take 20 microseconds for each of the first 4096 records, and ends behind them.
    pub fn locate_prefix(&self, ids: &[RecordId], out: &mut Vec<Location>) {
        let ids = self.live_prefix(ids);
        match self.named_all(ids) {
            None => self.shared.locate_prefix(ids, out),
            Some(named) => self.shared.locate_prefix(&named, out),
        }
        let regions = &self.shared.regions;
        let tick = regions.next_tick();
        let mut touched = None;
        let mut found = 0;
        for location in out.iter_mut() {
            let Some(whole) = regions.resolve(*location) else { break };
            if touched != Some(whole.region) {
                regions.touch(whole.region, tick);
                touched = Some(whole.region);
            }
            *location = whole;
            found += 1;
        }
        out.truncate(found);
    }

    /// The records up to the first whose namespace is not known, or was purged.
    fn live_prefix<'a>(&self, ids: &'a [RecordId]) -> &'a [RecordId] {
        let mut last = None;
        let is_live = |id: &&RecordId| {
            last == Some(id.namespace) || {
                last = Some(id.namespace);
                self.shared.namespaces.is_live(id.namespace)
            }
        };
        let live = ids.iter().take_while(is_live).count();
        ids.get(..live).unwrap_or_default()
    }

    /// Keeps the regions of these locations from being reclaimed as long as the result lives.
    ///
    /// # Errors
    /// `NotFound` if one of them was reclaimed already; look up again.
    pub fn pin(&self, locations: &[Location]) -> Result<RegionPins> {
        self.shared.regions.pin(locations)
    }

    /// Counts a use of records that were found in memory while the store has them too, so that those which are used most
    /// outlive their regions. A [`Store::read`] counts by itself.
    pub fn note_uses(&self, ids: impl IntoIterator<Item = RecordId>) {
        ids.into_iter().filter_map(|id| self.shared.named(&id)).for_each(|id| self.shared.note_use(&id));
    }

    /// Reads a record into `slot` and verifies it: header, identity, place, payload. Its region is pinned meanwhile. A
    /// record that fails is quarantined: it is out of the index, and the error is `Corrupt` (or `Io` if the drive could
    /// not read it); to the caller both are a miss. Until `done` has run nobody else may use the slot.
    ///
    /// # Errors
    /// `NotFound` if the location is no longer valid, `InvalidInput` for a slot that is too small, `Busy`, `Closed`;
    /// `done` is then not called.
    pub fn read(
        &self,
        id: RecordId,
        location: Location,
        slot: Arc<Slot>,
        priority: IoPriority,
        done: ReadDone,
    ) -> Result<()> {
        self.shared.calibration.disturb();
        let verifiers = self.verifiers.read();
        verifiers.as_ref().ok_or_else(closed)?.read(&self.shared, id, location, slot, priority, done)
    }

    /// Reads every record once, in the order of the drive, and checks it as a read would; bad ones are quarantined. Runs
    /// beside everything else, on tokio-uring where the kernel has it. `progress` is called now and then.
    ///
    /// # Errors
    /// `Closed`, and `Io` if a region file can not be opened again. Damage is no error: it is in the report.
    pub fn verify(&self, progress: &mut dyn FnMut(VerifyProgress)) -> Result<VerifyReport> {
        let (index, paths) = self.long_job()?;
        verify(&self.shared, &index, &paths, None, progress)
    }

    /// All namespaces that were registered and not purged since; also those whose purge has begun and is not durable.
    pub fn namespaces(&self) -> Vec<NamespaceRow> {
        self.shared.namespaces.rows()
    }

    /// The number of a namespace, if it was ever registered.
    pub fn handle_of(&self, id: &NamespaceId) -> Option<NamespaceHandle> {
        self.shared.namespaces.handle_of(id)
    }

    /// How many namespaces there are of a kind.
    pub fn count_namespaces(&self, is_counted: &dyn Fn(&NamespaceDescriptor) -> bool) -> usize {
        self.shared.namespaces.count(is_counted)
    }

    /// Hands every record of a namespace to `each`, in the order of the drive: checked, decrypted and decoded. What is
    /// damaged, or goes meanwhile, is left out. Runs beside everything else.
    ///
    /// # Errors
    /// `Closed`, `Io` if a region file can not be opened again, and what `each` returns.
    pub fn export(
        &self,
        namespace: NamespaceHandle,
        each: &mut dyn FnMut(ExportedRecord<'_>) -> Result<()>,
    ) -> Result<ExportReport> {
        let (index, paths) = self.long_job()?;
        export(&self.shared, &index, &paths, namespace, each)
    }

    /// Goes on with a scrub, or begins one: reads and checks every record as [`Store::verify`] does, in small pieces. `pace` is
    /// called after every piece: it returns when the next one may be read, or false to stop. Must have ended before the store
    /// is closed.
    ///
    /// # Errors
    /// As [`Store::verify`].
    pub fn scrub(&self, from: ScrubFrom, pace: &ScrubPace) -> Result<VerifyReport> {
        let (index, paths) = self.long_job()?;
        scrub(&self.shared, &index, &paths, from, pace)
    }

    /// When the last scrub that saw everything ended, in milliseconds since 1970; 0 for never.
    ///
    /// # Errors
    /// `Closed`, and what the index reports.
    pub fn last_scrub_unix_ms(&self) -> Result<u64> {
        let (_, ended) = scrub_state(&self.long_job()?.0)?;
        self.shared.counts.scrub_last_pass_unix_ms.store(ended, Ordering::Relaxed);
        Ok(ended)
    }

    /// Rises with everything that readers and writers have asked of the drive: unchanged, it is idle.
    pub fn activity(&self) -> u64 {
        let counts = &self.shared.counts;
        let read = counts.reads.load(Ordering::Relaxed);
        read + counts.appended_records.load(Ordering::Relaxed)
    }

    /// What a long job beside the data plane works on.
    fn long_job(&self) -> Result<(Arc<IndexLog>, Vec<PathBuf>)> {
        let running = self.running.lock();
        let of_running =
            |running: &Running| (Arc::clone(&running.index), region_files(&running.directory, &running.more_drives));
        running.as_ref().map(of_running).ok_or_else(closed)
    }

    /// How fast each drive is and how it is used, in the order of the configuration: measured in the background after the
    /// open, at most once a week, and then as reads and writes show. Empty where nothing has a speed, in a simulation.
    pub fn drive_speeds(&self) -> Vec<DriveSpeed> {
        self.shared.calibration.speeds()
    }

    /// What each drive does, in the order of the configuration. Empty where nothing has a speed, in a simulation.
    pub fn drive_uses(&self) -> Vec<DriveUse> {
        self.shared.calibration.uses()
    }

    /// How long reads, writes and syncs of the drives took that ended well, from when they were asked for.
    pub fn drive_latencies(&self) -> [Latencies; 3] {
        self.shared.calibration.latencies()
    }

    /// Makes the codec believe that each drive reads so many bytes per second.
    #[cfg(test)]
    pub(super) fn set_drive_read_speed(&self, bytes_per_second: u64) {
        self.shared.calibration.know_read(bytes_per_second);
    }

    /// Waits until the drives are no longer measured; false at `deadline`.
    #[cfg(test)]
    pub(super) fn wait_calibrated(&self, deadline: Instant) -> bool {
        self.shared.calibration.wait_ended(deadline)
    }

    /// All regions, by number.
    pub fn regions(&self) -> Vec<RegionInfo> {
        self.shared.regions.infos()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> StoreStats {
        let regions = self.regions();
        StoreStats {
            io_engine: self.shared.drive.io().name(),
            is_direct: self.is_direct,
            capacity_bytes: regions.len() as u64 * self.region_bytes,
            region_bytes: self.region_bytes,
            regions: regions.len() as u64,
            free_regions: regions.iter().filter(|info| info.state == RegionState::Free).count() as u64,
            records: self.shared.table.len() as u64,
            live_bytes: regions.iter().map(|info| info.live_bytes).sum(),
            index_bytes: self.shared.table.memory_bytes() as u64,
            index_log_bytes: self.running.lock().as_ref().map_or(0, |running| running.index.memory_bytes()),
            index: self.shared.fill.progress(),
            queued_bytes: self.shared.inbox.held_bytes(),
            decode_bytes_per_second: self.shared.decode_speed(),
            ..self.shared.counts.snapshot()
        }
    }

    /// How much goes to the drive. What becomes durable meanwhile may count twice, never not at all.
    pub fn write_volume(&self) -> WriteVolume {
        let queued_bytes = self.shared.inbox.held_bytes();
        WriteVolume { written_bytes: self.shared.counts.appended_bytes.load(Ordering::Relaxed), queued_bytes }
    }

    /// Keeps a small named value of the user's beside the index; durable when it returns. It is lost with the index: for
    /// what a store can do without.
    ///
    /// # Errors
    /// `InvalidInput` for a name above 250 bytes or a value above 1 MiB, `Closed`, `NoSpace`, `Io`.
    pub fn put_note(&self, name: &str, value: &[u8]) -> Result<()> {
        self.seal_note(name, value, |value| self.index()?.meta_put(&note_name(name), value))
    }

    /// The value kept under a name.
    ///
    /// # Errors
    /// `Closed`, `Corrupt`, `Io`.
    pub fn note(&self, name: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.index()?.meta_get(&note_name(name))?.and_then(|value| self.open_note(name, value)))
    }

    fn index(&self) -> Result<Arc<IndexLog>> {
        self.running.lock().as_ref().map(|running| Arc::clone(&running.index)).ok_or_else(closed)
    }

    /// Why the store takes no more writes, if so. Reads go on.
    pub fn poisoned(&self) -> Option<Error> {
        self.shared.poisoned()
    }

    /// The same as [`Store::poisoned`], to match on.
    pub fn poison_reason(&self) -> Option<PoisonReason> {
        self.shared.poison.get().map(|(reason, _)| reason)
    }

    /// Has `hook` called once when the store stops to take writes; at once if it has stopped. Replaces an earlier hook.
    pub fn on_poison(&self, hook: PoisonHook) {
        self.shared.poison.on_set(hook);
    }

    /// The random identity of the store: the same in every open of it, another in every other store.
    pub fn uuid(&self) -> [u8; 16] {
        *self.shared.uuid.as_bytes()
    }

    /// Whether a store at `path` could be opened for writing now: takes a little space, writes, syncs, and gives it back.
    /// The store may be open meanwhile.
    ///
    /// # Errors
    /// `InvalidInput` if there is no store (its file system may not be mounted), `NoSpace`, `PermissionDenied` (also for a
    /// file system that is read-only), `Io`.
    pub fn check_writable(path: &Path) -> Result<()> {
        check_writable(path)
    }

    /// Makes everything accepted durable, ends all threads and gives up the lock. Later calls get `Closed`. Not to be
    /// called from a callback of the store.
    ///
    /// # Errors
    /// `Timeout` if it was not done at `deadline`: it goes on, and may be called again. `Poisoned`, `Io` if the store
    /// could not be closed in order: what was reported durable is durable all the same.
    pub fn close(&self, deadline: Instant) -> Result<()> {
        self.shared.fill.stop();
        self.shared.calibration.stop();
        self.shared.inbox.end(Ending::Drain);
        let late = || {
            let message = "the drive did not take everything before the deadline; try again with more time";
            Error::new(ErrorKind::Timeout, message)
        };
        let _closing = self.closing.try_lock_until(deadline).ok_or_else(late)?;
        let writer_ended = self.running.lock().as_ref().map(|running| running.writer_ended.clone());
        let Some(writer_ended) = writer_ended else { return Ok(()) };
        let result = match writer_ended.recv_deadline(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => return Err(late()),
            Err(RecvTimeoutError::Disconnected) => Err(closed()),
        };
        let ended = self.running.lock().take();
        drop(self.verifiers.write().take());
        drop(self.encoders.write().take());
        if let Some(ended) = ended {
            self.shared.calibration.save();
            ended.end(&self.shared);
        }
        result
    }
}

/// What runs a store step by step.
#[cfg(any(test, feature = "fault-injection"))]
impl Store {
    /// Asks for everything before to become durable, without waiting.
    pub(super) fn flush_soon(&self, done: impl FnOnce(Result<()>) + Send + 'static) {
        self.shared.inbox.push_flush(Done::new(Box::new(done)));
    }

    /// Waits until the writer has nothing to do but wait for the drive or for news; false at `deadline`.
    pub(super) fn wait_idle(&self, deadline: Instant) -> bool {
        self.shared.inbox.wait_idle(deadline)
    }
}

impl Running {
    /// Ends what is left when the writer has ended. The lock goes last.
    fn end(self, shared: &Shared) {
        shared.drive.io().close();
        for thread in self.helpers.into_iter().chain([self.writer]).chain(self.fill) {
            if thread.join().is_err() {
                tracing::error!("a thread of the store panicked");
            }
        }
        shared.fill.let_go();
        drop(self.index);
        drop(self.more_drives);
        drop(self.directory);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let Some(running) = self.running.get_mut().take() else { return };
        self.shared.fill.stop();
        self.shared.calibration.stop();
        self.shared.inbox.end(Ending::Abandon);
        drop(self.verifiers.get_mut().take());
        drop(self.encoders.get_mut().take());
        let shared = Arc::clone(&self.shared);
        let end = move || {
            if matches!(running.writer_ended.recv_timeout(DROP_TIMEOUT), Err(RecvTimeoutError::Timeout)) {
                tracing::error!("the store's writer did not end; its files stay open");
                std::mem::forget(running);
                return;
            }
            running.end(&shared);
        };
        // The last handle may go in a callback: a thread can not wait for itself.
        if self.own_threads.contains(&std::thread::current().id()) {
            drop(std::thread::Builder::new().name("pega-nvme-end".into()).spawn(end));
        } else {
            end();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("uuid", &self.shared.uuid).finish_non_exhaustive()
    }
}

/// Apart from the store's own names.
fn note_name(name: &str) -> String {
    format!("note/{name}")
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the store is closed")
}

fn open_file(path: &Path) -> Result<File> {
    open_direct(path).map(|(file, _, _)| file)
}

/// The files of regions, by drive.
fn region_files(directory: &Directory, more_drives: &[DriveDirectory]) -> Vec<PathBuf> {
    std::iter::once(directory.regions()).chain(more_drives.iter().map(DriveDirectory::regions)).collect()
}

/// The drives as a calibration names them.
fn drives_to_calibrate(files: &[PathBuf], store: StoreUuid, plan: &Plan) -> Vec<CalibratedDrive> {
    let drive = |(listed, regions): (usize, &PathBuf)| {
        let drive = plan.uuid(listed).map_or("home".to_owned(), |uuid| format!("{uuid:?}"));
        CalibratedDrive { regions: regions.clone(), name: format!("{drive} of {store:?}") }
    };
    files.iter().enumerate().map(drive).collect()
}

/// What is there before a store is recovered.
struct Prepared {
    io: Arc<dyn BlockIo>,
    /// As it will be written next: with this open counted, and everything that is or joins in its table.
    superblock: Superblock,
    plan: Plan,
    /// Whether all of its regions are read and written past the page cache.
    is_direct: bool,
    /// The keys, if the store is encrypted.
    keyring: Option<Keyring>,
}

/// Opens the files of all drives, decides which drives the store has, and takes the space for what is new.
fn prepare(
    backing: &dyn Backing,
    config: &StoreConfig,
    directory: &Directory,
    more_drives: &mut Vec<DriveDirectory>,
    arena: &Arc<Arena>,
    wrap: impl FnOnce(Arc<dyn BlockIo>) -> Arc<dyn BlockIo>,
) -> Result<Prepared> {
    for drive in &config.more_drives {
        more_drives.push(DriveDirectory::open(&drive.path)?);
    }
    if directory.is_new() {
        preallocate(&directory.superblock(), SUPERBLOCK_COPIES * PAGE_BYTES as u64)?;
        preallocate(&directory.regions(), config.capacity_bytes / config.region_bytes * config.region_bytes)?;
    }
    more_drives.iter_mut().try_for_each(DriveDirectory::begin)?;
    let mut files = vec![open_file(&directory.superblock())?];
    let mut is_direct = true;
    for path in region_files(directory, more_drives) {
        let (file, _, is_this_direct) = open_direct(&path)?;
        is_direct &= is_this_direct;
        files.push(file);
    }
    let io = wrap(backing.engine(config, &files, arena)?);
    let known = if directory.is_new() { first_superblock(config)? } else { Drive::read_superblock(&*io)? };
    let keyring = Keyring::prepare(backing, config.encryption.as_ref(), directory, &known)?;
    check_region_bytes(config, &known)?;
    let identities = std::iter::once(None).chain(more_drives.iter().map(DriveDirectory::identity));
    let listed: Vec<Listed<'_>> = config
        .drives()
        .zip(identities)
        .zip(config.regions_of_drives(known.region_bytes)?)
        .map(|(((path, _), identity), regions)| Listed { path, identity, regions })
        .collect();
    let plan = Plan::new(&known, &listed)?;
    // A drive may be one open ahead of the home, not two: what an open has read that could not sync the superblock has to
    // be durable before the drives note the next one. The same bytes in the same place: torn, they are those that were.
    if !directory.is_new() && !more_drives.is_empty() && !known.is_clean && !is_off!(TrustUnsyncedSuperblock) {
        Drive::write_superblock(&*io, &known)?;
    }
    for (path, place) in region_files(directory, more_drives).iter().zip(&plan.listed) {
        preallocate(path, u64::from(plan.during.regions_of(*place)) * known.region_bytes)?;
    }
    if directory.is_new() {
        Drive::write_superblock(&*io, &Superblock { table: plan.during.clone(), ..known.clone() })?;
    }
    let superblock = Superblock { table: plan.during.clone(), opens: known.opens + 1, ..known };
    join(more_drives, superblock.store, superblock.opens, &plan, Membership::Joining)?;
    Ok(Prepared { io, superblock, plan, is_direct, keyring })
}

/// Writes whose each drive is. One that is a member stays one; the others become `membership`.
fn join(
    more_drives: &mut [DriveDirectory],
    store: StoreUuid,
    opens: u64,
    plan: &Plan,
    membership: Membership,
) -> Result<()> {
    for (listed, directory) in (1..).zip(more_drives) {
        let Some(drive) = plan.uuid(listed) else { continue };
        let known = directory.identity().filter(|known| known.drive == drive && known.store == store);
        let membership = known.map_or(membership, |known| known.membership.max(membership));
        let identity = DriveIdentity { membership, store, drive, opens };
        if known != Some(identity) {
            directory.write(identity)?;
        }
    }
    Ok(())
}

fn first_superblock(config: &StoreConfig) -> Result<Superblock> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(Superblock {
        store: StoreUuid::random()?,
        counter: 1,
        region_bytes: config.region_bytes,
        table: DriveTable::default(),
        opens: 0,
        rebuild_floor: 0,
        generation_ceiling: 1,
        sequence_ceiling: 1,
        is_encrypted: config.encryption.is_some(),
        is_clean: true,
        created_unix_ms: since.map_or(0, |since| since.as_millis() as u64),
    })
}

fn check_region_bytes(config: &StoreConfig, superblock: &Superblock) -> Result<()> {
    let (has, wants) = (superblock.region_bytes, config.region_bytes);
    if has == wants || config.keeps_region_bytes {
        return Ok(());
    }
    let message = format!(
        "the store has regions of {has} bytes, the configuration says {wants}; give {has}, or an empty directory"
    );
    Err(Error::new(ErrorKind::InvalidInput, message))
}
