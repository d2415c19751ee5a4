//! The superblock: what a store is and how far its counters are reserved. Two copies of one page lie in the file
//! `superblock`, written in turn, so that a torn write leaves the other copy. `docs/format.md` draws it.

use super::page::{PAGE_BYTES, Page, get, get_u16, get_u32, get_u64, is_sealed, put, seal};
use super::version::{FORMAT_VERSION, StoreUuid};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"PEGASUPR";
/// Copies in the file.
pub(super) const SUPERBLOCK_COPIES: u64 = 2;

/// What is fixed for a store, and the ceilings of its counters: no number at or above a ceiling was ever used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Random, in every header of the store.
    pub(super) store: StoreUuid,
    /// Rises with every write of the superblock; the copy with the higher one is valid.
    pub(super) counter: u64,
    /// Bytes of a region.
    pub(super) region_bytes: u64,
    /// Regions of the store.
    pub(super) region_count: u32,
    /// Generations below it may have been used.
    pub(super) generation_ceiling: u64,
    /// Sequences below it may have been used.
    pub(super) sequence_ceiling: u64,
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
        put(&mut page, 20, &u32::from(self.is_clean).to_le_bytes());
        put(&mut page, 24, self.store.as_bytes());
        put(&mut page, 40, &self.counter.to_le_bytes());
        put(&mut page, 48, &self.region_bytes.to_le_bytes());
        put(&mut page, 56, &self.region_count.to_le_bytes());
        put(&mut page, 64, &self.generation_ceiling.to_le_bytes());
        put(&mut page, 72, &self.sequence_ceiling.to_le_bytes());
        put(&mut page, 80, &self.created_unix_ms.to_le_bytes());
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
        if !is_sealed(page) {
            return Err(corrupt("checksum"));
        }
        let version = get_u16(page, 16);
        if version != FORMAT_VERSION {
            return Err(super::version::unknown_version(u64::from(version), "superblock"));
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
            region_count: get_u32(page, 56),
            generation_ceiling: get_u64(page, 64),
            sequence_ceiling: get_u64(page, 72),
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
                Ok(found) if newest.is_none_or(|best| best.counter < found.counter) => newest = Some(found),
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

#[cfg(test)]
mod tests {
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    fn superblock(counter: u64) -> Superblock {
        Superblock {
            store: StoreUuid::from_bytes(*b"0123456789abcdef"),
            counter,
            region_bytes: 16 << 20,
            region_count: 64,
            generation_ceiling: 0x1122_3344_5566_7788,
            sequence_ceiling: 0x99aa_bbcc_ddee_ff00,
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
        assert_eq!(page[56..64], [64, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[64..72], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(page[72..80], [0, 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99]);
        assert!(page[88..].iter().all(|&byte| byte == 0));
        assert_eq!(blake3::hash(&page).to_string(), "d042e9d528557bbb4fee9897259d14390276560e5d57e950a701e192dba8c864");
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
