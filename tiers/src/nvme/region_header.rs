//! The header of a region: which life of the region its records belong to. Two pages (slots) at the start of the region
//! hold one header each; the intact one with the higher generation counts. `docs/format.md` draws it.

use super::page::{PAGE_BYTES, Page, get, get_u16, get_u32, get_u64, is_sealed, put, seal};
use super::switches::is_off;
use super::version::{FORMAT_VERSION, StoreUuid};

const MAGIC: &[u8; 8] = b"PEGAREGN";
/// Header slots of a region: pages before its first record.
pub(super) const HEADER_SLOTS: u32 = 2;

/// What a region is for in this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum RegionPurpose {
    /// It holds nothing that counts.
    Free = 1,
    /// It holds records of this generation.
    Records = 2,
}

/// The header of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegionHeader {
    /// The store that it belongs to.
    pub(super) store: StoreUuid,
    /// The region's number.
    pub(super) region: u32,
    /// Its generation; unique in the whole store.
    pub(super) generation: u64,
    /// What it is for.
    pub(super) purpose: RegionPurpose,
    /// Records of this generation have this sequence or a higher one.
    pub(super) first_sequence: u64,
    /// Bytes of the region.
    pub(super) region_bytes: u64,
}

impl RegionHeader {
    /// The page on disk.
    pub(super) fn encode(&self) -> Page {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, MAGIC);
        put(&mut page, 16, &FORMAT_VERSION.to_le_bytes());
        put(&mut page, 18, &(self.purpose as u16).to_le_bytes());
        put(&mut page, 20, &self.region.to_le_bytes());
        put(&mut page, 24, self.store.as_bytes());
        put(&mut page, 40, &self.generation.to_le_bytes());
        put(&mut page, 48, &self.first_sequence.to_le_bytes());
        put(&mut page, 56, &self.region_bytes.to_le_bytes());
        seal(&mut page);
        assert_eq!(Self::decode(&page).as_ref(), Some(self), "a region header reads as it was written");
        page
    }

    /// Reads one slot; `None` for anything that is not an intact header of this version.
    pub(super) fn decode(page: &[u8]) -> Option<Self> {
        if get::<8>(page, 0) != *MAGIC
            || !(is_sealed(page) || is_off!(SkipRegionHeaderChecksum))
            || get_u16(page, 16) != FORMAT_VERSION
        {
            return None;
        }
        let purpose = match get_u16(page, 18) {
            1 => RegionPurpose::Free,
            2 => RegionPurpose::Records,
            _ => return None,
        };
        Some(Self {
            store: StoreUuid::from_bytes(get(page, 24)),
            region: get_u32(page, 20),
            generation: get_u64(page, 40),
            purpose,
            first_sequence: get_u64(page, 48),
            region_bytes: get_u64(page, 56),
        })
    }

    /// The header that counts among the slots of `region`, with its slot: the newest one that belongs there.
    pub(super) fn newest<'a>(
        slots: impl IntoIterator<Item = &'a [u8]>,
        store: StoreUuid,
        region: u32,
        region_bytes: u64,
    ) -> Option<(u32, Self)> {
        let belongs =
            |header: &Self| header.store == store && header.region == region && header.region_bytes == region_bytes;
        (0u32..)
            .zip(slots)
            .filter_map(|(slot, page)| Self::decode(page).filter(belongs).map(|header| (slot, header)))
            .max_by_key(|(_, header)| header.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    const STORE: StoreUuid = StoreUuid::from_bytes(*b"0123456789abcdef");

    fn header(generation: u64) -> RegionHeader {
        RegionHeader {
            store: STORE,
            region: 3,
            generation,
            purpose: RegionPurpose::Records,
            first_sequence: 0x0102_0304_0506_0708,
            region_bytes: 16 << 20,
        }
    }

    #[test]
    fn the_bytes_are_frozen() {
        let page = header(0x1111).encode();
        assert_eq!(&page[0..8], b"PEGAREGN");
        assert_eq!(page[16..24], [1, 0, 2, 0, 3, 0, 0, 0]);
        assert_eq!(&page[24..40], b"0123456789abcdef");
        assert_eq!(page[40..48], [0x11, 0x11, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[48..56], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(page[56..64], [0, 0, 0, 1, 0, 0, 0, 0]);
        assert!(page[64..].iter().all(|&byte| byte == 0));
        assert_eq!(blake3::hash(&page).to_string(), "a38e4b9050b5ae071cfe86ecb08740c692b78526cfcc4b2aef4bfb0c40dc1eb9");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        assert_every_flip_is_found(&header(5).encode(), |page| RegionHeader::decode(page).is_some());
    }

    #[test]
    fn the_newest_header_that_belongs_there_counts() {
        let (old, new) = (header(8).encode(), header(9).encode());
        let foreign = RegionHeader { region: 4, ..header(10) }.encode();
        let other_store = RegionHeader { store: StoreUuid::from_bytes([7; 16]), ..header(10) }.encode();
        let newest = |a: &[u8], b: &[u8]| {
            RegionHeader::newest([a, b], STORE, 3, 16 << 20).map(|(slot, header)| (slot, header.generation))
        };
        assert_eq!(newest(&old, &new), Some((1, 9)));
        assert_eq!(newest(&new, &old), Some((0, 9)));
        assert_eq!(newest(&old, &[0; 4096]), Some((0, 8)));
        assert_eq!(newest(&old, &foreign), Some((0, 8)));
        assert_eq!(newest(&old, &other_store), Some((0, 8)));
        assert_eq!(newest(&[0; 4096], &[0xff; 4096]), None);
    }
}
