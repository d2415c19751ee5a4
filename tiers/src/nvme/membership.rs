//! Which drives a store has from this open on: what the superblock knows against what the configuration lists and what
//! the directories say of themselves. Decides only; `store.rs` carries it out. `docs/format.md` goes through the cases.

use std::path::Path;

use super::drive::Place;
use super::drive_identity::{DriveIdentity, Membership};
use super::drive_table::{DriveTable, Extent};
use super::superblock::Superblock;
use super::version::DriveUuid;
use crate::error::{Error, ErrorKind, Result};

/// A drive of the configuration as it was found.
pub(super) struct Listed<'a> {
    /// Its directory.
    pub(super) path: &'a Path,
    /// What its directory says of itself; `None` for the home.
    pub(super) identity: Option<DriveIdentity>,
    /// Regions that it is to have.
    pub(super) regions: u32,
}

/// What an open does with the drives.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// What there is while the store is recovered: everything that was, and what is new.
    pub(super) during: DriveTable,
    /// What is left when it is open.
    pub(super) after: DriveTable,
    /// The place in `during` of each drive that is listed.
    pub(super) listed: Vec<u16>,
    /// Regions of drives that are not listed: nobody can read them.
    pub(super) lost_regions: Vec<u32>,
}

impl Plan {
    /// Compares a store with its configuration; `listed` begins with the home.
    ///
    /// # Errors
    /// `ForeignFormat` for another store's drive, `InvalidInput` for drives in another order, or a new one while one of
    /// the store's is missing, or more regions than can be numbered, `Corrupt` for a drive or a home from the past.
    pub(super) fn new(superblock: &Superblock, listed: &[Listed<'_>]) -> Result<Self> {
        let known = listed.iter().skip(1).map(|drive| standing(superblock, drive)).collect::<Result<Vec<_>>>()?;
        refuse_other_order(listed, &known)?;
        let was = &superblock.table;
        let missing: Vec<u16> = (1..was.drives()).filter(|drive| !known.contains(&Some(*drive))).collect();
        if let (Some(missing), Some(new)) = (missing.first(), known.iter().position(Option::is_none)) {
            let message = format!(
                "{} holds nothing of this store, and the store's drive {missing} is in no directory of the configuration; mount that drive, or open the store once without {} (the drive's records are lost then) and add it afterwards",
                listed[new + 1].path.display(),
                listed[new + 1].path.display()
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let mut during = was.clone();
        let mut places = vec![0];
        for place in known {
            if place.is_none() {
                during.more_drives.push(DriveUuid::random()?);
            }
            places.push(place.unwrap_or(during.drives() - 1));
        }
        for (drive, &place) in listed.iter().zip(&places) {
            let more = drive.regions.saturating_sub(during.regions_of(place));
            if more > 0 {
                during.grow(place, more, superblock.generation_ceiling.max(1))?;
            }
        }
        let mut after = during.clone();
        for (drive, &place) in listed.iter().zip(&places) {
            after.cut(place, drive.regions);
        }
        let is_missing = |region: &u32| missing.iter().any(|&drive| lies_on(&during, *region, drive));
        let lost_regions = (0..during.numbers()).filter(is_missing).collect();
        for drive in missing.into_iter().rev() {
            after.remove(drive);
        }
        Ok(Self { during, after, listed: places, lost_regions })
    }

    /// Where each region lies on the drives that are listed, by number.
    pub(super) fn places(&self) -> Vec<Option<Place>> {
        let mut places = vec![None; self.during.numbers() as usize];
        for extent in &self.during.extents {
            let Some(drive) = self.listed.iter().position(|place| *place == extent.drive) else { continue };
            for (region, place) in extent.each() {
                places[region as usize] = Some(Place { drive, place, since: extent.since });
            }
        }
        places
    }

    /// The identity of a listed drive; `None` for the home.
    pub(super) fn uuid(&self, listed: usize) -> Option<DriveUuid> {
        let place = self.listed.get(listed).copied()?.checked_sub(1)?;
        self.during.more_drives.get(usize::from(place)).copied()
    }

    /// Regions that a drive, given by its place in `during`, has when the store is open.
    pub(super) fn regions_after(&self, place: u16) -> u32 {
        let of_drive = self.during.extents.iter().filter(|extent| extent.drive == place);
        of_drive.flat_map(Extent::each).filter(|(region, _)| self.after.has(*region)).count() as u32
    }
}

fn lies_on(table: &DriveTable, region: u32, drive: u16) -> bool {
    table.extents.iter().any(|extent| {
        extent.drive == drive && (extent.first_region..extent.first_region + extent.regions).contains(&region)
    })
}

/// The place of a listed drive in the store's table; `None` if it is to join.
fn standing(superblock: &Superblock, drive: &Listed<'_>) -> Result<Option<u16>> {
    let Some(identity) = drive.identity else { return Ok(None) };
    let path = drive.path.display();
    let Some(place) = superblock.table.find(identity.drive) else {
        if identity.membership == Membership::Joined && identity.store != superblock.store {
            let message =
                format!("{path} is a drive of another store; list that store's home, or empty the directory first");
            return Err(Error::new(ErrorKind::ForeignFormat, message));
        }
        // Nobody's, or retired: it begins empty.
        return Ok(None);
    };
    // The drive notes an open before the superblock does.
    let (of_drive, of_store) = (identity.opens, superblock.opens);
    if (of_store..=of_store.saturating_add(1)).contains(&of_drive) {
        return Ok(Some(place));
    }
    let message = if of_drive < of_store {
        format!(
            "the drive in {path} was last used at open {of_drive}, the store was opened {of_store} times: what it holds is of the past; open the store once without it, then add it again (it comes back empty)"
        )
    } else {
        format!(
            "the drive in {path} was last used at open {of_drive}, its home only at open {of_store}: the home is of the past; give back the right home, or empty all directories of the store"
        )
    };
    Err(Error::new(ErrorKind::Corrupt, message))
}

/// Capacities belong to places in the configuration, so drives that changed places would be resized.
fn refuse_other_order(listed: &[Listed<'_>], known: &[Option<u16>]) -> Result<()> {
    let of = |index: usize| listed[index + 1].path.display();
    for (index, pair) in known.windows(2).enumerate() {
        let message = match (pair[0], pair[1]) {
            (Some(first), Some(second)) if first > second => format!(
                "{} holds the store's drive {first} and {} its drive {second}: they were swapped; list them in the order in which they joined, or swap the mounts",
                of(index),
                of(index + 1)
            ),
            (Some(first), Some(second)) if first == second => {
                format!("{} and {} are copies of one drive; list only one of them", of(index), of(index + 1))
            }
            (None, Some(_)) => format!(
                "{} is new and stands before {}, which the store has already; list new drives last",
                of(index),
                of(index + 1)
            ),
            _ => continue,
        };
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(())
}
