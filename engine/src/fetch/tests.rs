use std::sync::mpsc::{Receiver, channel};

use pegaflow_tiers::{
    BlockIo, BlockKey, CodecChoice, FileId, GroupGeometry, IoKind, IoRequest, KeyChain, NamespaceDescriptor, ReadDepth,
    RecordKind,
};

use super::*;
use crate::api::{InstanceId, InstanceSpec, LoadQuestion, LookupReply, LookupRequest};
use crate::arbiter::LoadPolicy;
use crate::config::{ByteSize, EngineConfig, NvmeConfig};
use crate::engine::Engine;
use crate::policy::PolicyChoice;
use crate::scheduler::Asked;
use crate::spill::spill;

const BLOCK: usize = 60 << 10;
const DRAM_MIB: u64 = 16;
/// Blocks that fit into DRAM.
const DRAM_BLOCKS: u32 = 256;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Keeps prefetches from the drive while it is shut, and notes what was asked of it.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
}

#[derive(Default)]
struct GateState {
    is_shut: bool,
    held: Vec<(Arc<dyn BlockIo>, IoRequest)>,
    prefetches: usize,
    others: usize,
}

impl Gate {
    fn shut(&self) {
        self.state.lock().is_shut = true;
    }

    fn open(&self) {
        let mut state = self.state.lock();
        state.is_shut = false;
        let held = std::mem::take(&mut state.held);
        drop(state);
        for (io, request) in held {
            assert!(io.submit(request).is_ok());
        }
    }

    fn prefetches(&self) -> usize {
        self.state.lock().prefetches
    }
}

struct Gated {
    io: Arc<dyn BlockIo>,
    gate: Arc<Gate>,
}

impl BlockIo for Gated {
    fn name(&self) -> &'static str {
        self.io.name()
    }

    fn depth(&self) -> usize {
        self.io.depth()
    }

    fn submit(&self, request: IoRequest) -> std::result::Result<(), (IoRequest, Error)> {
        let mut state = self.gate.state.lock();
        if request.kind == IoKind::Read && request.priority == IoPriority::Prefetch {
            state.prefetches += 1;
            if state.is_shut {
                state.held.push((Arc::clone(&self.io), request));
                return Ok(());
            }
        } else if request.kind == IoKind::Read {
            state.others += 1;
        }
        drop(state);
        self.io.submit(request)
    }

    fn set_read_depth(&self, file: FileId, depth: ReadDepth) {
        self.io.set_read_depth(file, depth);
    }

    fn close(&self) {
        self.gate.open();
        self.io.close();
    }
}

struct Rig {
    engine: Engine,
    gate: Arc<Gate>,
    session: SessionId,
    place: RecordId,
    directory: tempfile::TempDir,
    policy: PolicyChoice,
}

impl Rig {
    fn new(policy: PolicyChoice) -> Self {
        Self::open(tempfile::tempdir_in(std::env::temp_dir()).expect("a directory"), policy)
    }

    fn open(directory: tempfile::TempDir, policy: PolicyChoice) -> Self {
        let nvme = NvmeConfig {
            region: Some(ByteSize::mib(4)),
            codec: CodecChoice::None,
            ..NvmeConfig::new(directory.path().join("store"), ByteSize::mib(128))
        };
        let config =
            EngineConfig { dram: ByteSize::mib(DRAM_MIB), nvme: Some(nvme), policy, ..EngineConfig::default() };
        let gate = Arc::<Gate>::default();
        let of_io = Arc::clone(&gate);
        let wrap = move |io| -> Arc<dyn BlockIo> { Arc::new(Gated { io, gate: Arc::clone(&of_io) }) };
        let engine = Engine::open_wrapped(config, wrap).expect("opens");
        let session = engine.start_session();
        let instance = InstanceId("i".into());
        let spec = InstanceSpec {
            instance: instance.clone(),
            namespace: NamespaceDescriptor::new().with("model", "test"),
            groups: vec![GroupGeometry { group: 0, block_bytes: BLOCK as u64, shards: 1 }],
            shard: 0,
            keeps_all: false,
        };
        engine.register(session, spec).expect("registered");
        let namespace = engine.inner().expect("open").registry.view(&instance, 0).expect("known").namespace;
        let place = RecordId { namespace, group: 0, shard: 0, key: BlockKey::ROOT };
        Self { engine, gate, session, place, directory, policy }
    }

    /// The same store with nothing in DRAM.
    fn again(self) -> Self {
        self.engine.close(soon()).expect("closed");
        Self::open(self.directory, self.policy)
    }

    fn inner(&self) -> &Arc<Inner> {
        self.engine.inner().expect("open")
    }

    /// Saves a chain, and waits until it is durable.
    fn save(&self, first: u32, length: u32) -> Vec<RecordId> {
        let inner = self.inner();
        let mut keys = KeyChain::new();
        let mut ids = Vec::new();
        for depth in 0..length {
            let parent = keys.parent();
            let id = self.place.with_key(keys.next(&[first, depth], b""));
            let mut slot = inner.residency.alloc_until(BLOCK, true, soon()).expect("room");
            slot.payload_mut().copy_from_slice(&pattern(&id));
            let block = Resident::new(id, (parent, depth), Arc::new(slot), BLOCK as u64, true);
            drop(inner.residency.insert(Arc::clone(&block), false));
            spill(inner, &block, RecordKind::Kv);
            ids.push(id);
        }
        self.engine.flush(soon()).expect("durable");
        let slot_bytes = Arena::slot_bytes(BLOCK);
        inner.residency.touch_chain(ids.iter().map(|id| (id, slot_bytes)));
        ids
    }

    fn wish(&self, ids: &[RecordId], reason: FetchReason) -> (FetchWish, Receiver<FetchEnd>) {
        let store = self.inner().drive.store().expect("a store");
        let (sender, receiver) = channel();
        let wish = FetchWish {
            reads: ids.iter().map(|id| (*id, store.locate(id).expect("on the drive"))).collect(),
            store: Arc::downgrade(&store),
            block_bytes: BLOCK as u64,
            reason,
            asked: 0,
            asked_at: (reason != FetchReason::HotSet).then(|| self.inner().residency.tick()),
            deadline: soon(),
            done: Some(Box::new(move |end| sender.send(end).expect("waiting"))),
        };
        (wish, receiver)
    }

    fn fetch(&self, ids: &[RecordId], reason: FetchReason) -> FetchEnd {
        let (wish, end) = self.wish(ids, reason);
        self.inner().fetches.push(wish).expect("queued");
        end.recv_timeout(Duration::from_secs(60)).expect("ended")
    }

    fn request(&self, tag: u64) -> FetchReason {
        FetchReason::Request { session: self.session, tag }
    }

    fn totals(&self, reason: FetchReason) -> FetchTotals {
        self.inner().fetches.totals(reason)
    }

    fn wait(&self, what: impl Fn(&Self) -> bool) {
        let deadline = soon();
        while !what(self) {
            assert!(Instant::now() < deadline, "it does not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn pattern(id: &RecordId) -> Vec<u8> {
    id.key.as_bytes().iter().copied().cycle().enumerate().map(|(i, byte)| byte ^ (i / 32) as u8).take(BLOCK).collect()
}

#[test]
fn what_is_fetched_is_in_dram_bit_for_bit_and_clean() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.save(1, 40);
    let rig = rig.again();
    let ids: Vec<RecordId> = rig.save(1, 0).into_iter().chain(chain_ids(&rig, 1, 40)).collect();
    assert!(ids.iter().all(|id| !rig.inner().residency.contains(id)));
    let end = rig.fetch(&ids, rig.request(1));
    assert_eq!((end.blocks, end.is_whole), (40, true));
    assert!(end.bytes >= 40 * BLOCK as u64 && end.took > Duration::ZERO);
    for id in &ids {
        let block = rig.inner().residency.get(id).expect("in DRAM");
        assert!(!block.is_dirty() && block.slot.payload()[..BLOCK] == pattern(id), "wrong bytes");
    }
    assert_eq!(rig.fetch(&ids, rig.request(2)).blocks, 0, "they are there");
    let totals = rig.totals(FetchReason::REQUEST);
    assert_eq!((totals.blocks, totals.used_blocks, totals.wasted_blocks), (40, 0, 0));

    // A load uses the first ten of them once, however often it comes; the others leave before anybody asks.
    let residency = &rig.inner().residency;
    for _ in 0..2 {
        let loaded: Vec<_> = ids.iter().take(10).filter_map(|id| residency.get(id)).collect();
        residency.note_loaded(loaded.iter());
    }
    let held: Vec<_> = std::iter::from_fn(|| residency.alloc(BLOCK)).collect();
    assert_eq!(held.len() as u32, DRAM_BLOCKS);
    let totals = rig.totals(FetchReason::REQUEST);
    assert_eq!((totals.used_blocks, totals.wasted_blocks), (10, 30));
    assert_eq!(totals.wasted_bytes, 30 * Arena::slot_bytes(BLOCK) as u64);
}

fn chain_ids(rig: &Rig, first: u32, length: u32) -> Vec<RecordId> {
    let mut keys = KeyChain::new();
    (0..length).map(|depth| rig.place.with_key(keys.next(&[first, depth], b""))).collect()
}

#[test]
fn a_damaged_block_is_left_out_and_ends_a_chain_but_not_a_hot_set() {
    for reason in [FetchReason::REQUEST, FetchReason::HotSet] {
        let rig = Rig::new(PolicyChoice::Pegaflow);
        let ids = rig.save(1, 200);
        rig.engine.close(soon()).expect("closed");
        let path = rig.directory.path().join("store/regions.0");
        let mut bytes = std::fs::read(&path).expect("the region file");
        let part = &pattern(&ids[5])[..64];
        let at = bytes.windows(64).position(|window| window == part).expect("on the drive");
        bytes[at + 7] ^= 1;
        std::fs::write(&path, bytes).expect("written");
        let rig = Rig::open(rig.directory, rig.policy);
        let end = rig.fetch(&ids, reason);
        assert!(!end.is_whole && !rig.inner().residency.contains(&ids[5]));
        let totals = rig.totals(reason);
        assert_eq!((totals.failed_blocks, totals.blocks), (1, end.blocks));
        if reason == FetchReason::HotSet {
            assert_eq!(end.blocks, 199);
        } else {
            assert!(totals.cancelled_blocks > 0 && totals.cancelled_blocks + end.blocks == 199, "{totals:?}");
        }
    }
}

#[test]
fn a_cancelled_wish_starts_no_read_and_few_are_in_flight() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.save(1, 150);
    let rig = rig.again();
    let ids = chain_ids(&rig, 1, 150);
    rig.gate.shut();
    let (wish, end) = rig.wish(&ids, rig.request(7));
    rig.inner().fetches.push(wish).expect("queued");
    let in_flight = (DRAM_MIB << 20) / DRAM_PART / BLOCK as u64 + 1;
    rig.wait(|rig| rig.gate.prefetches() as u64 == in_flight);
    let other = SessionId(rig.session.0 + 1);
    assert!(!rig.inner().fetches.cancel(other, 7) && !rig.inner().fetches.cancel(rig.session, 8));
    assert!(rig.inner().fetches.left_bytes(rig.request(7)).is_some_and(|left| left > 0));
    assert!(rig.inner().fetches.cancel(rig.session, 7));
    assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok(FetchEnd::default()));
    assert_eq!(rig.inner().fetches.left_bytes(rig.request(7)), None);
    rig.gate.open();
    rig.wait(|rig| rig.totals(FetchReason::REQUEST).blocks == in_flight);
    rig.wait(|rig| rig.inner().fetches.reading().is_empty());
    assert_eq!(rig.gate.prefetches() as u64, in_flight, "nothing was started after the cancel");
    assert_eq!(rig.totals(FetchReason::REQUEST).cancelled_blocks, 150 - in_flight);
    assert_eq!(rig.inner().residency.gauges().0, in_flight, "what came is kept");

    // As with the end of a session.
    rig.gate.shut();
    let (wish, end) = rig.wish(&ids[100..], rig.request(7));
    rig.inner().fetches.push(wish).expect("queued");
    rig.engine.end_session(rig.session, Duration::from_secs(1)).expect("ended");
    assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok(FetchEnd::default()));
}

#[test]
fn a_wish_ends_at_its_deadline_although_the_drive_stands_still() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.save(1, 64);
    let rig = rig.again();
    rig.gate.shut();
    let (mut wish, end) = rig.wish(&chain_ids(&rig, 1, 64), rig.request(1));
    wish.deadline = Instant::now() + Duration::from_millis(50);
    rig.inner().fetches.push(wish).expect("queued");
    assert!(!end.recv_timeout(Duration::from_secs(60)).expect("ended").is_whole);
    rig.wait(|rig| rig.totals(FetchReason::REQUEST).cancelled_blocks == 64 - 35);
    assert_eq!(rig.gate.prefetches(), 35);
    // A close with reads in flight ends too.
    let (wish, end) = rig.wish(&chain_ids(&rig, 1, 64), FetchReason::HotSet);
    rig.inner().fetches.push(wish).expect("queued");
    rig.engine.close(soon()).expect("closed");
    assert!(!end.recv_timeout(Duration::from_secs(60)).expect("ended").is_whole);
}

#[test]
fn full_dram_is_not_emptied_for_what_nobody_asks_for() {
    for policy in PolicyChoice::ALL {
        let rig = Rig::new(policy);
        rig.save(1, 64);
        let rig = rig.again();
        let hot: Vec<_> = (2..10).map(|first| rig.save(first, DRAM_BLOCKS / 8)).collect();
        let wanted = chain_ids(&rig, 1, 64);
        let evicted = rig.engine.stats().dram_evicted_blocks;
        let end = rig.fetch(&wanted, FetchReason::HotSet);
        assert_eq!((end.blocks, end.is_whole), (0, false), "{policy}");
        assert_eq!(rig.totals(FetchReason::HotSet).no_room_blocks, 64, "{policy}");
        assert_eq!(rig.engine.stats().dram_evicted_blocks, evicted, "{policy}");
        assert!(hot.iter().flatten().all(|id| rig.inner().residency.contains(id)), "{policy}");
        // A look takes what it needs all the same: the arbiter must not stay blind.
        let look = rig.fetch(&wanted[..4], FetchReason::LookAside);
        assert_eq!((look.blocks, look.is_whole), (4, true), "{policy}");
    }
}

/// Where the policy only knows an order, who was used before the request came makes room for it; but nobody who came or was
/// used since, and no block that another fetch has brought.
#[test]
fn what_is_asked_for_takes_the_place_of_what_was_used_before_it() {
    for policy in [PolicyChoice::Lru, PolicyChoice::S3Fifo, PolicyChoice::Arc] {
        let rig = Rig::new(policy);
        drop((rig.save(1, 128), rig.save(2, 64)));
        let rig = rig.again();
        let old: Vec<_> = (11..19).flat_map(|first| rig.save(first, DRAM_BLOCKS / 8)).collect();
        let residency = &rig.inner().residency;
        let wanted = chain_ids(&rig, 1, 128);
        let wishes: Vec<_> = (1..).zip(wanted.chunks(32)).map(|(tag, part)| rig.wish(part, rig.request(tag))).collect();
        let slot_bytes = Arena::slot_bytes(BLOCK);
        // All but the first three chains are used after the requests came.
        residency.touch_chain(old[96..].iter().map(|id| (id, slot_bytes)));
        for (tag, (wish, end)) in (1..).zip(wishes) {
            rig.inner().fetches.push(wish).expect("queued");
            let end = end.recv_timeout(Duration::from_secs(60)).expect("ended");
            assert_eq!(end.blocks, if tag <= 3 { 32 } else { 0 }, "{policy}, {tag}");
            rig.inner().fetches.cancel(rig.session, tag);
        }
        assert!(old[96..].iter().all(|id| residency.contains(id)), "{policy}: a hotter block has left");
        let end = rig.fetch(&chain_ids(&rig, 2, 64), rig.request(9));
        let (came, left) = (end.blocks as usize, old.iter().filter(|id| !residency.contains(id)).count());
        assert!(wanted[..96].iter().all(|id| residency.contains(id)), "{policy}: a fetched block has left");
        assert_eq!((came, left), (64, 96 + 64), "{policy}");
    }
}

#[test]
fn without_room_a_request_waits_until_the_policies_know_it_and_no_longer() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.save(1, 8);
    let rig = rig.again();
    (2..10).for_each(|first| drop(rig.save(first, DRAM_BLOCKS / 8)));
    let ids = chain_ids(&rig, 1, 8);
    let (mut wish, end) = rig.wish(&ids, rig.request(1));
    wish.asked = rig.inner().requests.handed() + 1;
    rig.inner().fetches.push(wish).expect("queued");
    rig.wait(|rig| rig.inner().fetches.shared.state.lock().queue.is_held_up());
    assert_eq!((rig.totals(FetchReason::REQUEST).no_room_blocks, end.try_recv().is_err()), (0, true));
    let prefixes = ids.iter().map(|id| id.key.prefix()).collect();
    let (session, slot_bytes) = (rig.session, Arena::slot_bytes(BLOCK));
    rig.inner().requests.push(Asked { session, tag: 1, place: rig.place, shards: 1, slot_bytes, prefixes });
    let end = end.recv_timeout(Duration::from_secs(60)).expect("ended");
    assert_eq!(end.blocks + rig.totals(FetchReason::REQUEST).no_room_blocks, 8);
}

fn lookup(rig: &Rig, ids: &[RecordId], tag: u64, prefetch: bool) -> LookupReply {
    let request = LookupRequest {
        instance: InstanceId("i".into()),
        tenant: None,
        group: 0,
        keys: ids.iter().map(|id| id.key).collect(),
        lease: Some(Duration::from_secs(60)),
        tag,
        with_places: true,
        question: Some(LoadQuestion { first_block: 10, block_tokens: 16, ..LoadQuestion::default() }),
        prefetch,
    };
    rig.engine.lookup(rig.session, &request).expect("looked up")
}

#[test]
fn a_lookup_for_a_request_that_waits_fetches_what_would_be_loaded_until_its_lease_ends() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.save(1, 70);
    let rig = rig.again();
    let ids = chain_ids(&rig, 1, 70);
    rig.gate.shut();
    rig.engine.set_load_policy(LoadPolicy::Never);
    assert_eq!(lookup(&rig, &ids, 1, true).lease, None);
    assert_eq!(rig.inner().fetches.left_bytes(rig.request(1)), None, "what is computed is not fetched");
    rig.engine.set_load_policy(LoadPolicy::Auto);
    assert!(lookup(&rig, &ids, 1, false).lease.is_some());
    assert_eq!(rig.inner().fetches.left_bytes(rig.request(1)), None, "nobody asked for it");

    let first = lookup(&rig, &ids, 1, true);
    assert_eq!((first.hit_blocks, first.dram_blocks, first.places.is_some()), (70, 0, false));
    let left = rig.inner().fetches.left_bytes(rig.request(1)).expect("a wish");
    assert!((60 * BLOCK as u64..70 * BLOCK as u64).contains(&left), "{left}: the first ten are the asker's own");
    // Asked again it keeps its place before the next one.
    let other = lookup(&rig, &ids[..20], 2, true);
    assert!(lookup(&rig, &ids, 1, true).lease.is_some());
    let lefts = [1, 2].map(|tag| rig.inner().fetches.left_bytes(rig.request(tag)));
    assert!(lefts[0] < lefts[1] && lefts[0].is_some(), "{lefts:?}");
    rig.engine.release(other.lease.expect("leased"));
    assert_eq!(rig.inner().fetches.left_bytes(rig.request(2)), None, "it ends with its lease");

    rig.gate.open();
    rig.wait(|rig| rig.inner().fetches.left_bytes(rig.request(1)).is_none());
    let ready = lookup(&rig, &ids[10..], 3, true);
    assert_eq!((ready.hit_blocks, ready.dram_blocks, ready.places.is_some()), (60, 60, true));
    assert_eq!((ready.fetch_us, rig.totals(FetchReason::REQUEST).blocks), (0, 60));
    assert!(ids[..10].iter().all(|id| !rig.inner().residency.contains(id)));
    rig.engine.consume(ready.lease.expect("leased"), 0);
    assert_eq!(rig.totals(FetchReason::REQUEST).used_blocks, 60);
}

#[test]
fn a_record_of_another_size_is_left_out() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.save(1, 4);
    let rig = rig.again();
    let (mut wish, end) = rig.wish(&chain_ids(&rig, 1, 4), FetchReason::HotSet);
    wish.block_bytes *= 2;
    rig.inner().fetches.push(wish).expect("queued");
    assert_eq!(end.recv_timeout(Duration::from_secs(60)).expect("ended").blocks, 0);
    assert_eq!((rig.totals(FetchReason::HotSet).failed_blocks, rig.inner().residency.gauges().0), (4, 0));
}

#[test]
fn objects_are_not_fetched() {
    let rig = Rig::new(PolicyChoice::Pegaflow);
    rig.engine.put(b"name", &[7; BLOCK]).expect("put");
    rig.engine.flush(soon()).expect("durable");
    let object = rig.inner().residency.ids()[0];
    assert!(rig.engine.remove(b"name").expect("removed"));
    let (wish, end) = rig.wish(&[object], FetchReason::HotSet);
    rig.inner().fetches.push(wish).expect("queued");
    assert_eq!(end.recv_timeout(Duration::from_secs(60)).expect("ended").blocks, 0);
    assert!(!rig.engine.contains(b"name"), "a removal was undone");
}
