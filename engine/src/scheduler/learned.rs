//! What the policies have learned, as it is kept beside the index: a few kilobytes for each size of block. Damage is
//! found by a checksum, and costs what was learned.

use xxhash_rust::xxh3::xxh3_64;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 10;
const LONGEST_NOTE: usize = 64 << 10;

/// `version u8 | checksum of the rest u64 | entries u8 | entries: slot bytes u32, length u32, note`.
pub(super) fn encode(notes: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut rest = vec![u8::try_from(notes.len()).unwrap_or(u8::MAX)];
    for (slot_bytes, note) in notes.iter().take(u8::MAX.into()) {
        rest.extend(slot_bytes.to_le_bytes());
        rest.extend((note.len() as u32).to_le_bytes());
        rest.extend(note);
    }
    let mut all = vec![VERSION];
    all.extend(xxh3_64(&rest).to_le_bytes());
    all.extend(rest);
    all
}

/// The entries; `None` if that is no such note, or a damaged one.
pub(super) fn decode(note: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
    let (&[version, ref checksum @ .., count], mut rest) = note.split_first_chunk::<HEADER_BYTES>()?;
    let checksum = u64::from_le_bytes(*checksum);
    if version != VERSION || xxh3_64(note.get(HEADER_BYTES - 1..)?) != checksum {
        return None;
    }
    let mut notes = Vec::new();
    for _ in 0..count {
        let (slot_bytes, tail) = rest.split_first_chunk()?;
        let (length, tail) = tail.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let (note, tail) = tail.split_at_checked(length).filter(|_| length <= LONGEST_NOTE)?;
        notes.push((u32::from_le_bytes(*slot_bytes), note.to_vec()));
        rest = tail;
    }
    rest.is_empty().then_some(notes)
}

/// What was learned of one size of block, for who has no size of its own.
pub(crate) fn first_learned(note: &[u8]) -> Option<Vec<u8>> {
    decode(note)?.into_iter().next().map(|(_, note)| note)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_back_and_damage_is_found() {
        let notes = vec![(8192, vec![1, 2, 3]), (1 << 21, (0..200).collect())];
        let note = encode(&notes);
        assert_eq!(decode(&note), Some(notes));
        assert_eq!(decode(&encode(&[])), Some(vec![]));
        for bit in 0..note.len() * 8 {
            let mut damaged = note.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged), None, "bit {bit}");
        }
        for length in 0..note.len() {
            assert_eq!(decode(&note[..length]), None, "{length} bytes");
        }
        assert_eq!(decode(&[note, vec![0]].concat()), None);
    }
}
