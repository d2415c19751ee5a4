use std::path::Path;

use super::*;
use crate::policy::SplitMix;

fn key(byte: u8) -> BlockKey {
    BlockKey::from_bytes([byte; 32])
}

fn block(place: (u32, u16), key_byte: u8, parent: Option<u32>, idle_s: u32) -> HotBlock {
    let memory = BlockMemory { idle_s, evidence: 0x0012_3456, uses: 3, first_turn: 1, turn: 2, blocks_after: 255 };
    HotBlock::new((NamespaceHandle(place.0), place.1), key(key_byte), parent, memory)
}

/// Three blocks in two places, one after another in a chain.
fn small() -> HotSet {
    let blocks = vec![block((7, 0), 1, None, 0), block((7, 0), 2, Some(0), 61), block((9, 2), 3, None, 1 << 20)];
    HotSet { written_unix_ms: 1_790_000_000_123, blocks }
}

/// The piece of `small`, drawn from format.md without the code above.
fn drawn() -> Vec<u8> {
    let mut bytes = vec![0u8; 27 + 2 * 6 + 3 * 49];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &[1]);
    put(9, &1_790_000_000_123u64.to_le_bytes());
    put(17, &0u32.to_le_bytes());
    put(21, &3u32.to_le_bytes());
    put(25, &2u16.to_le_bytes());
    put(27, &7u32.to_le_bytes());
    put(33, &9u32.to_le_bytes());
    put(37, &2u16.to_le_bytes());
    for (number, (key, parent, idle, place)) in
        [(1u8, 0u32, 0u32, 0u8), (2, 1, 61, 0), (3, 0, 1 << 20, 1)].into_iter().enumerate()
    {
        let at = 39 + number * 49;
        put(at, &[key; 32]);
        put(at + 32, &parent.to_le_bytes());
        put(at + 36, &idle.to_le_bytes());
        put(at + 40, &0x0012_3456u32.to_le_bytes());
        put(at + 44, &[3, 1, 2, 255, place]);
    }
    let checksum = xxh3_64(&bytes[9..]);
    bytes[1..9].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1/hot-set")
}

#[test]
fn the_fixture_is_what_format_md_draws_and_what_the_code_writes() {
    let frozen = std::fs::read(fixture()).expect("the fixture");
    assert_eq!(frozen, drawn(), "drawn");
    assert_eq!(encode(&small()), std::slice::from_ref(&frozen), "written");
    assert_eq!(decode([frozen].into_iter()), Some(small()), "read");
}

#[test]
fn any_damage_costs_the_piece() {
    let piece = drawn();
    for bit in 0..piece.len() * 8 {
        let mut damaged = piece.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(decode([damaged].into_iter()), None, "bit {bit}");
    }
    (0..piece.len()).for_each(|length| assert_eq!(decode([piece[..length].to_vec()].into_iter()), None));
    assert_eq!(decode([[&piece[..], &[0]].concat()].into_iter()), None);
    assert_eq!(decode(std::iter::empty()), None);
}

/// Pieces whose checksum is right, whatever they say: nothing panics, and no block comes before its parent.
#[test]
fn whatever_a_piece_says_is_bounded() {
    for seed in 1..3000 {
        let mut random = SplitMix::new(seed);
        let mut piece = drawn();
        for _ in 0..=random.below(6) {
            let at = CHECKED_FROM + random.below(piece.len() - CHECKED_FROM);
            piece[at] = random.below(256) as u8;
        }
        if random.below(4) == 0 {
            piece.truncate(CHECKED_FROM + random.below(piece.len() - CHECKED_FROM));
        }
        let checksum = xxh3_64(&piece[CHECKED_FROM..]);
        piece[1..9].copy_from_slice(&checksum.to_le_bytes());
        let set = decode([piece].into_iter()).unwrap_or_default();
        let is_right = |(at, block): (usize, &HotBlock)| block.parent.is_none_or(|parent| (parent as usize) < at);
        assert!(set.blocks.len() <= 3 && set.blocks.iter().enumerate().all(is_right), "seed {seed}");
    }
}

#[test]
fn a_piece_behind_the_end_of_all_lists_is_none() {
    for first in [(PIECES_MAX * BLOCKS_PER_PIECE) as u32 - 2, u32::MAX - 1, u32::MAX] {
        let mut piece = drawn();
        piece[17..21].copy_from_slice(&first.to_le_bytes());
        let checksum = xxh3_64(&piece[CHECKED_FROM..]);
        piece[1..9].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(decode([piece].into_iter()), None, "{first}");
    }
}

fn long(blocks: u32) -> HotSet {
    // Pairs: a first block of a chain, and the one after it.
    let one = |number: u32| HotBlock {
        id: pegaflow_tiers::RecordId { key: BlockKey::from_name(&number.to_le_bytes()), ..small().blocks[0].id },
        parent: (number % 2 == 1).then(|| number - 1),
        memory: BlockMemory::default(),
    };
    HotSet { written_unix_ms: 5, blocks: (0..blocks).map(one).collect() }
}

#[test]
fn a_list_in_pieces_comes_back_and_a_missing_piece_costs_its_blocks_and_those_after_them() {
    let set = long(BLOCKS_PER_PIECE as u32 * 2 + 11);
    let pieces = encode(&set);
    assert_eq!(pieces.len(), 3);
    assert!(pieces.iter().all(|piece| piece.len() <= 1 << 20));
    assert_eq!(decode(pieces.clone().into_iter().rev()).as_ref(), Some(&set), "in whatever order");
    let mut crossing = set.clone();
    // The first block of the third piece comes after one of the second.
    crossing.blocks[BLOCKS_PER_PIECE * 2].parent = Some(BLOCKS_PER_PIECE as u32 + 4);
    let pieces = encode(&crossing);
    let without = decode([pieces[0].clone(), pieces[2].clone()].into_iter()).expect("two are whole");
    // That one, and its descendant.
    assert_eq!(without.blocks.len(), BLOCKS_PER_PIECE + 11 - 2);
    let ends = &without.blocks[BLOCKS_PER_PIECE..];
    assert_eq!((ends[0].parent, ends[1].parent), (None, Some(BLOCKS_PER_PIECE as u32)));
    let most = long((PIECES_MAX * BLOCKS_PER_PIECE) as u32 + 5);
    assert_eq!(encode(&most).len(), PIECES_MAX);
}

#[test]
fn of_two_lists_the_newer_one_counts() {
    let older = HotSet { written_unix_ms: 4, ..long(BLOCKS_PER_PIECE as u32 * 2) };
    let newer = long(10);
    let mut pieces = encode(&older);
    pieces[0] = encode(&newer).remove(0);
    assert_eq!(decode(pieces.into_iter()), Some(newer));
}

#[test]
fn a_list_ends_where_its_places_do() {
    let blocks = (0..300).map(|group| block((1, group), 1, None, 0)).collect();
    let pieces = encode(&HotSet { written_unix_ms: 1, blocks });
    assert_eq!(decode(pieces.into_iter()).expect("whole").blocks.len(), PLACES_MAX);
}

/// The recipe for the fixture; a version that was released stays as it is.
#[test]
#[ignore = "writes a file of the repository"]
fn write_missing_fixture() {
    if !fixture().exists() {
        std::fs::create_dir_all(fixture().parent().expect("a folder")).expect("made");
        std::fs::write(fixture(), drawn()).expect("written");
    }
}
