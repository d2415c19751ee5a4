//! One file of the simulated drive: what programs see, what a power loss leaves for sure, and the writes in between.

use std::ops::Range;

use rand::Rng;
use rand::rngs::SmallRng;

/// The unit that a drive writes as a whole.
const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4096;

/// See the module.
#[derive(Default)]
pub(crate) struct SimFile {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// In the order in which they were submitted.
    since: Vec<Unsynced>,
}

/// A write that no sync has covered.
struct Unsynced {
    offset: u64,
    bytes: Vec<u8>,
    /// When it was submitted; its number.
    submitted: u64,
    /// When it was reported as done.
    completed: Option<u64>,
}

impl Unsynced {
    fn is_before(&self, other: &Self) -> bool {
        self.completed.is_some_and(|completed| completed < other.submitted)
    }
}

impl SimFile {
    /// A file whose content is durable.
    pub(super) fn holding(bytes: Vec<u8>) -> Self {
        Self { durable: bytes.clone(), live: bytes, since: Vec::new() }
    }

    /// What programs see.
    pub(crate) fn live(&self) -> &[u8] {
        &self.live
    }

    /// Has at least this length; durably, as preallocation is.
    pub(super) fn grow(&mut self, bytes: usize) {
        if self.live.len() < bytes {
            self.live.resize(bytes, 0);
            self.durable.resize(bytes, 0);
        }
    }

    /// A write is on its way from now on; its number.
    pub(crate) fn begin_write(&mut self, offset: u64, bytes: Vec<u8>, now: u64) -> u64 {
        self.since.push(Unsynced { offset, bytes, submitted: now, completed: None });
        now
    }

    /// A part of a write is done.
    pub(crate) fn end_write(&mut self, number: u64, part: Range<usize>, now: u64) {
        let Some(write) = self.since.iter_mut().rev().find(|write| write.submitted == number) else { return };
        write.completed = Some(now);
        let part = part.start.min(write.bytes.len())..part.end.min(write.bytes.len());
        put(&mut self.live, write.offset as usize + part.start, &write.bytes[part]);
    }

    /// What was done before the event `asked` is durable.
    pub(crate) fn sync(&mut self, asked: u64) {
        let durable = &mut self.durable;
        self.since.retain(|write| {
            let is_covered = write.completed.is_some_and(|completed| completed < asked);
            if is_covered {
                put(durable, write.offset as usize, &write.bytes);
            }
            !is_covered
        });
    }

    /// A sync failed: of what it covered each write is durable or will never be.
    pub(super) fn fail_sync(&mut self, asked: u64, random: &mut SmallRng) {
        let durable = &mut self.durable;
        self.since.retain(|write| {
            let is_covered = write.completed.is_some_and(|completed| completed < asked);
            if is_covered && random.random_bool(0.5) {
                put(durable, write.offset as usize, &write.bytes);
            }
            !is_covered
        });
    }

    /// The power goes: each write since the last sync is there, is not, or is there in part; those that were on their
    /// way together in any order.
    pub(super) fn lose_power(&mut self, random: &mut SmallRng) {
        let mut since = std::mem::take(&mut self.since);
        for later in 1..since.len() {
            if !since[later - 1].is_before(&since[later]) && random.random_bool(0.25) {
                since.swap(later - 1, later);
            }
        }
        let whole = [0.0, 0.1, 0.5, 0.9, 1.0][random.random_range(0..5)];
        for write in &since {
            let Unsynced { offset, bytes, .. } = write;
            let at = *offset as usize;
            if random.random_bool(whole) {
                put(&mut self.durable, at, bytes);
                continue;
            }
            match random.random_range(0..5) {
                0 => put(&mut self.durable, at, &bytes[..cut(bytes.len(), SECTOR_BYTES, random)]),
                1 => put(&mut self.durable, at, &bytes[..cut(bytes.len(), PAGE_BYTES, random)]),
                2 => {
                    for (number, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        if random.random_bool(0.5) {
                            put(&mut self.durable, at + number * SECTOR_BYTES, sector);
                        }
                    }
                }
                _ => {}
            }
        }
        self.live = self.durable.clone();
    }

    /// The process ends, and the power stays: what was on its way gets there or does not.
    pub(super) fn lose_process(&mut self, random: &mut SmallRng, now: u64) {
        let live = &mut self.live;
        self.since.retain_mut(|write| {
            let is_there = write.completed.is_some() || random.random_bool(0.5);
            if is_there && write.completed.is_none() {
                write.completed = Some(now);
                put(live, write.offset as usize, &write.bytes);
            }
            is_there
        });
    }

    /// Bytes change by themselves.
    pub(super) fn decay(&mut self, offset: usize, bytes: &[u8]) {
        put(&mut self.live, offset, bytes);
        put(&mut self.durable, offset, bytes);
    }
}

/// A length below `bytes`, a multiple of `unit`.
fn cut(bytes: usize, unit: usize, random: &mut SmallRng) -> usize {
    random.random_range(0..=bytes.saturating_sub(1) / unit) * unit
}

/// Writes, past the end too.
fn put(image: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if image.len() < offset + bytes.len() {
        image.resize(offset + bytes.len(), 0);
    }
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}
