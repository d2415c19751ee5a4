//! The file `drive` in the directory of every drive besides the home: whose drive it is, and which. A directory that
//! was swapped, restored from the past or belongs to another store shows by it. `docs/format.md` draws it.

use super::page::{PAGE_BYTES, Page, get, get_u16, get_u64, is_sealed, put, seal};
use super::version::{DriveUuid, FORMAT_VERSION, StoreUuid};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"PEGADRIV";

/// How far a drive has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub(super) enum Membership {
    /// It is being added. Unless a superblock names the drive nobody's data is on it.
    Joining = 1,
    /// A superblock names it, or did.
    Joined = 2,
}

/// What the file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DriveIdentity {
    /// How far the drive has come.
    pub(super) membership: Membership,
    /// Whose it is.
    pub(super) store: StoreUuid,
    /// Which it is.
    pub(super) drive: DriveUuid,
    /// The number of the store's open that used it last.
    pub(super) opens: u64,
}

impl DriveIdentity {
    /// The page on disk.
    pub(super) fn encode(&self) -> Page {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, MAGIC);
        put(&mut page, 16, &FORMAT_VERSION.to_le_bytes());
        put(&mut page, 18, &(self.membership as u16).to_le_bytes());
        put(&mut page, 24, self.store.as_bytes());
        put(&mut page, 40, self.drive.as_bytes());
        put(&mut page, 56, &self.opens.to_le_bytes());
        seal(&mut page);
        assert_eq!(Self::decode(&page).ok().as_ref(), Some(self), "an identity reads as it was written");
        page
    }

    /// Reads the file.
    ///
    /// # Errors
    /// `ForeignFormat` if it is not ours, `Corrupt` if it is damaged, `NewerFormat`.
    pub(super) fn decode(page: &[u8]) -> Result<Self> {
        if page.get(..8) != Some(MAGIC.as_slice()) {
            return Err(Error::new(ErrorKind::ForeignFormat, "the file 'drive' is not of this engine"));
        }
        let corrupt = || Error::new(ErrorKind::Corrupt, "the file 'drive' is damaged");
        if page.len() != PAGE_BYTES || !is_sealed(page) {
            return Err(corrupt());
        }
        let version = get_u16(page, 16);
        if version != FORMAT_VERSION {
            return Err(super::version::unknown_version(u64::from(version), "drive"));
        }
        let membership = match get_u16(page, 18) {
            1 => Membership::Joining,
            2 => Membership::Joined,
            _ => return Err(corrupt()),
        };
        Ok(Self {
            membership,
            store: StoreUuid::from_bytes(get(page, 24)),
            drive: DriveUuid::from_bytes(get(page, 40)),
            opens: get_u64(page, 56),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    const SAMPLE: DriveIdentity = DriveIdentity {
        membership: Membership::Joined,
        store: StoreUuid::from_bytes(*b"0123456789abcdef"),
        drive: DriveUuid::from_bytes(*b"a drive besides."),
        opens: 0x0102_0304,
    };

    #[test]
    fn the_bytes_are_frozen() {
        let page = SAMPLE.encode();
        assert_eq!(&page[0..8], b"PEGADRIV");
        assert_eq!(page[16..24], [1, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(&page[24..56], b"0123456789abcdefa drive besides.");
        assert_eq!(page[56..64], [4, 3, 2, 1, 0, 0, 0, 0]);
        assert!(page[64..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        assert_every_flip_is_found(&SAMPLE.encode(), |page| DriveIdentity::decode(page).is_ok());
    }

    #[test]
    fn what_is_not_an_identity_is_told_apart() {
        let kind = |page: &[u8]| DriveIdentity::decode(page).map(drop).map_err(|error| error.kind());
        let page = SAMPLE.encode();
        assert_eq!(kind(b""), Err(ErrorKind::ForeignFormat));
        assert_eq!(kind(b"# my drive"), Err(ErrorKind::ForeignFormat));
        assert_eq!(kind(&page[..100]), Err(ErrorKind::Corrupt));
        let mut newer = page;
        put(&mut newer, 16, &2u16.to_le_bytes());
        seal(&mut newer);
        assert_eq!(kind(&newer), Err(ErrorKind::NewerFormat));
    }
}
