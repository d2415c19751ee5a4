//! The file of a pack: header (64 bytes), the blocks one after the other, manifest, footer (160 bytes). All numbers are
//! little-endian. docs/format.md draws it.
//!
//! The manifest names each block with its place and the BLAKE3 digest of its bytes as they lie in the file; the footer has the digest of header and
//! manifest, and the signature of that: whoever trusts the signature trusts every byte.

use pegaflow_engine::{BlockKey, Error, ErrorKind, GroupGeometry, NamespaceDescriptor, Result};
use serde_json::{Value, json};

pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 64;
pub(super) const ENTRY_BYTES: usize = 128;
pub(super) const FOOTER_BYTES: usize = 160;
/// The head of the manifest, as JSON.
pub(super) const HEAD_BYTES_MAX: usize = 1 << 20;
/// What is signed is the digest with this before it.
pub(super) const CONTEXT: &[u8] = b"PegaFlow pack v1\0";
const MAGIC: &[u8; 8] = b"PEGAPACK";
const END_MAGIC: &[u8; 8] = b"PEGAPEND";
const GROUPS_MAX: usize = 64;

pub(super) fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what.into())
}

/// Little-endian numbers and names at fixed places of a buffer that is long enough.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut found = [0; N];
    found.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
    found
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = *from);
}

/// Magic 8, version u32, zeros.
pub(super) fn header() -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    put(&mut bytes, 0, MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    bytes
}

/// Whether this is the header of a pack that can be read.
///
/// # Errors
/// `ForeignFormat`, `NewerFormat`.
pub(super) fn check_header(bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(MAGIC) {
        return Err(Error::new(ErrorKind::ForeignFormat, "this is no pack of PegaFlow"));
    }
    match u32::from_le_bytes(bytes_at(bytes, 8)) {
        VERSION => Ok(()),
        newer => {
            let message = format!("the pack has version {newer}; this program reads {VERSION}, take a newer one");
            Err(Error::new(ErrorKind::NewerFormat, message))
        }
    }
}

/// One block. Key 32, parent 32, BLAKE3 of its bytes in the file 32, offset u64, bytes in the file u32, bytes of the payload u32, depth
/// u32, group u16, shard u16, flags u32 (1: the bytes are one zstd frame), zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub key: BlockKey,
    pub parent: BlockKey,
    pub digest: [u8; 32],
    pub offset: u64,
    pub stored_bytes: u32,
    pub payload_bytes: u32,
    pub depth: u32,
    pub group: u16,
    pub shard: u16,
    pub is_zstd: bool,
}

impl Entry {
    pub(super) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        put(&mut bytes, 0, self.key.as_bytes());
        put(&mut bytes, 32, self.parent.as_bytes());
        put(&mut bytes, 64, &self.digest);
        put(&mut bytes, 96, &self.offset.to_le_bytes());
        put(&mut bytes, 104, &self.stored_bytes.to_le_bytes());
        put(&mut bytes, 108, &self.payload_bytes.to_le_bytes());
        put(&mut bytes, 112, &self.depth.to_le_bytes());
        put(&mut bytes, 116, &self.group.to_le_bytes());
        put(&mut bytes, 118, &self.shard.to_le_bytes());
        put(&mut bytes, 120, &u32::from(self.is_zstd).to_le_bytes());
        bytes
    }

    /// Reads an entry; `end` is where the blocks end.
    ///
    /// # Errors
    /// `Corrupt` for a block that lies outside of the blocks, or flags that are not known.
    pub(super) fn decode(bytes: &[u8; ENTRY_BYTES], end: u64) -> Result<Self> {
        let flags = u32::from_le_bytes(bytes_at(bytes, 120));
        let entry = Self {
            key: BlockKey::from_bytes(bytes_at(bytes, 0)),
            parent: BlockKey::from_bytes(bytes_at(bytes, 32)),
            digest: bytes_at(bytes, 64),
            offset: u64::from_le_bytes(bytes_at(bytes, 96)),
            stored_bytes: u32::from_le_bytes(bytes_at(bytes, 104)),
            payload_bytes: u32::from_le_bytes(bytes_at(bytes, 108)),
            depth: u32::from_le_bytes(bytes_at(bytes, 112)),
            group: u16::from_le_bytes(bytes_at(bytes, 116)),
            shard: u16::from_le_bytes(bytes_at(bytes, 118)),
            is_zstd: flags == 1,
        };
        let is_inside = entry.offset >= HEADER_BYTES as u64
            && entry.offset.checked_add(entry.stored_bytes.into()).is_some_and(|last| last <= end);
        if !is_inside || flags > 1 || (!entry.is_zstd && entry.stored_bytes != entry.payload_bytes) {
            return Err(corrupt("the manifest has a block that can not be"));
        }
        Ok(entry)
    }
}

/// What the manifest says of all blocks: a length u32, then so much JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub descriptor: NamespaceDescriptor,
    pub groups: Vec<GroupGeometry>,
    /// Seconds since 1970.
    pub created: u64,
    /// Bytes of all payloads.
    pub payload_bytes: u64,
}

impl Head {
    /// One group of blocks of 64 bytes.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn example() -> Self {
        Self {
            descriptor: NamespaceDescriptor::new().with("model", "example"),
            groups: vec![GroupGeometry { group: 0, block_bytes: 64, shards: 1 }],
            created: 1,
            payload_bytes: 64,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let groups: Vec<Value> = self
            .groups
            .iter()
            .map(|it| json!({ "group": it.group, "block_bytes": it.block_bytes, "shards": it.shards }))
            .collect();
        let text = json!({
            "namespace": self.descriptor.fields(),
            "groups": groups,
            "created": self.created,
            "payload_bytes": self.payload_bytes,
            "pegaflow": env!("CARGO_PKG_VERSION"),
        })
        .to_string();
        [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// # Errors
    /// `Corrupt` for anything but the JSON of a head; the groups are within the limits of a store.
    pub fn decode(text: &[u8]) -> Result<Self> {
        let bad = || corrupt("the manifest's head is not understood");
        let value: Value = serde_json::from_slice(text).map_err(|_| bad())?;
        let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_u64);
        let fields = value.get("namespace").and_then(Value::as_object).filter(|fields| !fields.is_empty());
        let mut descriptor = NamespaceDescriptor::new();
        for (name, field) in fields.ok_or_else(bad)? {
            descriptor = descriptor.with(name.as_str(), field.as_str().ok_or_else(bad)?);
        }
        let listed = value.get("groups").and_then(Value::as_array).filter(|groups| groups.len() <= GROUPS_MAX);
        let mut groups = Vec::new();
        for group in listed.ok_or_else(bad)? {
            let small = |name: &str| number(group, name).and_then(|number| u16::try_from(number).ok()).ok_or_else(bad);
            let block_bytes = number(group, "block_bytes").ok_or_else(bad)?;
            let geometry = GroupGeometry { group: small("group")?, block_bytes, shards: small("shards")? };
            geometry.validate()?;
            groups.push(geometry);
        }
        let (created, payload_bytes) = (number(&value, "created"), number(&value, "payload_bytes"));
        Ok(Self {
            descriptor,
            groups,
            created: created.ok_or_else(bad)?,
            payload_bytes: payload_bytes.ok_or_else(bad)?,
        })
    }
}

/// Manifest: offset u64, bytes u64, entries u64; BLAKE3 of header and manifest 32; the signer's public key 32 and its Ed25519
/// signature 64, zeros if nobody signed; magic 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    pub manifest_offset: u64,
    pub manifest_bytes: u64,
    pub entries: u64,
    pub digest: [u8; 32],
    pub signer: [u8; 32],
    pub signature: [u8; 64],
}

impl Footer {
    pub fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        put(&mut bytes, 0, &self.manifest_offset.to_le_bytes());
        put(&mut bytes, 8, &self.manifest_bytes.to_le_bytes());
        put(&mut bytes, 16, &self.entries.to_le_bytes());
        put(&mut bytes, 24, &self.digest);
        put(&mut bytes, 56, &self.signer);
        put(&mut bytes, 88, &self.signature);
        put(&mut bytes, 152, END_MAGIC);
        bytes
    }

    /// Reads the footer of a file of `file_bytes`.
    ///
    /// # Errors
    /// `Corrupt` if it is none, or what it says does not fit into the file.
    pub fn decode(bytes: &[u8; FOOTER_BYTES], file_bytes: u64) -> Result<Self> {
        if bytes_at(bytes, 152) != *END_MAGIC {
            return Err(corrupt("the pack has no end: it was cut off, or never finished"));
        }
        let number = |at| u64::from_le_bytes(bytes_at(bytes, at));
        let footer = Self {
            manifest_offset: number(0),
            manifest_bytes: number(8),
            entries: number(16),
            digest: bytes_at(bytes, 24),
            signer: bytes_at(bytes, 56),
            signature: bytes_at(bytes, 88),
        };
        let end = footer.manifest_offset.checked_add(footer.manifest_bytes);
        let fits = end.and_then(|end| end.checked_add(FOOTER_BYTES as u64)) == Some(file_bytes);
        let of_entries = footer.entries.checked_mul(ENTRY_BYTES as u64);
        let has_room = of_entries.is_some_and(|bytes| bytes <= footer.manifest_bytes);
        if footer.manifest_offset < HEADER_BYTES as u64 || !fits || !has_room {
            return Err(corrupt("the pack's end does not fit the file: it was changed"));
        }
        Ok(footer)
    }

    /// Bytes of the manifest's head, with its length before it.
    pub fn head_bytes(&self) -> Result<usize> {
        let bytes = self.manifest_bytes - self.entries * ENTRY_BYTES as u64;
        if !(4..=HEAD_BYTES_MAX as u64 + 4).contains(&bytes) {
            return Err(corrupt("the manifest's head has a length that can not be"));
        }
        Ok(bytes as usize)
    }

    pub fn is_signed(&self) -> bool {
        self.signer != [0; 32]
    }
}
