//! The superblock: what a store is and how far its counters are reserved. Two copies of one page lie in the file
//! `superblock`, written in turn, so that a torn write leaves the other copy. `docs/format.md` draws it.

use super::drive_table::{DRIVES_MAX, DriveTable, EXTENTS_MAX, Extent};
use super::page::{PAGE_BYTES, Page, get, get_u16, get_u32, get_u64, is_sealed, put, seal};
use super::switches::is_off;
use super::version::{DriveUuid, FORMAT_VERSION, StoreUuid};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"PEGASUPR";
/// Copies in the file.
pub(super) const SUPERBLOCK_COPIES: u64 = 2;
/// The store is encrypted.
const FLAG_ENCRYPTED: u16 = 1;
/// Where the drives besides the home stand, each with its identity.
const DRIVES_AT: usize = 104;
const DRIVE_BYTES: usize = 16;
/// Where the extents stand.
const EXTENTS_AT: usize = DRIVES_AT + (DRIVES_MAX - 1) * DRIVE_BYTES;
const EXTENT_BYTES: usize = 24;
const _: () = assert!(EXTENTS_AT + EXTENTS_MAX * EXTENT_BYTES <= PAGE_BYTES, "the tables fit in the page");

/// What is fixed for a store, where its regions lie, and the ceilings of its counters: no number at or above a ceiling
/// was ever used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Random, in every header of the store.
    pub(super) store: StoreUuid,
    /// Rises with every write of the superblock; the copy with the higher one is valid.
    pub(super) counter: u64,
    /// Bytes of a region.
    pub(super) region_bytes: u64,
    /// The drives, and which region lies where.
    pub(super) table: DriveTable,
    /// How often the store was opened. Every drive notes it too: one that lags behind holds something of the past.
    pub(super) opens: u64,
    /// An index that is made anew takes no region of a lower generation: what hid old versions there may be gone.
    pub(super) rebuild_floor: u64,
    /// Generations below it may have been used.
    pub(super) generation_ceiling: u64,
    /// Sequences below it may have been used.
    pub(super) sequence_ceiling: u64,
    /// Whether payloads are encrypted, and names are not those that were given.
    pub(super) is_encrypted: bool,
    /// Whether the store was closed in order after everything had become durable.
    pub(super) is_clean: bool,
    /// When the store was made, in milliseconds since 1970; information only.
    pub(super) created_unix_ms: u64,
}

impl Superblock {
    /// The byte offset of the copy that this state is written to.
    pub(super) fn offset(&self) -> u64 {
        self.counter % SUPERBLOCK_COPIES * PAGE_BYTES as u64
    }

    /// The page on disk.
    pub(super) fn encode(&self) -> Page {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, MAGIC);
        put(&mut page, 16, &FORMAT_VERSION.to_le_bytes());
        put(&mut page, 18, &(if self.is_encrypted { FLAG_ENCRYPTED } else { 0 }).to_le_bytes());
        put(&mut page, 20, &u32::from(self.is_clean).to_le_bytes());
        put(&mut page, 24, self.store.as_bytes());
        put(&mut page, 40, &self.counter.to_le_bytes());
        put(&mut page, 48, &self.region_bytes.to_le_bytes());
        put(&mut page, 56, &(self.table.more_drives.len() as u16).to_le_bytes());
        put(&mut page, 58, &(self.table.extents.len() as u16).to_le_bytes());
        put(&mut page, 64, &self.generation_ceiling.to_le_bytes());
        put(&mut page, 72, &self.sequence_ceiling.to_le_bytes());
        put(&mut page, 80, &self.created_unix_ms.to_le_bytes());
        put(&mut page, 88, &self.opens.to_le_bytes());
        put(&mut page, 96, &self.rebuild_floor.to_le_bytes());
        for (index, uuid) in self.table.more_drives.iter().enumerate() {
            put(&mut page, DRIVES_AT + index * DRIVE_BYTES, uuid.as_bytes());
        }
        for (index, extent) in self.table.extents.iter().enumerate() {
            let at = EXTENTS_AT + index * EXTENT_BYTES;
            put(&mut page, at, &extent.first_region.to_le_bytes());
            put(&mut page, at + 4, &extent.regions.to_le_bytes());
            put(&mut page, at + 8, &extent.drive.to_le_bytes());
            put(&mut page, at + 12, &extent.place.to_le_bytes());
            put(&mut page, at + 16, &extent.since.to_le_bytes());
        }
        seal(&mut page);
        assert_eq!(Self::decode(&page).ok().as_ref(), Some(self), "a superblock reads as it was written");
        page
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// `Corrupt`, or `NewerFormat` for an intact copy of a version that this build does not know.
    pub(super) fn decode(page: &[u8]) -> Result<Self> {
        let corrupt = |what| Error::new(ErrorKind::Corrupt, format!("a copy of the superblock has a wrong {what}"));
        if get::<8>(page, 0) != *MAGIC {
            return Err(corrupt("magic"));
        }
        if !is_sealed(page) && !is_off!(SkipSuperblockChecksum) {
            return Err(corrupt("checksum"));
        }
        let version = get_u16(page, 16);
        if version != FORMAT_VERSION {
            return Err(super::version::unknown_version(u64::from(version), "superblock"));
        }
        let flags = get_u16(page, 18);
        if flags & !FLAG_ENCRYPTED != 0 {
            return Err(corrupt("flag"));
        }
        let is_clean = match get_u32(page, 20) {
            0 => false,
            1 => true,
            _ => return Err(corrupt("clean flag")),
        };
        Ok(Self {
            store: StoreUuid::from_bytes(get(page, 24)),
            counter: get_u64(page, 40),
            region_bytes: get_u64(page, 48),
            table: decode_table(page).ok_or_else(|| corrupt("table of drives"))?,
            opens: get_u64(page, 88),
            rebuild_floor: get_u64(page, 96),
            generation_ceiling: get_u64(page, 64),
            sequence_ceiling: get_u64(page, 72),
            is_encrypted: flags & FLAG_ENCRYPTED != 0,
            is_clean,
            created_unix_ms: get_u64(page, 80),
        })
    }

    /// The newest intact copy among the pages of the file.
    ///
    /// # Errors
    /// `NewerFormat` if a copy is of an unknown version, `Corrupt` if no copy is intact.
    pub(super) fn newest<'a>(copies: impl IntoIterator<Item = &'a [u8]>) -> Result<Self> {
        let mut newest: Option<Self> = None;
        let mut problem = Error::new(ErrorKind::Corrupt, "the superblock has no copies");
        for copy in copies {
            match Self::decode(copy) {
                Ok(found) if newest.as_ref().is_none_or(|best| best.counter < found.counter) => newest = Some(found),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NewerFormat => return Err(error),
                Err(error) => problem = error,
            }
        }
        newest.ok_or_else(|| {
            let message = format!(
                "both copies of the superblock are unreadable ({problem}); check the drive, then give the store an empty directory"
            );
            Error::new(ErrorKind::Corrupt, message)
        })
    }
}

fn decode_table(page: &[u8]) -> Option<DriveTable> {
    let (drives, extents) = (usize::from(get_u16(page, 56)), usize::from(get_u16(page, 58)));
    if drives >= DRIVES_MAX || extents > EXTENTS_MAX {
        return None;
    }
    let extent = |index| {
        let at = EXTENTS_AT + index * EXTENT_BYTES;
        Extent {
            first_region: get_u32(page, at),
            regions: get_u32(page, at + 4),
            drive: get_u16(page, at + 8),
            place: get_u32(page, at + 12),
            since: get_u64(page, at + 16),
        }
    };
    let drive = |index| DriveUuid::from_bytes(get(page, DRIVES_AT + index * DRIVE_BYTES));
    let table =
        DriveTable { more_drives: (0..drives).map(drive).collect(), extents: (0..extents).map(extent).collect() };
    table.is_sound().then_some(table)
}

#[cfg(test)]
mod tests {
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    fn superblock(counter: u64) -> Superblock {
        Superblock {
            store: StoreUuid::from_bytes(*b"0123456789abcdef"),
            counter,
            region_bytes: 16 << 20,
            table: DriveTable {
                more_drives: vec![DriveUuid::from_bytes(*b"a drive besides.")],
                extents: vec![
                    Extent { first_region: 0, regions: 64, drive: 0, place: 0, since: 1 },
                    Extent { first_region: 64, regions: 0x0102, drive: 1, place: 0, since: 0x0a0b_0c0d },
                ],
            },
            opens: 0x2122,
            rebuild_floor: 0x3132_3334,
            generation_ceiling: 0x1122_3344_5566_7788,
            sequence_ceiling: 0x99aa_bbcc_ddee_ff00,
            is_encrypted: false,
            is_clean: true,
            created_unix_ms: 1_790_000_000_000,
        }
    }

    #[test]
    fn the_bytes_are_frozen() {
        let page = superblock(7).encode();
        assert_eq!(&page[0..8], b"PEGASUPR");
        assert_eq!(page[16..24], [1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&page[24..40], b"0123456789abcdef");
        assert_eq!(page[40..48], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[48..56], [0, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(page[56..64], [1, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(page[64..72], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(page[72..80], [0, 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99]);
        assert_eq!(page[88..104], [0x22, 0x21, 0, 0, 0, 0, 0, 0, 0x34, 0x33, 0x32, 0x31, 0, 0, 0, 0]);
        assert_eq!(&page[104..120], b"a drive besides.");
        assert!(page[120..600].iter().all(|&byte| byte == 0));
        assert_eq!(page[600..624], [0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[624..640], [64, 0, 0, 0, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[640..648], [0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0]);
        assert!(page[648..].iter().all(|&byte| byte == 0));
        assert_eq!(blake3::hash(&page).to_string(), "40b55b2f7d9380faaf720fa51b19b0c0fbd182d1b1971a1cb1795fb4fdf304ce");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        assert_every_flip_is_found(&superblock(7).encode(), |page| Superblock::decode(page).is_ok());
    }

    #[test]
    fn the_newer_intact_copy_wins() {
        let (old, new) = (superblock(8).encode(), superblock(9).encode());
        let newest = |a: &[u8], b: &[u8]| Superblock::newest([a, b]).map(|found| found.counter).map_err(|e| e.kind());
        assert_eq!(newest(&old, &new), Ok(9));
        assert_eq!(newest(&new, &old), Ok(9));
        assert_eq!(newest(&old, &[0xff; 4096]), Ok(8));
        assert_eq!(newest(&[0; 4096], &[0xff; 4096]), Err(ErrorKind::Corrupt));
    }

    #[test]
    fn copies_are_written_in_turn() {
        assert_ne!(superblock(8).offset(), superblock(9).offset());
        assert!(superblock(9).offset() < SUPERBLOCK_COPIES * 4096);
    }

    #[test]
    fn an_unknown_version_is_not_taken_for_damage() {
        let mut page = superblock(7).encode();
        put(&mut page, 16, &2u16.to_le_bytes());
        seal(&mut page);
        assert_eq!(Superblock::decode(&page).map_err(|e| e.kind()), Err(ErrorKind::NewerFormat));
    }
}
