//! The end of a namespace in the file `namespaces`: all records of its digest up to a sequence are dead, and its number
//! is never given again. `docs/format.md` draws it.

use super::page::{get, get_u16, get_u32, get_u64, is_sealed, put, seal};
use super::switches::is_off;
use super::version::{FORMAT_VERSION, StoreUuid};
use crate::block::{NamespaceHandle, NamespaceId};
use crate::index::NamespaceEnd;

const MAGIC: &[u8; 8] = b"PEGANEND";
/// Bytes of the entry: what a drive writes as a whole.
pub(super) const END_BYTES: usize = 512;

/// The entry.
pub(super) fn encode(end: &NamespaceEnd, store: StoreUuid) -> [u8; END_BYTES] {
    let mut bytes = [0; END_BYTES];
    put(&mut bytes, 0, MAGIC);
    put(&mut bytes, 16, &FORMAT_VERSION.to_le_bytes());
    put(&mut bytes, 20, &end.handle.0.to_le_bytes());
    put(&mut bytes, 24, store.as_bytes());
    put(&mut bytes, 40, end.id.as_bytes());
    put(&mut bytes, 72, &end.sequence.to_le_bytes());
    seal(&mut bytes);
    assert_eq!(decode(&bytes, store), Some(*end), "the end of a namespace reads as it was written");
    bytes
}

/// The entry at the start of `bytes`, if there is an intact one.
pub(super) fn decode(bytes: &[u8], store: StoreUuid) -> Option<NamespaceEnd> {
    let entry = bytes.get(..END_BYTES)?;
    let is_ours = get::<8>(entry, 0) == *MAGIC && get::<16>(entry, 24) == *store.as_bytes();
    let is_whole = is_sealed(entry) || is_off!(SkipNamespaceChecksum);
    (is_ours && is_whole && get_u16(entry, 16) == FORMAT_VERSION).then(|| NamespaceEnd {
        handle: NamespaceHandle(get_u32(entry, 20)),
        id: NamespaceId::from_bytes(get(entry, 40)),
        sequence: get_u64(entry, 72),
    })
}

/// Reads any bytes as an entry, with its checksum made right; whether there was one.
#[cfg(any(test, feature = "fault-injection"))]
pub(super) fn fuzz_end(bytes: &[u8]) -> bool {
    let mut entry = [0; END_BYTES];
    let length = bytes.len().min(END_BYTES);
    entry[..length].copy_from_slice(&bytes[..length]);
    seal(&mut entry);
    let store = StoreUuid::from_bytes(get(&entry, 24));
    decode(&entry, store).map(|end| encode(&end, store)).is_some()
}

#[cfg(test)]
mod tests {
    use super::super::page::assert_every_flip_is_found;
    use super::*;

    #[test]
    fn every_flipped_bit_is_found() {
        let store = StoreUuid::from_bytes(*b"0123456789abcdef");
        let end = NamespaceEnd { handle: NamespaceHandle(7), id: NamespaceId::from_bytes([5; 32]), sequence: 1 << 40 };
        assert_every_flip_is_found(&encode(&end, store), |bytes| decode(bytes, store).is_some());
    }
}
