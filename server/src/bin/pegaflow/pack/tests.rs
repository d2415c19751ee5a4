use std::path::Path;

use pegaflow_engine::{BlockKey, ExportedRecord, GroupGeometry, ImportBlock};

use super::*;

const BLOCK: u64 = 4096;

fn head() -> Head {
    Head {
        descriptor: NamespaceDescriptor::new().with("model", "m").with("dtype", "bf16"),
        groups: vec![GroupGeometry { group: 0, block_bytes: BLOCK, shards: 2 }],
        created: 1,
        payload_bytes: 0,
    }
}

/// Every other block does not compress.
fn block(number: u8) -> Vec<u8> {
    let mut state = u64::from(number) + 1;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0xd120_2e8c_bcdb_4a35).wrapping_add(1);
        (state >> 56) as u8
    });
    if number.is_multiple_of(2) { vec![number; BLOCK as usize] } else { noise.take(BLOCK as usize).collect() }
}

fn write(path: &Path, blocks: u8, key: Option<&ring::signature::Ed25519KeyPair>) {
    let mut writer = PackWriter::create(path).expect("created");
    for number in 0..blocks {
        let record = ExportedRecord {
            group: 0,
            shard: u16::from(number % 2),
            key: BlockKey::from_bytes([number + 1; 32]),
            parent: BlockKey::from_bytes([number; 32]),
            depth: u32::from(number),
            payload: &block(number),
        };
        writer.add(&record).expect("added");
    }
    writer.finish(&head(), key).expect("finished");
}

fn read(path: &Path) -> Result<Vec<ImportBlock>> {
    let pack = Pack::open(path)?;
    let mut blocks = pack.blocks();
    let mut found = Vec::new();
    while let Some(block) = blocks.next_block()? {
        found.push(block);
    }
    Ok(found)
}

#[test]
fn what_goes_in_comes_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.pack");
    write(&path, 9, None);
    let blocks = read(&path).expect("a pack");
    assert_eq!(blocks.len(), 9);
    for (number, found) in (0..9).zip(&blocks) {
        assert!(found.payload == block(number), "{number}");
        assert_eq!((found.key, found.depth), (BlockKey::from_bytes([number + 1; 32]), u32::from(number)));
        assert_eq!((found.parent, found.shard), (BlockKey::from_bytes([number; 32]), u16::from(number % 2)));
    }
    assert_eq!(Pack::open(&path).expect("a pack").head, head());
    PackWriter::create(&path).map(drop).expect_err("it is there");
    // One that is not finished leaves nothing.
    let other = folder.path().join("b.pack");
    drop(PackWriter::create(&other).expect("created"));
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
}

#[test]
fn any_changed_byte_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, key) = (folder.path().join("a.pack"), folder.path().join("key"));
    keys::make(&key).expect("a key");
    write(&path, 5, Some(&keys::read(&key).expect("a key")));
    let whole = std::fs::read(&path).expect("there");
    let changed = folder.path().join("b.pack");
    // Bytes of every structure, and some of every block.
    let places = (0..whole.len()).filter(|at| at % 97 == 0 || *at < 64 || *at + 1500 > whole.len());
    for at in places {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&changed, &bytes).expect("written");
        assert!(read(&changed).is_err(), "byte {at} of {}", whole.len());
    }
    for length in [0, 63, 64, 223, 224, 225, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&changed, &whole[..length]).expect("written");
        assert!(read(&changed).is_err(), "cut to {length}");
    }
    std::fs::write(&changed, [&whole[..], &[0]].concat()).expect("written");
    read(&changed).expect_err("one byte more");
    read(&path).expect("the pack itself is good");
}

#[test]
fn a_pack_is_believed_if_its_signer_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, key) = (folder.path().join("a.pack"), folder.path().join("key"));
    let public = keys::make(&key).expect("a key");
    keys::make(&key).expect_err("there is one");
    write(&path, 2, Some(&keys::read(&key).expect("a key")));
    let pack = Pack::open(&path).expect("a pack");
    let trust = |trust: &[&str], unsigned| Trust { trust: trust.iter().map(ToString::to_string).collect(), unsigned };
    trust(&[&public], false).check(&pack).expect("trusted");
    let refused = trust(&[&"0".repeat(64)], true).check(&pack).expect_err("somebody else's");
    assert!(refused.kind() == ErrorKind::PermissionDenied && refused.message().contains(&public), "{refused}");
    let plain = folder.path().join("b.pack");
    write(&plain, 2, None);
    let plain = Pack::open(&plain).expect("a pack");
    trust(&[&public], false).check(&plain).expect_err("nobody's");
    trust(&[], true).check(&plain).expect("accepted");
    // A key that others may read is no secret.
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("changed");
    assert_eq!(keys::read(&key).expect_err("readable").kind(), ErrorKind::PermissionDenied);
}

#[test]
fn another_identity_is_refused_with_what_differs() {
    let of = |fields: &[(&str, &str)]| {
        let descriptor = fields.iter().fold(NamespaceDescriptor::new(), |it, (name, value)| it.with(*name, *value));
        KnownNamespace { id: descriptor.id(), descriptor, groups: Vec::new() }
    };
    let pack = of(&[("model", "m"), ("vllm", "0.26")]).descriptor;
    check_identity(&pack, &[]).expect("an empty store");
    check_identity(&pack, &[of(&[("model", "x")]), of(&[("model", "m"), ("vllm", "0.26")])]).expect("known");
    check_identity(&pack, &[of(&[("model", "m"), ("vllm", "0.26"), ("tenant", "a")])]).expect("another tenant's");
    let refused =
        check_identity(&pack, &[of(&[("model", "x"), ("vllm", "1")]), of(&[("model", "m"), ("vllm", "0.32")])]);
    let refused = refused.expect_err("another version").to_string();
    assert!(refused.contains("vllm is 0.26 in the pack, 0.32 here") && !refused.contains("model is"), "{refused}");
}
