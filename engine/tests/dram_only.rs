//! The engine without a store: what is saved is found, loaded bit for bit, and nothing is promised that is not there.
#![expect(unsafe_code, reason = "registers memory of the test as a device's")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use pegaflow_engine::*;

const BLOCK: u64 = 4096 + 64;
const BLOCKS: u32 = 64;

struct Memory {
    bytes: Box<[u8]>,
    device: Arc<dyn DeviceMemory>,
}

fn memory() -> Memory {
    let mut bytes = vec![0u8; (BLOCK * u64::from(BLOCKS)) as usize].into_boxed_slice();
    let start = NonNull::new(bytes.as_mut_ptr()).expect("not null");
    let fragments = vec![Fragment { offset: 0, stride: BLOCK, bytes: BLOCK }];
    // SAFETY: `Memory` keeps the bytes; tests touch them only when no copy runs.
    let device = unsafe { HostMemory::new(start, bytes.len() as u64, fragments, BLOCKS, Box::new(())) }.expect("fits");
    Memory { bytes, device: Arc::new(device) }
}

impl Memory {
    fn block(&mut self, block: u32) -> &mut [u8] {
        let at = (u64::from(block) * BLOCK) as usize;
        &mut self.bytes[at..at + BLOCK as usize]
    }
}

struct Worker {
    engine: Engine,
    session: SessionId,
    instance: InstanceId,
    memory: Memory,
    next: u64,
}

impl Worker {
    fn new(dram: ByteSize) -> Self {
        let engine = Engine::open(EngineConfig { dram, ..EngineConfig::default() }).expect("opens");
        let session = engine.start_session();
        let instance = InstanceId("test".into());
        engine.register(session, spec(&instance, BLOCK, 1, 0)).expect("registered");
        Self { engine, session, instance, memory: memory(), next: 0 }
    }

    fn fill(&mut self, block: u32, seed: u8) {
        self.memory.block(block).iter_mut().enumerate().for_each(|(i, byte)| *byte = (i as u8).wrapping_mul(31) ^ seed);
    }

    fn save(&mut self, keys: &[BlockKey], first_parent: BlockKey) -> SaveOutcome {
        let mut parent = first_parent;
        let blocks = keys.iter().enumerate().map(|(i, key)| {
            let block = BlockSave { key: *key, parent, depth: i as u32, block: i as u32 };
            parent = *key;
            block
        });
        let blocks = blocks.collect();
        self.next += 1;
        let (sender, receiver) = bounded(1);
        let request = SaveRequest {
            session: self.session,
            operation: OperationId(self.next),
            instance: self.instance.clone(),
            group: 0,
            shard: 0,
            memory: Arc::clone(&self.memory.device),
            blocks,
        };
        self.engine.save(request, Box::new(move |outcome| sender.send(outcome).expect("waiting"))).expect("accepted");
        receiver.recv_timeout(Duration::from_secs(30)).expect("ended")
    }

    fn lookup(&self, keys: &[BlockKey]) -> LookupReply {
        let request = LookupRequest {
            instance: self.instance.clone(),
            group: 0,
            keys: keys.to_vec(),
            lease: Some(Duration::from_secs(60)),
            tag: 1,
        };
        self.engine.lookup(self.session, &request).expect("looked up")
    }

    fn load(&mut self, lease: LeaseId, blocks: Vec<LoadBlock>) -> LoadOutcome {
        self.next += 1;
        let (sender, receiver) = bounded(1);
        let request = LoadRequest {
            session: self.session,
            operation: OperationId(self.next),
            lease,
            shard: 0,
            memory: Arc::clone(&self.memory.device),
            blocks,
        };
        self.engine.load(request, Box::new(move |outcome| sender.send(outcome).expect("waiting"))).expect("accepted");
        receiver.recv_timeout(Duration::from_secs(30)).expect("ended")
    }
}

fn spec(instance: &InstanceId, block_bytes: u64, shards: u16, shard: u16) -> InstanceSpec {
    InstanceSpec {
        instance: instance.clone(),
        namespace: NamespaceDescriptor::new().with("model", "test"),
        groups: vec![GroupGeometry { group: 0, block_bytes, shards }],
        shard,
    }
}

fn keys(count: u32, seed: u32) -> Vec<BlockKey> {
    let mut chain = KeyChain::new();
    (0..count).map(|i| chain.next(&[seed, i], b"")).collect()
}

#[test]
fn what_was_saved_is_found_and_comes_back_bit_for_bit() {
    let mut worker = Worker::new(ByteSize::mib(16));
    let keys = keys(8, 1);
    (0..8).for_each(|block| worker.fill(block, block as u8));
    assert_eq!(worker.save(&keys, BlockKey::ROOT), SaveOutcome { saved: 8, present: 0, dropped: 0 });
    assert_eq!(worker.save(&keys, BlockKey::ROOT), SaveOutcome { saved: 0, present: 8, dropped: 0 });
    let reply = worker.lookup(&[&keys[..], &self::keys(1, 2)[..]].concat());
    assert_eq!((reply.hit_blocks, reply.dram_blocks), (8, 8));
    let blocks = (0..8).map(|i| LoadBlock { index: i, block: 63 - i }).collect();
    let outcome = worker.load(reply.lease.expect("a lease"), blocks);
    assert_eq!(outcome, LoadOutcome { loaded_dram: 8, loaded_nvme: 0, failed: vec![] });
    for block in 0..8 {
        let saved = worker.memory.block(block).to_vec();
        assert_eq!(worker.memory.block(63 - block), saved);
    }
    let stats = worker.engine.stats();
    assert_eq!((stats.leases, stats.operations, stats.dram_dirty_bytes), (0, 0, 0));
}

#[test]
fn a_block_whose_ancestor_is_missing_is_dropped_with_its_descendants() {
    let mut worker = Worker::new(ByteSize::mib(16));
    let keys = keys(8, 1);
    let outcome = worker.save(&keys[1..], keys[0]);
    assert_eq!(outcome, SaveOutcome { saved: 0, present: 0, dropped: 7 });
    assert_eq!(worker.engine.stats().save_orphan_blocks, 7);
    assert_eq!(worker.lookup(&keys).hit_blocks, 0);
}

#[test]
fn a_lease_is_consumed_once_and_a_lost_one_is_refused() {
    let mut worker = Worker::new(ByteSize::mib(16));
    let keys = keys(2, 1);
    worker.save(&keys, BlockKey::ROOT);
    let lease = worker.lookup(&keys).lease.expect("a lease");
    let replaced_by = worker.lookup(&keys).lease.expect("a lease");
    let request = |lease, worker: &Worker| LoadRequest {
        session: worker.session,
        operation: OperationId(9),
        lease,
        shard: 0,
        memory: Arc::clone(&worker.memory.device),
        blocks: vec![LoadBlock { index: 0, block: 0 }],
    };
    let refused = worker.engine.load(request(lease, &worker), Box::new(|_| panic!("not to be called")));
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::NotFound));
    assert_eq!(worker.load(replaced_by, vec![LoadBlock { index: 1, block: 5 }]).loaded_dram, 1);
}

#[test]
fn an_instance_is_found_only_when_all_of_its_shards_are_there() {
    let engine = Engine::open(EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() }).expect("opens");
    let instance = InstanceId("tp2".into());
    let (first, second) = (engine.start_session(), engine.start_session());
    engine.register(first, spec(&instance, BLOCK, 2, 0)).expect("registered");
    assert!(!engine.is_registered(&instance));
    let other = engine.register(second, spec(&instance, BLOCK * 2, 2, 1));
    assert_eq!(other.map_err(|error| error.kind()), Err(ErrorKind::GeometryMismatch));
    engine.register(second, spec(&instance, BLOCK, 2, 1)).expect("registered");
    assert!(engine.is_registered(&instance));
    engine.end_session(second, Duration::from_secs(1)).expect("ended");
    assert!(!engine.is_registered(&instance));
    engine.end_session(first, Duration::from_secs(1)).expect("ended");
    assert_eq!(engine.stats().instances, 0);
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let worker = Worker::new(ByteSize::mib(16));
    let kind = |spec| worker.engine.register(worker.session, spec).map_err(|error| error.kind());
    assert_eq!(kind(spec(&InstanceId("a".into()), 0, 1, 0)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(spec(&InstanceId("a".into()), 17, 1, 0)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(spec(&InstanceId("a".into()), BLOCK, 1, 1)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(spec(&InstanceId("".into()), BLOCK, 1, 0)), Err(ErrorKind::InvalidInput));
    let stranger = worker.engine.register(SessionId(999), spec(&InstanceId("a".into()), BLOCK, 1, 0));
    assert_eq!(stranger.map_err(|error| error.kind()), Err(ErrorKind::NotFound));
    let request =
        LookupRequest { instance: InstanceId("nobody".into()), group: 0, keys: keys(1, 1), lease: None, tag: 0 };
    assert_eq!(worker.engine.lookup(worker.session, &request).map_err(|e| e.kind()), Err(ErrorKind::NotFound));
    assert_eq!(worker.engine.stats().instances, 1);
}

#[test]
fn dram_that_is_full_of_leased_blocks_drops_saves_and_serves_again_afterwards() {
    let mut worker = Worker::new(ByteSize::mib(16));
    let mut leases = Vec::new();
    let mut dropped = 0;
    for seed in 0..64 {
        let keys = keys(BLOCKS, seed);
        dropped += worker.save(&keys, BlockKey::ROOT).dropped;
        let request = LookupRequest {
            instance: worker.instance.clone(),
            group: 0,
            keys,
            lease: Some(Duration::from_secs(60)),
            tag: seed.into(),
        };
        leases.extend(worker.engine.lookup(worker.session, &request).expect("looked up").lease);
    }
    assert!(dropped > 0);
    assert_eq!(
        worker.engine.stats().save_dropped_blocks + worker.engine.stats().save_orphan_blocks,
        u64::from(dropped)
    );
    leases.into_iter().for_each(|lease| worker.engine.release(lease));
    assert_eq!(worker.save(&keys(BLOCKS, 1000), BlockKey::ROOT).saved, BLOCKS);
}

#[test]
fn objects_are_put_replaced_and_removed() {
    let engine = Engine::open(EngineConfig { dram: ByteSize::mib(16), ..EngineConfig::default() }).expect("opens");
    assert!(engine.get(b"a").expect("open").is_none());
    engine.put(b"a", b"one").expect("room");
    let one = engine.get(b"a").expect("open").expect("there");
    engine.put(b"a", &[2; 100_000]).expect("room");
    assert_eq!(&*one, b"one");
    assert_eq!(engine.get(b"a").expect("open").as_deref(), Some(&[2; 100_000][..]));
    assert!(engine.contains(b"a") && engine.remove(b"a").expect("open"));
    assert!(!engine.contains(b"a") && !engine.remove(b"a").expect("open"));
    assert_eq!(engine.put(b"b", b"").map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    assert_eq!(engine.put(b"b", &vec![0; 5 << 20]).map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    engine.close(Instant::now() + Duration::from_secs(5)).expect("closed");
    assert_eq!(engine.put(b"a", b"x").map_err(|error| error.kind()), Err(ErrorKind::Closed));
    assert_eq!(engine.get(b"a").map(|_| ()).map_err(|error| error.kind()), Err(ErrorKind::Closed));
}
