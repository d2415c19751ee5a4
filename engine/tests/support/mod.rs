//! A worker of a made-up engine, with KV memory of its own.
#![expect(unsafe_code, reason = "registers memory of the test as a device's")]
#![allow(
    dead_code,
    clippy::expect_used,
    clippy::allow_attributes,
    reason = "a test that cannot go on panics; each test uses its part"
)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use pegaflow_engine::*;

pub(crate) const BLOCK: u64 = 4096 + 64;
pub(crate) const BLOCKS: u32 = 64;

pub(crate) struct Memory {
    bytes: Box<[u8]>,
    pub(crate) device: Arc<HostMemory>,
}

pub(crate) fn memory() -> Memory {
    let mut bytes = vec![0u8; (BLOCK * u64::from(BLOCKS)) as usize].into_boxed_slice();
    let start = NonNull::new(bytes.as_mut_ptr()).expect("not null");
    let fragments = vec![Fragment { offset: 0, stride: BLOCK, bytes: BLOCK }];
    // SAFETY: `Memory` keeps the bytes; tests touch them only when no copy runs.
    let device = unsafe { HostMemory::new(start, bytes.len() as u64, fragments, BLOCKS, Box::new(())) }.expect("fits");
    Memory { bytes, device: Arc::new(device) }
}

impl Memory {
    pub(crate) fn block(&mut self, block: u32) -> &mut [u8] {
        let at = (u64::from(block) * BLOCK) as usize;
        &mut self.bytes[at..at + BLOCK as usize]
    }
}

pub(crate) struct Worker {
    pub(crate) engine: Engine,
    pub(crate) session: SessionId,
    pub(crate) instance: InstanceId,
    pub(crate) memory: Memory,
    /// Which one it saves and loads.
    pub(crate) shard: u16,
    /// On whose behalf it asks and saves.
    pub(crate) tenant: Option<TenantId>,
    next: u64,
}

impl Worker {
    pub(crate) fn new(config: EngineConfig) -> Self {
        Self::of(Engine::open(config).expect("opens"))
    }

    pub(crate) fn of(engine: Engine) -> Self {
        let session = engine.start_session();
        let instance = InstanceId("test".into());
        engine.register(session, spec(&instance, BLOCK, 1, 0)).expect("registered");
        Self::beside(engine, session, instance)
    }

    /// One that has registered, or will.
    pub(crate) fn beside(engine: Engine, session: SessionId, instance: InstanceId) -> Self {
        Self { engine, session, instance, memory: memory(), shard: 0, tenant: None, next: 0 }
    }

    pub(crate) fn kv_cache(&self) -> Arc<dyn KvCache> {
        Arc::new(LocalKvCache::new(self.memory.device.clone(), self.engine.arena(), None))
    }

    pub(crate) fn fill(&mut self, block: u32, seed: u8) {
        self.memory.block(block).iter_mut().enumerate().for_each(|(i, byte)| *byte = (i as u8).wrapping_mul(31) ^ seed);
    }

    pub(crate) fn save(&mut self, keys: &[BlockKey], first_parent: BlockKey) -> SaveOutcome {
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
            target: SaveTarget {
                instance: self.instance.clone(),
                tenant: self.tenant.clone(),
                group: 0,
                shard: self.shard,
            },
            memory: self.kv_cache(),
            blocks,
        };
        self.engine.save(request, Box::new(move |outcome| sender.send(outcome).expect("waiting"))).expect("accepted");
        receiver.recv_timeout(Duration::from_secs(30)).expect("ended")
    }

    pub(crate) fn lookup(&self, keys: &[BlockKey]) -> LookupReply {
        let request = LookupRequest {
            instance: self.instance.clone(),
            tenant: self.tenant.clone(),
            group: 0,
            keys: keys.to_vec(),
            lease: Some(Duration::from_secs(60)),
            tag: 1,
            with_places: false,
            question: None,
            prefetch: false,
        };
        self.engine.lookup(self.session, &request).expect("looked up")
    }

    pub(crate) fn load(&mut self, lease: LeaseId, blocks: Vec<LoadBlock>) -> LoadOutcome {
        self.next += 1;
        let (sender, receiver) = bounded(1);
        let request = LoadRequest {
            session: self.session,
            operation: OperationId(self.next),
            lease,
            shard: self.shard,
            memory: self.kv_cache(),
            blocks,
        };
        self.engine.load(request, Box::new(move |outcome| sender.send(outcome).expect("waiting"))).expect("accepted");
        receiver.recv_timeout(Duration::from_secs(30)).expect("ended")
    }
}

pub(crate) fn spec(instance: &InstanceId, block_bytes: u64, shards: u16, shard: u16) -> InstanceSpec {
    InstanceSpec {
        instance: instance.clone(),
        namespace: NamespaceDescriptor::new().with("model", "test"),
        groups: vec![GroupGeometry { group: 0, block_bytes, shards }],
        shard,
        keeps_all: false,
    }
}

pub(crate) fn keys(count: u32, seed: u32) -> Vec<BlockKey> {
    let mut chain = KeyChain::new();
    (0..count).map(|i| chain.next(&[seed, i], b"")).collect()
}

/// The namespace of [`spec`] is known with blocks of `BLOCK`: nobody registers it otherwise, under whatever name, and
/// whoever tried is as before.
pub(crate) fn assert_geometry_is_kept(engine: &Engine, session: SessionId) {
    let instance = InstanceId("test".into());
    let other_session = engine.start_session();
    for session in [session, other_session] {
        for instance in [&instance, &InstanceId("other".into())] {
            let error = engine.register(session, spec(instance, BLOCK * 2, 1, 0)).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::GeometryMismatch, "{error}");
        }
    }
    engine.end_session(other_session, Duration::from_secs(1)).expect("ended");
    assert!(engine.is_registered(&instance));
    let mut other = spec(&instance, BLOCK * 2, 1, 0);
    other.namespace = other.namespace.with("dtype", "other");
    engine.register(session, other).expect("another namespace");
    engine.register(session, spec(&instance, BLOCK, 1, 0)).expect("the same as at first");
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// The bytes of a block: no two keys have the same.
pub(crate) fn expected(key: &BlockKey) -> Vec<u8> {
    let bytes = key.as_bytes().iter().copied().cycle().enumerate();
    bytes.map(|(i, byte)| byte ^ (i / 32) as u8).take(BLOCK as usize).collect()
}

/// Saves a chain of blocks with the bytes that are expected of them; durable when it returns.
pub(crate) fn save(worker: &mut Worker, keys: &[BlockKey]) {
    for (block, key) in keys.iter().enumerate() {
        worker.memory.block(block as u32).copy_from_slice(&expected(key));
    }
    // As vLLM does: it asks, finds nothing, computes and saves.
    worker.lookup(keys);
    assert_eq!(worker.save(keys, BlockKey::ROOT).saved, keys.len() as u32);
    worker.engine.flush(soon()).expect("durable");
}

/// Loads what is found of a chain and compares; (from DRAM, from the drive).
pub(crate) fn read(worker: &mut Worker, keys: &[BlockKey]) -> (u32, u32) {
    let reply = worker.lookup(keys);
    let Some(lease) = reply.lease else { return (0, 0) };
    (0..BLOCKS).for_each(|block| worker.memory.block(block).fill(0xa5));
    let outcome = worker.load(lease, (0..reply.hit_blocks).map(|index| LoadBlock { index, block: index }).collect());
    assert_eq!(outcome.failed.len(), 0);
    for (index, key) in keys.iter().enumerate().take(reply.hit_blocks as usize) {
        assert!(worker.memory.block(index as u32) == expected(key), "wrong bytes in block {index}");
    }
    (outcome.loaded_dram, outcome.loaded_nvme)
}
