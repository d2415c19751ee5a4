//! The hot set as it is kept in the store: a list in pieces, each a note of its own that is whole or worth nothing. Owns
//! these bytes, which `docs/format.md` draws.

use pegaflow_tiers::{BlockKey, NamespaceHandle};
use xxhash_rust::xxh3::xxh3_64;

use super::{HotBlock, HotSet};
use crate::policy::BlockMemory;

const VERSION: u8 = 1;
/// Pieces of a list at most.
pub(super) const PIECES_MAX: usize = 10;
/// Blocks of a piece: a note has 1 MiB at most.
pub(super) const BLOCKS_PER_PIECE: usize = 20_000;
/// Groups of namespaces that one list can have blocks of.
const PLACES_MAX: usize = 256;

/// `version u8 | checksum of the rest u64 | list u64 | blocks before it u32 | blocks u32 | places u16`.
const HEADER_BYTES: usize = 27;
const CHECKED_FROM: usize = 9;
const PLACE_BYTES: usize = 6;
const BLOCK_BYTES: usize = 49;

const _: () = assert!(HEADER_BYTES + PLACES_MAX * PLACE_BYTES + BLOCKS_PER_PIECE * BLOCK_BYTES <= 1 << 20);

/// The name of a piece in the store.
pub(super) fn name(piece: usize) -> String {
    format!("hot-set/{piece}")
}

/// The pieces of a list, in their order. What is too much for it is left out: blocks beyond the most, and those of more
/// places than it can have.
pub(super) fn encode(set: &HotSet) -> Vec<Vec<u8>> {
    let mut places: Vec<(NamespaceHandle, u16)> = Vec::new();
    let mut blocks = Vec::new();
    for block in set.blocks.iter().take(PIECES_MAX * BLOCKS_PER_PIECE) {
        let of_block = (block.id.namespace, block.id.group);
        let place = places.iter().position(|place| *place == of_block).unwrap_or(places.len());
        if place == PLACES_MAX {
            // The list ends here: places of those behind it are counted from the front.
            break;
        }
        if place == places.len() {
            places.push(of_block);
        }
        blocks.push((place as u8, block));
    }
    let encode_piece = |(piece, blocks): (usize, &[(u8, &HotBlock)])| {
        let mut rest = Vec::with_capacity(HEADER_BYTES + places.len() * PLACE_BYTES + blocks.len() * BLOCK_BYTES);
        rest.extend(set.written_unix_ms.to_le_bytes());
        rest.extend(((piece * BLOCKS_PER_PIECE) as u32).to_le_bytes());
        rest.extend((blocks.len() as u32).to_le_bytes());
        rest.extend((places.len() as u16).to_le_bytes());
        for (namespace, group) in &places {
            rest.extend(namespace.0.to_le_bytes());
            rest.extend(group.to_le_bytes());
        }
        for (place, HotBlock { id, parent, memory }) in blocks {
            rest.extend(id.key.as_bytes());
            rest.extend(parent.map_or(0, |parent| parent + 1).to_le_bytes());
            rest.extend(memory.idle_s.to_le_bytes());
            rest.extend(memory.evidence.to_le_bytes());
            rest.extend([memory.uses, memory.first_turn, memory.turn, memory.blocks_after, *place]);
        }
        [&[VERSION], &xxh3_64(&rest).to_le_bytes()[..], &rest].concat()
    };
    blocks.chunks(BLOCKS_PER_PIECE).enumerate().map(encode_piece).collect()
}

/// A piece that is whole.
struct Piece {
    written_unix_ms: u64,
    /// The place of its first block in the list.
    first: u32,
    blocks: Vec<HotBlock>,
}

/// The newest list of which any piece is whole, without the blocks of those that are not and without all that come after
/// such a block in its chain; `None` if there is none.
pub(super) fn decode(notes: impl Iterator<Item = Vec<u8>>) -> Option<HotSet> {
    let mut pieces: Vec<Piece> = notes.take(PIECES_MAX).filter_map(|note| decode_piece(&note)).collect();
    let written_unix_ms = pieces.iter().map(|piece| piece.written_unix_ms).max()?;
    pieces.retain(|piece| piece.written_unix_ms == written_unix_ms);
    pieces.sort_by_key(|piece| piece.first);
    // Where each block of the list as it was written is now.
    let mut places = vec![None; PIECES_MAX * BLOCKS_PER_PIECE];
    let mut blocks = Vec::new();
    for piece in pieces {
        for (was, mut block) in (piece.first..).zip(piece.blocks) {
            if let Some(parent) = block.parent {
                // Only of those before it: so nothing comes before its own ancestors.
                block.parent = places.get(parent as usize).copied().flatten();
                if block.parent.is_none() {
                    continue;
                }
            }
            if let Some(place @ None) = places.get_mut(was as usize) {
                *place = Some(blocks.len() as u32);
                blocks.push(block);
            }
        }
    }
    Some(HotSet { written_unix_ms, blocks })
}

fn decode_piece(note: &[u8]) -> Option<Piece> {
    let mut rest = Reader(note);
    let (version, checksum) = (rest.u8()?, rest.u64()?);
    if version != VERSION || xxh3_64(note.get(CHECKED_FROM..)?) != checksum {
        return None;
    }
    let (written_unix_ms, first) = (rest.u64()?, rest.u32()?);
    let (count, places) = (rest.u32()? as usize, rest.u16()? as usize);
    let is_too_long = count > BLOCKS_PER_PIECE || first as usize + count > PIECES_MAX * BLOCKS_PER_PIECE;
    if is_too_long || places > PLACES_MAX || rest.0.len() != places * PLACE_BYTES + count * BLOCK_BYTES {
        return None;
    }
    let places: Vec<_> =
        (0..places).map(|_| Some((NamespaceHandle(rest.u32()?), rest.u16()?))).collect::<Option<_>>()?;
    let block = |_| {
        let key = BlockKey::from_bytes(*rest.take::<32>()?);
        let parent = rest.u32()?.checked_sub(1);
        let (idle_s, evidence) = (rest.u32()?, rest.u32()?);
        let [uses, first_turn, turn, blocks_after, place] = *rest.take()?;
        let memory = BlockMemory { idle_s, evidence, uses, first_turn, turn, blocks_after };
        let place = *places.get(usize::from(place))?;
        Some(HotBlock::new(place, key, parent, memory))
    };
    let blocks = (0..count).map(block).collect::<Option<Vec<_>>>()?;
    Some(Piece { written_unix_ms, first, blocks })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take().map(|bytes| u8::from_le_bytes(*bytes))
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(|bytes| u16::from_le_bytes(*bytes))
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(|bytes| u64::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests;
