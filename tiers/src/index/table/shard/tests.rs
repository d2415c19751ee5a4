use super::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Every entry is reachable from its home without crossing a vacant one, there is a vacant one, and `len` is right.
fn check(shard: &Shard) {
    let occupied = shard.entries.iter().filter(|entry| !entry.is_vacant()).count();
    assert_eq!(occupied, shard.len());
    assert!(shard.entries.is_empty() || occupied < shard.entries.len(), "no vacant entry is left");
    for (slot, entry) in shard.entries.iter().enumerate().filter(|(_, entry)| !entry.is_vacant()) {
        match shard.probe(entry.fingerprint, spread(entry.fingerprint)) {
            Probe::Found(found) => assert_eq!(found, slot, "an entry stands twice"),
            _ => panic!("the entry at {slot} of {} is out of reach", shard.entries.len()),
        }
    }
}

fn entry(fingerprint: u64) -> Entry {
    Entry::new(fingerprint, 0, &Location { region: 0, generation: 1, page: 1, pages: 1 })
}

fn remove(shard: &mut Shard, fingerprint: u64) -> bool {
    shard.remove_if(fingerprint, spread(fingerprint), |_| true)
}

/// Fingerprints whose homes are neighbours: they make one cluster, which wraps around the end for the last part.
fn of_one_part(part: u64, count: usize) -> Vec<u64> {
    (1u64..).filter(|&fingerprint| spread(fingerprint) >> 48 & 0xff == part).take(count).collect()
}

#[test]
fn a_cluster_that_wraps_around_the_end_survives_every_removal() {
    for part in [0, 127, 255] {
        let fingerprints = of_one_part(part, 60);
        for &victim in &fingerprints {
            let mut shard = Shard::default();
            for &fingerprint in &fingerprints {
                assert!(shard.insert(entry(fingerprint)).is_none());
            }
            assert!(remove(&mut shard, victim));
            check(&shard);
            assert!(!remove(&mut shard, victim));
        }
    }
}

#[test]
fn it_stays_sound_at_every_size_up_and_down() {
    let mut shard = Shard::default();
    let fingerprints: Vec<u64> = (1..600).collect();
    for &fingerprint in &fingerprints {
        shard.insert(entry(fingerprint));
        check(&shard);
    }
    for &fingerprint in &fingerprints {
        assert!(remove(&mut shard, fingerprint));
        check(&shard);
    }
    assert_eq!((shard.len(), shard.memory_bytes()), (0, 0));
}

#[test]
fn random_churn_stays_sound() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut shard = Shard::default();
    for round in 0..20_000 {
        let fingerprint = random.random_range(1..200);
        if random.random_bool(0.5) {
            shard.insert(entry(fingerprint));
        } else {
            remove(&mut shard, fingerprint);
        }
        if round % 16 == 0 {
            check(&shard);
        }
    }
}

#[test]
fn sizes_hold_their_entries_and_do_not_resize_back_and_forth() {
    for len in 1..100_000 {
        let capacity = capacity_for(len);
        assert!(fits(len, capacity) && capacity > len, "{len} do not fit into {capacity}");
        assert!(!is_sparse(len, capacity), "{capacity} entries for {len} would be resized at once");
        // Below that a resize costs next to nothing.
        if len > DENSE_CAPACITY {
            assert!(!is_sparse(len - len / 16, capacity), "a removal of a sixteenth of {len} resizes");
            assert!(fits(len + len / 16, capacity), "a sixteenth more than {len} resizes");
        }
    }
}

#[test]
fn spreading_uses_every_bit() {
    for base in [0u64, 1, 0x0123_4567_89ab_cdef, u64::MAX] {
        for bit in 0..64 {
            let changed = (spread(base) ^ spread(base ^ (1 << bit))).count_ones();
            assert!(changed > 8, "bit {bit} of {base:#x} changes {changed} bits");
        }
    }
}
