//! How a copy is cut: pieces that are queued as a whole, and within them slices for the kernel or transfers for the copy
//! engines. Pure arithmetic: it never touches memory. Blocks and places were checked before, see `PlacedCopy::check`.

use std::ops::Range;

use super::driver::Transfer;
use crate::dram::{HEADER_BYTES, Place};

/// The most of a fragment that one CTA takes at a time.
const SLICE_BYTES: u64 = 32 << 10;
/// The most blocks of a piece: so many fit into the parameters of a launch.
pub(super) const PIECE_BLOCKS_MAX: usize = 500;
const PLACE_BYTES: u64 = 4096;

/// A part of every block: where it lies on the device, and what part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slice {
    /// The device address in block 0.
    pub(super) device: u64,
    /// Bytes from block to block.
    pub(super) stride: u64,
    /// The first byte, counted within the block as it lies in a slot.
    pub(super) at: u64,
    /// A multiple of 16.
    pub(super) bytes: u64,
}

impl Slice {
    fn device_of(&self, block: u32) -> u64 {
        self.device + u64::from(block) * self.stride
    }

    fn end(&self) -> u64 {
        self.at + self.bytes
    }

    /// The slice as the kernel reads it.
    pub(super) fn to_bytes(self) -> impl Iterator<Item = u8> {
        [self.device, self.stride, self.at, self.bytes].into_iter().flat_map(u64::to_ne_bytes)
    }
}

/// Where the blocks lie on the device.
#[derive(Debug)]
pub(super) struct Geometry {
    fragments: Vec<Slice>,
    slices: Vec<Slice>,
    block_bytes: u64,
}

impl Geometry {
    /// From the device address, the stride and the bytes of every fragment, in order.
    pub(super) fn new(fragments: impl IntoIterator<Item = (u64, u64, u64)>) -> Self {
        let mut at = 0;
        let fragments: Vec<Slice> = fragments
            .into_iter()
            .map(|(device, stride, bytes)| {
                let fragment = Slice { device, stride, at, bytes };
                at += bytes;
                fragment
            })
            .collect();
        let slices = fragments
            .iter()
            .flat_map(|fragment| {
                (0..fragment.bytes).step_by(SLICE_BYTES as usize).map(|from| Slice {
                    device: fragment.device + from,
                    at: fragment.at + from,
                    bytes: SLICE_BYTES.min(fragment.bytes - from),
                    ..*fragment
                })
            })
            .collect();
        Self { fragments, slices, block_bytes: at }
    }

    pub(super) fn slices(&self) -> &[Slice] {
        &self.slices
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    pub(super) fn fragments(&self) -> usize {
        self.fragments.len()
    }

    /// The bytes of the smallest fragment.
    pub(super) fn fragment_bytes(&self) -> u64 {
        self.fragments.iter().map(|fragment| fragment.bytes).min().unwrap_or(0)
    }
}

/// Some blocks of a copy, and of each of them the same slices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which of the copy's blocks.
    pub(super) blocks: Range<usize>,
    /// Which slices of the geometry.
    pub(super) slices: Range<usize>,
    /// Where the slices start within a block.
    pub(super) from: u64,
    /// The bytes of the slices.
    pub(super) bytes: u64,
}

impl Piece {
    pub(super) fn total_bytes(&self) -> u64 {
        self.blocks.len() as u64 * self.bytes
    }
}

/// How far a copy has been cut.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    block: usize,
    slice: usize,
}

impl Cursor {
    /// The next piece of at most `bytes_max` (at least one slice) and [`PIECE_BLOCKS_MAX`] blocks; `None` at the end.
    pub(super) fn next(&mut self, geometry: &Geometry, blocks: usize, bytes_max: u64) -> Option<Piece> {
        if self.is_at_end(blocks) {
            return None;
        }
        let slices = geometry.slices.len();
        if self.slice == 0 && geometry.block_bytes <= bytes_max {
            let count = (bytes_max / geometry.block_bytes.max(1)).min(PIECE_BLOCKS_MAX as u64) as usize;
            let first = self.block;
            self.block += count.min(blocks - first);
            return Some(Piece { blocks: first..self.block, slices: 0..slices, from: 0, bytes: geometry.block_bytes });
        }
        let first = self.slice;
        let rest = geometry.slices.get(first..)?;
        let from = rest.first()?.at;
        let count = rest.partition_point(|slice| slice.end() - from <= bytes_max).max(1);
        let bytes = rest.get(count - 1)?.end() - from;
        let piece = Piece { blocks: self.block..self.block + 1, slices: first..first + count, from, bytes };
        self.slice += count;
        if self.slice == slices {
            *self = Self { block: self.block + 1, slice: 0 };
        }
        Some(piece)
    }

    pub(super) fn is_at_end(&self, blocks: usize) -> bool {
        self.block >= blocks
    }
}

/// An arena as the GPU sees it: at the host's address, registered in windows of equal length.
#[derive(Debug, Clone, Copy)]
pub(super) struct ArenaSpan {
    pub(super) start: u64,
    pub(super) window_bytes: u64,
}

impl ArenaSpan {
    /// Where the payload of a slot starts.
    pub(super) fn payload(&self, place: Place) -> u64 {
        self.payload_of_zero() + u64::from(place.0) * PLACE_BYTES
    }

    /// Where the payload of a slot at place 0 would start; other places follow 4096 bytes apart.
    pub(super) fn payload_of_zero(&self) -> u64 {
        self.start + HEADER_BYTES as u64
    }

    /// How many bytes of the arena, from its start, the blocks need.
    pub(super) fn end_of(blocks: &[(u32, Place)], block_bytes: u64) -> u64 {
        let last = blocks.iter().map(|(_, place)| u64::from(place.0)).max();
        last.map_or(0, |last| last * PLACE_BYTES + HEADER_BYTES as u64 + block_bytes)
    }

    /// A transfer, cut where a window ends: the driver takes no range of two registrations.
    fn cut(self, whole: Transfer) -> impl Iterator<Item = Transfer> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let (device, host) = (whole.device + done, whole.host + done);
            let to_boundary = self.window_bytes - (host - self.start) % self.window_bytes;
            let bytes = to_boundary.min(whole.bytes - done);
            done += bytes;
            (bytes > 0).then_some(Transfer { device, host, bytes })
        })
    }
}

/// The transfers of a piece between the arena and a staging buffer at `staging`, in which the blocks lie one after the
/// other, or the device's memory itself.
pub(super) fn transfers(
    geometry: &Geometry,
    blocks: &[(u32, Place)],
    piece: &Piece,
    arena: ArenaSpan,
    staging: Option<u64>,
) -> Vec<Transfer> {
    let mut all = Vec::new();
    let of_piece = blocks.get(piece.blocks.clone()).unwrap_or_default();
    for ((block, place), index) in of_piece.iter().zip(0u64..) {
        let host = arena.payload(*place) + piece.from;
        if let Some(staging) = staging {
            all.extend(arena.cut(Transfer { device: staging + index * piece.bytes, host, bytes: piece.bytes }));
            continue;
        }
        let end = piece.from + piece.bytes;
        let first = geometry.fragments.partition_point(|fragment| fragment.end() <= piece.from);
        for fragment in geometry.fragments.iter().skip(first).take_while(|fragment| fragment.at < end) {
            let from = fragment.at.max(piece.from);
            let device = fragment.device_of(*block) + (from - fragment.at);
            let bytes = fragment.end().min(end) - from;
            all.extend(arena.cut(Transfer { device, host: host + (from - piece.from), bytes }));
        }
    }
    all
}

/// The lengths of the windows in which an arena is registered.
pub(super) fn windows(bytes: u64, window_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let windows = bytes.div_ceil(window_bytes);
    (0..windows).map(move |window| window * window_bytes..((window + 1) * window_bytes).min(bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ARENA: ArenaSpan = ArenaSpan { start: 1 << 40, window_bytes: 64 << 10 };

    /// Byte of the device to byte of the arena, 16 at a time.
    type Moves = BTreeMap<u64, u64>;

    fn expected(geometry: &Geometry, blocks: &[(u32, Place)]) -> Moves {
        let mut moves = Moves::new();
        for (block, place) in blocks {
            for fragment in &geometry.fragments {
                for byte in (0..fragment.bytes).step_by(16) {
                    moves.insert(fragment.device_of(*block) + byte, ARENA.payload(*place) + fragment.at + byte);
                }
            }
        }
        moves
    }

    fn add(moves: &mut Moves, device: u64, host: u64, bytes: u64) {
        for byte in (0..bytes).step_by(16) {
            assert_eq!(moves.insert(device + byte, host + byte), None, "copied twice");
        }
    }

    /// What the kernel does between the device and `other`.
    fn kernel(
        moves: &mut Moves,
        geometry: &Geometry,
        blocks: &[(u32, Place)],
        piece: &Piece,
        other: impl Fn(u64, Place) -> u64,
    ) {
        for ((block, place), index) in blocks[piece.blocks.clone()].iter().zip(0..) {
            for slice in &geometry.slices[piece.slices.clone()] {
                add(moves, slice.device_of(*block), other(index, *place) + slice.at, slice.bytes);
            }
        }
    }

    prop_compose! {
        fn cases()(
            fragments in prop::collection::vec((1u64..5000, 0u64..64), 1..6),
            mut blocks in prop::collection::vec(0u32..40, 0..12),
            bytes_max in 32u64 << 10..400 << 10,
        ) -> (Geometry, Vec<(u32, Place)>, u64) {
            let mut start = 1 << 30;
            let geometry = Geometry::new(fragments.into_iter().map(|(units, gap)| {
                let (bytes, stride) = (units * 16, (units + gap) * 16);
                start += stride * 40;
                (start - stride * 40, stride, bytes)
            }).collect::<Vec<_>>());
            blocks.sort_unstable();
            blocks.dedup();
            let pages = (geometry.block_bytes().div_ceil(4096) + 1) as u32;
            let places = blocks.iter().rev().zip(0u32..).map(|(block, i)| (*block, Place(i * pages)));
            let blocks = places.collect();
            (geometry, blocks, bytes_max)
        }
    }

    proptest! {
        #[test]
        fn pieces_cover_every_byte_once_by_every_method((geometry, blocks, bytes_max) in cases()) {
            let wanted = expected(&geometry, &blocks);
            let (mut direct, mut batch, mut staged) = (Moves::new(), Moves::new(), Moves::new());
            let mut cursor = Cursor::default();
            while let Some(piece) = cursor.next(&geometry, blocks.len(), bytes_max) {
                prop_assert!(piece.total_bytes() <= bytes_max && piece.blocks.len() <= PIECE_BLOCKS_MAX);
                kernel(&mut direct, &geometry, &blocks, &piece, |_, place| ARENA.payload(place));
                for transfer in transfers(&geometry, &blocks, &piece, ARENA, None) {
                    add(&mut batch, transfer.device, transfer.host, transfer.bytes);
                }
                // Two hops through a buffer; neither leaves it.
                let buffer = 1 << 50;
                let (mut gathered, mut sent) = (Moves::new(), Moves::new());
                kernel(&mut gathered, &geometry, &blocks, &piece, |i, _| buffer + i * piece.bytes - piece.from);
                for transfer in transfers(&geometry, &blocks, &piece, ARENA, Some(buffer)) {
                    let window = |host: u64| (host - ARENA.start) / ARENA.window_bytes;
                    prop_assert_eq!(window(transfer.host), window(transfer.host + transfer.bytes - 1));
                    add(&mut sent, transfer.device, transfer.host, transfer.bytes);
                }
                for (device, staging) in gathered {
                    prop_assert!((buffer..buffer + bytes_max).contains(&staging));
                    prop_assert_eq!(staged.insert(device, sent[&staging]), None);
                }
            }
            prop_assert!(cursor.is_at_end(blocks.len()));
            prop_assert_eq!(&direct, &wanted);
            prop_assert_eq!(&batch, &wanted);
            prop_assert_eq!(&staged, &wanted);
            let end = ArenaSpan::end_of(&blocks, geometry.block_bytes());
            prop_assert!(wanted.values().all(|host| (ARENA.start..ARENA.start + end).contains(host)));
        }

        #[test]
        fn windows_follow_each_other_without_gap(bytes in 1u64..1000, window in 1u64..300) {
            let mut end = 0;
            for range in windows(bytes, window) {
                prop_assert_eq!(range.start, end);
                prop_assert!(range.end > range.start && range.end - range.start <= window);
                end = range.end;
            }
            prop_assert_eq!(end, bytes);
        }
    }
}
