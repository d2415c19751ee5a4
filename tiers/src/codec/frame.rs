//! The shape of an encoded payload: a table, padding, chunks. The chunks end where the frame ends, and the frame is whole
//! pages long: so a frame that lies at the end of a buffer can be decoded to its front without overwriting what has not
//! been decoded yet, because no chunk is longer than what it decodes to. `docs/format.md` draws it.

use super::{Codec, planes};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a chunk before encoding, the last one apart: what is in flight while decoding stays in a core's own cache.
pub const CHUNK_BYTES: usize = 128 << 10;

/// A frame is a multiple of this long.
const FRAME_ALIGN: usize = 4096;
/// The largest chunk that a reader accepts.
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The largest payload: the largest block.
const RAW_BYTES_MAX: u64 = 1 << 30;
const HEAD_BYTES: usize = 8;
const ENTRY_BYTES: usize = 4;

/// The bytes of a table for so many chunks.
pub(super) fn table_bytes(chunks: usize) -> usize {
    HEAD_BYTES + chunks * ENTRY_BYTES
}

/// The bytes of a frame with these chunks.
pub(super) fn frame_of(chunks: usize, stored: usize) -> usize {
    (table_bytes(chunks) + stored).next_multiple_of(FRAME_ALIGN)
}

/// Writes a table to the start of `frame`.
pub(super) fn write_table(frame: &mut [u8], stored: &[u32]) {
    frame[..4].copy_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
    frame[4..8].copy_from_slice(&(stored.len() as u32).to_le_bytes());
    for (entry, bytes) in frame[HEAD_BYTES..].chunks_exact_mut(ENTRY_BYTES).zip(stored) {
        entry.copy_from_slice(&bytes.to_le_bytes());
    }
}

/// One chunk: where it lies in the frame, and how long it is there and decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) at: usize,
    pub(super) stored_bytes: usize,
    pub(super) raw_bytes: usize,
}

impl Chunk {
    /// Whether it is stored as it is: one that is encoded is shorter.
    pub(super) fn is_raw(&self) -> bool {
        self.stored_bytes == self.raw_bytes
    }
}

/// The bytes at the start of a frame that its table lies in, whatever chunks it has.
///
/// # Errors
/// `Corrupt` if nothing of this length is encoded.
pub(super) fn head_bytes(frame_bytes: usize, raw_bytes: u64) -> Result<usize> {
    if !(1..=RAW_BYTES_MAX).contains(&raw_bytes) {
        return Err(corrupt("length"));
    }
    Ok(table_bytes(raw_bytes.div_ceil(FRAME_ALIGN as u64) as usize).min(frame_bytes))
}

/// As [`read_head`], of a whole frame.
///
/// # Errors
/// `Corrupt` with what is wrong.
pub(super) fn read_table(codec: Codec, frame: &[u8], raw_bytes: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    read_head(codec, frame, frame.len(), raw_bytes, chunks)
}

/// Reads the table of a frame, of which `head` is the start, into `chunks` and checks that all of it fits together, before anything is decoded:
/// afterwards every chunk lies in the frame, is no longer than what it decodes to, and they decode to `raw_bytes` together.
///
/// # Errors
/// `Corrupt` with what is wrong.
pub(super) fn read_head(
    codec: Codec,
    head: &[u8],
    frame_bytes: usize,
    raw_bytes: u64,
    chunks: &mut Vec<Chunk>,
) -> Result<()> {
    chunks.clear();
    let is_raw_right = (1..=RAW_BYTES_MAX).contains(&raw_bytes)
        && (!codec.has_planes() || raw_bytes.is_multiple_of(planes::GROUP as u64));
    if !is_raw_right || !frame_bytes.is_multiple_of(FRAME_ALIGN) || frame_bytes == 0 || frame_bytes as u64 > raw_bytes {
        return Err(corrupt("length"));
    }
    let word = |at: usize| {
        let bytes = head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u32::from_le_bytes(bytes) as usize).ok_or_else(|| corrupt("table"))
    };
    let (chunk_bytes, count) = (word(0)?, word(4)?);
    if !chunk_bytes.is_power_of_two() || !(FRAME_ALIGN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) {
        return Err(corrupt("chunk size"));
    }
    if count as u64 != raw_bytes.div_ceil(chunk_bytes as u64) || table_bytes(count) > frame_bytes {
        return Err(corrupt("number of chunks"));
    }
    let mut left = raw_bytes as usize;
    let mut stored = 0;
    for number in 0..count {
        let (bytes, raw) = (word(HEAD_BYTES + number * ENTRY_BYTES)?, left.min(chunk_bytes));
        let least = if codec.has_planes() { raw / 2 + 1 } else { 1 };
        if !(least..=raw).contains(&bytes) {
            return Err(corrupt("chunk length"));
        }
        chunks.push(Chunk { at: stored, stored_bytes: bytes, raw_bytes: raw });
        stored += bytes;
        left -= raw;
    }
    if frame_of(count, stored) != frame_bytes {
        return Err(corrupt("sum of chunk lengths"));
    }
    let first = frame_bytes - stored;
    chunks.iter_mut().for_each(|chunk| chunk.at += first);
    Ok(())
}

pub(super) fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("an encoded payload has a wrong {what}"))
}
