//! Blocks that are encoded on their way to the drive: they come back byte for byte, in their order with everything else,
//! and whatever is wrong with one is a miss.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::codec::{CodecChoice, CodecHint};
use crate::nvme::page::{PAGE_BYTES, seal};

const BLOCK_BYTES: usize = 64 << 10;

/// Numbers with few exponents: bfloat16 between -2 and 2.
fn floats(name: u64) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(name);
    let mut number = || {
        let bits = random.next_u32();
        let exponent = 127 - ((bits >> 16) | 1 << 12).trailing_zeros() as u16;
        bits as u16 & 0x807f | exponent << 7
    };
    (0..BLOCK_BYTES / 2).flat_map(|_| number().to_le_bytes()).collect()
}

/// Any bytes: they do not shrink.
fn noise(name: u64) -> Vec<u8> {
    content(name, 7, BLOCK_BYTES)
}

fn namespace(store: &Store, dtype: &str) -> NamespaceHandle {
    let descriptor = NamespaceDescriptor::new().with("model", "encoded").with(CodecHint::FIELD, dtype);
    let groups = [GroupGeometry { group: 0, block_bytes: BLOCK_BYTES as u64, shards: 1 }];
    store.namespace(&descriptor, &groups).expect("registered")
}

fn block_id(namespace: NamespaceHandle, name: u64) -> RecordId {
    RecordId { namespace, group: 0, shard: 0, key: object_id(name).key }
}

fn block(place: &Place, id: RecordId, bytes: &[u8], done: AppendDone) -> Append {
    let mut slot = place.slot(bytes.len());
    slot.payload_mut()[..bytes.len()].copy_from_slice(bytes);
    let payload_bytes = bytes.len() as u64;
    let slot = Some(Arc::new(slot));
    Append { id, kind: RecordKind::Kv, parent: BlockKey::ROOT, depth: 0, slot, payload_bytes, done }
}

fn save(place: &Place, store: &Store, blocks: impl IntoIterator<Item = (RecordId, Vec<u8>)>) {
    let mut ends = Ends::new();
    for (id, bytes) in blocks {
        append(store, block(place, id, &bytes, ends.done(0)));
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, result)| result.is_ok()));
}

/// The bytes of a block, read into a slot that is exactly as large as it has to be.
fn load(place: &Place, store: &Store, id: RecordId) -> Option<Vec<u8>> {
    let location = store.locate(&id)?;
    let slot = Arc::new(place.slot(BLOCK_BYTES));
    let (sender, receiver) = unbounded();
    let done = Box::new(move |result| drop(sender.send(result)));
    store.read(id, location, Arc::clone(&slot), IoPriority::Demand, done).expect("accepted");
    match receiver.recv_timeout(PATIENCE).expect("the read ends") {
        Ok(verified) => Some(slot.payload()[..verified.payload_bytes as usize].to_vec()),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            None
        }
    }
}

/// Changes bytes of a block on the drive, behind the back of the store.
fn damage(place: &Place, store: &Store, id: RecordId, change: impl FnOnce(&mut [u8])) {
    let location = store.locate(&id).expect("there");
    let mut record = place.bytes_at(place.offset_of(&location), location.pages as usize * PAGE_BYTES);
    change(&mut record);
    place.overwrite(place.offset_of(&location), &record);
}

on_both_engines!(blocks_come_back_as_they_were, an_encoded_store_is_rebuilt_from_its_regions);

fn blocks_come_back_as_they_were(io: IoChoice) {
    let place = Place::new(io, 16);
    let store = place.open().0;
    let floats_of = namespace(&store, "bf16");
    let others = namespace(&store, "unknown");
    save(&place, &store, (0..8).map(|name| (block_id(floats_of, name), floats(name))));
    let stats = store.stats();
    assert_eq!(stats.encoded_records, 8, "{stats:?}");
    assert!(stats.appended_stored_bytes * 14 <= stats.appended_payload_bytes * 10, "{stats:?}");
    save(&place, &store, (0..8).map(|name| (block_id(others, name), noise(name))));
    assert_eq!(store.stats().encoded_records, 8, "what does not shrink is stored as it is");
    for _ in 0..2 {
        for name in 0..8 {
            assert!(load(&place, &store, block_id(floats_of, name)) == Some(floats(name)), "floats {name}");
            assert!(load(&place, &store, block_id(others, name)) == Some(noise(name)), "noise {name}");
        }
    }
    let stats = store.stats();
    assert_eq!((stats.reads, stats.bad_reads, stats.read_bytes), (32, 0, 32 * BLOCK_BYTES as u64));
    assert!(stats.read_stored_bytes < stats.read_bytes && stats.decode_ns > 0 && stats.encode_ns > 0);
    let report = store.verify(&mut |_| ()).expect("verified");
    assert_eq!((report.records, report.corrupt), (16, 0));
    close(store);
    // What is encoded stays readable when nothing is encoded any more.
    let plain = Place { config: StoreConfig { codec: CodecChoice::None, ..place.config.clone() }, ..place };
    let store = plain.open().0;
    assert!(load(&plain, &store, block_id(floats_of, 3)) == Some(floats(3)));
    save(&plain, &store, [(block_id(floats_of, 100), floats(100))]);
    assert_eq!(store.stats().encoded_records, 0);
    assert!(load(&plain, &store, block_id(floats_of, 100)) == Some(floats(100)));
    close(store);
}

fn an_encoded_store_is_rebuilt_from_its_regions(io: IoChoice) {
    let place = Place::new(io, 16);
    let store = place.open().0;
    let namespace = namespace(&store, "bf16");
    save(&place, &store, (0..20).map(|name| (block_id(namespace, name), floats(name))));
    drop(store);
    place.wipe_index();
    let (store, report) = place.open();
    assert!(report.index_rebuilt);
    for name in 0..20 {
        assert!(load(&place, &store, block_id(namespace, name)) == Some(floats(name)), "block {name}");
    }
    close(store);
}

#[test]
fn removals_and_flushes_keep_their_order_with_blocks_that_are_encoded() {
    let place = Place::new(IoChoice::Auto, 16);
    let store = place.open().0;
    let namespace = namespace(&store, "bf16");
    for round in 0..10 {
        let mut ends = Ends::new();
        for name in 0..4 {
            let id = block_id(namespace, round * 10 + name);
            append(&store, block(&place, id, &floats(name), ends.done(name)));
            if name % 2 == 0 {
                append(&store, Append { id, ..tombstone(id, ends.done(name)) });
            }
        }
        let is_durable = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_durable);
        let last = block(
            &place,
            block_id(namespace, round * 10 + 9),
            &floats(9),
            Box::new(move |result| {
                told.store(result.is_ok(), Ordering::Release);
            }),
        );
        append(&store, last);
        store.flush(soon()).expect("flushed");
        assert!(is_durable.load(Ordering::Acquire), "a flush waits for what is being encoded");
        assert!(ends.wait().iter().all(|(_, result)| result.is_ok()));
        for name in 0..4 {
            let found = load(&place, &store, block_id(namespace, round * 10 + name));
            assert!(found == (name % 2 == 1).then(|| floats(name)), "round {round}, block {name}");
        }
    }
    close(store);
}

#[test]
fn every_end_of_a_store_ends_what_is_being_encoded() {
    for abandons in [false, true] {
        let place = Place::new(IoChoice::Auto, 64);
        let store = place.open().0;
        let namespace = namespace(&store, "bf16");
        let mut ends = Ends::new();
        for name in 0..100 {
            append(&store, block(&place, block_id(namespace, name), &floats(name), ends.done(name)));
        }
        match abandons {
            false => close(store),
            true => drop(store),
        }
        let ended = ends.wait();
        assert!(abandons || ended.iter().all(|(_, result)| result.is_ok()), "close makes all of them durable");
        let store = place.open().0;
        for (name, _) in ended.iter().filter(|(_, result)| result.is_ok()) {
            assert!(load(&place, &store, block_id(namespace, *name)) == Some(floats(*name)), "block {name}");
        }
        close(store);
    }
}

#[test]
fn damage_of_an_encoded_block_is_a_miss() {
    let place = Place::new(IoChoice::Psync, 16);
    let store = place.open().0;
    let namespace = namespace(&store, "bf16");
    let id = |name| block_id(namespace, name);
    save(&place, &store, (0..6).map(|name| (id(name), floats(name))));
    // A bit of the table, of the exponents, of the rest.
    damage(&place, &store, id(0), |record| record[PAGE_BYTES] ^= 1);
    damage(&place, &store, id(1), |record| *record.last_mut().expect("bytes") ^= 1);
    damage(&place, &store, id(2), |record| record[PAGE_BYTES + 9000] ^= 0x40);
    for name in 0..3 {
        assert!(load(&place, &store, id(name)).is_none(), "block {name}");
    }
    assert_eq!(store.stats().decode_ns, 0, "what is not as it was stored never reaches the decoder");
    // A sound header over sound stored bytes that decode to something else than what was saved.
    damage(&place, &store, id(3), |record| {
        record[216] ^= 1;
        seal(&mut record[..PAGE_BYTES]);
    });
    // A codec of the future.
    damage(&place, &store, id(4), |record| {
        record[58] = 77;
        seal(&mut record[..PAGE_BYTES]);
    });
    for name in 0..5 {
        assert!(name < 3 || load(&place, &store, id(name)).is_none(), "block {name}");
        assert!(store.locate(&id(name)).is_none(), "block {name} is quarantined");
    }
    assert!(load(&place, &store, id(5)) == Some(floats(5)));
    assert_eq!(store.stats().bad_reads, 5);
    close(store);
}

#[test]
fn a_slot_that_is_too_small_for_the_decoded_block_is_refused() {
    let place = Place::new(IoChoice::Auto, 16);
    let store = place.open().0;
    let id = block_id(namespace(&store, "bf16"), 1);
    save(&place, &store, [(id, floats(1))]);
    let location = store.locate(&id).expect("there");
    let slot = Arc::new(place.slot(location.pages as usize * PAGE_BYTES - PAGE_BYTES));
    let refused = store.read(id, location, slot, IoPriority::Demand, Box::new(|_| unreachable!()));
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    close(store);
}

#[test]
fn a_failed_write_of_an_encoded_block_is_made_again_as_it_is() {
    let place = Place::new(IoChoice::Psync, 16);
    let (store, drive) = place.open_faulty(FaultPlan::default());
    let namespace = namespace(&store, "bf16");
    save(&place, &store, [(block_id(namespace, 0), floats(0))]);
    let first = drive.seen(IoKind::Write) + 2;
    drive.inject(Fault { kind: IoKind::Write, first, times: 1, action: FaultAction::Torn { bytes: 8192 } });
    save(&place, &store, (1..8).map(|name| (block_id(namespace, name), floats(name))));
    assert!(store.stats().retried_appends > 0);
    for name in 0..8 {
        assert!(load(&place, &store, block_id(namespace, name)) == Some(floats(name)), "block {name}");
    }
    close(store);
}

#[test]
fn a_drive_faster_than_the_decoders_gets_blocks_as_they_are() {
    let place = Place::new(IoChoice::Auto, 16);
    let store = place.open().0;
    let namespace = namespace(&store, "bf16");
    assert!(store.stats().decode_bytes_per_second > 0, "measured at open");
    store.set_drive_read_speed(u64::MAX);
    save(&place, &store, [(block_id(namespace, 1), floats(1))]);
    let stats = store.stats();
    assert_eq!((stats.encoded_records, stats.codec_skipped_speed), (0, 1));
    store.set_drive_read_speed(1);
    save(&place, &store, [(block_id(namespace, 2), floats(2))]);
    assert_eq!(store.stats().encoded_records, 1);
    close(store);
    let always = Place { config: StoreConfig { codec: CodecChoice::Always, ..place.config.clone() }, ..place };
    let store = always.open().0;
    store.set_drive_read_speed(u64::MAX);
    save(&always, &store, [(block_id(namespace, 3), floats(3))]);
    assert_eq!(store.stats().encoded_records, 1);
    close(store);
}

#[test]
fn what_does_not_fit_in_the_encoders_queue_is_stored_as_it_is() {
    let mut place = Place::new(IoChoice::Auto, 64);
    place.config.write_queue_bytes = 4 << 20;
    let store = place.open().0;
    let namespace = namespace(&store, "bf16");
    let mut ends = Ends::new();
    for name in 0..200 {
        append(&store, block(&place, block_id(namespace, name), &floats(name), ends.done(name)));
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, result)| result.is_ok()));
    let stats = store.stats();
    assert_eq!(stats.encoded_records + stats.codec_skipped_queue, 200, "{stats:?}");
    for name in 0..200 {
        assert!(load(&place, &store, block_id(namespace, name)) == Some(floats(name)), "block {name}");
    }
    close(store);
}

#[test]
fn a_check_of_a_closed_store_decodes_what_is_encoded() {
    let place = Place::new(IoChoice::Auto, 16);
    let store = place.open().0;
    let namespace = namespace(&store, "bf16");
    let ids: Vec<RecordId> = (0..6).map(|name| block_id(namespace, name)).collect();
    save(&place, &store, (0..6).map(|name| (ids[name as usize], floats(name))));
    assert_eq!(store.stats().encoded_records, 6);
    let reseal = |record: &mut [u8]| {
        let frame = PAGE_BYTES..record.len();
        let checksum = xxhash_rust::xxh3::xxh3_64(&record[frame]);
        record[208..216].copy_from_slice(&checksum.to_le_bytes());
        seal(&mut record[..PAGE_BYTES]);
    };
    // All checksums of what is stored are right: only decoding can tell.
    damage(&place, &store, ids[1], |record| {
        record[PAGE_BYTES + 4] ^= 1;
        reseal(record);
    });
    damage(&place, &store, ids[2], |record| {
        let end = record.len();
        record[end - 40..].fill(0xff);
        reseal(record);
    });
    damage(&place, &store, ids[3], |record| {
        record[216] ^= 1;
        reseal(record);
    });
    damage(&place, &store, ids[4], |record| {
        record[58] = 9;
        reseal(record);
    });
    close(store);
    let paths = StorePaths { home: place.store_path(), more_drives: Vec::new() };
    let report = fsck(&paths, false, &mut |_| ()).expect("checked");
    assert_eq!((report.undecodable, report.problems, report.bad_checksums), (4, 4, 0), "{report:?}");
    let told: Vec<&str> = report.findings.iter().map(|finding| finding.what.as_str()).collect();
    for what in ["number of chunks", "compressed chunk", "decodes to checksum", "codec 9"] {
        assert!(told.iter().any(|told| told.contains(what)), "{what}: {told:?}");
    }
    let report = fsck(&paths, true, &mut |_| ()).expect("repaired");
    assert!(report.is_good() && report.repaired == 4, "{report:?}");
    let store = place.open().0;
    for name in 0..6 {
        let found = load(&place, &store, ids[name as usize]);
        assert!(found == (!(1..5).contains(&name)).then(|| floats(name)), "block {name}");
    }
    close(store);
}
