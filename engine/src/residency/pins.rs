//! What somebody keeps in DRAM: pinned blocks never give way to others. A pin holds its blocks as a reader does, and takes
//! them out of the order and of the policies, so that nobody who looks for a victim has to go past them. It ends at its time,
//! when it is ended, with its last block that is purged, and with the process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pegaflow_tiers::{Error, ErrorKind, Result};

use super::purge::BLOCKS_AT_ONCE;
use super::{Meant, Residency, Resident, State};
use crate::choice::BlockChoice;
use crate::config::ByteSize;
use crate::pins::{PinInfo, Unpinned};
use crate::scheduler::SizePolicies;

/// How much of DRAM may be pinned, in percent: the rest has to serve everybody else.
const PINNED_PERCENT_MAX: u64 = 50;
/// Pins at a time: each takes eight bytes for a block.
const PINS_MAX: usize = 64;

/// What is pinned by now; a block that several pins hold counts once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PinTotals {
    pub(crate) pins: u64,
    pub(crate) blocks: u64,
    /// What they take in DRAM.
    pub(crate) bytes: u64,
}

struct Pin {
    /// What was asked for.
    choice: BlockChoice,
    until: Option<Instant>,
    /// The first of a chain first.
    blocks: Vec<Arc<Resident>>,
}

impl Pin {
    fn info(&self, number: u64) -> PinInfo {
        PinInfo {
            number,
            choice: self.choice.clone(),
            blocks: self.blocks.len() as u64,
            bytes: self.blocks.iter().map(|block| block.slot.bytes() as u64).sum(),
            left: self.until.map(|until| until.saturating_duration_since(Instant::now())),
        }
    }
}

/// All pins.
#[derive(Default)]
pub(super) struct Pins {
    by_number: BTreeMap<u64, Pin>,
    last_number: u64,
    is_closed: bool,
}

impl Residency {
    /// Pins the blocks that are meant, all of them or none.
    ///
    /// # Errors
    /// `Busy` at the most pins that there may be, `NotFound` if none is here, `InvalidInput` if more than half of DRAM would be
    /// pinned.
    pub(crate) fn pin(&self, meant: &Meant, choice: BlockChoice, until: Option<Instant>) -> Result<PinInfo> {
        let mut pins = self.pins.lock();
        if pins.by_number.len() >= PINS_MAX {
            let message = format!("there are {PINS_MAX} pins, the limit; end one with pegaflow unpin");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let mut blocks = self.hold(meant)?;
        if blocks.is_empty() {
            let message =
                "none of it is in DRAM, where alone blocks are pinned; pegaflow warm brings there what the drive has";
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        blocks.sort_by_key(|block| block.depth);
        for piece in blocks.chunks(BLOCKS_AT_ONCE) {
            let mut policies = self.policies.lock();
            let mut state = self.state.lock();
            piece.iter().for_each(|block| state.pin(block, &mut policies));
        }
        pins.last_number += 1;
        let (number, pin) = (pins.last_number, Pin { choice, until, blocks });
        let info = pin.info(number);
        pins.by_number.insert(number, pin);
        self.state.lock().pinned.pins = pins.by_number.len() as u64;
        self.pins_changed.notify_all();
        Ok(info)
    }

    /// Holds the blocks that are meant; nobody else pins meanwhile.
    fn hold(&self, meant: &Meant) -> Result<Vec<Arc<Resident>>> {
        let limit = self.arena.ready_bytes() / 100 * PINNED_PERCENT_MAX;
        let pinned = self.state.lock().pinned.bytes;
        let (mut held, mut wanted, mut after) = (Vec::new(), 0, None);
        loop {
            let state = self.state.lock();
            let (ids, last) = state.piece(after, |block| meant.is(block));
            for block in ids.iter().filter_map(|id| state.find(id)) {
                wanted += if block.is_pinned() { 0 } else { block.slot.bytes() as u64 };
                if pinned + wanted <= limit {
                    held.push(Arc::clone(block));
                }
            }
            drop(state);
            after = last;
            if after.is_none() {
                break;
            }
        }
        if pinned + wanted > limit {
            let message = format!(
                "{} would be pinned, {} of it by other pins; the limit is {}, {PINNED_PERCENT_MAX} % of DRAM: pin less (one namespace, \
                 a prefix), end other pins with pegaflow unpin, or give the server more --dram",
                ByteSize(pinned + wanted),
                ByteSize(pinned),
                ByteSize(limit),
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(held)
    }

    /// Lets go of all blocks that are meant, by the number of their pin; pins without any are over.
    pub(crate) fn unpin(&self, is_meant: impl Fn(u64, &Resident) -> bool) -> Unpinned {
        self.let_go(&mut self.pins.lock(), |number, _, block| is_meant(number, block))
    }

    fn let_go(&self, pins: &mut Pins, is_meant: impl Fn(u64, &Pin, &Resident) -> bool) -> Unpinned {
        let (before, mut gone) = (pins.by_number.len(), Vec::new());
        pins.by_number.retain(|number, pin| {
            let blocks = std::mem::take(&mut pin.blocks).into_iter();
            let (meant, left): (Vec<_>, Vec<_>) = blocks.partition(|block| is_meant(*number, pin, block));
            gone.extend(meant);
            pin.blocks = left;
            !pin.blocks.is_empty()
        });
        let mut unpinned = Unpinned { pins: (before - pins.by_number.len()) as u64, ..Unpinned::default() };
        // In an order the first of a chain are to be the most recent.
        for piece in gone.rchunks(BLOCKS_AT_ONCE) {
            let mut state = self.state.lock();
            for block in piece.iter().rev() {
                if !state.unpin(block) {
                    continue;
                }
                unpinned.blocks += 1;
                unpinned.bytes += block.slot.bytes() as u64;
                if state.is_here(block) {
                    state.touch(&block.id, block.slot.bytes());
                    if self.is_ordered || !block.is_dirty() {
                        state.start_entering(&block.id);
                    }
                }
            }
            state.pinned.pins = pins.by_number.len() as u64;
        }
        if !gone.is_empty() {
            // Those who wait for room find that nobody holds these any more.
            drop(gone);
            self.notify_room();
        }
        unpinned
    }

    /// All pins, by their numbers.
    pub(crate) fn pins(&self) -> Vec<PinInfo> {
        self.pins.lock().by_number.iter().map(|(number, pin)| pin.info(*number)).collect()
    }

    pub(crate) fn pinned(&self) -> PinTotals {
        self.state.lock().pinned
    }

    /// Ends pins as their time comes, until [`Residency::close_pins`]; sleeps in between, for as long as there is none.
    pub(crate) fn keep_pins(&self) {
        let mut pins = self.pins.lock();
        while !pins.is_closed {
            let now = Instant::now();
            let next = pins.by_number.values().filter_map(|pin| pin.until).min();
            match next {
                Some(due) if due <= now => {
                    let ended = self.let_go(&mut pins, |_, pin, _| pin.until.is_some_and(|until| until <= now));
                    tracing::info!(?ended, "pins are over: their time was up");
                }
                Some(next) => drop(self.pins_changed.wait_until(&mut pins, next)),
                None => self.pins_changed.wait(&mut pins),
            }
        }
    }

    /// Ends the thread. Pins stay, so that what they hold is noted as the first that is to come back.
    pub(crate) fn close_pins(&self) {
        self.pins.lock().is_closed = true;
        self.pins_changed.notify_all();
    }
}

impl State {
    fn is_here(&self, block: &Arc<Resident>) -> bool {
        self.blocks.get(&block.id).is_some_and(|here| Arc::ptr_eq(here, block))
    }

    fn pin(&mut self, block: &Arc<Resident>, policies: &mut SizePolicies) {
        if block.pins.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        let (id, slot_bytes) = (block.id, block.slot.bytes());
        self.pinned.blocks += 1;
        self.pinned.bytes += slot_bytes as u64;
        if self.is_here(block) {
            if self.by_fingerprint.get(&id.fingerprint()) == Some(&id) {
                policies.leave(slot_bytes, id.fingerprint(), id.namespace.0.into());
            }
            self.leave_order(&id, slot_bytes);
        }
    }

    /// Whether no pin holds the block any more.
    fn unpin(&mut self, block: &Resident) -> bool {
        if block.pins.fetch_sub(1, Ordering::Relaxed) > 1 {
            return false;
        }
        self.pinned.blocks -= 1;
        self.pinned.bytes -= block.slot.bytes() as u64;
        true
    }
}
