//! Where a record lies, and how that is packed into eight bytes of the table.

/// Where a record lies: which region, which life of that region, which pages of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    /// The region; below [`Location::REGIONS_MAX`].
    pub region: u32,
    /// The generation of the region: it rises each time the region is reclaimed, and all older locations end with it.
    pub generation: u64,
    /// The first page (the record's header) in units of 4096 bytes from the start of the region; below
    /// [`Location::PAGES_MAX`].
    pub page: u32,
    /// How many pages of 4096 bytes the record takes, its header page included; below [`Location::PAGES_MAX`].
    pub pages: u32,
}

const PAGE_BYTES: u64 = 4096;
const REGION_BITS: u32 = 20;
const PAGE_BITS: u32 = 22;

impl Location {
    /// The most regions of a store: 1,048,576.
    pub const REGIONS_MAX: u32 = 1 << REGION_BITS;
    /// Pages of a region, and of a record, are numbered below this: a region has at most 16 GiB.
    pub const PAGES_MAX: u32 = 1 << PAGE_BITS;

    /// Whether every field is inside its limit.
    pub fn is_valid(&self) -> bool {
        self.region < Self::REGIONS_MAX && self.page < Self::PAGES_MAX && self.pages < Self::PAGES_MAX
    }

    /// How many bytes of the drive the record takes, its header page included.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }

    /// Region, page and pages in one number; only of a valid location.
    pub(super) fn pack(&self) -> u64 {
        debug_assert!(self.is_valid(), "a location outside the limits: {self:?}");
        u64::from(self.region) << (2 * PAGE_BITS) | u64::from(self.page) << PAGE_BITS | u64::from(self.pages)
    }

    /// The reverse of [`Location::pack`]. Masked, so the casts lose nothing.
    pub(super) fn unpack(packed: u64, generation: u16) -> Self {
        let mask = u64::from(Self::PAGES_MAX - 1);
        Self {
            region: (packed >> (2 * PAGE_BITS)) as u32,
            generation: u64::from(generation),
            page: (packed >> PAGE_BITS & mask) as u32,
            pages: (packed & mask) as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_every_field_at_its_limits() {
        for region in [0, 1, Location::REGIONS_MAX - 1] {
            for page in [0, 1, Location::PAGES_MAX - 1] {
                for pages in [0, 1, Location::PAGES_MAX - 1] {
                    let location = Location { region, generation: 0xfffe, page, pages };
                    assert!(location.is_valid());
                    assert_eq!(Location::unpack(location.pack(), 0xfffe), location);
                }
            }
        }
    }

    #[test]
    fn a_field_at_its_limit_is_not_valid() {
        let fits = Location { region: 1, generation: u64::MAX, page: 1, pages: 1 };
        assert!(fits.is_valid());
        assert!(!Location { region: Location::REGIONS_MAX, ..fits }.is_valid());
        assert!(!Location { page: Location::PAGES_MAX, ..fits }.is_valid());
        assert!(!Location { pages: Location::PAGES_MAX, ..fits }.is_valid());
    }
}
