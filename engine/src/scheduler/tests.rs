//! The policies as DRAM really asks them: what a replay promises, and what outlives a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pegaflow_tiers::{Arena, ArenaConfig, BlockKey, NamespaceHandle, RecordId};

use super::*;
use crate::api::SessionId;
use crate::config::{ByteSize, EngineConfig, NvmeConfig};
use crate::engine::Engine;
use crate::policy::{PegaflowConfig, PolicyBlock, PolicyChoice};
use crate::replay::{ReplayTier, Synthetic, Trace, replay};
use crate::residency::{Residency, Resident};

const PAYLOAD: usize = 4096;
const SLOT: usize = 8192;

/// DRAM as it is, with a trace's own time and without a drive.
struct Dram {
    residency: Residency,
    now_ms: Arc<AtomicU64>,
}

impl Dram {
    fn new(choice: PolicyChoice, blocks: u64, config: PegaflowConfig) -> Self {
        let arena = ArenaConfig { touch: false, ..ArenaConfig::new(blocks * SLOT as u64) };
        let arena = Arena::new(arena).expect("memory");
        let now_ms = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&now_ms);
        let clock = Box::new(move || clock.load(Ordering::Relaxed));
        let policies = SizePolicies::new(choice, config, arena.capacity_bytes(), clock);
        Self { residency: Residency::new(arena, policies), now_ms }
    }

    fn id(block: &PolicyBlock) -> RecordId {
        // Uniform in all of its bytes, as a key is.
        let bytes = std::array::from_fn(|at| block.key.to_le_bytes()[at % 8]);
        RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::from_bytes(bytes) }
    }

    /// A request as a lookup, a load and a save make it; how many blocks from the first were here.
    fn ask(&self, chain: &[PolicyBlock]) -> u64 {
        let ids: Vec<RecordId> = chain.iter().map(Self::id).collect();
        let hits = ids.iter().take_while(|id| self.residency.contains(id)).count();
        let prefixes = chain.iter().map(|block| block.key).collect();
        let place = Self::id(&chain[0]);
        self.residency.request(&Asked { session: SessionId(1), tag: 0, place, shards: 1, slot_bytes: SLOT, prefixes });
        // A request holds its blocks until it has its bytes.
        let mut held: Vec<_> = ids.iter().filter_map(|id| self.residency.get(id)).collect();
        for (depth, id) in ids.iter().enumerate() {
            let parent = depth.checked_sub(1).map_or(BlockKey::ROOT, |before| ids[before].key);
            if !self.residency.contains(id)
                && let Some(slot) = self.residency.alloc(PAYLOAD)
            {
                let block = Resident::new(*id, (parent, depth as u32), Arc::new(slot), PAYLOAD as u64, false);
                held.push(self.residency.insert(block, false));
            }
        }
        drop(held);
        self.residency.touch_chain(ids.iter().map(|id| (id, SLOT)));
        hits as u64
    }

    fn hit_ratio(&self, trace: &Trace) -> f64 {
        let mut hits = 0;
        for request in trace.requests() {
            self.now_ms.store(request.now_ms, Ordering::Relaxed);
            hits += self.ask(request.blocks);
        }
        hits as f64 / trace.references() as f64
    }
}

#[test]
fn dram_serves_what_a_replay_promises() {
    // Memory has to take what is saved, whatever it is worth.
    let config = PegaflowConfig { write_hurdle: 0.0, ..PegaflowConfig::default() };
    let trace = Synthetic::Chat.trace(1);
    let mut best = 0.0f64;
    for policy in PolicyChoice::ALL {
        let promised = replay(&trace, &[ReplayTier { policy, capacity: 2048, config }], &mut |_| {}).hit_ratio(0);
        let served = Dram::new(policy, 2048, config).hit_ratio(&trace);
        println!("{policy}: {served:.4} served, {promised:.4} replayed");
        assert!(served > promised - 0.005, "{policy}: {served} for {promised}");
        best = best.max(served);
        assert!(policy != PolicyChoice::Pegaflow || served == best, "ours is behind: {served} for {best}");
    }
}

/// Asks for a chain of `blocks` one-block chains of a tenant, one after the other.
fn ask_of(dram: &Dram, tenant: u32, keys: impl Iterator<Item = u64>) -> usize {
    let mut hits = 0;
    for key in keys {
        let block = PolicyBlock { key: crate::policy::SplitMix::mix(key | u64::from(tenant) << 32), bytes: 1 };
        let id = RecordId { namespace: NamespaceHandle(tenant), ..Dram::id(&block) };
        hits += usize::from(dram.residency.contains(&id));
        let (place, prefixes) = (id, vec![id.key.prefix()]);
        dram.residency.request(&Asked { session: SessionId(1), tag: 0, place, shards: 1, slot_bytes: SLOT, prefixes });
        if !dram.residency.contains(&id)
            && let Some(slot) = dram.residency.alloc(PAYLOAD)
        {
            let block = Resident::new(id, (BlockKey::ROOT, 0), Arc::new(slot), PAYLOAD as u64, false);
            dram.residency.insert(block, false);
        }
        dram.residency.touch_chain([(&id, SLOT)].into_iter());
    }
    hits
}

#[test]
fn a_scan_of_one_tenant_leaves_another_what_is_guaranteed_to_it() {
    const BLOCKS: u64 = 2048;
    for policy in PolicyChoice::ALL {
        let dram = Dram::new(policy, BLOCKS, PegaflowConfig::default());
        // A little less than its guarantee, a quarter of DRAM; it has asked for it once, long before most of the scan.
        let hot = BLOCKS / 4 - 16;
        ask_of(&dram, 1, 0..hot);
        for part in 0..100 {
            dram.now_ms.fetch_add(1000, Ordering::Relaxed);
            ask_of(&dram, 2, part * BLOCKS..(part + 1) * BLOCKS);
        }
        let kept = ask_of(&dram, 1, 0..hot) as u64;
        assert_eq!(kept, hot, "{policy}");
        let lent = dram.residency.ids().iter().filter(|id| id.namespace == NamespaceHandle(2)).count() as u64;
        assert!(lent >= BLOCKS - hot - 16, "{policy}: {lent} for the scan, of what nobody else needs");
    }
}

#[test]
fn only_requests_teach_and_sizes_learn_by_themselves() {
    let mut policies = SizePolicies::new(PolicyChoice::Pegaflow, PegaflowConfig::default(), 1 << 20, Box::new(|| 5));
    assert!(policies.note().is_none());
    policies.request(SLOT, false, 0, [1, 2].into_iter());
    policies.enter(SLOT, 1, None, 0);
    assert!(policies.note().is_none() && !policies.contains(SLOT, 1, 7), "an object makes no policy");
    for size in 1..100 {
        policies.enter(size * SLOT, 1, None, 7);
    }
    assert!(policies.contains(16 * SLOT, 1, 7) && !policies.contains(17 * SLOT, 1, 7), "a bounded number of sizes");
    assert_eq!(policies.evict(17 * SLOT, &mut |_| true), None);
    assert_eq!(policies.evict(3 * SLOT, &mut |_| true), Some(1));
    let mut other = SizePolicies::new(PolicyChoice::Pegaflow, PegaflowConfig::default(), 1 << 20, Box::new(|| 5));
    let note = policies.note().expect("learned");
    assert!(note.len() < 64 << 10, "{} bytes", note.len());
    assert!(other.restore(&note) && !other.restore(b"damaged"));
    assert_eq!(other.note(), Some(note), "kept until it is used");
    let mut lru = SizePolicies::new(PolicyChoice::Lru, PegaflowConfig::default(), 1 << 20, Box::new(|| 5));
    lru.enter(SLOT, 1, None, 7);
    assert!(lru.note().is_none(), "it learns nothing");
}

fn config(path: &std::path::Path) -> EngineConfig {
    let nvme = NvmeConfig { region: Some(ByteSize::mib(4)), ..NvmeConfig::new(path.join("store"), ByteSize::mib(16)) };
    EngineConfig { dram: ByteSize::mib(16), nvme: Some(nvme), ..EngineConfig::default() }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Opens an engine, lets `work` use it, and closes it.
fn open(path: &std::path::Path, work: impl FnOnce(&Engine)) {
    let engine = Engine::open(config(path)).expect("opens");
    work(&engine);
    engine.close(soon()).expect("closed");
}

#[test]
fn what_was_learned_outlives_a_restart_and_damage_costs_only_that() {
    let directory = tempfile::tempdir_in(std::env::temp_dir()).expect("a directory");
    let learned = |engine: &Engine| engine.inner().expect("open").residency.learned();
    let mut taught = None;
    open(directory.path(), |engine| {
        assert_eq!(learned(engine), None);
        let requests = &engine.inner().expect("open").requests;
        for tag in 0..200 {
            let place = Dram::id(&PolicyBlock { key: 1, bytes: 1 });
            let prefixes = vec![tag % 7 + 1; 3];
            requests.push(Asked { session: SessionId(1), tag, place, shards: 1, slot_bytes: SLOT, prefixes });
        }
        while requests.counted.get() < 200 {
            assert_eq!(requests.dropped.get(), 0);
            std::thread::sleep(Duration::from_millis(1));
        }
        taught = learned(engine);
    });
    assert!(taught.is_some());
    open(directory.path(), |engine| {
        assert_eq!(learned(engine), taught);
        let store = engine.inner().expect("open").drive.store().expect("a store");
        let mut damaged = taught.clone().expect("a note");
        damaged[100] ^= 1;
        store.put_note(LEARNED_NOTE, &damaged).expect("kept");
    });
    // Nothing was asked for, so the close has kept nothing over it.
    open(directory.path(), |engine| assert_eq!(learned(engine), None, "damage is forgotten"));
}
