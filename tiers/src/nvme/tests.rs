//! The store as a whole, on real files. Every payload is a stream of random numbers seeded by its key and version, so
//! that wrong bytes show whatever way they came.

mod basics;
mod calibrating;
mod crashes;
mod drives;
mod encoded;
mod encryption;
mod faults;
mod filling;
mod fixtures;
mod fsck;
mod purging;
mod reclaiming;
mod reinserting;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use tempfile::TempDir;

use super::*;
use crate::block::{BlockKey, GroupGeometry, NamespaceDescriptor, NamespaceHandle, RecordId, RecordKind};
use crate::dram::{Arena, ArenaConfig, Slot};
use crate::error::{ErrorKind, Result};
use crate::index::Location;

/// How long a test waits for what must happen; a bound, not a measure.
const PATIENCE: Duration = Duration::from_secs(60);
const KIB: u64 = 1 << 10;
const REGION_BYTES: u64 = 256 * KIB;

thread_local! {
    /// How many drives the stores of a test have, where it does not say so itself.
    static DRIVES: std::cell::Cell<u64> = const { std::cell::Cell::new(1) };
}

/// Runs a test body with stores on so many drives; their regions are divided among them.
fn on_drives(count: u64, body: impl FnOnce()) {
    DRIVES.set(count);
    body();
    DRIVES.set(1);
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Gives up the region with the lowest first sequence.
struct Oldest;

impl ReclaimPolicy for Oldest {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        candidates.iter().min_by_key(|info| info.first_sequence).map(|info| info.region)
    }
}

/// Gives up the region that was not looked at for the longest time.
struct LeastRecent;

impl ReclaimPolicy for LeastRecent {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        candidates.iter().min_by_key(|info| info.last_access).map(|info| info.region)
    }
}

/// Keeps the oldest regions for ever: the case in which old versions could come back.
struct Newest;

impl ReclaimPolicy for Newest {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        candidates.iter().max_by_key(|info| info.first_sequence).map(|info| info.region)
    }
}

/// A directory on a drive with direct I/O, and how the store in it is opened.
struct Place {
    directory: TempDir,
    arena: Arc<Arena>,
    config: StoreConfig,
    policy: Arc<dyn ReclaimPolicy>,
}

impl Place {
    fn new(io: IoChoice, regions: u64) -> Self {
        Self::with_policy(io, regions, Arc::new(Oldest))
    }

    fn with_policy(io: IoChoice, regions: u64, policy: Arc<dyn ReclaimPolicy>) -> Self {
        let directory = drive_directory();
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(64 << 20) }).expect("memory");
        let drives = DRIVES.get();
        let regions = if drives == 1 { regions } else { (regions / drives).max(4) };
        let config = StoreConfig {
            io,
            queue_depth: 16,
            commit_interval: Duration::from_millis(20),
            ..StoreConfig::new(directory.path().join("store"), regions * REGION_BYTES, REGION_BYTES)
        };
        let place = Self { directory, arena, config, policy };
        (1..drives).fold(place, |place, _| place.with_drive(regions))
    }

    /// The same with one more drive of so many regions.
    fn with_drive(mut self, regions: u64) -> Self {
        let path = self.directory.path().join(format!("drive{}", self.config.more_drives.len() + 1));
        self.config.more_drives.push(DriveConfig { path, capacity_bytes: regions * REGION_BYTES });
        self
    }

    fn open(&self) -> (Arc<Store>, RecoveryReport) {
        self.try_open().expect("the store opens")
    }

    fn try_open(&self) -> Result<(Arc<Store>, RecoveryReport)> {
        Store::open(self.config.clone(), Arc::clone(&self.arena), Arc::clone(&self.policy))
    }

    fn open_faulty(&self, plan: FaultPlan) -> (Arc<Store>, Arc<Faulty<Arc<dyn BlockIo>>>) {
        let mut drive = None;
        let wrap = |io| -> Arc<dyn BlockIo> {
            let faulty = Arc::new(Faulty::new(io, plan).expect("a faulty drive"));
            drive = Some(Arc::clone(&faulty));
            faulty
        };
        let (store, _) =
            Store::open_through(self.config.clone(), &self.arena, Arc::clone(&self.policy), wrap).expect("opens");
        (store, drive.expect("wrapped"))
    }

    fn store_path(&self) -> PathBuf {
        self.config.path.clone()
    }

    /// The same store in a copy of the directory, as a power loss at this moment could leave it: nothing of what the
    /// open store does later is in it.
    fn copy(&self) -> Self {
        let directory = drive_directory();
        let mut config = StoreConfig { path: directory.path().join("store"), ..self.config.clone() };
        for (number, drive) in config.more_drives.iter_mut().enumerate() {
            drive.path = directory.path().join(format!("drive{}", number + 1));
        }
        for ((from, _), (to, _)) in self.config.drives().zip(config.drives()) {
            copy_tree(from, to);
        }
        Self { directory, arena: Arc::clone(&self.arena), config, policy: Arc::clone(&self.policy) }
    }

    fn wipe_index(&self) {
        std::fs::remove_dir_all(self.config.path.join("index")).expect("removed");
    }

    /// Changes bytes of the region file behind the store's back.
    fn overwrite(&self, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(self.config.path.join("regions.0")).expect("there");
        file.write_all_at(bytes, offset).expect("written");
        file.sync_all().expect("synced");
    }

    fn bytes_at(&self, offset: u64, length: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open(self.config.path.join("regions.0")).expect("there");
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).expect("read");
        bytes
    }

    fn offset_of(&self, location: &Location) -> u64 {
        u64::from(location.region) * REGION_BYTES + u64::from(location.page) * 4096
    }

    fn slot(&self, bytes: usize) -> Slot {
        self.arena.alloc(bytes).expect("room in the arena")
    }
}

/// A directory on the file system of the build, which has direct I/O.
fn drive_directory() -> TempDir {
    let program = std::env::current_exe().expect("the test's own path");
    tempfile::tempdir_in(program.parent().expect("a directory")).expect("a directory")
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("listed") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            // A file of RocksDB may go while the store works.
            drop(std::fs::copy(entry.path(), target));
        }
    }
}

/// The bytes of an object's version.
fn content(name: u64, version: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(name.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version).fill_bytes(&mut bytes);
    bytes
}

fn object_id(name: u64) -> RecordId {
    let key = BlockKey::from_name(&name.to_le_bytes());
    RecordId { namespace: NamespaceHandle(0), group: 0, shard: 0, key }
}

fn object(place: &Place, name: u64, version: u64, length: usize, done: AppendDone) -> Append {
    let mut slot = place.slot(length);
    slot.payload_mut()[..length].copy_from_slice(&content(name, version, length));
    Append {
        id: object_id(name),
        kind: RecordKind::Object,
        parent: BlockKey::ROOT,
        depth: 0,
        slot: Some(Arc::new(slot)),
        payload_bytes: length as u64,
        done,
    }
}

fn tombstone(id: RecordId, done: AppendDone) -> Append {
    let (kind, parent) = (RecordKind::Tombstone, BlockKey::ROOT);
    Append { id, kind, parent, depth: 0, slot: None, payload_bytes: 0, done }
}

/// Collects the ends of appends, and knows when one was called twice or not at all.
struct Ends {
    sender: Sender<(u64, Result<Location>)>,
    receiver: Receiver<(u64, Result<Location>)>,
    expected: usize,
}

impl Ends {
    fn new() -> Self {
        let (sender, receiver) = unbounded();
        Self { sender, receiver, expected: 0 }
    }

    fn done(&mut self, name: u64) -> AppendDone {
        self.expected += 1;
        let sender = self.sender.clone();
        Box::new(move |result| drop(sender.send((name, result))))
    }

    /// All ends, each exactly once.
    fn wait(self) -> Vec<(u64, Result<Location>)> {
        drop(self.sender);
        let mut ends = Vec::new();
        while let Ok(end) = self.receiver.recv_timeout(PATIENCE) {
            ends.push(end);
        }
        assert_eq!(ends.len(), self.expected, "every callback runs exactly once");
        ends
    }
}

fn append(store: &Store, append: Append) {
    let mut append = append;
    loop {
        match store.append(append) {
            Ok(()) => return,
            Err((back, error)) => {
                assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                std::thread::sleep(Duration::from_millis(1));
                append = back;
            }
        }
    }
}

/// Writes objects and waits until they are durable.
fn put(place: &Place, store: &Store, objects: impl IntoIterator<Item = (u64, u64, usize)>) {
    let mut ends = Ends::new();
    for (name, version, length) in objects {
        append(store, object(place, name, version, length, ends.done(name)));
    }
    store.flush(soon()).expect("flushed");
    for (name, result) in ends.wait() {
        result.unwrap_or_else(|error| panic!("object {name}: {error}"));
    }
}

fn remove(store: &Store, names: impl IntoIterator<Item = u64>) {
    let mut ends = Ends::new();
    for name in names {
        append(store, tombstone(object_id(name), ends.done(name)));
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, result)| result.is_ok()));
}

fn read_at(place: &Place, store: &Store, id: RecordId, location: Location) -> Result<Vec<u8>> {
    let slot = Arc::new(place.slot(location.pages as usize * 4096 - 4096));
    let (sender, receiver) = unbounded();
    store.read(
        id,
        location,
        Arc::clone(&slot),
        IoPriority::Demand,
        Box::new(move |result| drop(sender.send(result))),
    )?;
    let verified = receiver.recv_timeout(PATIENCE).expect("the read ends")?;
    Ok(slot.payload()[..verified.payload_bytes as usize].to_vec())
}

/// The bytes of an object; `None` if it is not there, or not good.
fn get(place: &Place, store: &Store, name: u64) -> Option<Vec<u8>> {
    loop {
        let location = store.locate(&object_id(name))?;
        match read_at(place, store, object_id(name), location) {
            Ok(bytes) => return Some(bytes),
            // Reclaimed between the two: look again.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
}

fn assert_object(place: &Place, store: &Store, name: u64, version: u64, length: usize) {
    let bytes = get(place, store, name).unwrap_or_else(|| panic!("object {name} is missing"));
    assert!(bytes == content(name, version, length), "object {name} has wrong bytes");
}

fn close(store: Arc<Store>) {
    store.close(soon()).expect("closed in order");
}

/// A test body for both engines.
macro_rules! on_both_engines {
    ($($case:ident),* $(,)?) => {
        mod psync {
            $(#[test] fn $case() { super::$case(crate::nvme::IoChoice::Psync); })*
        }
        mod uring {
            $(#[test] fn $case() { super::$case(crate::nvme::IoChoice::Auto); })*
        }
    };
}
use on_both_engines;

/// A test body for both engines, and for stores on two drives.
macro_rules! on_engines_and_drives {
    ($($case:ident),* $(,)?) => {
        on_both_engines!($($case),*);
        mod two_drives {
            $(#[test] fn $case() {
                crate::nvme::tests::on_drives(2, || super::$case(crate::nvme::IoChoice::Auto));
            })*
        }
    };
}
use on_engines_and_drives;
