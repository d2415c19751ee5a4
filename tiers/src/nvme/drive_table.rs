//! Which region lies where: the drives of a store, and the extents of regions in their files. Pure arithmetic on what
//! the superblock keeps; knows no files. Numbers of regions are numbers of the store, whatever drive they lie on.

use super::version::DriveUuid;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

/// Drives of a store at most, its home included.
pub(super) const DRIVES_MAX: usize = 32;
/// Extents of a store at most.
pub(super) const EXTENTS_MAX: usize = 128;

/// A run of regions that lie one after the other in the file of one drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// The number of its first region.
    pub(super) first_region: u32,
    /// How many regions; at least one.
    pub(super) regions: u32,
    /// The drive, by place in the table; 0 is the home.
    pub(super) drive: u16,
    /// Where in the drive's file its first region lies, in regions.
    pub(super) place: u32,
    /// Headers in it with a lower generation are of an earlier use of the space and do not count.
    pub(super) since: u64,
}

impl Extent {
    /// The number behind its last region.
    fn end(&self) -> u64 {
        u64::from(self.first_region) + u64::from(self.regions)
    }

    /// The place behind its last region.
    fn place_end(&self) -> u64 {
        u64::from(self.place) + u64::from(self.regions)
    }

    /// Its regions: number of each, and its place in the drive's file.
    pub(super) fn each(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        (self.first_region..).zip(self.place..).take(self.regions as usize)
    }
}

/// The drives of a store and what lies on them. The extents of a drive cover its file from the start without a gap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DriveTable {
    /// The drives besides the home, in the order in which they joined.
    pub(super) more_drives: Vec<DriveUuid>,
    /// All extents, in any order.
    pub(super) extents: Vec<Extent>,
}

impl DriveTable {
    /// How many drives there are, the home included.
    pub(super) fn drives(&self) -> u16 {
        self.more_drives.len() as u16 + 1
    }

    /// The drive with this identity, by place in the table; never the home.
    pub(super) fn find(&self, uuid: DriveUuid) -> Option<u16> {
        (1u16..).zip(&self.more_drives).find(|(_, known)| **known == uuid).map(|(drive, _)| drive)
    }

    /// Regions on a drive.
    pub(super) fn regions_of(&self, drive: u16) -> u32 {
        self.of(drive).map(|extent| extent.regions).sum()
    }

    /// The number behind the highest one of a region.
    pub(super) fn numbers(&self) -> u32 {
        self.extents.iter().map(Extent::end).max().unwrap_or(0) as u32
    }

    /// Whether a region lies on a drive of the table.
    pub(super) fn has(&self, region: u32) -> bool {
        self.extents.iter().any(|extent| (u64::from(extent.first_region)..extent.end()).contains(&region.into()))
    }

    fn of(&self, drive: u16) -> impl Iterator<Item = &Extent> {
        self.extents.iter().filter(move |extent| extent.drive == drive)
    }

    /// Adds regions at the end of a drive's file, under the lowest free numbers. `since` is a generation that was never
    /// used, nor any above it: whatever lies in the space does not count.
    ///
    /// # Errors
    /// `InvalidInput` if the numbers or the entries of the table do not suffice.
    pub(super) fn grow(&mut self, drive: u16, regions: u32, since: u64) -> Result<()> {
        let mut place = self.regions_of(drive);
        let mut left = regions;
        let mut next = 0u64;
        let mut used: Vec<(u64, u64)> =
            self.extents.iter().map(|extent| (extent.first_region.into(), extent.end())).collect();
        used.sort_unstable();
        used.push((Location::REGIONS_MAX.into(), u64::MAX));
        for (start, end) in used {
            let count = u64::from(left).min(start.saturating_sub(next)) as u32;
            if count > 0 {
                self.extents.push(Extent { first_region: next as u32, regions: count, drive, place, since });
                (place, left) = (place + count, left - count);
            }
            next = end;
        }
        if left > 0 || self.extents.len() > EXTENTS_MAX {
            let message = format!(
                "{regions} regions more are beyond what the store can number ({} regions in {EXTENTS_MAX} pieces); give the capacity that it had, or an empty directory",
                Location::REGIONS_MAX
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(())
    }

    /// Cuts a drive's file off behind so many regions.
    pub(super) fn cut(&mut self, drive: u16, regions: u32) {
        for extent in self.extents.iter_mut().filter(|extent| extent.drive == drive) {
            extent.regions = extent.regions.min(regions.saturating_sub(extent.place));
        }
        self.extents.retain(|extent| extent.regions > 0);
    }

    /// Takes a drive out of the table, with all that lies on it. The places of the drives behind it move up.
    pub(super) fn remove(&mut self, drive: u16) {
        self.extents.retain(|extent| extent.drive != drive);
        for extent in self.extents.iter_mut().filter(|extent| extent.drive > drive) {
            extent.drive -= 1;
        }
        self.more_drives.remove(usize::from(drive) - 1);
    }

    /// Whether numbers and places are within their limits, the numbers are given once, and files have no gaps.
    pub(super) fn is_sound(&self) -> bool {
        let is_within = |extent: &Extent| {
            extent.regions > 0
                && extent.end() <= Location::REGIONS_MAX.into()
                && extent.place_end() <= Location::REGIONS_MAX.into()
                && extent.drive < self.drives()
        };
        if self.more_drives.len() >= DRIVES_MAX
            || self.extents.len() > EXTENTS_MAX
            || !self.extents.iter().all(is_within)
        {
            return false;
        }
        let mut numbers: Vec<(u64, u64)> =
            self.extents.iter().map(|extent| (extent.first_region.into(), extent.end())).collect();
        numbers.sort_unstable();
        let has_gaps = |drive| {
            let mut places: Vec<(u64, u64)> =
                self.of(drive).map(|extent| (extent.place.into(), extent.place_end())).collect();
            places.sort_unstable();
            let ends = std::iter::once(0).chain(places.iter().map(|(_, end)| *end));
            places.iter().zip(ends).any(|((start, _), end)| *start != end)
        };
        numbers.windows(2).all(|pair| pair[0].1 <= pair[1].0) && !(0..self.drives()).any(has_gaps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(byte: u8) -> DriveUuid {
        DriveUuid::from_bytes([byte; 16])
    }

    fn places(table: &DriveTable, drive: u16) -> Vec<(u32, u32, u64)> {
        let of_drive = table.extents.iter().filter(|extent| extent.drive == drive);
        let mut places: Vec<_> =
            of_drive.flat_map(|extent| extent.each().map(|(number, place)| (place, number, extent.since))).collect();
        places.sort_unstable();
        places
    }

    #[test]
    fn numbers_that_became_free_are_given_again_with_another_floor() {
        let mut table = DriveTable { more_drives: vec![uuid(1)], extents: Vec::new() };
        table.grow(0, 4, 1).expect("room");
        table.grow(1, 3, 1).expect("room");
        assert_eq!(table.numbers(), 7);
        table.cut(0, 2);
        assert!(table.is_sound() && !table.has(2) && table.has(1) && table.has(4));
        assert_eq!((table.regions_of(0), table.regions_of(1)), (2, 3));
        table.grow(1, 4, 99).expect("room");
        assert_eq!(
            places(&table, 1),
            [(0, 4, 1), (1, 5, 1), (2, 6, 1), (3, 2, 99), (4, 3, 99), (5, 7, 99), (6, 8, 99)]
        );
        assert!(table.is_sound());
        table.more_drives.push(uuid(2));
        table.grow(2, 1, 100).expect("room");
        table.remove(1);
        assert_eq!((table.find(uuid(2)), table.find(uuid(1)), table.regions_of(1)), (Some(1), None, 1));
        assert!(table.is_sound());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut table = DriveTable::default();
        let kind = |result: Result<()>| result.map_err(|error| error.kind());
        assert_eq!(kind(table.grow(0, Location::REGIONS_MAX + 1, 1)), Err(ErrorKind::InvalidInput));
        let mut table = DriveTable::default();
        for since in 0..EXTENTS_MAX as u64 {
            table.grow(0, 1, since).expect("an entry");
        }
        assert!(table.is_sound());
        assert_eq!(kind(table.grow(0, 1, 999)), Err(ErrorKind::InvalidInput));
    }

    #[test]
    fn what_no_store_writes_is_not_sound() {
        let good = Extent { first_region: 0, regions: 4, drive: 0, place: 0, since: 1 };
        let is_sound =
            |extents: &[Extent]| DriveTable { more_drives: Vec::new(), extents: extents.to_vec() }.is_sound();
        assert!(is_sound(&[good, Extent { first_region: 9, place: 4, ..good }]));
        for bad in [
            Extent { first_region: 3, place: 4, ..good },
            Extent { first_region: 9, place: 5, ..good },
            Extent { first_region: 9, place: 3, ..good },
            Extent { first_region: 9, place: 4, regions: 0, ..good },
            Extent { first_region: 9, drive: 1, ..good },
            Extent { first_region: Location::REGIONS_MAX, place: 4, ..good },
            Extent { first_region: u32::MAX, place: 4, ..good },
        ] {
            assert!(!is_sound(&[good, bad]), "{bad:?}");
        }
    }
}
