//! What policies cost: CPU time for each block that a request touches, and memory for each block in the tier.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pegaflow_engine::{MissRatioCurve, PegaflowConfig, Policy, PolicyBlock, PolicyChoice, PolicyRequest, SizePolicies};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, json};

/// Blocks of a conversation's first turn, and of each further one.
const FIRST_BLOCKS: u32 = 16;
const TURN_BLOCKS: u32 = 4;
/// Blocks touched while the clock runs.
const TOUCHES: usize = 4_000_000;
const REQUESTS_PER_S: u64 = 1000;

/// Prints a table, and a JSON object as the last line; with `is_json` that object only.
pub(super) fn measure(blocks: u64, policies: &[PolicyChoice], namespaces: Option<u64>, is_json: bool) {
    if !is_json {
        println!("{:<10} {:>16} {:>16}", "policy", "ns per touch", "bytes per block");
    }
    let mut report = Map::new();
    for choice in policies {
        let before = resident_bytes();
        let config = PegaflowConfig { remembered_max: 1 << 16, ..PegaflowConfig::default() };
        let policy = match namespaces {
            Some(_) => Box::new(Shared::new(*choice, config, blocks)),
            None => choice.build(blocks, config),
        };
        let mut load = Load::new(policy, blocks as usize);
        load.namespaces = namespaces.unwrap_or(1);
        while load.policy.len() < blocks as usize {
            load.request();
        }
        let bytes = resident_bytes().saturating_sub(before) as f64 / blocks as f64;
        // Until the tier's blocks have begun to leave.
        load.run(TOUCHES / 4);
        let started = cpu_ns();
        let touches = load.run(TOUCHES);
        let ns = cpu_ns().saturating_sub(started) as f64 / touches as f64;
        if !is_json {
            println!("{:<10} {ns:>16.0} {bytes:>16.0}", choice.name());
        }
        report.insert(choice.name().into(), json!({ "ns_per_touch": ns, "bytes_per_block": bytes }));
    }
    let curve_ns = measure_curve(blocks);
    if !is_json {
        println!("{:<10} {curve_ns:>16.0}", "curve");
    }
    let mut all = json!({ "blocks": blocks, "policies": report, "curve_ns_per_touch": curve_ns });
    if let (Some(all), Some(namespaces)) = (all.as_object_mut(), namespaces) {
        all.insert("namespaces".into(), namespaces.into());
    }
    println!("{all}");
}

/// The same for the live miss-ratio curve, as a server keeps it, once so many blocks were touched.
fn measure_curve(blocks: u64) -> f64 {
    let mut load = Load::new(PolicyChoice::Fifo.build(1, PegaflowConfig::default()), 1);
    let mut curve = MissRatioCurve::new(8192);
    let mut ask = |touches: usize| {
        let (mut done, mut ns) = (0, 0);
        while done < touches {
            load.ask();
            let started = cpu_ns();
            curve.request(&load.chain);
            ns += cpu_ns().saturating_sub(started);
            done += load.chain.len();
        }
        ns as f64 / done as f64
    };
    ask(blocks as usize);
    ask(TOUCHES)
}

/// The policies of all namespaces as one, each block of one byte.
struct Shared {
    policies: SizePolicies,
    now_ms: Arc<AtomicU64>,
    /// Of the last request.
    tenant: u64,
    blocks: usize,
}

impl Shared {
    const SLOT_BYTES: usize = 1;

    fn new(choice: PolicyChoice, config: PegaflowConfig, blocks: u64) -> Self {
        let now_ms = Arc::new(AtomicU64::new(0));
        let clock = now_ms.clone();
        let clock = Box::new(move || clock.load(Ordering::Relaxed));
        Self { policies: SizePolicies::new(choice, config, blocks, clock), now_ms, tenant: 0, blocks: 0 }
    }
}

impl Policy for Shared {
    fn request(&mut self, request: &PolicyRequest<'_>) {
        self.now_ms.store(request.now_ms, Ordering::Relaxed);
        self.tenant = request.tenant;
        let keys = request.chain.iter().map(|block| block.key);
        self.policies.request(Self::SLOT_BYTES, true, request.tenant, keys);
    }

    fn insert(&mut self, block: &PolicyBlock, parent: Option<u64>) {
        self.policies.enter(Self::SLOT_BYTES, block.key, parent, self.tenant);
        self.blocks += 1;
    }

    fn evict(&mut self, may_leave: &mut dyn FnMut(u64) -> bool) -> Option<u64> {
        let victim = self.policies.evict(Self::SLOT_BYTES, may_leave)?;
        self.blocks -= 1;
        Some(victim)
    }

    /// Nothing leaves here but by eviction.
    fn remove(&mut self, _key: u64) {}

    fn contains(&self, key: u64) -> bool {
        self.policies.contains(Self::SLOT_BYTES, key, self.tenant)
    }

    fn len(&self) -> usize {
        self.blocks
    }

    fn takes_last_first(&self) -> bool {
        self.policies.take_last_first()
    }
}

/// Conversations that begin all the time; every other request goes on with one of the past.
struct Load {
    policy: Box<dyn Policy>,
    capacity: usize,
    random: StdRng,
    /// Blocks of each conversation so far.
    conversations: Vec<u32>,
    requests: u64,
    /// Which the conversations belong to in turn, from number 1 on.
    namespaces: u64,
    /// Of the last request.
    tenant: u64,
    chain: Vec<PolicyBlock>,
}

impl Load {
    fn new(policy: Box<dyn Policy>, capacity: usize) -> Self {
        let random = StdRng::seed_from_u64(1);
        let (conversations, chain) = (Vec::new(), Vec::new());
        Self { policy, capacity, random, conversations, requests: 0, namespaces: 1, tenant: 0, chain }
    }

    fn run(&mut self, touches: usize) -> usize {
        let mut done = 0;
        while done < touches {
            done += self.request();
        }
        done
    }

    /// The next request's chain.
    fn ask(&mut self) {
        self.requests += 1;
        let at = if self.requests.is_multiple_of(2) && !self.conversations.is_empty() {
            self.random.random_range(0..self.conversations.len())
        } else {
            self.conversations.push(0);
            self.conversations.len() - 1
        };
        self.tenant = 1 + at as u64 % self.namespaces;
        let Some(blocks) = self.conversations.get_mut(at) else { return };
        *blocks += if *blocks == 0 { FIRST_BLOCKS } else { TURN_BLOCKS };
        let key =
            |depth: u32| (((at as u64) << 24) | u64::from(depth)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        let blocks = 0..*blocks;
        self.chain.clear();
        self.chain.extend(blocks.map(|depth| PolicyBlock { key: key(depth), bytes: 1 }));
    }

    fn request(&mut self) -> usize {
        self.ask();
        let now_ms = self.requests * 1000 / REQUESTS_PER_S;
        self.policy.request(&PolicyRequest { chain: &self.chain, tenant: self.tenant, now_ms });
        let last_first = self.policy.takes_last_first();
        for step in 0..self.chain.len() {
            let place = if last_first { self.chain.len() - 1 - step } else { step };
            let Some(block) = self.chain.get(place) else { continue };
            let parent = place.checked_sub(1).and_then(|before| self.chain.get(before)).map(|parent| parent.key);
            if self.policy.contains(block.key) {
                self.policy.touch(block.key);
                continue;
            }
            let is_full = self.policy.len() >= self.capacity;
            if self.policy.admits(block, parent, is_full) && (!is_full || self.policy.evict(&mut |_| true).is_some()) {
                self.policy.insert(block, parent);
            }
        }
        self.chain.len()
    }
}

/// What this thread has computed for, in ns.
fn cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What this process has in memory.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
