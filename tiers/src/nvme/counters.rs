//! The two counters of a store, generations and sequences. A number is used at most once in the life of a store: before
//! a counter passes its ceiling, a higher ceiling is durable in the superblock, and every open starts at the ceilings.

use std::sync::Arc;

use super::drive::Drive;
use super::drive_table::DriveTable;
use super::superblock::Superblock;
use super::switches::is_off;
use crate::error::{Error, ErrorKind, Result};
use crate::index::IndexLog;

/// Generations reserved at once; a region takes two for each life.
const GENERATION_STEP: u64 = 1 << 10;
/// Sequences reserved at once.
const SEQUENCE_STEP: u64 = 1 << 20;

/// The name in the index under which the rebuild floor stands that it knows of.
const FLOOR_NAME: &str = "floor";

/// The counters, and the superblock that bounds them.
pub(super) struct Counters {
    drive: Arc<Drive>,
    superblock: Superblock,
    next_generation: u64,
    next_sequence: u64,
}

impl Counters {
    /// Starts above everything that may have been used, and marks the store as in use, durably.
    ///
    /// # Errors
    /// What the drive reports.
    pub(super) fn start(drive: Arc<Drive>, superblock: Superblock) -> Result<Self> {
        let reused = |is_reused: bool, step: u64| if is_reused && !superblock.is_clean { step } else { 0 };
        let generations = reused(is_off!(ReuseGenerations), GENERATION_STEP);
        let sequences = reused(is_off!(ReuseSequences), SEQUENCE_STEP);
        let next_generation = superblock.generation_ceiling.saturating_sub(generations).max(1);
        let next_sequence = superblock.sequence_ceiling.saturating_sub(sequences).max(1);
        let mut counters = Self { drive, superblock, next_generation, next_sequence };
        counters.write(|superblock| {
            superblock.is_clean = false;
            superblock.generation_ceiling = next_generation.saturating_add(GENERATION_STEP);
            superblock.sequence_ceiling = next_sequence.saturating_add(SEQUENCE_STEP);
        })?;
        Ok(counters)
    }

    /// A generation that no region ever had.
    ///
    /// # Errors
    /// What the drive reports.
    pub(super) fn next_generation(&mut self) -> Result<u64> {
        if self.next_generation >= self.superblock.generation_ceiling {
            self.write(|superblock| {
                superblock.generation_ceiling = superblock.generation_ceiling.saturating_add(GENERATION_STEP);
            })?;
        }
        take(&mut self.next_generation, self.superblock.generation_ceiling)
    }

    /// A sequence higher than that of every record of the store.
    ///
    /// # Errors
    /// What the drive reports.
    pub(super) fn next_sequence(&mut self) -> Result<u64> {
        if self.next_sequence >= self.superblock.sequence_ceiling {
            self.write(|superblock| {
                superblock.sequence_ceiling = superblock.sequence_ceiling.saturating_add(SEQUENCE_STEP);
            })?;
        }
        take(&mut self.next_sequence, self.superblock.sequence_ceiling)
    }

    /// The sequence that [`Counters::next_sequence`] would give, or a lower one.
    pub(super) fn sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Changes which drives there are and what lies on them.
    ///
    /// # Errors
    /// What the drive reports.
    pub(super) fn set_table(&mut self, table: DriveTable) -> Result<()> {
        self.write(|superblock| superblock.table = table)
    }

    /// Notes that what hid old versions in regions of a generation used so far is gone: an index that is made anew takes
    /// none of them. Nothing may be written to them from now on. `index` is the one that knows what was hidden, if there is
    /// one: it is told first, so that no older copy of it is believed later.
    ///
    /// # Errors
    /// What the drive or the index reports.
    pub(super) fn raise_rebuild_floor(&mut self, index: Option<&IndexLog>) -> Result<()> {
        let floor = self.next_generation;
        if let Some(index) = index {
            note_floor(index, floor)?;
        }
        self.write(|superblock| superblock.rebuild_floor = floor)
    }

    /// No region of a lower generation is taken when the index is made anew.
    pub(super) fn rebuild_floor(&self) -> u64 {
        self.superblock.rebuild_floor
    }

    /// Marks the store as closed in order; the numbers that were reserved and not used are given back.
    ///
    /// # Errors
    /// What the drive reports.
    pub(super) fn finish(mut self) -> Result<()> {
        let (generation, sequence) = (self.next_generation, self.next_sequence);
        self.write(|superblock| {
            superblock.is_clean = true;
            superblock.generation_ceiling = generation;
            superblock.sequence_ceiling = sequence;
        })
    }

    /// The change counts only when it is durable.
    fn write(&mut self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let mut next = Superblock { counter: self.superblock.counter + 1, ..self.superblock.clone() };
        change(&mut next);
        Drive::write_superblock(self.drive.io(), &next)?;
        self.superblock = next;
        Ok(())
    }
}

/// Notes the rebuild floor in an index that knows what was hidden when it was raised.
///
/// # Errors
/// What the index reports.
pub(super) fn note_floor(index: &IndexLog, floor: u64) -> Result<()> {
    index.meta_put(FLOOR_NAME, &floor.to_le_bytes())
}

/// Whether an index knows what was hidden when the rebuild floor was raised to this.
///
/// # Errors
/// What the index reports.
pub(super) fn knows_floor(index: &IndexLog, floor: u64) -> Result<bool> {
    Ok(index.meta_number(FLOOR_NAME)?.unwrap_or(0) >= floor || is_off!(ForgetFloor))
}

fn take(next: &mut u64, ceiling: u64) -> Result<u64> {
    if *next >= ceiling {
        return Err(Error::new(ErrorKind::Poisoned, "a counter of the store is used up; give an empty directory"));
    }
    let taken = *next;
    *next += 1;
    Ok(taken)
}
