//! Cases that chance meets too seldom, each by hand.

use super::super::history::{End, History, Simulator, Step, id_of};
use super::super::model::{Fact, Seen};
use super::super::world::{REGION_BYTES, Rule, SimPolicy, drive_path};
use super::super::{SimFailure, SimFailureKind, SimOptions};
use crate::block::RecordKind;
use crate::index::{IndexChange, Location, RegionMark};
use crate::nvme::backing::Backing;
use crate::nvme::config::DriveConfig;
use crate::nvme::io::{FaultAction, IoKind, SimCrash, SimOperation};
use crate::nvme::page::{put as put_bytes, seal};
use crate::nvme::policy::{RegionInfo, RegionState};

const PAGE_BYTES: u64 = 4096;
const REGIONS: &str = "regions.0";

/// A case.
pub(super) type Scenario = fn(&mut History) -> Step;

/// Runs a case in a store of its own.
pub(super) fn run(simulator: &Simulator, scenario: Scenario) -> Result<(), SimFailure> {
    simulator.guarded(0, |path, arena| {
        let mut history = simulator.with_key(History::new(path, 0, arena, false));
        history.world.config.capacity_bytes = 8 * history.world.config.region_bytes;
        history.open(false)?;
        scenario(&mut history)
    })
}

fn put(history: &mut History, name: u64, version: u64, bytes: usize) -> Step<Location> {
    history.append(name, RecordKind::Object, Fact::There { version, bytes })?;
    flush(history)?;
    let store = history.world.store.as_ref();
    let location = store.zip(id_of(name, None)).and_then(|(store, id)| store.locate(&id));
    location.ok_or_else(|| (SimFailureKind::LostDurable, format!("record {name} is not there")))
}

fn remove(history: &mut History, name: u64) -> Step {
    history.append(name, RecordKind::Tombstone, Fact::Absent)?;
    flush(history)
}

fn flush(history: &mut History) -> Step {
    history.world.flush_soon();
    history.catch_up()?;
    while history.world.disk().step() {
        history.catch_up()?;
    }
    Ok(())
}

/// Closes the store and opens it with a new index.
fn rebuild(history: &mut History) -> Step {
    history.end(End::Close)?;
    history.world.wipe_index();
    history.world.open().map(drop).map_err(|error| (SimFailureKind::Refused, error.to_string()))
}

fn check(history: &History, name: u64) -> Step {
    let Some(id) = id_of(name, None) else { return Ok(()) };
    history.model.check(name, &history.world.look(id)?)
}

fn assert_gone(history: &History, name: u64) -> Step {
    let Some(id) = id_of(name, None) else { return Ok(()) };
    match history.world.look(id)? {
        Seen::Nothing => Ok(()),
        Seen::Bytes(location, _) => {
            Err((SimFailureKind::CameBack, format!("record {name} is there again, at {location:?}")))
        }
    }
}

fn offset_of(history: &History, location: &Location) -> u64 {
    u64::from(location.region) * history.world.config.region_bytes + u64::from(location.page) * PAGE_BYTES
}

fn image(history: &History, location: &Location) -> Vec<u8> {
    let mut image = Vec::new();
    let bytes = location.pages as usize * PAGE_BYTES as usize;
    history.world.change(REGIONS, offset_of(history, location), bytes, |found| image = found.to_vec());
    image
}

/// An index that points to another record: that one is not taken for what was asked for.
pub(super) fn swapped_entries(history: &mut History) -> Step {
    put(history, 1, 1, 9000)?;
    let other = put(history, 2, 2, 9000)?;
    let Some(id) = id_of(1, None) else { return Ok(()) };
    match history.world.read(id, other)? {
        Err(_) => Ok(()),
        Ok(_) => Err((SimFailureKind::WrongBytes, "another record's bytes were returned".to_owned())),
    }
}

/// A write that went to the wrong place: an older version where the newer one should be.
pub(super) fn misdirected_version(history: &mut History) -> Step {
    let old = put(history, 1, 1, 9000)?;
    let new = put(history, 1, 2, 9000)?;
    let bytes = image(history, &old);
    history.world.change(REGIONS, offset_of(history, &new), bytes.len(), |place| place.copy_from_slice(&bytes));
    assert_gone(history, 1)
}

/// Somebody puts an older version in the newer one's place, and makes its header say that it belongs there, checksum and
/// all. Only who has the key can do that so that it is believed.
pub(super) fn forged_header(history: &mut History) -> Step {
    let old = put(history, 1, 1, 9000)?;
    let new = put(history, 1, 2, 9000)?;
    let mut bytes = image(history, &old);
    let page = &mut bytes[..PAGE_BYTES as usize];
    put_bytes(page, 40, &new.region.to_le_bytes());
    put_bytes(page, 44, &new.page.to_le_bytes());
    put_bytes(page, 64, &new.generation.to_le_bytes());
    seal(page);
    history.world.change(REGIONS, offset_of(history, &new), bytes.len(), |place| place.copy_from_slice(&bytes));
    assert_gone(history, 1)
}

/// A decayed object does not uncover the version that it replaced, when the index is lost later.
pub(super) fn quarantined_object(history: &mut History) -> Step {
    put(history, 1, 1, 9000)?;
    let new = put(history, 1, 2, 9000)?;
    history.world.change(REGIONS, offset_of(history, &new), 1, |byte| byte[0] ^= 1);
    assert_gone(history, 1)?;
    history.catch_up()?;
    flush(history)?;
    rebuild(history)?;
    assert_gone(history, 1)
}

/// The index of another store beside our regions.
pub(super) fn foreign_index(history: &mut History) -> Step {
    let empty = history.world.backing.index.copy();
    for name in 0..5 {
        put(history, name, 1, 5000)?;
    }
    history.end(End::Close)?;
    let ours = history.world.store_path();
    let aside = ours.with_extension("aside");
    // Another store on the same machine, with other records; then its index is taken for ours.
    std::fs::rename(&ours, &aside).map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    let model = std::mem::take(&mut history.model);
    history.world.backing.index.restore(&empty);
    history.open(false)?;
    for name in 20..40 {
        put(history, name, 1, 9000)?;
    }
    history.end(End::Close)?;
    history.model = model;
    std::fs::remove_dir_all(&ours)
        .and_then(|()| std::fs::rename(&aside, &ours))
        .map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    history.open(false)?;
    (0..5).try_for_each(|name| check(history, name))
}

/// A rebuild goes past damage: behind it may stand what hides something old.
pub(super) fn damage_before_a_removal(history: &mut History) -> Step {
    put(history, 0, 1, 5000)?;
    put(history, 1, 1, 5000)?;
    let damaged = put(history, 2, 1, 5000)?;
    remove(history, 0)?;
    put(history, 1, 2, 5000)?;
    history.world.change(REGIONS, offset_of(history, &damaged), 1, |byte| byte[0] ^= 1);
    rebuild(history)?;
    assert_gone(history, 0)?;
    check(history, 1)
}

/// A region whose header could not be read once does not come back: what replaced its records meanwhile does not say so.
pub(super) fn unreadable_region(history: &mut History) -> Step {
    for name in 0..4 {
        put(history, name, 1, 40_000)?;
    }
    history.end(End::Close)?;
    // The first read of an open is of the superblock, the second of the first region's header. Which of all operations
    // that is, another open tells.
    let (saved, before) = (history.world.save(), history.world.disk().operations());
    let refused = |error: crate::error::Error| (SimFailureKind::Refused, error.to_string());
    history.world.open().map_err(refused)?;
    history.end(End::Close)?;
    let operations = history.world.disk().history();
    let is_read = |(_, what): &(u64, &SimOperation)| **what == SimOperation::Drive(IoKind::Read);
    let reads = (1..).zip(&operations[before as usize..]).filter(is_read);
    let second = reads.map(|(number, _)| number).nth(1).unwrap_or(0);
    history.world.load(&saved);
    history.world.disk().inject(history.world.disk().operations() + second, FaultAction::Errno(libc::EIO));
    history.world.open().map_err(refused)?;
    assert_gone(history, 0)?;
    rebuild(history)?;
    assert_gone(history, 0)
}

/// A version that comes while the region of the one before it is being given up. That does not succeed; then the region
/// of the newer one goes, and the index is lost.
pub(super) fn replaced_while_reclaimed(history: &mut History) -> Step {
    history.world.policy = SimPolicy::new(Rule::Newest, &history.world.backing.disk);
    history.end(End::Close)?;
    history.open(false)?;
    let old = put(history, 1, 1, 40_000)?;
    for name in 2..8 {
        put(history, name, 1, 40_000)?;
    }
    // The last free region is taken, so the first one is to be given up. Its header is not written.
    history.world.policy.prefer(Some(old.region));
    history.append(8, RecordKind::Object, Fact::There { version: 1, bytes: 40_000 })?;
    history.catch_up()?;
    let is_going = |info: &RegionInfo| info.region == old.region && info.state == RegionState::Reclaiming;
    let regions = history.world.store.as_ref().map(|store| store.regions()).unwrap_or_default();
    if !regions.iter().any(is_going) {
        return Err((SimFailureKind::Refused, format!("region {} is not being given up: {regions:?}", old.region)));
    }
    let headers = [0, 2].map(|page| offset_of(history, &Location { page, ..old }));
    if history.world.disk().fail_pending_writes(headers[0]..headers[1]) == 0 {
        return Err((SimFailureKind::Refused, "the header is not on its way".to_owned()));
    }
    history.world.policy.prefer(None);
    let new = put(history, 1, 2, 5000)?;
    history.world.policy.prefer(Some(new.region));
    for name in 20..40 {
        put(history, name, 1, 40_000)?;
    }
    assert_gone(history, 1)?;
    rebuild(history)?;
    assert_gone(history, 1)
}

/// A store with a second drive, in which a record of the home is about to be removed on that: the record.
fn record_and_a_drive(history: &mut History) -> Step<u64> {
    history.end(End::Close)?;
    let path = drive_path(&history.world.store_path(), 1).with_file_name("besides");
    history.world.config.more_drives = vec![DriveConfig { path, capacity_bytes: 4 * REGION_BYTES }];
    history.open(false)?;
    // Records go to the drives in turn.
    let mut drives = Vec::new();
    for name in 1..=3 {
        let location = put(history, name, 1, 5000)?;
        let regions = history.world.store.as_ref().map(|store| store.regions()).unwrap_or_default();
        drives.push(regions.iter().find(|info| info.region == location.region).map(|info| info.drive));
    }
    if drives[2] == Some(1) {
        put(history, 4, 1, 5000)?;
    }
    Ok((1..).zip(drives).find(|(_, drive)| *drive == Some(0)).map_or(1, |(name, _)| name))
}

/// A record of the home that is removed on another drive. Then the power goes, and with it what the index had not made
/// durable; and the drive.
pub(super) fn removed_on_a_drive_that_goes(history: &mut History) -> Step {
    let name = record_and_a_drive(history)?;
    remove(history, name)?;
    history.world.end();
    history.world.disk().restart(1, SimCrash::PowerLoss);
    history.world.backing.index.lose_power(|_| 0);
    history.world.config.more_drives.clear();
    history.world.open().map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    assert_gone(history, name)
}

/// The drive with a removal went; then a copy of the index comes back that is from before the removal.
pub(super) fn older_index_after_a_drive_went(history: &mut History) -> Step {
    let name = record_and_a_drive(history)?;
    let older = history.world.backing.index.copy();
    remove(history, name)?;
    history.end(End::Close)?;
    history.world.config.more_drives.clear();
    history.world.open().map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    assert_gone(history, name)?;
    history.end(End::Close)?;
    history.world.backing.index.restore(&older);
    // As if it had been made in the last open, before the floor was raised: nothing else tells it apart.
    let path = history.world.store_path().join("index");
    let index = history.world.backing.index(&path).map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    let opens = u64::from(u32::MAX).to_le_bytes();
    index.meta_put("opens", &opens).map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    drop(index);
    history.world.open().map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    assert_gone(history, name)
}

/// A copy of the index says what a power loss has undone since: that the log of a region ends before record 2, whose write
/// had failed though all of it was on the drive. Without it the record was found, and the region was written on.
pub(super) fn index_that_a_power_loss_undid(history: &mut History) -> Step {
    let refused = |error: crate::error::Error| (SimFailureKind::Refused, error.to_string());
    put(history, 1, 1, 5000)?;
    let Location { region, generation, page, .. } = put(history, 2, 1, 5000)?;
    history.end(End::Close)?;
    let left = history.world.backing.index.copy();
    let path = history.world.store_path().join("index");
    let index = history.world.backing.index(&path).map_err(refused)?;
    let id = id_of(2, None).ok_or_else(|| (SimFailureKind::Refused, "record 2 has no name".to_owned()))?;
    let sequence = index.get(&id).map_err(refused)?.map_or(0, |row| row.sequence);
    let mark = RegionMark { region, generation, page, sequence };
    index.commit(&[IndexChange::Remove { id, sequence }], &[mark]).map_err(refused)?;
    drop(index);
    let undone = history.world.backing.index.copy();
    history.world.backing.index.restore(&left);
    history.world.open().map_err(refused)?;
    put(history, 3, 1, 5000)?;
    history.end(End::Close)?;
    history.world.backing.index.restore(&undone);
    history.world.open().map_err(refused)?;
    check(history, 2)?;
    check(history, 3)
}

/// An open can not sync the superblock; the next one reads it all the same, and the power goes. The home is then where it
/// was, and the drives must not be further than one open ahead.
pub(super) fn superblock_that_was_not_synced(history: &mut History) -> Step {
    record_and_a_drive(history)?;
    // Which of the operations of an open that sync is does not matter: each fails once, some times.
    for round in 0..150 {
        history.end(End::Kill)?;
        let disk = std::sync::Arc::clone(&history.world.backing.disk);
        disk.inject(disk.operations() + 1 + round % 30, FaultAction::Errno(libc::EIO));
        if history.world.open().is_err() {
            disk.cut_power_at(disk.operations() + 2);
            drop(history.world.open());
        }
        history.world.end();
        disk.restart(round, SimCrash::PowerLoss);
        history.world.backing.index.lose_power(|batches| batches);
        history.world.open().map_err(|error| (SimFailureKind::Refused, error.to_string()))?;
    }
    Ok(())
}

/// The store takes what it reads for damaged or missing, not the machine.
#[test]
fn each_case_is_survived() {
    let directory = super::directory();
    let simulator = super::simulator(&directory);
    let cases: [Scenario; 11] = [
        swapped_entries,
        misdirected_version,
        quarantined_object,
        foreign_index,
        damage_before_a_removal,
        unreadable_region,
        replaced_while_reclaimed,
        removed_on_a_drive_that_goes,
        older_index_after_a_drive_went,
        index_that_a_power_loss_undid,
        superblock_that_was_not_synced,
    ];
    for case in cases {
        run(&simulator, case).unwrap_or_else(|failure| panic!("{failure}"));
    }
    let options = SimOptions { is_encrypted: true, ..SimOptions::new(directory.path()) };
    let encrypted = Simulator::new(options).expect("memory");
    // The index of another store is taken for ours by its names, which an encrypted one has not.
    for case in cases.into_iter().filter(|case| !std::ptr::fn_addr_eq(*case, index_that_a_power_loss_undid as Scenario))
    {
        run(&encrypted, case).unwrap_or_else(|failure| panic!("encrypted: {failure}"));
    }
    run(&encrypted, forged_header).unwrap_or_else(|failure| panic!("{failure}"));
    let failure = run(&simulator, forged_header).expect_err("a plain store can not tell");
    assert_eq!(failure.kind, SimFailureKind::CameBack, "{failure}");
}
