//! The header of a record: everything that says what the bytes after it are. With it a region describes itself, so the
//! index can be deleted and rebuilt, and nothing read from a drive is believed before it matches. `docs/format.md`
//! draws it; its layout is frozen.

use super::encryption::{HeaderKey, SEALED_AT, Seal, SealedAs, SealedNames, Subject};
use super::page::{PAGE_BYTES, Page, get, get_u16, get_u32, get_u64, is_sealed, pages_of, put, seal};
use super::switches::is_off;
use super::version::{FORMAT_VERSION, StoreUuid};
use crate::block::{BlockKey, NamespaceId, RecordKind};
use crate::codec::Codec;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Location;

const MAGIC: &[u8; 8] = b"PEGARECD";
/// The payload is stored as it is.
pub(super) const CODEC_STORED: u16 = Codec::Stored.number();
/// An older record of the same identity was known when this one was written: whoever drops this record must leave a
/// tombstone as long as the older one may lie somewhere.
const FLAG_REPLACES: u32 = 1;
/// Where the code stands that authenticates the header, in an encrypted store.
const CODE_AT: usize = 280;

/// What a record on disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum HeaderKind {
    /// A block of a KV cache.
    Kv = 1,
    /// A named object.
    Object = 2,
    /// Hides the records of its identity up to the sequence in `hides`. Header only.
    Tombstone = 3,
    /// Ends what a crash left: what lies behind it in the region with a lower sequence does not count. Header only.
    Fence = 4,
}

impl HeaderKind {
    fn from_u16(value: u16) -> Option<Self> {
        [Self::Kv, Self::Object, Self::Tombstone, Self::Fence].into_iter().find(|&kind| kind as u16 == value)
    }

    /// The kind in the crate's API; `None` for a fence, which is no record of a user.
    pub(super) fn record_kind(self) -> Option<RecordKind> {
        match self {
            Self::Kv => Some(RecordKind::Kv),
            Self::Object => Some(RecordKind::Object),
            Self::Tombstone => Some(RecordKind::Tombstone),
            Self::Fence => None,
        }
    }

    /// Whether a payload follows the header.
    pub(super) fn has_payload(self) -> bool {
        matches!(self, Self::Kv | Self::Object)
    }
}

impl From<RecordKind> for HeaderKind {
    fn from(kind: RecordKind) -> Self {
        match kind {
            RecordKind::Kv => Self::Kv,
            RecordKind::Object => Self::Object,
            RecordKind::Tombstone => Self::Tombstone,
        }
    }
}

/// Who a record is, in the terms of the disk: the namespace by its digest, not by its number in one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskIdentity {
    pub(super) namespace: NamespaceId,
    pub(super) group: u16,
    pub(super) shard: u16,
    pub(super) key: BlockKey,
}

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub(super) kind: HeaderKind,
    /// Whether an older record of the identity was known when this one was written.
    pub(super) replaces: bool,
    pub(super) store: StoreUuid,
    /// Region, generation, page and pages: where this header claims to lie.
    pub(super) location: Location,
    /// Rises with every record of the store.
    pub(super) sequence: u64,
    /// Tombstones only: records of the identity with this sequence or a lower one are removed.
    pub(super) hides: u64,
    pub(super) identity: DiskIdentity,
    /// How many shards the block has in all.
    pub(super) shards: u16,
    /// How the payload is encoded.
    pub(super) codec: u16,
    /// The version of the key chain.
    pub(super) key_version: u16,
    /// The key of the block before it in its chain; all zero for a first block.
    pub(super) parent: BlockKey,
    /// How many blocks come before it in its chain.
    pub(super) depth: u32,
    /// Bytes of the payload when decoded.
    pub(super) raw_bytes: u64,
    /// Bytes of the payload on disk, without the padding of the last page.
    pub(super) stored_bytes: u64,
    /// xxh3-64 of the stored bytes.
    pub(super) stored_xxh3: u64,
    /// xxh3-64 of the decoded bytes.
    pub(super) raw_xxh3: u64,
    /// When it was written, in milliseconds since 1970; information only.
    pub(super) created_unix_ms: u64,
    /// How the payload is encrypted; `None` in a store that is not, and where there is no payload. Then `raw_xxh3` is 0:
    /// it is sealed too, since it would tell of what is in the payload.
    pub(super) seal: Option<Seal>,
}

impl RecordHeader {
    /// The page on disk; `key` is that of an encrypted store, in which headers are authenticated.
    ///
    /// # Panics
    /// If the lengths do not fit together, or if a payload is not sealed that has to be: such a header must never reach
    /// a drive.
    pub(super) fn encode(&self, key: Option<&HeaderKey>) -> Page {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, MAGIC);
        put(&mut page, 16, &FORMAT_VERSION.to_le_bytes());
        put(&mut page, 18, &(self.kind as u16).to_le_bytes());
        put(&mut page, 20, &(if self.replaces { FLAG_REPLACES } else { 0 }).to_le_bytes());
        put(&mut page, 24, self.store.as_bytes());
        put(&mut page, 40, &self.location.region.to_le_bytes());
        put(&mut page, 44, &self.location.page.to_le_bytes());
        put(&mut page, 48, &self.location.pages.to_le_bytes());
        put(&mut page, 52, &self.identity.group.to_le_bytes());
        put(&mut page, 54, &self.identity.shard.to_le_bytes());
        put(&mut page, 56, &self.shards.to_le_bytes());
        put(&mut page, 58, &self.codec.to_le_bytes());
        put(&mut page, 60, &self.key_version.to_le_bytes());
        put(&mut page, 64, &self.location.generation.to_le_bytes());
        put(&mut page, 72, &self.sequence.to_le_bytes());
        put(&mut page, 80, &self.hides.to_le_bytes());
        put(&mut page, 88, self.identity.namespace.as_bytes());
        put(&mut page, 120, self.identity.key.as_bytes());
        put(&mut page, 152, self.parent.as_bytes());
        put(&mut page, 184, &self.depth.to_le_bytes());
        put(&mut page, 192, &self.raw_bytes.to_le_bytes());
        put(&mut page, 200, &self.stored_bytes.to_le_bytes());
        put(&mut page, 208, &self.stored_xxh3.to_le_bytes());
        put(&mut page, 216, &self.raw_xxh3.to_le_bytes());
        put(&mut page, 224, &self.created_unix_ms.to_le_bytes());
        if let Some(seal) = &self.seal {
            put(&mut page, 188, &seal.key.to_le_bytes());
            put(&mut page, 232, &seal.salt);
            put(&mut page, 248, &seal.nonce);
            put(&mut page, 264, &seal.tag);
            put(&mut page, SEALED_AT, &seal.names);
        }
        if let Some(key) = key {
            let code = code(&page, key);
            put(&mut page, CODE_AT, code.as_bytes());
        }
        seal(&mut page);
        assert_eq!(Self::decode(&page, key).ok().as_ref(), Some(self), "a record header reads as it was written");
        page
    }

    /// Reads a header and checks that it is whole and makes sense by itself. Where it lies is checked by
    /// [`RecordHeader::check_place`], whose it is by [`RecordHeader::check_identity`].
    ///
    /// `key` is that of an encrypted store.
    ///
    /// # Errors
    /// `Corrupt` with what is wrong.
    pub(super) fn decode(page: &[u8], key: Option<&HeaderKey>) -> Result<Self> {
        if get::<8>(page, 0) != *MAGIC {
            return Err(corrupt("magic"));
        }
        if !is_sealed(page) && !is_off!(SkipHeaderChecksum) {
            return Err(corrupt("header checksum"));
        }
        if get_u16(page, 16) != FORMAT_VERSION {
            return Err(corrupt("format version"));
        }
        let kind = HeaderKind::from_u16(get_u16(page, 18)).ok_or_else(|| corrupt("kind"))?;
        let flags = get_u32(page, 20);
        if flags & !FLAG_REPLACES != 0 {
            return Err(corrupt("flag"));
        }
        let written = blake3::Hash::from_bytes(get(page, CODE_AT));
        let is_authentic = match key {
            Some(key) => code(page, key) == written || is_off!(SkipHeaderCode),
            None => written.as_bytes() == &[0; 32],
        };
        if !is_authentic {
            return Err(corrupt("code: it was changed, or written with another key"));
        }
        let seal = (get_u32(page, 188) != 0).then(|| Seal {
            key: get_u32(page, 188),
            salt: get(page, 232),
            nonce: get(page, 248),
            tag: get(page, 264),
            names: get::<{ size_of::<SealedNames>() }>(page, SEALED_AT),
        });
        if seal.is_some() != (key.is_some() && kind.has_payload()) {
            return Err(corrupt("seal"));
        }
        let header = Self {
            kind,
            replaces: flags & FLAG_REPLACES != 0,
            store: StoreUuid::from_bytes(get(page, 24)),
            location: Location {
                region: get_u32(page, 40),
                generation: get_u64(page, 64),
                page: get_u32(page, 44),
                pages: get_u32(page, 48),
            },
            sequence: get_u64(page, 72),
            hides: get_u64(page, 80),
            identity: DiskIdentity {
                namespace: NamespaceId::from_bytes(get(page, 88)),
                group: get_u16(page, 52),
                shard: get_u16(page, 54),
                key: BlockKey::from_bytes(get(page, 120)),
            },
            shards: get_u16(page, 56),
            codec: get_u16(page, 58),
            key_version: get_u16(page, 60),
            parent: BlockKey::from_bytes(get(page, 152)),
            depth: get_u32(page, 184),
            raw_bytes: get_u64(page, 192),
            stored_bytes: get_u64(page, 200),
            stored_xxh3: get_u64(page, 208),
            raw_xxh3: get_u64(page, 216),
            created_unix_ms: get_u64(page, 224),
            seal,
        };
        header.check_lengths()?;
        Ok(header)
    }

    /// What its payload is sealed as.
    pub(super) fn subject(&self) -> Subject {
        Subject {
            store: self.store,
            kind: self.kind,
            identity: self.identity,
            shards: self.shards,
            key_version: self.key_version,
            parent: self.parent,
            depth: self.depth,
        }
    }

    /// The form in which its payload is sealed.
    pub(super) fn sealed_as(&self) -> SealedAs {
        SealedAs { codec: self.codec, raw_bytes: self.raw_bytes, stored_bytes: self.stored_bytes, raw_xxh3: 0 }
    }

    fn check_lengths(&self) -> Result<()> {
        let is_length_right = if self.kind.has_payload() {
            self.stored_bytes > 0 && self.raw_bytes > 0
        } else {
            self.stored_bytes == 0 && self.raw_bytes == 0
        };
        // A payload of more pages than a location can count is refused by `is_valid`.
        let is_pages_right = u64::from(self.location.pages) == pages_of(self.stored_bytes).saturating_add(1);
        // What is encoded is whole pages long, and shorter than what it decodes to.
        let is_raw_right = match self.codec {
            CODEC_STORED => self.raw_bytes == self.stored_bytes,
            _ => self.raw_bytes > self.stored_bytes && self.stored_bytes.is_multiple_of(PAGE_BYTES as u64),
        };
        if is_length_right && is_pages_right && is_raw_right && self.location.is_valid() {
            Ok(())
        } else {
            Err(corrupt("length"))
        }
    }

    /// Whether the header lies where it claims to, in the store and in the life of the region that it claims.
    ///
    /// # Errors
    /// `Corrupt` with what does not match.
    pub(super) fn check_place(&self, store: StoreUuid, region: u32, generation: u64, page: u32) -> Result<()> {
        if is_off!(SkipPlaceCheck) {
            return Ok(());
        }
        let claimed = self.location;
        if self.store != store {
            Err(corrupt("store identity"))
        } else if claimed.region != region {
            Err(mismatch("region", claimed.region, region))
        } else if claimed.generation != generation {
            Err(mismatch("generation", claimed.generation, generation))
        } else if claimed.page != page {
            Err(mismatch("page", claimed.page, page))
        } else {
            Ok(())
        }
    }

    /// Whether the record is the one that was asked for.
    ///
    /// # Errors
    /// `Corrupt` with what does not match.
    pub(super) fn check_identity(&self, expected: &DiskIdentity) -> Result<()> {
        let found = &self.identity;
        if is_off!(SkipIdentityCheck) {
            return Ok(());
        }
        if found.namespace != expected.namespace {
            Err(mismatch("namespace", found.namespace, expected.namespace))
        } else if found.group != expected.group {
            Err(mismatch("group", found.group, expected.group))
        } else if found.shard != expected.shard {
            Err(mismatch("shard", found.shard, expected.shard))
        } else if found.key != expected.key {
            Err(mismatch("key", found.key, expected.key))
        } else {
            Ok(())
        }
    }
}

/// What authenticates a header: everything in its page that is ever looked at, but for the checksum.
fn code(page: &[u8], key: &HeaderKey) -> blake3::Hash {
    key.code(&[&page[..8], &page[16..CODE_AT], &page[SEALED_AT..]])
}

/// Makes the code and the checksum of a page right, whatever else it says.
#[cfg(any(test, feature = "fault-injection"))]
pub(super) fn authenticate(page: &mut Page, key: &HeaderKey) {
    let code = code(page, key);
    put(page, CODE_AT, code.as_bytes());
    seal(page);
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("a record's header has a wrong {what}"))
}

fn mismatch(what: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("a record's header has {what} {found}, expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    const STORE: StoreUuid = StoreUuid::from_bytes(*b"0123456789abcdef");

    fn header() -> RecordHeader {
        RecordHeader {
            kind: HeaderKind::Kv,
            replaces: false,
            store: STORE,
            location: Location { region: 0x0001_0203, generation: 0x1112_1314_1516_1718, page: 0x21_2223, pages: 3 },
            sequence: 0x3132_3334_3536_3738,
            hides: 0,
            identity: DiskIdentity {
                namespace: NamespaceId::from_bytes([0xa1; 32]),
                group: 0x4142,
                shard: 0x5152,
                key: BlockKey::from_bytes([0xb2; 32]),
            },
            shards: 0x6162,
            codec: CODEC_STORED,
            key_version: 1,
            parent: BlockKey::from_bytes([0xc3; 32]),
            depth: 0x7172_7374,
            raw_bytes: 5000,
            stored_bytes: 5000,
            stored_xxh3: 0x8182_8384_8586_8788,
            raw_xxh3: 0x9192_9394_9596_9798,
            created_unix_ms: 1_790_000_000_000,
            seal: None,
        }
    }

    #[test]
    fn the_bytes_are_frozen() {
        let page = header().encode(None);
        assert_eq!(&page[0..8], b"PEGARECD");
        assert_eq!(page[16..24], [1, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(&page[24..40], b"0123456789abcdef");
        assert_eq!(page[40..52], [3, 2, 1, 0, 0x23, 0x22, 0x21, 0, 3, 0, 0, 0]);
        assert_eq!(page[52..64], [0x42, 0x41, 0x52, 0x51, 0x62, 0x61, 0, 0, 1, 0, 0, 0]);
        assert_eq!(page[64..72], [0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]);
        assert_eq!(page[72..80], [0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31]);
        assert_eq!(page[80..88], [0; 8]);
        assert_eq!((page[88], page[120], page[152]), (0xa1, 0xb2, 0xc3));
        assert_eq!(page[184..192], [0x74, 0x73, 0x72, 0x71, 0, 0, 0, 0]);
        assert_eq!(page[192..208], [0x88, 0x13, 0, 0, 0, 0, 0, 0, 0x88, 0x13, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[208..210], [0x88, 0x87]);
        assert_eq!(page[216..218], [0x98, 0x97]);
        assert!(page[232..].iter().all(|&byte| byte == 0));
        assert_eq!(blake3::hash(&page).to_string(), "b3b16bb0a198813fb4856bc4e4f809c9000170d70ff818bbe0e2b0e2e3722bea");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        assert_every_flip_is_found(&header().encode(None), |page| RecordHeader::decode(page, None).is_ok());
    }

    #[test]
    fn every_kind_and_flag_round_trips() {
        let bare = RecordHeader {
            location: Location { pages: 1, ..header().location },
            raw_bytes: 0,
            stored_bytes: 0,
            hides: 77,
            ..header()
        };
        for expected in [
            RecordHeader { kind: HeaderKind::Object, replaces: true, ..header() },
            RecordHeader { codec: 2, raw_bytes: 90_000, stored_bytes: 8192, ..header() },
            RecordHeader { kind: HeaderKind::Tombstone, ..bare },
            RecordHeader { kind: HeaderKind::Fence, ..bare },
        ] {
            assert_eq!(RecordHeader::decode(&expected.encode(None), None).expect("intact"), expected);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_together_are_refused() {
        let reseal = |change: &dyn Fn(&mut Page)| {
            let mut page = header().encode(None);
            change(&mut page);
            seal(&mut page);
            RecordHeader::decode(&page, None).map_err(|error| error.kind())
        };
        assert!(reseal(&|_| ()).is_ok());
        for offset in [48, 192, 200] {
            let refused = reseal(&|page| put(page, offset, &9_000_000u32.to_le_bytes()));
            assert_eq!(refused, Err(ErrorKind::Corrupt), "offset {offset}");
        }
        assert_eq!(reseal(&|page| put(page, 200, &u64::MAX.to_le_bytes())), Err(ErrorKind::Corrupt));
        assert_eq!(reseal(&|page| put(page, 18, &9u16.to_le_bytes())), Err(ErrorKind::Corrupt));
        assert_eq!(reseal(&|page| put(page, 20, &2u32.to_le_bytes())), Err(ErrorKind::Corrupt));
        assert_eq!(reseal(&|page| put(page, 16, &2u16.to_le_bytes())), Err(ErrorKind::Corrupt));
    }

    #[test]
    fn a_header_of_another_place_or_record_is_refused() {
        let header = header();
        let Location { region, generation, page, .. } = header.location;
        assert!(header.check_place(STORE, region, generation, page).is_ok());
        assert!(header.check_place(StoreUuid::from_bytes([1; 16]), region, generation, page).is_err());
        assert!(header.check_place(STORE, region + 1, generation, page).is_err());
        assert!(header.check_place(STORE, region, generation - 1, page).is_err());
        assert!(header.check_place(STORE, region, generation, page + 1).is_err());
        let identity = header.identity;
        assert!(header.check_identity(&identity).is_ok());
        for other in [
            DiskIdentity { namespace: NamespaceId::from_bytes([1; 32]), ..identity },
            DiskIdentity { group: 0, ..identity },
            DiskIdentity { shard: 0, ..identity },
            DiskIdentity { key: BlockKey::ROOT, ..identity },
        ] {
            assert_eq!(header.check_identity(&other).map_err(|e| e.kind()), Err(ErrorKind::Corrupt));
        }
    }
}
