//! Pages of 4096 bytes and the few ways in which the structures on disk are read from and written to them: numbers of
//! a fixed width, little-endian, at fixed offsets, and one checksum over everything else in the page.

use xxhash_rust::xxh3::Xxh3Default;

/// The unit of everything on disk, in bytes.
pub(super) const PAGE_BYTES: usize = 4096;

/// One page.
pub(super) type Page = [u8; PAGE_BYTES];

/// Where every page-sized structure has its checksum.
const CHECKSUM_AT: usize = 8;

/// Pages that `bytes` bytes take.
pub(super) fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES as u64)
}

/// Copies `bytes` to `offset`.
pub(super) fn put(page: &mut [u8], offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// The `N` bytes at `offset`.
pub(super) fn get<const N: usize>(page: &[u8], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&page[offset..offset + N]);
    bytes
}

/// The 16-bit number at `offset`.
pub(super) fn get_u16(page: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(get(page, offset))
}

/// The 32-bit number at `offset`.
pub(super) fn get_u32(page: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(get(page, offset))
}

/// The 64-bit number at `offset`.
pub(super) fn get_u64(page: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(get(page, offset))
}

/// Writes the checksum of everything else in `structure` to its place.
pub(super) fn seal(structure: &mut [u8]) {
    let checksum = checksum_of(structure);
    put(structure, CHECKSUM_AT, &checksum.to_le_bytes());
}

/// Whether the checksum in `structure` is the one of everything else in it.
pub(super) fn is_sealed(structure: &[u8]) -> bool {
    get_u64(structure, CHECKSUM_AT) == checksum_of(structure)
}

fn checksum_of(structure: &[u8]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(&structure[..CHECKSUM_AT]);
    hasher.update(&structure[CHECKSUM_AT + 8..]);
    hasher.digest()
}

/// Asserts that every single flipped bit of `structure` makes `is_valid` false.
#[cfg(test)]
pub(super) fn assert_every_flip_is_found(structure: &[u8], is_valid: impl Fn(&[u8]) -> bool) {
    let mut bytes = structure.to_vec();
    assert!(is_valid(&bytes));
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(!is_valid(&bytes), "bit {bit} flipped unnoticed");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
