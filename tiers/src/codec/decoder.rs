//! Frame to payload. Nothing is believed: the table is checked before anything is decoded, and every chunk has to come to
//! exactly the length that it should have. Memory is bounded by the largest chunk, whatever a frame claims.

use std::ops::Range;

use xxhash_rust::xxh3::Xxh3Default;
use zstd::zstd_safe::DCtx;

use super::Codec;
use super::frame::{Chunk, corrupt, head_bytes, read_head, read_table};
use super::planes::Split;
use crate::error::Result;

/// Decodes frames, one at a time; keeps its memory from one to the next: one and a half times the largest chunk that it
/// has met, which is at most 1 MiB, and zstd's own.
pub struct Decoder {
    chunks: Vec<Chunk>,
    scratch: Scratch,
}

struct Scratch {
    context: DCtx<'static>,
    upper: Vec<u8>,
    raw: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder.
    pub fn new() -> Self {
        let scratch = Scratch { context: DCtx::create(), upper: Vec::new(), raw: Vec::new() };
        Self { chunks: Vec::new(), scratch }
    }

    /// Decodes a frame piece by piece: `each` gets the payload in its order. Returns the XXH3 checksum of all of it.
    ///
    /// # Errors
    /// `Corrupt` if the frame is not one of `codec` that decodes to `raw_bytes`; `each` may have seen a part.
    pub fn decode_each(
        &mut self,
        codec: Codec,
        frame: &[u8],
        raw_bytes: u64,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<u64> {
        read_table(codec, frame, raw_bytes, &mut self.chunks)?;
        let mut hasher = Xxh3Default::new();
        for chunk in &self.chunks {
            let stored = &frame[chunk.at..chunk.at + chunk.stored_bytes];
            let raw = if chunk.is_raw() { stored } else { self.scratch.decode(codec, stored, chunk.raw_bytes)? };
            hasher.update(raw);
            each(raw);
        }
        Ok(hasher.digest())
    }

    /// Decodes a frame of `frame_bytes` that is read piece by piece, and throws away what comes out: takes the memory of a
    /// table and a chunk, at most 2 MiB, whatever the frame is. `read` fills a buffer from an offset of the frame. Returns
    /// the XXH3 checksum of the payload.
    ///
    /// # Errors
    /// `Corrupt` as [`Decoder::decode_each`], and what `read` reports.
    pub fn decode_from(
        &mut self,
        codec: Codec,
        frame_bytes: usize,
        raw_bytes: u64,
        read: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<u64> {
        let mut stored = vec![0; head_bytes(frame_bytes, raw_bytes)?];
        read(0, &mut stored)?;
        read_head(codec, &stored, frame_bytes, raw_bytes, &mut self.chunks)?;
        let mut hasher = Xxh3Default::new();
        for chunk in &self.chunks {
            stored.resize(chunk.stored_bytes, 0);
            read(chunk.at, &mut stored)?;
            let raw = if chunk.is_raw() { &stored } else { self.scratch.decode(codec, &stored, chunk.raw_bytes)? };
            hasher.update(raw);
        }
        Ok(hasher.digest())
    }

    /// Decodes a frame that lies at the end of `buffer` to `[at, at + raw_bytes)` of the same buffer, over the frame itself.
    /// Returns the XXH3 checksum of the payload.
    ///
    /// # Errors
    /// `Corrupt` if the frame is not one of `codec` that decodes to `raw_bytes`, or the payload has no room; what is in the
    /// buffer is then neither.
    pub fn decode_in_place(
        &mut self,
        codec: Codec,
        buffer: &mut [u8],
        frame: Range<usize>,
        at: usize,
        raw_bytes: u64,
    ) -> Result<u64> {
        let bytes = buffer.get(frame.clone()).ok_or_else(|| corrupt("place"))?;
        read_table(codec, bytes, raw_bytes, &mut self.chunks)?;
        // What is left to decode is never longer than what it decodes to: with the frame's end at or behind the payload's,
        // the payload grows up to the next chunk at most.
        if at.checked_add(raw_bytes as usize).is_none_or(|end| end > frame.end) {
            return Err(corrupt("place"));
        }
        let mut hasher = Xxh3Default::new();
        let mut to = at;
        for chunk in &self.chunks {
            let (from, end) = (frame.start + chunk.at, to + chunk.raw_bytes);
            let stored = &buffer[from..from + chunk.stored_bytes];
            if chunk.is_raw() {
                hasher.update(stored);
                buffer.copy_within(from..from + chunk.stored_bytes, to);
            } else {
                let raw = self.scratch.decode(codec, stored, chunk.raw_bytes)?;
                hasher.update(raw);
                buffer[to..end].copy_from_slice(raw);
            }
            to = end;
        }
        Ok(hasher.digest())
    }
}

impl Scratch {
    /// Decodes one chunk that is not raw, and whose lengths were checked.
    fn decode(&mut self, codec: Codec, stored: &[u8], raw_bytes: usize) -> Result<&[u8]> {
        let raw = room(&mut self.raw, raw_bytes);
        match split_of(codec) {
            None => unzip(&mut self.context, stored, raw)?,
            Some(split) => {
                let (lower, compressed) = stored.split_at(raw_bytes / 2);
                let upper = room(&mut self.upper, raw_bytes / 2);
                unzip(&mut self.context, compressed, upper)?;
                split.merge(upper, lower, raw);
            }
        }
        Ok(raw)
    }
}

/// How a codec splits its chunks.
pub(super) fn split_of(codec: Codec) -> Option<Split> {
    match codec {
        Codec::Stored | Codec::Zstd => None,
        Codec::Bf16 => Some(Split::Bytes(1)),
        Codec::F16 => Some(Split::Bytes(0)),
        Codec::F8E4m3 => Some(Split::Nibbles(1)),
    }
}

/// The first `bytes` bytes of a buffer that grows.
fn room(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    &mut buffer[..bytes]
}

/// Decompresses to exactly the length of `to`. In one call zstd uses its output as its window: it takes no memory that the
/// input could ask for, and writes nowhere else.
fn unzip(context: &mut DCtx<'static>, compressed: &[u8], to: &mut [u8]) -> Result<()> {
    match context.decompress(to, compressed) {
        Ok(bytes) if bytes == to.len() => Ok(()),
        Ok(_) => Err(corrupt("decoded length")),
        Err(_) => Err(corrupt("compressed chunk")),
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}
