//! What `make fuzz` throws bytes at: every structure that is read from a drive. Each must say what is wrong, or read as it
//! would be written again; none may panic, loop, or take memory for what the bytes only claim.

use super::drive_identity::DriveIdentity;
use super::encryption::{HeaderKey, fuzz_key_entry};
use super::namespace_end::fuzz_end;
use super::namespaces::fuzz_entry;
use super::page::{PAGE_BYTES, Page, seal};
use super::record_header::{RecordHeader, authenticate};
use super::region_header::RegionHeader;
use super::superblock::Superblock;
use super::version::check_version_text;
use crate::codec::{Codec, Decoder};

/// The most bytes that a frame may claim to decode to here.
const RAW_BYTES_MAX: u64 = 4 << 20;

/// A structure on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FuzzTarget {
    /// The header of a record, of a plain store.
    RecordHeader,
    /// The header of a record, of an encrypted store, with a right code.
    SealedRecordHeader,
    /// The header of a region.
    RegionHeader,
    /// The superblock.
    Superblock,
    /// The identity of a drive.
    DriveIdentity,
    /// An entry of the file of namespaces.
    Namespace,
    /// An entry of the files of keys.
    KeyEntry,
    /// The text of `VERSION`.
    Version,
    /// An encoded payload: codec u16, decoded bytes u64, frame.
    Frame,
}

impl FuzzTarget {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::RecordHeader,
        Self::SealedRecordHeader,
        Self::RegionHeader,
        Self::Superblock,
        Self::DriveIdentity,
        Self::Namespace,
        Self::KeyEntry,
        Self::Version,
        Self::Frame,
    ];

    /// Reads the bytes as they are, and with their checksum made right. What came of both, in words.
    pub fn run(self, bytes: &[u8]) -> String {
        let mut page: Page = [0; PAGE_BYTES];
        let length = bytes.len().min(PAGE_BYTES);
        page[..length].copy_from_slice(&bytes[..length]);
        let mut sealed = page;
        seal(&mut sealed);
        match self {
            Self::RecordHeader => {
                both([&page, &sealed], |page| RecordHeader::decode(page, None).map(|header| _ = header.encode(None)))
            }
            Self::SealedRecordHeader => {
                let key = HeaderKey::from_secret(&[7; 32]);
                authenticate(&mut page, &key);
                both([&page, &sealed], |page| {
                    RecordHeader::decode(page, Some(&key)).map(|header| _ = header.encode(Some(&key)))
                })
            }
            Self::RegionHeader => both([&page, &sealed], |page| {
                RegionHeader::decode(page).map(|header| _ = header.encode()).ok_or("none")
            }),
            Self::Superblock => {
                both([&page, &sealed], |page| Superblock::decode(page).map(|superblock| _ = superblock.encode()))
            }
            Self::DriveIdentity => {
                both([&page, &sealed], |page| DriveIdentity::decode(page).map(|identity| _ = identity.encode()))
            }
            Self::Namespace => format!("{:?}, {:?}", fuzz_entry(bytes), fuzz_end(bytes)),
            Self::KeyEntry => format!("{:?}", fuzz_key_entry(bytes)),
            Self::Version => format!("{:?}", check_version_text(bytes).map_err(|error| error.kind())),
            Self::Frame => {
                let Some((codec, rest)) = bytes.split_first_chunk::<2>() else { return String::new() };
                let Some((raw_bytes, frame)) = rest.split_first_chunk::<8>() else { return String::new() };
                let raw_bytes = u64::from_le_bytes(*raw_bytes).min(RAW_BYTES_MAX);
                let Some(codec) = Codec::from_number(u16::from_le_bytes(*codec)) else { return "codec".into() };
                let mut decoded = 0;
                let result =
                    Decoder::new().decode_each(codec, frame, raw_bytes, &mut |chunk| decoded += chunk.len() as u64);
                assert!(decoded <= raw_bytes, "{decoded} bytes of {raw_bytes}");
                assert!(result.is_err() || decoded == raw_bytes, "{decoded} bytes of {raw_bytes}, and it is well");
                label(result.map(drop))
            }
        }
    }
}

fn both<E: std::fmt::Display>(pages: [&Page; 2], read: impl Fn(&Page) -> Result<(), E>) -> String {
    pages.map(|page| label(read(page))).join(", ")
}

/// The outcome, without its numbers: two inputs that fail at the same place have the same.
fn label<E: std::fmt::Display>(result: Result<(), E>) -> String {
    match result {
        Ok(()) => "read".into(),
        Err(error) => error.to_string().chars().filter(|c| !c.is_ascii_hexdigit()).collect(),
    }
}
