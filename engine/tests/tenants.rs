//! Tenants: what was saved on one's behalf is found on nobody else's, also after a restart; and there is a bound to the
//! namespaces that they make.

#![expect(clippy::expect_used, reason = "a test that cannot go on panics")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_engine::*;
use support::{BLOCK, Worker, keys};

/// Tenants that have a namespace of their own, and namespaces of all the others.
const OWN: usize = 1024;
const COMMON: usize = 16;

fn config(path: &Path) -> EngineConfig {
    let nvme = NvmeConfig {
        region: Some(ByteSize::mib(4)),
        warm_start: false,
        ..NvmeConfig::new(path.join("store"), ByteSize::mib(256))
    };
    EngineConfig { dram: ByteSize::mib(64), nvme: Some(nvme), ..EngineConfig::default() }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn name(name: &str) -> Option<TenantId> {
    Some(TenantId::new(name).expect("a name"))
}

/// Saves one block for a tenant.
fn save(worker: &mut Worker, tenant: Option<TenantId>, key: BlockKey, seed: u8) {
    worker.tenant = tenant;
    worker.fill(0, seed);
    assert_eq!(worker.save(&[key], BlockKey::ROOT).saved, 1);
}

/// The first byte of the block that a tenant finds, as it is loaded.
fn find(worker: &mut Worker, tenant: Option<TenantId>, key: BlockKey) -> Option<u8> {
    worker.tenant = tenant;
    let lease = worker.lookup(&[key]).lease?;
    worker.memory.block(1).fill(0xa5);
    let loaded = worker.load(lease, vec![LoadBlock { index: 0, block: 1 }]);
    assert_eq!(loaded.loaded_dram + loaded.loaded_nvme, 1);
    let bytes = worker.memory.block(1);
    assert_eq!(bytes.len() as u64, BLOCK);
    bytes.first().copied()
}

#[test]
fn nobody_finds_what_was_saved_for_another() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    // The same key for all: only the tenant tells them apart.
    let key = keys(1, 1)[0];
    let who = [None, name("a"), name("b")];
    let mut worker = Worker::new(EngineConfig { load_policy: LoadPolicy::Always, ..config(directory.path()) });
    save(&mut worker, name("a"), key, 1);
    let found: Vec<_> = who.iter().map(|tenant| find(&mut worker, tenant.clone(), key)).collect();
    assert_eq!(found, [None, Some(1), None]);
    save(&mut worker, name("b"), key, 2);
    save(&mut worker, None, key, 3);
    let all = |worker: &mut Worker| who.each_ref().map(|tenant| find(worker, tenant.clone(), key));
    assert_eq!(all(&mut worker), [Some(3), Some(1), Some(2)]);
    assert_eq!(find(&mut worker, name("c"), key), None);
    worker.engine.flush(soon()).expect("durable");
    worker.engine.close(soon()).expect("closed");

    let mut worker = Worker::new(EngineConfig { load_policy: LoadPolicy::Always, ..config(directory.path()) });
    assert_eq!(find(&mut worker, name("c"), key), None);
    assert_eq!(all(&mut worker), [Some(3), Some(1), Some(2)], "from the drive");
    let fields = worker.engine.namespaces().expect("a store").into_iter();
    let tenants: BTreeSet<_> = fields.map(|known| known.descriptor.fields().get(TENANT_FIELD).cloned()).collect();
    assert_eq!(tenants, BTreeSet::from([None, Some("a".into()), Some("b".into())]), "who only asks makes none");
}

#[test]
fn tenants_without_number_make_namespaces_with_a_bound() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut worker = Worker::new(config(directory.path()));
    let tenants: Vec<_> = (0..OWN + 200).map(|number| name(&format!("t{number}"))).collect();
    let keys = keys(tenants.len() as u32, 7);
    for (number, (tenant, key)) in tenants.iter().zip(&keys).enumerate() {
        save(&mut worker, tenant.clone(), *key, number as u8);
    }
    for (number, (tenant, key)) in tenants.iter().zip(&keys).enumerate() {
        assert_eq!(find(&mut worker, tenant.clone(), *key), Some(number as u8), "tenant {number}");
    }
    let known = worker.engine.namespaces().expect("a store").len();
    assert_eq!(known, 1 + OWN + COMMON);
}

#[test]
fn a_purged_tenant_is_gone_and_begins_anew() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let key = keys(1, 1)[0];
    let mut worker = Worker::new(EngineConfig { load_policy: LoadPolicy::Always, ..config(directory.path()) });
    save(&mut worker, name("a"), key, 1);
    save(&mut worker, name("b"), key, 2);
    worker.engine.flush(soon()).expect("durable");
    let namespaces = worker.engine.list_namespaces(None, 10, 0).expect("open");
    let of_a = namespaces.iter().find(|one| one.descriptor.fields().get(TENANT_FIELD).is_some_and(|of| of == "a"));
    let purged = worker.engine.purge(&of_a.expect("it has saved").id, soon()).expect("durable").expect("known");
    assert_eq!((purged.dram_blocks, purged.drive_blocks), (1, 1));
    let found = |worker: &mut Worker| ["a", "b"].map(|tenant| find(worker, name(tenant), key));
    assert_eq!(found(&mut worker), [None, Some(2)]);
    save(&mut worker, name("a"), key, 3);
    assert_eq!(found(&mut worker), [Some(3), Some(2)]);
    worker.engine.close(soon()).expect("closed");
    let mut worker = Worker::new(EngineConfig { load_policy: LoadPolicy::Always, ..config(directory.path()) });
    assert_eq!(found(&mut worker), [Some(3), Some(2)]);
}
