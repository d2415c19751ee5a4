//! A store under load through its public API, in turns: each writes or reads the same number of bytes of payload. Slots are
//! in an arena, checksums are on, every byte that is read is compared with what was written.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pegaflow_tiers::{
    Append, Arena, BlockKey, CodecChoice, CodecHint, EncryptionKey, ErrorKind, GroupGeometry, IoPriority, Location,
    NamespaceDescriptor, NamespaceHandle, ReclaimPolicy, RecordId, RecordKind, RegionInfo, Slot, Store, StoreConfig,
    StoreStats,
};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore, SeedableRng};

use crate::kv_bytes::KvBytes;

const PATIENCE: Duration = Duration::from_secs(120);
/// How many reads are on their way at most, and how many bytes.
const READS_MAX: usize = 512;
const READ_BYTES_MAX: u64 = 128 << 20;
/// Half of what may wait for the store's encoders before it stores blocks as they are.
const FILL_PART_BYTES: u64 = 32 << 20;

/// What a turn is.
#[derive(Debug, Clone, Copy)]
pub struct TurnShape {
    /// Bytes of a block's payload; a multiple of 4096.
    pub block_bytes: u64,
    /// Blocks that a turn writes or reads.
    pub blocks: usize,
    /// Turns that the store has room for.
    pub turns: usize,
}

impl TurnShape {
    /// The chunks of the arena that it needs.
    pub const CHUNK_BYTES: u64 = 16 << 20;

    /// Bytes of payload of a turn.
    pub fn bytes(&self) -> u64 {
        self.block_bytes * self.blocks as u64
    }

    /// Bytes of arena that the load needs: each block is written from a slot and read into another. Slots do not lie over
    /// the end of a chunk.
    pub fn arena_bytes(&self) -> u64 {
        const CHUNK: u64 = TurnShape::CHUNK_BYTES;
        let slot = self.block_bytes + 4096;
        (2 * self.blocks as u64).div_ceil((CHUNK / slot).max(1)) * slot.next_multiple_of(CHUNK) + 2 * CHUNK
    }
}

/// In which order blocks are written or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As a prompt's blocks follow one another, from and to slots in the order in which the arena gave them out.
    Sequential,
    /// Scattered over the arena; reads are scattered over the drive too.
    Random,
}

/// What blocks hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// The kind of bytes.
    pub bytes: KvBytes,
    /// Whether the store may compress them.
    pub codec: CodecChoice,
    /// Whether the store is encrypted.
    pub is_encrypted: bool,
}

impl Content {
    /// Fills blocks with parts of a pool, whose channels stay in their places.
    fn filler(self) -> impl FnMut(&mut SmallRng, &mut [u8]) {
        const POOL_BYTES: usize = 8 << 20;
        const STEP: usize = 2048;
        let pool = if self.bytes == KvBytes::Random { Vec::new() } else { self.bytes.make(POOL_BYTES, 1) };
        move |random, block| match pool.is_empty() {
            true => random.fill_bytes(block),
            false => {
                let from = random.random_range(0..pool.len() / STEP) * STEP;
                let mut wrapped = pool.iter().cycle().skip(from);
                block.iter_mut().for_each(|byte| *byte = wrapped.next().copied().unwrap_or(0));
            }
        }
    }
}

/// Gives up the region with the lowest first sequence.
struct Oldest;

impl ReclaimPolicy for Oldest {
    fn victim(&self, candidates: &[RegionInfo]) -> Option<u32> {
        candidates.iter().min_by_key(|info| info.first_sequence).map(|info| info.region)
    }
}

/// A record that was written, and from which slot.
type Written = (RecordId, usize);

/// See the module.
pub struct StoreLoad {
    store: Arc<Store>,
    shape: TurnShape,
    namespace: NamespaceHandle,
    sources: Vec<Arc<Slot>>,
    targets: Vec<Arc<Slot>>,
    random: SmallRng,
    /// The records of each turn so far.
    turns: Vec<Vec<Written>>,
    /// Which block the last turn read, and into which slot.
    read: Vec<(usize, usize)>,
}

impl StoreLoad {
    /// Makes a store in `directory`.
    ///
    /// # Errors
    /// What the store reports, or no room in the arena.
    pub fn create(directory: &Path, arena: &Arc<Arena>, shape: TurnShape, content: Content) -> Result<Self> {
        const MIB: u64 = 1 << 20;
        let log_bytes = (shape.block_bytes + 4096) * (shape.blocks * shape.turns) as u64;
        // As the engine chooses it for its default capacity, but not more than there is to write.
        let region_bytes = (log_bytes / 4 / MIB * MIB).clamp(16 * MIB, 256 * MIB);
        // Records do not lie over the end of a region; two more regions are open and spare.
        let records_per_region = (region_bytes - 8192) / (shape.block_bytes + 4096);
        let regions = ((shape.blocks * shape.turns) as u64).div_ceil(records_per_region) + 3;
        let mut config = StoreConfig::new(directory, regions.max(4) * region_bytes, region_bytes);
        config.codec = content.codec;
        config.encryption = content.is_encrypted.then(|| EncryptionKey::from_bytes([7; 32]));
        let (store, _) = Store::open(config, Arc::clone(arena), Arc::new(Oldest))?;
        let descriptor = NamespaceDescriptor::new().with("bench", "nvme").with(CodecHint::FIELD, content.bytes.hint());
        let geometry = GroupGeometry { group: 0, block_bytes: shape.block_bytes, shards: 1 };
        let namespace = store.namespace(&descriptor, &[geometry])?;
        let mut random = SmallRng::seed_from_u64(shape.block_bytes);
        let mut slots = Vec::new();
        for _ in 0..2 * shape.blocks {
            let slot = arena.alloc(usize::try_from(shape.block_bytes)?);
            slots.push(slot.context("the arena is too small for a turn's blocks")?);
        }
        let targets = slots.split_off(shape.blocks).into_iter().map(Arc::new).collect();
        let mut fill = content.filler();
        let prepare = |mut slot: Slot| {
            fill(&mut random, slot.payload_mut());
            Arc::new(slot)
        };
        let sources = slots.into_iter().map(prepare).collect();
        Ok(Self { store, shape, namespace, sources, targets, random, turns: Vec::new(), read: Vec::new() })
    }

    /// Writes one more turn of new records and waits until all are durable.
    ///
    /// # Errors
    /// What the store reports.
    pub fn write(&mut self, order: Order) -> Result<Duration> {
        self.write_in_parts(order, u64::MAX)
    }

    /// As [`Self::write`], so slowly that the store finds the time to encode each block that it can.
    ///
    /// # Errors
    /// What the store reports.
    pub fn fill(&mut self) -> Result<()> {
        self.write_in_parts(Order::Sequential, FILL_PART_BYTES).map(drop)
    }

    /// Waits each time so many bytes were given to the store.
    fn write_in_parts(&mut self, order: Order, part_bytes: u64) -> Result<Duration> {
        let blocks_in_part = (part_bytes / self.shape.block_bytes).max(1);
        let mut slots: Vec<usize> = (0..self.shape.blocks).collect();
        if order == Order::Random {
            slots.shuffle(&mut self.random);
        }
        let ids: Vec<RecordId> = slots.iter().map(|_| self.new_id()).collect();
        let (sender, ended) = sync_channel(self.shape.blocks);
        let mut durable = 0;
        let start = Instant::now();
        let mut parent = BlockKey::ROOT;
        for (depth, (&id, &slot)) in (0..).zip(ids.iter().zip(&slots)) {
            let sender: SyncSender<pegaflow_tiers::Result<Location>> = sender.clone();
            let mut append = Append {
                id,
                kind: RecordKind::Kv,
                parent,
                depth,
                slot: Some(Arc::clone(&self.sources[slot])),
                payload_bytes: self.shape.block_bytes,
                done: Box::new(move |result| drop(sender.try_send(result))),
            };
            while let Err((back, error)) = self.store.append(append) {
                ensure!(error.kind() == ErrorKind::Busy, error);
                take(&ended)?;
                durable += 1;
                append = back;
            }
            parent = id.key;
            if (u64::from(depth) + 1).is_multiple_of(blocks_in_part) {
                self.store.flush(start + PATIENCE)?;
            }
        }
        self.store.flush(start + PATIENCE)?;
        let elapsed = start.elapsed();
        for _ in durable..self.shape.blocks {
            take(&ended)?;
        }
        self.turns.push(ids.into_iter().zip(slots).collect());
        Ok(elapsed)
    }

    /// Reads a turn's number of blocks: the last turn that was written in its order, or blocks drawn from all that are
    /// there.
    ///
    /// # Errors
    /// What the store reports.
    pub fn read(&mut self, order: Order) -> Result<Duration> {
        let mut wanted = self.turns.last().context("nothing was written yet")?.clone();
        let mut targets: Vec<usize> = (0..self.shape.blocks).collect();
        if order == Order::Random {
            // What the latest turns wrote can not have been given up yet.
            let turns = &self.turns[self.turns.len().saturating_sub(self.shape.turns.saturating_sub(2).max(1))..];
            for one in &mut wanted {
                let turn = &turns[self.random.random_range(0..turns.len())];
                *one = turn[self.random.random_range(0..turn.len())];
            }
            targets.shuffle(&mut self.random);
        }
        let window = READS_MAX.min((READ_BYTES_MAX / self.shape.block_bytes) as usize).max(1);
        let (sender, ended) = sync_channel(self.shape.blocks);
        let mut in_flight = 0;
        let start = Instant::now();
        for (&(id, _), &target) in wanted.iter().zip(&targets) {
            while in_flight >= window {
                take(&ended)?;
                in_flight -= 1;
            }
            let location = self.store.locate(&id).context("a record is not found")?;
            loop {
                let sender = sender.clone();
                let done = Box::new(move |result| drop(sender.try_send(result)));
                match self.store.read(id, location, Arc::clone(&self.targets[target]), IoPriority::Demand, done) {
                    Ok(()) => break,
                    Err(error) if error.kind() == ErrorKind::Busy && in_flight > 0 => {
                        take(&ended)?;
                        in_flight -= 1;
                    }
                    Err(error) => bail!(error),
                }
            }
            in_flight += 1;
        }
        for _ in 0..in_flight {
            take(&ended)?;
        }
        let elapsed = start.elapsed();
        self.read = wanted.into_iter().map(|(_, source)| source).zip(targets).collect();
        Ok(elapsed)
    }

    /// Compares what the last turn read with what was written.
    ///
    /// # Errors
    /// Wrong bytes.
    pub fn check(&self) -> Result<()> {
        for (source, target) in &self.read {
            let is_same = self.sources[*source].payload() == self.targets[*target].payload();
            ensure!(is_same, "a block that was read is not what was written");
        }
        Ok(())
    }

    /// What the store counts.
    pub fn stats(&self) -> StoreStats {
        self.store.stats()
    }

    /// Closes the store.
    ///
    /// # Errors
    /// What the store reports.
    pub fn close(self) -> Result<()> {
        Ok(self.store.close(Instant::now() + PATIENCE)?)
    }

    fn new_id(&mut self) -> RecordId {
        let mut key = [0; 32];
        self.random.fill_bytes(&mut key);
        RecordId { namespace: self.namespace, group: 0, shard: 0, key: BlockKey::from_bytes(key) }
    }
}

/// The next end, which must be a good one.
fn take<T>(ended: &Receiver<pegaflow_tiers::Result<T>>) -> Result<T> {
    Ok(ended.recv_timeout(PATIENCE).context("the store did not answer")??)
}
