//! The words of the engine's interface: requests, replies, identities. Values only.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pegaflow_tiers::{
    ArenaId, BlockKey, DriveSpeed, DriveUse, GroupGeometry, KvCache, Latencies, NamespaceDescriptor, NamespaceId,
    Place, PoisonReason,
};
use serde::Serialize;

use crate::arbiter::{Decision, LoadPolicy};
use crate::tenants::TenantId;

/// Names one running inference engine; its workers register under it, its scheduler looks up under it.
/// vLLM's `kv_transfer_config.engine_id` with the data-parallel rank. At most 256 bytes of UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub Arc<str>);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One connected client: a scheduler or a worker. Its end frees all it held, after its copies have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// A promise that looked-up blocks stay readable until its time is over or it is consumed. Unguessable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(pub u128);

/// A load or a save in flight, chosen by the client, unique in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperationId(pub u64);

/// What a worker says of itself when it registers.
#[derive(Debug, Clone)]
pub struct InstanceSpec {
    /// The inference engine that it belongs to.
    pub instance: InstanceId,
    /// The identity of its bytes; equal for all workers of an instance.
    pub namespace: NamespaceDescriptor,
    /// The groups; equal for all workers of an instance. At least one, at most 64.
    pub groups: Vec<GroupGeometry>,
    /// Which shard this worker holds.
    pub shard: u16,
    /// Whether all that the instance saves is written to the drive, whatever the policy and the write budget say: it was
    /// asked for by name, as when a cache is warmed in advance. What is written counts in the budget. The instance does
    /// it as soon as one of its workers says so.
    pub keeps_all: bool,
}

/// Asks for the longest prefix that is there.
#[derive(Debug, Clone)]
pub struct LookupRequest {
    /// Whose namespace to look in.
    pub instance: InstanceId,
    /// On whose behalf. Only what was saved on the same behalf is found; `None` is one of its own, too.
    pub tenant: Option<TenantId>,
    /// The group.
    pub group: u16,
    /// The keys, in the order of the chain. At most 65,536.
    pub keys: Vec<BlockKey>,
    /// How long the lease on what was found is to last; `None` takes no lease. At most 10 minutes.
    pub lease: Option<Duration>,
    /// The name of the asker's request. A lookup repeated with the same tag replaces the earlier lease: lookups are
    /// idempotent.
    pub tag: u64,
    /// Tell where the blocks lie if all that were found are in DRAM, for a worker that copies them itself. The lease then
    /// outlives the session that took it.
    pub with_places: bool,
    /// Asks whether what is found is worth loading. Without it, and without a lease, nothing is decided, and what is found is
    /// leased.
    pub question: Option<LoadQuestion>,
    /// The request waits to be scheduled: what was found on the drive, is leased and lies behind the blocks that the asker
    /// has itself is brought to DRAM meanwhile, in the background. It ends with the lease: when that is loaded, released or
    /// over.
    pub prefetch: bool,
}

/// What an asker knows of a request whose prefix it looks up, for the decision whether to load it.
#[derive(Debug, Clone, Default)]
pub struct LoadQuestion {
    /// Its name for the request, by which the decision is explained later. Longer ones than 256 bytes are cut.
    pub request: String,
    /// How many blocks from the first on it has itself.
    pub first_block: u32,
    /// Tokens of a block. 0 counts as 1.
    pub block_tokens: u32,
    /// The share of the GPU's time that other requests want, 0 to 1.
    pub load_share: f32,
    /// Its own policy; `None`: the engine's. The engine's `never` outranks it.
    pub policy: Option<LoadPolicy>,
    /// What it has computed since it asked last. At most 256.
    pub computed: Vec<ComputedTokens>,
}

/// Tokens of one request that an inference engine has computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ComputedTokens {
    /// The decision on the request's prefix; 0: there was none.
    pub decision: u64,
    /// The first of them, by its place in the request.
    pub first_token: u32,
    /// One after the last.
    pub end_token: u32,
    /// The share of the GPU's time that other requests wanted, as the question had it, 0 to 1.
    pub load_share: f32,
    /// From the start of the first step that computed some of them to the end of the last.
    pub took: Duration,
}

/// A decision between loading and computing, as it is explained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DecisionRecord {
    /// The instance that asked.
    pub instance: String,
    /// Its name for the request.
    pub request: String,
    /// How long ago, in milliseconds.
    pub ago_ms: u64,
    /// In words.
    pub text: String,
    /// Whether the other way would have been faster, by its prediction.
    pub is_mistake: bool,
    /// What was asked, predicted, decided and seen. Times have seconds (`secs`) and nanoseconds (`nanos`).
    pub decision: Decision,
}

/// Where leased blocks lie in DRAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// Which arena.
    pub arena: ArenaId,
    /// For shard 0 the place of every block that was found, in order, then for shard 1, and so on.
    pub places: Vec<Place>,
}

/// Where a block was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HitTier {
    /// In DRAM: verified, ready to copy.
    Dram,
    /// On the drive: to be read and verified first; that may fail.
    Nvme,
}

/// Which namespace a question is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// That of an instance whose workers have all registered.
    Instance(InstanceId),
    /// This one, whether an instance is registered for it or not. Of one that is not known no block is there.
    Namespace(NamespaceId),
}

/// A question where blocks are, each by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocateRequest {
    /// Whose namespace to look in.
    pub whose: Whose,
    /// On whose behalf; only what was saved on the same behalf is there.
    pub tenant: Option<TenantId>,
    /// The group.
    pub group: u16,
    /// The keys, at most 65,536, in any order.
    pub keys: Vec<BlockKey>,
}

/// What a lookup found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct LookupReply {
    /// How many keys from the first on were found in all shards.
    pub hit_blocks: u32,
    /// How many of those are in DRAM in all shards.
    pub dram_blocks: u32,
    /// The lease on them, if one was asked for and something was found.
    #[serde(skip)]
    pub lease: Option<LeaseId>,
    /// Where they lie, if that was asked for, a lease was taken and all are in DRAM.
    #[serde(skip)]
    pub places: Option<Places>,
    /// The number of the decision whether to load them, 0 if there was none. After one against it there is no lease.
    pub decision: u64,
    /// Microseconds until all of them are expected to be in DRAM, where they are being fetched; 0 if they are not, or it is
    /// not known how fast the drives are.
    pub fetch_us: u64,
}

/// One block of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadBlock {
    /// Its place among the keys of the lookup that took the lease.
    pub index: u32,
    /// The block of the device's memory that it goes to.
    pub block: u32,
}

/// Copies leased blocks into a worker's KV cache.
#[derive(Clone)]
pub struct LoadRequest {
    /// The session that asks.
    pub session: SessionId,
    /// Its name for this load.
    pub operation: OperationId,
    /// The lease; this shard's share of it is consumed.
    pub lease: LeaseId,
    /// Which shard to load.
    pub shard: u16,
    /// Where to.
    pub memory: Arc<dyn KvCache>,
    /// Which blocks. At most 65,536.
    pub blocks: Vec<LoadBlock>,
}

/// How a load ended. No copy of it can write any more.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadOutcome {
    /// Blocks that are in the device's memory, bit for bit as they were saved.
    pub loaded_dram: u32,
    /// The same, read from the drive.
    pub loaded_nvme: u32,
    /// Device blocks that do not hold what was asked for; they are to be recomputed.
    pub failed: Vec<u32>,
}

/// One block of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSave {
    /// Its key.
    pub key: BlockKey,
    /// The key before it; [`BlockKey::ROOT`] for a first block.
    pub parent: BlockKey,
    /// Its place in the chain, from 0.
    pub depth: u32,
    /// The block of the device's memory that holds it.
    pub block: u32,
}

/// Whose the blocks of a save are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveTarget {
    /// Whose namespace.
    pub instance: InstanceId,
    /// On whose behalf. The first 1,024 tenants get a namespace each, all others share 16.
    pub tenant: Option<TenantId>,
    /// The group.
    pub group: u16,
    /// The shard.
    pub shard: u16,
}

impl From<InstanceId> for SaveTarget {
    /// Group 0, shard 0, on nobody's behalf.
    fn from(instance: InstanceId) -> Self {
        Self { instance, tenant: None, group: 0, shard: 0 }
    }
}

/// Copies blocks out of a worker's KV cache.
#[derive(Clone)]
pub struct SaveRequest {
    /// The session that asks.
    pub session: SessionId,
    /// Its name for this save.
    pub operation: OperationId,
    /// Whose blocks they are.
    pub target: SaveTarget,
    /// Where from.
    pub memory: Arc<dyn KvCache>,
    /// Which blocks, ancestors first. At most 65,536.
    pub blocks: Vec<BlockSave>,
}

/// How a save ended. The device's blocks may be reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SaveOutcome {
    /// Blocks that are now visible to lookups.
    pub saved: u32,
    /// Blocks that were there already.
    pub present: u32,
    /// Blocks that were dropped, for want of room or of an ancestor. Never an error.
    pub dropped: u32,
}

/// What a drive under the store says of its own health.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DriveWear {
    /// The controller: `nvme0`.
    pub drive: String,
    /// How much of its rated life is used, in percent; goes on above 100.
    pub used_percent: u8,
    /// Spare capacity that is left, in percent.
    pub spare_percent: u8,
    /// Bits of what is wrong, as NVMe defines them; 0: nothing.
    pub critical_warning: u8,
    /// Bytes that were ever written to it, by everybody.
    pub written_bytes: u64,
    /// Times that it found data that it could not correct.
    pub media_errors: u64,
}

/// What a tier of another size would serve, if it let go what was used least recently.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SizeEstimate {
    /// The size, in percent of what there is.
    pub percent_of_present: u32,
    /// The size in bytes of blocks; on the drive of what they are before they are compressed.
    pub capacity_bytes: u64,
    /// Of a thousand blocks that were asked for in the last hours, how many it would have had, all before them included.
    pub hit_permille: u32,
}

/// What a namespace has of DRAM, and what of it nobody can take; see `docs/design.md`, "Shares of DRAM".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DramAccount {
    /// Whether it is that of all namespaces that have none of their own. Whose another one is, is not told: whoever reads
    /// statistics need not know who is served.
    pub is_of_others: bool,
    /// Bytes of its blocks that may leave.
    pub bytes: u64,
    /// Bytes that are guaranteed to it now.
    pub guaranteed_bytes: u64,
    /// Whether it asked for something within ten minutes; only then anything is guaranteed to it.
    pub is_active: bool,
}

/// What came of blocks that were read from the drive before a load asked for them, since open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct FetchTotals {
    /// Blocks that were read.
    pub blocks: u64,
    /// Bytes of these, as they are stored.
    pub bytes: u64,
    /// Blocks that were loaded while they were still in DRAM.
    pub used_blocks: u64,
    /// Blocks that left DRAM before they were loaded, or had come to DRAM otherwise before they were read.
    pub wasted_blocks: u64,
    /// Bytes of DRAM that these took.
    pub wasted_bytes: u64,
    /// Blocks that were not read: nobody waited for them any more, or not in time.
    pub cancelled_blocks: u64,
    /// Blocks that were not read because too many waited to be.
    pub refused_blocks: u64,
    /// Blocks that were not read because DRAM was full of blocks that are worth more.
    pub no_room_blocks: u64,
    /// Blocks whose read failed.
    pub failed_blocks: u64,
}

/// How far the hot set of the run before has come back to DRAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WarmState {
    /// It is not wanted, or there is no store.
    #[default]
    Off,
    /// Its blocks are being read.
    Running,
    /// None is known: the store is new, or what was known of it is lost.
    Nothing,
    /// All of it that is still in the store is in DRAM.
    Done,
    /// DRAM has no room for the rest: it is smaller than before, or others were faster.
    Full,
    /// The store went out of use.
    Stopped,
}

impl WarmState {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Off, Self::Running, Self::Nothing, Self::Done, Self::Full, Self::Stopped];

    /// Its name in metrics and `/status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Running => "running",
            Self::Nothing => "nothing",
            Self::Done => "done",
            Self::Full => "full",
            Self::Stopped => "stopped",
        }
    }
}

/// The way of the hot set back to DRAM after an open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct WarmProgress {
    /// How far it is.
    #[serde(rename = "warm_state")]
    pub state: WarmState,
    /// Blocks of the list, all shards of a block as one.
    #[serde(rename = "warm_listed_blocks")]
    pub listed_blocks: u64,
    /// Those of them that the store does not have any more.
    #[serde(rename = "warm_missing_blocks")]
    pub missing_blocks: u64,
    /// Blocks that were read, each shard for itself.
    #[serde(rename = "warm_read_blocks")]
    pub read_blocks: u64,
    /// Bytes of their payloads.
    #[serde(rename = "warm_read_bytes")]
    pub read_bytes: u64,
    /// From the beginning of the open to the last of them, in ms; as long as it runs to this moment.
    #[serde(rename = "warm_ms")]
    pub took_ms: u64,
    /// Blocks of the list that this run has kept last for the next one; 0 before the first.
    #[serde(rename = "warm_kept_blocks")]
    pub kept_blocks: u64,
}

/// How long things took since open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LatencyStats {
    /// Lookups, from the request to the answer.
    pub lookup: Latencies,
    /// Loads out of DRAM only, from when they were queued. Loads that workers copy themselves are not in it.
    pub load_dram: Latencies,
    /// Loads that read at least one block from the drive.
    pub load_nvme: Latencies,
    /// Saves until their blocks were visible, from when they were queued.
    pub save: Latencies,
    /// Blocks from when they were visible until they were durable.
    pub durable: Latencies,
    /// Reads of the drives, since the store was opened, from when they were asked for.
    pub drive_read: Latencies,
    /// Writes of the drives.
    pub drive_write: Latencies,
    /// Syncs of the drives.
    pub drive_sync: Latencies,
}

impl LatencyStats {
    /// All of them, with their names.
    pub fn named(&self) -> [(&'static str, &Latencies); 8] {
        [
            ("lookup", &self.lookup),
            ("load_dram", &self.load_dram),
            ("load_nvme", &self.load_nvme),
            ("save", &self.save),
            ("durable", &self.durable),
            ("drive_read", &self.drive_read),
            ("drive_write", &self.drive_write),
            ("drive_sync", &self.drive_sync),
        ]
    }
}

/// A snapshot of counters and gauges. Counters are since open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Bytes of DRAM for blocks.
    pub dram_capacity_bytes: u64,
    /// Bytes of DRAM that blocks can be in by now: grows to `dram_capacity_bytes` after the start.
    pub dram_ready_bytes: u64,
    /// Bytes of slots in use.
    pub dram_used_bytes: u64,
    /// Bytes not yet durable.
    pub dram_dirty_bytes: u64,
    /// Blocks in DRAM.
    pub dram_blocks: u64,
    /// Those of them that are pinned.
    pub dram_pinned_blocks: u64,
    /// Bytes of their slots.
    pub dram_pinned_bytes: u64,
    /// Pins that hold them.
    pub dram_pins: u64,
    /// Bytes of the store's regions; 0 without a store.
    pub nvme_capacity_bytes: u64,
    /// Bytes of regions in use.
    pub nvme_used_bytes: u64,
    /// Records found by lookups; after an open of a large store an estimate, until the index is full.
    pub nvme_records: u64,
    /// Bytes of memory that the in-memory index takes.
    pub index_bytes: u64,
    /// Bytes of memory that RocksDB takes.
    pub index_log_bytes: u64,
    /// Whether the in-memory index has every record; until then lookups ask RocksDB for what it lacks.
    pub index_full: bool,
    /// Rows that the in-memory index was filled with since open.
    pub index_filled_rows: u64,
    /// Rows that it is to be filled with; an estimate until it is full.
    pub index_rows: u64,
    /// The I/O engine: `io_uring`, `psync` or `none`.
    pub io_engine: String,
    /// Whether records go past the page cache: false without a store, and on file systems that have no direct I/O.
    pub nvme_is_direct: bool,
    /// Whether the store takes no more writes after a failure.
    pub nvme_poisoned: bool,
    /// Why blocks live in DRAM only though there is a store; `None` if they do not, and without a store.
    pub nvme_degraded: Option<PoisonReason>,
    /// How often the store was opened again after it had failed.
    pub nvme_reopens: u64,
    /// Attempts to open it again that failed.
    pub nvme_failed_reopens: u64,
    /// Open sessions.
    pub sessions: u64,
    /// Registered instances.
    pub instances: u64,
    /// Live leases.
    pub leases: u64,
    /// Loads and saves in flight.
    pub operations: u64,
    /// Blocks asked for in lookups.
    pub lookup_blocks: u64,
    /// Blocks found in lookups.
    pub lookup_hit_blocks: u64,
    /// Those of them that were in DRAM.
    pub lookup_hit_dram_blocks: u64,
    /// Whether what lookups find is loaded.
    pub load_policy: LoadPolicy,
    /// Found prefixes that were to be loaded.
    pub decided_loads: u64,
    /// Found prefixes that were to be computed all the same.
    pub decided_recomputes: u64,
    /// Loads that took longer than computing would have, as predicted.
    pub mistaken_loads: u64,
    /// Computations that took longer than loading would have, as predicted.
    pub mistaken_recomputes: u64,
    /// Bytes read beside requests that were computed, to see how fast the drives are.
    pub decision_read_bytes: u64,
    /// Blocks read beside requests that were computed, to see how fast the drives are.
    pub fetched_look_aside: FetchTotals,
    /// Blocks read for requests that waited to be scheduled.
    pub fetched_request: FetchTotals,
    /// Blocks read because they are likely to be asked for.
    pub fetched_hot_set: FetchTotals,
    /// The way of the hot set back to DRAM after the open.
    #[serde(flatten)]
    pub warm_start: WarmProgress,
    /// Blocks loaded out of DRAM.
    pub loaded_dram_blocks: u64,
    /// Blocks loaded from the drive.
    pub loaded_nvme_blocks: u64,
    /// Bytes of the blocks loaded out of DRAM.
    pub loaded_dram_bytes: u64,
    /// Bytes of the blocks loaded from the drive.
    pub loaded_nvme_bytes: u64,
    /// Blocks whose load failed.
    pub load_failed_blocks: u64,
    /// Blocks saved.
    pub saved_blocks: u64,
    /// Bytes of these.
    pub saved_bytes: u64,
    /// Blocks whose save found them present.
    pub save_present_blocks: u64,
    /// Blocks whose save was dropped, but for those in `save_orphan_blocks`: the sum of the next four.
    pub save_dropped_blocks: u64,
    /// Blocks whose save was dropped for want of DRAM.
    pub save_dropped_room_blocks: u64,
    /// Blocks whose save was dropped because too many saves waited.
    pub save_dropped_queue_blocks: u64,
    /// Blocks that could not be copied out of the device.
    pub save_dropped_copy_blocks: u64,
    /// Blocks whose save was cancelled, or cut short by the end of the engine.
    pub save_dropped_cancelled_blocks: u64,
    /// Blocks whose save was dropped because an ancestor is missing.
    pub save_orphan_blocks: u64,
    /// Blocks evicted from DRAM: the sum of the next three.
    pub dram_evicted_blocks: u64,
    /// Blocks evicted for one of the same size that was saved or loaded.
    pub dram_evicted_room_blocks: u64,
    /// Blocks evicted with a whole chunk, for blocks of another size.
    pub dram_evicted_other_size_blocks: u64,
    /// Blocks evicted for one that was fetched and is worth more.
    pub dram_evicted_colder_blocks: u64,
    /// Those of the evicted blocks that left while several accounts had some, so that shares said whose leaves.
    pub dram_share_evicted_blocks: u64,
    /// The part of DRAM that is guaranteed to namespaces that ask, in percent; 0: there are no shares.
    pub guaranteed_percent: u32,
    /// Who has how much of DRAM: 15 namespaces at most, and all others together.
    pub dram_accounts: Vec<DramAccount>,
    /// Bytes that accounts have above what is guaranteed to them.
    pub dram_borrowed_bytes: u64,
    /// Loads that wait for a thread.
    pub loads_waiting: u64,
    /// Saves that wait for a thread.
    pub saves_waiting: u64,
    /// Bytes that wait to be written to the drive.
    pub nvme_queued_bytes: u64,
    /// Bytes that wait to be fetched from the drive ahead of loads, or are being fetched.
    pub fetch_waiting_bytes: u64,
    /// Records made durable.
    pub durable_records: u64,
    /// Records whose write failed.
    pub write_failed_records: u64,
    /// Reads that failed their checks and were taken out of the index.
    pub quarantined_records: u64,
    /// Regions reclaimed.
    pub reclaimed_regions: u64,
    /// Records that went with them.
    pub reclaimed_records: u64,
    /// Bytes that scrubs have read.
    pub scrubbed_bytes: u64,
    /// Records that scrubs have found damaged; they are among `quarantined_records`.
    pub scrub_bad_records: u64,
    /// Scrubs that have seen every record.
    pub scrub_passes: u64,
    /// When the last of them ended, in milliseconds since 1970; 0 for never.
    pub scrub_last_pass_unix_ms: u64,
    /// Bytes of the payloads that became durable.
    pub nvme_written_raw_bytes: u64,
    /// Bytes of these as they were stored.
    pub nvme_written_stored_bytes: u64,
    /// Bytes of the payloads that were read and verified.
    pub nvme_read_raw_bytes: u64,
    /// Bytes of these as they were stored.
    pub nvme_read_stored_bytes: u64,
    /// Records that became durable encoded.
    pub codec_encoded_records: u64,
    /// Nanoseconds that threads have spent encoding.
    pub codec_encode_ns: u64,
    /// Nanoseconds that threads have spent decoding.
    pub codec_decode_ns: u64,
    /// Nanoseconds that threads have spent encrypting; 0 in a store that is not encrypted.
    pub seal_ns: u64,
    /// Nanoseconds that threads have spent decrypting.
    pub unseal_ns: u64,
    /// Bytes of payload per second that the store's threads decode together, measured at open; 0 without a codec.
    pub codec_decode_bytes_per_second: u64,
    /// Blocks that were stored as they are because they, or those before them, hardly shrink.
    pub codec_skipped_ratio: u64,
    /// Blocks that were stored as they are because too many waited to be encoded.
    pub codec_skipped_queue: u64,
    /// Blocks that were stored as they are because the drive reads faster than this machine decodes.
    pub codec_skipped_speed: u64,
    /// Bytes made durable in the log of the store: with headers, tombstones and what was written again.
    pub appended_bytes: u64,
    /// Records written again because they were worth more than their region.
    pub reinserted_records: u64,
    /// Bytes of these. `appended_bytes / (appended_bytes - reinserted_bytes)` is the write amplification of the log.
    pub reinserted_bytes: u64,
    /// How often writing records again was cut short because the next region was needed.
    pub cut_reinsertions: u64,
    /// Bytes a day that may be written to the drive; 0 without a bound.
    pub write_budget_day_bytes: u64,
    /// Bytes of records written in the last 23 to 24 hours, restarts included.
    pub written_day_bytes: u64,
    /// Blocks that were not written because the budget was used up.
    pub refused_budget_blocks: u64,
    /// Blocks that were not written because the budget was short and they had not been seen often enough.
    pub refused_unproven_blocks: u64,
    /// Blocks that were not written because the block before them is not on the drive.
    pub refused_ancestor_blocks: u64,
    /// Blocks that were not written because the store is full of blocks that are worth more.
    pub refused_worth_blocks: u64,
    /// The health of the drives under the store; those that do not tell are not in it.
    pub drives: Vec<DriveWear>,
    /// How fast the store's drives are and how they are used, the home first; empty without a store.
    pub drive_speeds: Vec<DriveSpeed>,
    /// What each of them does, in the same order, since the store was opened.
    pub drive_uses: Vec<DriveUse>,
    /// How long things took.
    pub latencies: LatencyStats,
    /// Who decides what stays in DRAM: `pegaflow`, `lru`, `fifo`, `s3fifo` or `arc`.
    pub policy: String,
    /// Requests that the policy was told of: a request that is looked up again while it waits counts once.
    pub policy_requests: u64,
    /// Requests of which it was not told, because too many waited.
    pub policy_dropped_requests: u64,
    /// What more or less DRAM would serve: half of it, all, twice and four times as much.
    pub dram_estimates: Vec<SizeEstimate>,
    /// What a larger or smaller store would serve; empty without one.
    pub nvme_estimates: Vec<SizeEstimate>,
    /// Records found by the scan at open that the index did not know.
    pub recovered_records: u64,
}
