//! A store whose index is still being filled: lookups, writes, removals and reclaims meanwhile must be as right as later,
//! and when it is full it must be what an open that read everything at once would have made.

use std::collections::HashMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::reclaiming::SecondOldest;
use super::*;
use crate::index::IndexRow;
use crate::nvme::fill::FillPlan;

/// Lets the thread that fills make so many steps; without the sender it runs free.
fn stepwise(rows_at_once: usize) -> (FillPlan, Sender<()>) {
    let (step, steps) = crossbeam_channel::bounded::<()>(0);
    let before_step = Box::new(move || {
        // Without a sender it runs free.
        let _ = steps.recv_timeout(PATIENCE);
    });
    (FillPlan { rows_at_open: rows_at_once, rows_at_once, before_step, ..FillPlan::default() }, step)
}

fn open_filling(place: &Place, plan: FillPlan) -> Arc<Store> {
    let (config, policy) = (place.config.clone(), Arc::clone(&place.policy));
    Store::open_filling(config, &place.arena, policy, |io| io, plan).expect("opens").0
}

fn wait_until_full(store: &Store) {
    let deadline = soon();
    while !store.stats().index.is_full {
        assert!(Instant::now() < deadline, "the index is not full in time: {:?}", store.stats().index);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn seeded() -> StdRng {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// What the table alone must agree in with a table that was filled before anybody wrote.
fn compare_with_full(place: &Place, store: &Store, names: u64) {
    let copy = place.copy();
    let (full, report) = copy.open();
    assert!(report.is_index_full);
    for name in 0..names {
        assert_eq!(store.locate(&object_id(name)), full.locate(&object_id(name)), "object {name}");
    }
    let counted = |store: &Store| {
        let regions = store.regions().into_iter().filter(|info| info.state != RegionState::Free);
        regions.map(|info| (info.region, info.generation, info.records, info.live_bytes)).collect::<Vec<_>>()
    };
    assert_eq!(counted(store), counted(&full));
}

#[test]
fn everything_is_found_from_the_first_moment_on() {
    let place = Place::new(IoChoice::Psync, 40);
    let (store, _) = place.open();
    put(&place, &store, (0..500).map(|name| (name, 1, 3000)));
    close(store);
    let (plan, step) = stepwise(10);
    let store = open_filling(&place, plan);
    assert_eq!((store.stats().records, store.stats().index.is_full, store.stats().index.rows), (10, false, 10));
    assert_eq!(store.stats().index.rows_total, 500);
    for name in 0..200 {
        assert_object(&place, &store, name, 1, 3000);
    }
    let ids: Vec<RecordId> = (0..600).map(object_id).collect();
    let mut found = Vec::new();
    for _ in 0..3 {
        store.locate_prefix(&ids, &mut found);
        assert_eq!(found.len(), 500);
        store.locate_prefix(&ids[100..], &mut found);
        assert_eq!(found.len(), 400);
        store.locate_prefix(&ids[500..], &mut found);
        assert_eq!(found, []);
        step.send(()).expect("the thread waits");
    }
    for (id, location) in ids.iter().zip(&found) {
        assert_eq!(store.locate(id), Some(*location));
    }
    drop(step);
    wait_until_full(&store);
    let fill = store.stats().index;
    assert_eq!((fill.rows, fill.rows_total, fill.has_failed, store.stats().records), (500, 500, false, 500));
    compare_with_full(&place, &store, 600);
    close(store);
}

/// A store is closed, dropped and opened again while it is filled; a verification waits for the end.
#[test]
fn it_can_be_closed_at_any_time() {
    let place = Place::new(IoChoice::Psync, 40);
    let (store, _) = place.open();
    put(&place, &store, (0..300).map(|name| (name, 1, 3000)));
    close(store);
    for steps in 0..4 {
        let (plan, step) = stepwise(20);
        let store = open_filling(&place, plan);
        (0..steps).for_each(|_| step.send(()).expect("the thread waits"));
        put(&place, &store, [(1000 + steps, 1, 3000)]);
        drop(step);
        if steps % 2 == 0 { close(store) } else { drop(store) }
    }
    let (plan, step) = stepwise(20);
    let store = open_filling(&place, plan);
    drop(step);
    let report = store.verify(&mut drop).expect("verified");
    assert_eq!((report.records, report.corrupt), (304, 0));
    assert!(store.stats().index.is_full);
}

/// Puts, removals and lookups in any order between the steps.
#[test]
fn what_is_written_meanwhile_wins() {
    let mut rng = seeded();
    for _ in 0..6 {
        let place = Place::new(IoChoice::Psync, 60);
        let mut model: HashMap<u64, u64> = (0..200).map(|name| (name, 0)).collect();
        let (store, _) = place.open();
        put(&place, &store, model.keys().map(|name| (*name, 0, 3000)));
        close(store);
        let (plan, step) = stepwise(rng.random_range(1..20));
        let store = open_filling(&place, plan);
        for version in 1..30 {
            let mut names: Vec<u64> = (0..rng.random_range(1..8)).map(|_| rng.random_range(0..220)).collect();
            names.sort_unstable();
            names.dedup();
            if rng.random_bool(0.5) {
                put(&place, &store, names.iter().map(|name| (*name, version, 3000)));
                model.extend(names.iter().map(|name| (*name, version)));
            } else {
                remove(&store, names.iter().copied());
                model.retain(|name, _| !names.contains(name));
            }
            if rng.random_bool(0.7) && !store.stats().index.is_full {
                // The thread may have ended since.
                let _ = step.send_timeout((), Duration::from_millis(100));
            }
            for name in (0..10).map(|_| rng.random_range(0..220)) {
                match model.get(&name) {
                    Some(version) => assert_object(&place, &store, name, *version, 3000),
                    None => assert_eq!(store.locate(&object_id(name)), None, "object {name} came back"),
                }
            }
        }
        drop(step);
        wait_until_full(&store);
        assert_eq!(store.stats().records, model.len() as u64);
        compare_with_full(&place, &store, 220);
        for (name, version) in &model {
            assert_object(&place, &store, *name, *version, 3000);
        }
        close(store);
        // Of what was replaced meanwhile nothing older may come back either, whatever region goes.
        place.wipe_index();
        let (store, _) = place.open();
        for name in 0..220 {
            match model.get(&name) {
                Some(version) => assert_object(&place, &store, name, *version, 3000),
                None => assert_eq!(store.locate(&object_id(name)), None, "object {name} came back"),
            }
        }
    }
}

/// Rows that the thread holds in its hand, read and not yet in the table, while the same records are written and removed.
static DAWDLE_MICROS: AtomicU64 = AtomicU64::new(0);

fn dawdle(_: &IndexRow) {
    std::thread::sleep(Duration::from_micros(DAWDLE_MICROS.load(Ordering::Relaxed)));
}

#[test]
fn a_row_in_the_hand_is_never_put_down_over_a_newer_one() {
    let mut rng = seeded();
    DAWDLE_MICROS.store(300, Ordering::Relaxed);
    for _ in 0..4 {
        let place = Place::new(IoChoice::Psync, 60);
        let (store, _) = place.open();
        put(&place, &store, (0..300).map(|name| (name, 0, 3000)));
        close(store);
        let start = Arc::new(Barrier::new(2));
        let (at_start, has_begun) = (Arc::clone(&start), std::sync::Once::new());
        let before_step = Box::new(move || {
            has_begun.call_once(|| {
                at_start.wait();
            })
        });
        let plan = FillPlan { rows_at_open: 1, rows_at_once: 16, before_step, on_row: dawdle };
        let store = open_filling(&place, plan);
        start.wait();
        let mut model: HashMap<u64, u64> = (0..300).map(|name| (name, 0)).collect();
        let mut version = 0;
        while !store.stats().index.is_full {
            version += 1;
            let names: Vec<u64> = (0..40).map(|_| rng.random_range(0..300)).collect();
            let (removed, replaced) = names.split_at(20);
            put(&place, &store, replaced.iter().map(|name| (*name, version, 3000)));
            model.extend(replaced.iter().map(|name| (*name, version)));
            remove(&store, removed.iter().copied());
            model.retain(|name, _| !removed.contains(name));
        }
        assert!(version > 1, "the index was full before anything was written");
        compare_with_full(&place, &store, 300);
        for name in 0..300 {
            match model.get(&name) {
                Some(version) => assert_object(&place, &store, name, *version, 3000),
                None => assert_eq!(store.locate(&object_id(name)), None, "object {name} came back"),
            }
        }
    }
}

/// Regions are given up and used again between the steps: nothing of their earlier lives is found.
#[test]
fn regions_may_be_given_up_meanwhile() {
    let mut rng = seeded();
    for _ in 0..4 {
        let place = Place::new(IoChoice::Psync, 8);
        let (store, _) = place.open();
        let mut latest: HashMap<u64, u64> = HashMap::new();
        for name in 0..250 {
            put(&place, &store, [(name, 0, 5000)]);
            latest.insert(name, 0);
        }
        close(store);
        let (plan, step) = stepwise(8);
        let store = open_filling(&place, plan);
        for version in 1..40 {
            let names: Vec<u64> = (0..10).map(|at| (version * 10 + at) * 7 % 250).collect();
            put(&place, &store, names.iter().map(|name| (*name, version, 5000)));
            latest.extend(names.iter().map(|name| (*name, version)));
            if rng.random_bool(0.6) && !store.stats().index.is_full {
                let _ = step.send_timeout((), Duration::from_millis(100));
            }
            for (name, version) in &latest {
                if let Some(bytes) = get(&place, &store, *name) {
                    assert!(bytes == content(*name, *version, 5000), "object {name} is not the latest");
                }
            }
        }
        assert!(store.stats().reclaimed_regions > 0);
        drop(step);
        wait_until_full(&store);
        assert_eq!(store.stats().bad_reads, 0);
        // The last marks and removals are committed with what comes next.
        put(&place, &store, [(999, 1, 100)]);
        compare_with_full(&place, &store, 250);
    }
}

/// Whoever replaces a record that the table does not have yet must know that it does: when its region goes, the old
/// version, which was kept, must not come back.
#[test]
fn what_is_replaced_meanwhile_is_known_to_be_replaced() {
    let place = Place::with_policy(IoChoice::Psync, 5, Arc::new(SecondOldest));
    let (store, _) = place.open();
    put(&place, &store, (0..6).map(|name| (name, 1, 100)));
    let old = store.locate(&object_id(1)).expect("there").region;
    put(&place, &store, (10..17).map(|name| (name, 1, 30_000)));
    close(store);
    let (plan, step) = stepwise(1);
    let store = open_filling(&place, plan);
    put(&place, &store, (0..6).map(|name| (name, 2, 100)));
    for name in 100..160 {
        put(&place, &store, [(name, 1, 30_000)]);
    }
    assert!(store.regions()[old as usize].state == RegionState::Sealed, "the old versions are still there");
    drop(step);
    close(store);
    place.wipe_index();
    let (store, _) = place.open();
    for name in 0..6 {
        assert_eq!(get(&place, &store, name), None, "an old version of object {name} came back");
    }
}

/// A row that cannot be read ends the filling, not the store: what can be read is found, and the next open starts anew.
#[test]
fn a_damaged_row_is_healed_by_the_next_open() {
    let place = Place::new(IoChoice::Psync, 40);
    let (store, _) = place.open();
    put(&place, &store, (0..100).map(|name| (name, 1, 3000)));
    close(store);
    let victim = object_id(70);
    crate::index::spoil_row(&place.store_path().join("index"), &victim);
    let (plan, step) = stepwise(1);
    let store = open_filling(&place, plan);
    drop(step);
    let deadline = soon();
    while !store.stats().index.has_failed {
        assert!(Instant::now() < deadline, "{:?}", store.stats().index);
        std::thread::sleep(Duration::from_millis(1));
    }
    for name in (0..100).filter(|name| *name != 70) {
        assert_object(&place, &store, name, 1, 3000);
    }
    assert_eq!(store.locate(&victim), None);
    put(&place, &store, [(200, 1, 3000)]);
    close(store);
    // The damage lies beyond what this open reads itself.
    let plan = FillPlan { rows_at_open: 1, ..FillPlan::default() };
    let (config, policy) = (place.config.clone(), Arc::clone(&place.policy));
    let (store, report) = Store::open_filling(config, &place.arena, policy, |io| io, plan).expect("opens");
    assert!(report.index_rebuilt && report.is_index_full);
    for name in (0..100).chain([200]) {
        assert_object(&place, &store, name, 1, 3000);
    }
    close(store);
    // Among the first rows it is noticed by the open itself.
    crate::index::spoil_row(&place.store_path().join("index"), &victim);
    let (store, report) = place.open();
    assert!(report.index_rebuilt && report.is_index_full);
    assert_object(&place, &store, 70, 1, 3000);
}
