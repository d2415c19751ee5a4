//! Regions are given up and used again: the bound holds, readers are safe, and nothing removed or replaced comes back.

use std::collections::HashMap;

use rand::Rng;

use super::*;

on_engines_and_drives!(under_pressure_the_bound_holds_and_bytes_are_right, nothing_old_comes_back_whatever_goes);

fn under_pressure_the_bound_holds_and_bytes_are_right(io: IoChoice) {
    let place = Place::with_policy(io, 8, Arc::new(LeastRecent));
    let (store, _) = place.open();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rng = SmallRng::seed_from_u64(7);
            let mut hits = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let name = rng.random_range(0..600);
                if let Some(bytes) = get(&place, &store, name) {
                    assert!(bytes == content(name, 1, bytes.len()), "object {name} has wrong bytes");
                    hits += 1;
                }
            }
            hits
        });
        for round in 0..6 {
            put(&place, &store, (0..100).map(|i| (round * 100 + i, 1, 1000 + (i * 331 % 30_000) as usize)));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reader.join().expect("no wrong byte") > 0);
    });
    let stats = store.stats();
    assert!(stats.reclaimed_regions > 20 && stats.bad_reads == 0 && stats.failed_appends == 0, "{stats:?}");
    let deadline = soon();
    while store.stats().free_regions == 0 {
        assert!(Instant::now() < deadline, "a spare region is kept");
        std::thread::sleep(Duration::from_millis(1));
    }
    let length = |path: &Path| std::fs::metadata(path.join("regions.0")).expect("there").len();
    assert_eq!(place.config.drives().map(|(path, _)| length(path)).sum::<u64>(), 8 * REGION_BYTES);
    let there: Vec<u64> = (0..600).filter(|name| store.locate(&object_id(*name)).is_some()).collect();
    assert!(!there.is_empty());
    let crashed = place.copy();
    let wiped = place.copy();
    wiped.wipe_index();
    close(store);
    for place in [&crashed, &wiped, &place] {
        let (store, report) = place.open();
        assert_eq!(report.records, there.len() as u64);
        for name in &there {
            assert_object(place, &store, *name, 1, 1000 + (name % 100 * 331 % 30_000) as usize);
        }
        // And on it goes.
        put(place, &store, (0..60).map(|name| (10_000 + name, 1, 20_000)));
        assert_object(place, &store, 10_059, 1, 20_000);
    }
}

/// Whatever a policy gives up, in every order: a version that was replaced or removed never comes back, not even when
/// the index is lost. The policies that keep old regions are the hard ones.
fn nothing_old_comes_back_whatever_goes(io: IoChoice) {
    struct Random(parking_lot::Mutex<SmallRng>);
    impl ReclaimPolicy for Random {
        fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
            let chosen = self.0.lock().random_range(0..candidates.len().max(1));
            candidates.get(chosen).map(|info| info.region)
        }
    }
    let seed: u64 = rand::random();
    println!("seed {seed}");
    /// The same, and what was used is written again: copies of all ages among the originals.
    struct Keeping<P>(P);
    impl<P: ReclaimPolicy> ReclaimPolicy for Keeping<P> {
        fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
            self.0.victim(candidates)
        }
        fn may_keep(&self, region: &RegionInfo) -> bool {
            region.used_records > 0
        }
        fn keep(&self, records: &[RecordInfo], _budget_bytes: u64) -> Vec<usize> {
            (0..records.len()).rev().collect()
        }
    }
    let random = || Random(parking_lot::Mutex::new(SmallRng::seed_from_u64(seed)));
    let policies: [Arc<dyn ReclaimPolicy>; 5] = [
        Arc::new(Newest),
        Arc::new(random()),
        Arc::new(Oldest),
        Arc::new(Keeping(random())),
        Arc::new(Keeping(Oldest)),
    ];
    for policy in policies {
        let mut rng = SmallRng::seed_from_u64(seed);
        let place = Place::with_policy(io, 6, policy);
        // The newest version of each name, and when it is none.
        let mut newest: HashMap<u64, Option<u64>> = HashMap::new();
        let (mut kept, mut copied) = (0, 0);
        for round in 0..2u64 {
            let (store, _) = place.open();
            for version in round * 100..round * 100 + 25 {
                let names: std::collections::BTreeSet<u64> = (0..6).map(|_| rng.random_range(0..40)).collect();
                put(&place, &store, names.iter().map(|name| (*name, version, 1 + rng.random_range(0..25_000))));
                newest.extend(names.into_iter().map(|name| (name, Some(version))));
                let gone: std::collections::BTreeSet<u64> = (0..2).map(|_| rng.random_range(0..40)).collect();
                remove(&store, gone.iter().copied());
                newest.extend(gone.into_iter().map(|name| (name, None)));
                assert_only_newest(&place, &store, &newest);
            }
            assert!(store.stats().reclaimed_regions > 3, "{:?}", store.stats());
            kept += store.stats().kept_tombstones;
            copied += store.stats().reinserted_records;
            let wiped = place.copy();
            wiped.wipe_index();
            assert_only_newest(&wiped, &wiped.open().0, &newest);
            close(store);
        }
        println!("{kept} tombstones were kept, {copied} records written again");
    }
}

fn assert_only_newest(place: &Place, store: &Store, newest: &HashMap<u64, Option<u64>>) {
    for (&name, version) in newest {
        if let Some(bytes) = get(place, store, name) {
            let version = version.unwrap_or_else(|| panic!("object {name} was removed and came back"));
            assert!(bytes == content(name, version, bytes.len()), "an old version of object {name} came back");
        }
    }
}

/// Keeps the oldest region for ever and gives up the next one.
pub(super) struct SecondOldest;

impl ReclaimPolicy for SecondOldest {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        let mut sorted: Vec<&RegionInfo> = candidates.iter().collect();
        sorted.sort_by_key(|info| info.first_sequence);
        sorted.get(1).map(|info| info.region)
    }
}

/// The case by hand: removals go through many regions, and are written again each time one of those goes.
#[test]
fn a_tombstone_outlives_its_region_as_long_as_it_hides_something() {
    let place = Place::with_policy(IoChoice::Psync, 5, Arc::new(SecondOldest));
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, 100), (2, 1, 100)]);
    let old = store.locate(&object_id(1)).expect("there").region;
    put(&place, &store, (10..17).map(|name| (name, 1, 30_000)));
    remove(&store, [1]);
    put(&place, &store, [(2, 2, 100)]);
    close(store);
    let (store, _) = place.open();
    for name in 100..160 {
        put(&place, &store, [(name, 1, 30_000)]);
    }
    let stats = store.stats();
    assert!(stats.kept_tombstones >= 4, "{stats:?}");
    assert!(store.regions()[old as usize].state == RegionState::Sealed, "the old versions are still there");
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    assert_eq!((get(&place, &store, 1), get(&place, &store, 2)), (None, None));
}

#[test]
fn pins_keep_regions_and_appends_fail_when_all_are_pinned() {
    let place = Place::new(IoChoice::Auto, 4);
    let (store, _) = place.open();
    let mut pins = Vec::new();
    let mut locations = Vec::new();
    // Six fit in a region: three regions are full, the fourth is open.
    for name in 0..20 {
        put(&place, &store, [(name, 1, 30_000)]);
        locations.push(store.locate(&object_id(name)).expect("there"));
        pins.push(store.pin(&locations[locations.len() - 1..]).expect("pinned"));
    }
    let mut ends = Ends::new();
    for name in 100..110 {
        append(&store, object(&place, name, 1, 30_000, ends.done(name)));
    }
    let ends = ends.wait();
    let failed =
        ends.iter().filter(|(_, end)| end.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy)).count();
    assert_eq!((failed, store.stats().starved_appends), (6, 6));
    for (name, location) in (0..20).zip(&locations) {
        assert!(read_at(&place, &store, object_id(name), *location).expect("pinned") == content(name, 1, 30_000));
    }
    drop(pins);
    put(&place, &store, (200..230).map(|name| (name, 1, 30_000)));
    assert!(store.stats().reclaimed_regions > 0);
    assert_object(&place, &store, 229, 1, 30_000);
    let stale = store.pin(&locations).map(drop).map_err(|error| error.kind());
    assert_eq!(stale, Err(ErrorKind::NotFound));
    close(store);
}

/// Records wait for pins to go, for a while.
#[test]
fn an_append_goes_on_when_a_pin_goes() {
    let place = Place::new(IoChoice::Auto, 4);
    let (store, _) = place.open();
    let mut pins = Vec::new();
    for name in 0..24 {
        put(&place, &store, [(name, 1, 30_000)]);
        pins.push(store.pin(&[store.locate(&object_id(name)).expect("there")]).expect("pinned"));
    }
    let mut ends = Ends::new();
    append(&store, object(&place, 100, 1, 30_000, ends.done(100)));
    drop(pins);
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    assert_object(&place, &store, 100, 1, 30_000);
}

/// Regions are sealed faster than their records become durable: none may go before.
#[test]
fn a_region_is_not_given_up_before_its_records_are_durable() {
    let mut place = Place::new(IoChoice::Psync, 4);
    (place.config.commit_interval, place.config.commit_bytes) = (Duration::from_secs(3600), 1 << 30);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    let mut ends = Ends::new();
    // A write of the first region is held back until the store has no other region to write to.
    let first = drive.seen(IoKind::Write) + 5;
    drive.inject(Fault { kind: IoKind::Write, first, times: 1, action: FaultAction::Hold });
    for name in 0..30 {
        // When it is durable it is also there: its region can not have gone before.
        let (done, handle) = (ends.done(name), Arc::clone(&store));
        let checked: AppendDone = Box::new(move |end| {
            done(end.and_then(|location| handle.pin(&[location]).map(|_| location)));
        });
        append(&store, object(&place, name, 1, 30_000, checked));
    }
    while store.regions().iter().any(|info| info.state == RegionState::Free) {
        std::thread::yield_now();
    }
    assert_eq!(store.stats().reclaimed_regions, 0);
    drive.release();
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, end)| end.is_ok()));
    assert!(store.stats().reclaimed_regions > 0);
    for name in 20..30 {
        assert_object(&place, &store, name, 1, 30_000);
    }
}

/// A policy that refuses, or names a region that may not go, does not stop the store for ever.
#[test]
fn a_policy_that_gives_nothing_up_makes_appends_fail() {
    struct Miser;
    impl ReclaimPolicy for Miser {
        fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
            candidates.first().map(|info| info.region + 1000)
        }
    }
    let place = Place::with_policy(IoChoice::Psync, 4, Arc::new(Miser));
    let (store, _) = place.open();
    let mut ends = Ends::new();
    for name in 0..40 {
        append(&store, object(&place, name, 1, 30_000, ends.done(name)));
    }
    let ends = ends.wait();
    assert_eq!(ends.iter().filter(|(_, end)| end.is_ok()).count(), 4 * 6);
    for (name, end) in ends {
        if end.is_ok() {
            assert_object(&place, &store, name, 1, 30_000);
        }
    }
    close(store);
}
