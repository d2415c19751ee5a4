//! One history: several lives of a store, each with a random workload and an end (an orderly close, a kill, a power loss
//! now or at a chosen operation), and the checks between them.

mod purge;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::drives::{Drives, drives_of};
use super::model::{BLOCK_VERSION, Fact, Model, Seen, content};
use super::world::{PAYLOAD_BYTES_MAX, Rule, World};
use super::{SimFailure, SimFailureKind};
use crate::block::{BlockKey, GroupGeometry, NamespaceDescriptor, NamespaceHandle, RecordId, RecordKind};
use crate::dram::{Arena, ArenaConfig};
use crate::error::{ErrorKind, Result};
use crate::index::{Location, TwinIndex};
use crate::nvme::encryption::EncryptionKey;
use crate::nvme::io::{FaultAction, SimCrash};
use crate::nvme::policy::RegionState;
use crate::nvme::recovery::STORE_NAME;
use crate::nvme::regions::RegionPins;
use crate::nvme::switches::{Sabotage, with_sabotage};

/// Names of objects; names from here on are blocks.
pub(super) const OBJECTS: u64 = 10;
const BLOCKS: u64 = 6;
pub(super) const BLOCK_BYTES: usize = 9008;
/// The key of encrypted stores.
const KEY: &[u8; 32] = b"a key of the simulation, 32 byte";
/// Opens in a row that may be cut before one is let through.
const CUT_OPENS_MAX: u32 = 3;

/// What is simulated.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// A directory for the real names; best on tmpfs.
    pub directory: PathBuf,
    /// Drives of the store at first: 1 to 3. Default: 1, but two or three in one history of three.
    pub drives: Option<usize>,
    /// What there is more of.
    pub bias: SimBias,
    /// Whether the stores are encrypted. Default: no.
    pub is_encrypted: bool,
    /// A protection that is switched off.
    pub sabotage: Option<Sabotage>,
    /// Whether to say on standard error what is done.
    pub is_told: bool,
    /// Whether it is believed of an open that fails after it has made the index anew that it has met damage which hides
    /// what is older. It says nothing of it, so this excuses a little more than it must. Default: true.
    pub excuses_failed_opens: bool,
}

/// What histories have more of than usual, so that something rare is met soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SimBias {
    /// Nothing.
    #[default]
    None,
    /// Every drive fails now and then.
    Faults,
    /// Most lives end with a kill, and the next open with a power loss.
    Kills,
    /// Every store has several drives, which come and go.
    Drives,
    /// The namespace of the blocks is purged now and then.
    Purges,
}

impl SimOptions {
    /// Everything on.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            drives: None,
            bias: SimBias::None,
            is_encrypted: false,
            sabotage: None,
            is_told: false,
            excuses_failed_opens: true,
        }
    }
}

/// What happened in simulations, to tell that they went where they should.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SimTally {
    /// Histories.
    pub seeds: u64,
    /// Times that a store was opened.
    pub opens: u64,
    /// Crashes: power losses and kills.
    pub crashes: u64,
    /// Of these, in the middle of an open.
    pub crashes_in_open: u64,
    /// Of these, kills: nothing unsynced was lost.
    pub kills: u64,
    /// Opens that made the index anew.
    pub rebuilt: u64,
    /// Opens with an older copy of the index.
    pub older_indexes: u64,
    /// Records that were accepted.
    pub appends: u64,
    /// Of these, records that were reported durable.
    pub durable: u64,
    /// Records that were looked at and judged.
    pub checks: u64,
    /// Of these, records that were there.
    pub right: u64,
    /// Regions that were reclaimed.
    pub reclaimed: u64,
    /// Tombstones that were written again for that.
    pub kept_tombstones: u64,
    /// Drive and index operations.
    pub operations: u64,
    /// Faults that were injected besides.
    pub faults: u64,
    /// Histories that began with several drives.
    pub on_drives: u64,
    /// Drives that went for good.
    pub retired: u64,
    /// Drives that joined, or joined again.
    pub joined: u64,
    /// Drives that became smaller or larger.
    pub resized: u64,
    /// Namespaces that were purged.
    pub purges: u64,
    /// A digest of the histories.
    pub trace: u64,
}

impl SimTally {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.seeds, other.seeds),
            (&mut self.opens, other.opens),
            (&mut self.crashes, other.crashes),
            (&mut self.crashes_in_open, other.crashes_in_open),
            (&mut self.kills, other.kills),
            (&mut self.rebuilt, other.rebuilt),
            (&mut self.older_indexes, other.older_indexes),
            (&mut self.appends, other.appends),
            (&mut self.durable, other.durable),
            (&mut self.checks, other.checks),
            (&mut self.right, other.right),
            (&mut self.reclaimed, other.reclaimed),
            (&mut self.kept_tombstones, other.kept_tombstones),
            (&mut self.operations, other.operations),
            (&mut self.faults, other.faults),
            (&mut self.on_drives, other.on_drives),
            (&mut self.retired, other.retired),
            (&mut self.joined, other.joined),
            (&mut self.resized, other.resized),
            (&mut self.purges, other.purges),
        ];
        for (sum, more) in pairs {
            *sum += more;
        }
        self.trace ^= other.trace;
    }
}

/// Runs histories, one after the other; one for each thread.
pub struct Simulator {
    options: SimOptions,
    arena: Arc<Arena>,
}

impl Simulator {
    /// Takes its memory.
    ///
    /// # Errors
    /// `NoSpace` if there is none.
    pub fn new(options: SimOptions) -> Result<Self> {
        let arena = Arena::new(ArenaConfig { touch: false, ..ArenaConfig::new(16 << 20) })?;
        Ok(Self { options, arena })
    }

    /// Runs the history of a seed.
    ///
    /// # Errors
    /// What was wrong.
    pub fn run(&self, seed: u64) -> Result<SimTally, SimFailure> {
        self.guarded(seed, |path, arena| {
            let bias = self.options.bias;
            let drives = self.options.drives.unwrap_or_else(|| drives_of(seed, bias));
            let history = History::on_drives(drives, path, seed, arena, self.options.is_told).biased(bias);
            let mut history = self.with_key(history);
            history.excuses_failed_opens = self.options.excuses_failed_opens;
            history.run()
        })
    }

    /// Whether stores are encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        self.options.is_encrypted
    }

    /// The same on encrypted stores, if that is wanted.
    pub(super) fn with_key(&self, mut history: History) -> History {
        history.world.config.encryption = self.options.is_encrypted.then(|| EncryptionKey::from_bytes(*KEY));
        history
    }

    /// Runs a check in a directory of its own; a panic in it is a failure.
    pub(super) fn guarded<T>(
        &self,
        seed: u64,
        check: impl FnOnce(&Path, &Arc<Arena>) -> Step<T>,
    ) -> Result<T, SimFailure> {
        let path = self.options.directory.join(format!("seed-{seed}"));
        let outcome =
            with_sabotage(self.options.sabotage, || catch_unwind(AssertUnwindSafe(|| check(&path, &self.arena))));
        drop(std::fs::remove_dir_all(&path));
        match outcome {
            Ok(Ok(found)) => Ok(found),
            Ok(Err((kind, message))) => Err(SimFailure { seed, kind, message }),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let message = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned();
                Err(SimFailure { seed, kind: SimFailureKind::Panic, message })
            }
        }
    }
}

pub(super) type Step<T = ()> = Result<T, (SimFailureKind, String)>;

/// A record whose region is held.
struct Pinned {
    _pins: RegionPins,
    name: u64,
    location: Location,
    fact: Fact,
}

/// How a life ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Close,
    Kill,
    PowerLoss,
}

pub(super) struct History {
    pub(super) random: SmallRng,
    pub(super) world: World,
    pub(super) model: Model,
    pub(super) tally: SimTally,
    operation: u64,
    /// Whose record each operation is that has not ended.
    owners: HashMap<u64, u64>,
    pub(super) version: u64,
    pub(super) namespace: Option<NamespaceHandle>,
    /// How many further namespaces were registered.
    namespaces: u32,
    pinned: Option<Pinned>,
    maybe_given_up: Vec<(u32, u64)>,
    older_index: Option<TwinIndex>,
    has_failed_sync: bool,
    pub(super) was_rebuilt: bool,
    /// Whether an older copy of the index was restored, and not opened yet.
    pub(super) has_older_index: bool,
    /// Whether the index was made anew since the last open, or may have been in one that was cut.
    pub(super) may_be_rebuilt: bool,
    /// Whether regions may have left the store with the last open.
    pub(super) have_left: bool,
    /// Syncs that had failed when the last life ended.
    failed_syncs: u64,
    has_faults: bool,
    /// Whether the store has reported any failure.
    pub(super) has_failed: bool,
    /// Whether a drive that lies is simulated: then what was durable may be lost or old, and only bytes are judged.
    pub(super) is_lied_to: bool,
    pub(super) bias: SimBias,
    excuses_failed_opens: bool,
    is_told: bool,
    /// What happens to the drives; `None` in a history of one drive.
    pub(super) drives: Option<Drives>,
}

impl History {
    /// A history of a store on one drive.
    pub(super) fn new(path: &Path, seed: u64, arena: &Arc<Arena>, is_told: bool) -> Self {
        Self::on_drives(1, path, seed, arena, is_told)
    }

    fn on_drives(drives: usize, path: &Path, seed: u64, arena: &Arc<Arena>, is_told: bool) -> Self {
        let mut random = SmallRng::seed_from_u64(seed ^ 0x5eed_0000_0000_0000);
        let rule = [Rule::Oldest, Rule::Newest, Rule::LeastRecent, Rule::Random][random.random_range(0..4)];
        let most = if drives == 1 { 5..10 } else { 4..7 };
        let regions: Vec<u64> = (0..drives).map(|_| random.random_range(most.clone())).collect();
        let mut world = World::new(path, seed, &regions, rule, arena);
        world.config.queue_depth = [1, 2, 4, 8][random.random_range(0..4)];
        let has_faults = random.random_ratio(1, 6);
        if is_told {
            world.disk().tell();
        }
        Self {
            random,
            world,
            model: Model::default(),
            tally: SimTally { seeds: 1, on_drives: u64::from(drives > 1), ..SimTally::default() },
            drives: (drives > 1).then(|| Drives::new(path, drives)),
            operation: 0,
            owners: HashMap::new(),
            version: 0,
            namespace: None,
            namespaces: 0,
            pinned: None,
            maybe_given_up: Vec::new(),
            older_index: None,
            has_failed_sync: false,
            was_rebuilt: false,
            has_older_index: false,
            may_be_rebuilt: false,
            have_left: false,
            failed_syncs: 0,
            has_faults,
            has_failed: false,
            is_lied_to: false,
            bias: SimBias::None,
            is_told,
            excuses_failed_opens: true,
        }
    }

    /// Has more of something.
    fn biased(mut self, bias: SimBias) -> Self {
        self.bias = bias;
        self.has_faults |= bias == SimBias::Faults;
        self
    }

    fn run(mut self) -> Step<SimTally> {
        for _ in 0..self.random.random_range(1..5) {
            self.life()?;
        }
        self.last_checks()?;
        self.tally.operations = self.world.disk().operations();
        self.tally.faults = self.world.disk().fired();
        self.tally.trace = self.world.disk().trace();
        Ok(self.tally)
    }

    pub(super) fn tell(&self, what: impl FnOnce() -> String) {
        if self.is_told {
            eprintln!("{:>6} {}", self.world.disk().operations(), what());
        }
    }

    fn life(&mut self) -> Step {
        let end = match self.random.random_range(0..10) {
            0..8 if self.bias == SimBias::Kills => End::Kill,
            0..6 => End::PowerLoss,
            6..8 => End::Kill,
            _ => End::Close,
        };
        self.change_drives();
        let is_killed = self.bias == SimBias::Kills;
        let is_cut_somewhere = !is_killed && end != End::Close && self.random.random_bool(0.6);
        if self.open(is_killed || is_cut_somewhere)? {
            if is_cut_somewhere {
                self.cut_somewhere();
            }
            self.inject_faults();
            self.lose_a_drive();
            self.work()?;
        }
        self.end(end)?;
        self.damage_index();
        Ok(())
    }

    /// The power goes at one of the next operations, soon or late.
    fn cut_somewhere(&mut self) {
        let within = [20, 60, 200][self.random.random_range(0..3)];
        let number = self.world.disk().operations() + self.random.random_range(1..=within);
        self.world.disk().cut_power_at(number);
    }

    fn inject_faults(&mut self) {
        if !self.has_faults {
            return;
        }
        for _ in 0..self.random.random_range(1..4) {
            let number = self.world.disk().operations() + self.random.random_range(1..200);
            let action = match self.random.random_range(0..6) {
                0 => FaultAction::Interrupted,
                1 => FaultAction::Short { bytes: 4096 },
                2 => FaultAction::Torn { bytes: self.random.random_range(0..6) * 4096 },
                3 => FaultAction::Errno(libc::ENOSPC),
                _ => FaultAction::Errno(libc::EIO),
            };
            // Reads that fail take what is durable with them: not here.
            self.world.disk().inject_in_write(number, action);
        }
    }

    /// Opens the store, through crashes in the middle of it if it may be cut; false if it stayed shut because of a fault.
    pub(super) fn open(&mut self, may_be_cut: bool) -> Step<bool> {
        let mut cuts = 0;
        loop {
            if may_be_cut && cuts < CUT_OPENS_MAX && self.random.random_bool(0.3) {
                self.cut_somewhere();
            }
            self.tally.opens += 1;
            let (fired, failed_syncs) = (self.world.disk().fired(), self.world.disk().failed_syncs());
            let opened = self.world.open();
            self.tell(|| format!("open: {opened:?}"));
            for info in self.world.store.as_ref().map(|store| store.regions()).unwrap_or_default() {
                self.tell(|| format!("region {}: {:?} {}", info.region, info.state, info.generation));
            }
            if self.world.disk().is_off() {
                cuts += 1;
                self.tally.crashes_in_open += 1;
                self.note_rebuild(opened.is_ok_and(|report| report.index_rebuilt));
                self.note_failed_rebuild();
                self.crash(SimCrash::PowerLoss);
                continue;
            }
            match opened {
                Ok(report) => {
                    self.tally.rebuilt += u64::from(report.index_rebuilt);
                    self.note_rebuild(report.index_rebuilt);
                    self.world.disk().cut_power_at(u64::MAX);
                    self.note_drives();
                    self.look_at_everything()?;
                    return Ok(true);
                }
                // A fault of the drive is a reason; the next open has none.
                Err(_) if self.world.disk().fired() > fired => {
                    self.has_failed = true;
                    // It may have failed when the new index was there.
                    self.note_failed_rebuild();
                    if self.world.disk().failed_syncs() > failed_syncs {
                        self.crash(SimCrash::PowerLoss);
                    }
                }
                Err(error) => return Err((SimFailureKind::Refused, format!("the store does not open: {error:#}"))),
            }
        }
    }

    /// A new index knows what stands behind damage too; a copy of an earlier one is of no use any more.
    fn note_rebuild(&mut self, is_rebuilt: bool) {
        if is_rebuilt {
            (self.was_rebuilt, self.may_be_rebuilt) = (true, true);
            self.older_index = None;
        }
    }

    /// An open that has failed may have made the index anew before that.
    fn note_failed_rebuild(&mut self) {
        self.was_rebuilt |= self.excuses_failed_opens && self.world.backing.index.is_new_with(STORE_NAME);
    }

    /// After an open, what is there is known, and has to stay.
    fn look_at_everything(&mut self) -> Step {
        self.namespace = None;
        let namespace = self.register(0)?;
        for name in self.model.names() {
            let Some(id) = id_of(name, namespace) else { continue };
            let seen = self.world.look(id)?;
            self.tell(|| format!("found: record {name} {}", told(&seen)));
            self.count(&seen);
            let judged = self.model.settle(name, &seen, self.was_rebuilt, self.have_left);
            self.forgive(judged)?;
        }
        self.was_rebuilt = false;
        self.world.backing.index.note_seen();
        self.world.settle()
    }

    fn count(&mut self, seen: &Seen) {
        self.tally.checks += 1;
        self.tally.right += u64::from(matches!(seen, Seen::Bytes(..)));
    }

    fn register(&mut self, number: u32) -> Step<Option<NamespaceHandle>> {
        let Some(store) = self.world.store.clone() else { return Ok(None) };
        let groups = [GroupGeometry { group: 0, block_bytes: BLOCK_BYTES as u64, shards: 1 }];
        match store.namespace(&descriptor(number), &groups) {
            Ok(handle) if number == 0 => self.namespace = Some(handle),
            Ok(_) => {}
            Err(_) if self.is_excused() => {}
            Err(error) => return Err((SimFailureKind::Refused, format!("no namespace: {error:#}"))),
        }
        Ok(self.namespace)
    }

    /// Whether the store has a reason not to work.
    fn is_excused(&self) -> bool {
        self.world.disk().is_off() || self.world.disk().fired() > 0
    }

    fn work(&mut self) -> Step {
        for _ in 0..self.random.random_range(0..70) {
            if self.world.disk().is_off() {
                return Ok(());
            }
            self.act()?;
            self.catch_up()?;
        }
        Ok(())
    }

    fn act(&mut self) -> Step {
        match self.random.random_range(0..100) {
            0..35 => self.put_object(),
            35..45 => self.put_block(),
            45..56 => self.remove(),
            56..68 => {
                self.tell(|| "flush".to_owned());
                self.world.flush_soon();
                Ok(())
            }
            68..88 => {
                for _ in 0..self.random.random_range(1..8) {
                    self.world.disk().step();
                    self.catch_up()?;
                }
                Ok(())
            }
            88..94 => self.check_one(),
            94..97 => self.pin(),
            97 => self.unpin(),
            98 if self.bias == SimBias::Purges => self.purge(),
            98 => {
                self.namespaces += 1;
                self.register(self.namespaces).map(drop)
            }
            _ => {
                self.older_index = Some(self.world.backing.index.copy());
                Ok(())
            }
        }
    }

    fn put_object(&mut self) -> Step {
        let name = self.random.random_range(0..OBJECTS);
        let bytes = match self.random.random_range(0..8) {
            0 => 1,
            1 => 4096 * self.random.random_range(1..=13),
            2 => self.random.random_range(1..=PAYLOAD_BYTES_MAX),
            _ => self.random.random_range(1..12_000),
        };
        self.version += 1;
        self.append(name, RecordKind::Object, Fact::There { version: self.version, bytes })
    }

    fn put_block(&mut self) -> Step {
        let name = OBJECTS + self.random.random_range(0..BLOCKS);
        // The bytes of a block follow from its key.
        self.append(name, RecordKind::Kv, Fact::There { version: BLOCK_VERSION, bytes: BLOCK_BYTES })
    }

    fn remove(&mut self) -> Step {
        let name = self.random.random_range(0..OBJECTS + BLOCKS);
        self.append(name, RecordKind::Tombstone, Fact::Absent)
    }

    pub(super) fn append(&mut self, name: u64, kind: RecordKind, fact: Fact) -> Step {
        let Some(id) = id_of(name, self.namespace) else { return Ok(()) };
        let payload = match fact {
            Fact::There { version, bytes } => Some(content(name, version, bytes)),
            Fact::Absent => None,
        };
        self.operation += 1;
        self.tell(|| format!("operation {}: record {name} is to be {fact:?}", self.operation));
        match self.world.append(id, kind, payload.as_deref(), self.operation) {
            Ok(()) => {
                self.tally.appends += 1;
                self.model.accepted(name, self.operation, fact);
                self.owners.insert(self.operation, name);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Busy || self.is_excused() => Ok(()),
            Err(error) => Err((SimFailureKind::Refused, format!("nothing is appended: {error:#}"))),
        }
    }

    fn check_one(&mut self) -> Step {
        let name = self.random.random_range(0..OBJECTS + BLOCKS);
        let Some(id) = id_of(name, self.namespace) else { return Ok(()) };
        let seen = self.world.look(id)?;
        self.catch_up()?;
        if self.world.disk().is_off() || (self.is_excused() && matches!(seen, Seen::Nothing)) {
            return Ok(());
        }
        self.count(&seen);
        let judged = self.model.check(name, &seen);
        self.forgive(judged)
    }

    /// Of a drive that lies nothing but bytes is asked.
    fn forgive(&self, judged: Step) -> Step {
        judged.or_else(|(kind, message)| match kind {
            SimFailureKind::LostDurable | SimFailureKind::CameBack if self.is_lied_to => Ok(()),
            _ => Err((kind, message)),
        })
    }

    fn pin(&mut self) -> Step {
        let name = self.random.random_range(0..OBJECTS + BLOCKS);
        let (Some(id), Some(store)) = (id_of(name, self.namespace), self.world.store.clone()) else { return Ok(()) };
        if let (None, Some(location)) = (&self.pinned, store.locate(&id))
            && let Ok(pins) = store.pin(&[location])
        {
            self.pinned = Some(Pinned { _pins: pins, name, location, fact: self.model.sure(name) });
        }
        Ok(())
    }

    /// What was pinned is still there, whatever has happened meanwhile.
    fn unpin(&mut self) -> Step {
        let Some(pinned) = self.pinned.take() else { return Ok(()) };
        let Some(id) = id_of(pinned.name, self.namespace) else { return Ok(()) };
        let Fact::There { version, bytes } = pinned.fact else { return Ok(()) };
        match self.world.read(id, pinned.location)? {
            Ok(found) if found == content(pinned.name, version, bytes) => Ok(()),
            Ok(_) => Err((SimFailureKind::WrongBytes, format!("pinned record {} has wrong bytes", pinned.name))),
            Err(_) if self.is_excused() => Ok(()),
            Err(error) => {
                Err((SimFailureKind::LostDurable, format!("pinned record {} is gone: {error:#}", pinned.name)))
            }
        }
    }

    /// Lets the store come to rest, and takes in what it has reported.
    pub(super) fn catch_up(&mut self) -> Step {
        self.world.settle()?;
        let is_off = self.world.disk().is_off();
        for (operation, result) in self.world.take_ends() {
            let Some(name) = self.owners.remove(&operation) else { continue };
            match result {
                Ok(location) => {
                    self.tally.durable += 1;
                    self.tell(|| format!("durable: record {name}, operation {operation}, {location:?}"));
                    self.model.durable(name, operation, location);
                }
                Err(error) => {
                    self.has_failed |= !is_off;
                    self.tell(|| format!("failed: record {name}, operation {operation}: {error}"));
                    if error.kind() == ErrorKind::Poisoned {
                        self.has_failed_sync = true;
                    }
                    if !is_off {
                        self.model.failed(name, operation);
                    }
                }
            }
        }
        self.note_given_up();
        let poison = self.world.store.as_ref().and_then(|store| store.poisoned());
        match poison {
            Some(error) if !self.is_excused() => {
                Err((SimFailureKind::Refused, format!("the store is poisoned without a cause: {error:#}")))
            }
            poison => {
                self.has_failed_sync |= poison.is_some();
                Ok(())
            }
        }
    }

    /// Regions that the policy chose: those that were taken are over.
    fn note_given_up(&mut self) {
        self.maybe_given_up.extend(self.world.policy.take_chosen());
        let Some(store) = &self.world.store else { return };
        let regions = store.regions();
        // A header that could not be written for sure may be there all the same.
        let is_unsure = self.is_excused();
        for (region, generation) in std::mem::take(&mut self.maybe_given_up) {
            let is_there = regions.get(region as usize).is_some_and(|info| {
                info.generation == generation && matches!(info.state, RegionState::Open | RegionState::Sealed)
            });
            if !is_there || is_unsure {
                self.tell(|| format!("region {region} of generation {generation} is given up"));
                self.model.given_up(region, generation);
            }
        }
    }

    /// Ends a life.
    pub(super) fn end(&mut self, end: End) -> Step {
        if self.world.store.is_none() {
            return Ok(());
        }
        // What a failed sync covered may be gone though programs still see it: a kill alone would hide that.
        let is_poisoned = self.has_failed_sync || self.world.disk().failed_syncs() > self.failed_syncs;
        self.failed_syncs = self.world.disk().failed_syncs();
        match end {
            End::Close if !self.world.disk().is_off() => {
                self.pinned = None;
                let closed = self.world.close();
                self.note_after_end()?;
                match closed {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::Timeout => {
                        return Err((SimFailureKind::Hang, format!("the store does not close: {error:#}")));
                    }
                    Err(_) if self.is_excused() || self.world.disk().is_off() => {
                        self.crash(SimCrash::PowerLoss);
                    }
                    Err(error) => return Err((SimFailureKind::Refused, format!("not closed in order: {error:#}"))),
                }
            }
            End::Kill if !self.world.disk().is_off() && !is_poisoned => self.crash(SimCrash::Kill),
            _ => self.crash(SimCrash::PowerLoss),
        }
        self.note_after_end()
    }

    fn note_after_end(&mut self) -> Step {
        self.world.store = None;
        // Devices are there when a store is opened.
        self.world.disk().bring_back();
        // A region may have been given up in the course of the end.
        self.maybe_given_up.extend(self.world.policy.take_chosen());
        for (region, generation) in std::mem::take(&mut self.maybe_given_up) {
            self.model.given_up(region, generation);
        }
        self.catch_up()
    }

    fn crash(&mut self, how: SimCrash) {
        self.tell(|| format!("crash: {how:?}"));
        self.tally.crashes += 1;
        self.tally.kills += u64::from(how == SimCrash::Kill);
        self.note_totals();
        // The pin goes last: the store would go on.
        self.world.disk().cut_power();
        self.pinned = None;
        self.world.end();
        // What the policy was asked for last may have happened or not.
        self.maybe_given_up.extend(self.world.policy.take_chosen());
        for (region, generation) in std::mem::take(&mut self.maybe_given_up) {
            self.model.given_up(region, generation);
        }
        for (operation, result) in self.world.take_ends() {
            if let (Ok(location), Some(name)) = (result, self.owners.remove(&operation)) {
                self.tally.durable += 1;
                self.model.durable(name, operation, location);
            }
        }
        self.world.restart(&mut self.random, how);
        self.has_failed_sync = false;
    }

    fn note_totals(&mut self) {
        if let Some(store) = &self.world.store {
            let stats = store.stats();
            self.tally.reclaimed += stats.reclaimed_regions;
            self.tally.kept_tombstones += stats.kept_tombstones;
        }
    }

    /// Between two lives the index may be lost, or an older copy of it restored.
    fn damage_index(&mut self) {
        if self.random.random_ratio(1, 8) {
            self.tell(|| "the index is lost".to_owned());
            self.may_be_rebuilt = true;
            self.world.wipe_index();
        } else if self.random.random_ratio(1, 6)
            && let Some(older) = self.older_index.take()
        {
            self.tell(|| "an older index is restored".to_owned());
            self.world.backing.index.restore(&older);
            self.tally.older_indexes += 1;
            (self.has_older_index, self.may_be_rebuilt) = (true, true);
        }
    }

    /// Three more opens: what is there stays, also through an orderly close and a new index.
    fn last_checks(&mut self) -> Step {
        for round in 0..3 {
            self.open(false)?;
            for name in self.model.names() {
                let Some(id) = id_of(name, self.namespace) else { continue };
                let seen = self.world.look(id)?;
                self.count(&seen);
                let judged = self.model.check(name, &seen);
                self.forgive(judged)?;
            }
            self.catch_up()?;
            self.note_totals();
            self.end(End::Close)?;
            if round == 1 {
                self.world.wipe_index();
                self.may_be_rebuilt = true;
            }
        }
        Ok(())
    }
}

fn descriptor(number: u32) -> NamespaceDescriptor {
    NamespaceDescriptor::new().with("model", format!("m{number}"))
}

pub(super) fn id_of(name: u64, namespace: Option<NamespaceHandle>) -> Option<RecordId> {
    let key = BlockKey::from_name(&name.to_le_bytes());
    let is_block = (OBJECTS..OBJECTS + BLOCKS).contains(&name);
    let namespace = if is_block { namespace? } else { NamespaceHandle(0) };
    Some(RecordId { namespace, group: 0, shard: 0, key })
}

fn told(seen: &Seen) -> String {
    match seen {
        Seen::Nothing => "not there".to_owned(),
        Seen::Bytes(location, bytes) => format!("{} bytes at {location:?}", bytes.len()),
    }
}
