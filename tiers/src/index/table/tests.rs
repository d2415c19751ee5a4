use super::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

fn location(number: u32) -> Location {
    Location { region: number % 1000, generation: u64::from(number % 7), page: number, pages: number % 300 + 1 }
}

fn seeded() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

fn prefix_of(table: &Table, fingerprints: &[u64]) -> Vec<Location> {
    let mut out = vec![location(0); 3];
    table.prefix(fingerprints.iter().copied(), &mut out);
    out
}

/// Compares every operation with a `HashMap`, over `keys`, with the given chance of a removal.
fn compare_with_model(random: &mut StdRng, keys: &[u64], rounds: u32, removals: f64) {
    let table = Table::new();
    let mut model: HashMap<u64, Location> = HashMap::new();
    for round in 0..rounds {
        let key = keys[random.random_range(0..keys.len())];
        if random.random_bool(removals) {
            let known = model.get(&key).copied();
            let wrong = location(round + 1);
            assert!(!table.remove_if(key, &wrong) || known == Some(wrong));
            assert_eq!(known.is_some_and(|at| table.remove_if(key, &at)), known.is_some());
            model.remove(&key);
        } else {
            let at = location(round);
            assert_eq!(table.insert(key, round, at), model.insert(key, at));
            assert_eq!(table.parent(key), Some(round));
        }
        let asked = keys[random.random_range(0..keys.len())];
        assert_eq!(table.get(asked), model.get(&asked).copied());
        if round % 4096 == 0 {
            let region = random.random_range(0..1000);
            let before = model.len();
            model.retain(|_, at| at.region > region / 2);
            assert_eq!(table.retain(|at| at.region > region / 2), before - model.len());
            assert_eq!(table.len(), model.len());
        }
        if round % 512 == 0 {
            let start = random.random_range(0..keys.len());
            let expected: Vec<Location> = keys[start..].iter().map_while(|key| model.get(key).copied()).collect();
            assert_eq!(prefix_of(&table, &keys[start..]), expected);
        }
    }
    for key in keys {
        assert_eq!(table.get(*key), model.get(key).copied());
    }
    assert_eq!(table.len(), model.len());
}

#[test]
fn it_does_what_a_hash_map_does() {
    let mut random = seeded();
    let keys: Vec<u64> = (0..5000).map(|_| random.random_range(1..=u64::MAX)).collect();
    compare_with_model(&mut random, &keys, 60_000, 0.3);
}

#[test]
fn it_does_what_a_hash_map_does_when_most_is_removed() {
    let mut random = seeded();
    let keys: Vec<u64> = (0..2000).map(|_| random.random_range(1..=u64::MAX)).collect();
    compare_with_model(&mut random, &keys, 60_000, 0.6);
}

#[test]
fn fingerprints_with_common_bits_are_told_apart() {
    let mut random = seeded();
    for shift in [0, 8, 16, 32, 48] {
        let keys: Vec<u64> = (1..2000u64).map(|n| (n << shift) | u64::from(shift > 0)).collect();
        compare_with_model(&mut random, &keys, 8000, 0.4);
    }
}

#[test]
fn a_prefix_ends_at_the_first_unknown_key() {
    let table = Table::new();
    let keys: Vec<u64> = (1..=3000).collect();
    for (number, &key) in (0..).zip(&keys) {
        table.insert(key, 0, location(number));
    }
    assert_eq!(prefix_of(&table, &[]), []);
    assert_eq!(prefix_of(&table, &keys), (0..3000).map(location).collect::<Vec<_>>());
    for missing in [0usize, 1, 15, 16, 17, 79, 80, 335, 336, 847, 848, 1360, 2999] {
        assert!(table.remove_if(keys[missing], &location(missing as u32)));
        assert_eq!(prefix_of(&table, &keys).len(), missing);
        table.insert(keys[missing], 0, location(missing as u32));
    }
    let twice = [keys[5], keys[5], keys[6]];
    assert_eq!(prefix_of(&table, &twice), [location(5), location(5), location(6)]);
}

#[test]
fn what_cannot_be_kept_is_a_miss() {
    let table = Table::new();
    assert_eq!(table.insert(0, 0, location(1)), None);
    assert_eq!(table.insert(7, 0, Location { region: Location::REGIONS_MAX, ..location(1) }), None);
    assert_eq!((table.len(), table.get(0), table.get(7)), (0, None, None));
    for key in 8..2000 {
        table.insert(key, 0, location(1));
    }
    assert_eq!(table.get(0), None);
    assert!(!table.remove_if(0, &location(0)));
    assert!(!table.remove_if(8, &Location { page: Location::PAGES_MAX, ..location(1) }));
}

/// The promise of the whole engine: at most 48 bytes a key, at every size, growing and shrinking.
#[test]
fn memory_stays_within_48_bytes_a_key_at_every_size() {
    let mut random = seeded();
    let mut keys: Vec<u64> = (0..1_000_000).map(|_| random.random_range(1..=u64::MAX)).collect();
    let table = Table::new();
    let mut most = (0.0, 0);
    let mut measure = |table: &Table| {
        let per_key = table.memory_bytes() as f64 / table.len() as f64;
        if per_key > most.0 {
            most = (per_key, table.len());
        }
        assert!(per_key <= 48.0, "{per_key:.1} bytes a key at {} keys", table.len());
    };
    let mut next = 1000;
    for (count, &key) in (1..).zip(&keys) {
        table.insert(key, 0, location(count % 4_000_000));
        if count >= next {
            measure(&table);
            next += next / 64;
        }
    }
    keys.shuffle(&mut random);
    for (removed, &key) in (1..).zip(&keys) {
        let at = table.get(key).expect("inserted above");
        assert!(table.remove_if(key, &at));
        let left = keys.len() as u32 - removed;
        if left >= 1000 && left <= next {
            measure(&table);
            next -= next / 64;
        }
    }
    println!("at most {:.1} bytes a key, at {} keys", most.0, most.1);
    assert!(table.is_empty());
}

/// Readers must see each of two keys that are always there, whatever happens around them, and never a location that
/// nobody wrote.
#[test]
fn readers_and_writers_do_not_disturb_each_other() {
    let table = Table::new();
    let stable: Vec<u64> = (1..=1500u64).map(|n| n * 2).collect();
    for &key in &stable {
        table.insert(key, 0, location(key as u32));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let expected: Vec<Location> = stable.iter().map(|&key| location(key as u32)).collect();
                    let mut lookups = 0;
                    while !stop.load(Ordering::Relaxed) || lookups == 0 {
                        assert_eq!(prefix_of(&table, &stable), expected);
                        lookups += 1;
                    }
                })
            })
            .collect();
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                scope.spawn({
                    let table = &table;
                    move || {
                        let mine = |n: u64| (n * 2 + writer) * 2 + 1;
                        for _ in 0..4 {
                            for n in 0..4000 {
                                table.insert(mine(n), 0, location(n as u32));
                            }
                            for n in 0..4000 {
                                assert_eq!(table.get(mine(n)), Some(location(n as u32)));
                                assert!(table.remove_if(mine(n), &location(n as u32)));
                            }
                        }
                        assert_eq!(table.retain(|_| true), 0);
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().expect("a writer's checks hold");
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader's checks hold");
        }
    });
    assert_eq!(table.len(), stable.len());
}

#[test]
fn uses_stay_with_a_record_wherever_it_goes_and_a_region_lists_what_lies_in_it() {
    let table = Table::new();
    let at = |region, generation, page| Location { region, generation, page, pages: 2 };
    for key in 1..=5000u64 {
        table.insert(key, key as u32 / 2, at((key % 7) as u32, 0x1_0003, 10 + key as u32));
    }
    table.insert(9000, 0, at(3, 0x1_0004, 2));
    assert_eq!(table.note_use(10, 4).map(|entry| entry.location), Some(at(3, 3, 20)));
    table.note_use(10, 6);
    assert_eq!(table.note_use(9999, 4), None);
    let here = table.in_region(3, 0x5_0003);
    assert!(here.is_sorted_by_key(|entry| entry.location.page));
    let keys: Vec<u64> = here.iter().map(|entry| entry.fingerprint).collect();
    assert_eq!(keys, (1..=5000).filter(|key| key % 7 == 3).collect::<Vec<u64>>());
    let used = here.iter().find(|entry| entry.fingerprint == 10).expect("there");
    assert_eq!((used.parent, used.uses.count(), used.uses.idle_epochs(8)), (5, 2, 2));
    table.insert(10, 5, at(4, 0x1_0007, 9));
    table.age_uses(10);
    let moved = table.in_region(4, 7);
    assert_eq!((moved.len(), moved[0].fingerprint, moved[0].uses.count()), (1, 10, 1));
    assert_eq!(table.in_region(3, 3).len(), keys.len() - 1);
}
