//! The key of one namespace, and what is done with it: payloads are sealed, and records get names that say nothing to
//! whoever does not have it.
//!
//! # Why no nonce comes twice under one key
//! A payload is sealed with `K = BLAKE3(data key, salt)` and the nonce `opens || number`. The salt is 16 random bytes, new
//! with each open of the store. `number` is taken from one counter of the open, which starts at 1 and only rises (64 bits):
//! no two records of one open share it, whichever of the store's threads seals them, for whichever namespace, and a record
//! that is sealed once more, because a write failed, takes another. `opens` counts the opens of the store: an open makes
//! it durable, one higher, in the superblock before it seals anything, so a crash leads to another `opens`, and so does
//! a rebuild of the index, which takes place inside of an open and reads only. Should somebody put an older copy of the
//! whole store back, `opens` comes again: then it is the salt that differs, and with it K. A record that is written again
//! elsewhere before its region goes keeps its sealed bytes, with their nonce: the same bytes under the same nonce.

use std::ops::Range;

use ring::aead::{Aad, LessSafeKey, Nonce};
use zeroize::Zeroizing;

use super::{KEY_BYTES, NONCE_BYTES, TAG_BYTES, cipher};
use crate::block::{BlockKey, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::nvme::page::{PAGE_BYTES, get, get_u64, put};
use crate::nvme::record_header::{DiskIdentity, HeaderKind};
use crate::nvme::version::StoreUuid;

const INDEX_CONTEXT: &str = "pegaflow 2026-11-23 names of records v1";
const PREFIX_CONTEXT: &str = "pegaflow 2026-11-23 first bytes of names of records v1";
const PAYLOAD_CONTEXT: &str = "pegaflow 2026-11-23 payloads v1";
/// Bytes of the salt from which an open's key for payloads is derived.
const SALT_BYTES: usize = 16;
/// Where the sealed names stand in a header's page: at its end, so that one cipher goes over them and the payload.
pub(in crate::nvme) const SEALED_AT: usize = PAGE_BYTES - SEALED_NAMES_BYTES;
const SEALED_NAMES_BYTES: usize = 80;

/// The names of a record that its header has no room for in clear: key 32, parent 32, checksum of the decoded payload 8,
/// zero 8; sealed.
pub(in crate::nvme) type SealedNames = [u8; SEALED_NAMES_BYTES];

/// What a header says of how its payload is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nvme) struct Seal {
    /// The number of the data key; never 0.
    pub(in crate::nvme) key: u32,
    /// Which key was derived from it.
    pub(in crate::nvme) salt: [u8; SALT_BYTES],
    /// See the module.
    pub(in crate::nvme) nonce: [u8; NONCE_BYTES],
    /// Of the names and the payload, with the header's identity and lengths as associated data.
    pub(in crate::nvme) tag: [u8; TAG_BYTES],
    /// The sealed names.
    pub(in crate::nvme) names: SealedNames,
}

/// The names of a record in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nvme) struct Names {
    pub(in crate::nvme) key: BlockKey,
    pub(in crate::nvme) parent: BlockKey,
}

/// What a payload is sealed as: it opens as nothing else. Nothing of it changes when a record is written again elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nvme) struct Subject {
    pub(in crate::nvme) store: StoreUuid,
    pub(in crate::nvme) kind: HeaderKind,
    pub(in crate::nvme) identity: DiskIdentity,
    pub(in crate::nvme) shards: u16,
    pub(in crate::nvme) key_version: u16,
    pub(in crate::nvme) parent: BlockKey,
    pub(in crate::nvme) depth: u32,
}

/// The form of the bytes that are sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nvme) struct SealedAs {
    pub(in crate::nvme) codec: u16,
    pub(in crate::nvme) raw_bytes: u64,
    pub(in crate::nvme) stored_bytes: u64,
    /// Of the decoded payload; 0 where it is stored as it is, for there the tag says the same.
    pub(in crate::nvme) raw_xxh3: u64,
}

const ASSOCIATED_BYTES: usize = 168;

impl Subject {
    fn associated(&self, form: &SealedAs, key: u32, salt: &[u8; SALT_BYTES]) -> [u8; ASSOCIATED_BYTES] {
        let mut bytes = [0; ASSOCIATED_BYTES];
        put(&mut bytes, 0, self.store.as_bytes());
        put(&mut bytes, 16, salt);
        put(&mut bytes, 32, &key.to_le_bytes());
        put(&mut bytes, 36, &(self.kind as u16).to_le_bytes());
        put(&mut bytes, 38, &self.identity.group.to_le_bytes());
        put(&mut bytes, 40, &self.identity.shard.to_le_bytes());
        put(&mut bytes, 42, &self.shards.to_le_bytes());
        put(&mut bytes, 44, &form.codec.to_le_bytes());
        put(&mut bytes, 46, &self.key_version.to_le_bytes());
        put(&mut bytes, 48, self.identity.namespace.as_bytes());
        put(&mut bytes, 80, self.identity.key.as_bytes());
        put(&mut bytes, 112, self.parent.as_bytes());
        put(&mut bytes, 144, &self.depth.to_le_bytes());
        put(&mut bytes, 152, &form.raw_bytes.to_le_bytes());
        put(&mut bytes, 160, &form.stored_bytes.to_le_bytes());
        bytes
    }
}

/// The data key of a namespace. Wiped when the last user lets go of it, but for what the cipher keeps of it.
pub(in crate::nvme) struct DataKey {
    number: u32,
    payloads: Zeroizing<[u8; KEY_BYTES]>,
    index: Zeroizing<[u8; KEY_BYTES]>,
    prefix: Zeroizing<[u8; KEY_BYTES]>,
    /// What this open seals with.
    salt: [u8; SALT_BYTES],
    sealing: LessSafeKey,
}

impl DataKey {
    /// The key with a number, for an open with this salt.
    ///
    /// # Errors
    /// `Unsupported` if there is no AES-256-GCM.
    pub(super) fn new(number: u32, root: &[u8; KEY_BYTES], salt: [u8; SALT_BYTES]) -> Result<Self> {
        let derive = |context: &str| Zeroizing::new(blake3::derive_key(context, root));
        let payloads = derive(PAYLOAD_CONTEXT);
        let sealing = derived_cipher(&payloads, &salt)?;
        Ok(Self { number, payloads, index: derive(INDEX_CONTEXT), prefix: derive(PREFIX_CONTEXT), salt, sealing })
    }

    /// The number under which it stands in headers.
    pub(in crate::nvme) fn number(&self) -> u32 {
        self.number
    }

    /// The first eight bytes of the name of a record whose key has this [`BlockKey::prefix`].
    pub(in crate::nvme) fn prefix(&self, prefix: u64) -> u64 {
        let hash = blake3::keyed_hash(&self.prefix, &prefix.to_le_bytes());
        get_u64(hash.as_bytes(), 0)
    }

    /// The name under which a key stands in headers and in the index. The first eight bytes follow from the key's first
    /// eight, for whoever has no more of it; the others from all of it. No key of a block has no name.
    pub(in crate::nvme) fn name(&self, key: BlockKey) -> BlockKey {
        if key.is_root() {
            return key;
        }
        let mut name = *blake3::keyed_hash(&self.index, key.as_bytes()).as_bytes();
        put(&mut name, 0, &self.prefix(key.prefix()).to_le_bytes());
        BlockKey::from_bytes(name)
    }

    /// As [`DataKey::name`], of a whole identity.
    pub(in crate::nvme) fn rename(&self, id: &RecordId) -> RecordId {
        id.with_key(self.name(id.key))
    }

    /// Seals the payload in `image`, the page of a header and what follows it, with the record's names, in place.
    /// `number` must not have been used in this open.
    ///
    /// # Errors
    /// `InvalidInput` if the image is shorter than its payload.
    pub(super) fn seal(
        &self,
        subject: &Subject,
        form: &SealedAs,
        names: &Names,
        (opens, number): (u32, u64),
        image: &mut [u8],
    ) -> Result<Seal> {
        let mut nonce = [0; NONCE_BYTES];
        put(&mut nonce, 0, &opens.to_le_bytes());
        put(&mut nonce, 4, &number.to_le_bytes());
        let sealed = image.get_mut(sealed_range(form.stored_bytes)).ok_or_else(too_short)?;
        put(sealed, 0, names.key.as_bytes());
        put(sealed, 32, names.parent.as_bytes());
        put(sealed, 64, &form.raw_xxh3.to_le_bytes());
        put(sealed, 72, &[0; 8]);
        let associated = Aad::from(subject.associated(form, self.number, &self.salt));
        let tag = self.sealing.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), associated, sealed);
        let tag = tag.map_err(|_| Error::new(ErrorKind::InvalidInput, "the payload is too long to be sealed"))?;
        Ok(Seal { key: self.number, salt: self.salt, nonce, tag: get(tag.as_ref(), 0), names: get(sealed, 0) })
    }

    /// Opens the payload in `image`, in place: the record's names, and the checksum of the decoded payload.
    ///
    /// # Errors
    /// `Corrupt` if the tag does not match: then what is in the image is worth nothing.
    pub(in crate::nvme) fn open(
        &self,
        subject: &Subject,
        form: &SealedAs,
        seal: &Seal,
        image: &mut [u8],
    ) -> Result<(Names, u64)> {
        let sealed = image.get_mut(sealed_range(form.stored_bytes)).ok_or_else(too_short)?;
        let cipher = derived_cipher(&self.payloads, &seal.salt)?;
        let associated = Aad::from(subject.associated(form, self.number, &seal.salt));
        let nonce = Nonce::assume_unique_for_key(seal.nonce);
        let opened = cipher.open_in_place_separate_tag(nonce, associated, seal.tag.into(), sealed, 0..);
        let opened = opened.map_err(|_| {
            let message = "a record's payload does not match its tag: it is damaged, or was changed";
            Error::new(ErrorKind::Corrupt, message)
        })?;
        let names = Names { key: BlockKey::from_bytes(get(opened, 0)), parent: BlockKey::from_bytes(get(opened, 32)) };
        Ok((names, get_u64(opened, 64)))
    }
}

impl std::fmt::Debug for DataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataKey").field("number", &self.number).finish_non_exhaustive()
    }
}

fn derived_cipher(payloads: &[u8; KEY_BYTES], salt: &[u8; SALT_BYTES]) -> Result<LessSafeKey> {
    let key = Zeroizing::new(*blake3::keyed_hash(payloads, salt).as_bytes());
    cipher(&key)
}

/// The names at the end of the header's page, and the payload behind them.
fn sealed_range(stored_bytes: u64) -> Range<usize> {
    SEALED_AT..PAGE_BYTES.saturating_add(usize::try_from(stored_bytes).unwrap_or(usize::MAX))
}

fn too_short() -> Error {
    Error::new(ErrorKind::Corrupt, "a sealed record is longer than its pages")
}
