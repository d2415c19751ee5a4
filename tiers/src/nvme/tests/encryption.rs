//! An encrypted store on real files: nothing of what was put is on the drive, nobody without the key gets in, and what a
//! key sealed goes with the key.

use super::*;
use crate::block::NamespaceId;
use crate::codec::CodecChoice;
use crate::nvme::encryption::EncryptionKey;
use crate::nvme::page::{get as bytes_of, put as put_bytes, seal};
use xxhash_rust::xxh3::xxh3_64;

const LENGTH: usize = 20_000;

fn key(byte: u8) -> Option<EncryptionKey> {
    Some(EncryptionKey::from_bytes([byte; 32]))
}

fn place(io: IoChoice) -> Place {
    let mut place = Place::new(io, 16);
    place.config.encryption = key(1);
    place
}

fn kind_of(place: &Place) -> Option<ErrorKind> {
    place.try_open().err().map(|error| error.kind())
}

/// All bytes of all files below a directory, by name.
fn files(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).expect("listed") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push((path.clone(), std::fs::read(&path).expect("read"))),
        }
    }
    found.sort();
    found
}

/// Files that have this somewhere.
fn holding(place: &Place, needle: &[u8]) -> Vec<PathBuf> {
    let has = |bytes: &[u8]| {
        let mut at = 0;
        while let Some(found) = bytes[at..].iter().position(|byte| *byte == needle[0]) {
            at += found + 1;
            if bytes[at - 1..].starts_with(needle) {
                return true;
            }
        }
        false
    };
    files(&place.store_path()).into_iter().filter(|(_, bytes)| has(bytes)).map(|(path, _)| path).collect()
}

fn namespace(store: &Store, model: &str) -> (NamespaceHandle, NamespaceId) {
    let descriptor = NamespaceDescriptor::new().with("model", model).with("dtype", "torch.bfloat16");
    let group = GroupGeometry { group: 0, block_bytes: LENGTH as u64 / 16 * 16, shards: 1 };
    (store.namespace(&descriptor, &[group]).expect("registered"), descriptor.id())
}

fn block_id(namespace: NamespaceHandle, name: u64) -> RecordId {
    RecordId { namespace, ..object_id(name) }
}

fn parent_of(name: u64) -> BlockKey {
    if name == 0 { BlockKey::ROOT } else { object_id(name - 1).key }
}

/// Saves blocks of a chain; their bytes shrink when compressed.
fn save(place: &Place, store: &Store, namespace: NamespaceHandle, names: std::ops::Range<u64>) {
    let length = LENGTH / 16 * 16;
    let mut ends = Ends::new();
    for name in names {
        let mut slot = place.slot(length);
        let bytes = shrinking(name, length);
        slot.payload_mut()[..length].copy_from_slice(&bytes);
        let parent = parent_of(name);
        let (kind, done) = (RecordKind::Kv, ends.done(name));
        let (id, slot, payload_bytes) = (block_id(namespace, name), Some(Arc::new(slot)), length as u64);
        append(store, Append { id, kind, parent, depth: name as u32, slot, payload_bytes, done });
    }
    store.flush(soon()).expect("flushed");
    assert!(ends.wait().iter().all(|(_, result)| result.is_ok()));
}

fn shrinking(name: u64, length: usize) -> Vec<u8> {
    let mut bytes = content(name, 77, length);
    bytes.iter_mut().skip(1).step_by(2).for_each(|byte| *byte = 0x3f);
    bytes
}

/// A block, with what its record says of its parent.
fn load(place: &Place, store: &Store, id: RecordId) -> Option<(Vec<u8>, BlockKey)> {
    let location = store.locate(&id)?;
    let slot = Arc::new(place.slot(LENGTH));
    let (sender, receiver) = unbounded();
    let done = Box::new(move |result| drop(sender.send(result)));
    store.read(id, location, Arc::clone(&slot), IoPriority::Demand, done).ok()?;
    let verified = receiver.recv_timeout(PATIENCE).expect("the read ends").ok()?;
    Some((slot.payload()[..verified.payload_bytes as usize].to_vec(), verified.parent))
}

fn assert_blocks(place: &Place, store: &Store, namespace: NamespaceHandle, names: std::ops::Range<u64>) {
    for name in names {
        let (bytes, parent) = load(place, store, block_id(namespace, name)).expect("there");
        assert!(bytes == shrinking(name, bytes.len()), "block {name} has wrong bytes");
        assert_eq!(parent, parent_of(name), "the parent in clear");
    }
}

fn what_was_put_comes_back_and_is_nowhere_in_clear(io: IoChoice) {
    for codec in [CodecChoice::Always, CodecChoice::None] {
        let mut place = place(io);
        place.config.codec = codec;
        let (store, _) = place.open();
        let (blocks, _) = namespace(&store, "m");
        put(&place, &store, (0..6).map(|name| (name, 1, LENGTH)));
        save(&place, &store, blocks, 10..20);
        store.put_note("hot", &content(500, 1, 300)).expect("kept");
        remove(&store, [5]);
        let is_there = |store: &Store| {
            (0..5).for_each(|name| assert_object(&place, store, name, 1, LENGTH));
            assert!(store.locate(&object_id(5)).is_none());
            assert_blocks(&place, store, blocks, 10..20);
            assert_eq!(store.note("hot").expect("kept"), Some(content(500, 1, 300)));
        };
        is_there(&store);
        assert_eq!(store.stats().encoded_records > 0, codec == CodecChoice::Always);
        assert!(store.stats().seal_ns > 0 && store.stats().unseal_ns > 0);
        let report = store.verify(&mut drop).expect("verified");
        assert_eq!((report.corrupt, report.records), (0, 15));
        close(store);
        let (again, report) = place.open();
        assert!(!report.index_rebuilt);
        is_there(&again);
        close(again);
        // Without the index too: the regions say all that is needed.
        let note = holding(&place, &content(500, 1, 300)[..40]);
        assert!(note.is_empty(), "a note in clear: {note:?}");
        place.wipe_index();
        let (again, report) = place.open();
        assert!(report.index_rebuilt);
        (0..5).for_each(|name| assert_object(&place, &again, name, 1, LENGTH));
        assert_blocks(&place, &again, blocks, 10..20);
        close(again);
        for name in 0..20 {
            let clear = [content(name, 1, LENGTH), shrinking(name, LENGTH)];
            for needle in clear.iter().flat_map(|bytes| bytes.chunks_exact(24)) {
                assert_eq!(holding_if_new(&place, needle), None, "payload of {name}");
            }
            for key in [object_id(name).key, parent_of(name)].iter().filter(|key| !key.is_root()) {
                assert_eq!(holding(&place, &key.as_bytes()[..12]), Vec::<PathBuf>::new(), "the key of {name}");
            }
            let checksums = clear.map(|bytes| xxh3_64(&bytes).to_le_bytes());
            for checksum in checksums {
                assert_eq!(holding(&place, &checksum), Vec::<PathBuf>::new(), "a checksum of what is in clear");
            }
        }
    }
}

/// A sample of the needles is enough: one of each page.
fn holding_if_new(place: &Place, needle: &[u8]) -> Option<PathBuf> {
    let is_sampled = xxh3_64(needle).is_multiple_of(397);
    is_sampled.then(|| holding(place, needle)).into_iter().flatten().next()
}

fn nobody_gets_in_without_the_key(io: IoChoice) {
    let mut place = place(io);
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, LENGTH)]);
    close(store);
    let before = files(&place.store_path());
    for (wrong, expected) in [(None, ErrorKind::PermissionDenied), (key(2), ErrorKind::PermissionDenied)] {
        place.config.encryption = wrong;
        assert_eq!(kind_of(&place), Some(expected));
        let fscked = fsck_with_key(
            &StorePaths { home: place.store_path(), more_drives: Vec::new() },
            place.config.encryption.as_ref(),
            true,
            &mut drop,
        );
        assert_eq!(fscked.err().map(|error| error.kind()), Some(expected));
        assert!(before == files(&place.store_path()), "an open that was refused changed something");
    }
    place.config.encryption = key(1);
    // One file of keys is enough, and comes back; with none of them it is told what is missing.
    std::fs::remove_file(place.store_path().join("keys.0")).expect("there");
    let (store, _) = place.open();
    assert_object(&place, &store, 1, 1, LENGTH);
    close(store);
    for name in ["keys.0", "keys.1"] {
        std::fs::remove_file(place.store_path().join(name)).expect("there again");
    }
    assert_eq!(kind_of(&place), Some(ErrorKind::Corrupt));
    let mut plain = Place::new(io, 16);
    close(plain.open().0);
    plain.config.encryption = key(1);
    assert_eq!(kind_of(&plain), Some(ErrorKind::InvalidInput));
}

fn fsck_decrypts(io: IoChoice) {
    let place = place(io);
    let (store, _) = place.open();
    let (blocks, _) = namespace(&store, "m");
    put(&place, &store, (0..4).map(|name| (name, 1, LENGTH)));
    save(&place, &store, blocks, 10..14);
    let location = store.locate(&object_id(2)).expect("there");
    close(store);
    let paths = StorePaths { home: place.store_path(), more_drives: Vec::new() };
    let check = |repair| fsck_with_key(&paths, key(1).as_ref(), repair, &mut drop).expect("checked");
    assert_eq!((check(false).problems, check(false).records), (0, 8));
    // Changed as a fault would not: the checksums are right.
    forge_payload(&place, &location);
    assert!(check(false).problems > 0, "a header with right checksums and a wrong code is none");
    check(true);
    let (store, _) = place.open();
    assert!(get(&place, &store, 2).is_none());
    assert_object(&place, &store, 1, 1, LENGTH);
    close(store);
}

/// Flips a bit of a payload and makes both checksums right again.
fn forge_payload(place: &Place, location: &Location) {
    let mut image = place.bytes_at(place.offset_of(location), location.pages as usize * 4096);
    image[4096 + 100] ^= 1;
    let stored_bytes = u64::from_le_bytes(bytes_of(&image, 200)) as usize;
    let checksum = xxh3_64(&image[4096..4096 + stored_bytes]);
    put_bytes(&mut image, 208, &checksum.to_le_bytes());
    seal(&mut image[..4096]);
    place.overwrite(place.offset_of(location), &image);
}

fn what_was_forged_is_a_miss_and_quarantined(io: IoChoice) {
    let place = place(io);
    let (store, _) = place.open();
    put(&place, &store, [(1, 1, LENGTH), (2, 1, LENGTH)]);
    let location = store.locate(&object_id(1)).expect("there");
    forge_payload(&place, &location);
    let error = read_at(&place, &store, object_id(1), location).expect_err("forged");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!((store.stats().bad_reads, store.locate(&object_id(1))), (1, None));
    assert_object(&place, &store, 2, 1, LENGTH);
    close(store);
}

/// What is sealed opens only as what it was: with the right header code too, which a bug of the store's own could make.
#[test]
fn the_tag_covers_the_payload_the_names_and_what_the_header_says() {
    use crate::nvme::encryption::{Keyring, Names, SealedAs, Subject};
    use crate::nvme::record_header::{DiskIdentity, HeaderKind};
    use crate::nvme::version::StoreUuid;
    let at = drive_directory();
    let directory = crate::nvme::directory::Directory::open(at.path()).expect("made");
    let keyring = Keyring::for_test(&directory, &EncryptionKey::from_bytes([1; 32]));
    let data_key = keyring.key_for(NamespaceId::from_bytes([7; 32])).expect("made");
    let names = Names { key: object_id(1).key, parent: object_id(0).key };
    let identity =
        DiskIdentity { namespace: NamespaceId::from_bytes([7; 32]), group: 1, shard: 2, key: data_key.name(names.key) };
    let subject = Subject {
        store: StoreUuid::from_bytes([3; 16]),
        kind: HeaderKind::Kv,
        identity,
        shards: 4,
        key_version: 1,
        parent: data_key.name(names.parent),
        depth: 9,
    };
    let form = SealedAs { codec: 0, raw_bytes: 5000, stored_bytes: 5000, raw_xxh3: 11 };
    let clear = content(1, 1, 8192 + 4096);
    let mut image = clear.clone();
    let sealed = keyring.seal(&data_key, &subject, &form, &names, &mut image).expect("sealed");
    let opened = |subject: &Subject, form: &SealedAs, sealed, image: &[u8]| {
        let mut image = image.to_vec();
        data_key.open(subject, form, &sealed, &mut image).map(|opened| (opened, image)).map_err(|error| error.kind())
    };
    let (found, bytes) = opened(&subject, &form, sealed, &image).expect("what was sealed");
    assert_eq!((found, &bytes[4096..9096]), ((names, 11), &clear[4096..9096]));
    let refused = |subject: &Subject, form: &SealedAs, sealed, image: &[u8]| {
        assert_eq!(opened(subject, form, sealed, image).err(), Some(ErrorKind::Corrupt));
    };
    for bit in (4016 * 8..9096 * 8).step_by(61) {
        let mut flipped = image.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        refused(&subject, &form, sealed, &flipped);
    }
    for changed in [
        Subject { store: StoreUuid::from_bytes([4; 16]), ..subject },
        Subject { kind: HeaderKind::Object, ..subject },
        Subject { shards: 5, ..subject },
        Subject { key_version: 2, ..subject },
        Subject { depth: 8, ..subject },
        Subject { parent: BlockKey::ROOT, ..subject },
        Subject { identity: DiskIdentity { shard: 1, ..identity }, ..subject },
        Subject { identity: DiskIdentity { group: 0, ..identity }, ..subject },
        Subject { identity: DiskIdentity { key: object_id(2).key, ..identity }, ..subject },
        Subject { identity: DiskIdentity { namespace: NamespaceId::from_bytes([8; 32]), ..identity }, ..subject },
    ] {
        refused(&changed, &form, sealed, &image);
    }
    for changed in [
        SealedAs { codec: 2, ..form },
        SealedAs { raw_bytes: 5001, ..form },
        SealedAs { stored_bytes: 4999, ..form },
        SealedAs { stored_bytes: u64::MAX, ..form },
    ] {
        refused(&subject, &changed, sealed, &image);
    }
    let mut other = sealed;
    other.nonce[5] ^= 1;
    refused(&subject, &form, other, &image);
    let mut other = sealed;
    other.salt[5] ^= 1;
    refused(&subject, &form, other, &image);
    let mut other = sealed;
    other.tag[5] ^= 1;
    refused(&subject, &form, other, &image);
}

/// Over many records, several threads, a failed write, a restart, a crash and a rebuild: no pair of salt and nonce twice.
fn no_nonce_comes_twice(io: IoChoice) {
    let place = place(io);
    let mut seen = std::collections::HashMap::new();
    let mut look = |place: &Place| {
        let image = std::fs::read(place.store_path().join("regions.0")).expect("read");
        for page in image.chunks_exact(4096).filter(|page| page.starts_with(b"PEGARECD")) {
            if bytes_of::<4>(page, 188) != [0; 4] {
                let (salt_and_nonce, tag): ([u8; 28], [u8; 16]) = (bytes_of(page, 232), bytes_of(page, 264));
                let before = seen.insert(salt_and_nonce, tag);
                assert!(before.is_none_or(|before| before == tag), "a nonce was used for two payloads");
            }
        }
        seen.len()
    };
    // A write fails: its record is sealed once more.
    let plan = FaultPlan::default().fail(IoKind::Write, 9, FaultAction::Errno(libc::EIO));
    let (store, _drive) = place.open_faulty(plan);
    put(&place, &store, (0..40).map(|name| (name, 1, LENGTH)));
    assert!(store.stats().retried_appends > 0);
    close(store);
    let mut count = look(&place);
    for round in 0..4 {
        let (store, _) = place.open();
        put(&place, &store, (0..40).map(|name| (name, 2 + round, LENGTH)));
        match round {
            0 => close(store),
            // Like a kill.
            _ => drop(store),
        }
        if round == 2 {
            place.wipe_index();
        }
        let more = look(&place);
        assert!(more > count);
        count = more;
    }
}

fn what_a_key_sealed_goes_with_the_key(io: IoChoice) {
    let place = place(io);
    let (store, _) = place.open();
    let (theirs, their_id) = namespace(&store, "theirs");
    let (ours, _) = namespace(&store, "ours");
    save(&place, &store, theirs, 0..6);
    save(&place, &store, ours, 0..6);
    put(&place, &store, [(1, 1, LENGTH)]);
    let location = store.locate(&block_id(theirs, 3)).expect("there");
    // A copy of the files, as a thief has it who comes before.
    let stolen = place.copy();
    assert!(store.destroy_key(theirs).expect("destroyed"));
    let is_gone = |store: &Store, place: &Place| {
        for name in 0..6 {
            let id = block_id(theirs, name);
            assert!(store.locate(&id).is_none(), "block {name} is found");
            assert!(store.read(id, location, Arc::new(place.slot(LENGTH)), IoPriority::Demand, Box::new(drop)).is_ok());
        }
        assert!(load(place, store, block_id(theirs, 3)).is_none());
        assert_blocks(place, store, ours, 0..6);
        assert_object(place, store, 1, 1, LENGTH);
    };
    is_gone(&store, &place);
    // It goes on with a new key.
    save(&place, &store, theirs, 20..24);
    assert_blocks(&place, &store, theirs, 20..24);
    close(store);
    // After a restart, and when the index is made from the regions, where the records still lie.
    for wipes_index in [false, true] {
        if wipes_index {
            place.wipe_index();
        }
        let (store, report) = place.open();
        assert_eq!(report.index_rebuilt, wipes_index);
        // Theirs with the new key, ours, and the object; not what nobody can read.
        assert!(!wipes_index || report.recovered_records == 4 + 6 + 1, "{report:?}");
        is_gone(&store, &place);
        assert_blocks(&place, &store, theirs, 20..24);
        let report = store.verify(&mut drop).expect("verified");
        assert_eq!(report.corrupt, 0, "nothing is damaged");
        close(store);
    }
    // The raw bytes: the sealed ones are there, and nothing in the files opens them.
    let image = std::fs::read(place.store_path().join("regions.0")).expect("read");
    let records: Vec<&[u8]> = image.chunks_exact(4096).filter(|page| page.starts_with(b"PEGARECD")).collect();
    let old: Vec<u32> = records
        .iter()
        .filter(|page| bytes_of::<32>(page, 88) == *their_id.as_bytes())
        .map(|page| u32::from_le_bytes(bytes_of(page, 188)))
        .collect();
    let first = *old.iter().min().expect("their records still lie there");
    assert!(old.iter().any(|number| *number != first), "two keys");
    for file in ["keys.0", "keys.1"] {
        let bytes = std::fs::read(place.store_path().join(file)).expect("read");
        let entry = &bytes[first as usize * 512..][..512];
        assert_eq!((entry[18], &entry[72..136]), (3, &[0; 64][..]), "{file}");
        let before = std::fs::read(stolen.store_path().join(file)).expect("read");
        let wrapped = &before[first as usize * 512 + 88..][..48];
        assert!(!bytes.windows(48).any(|bytes| bytes == wrapped), "the wrapped key is left in {file}");
        assert_eq!(holding(&place, wrapped), Vec::<PathBuf>::new());
    }
    assert_eq!(store_of_nothing(&place), Some(false), "a store without encryption has no keys to destroy");
}

fn store_of_nothing(place: &Place) -> Option<bool> {
    let mut plain = Place::new(place.config.io, 16);
    plain.config.encryption = None;
    let (store, _) = plain.open();
    let destroyed = store.destroy_key(NamespaceHandle(0)).ok();
    close(store);
    destroyed
}

/// Regions are given up and their used records written again: sealed bytes are copied as they are.
fn used_records_outlive_their_region(io: IoChoice) {
    let mut place = place(io);
    place.config.capacity_bytes = 8 * REGION_BYTES;
    let (store, _) = place.open();
    for name in 0..400 {
        put(&place, &store, [(name, 1, LENGTH)]);
        drop(get(&place, &store, 0));
    }
    assert!(store.stats().reclaimed_regions > 10, "{:?}", store.stats());
    // The next region may be reclaimed meanwhile: what is there is whole.
    let found: Vec<(u64, Vec<u8>)> = (0..400).filter_map(|name| Some((name, get(&place, &store, name)?))).collect();
    for (name, bytes) in &found {
        assert!(*bytes == content(*name, 1, LENGTH), "object {name}");
    }
    assert!(found.len() > 20 && store.stats().bad_reads == 0);
    close(store);
}

on_both_engines!(
    what_was_put_comes_back_and_is_nowhere_in_clear,
    nobody_gets_in_without_the_key,
    fsck_decrypts,
    what_was_forged_is_a_miss_and_quarantined,
    no_nonce_comes_twice,
    what_a_key_sealed_goes_with_the_key,
    used_records_outlive_their_region,
);
