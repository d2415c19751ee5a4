//! Payload to frame.

use std::ops::Range;

use zstd::zstd_safe::{CCtx, CParameter, ParamSwitch};

use super::frame::{CHUNK_BYTES, frame_of, table_bytes, write_table};
use super::planes::{GROUP, Split};
use super::{Codec, decoder};

/// A level of zstd that looks for matches at so few places that it finds none: what is left is its Huffman coder, which
/// by itself is smaller and decodes twice as fast on exponents than with the matches that chance offers.
const LEVEL_HUFFMAN_ONLY: i32 = -131_072;
/// For bytes of which nothing is known.
const LEVEL_PLAIN: i32 = 1;
/// A payload that saves less than one part in this many is not worth the time to decode it.
const WORTH_PART: usize = 20;
/// After so many chunks one that saves not half of that is given up.
const GIVE_UP_AFTER_CHUNKS: usize = 4;

/// A payload that was encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Where the frame lies in the buffer that was given: a multiple of 4096 long.
    pub frame: Range<usize>,
}

/// Encodes payloads, one at a time; keeps its memory from one to the next (about a megabyte).
pub struct Encoder {
    huffman: CCtx<'static>,
    plain: CCtx<'static>,
    upper: Vec<u8>,
    stored: Vec<u32>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Encoder {
    /// An encoder.
    pub fn new() -> Self {
        let (mut huffman, mut plain) = (CCtx::create(), CCtx::create());
        // Parameters that are known are never refused; if they were, the result would be larger and as right.
        let _ = huffman.set_parameter(CParameter::CompressionLevel(LEVEL_HUFFMAN_ONLY));
        let _ = huffman.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable));
        let _ = plain.set_parameter(CParameter::CompressionLevel(LEVEL_PLAIN));
        Self { huffman, plain, upper: vec![0; CHUNK_BYTES / 2], stored: Vec::new() }
    }

    /// Encodes `payload` into `buffer`, somewhere behind its first `from` bytes; `None` if the frame would not be at least
    /// a twentieth smaller than the payload. `from + payload.len()` bytes are always enough.
    pub fn encode(&mut self, codec: Codec, payload: &[u8], buffer: &mut [u8], from: usize) -> Option<Encoded> {
        let is_possible = codec != Codec::Stored
            && !payload.is_empty()
            && (!codec.has_planes() || payload.len().is_multiple_of(GROUP));
        let chunks = payload.len().div_ceil(CHUNK_BYTES);
        let end_max = buffer.len().min(from + payload.len());
        if !is_possible || from + table_bytes(chunks) >= end_max {
            return None;
        }
        self.stored.clear();
        // The chunks follow the table, and move behind the padding when its length is known.
        let first = from + table_bytes(chunks);
        let mut end = first;
        for (number, chunk) in payload.chunks(CHUNK_BYTES).enumerate() {
            let bytes = self.encode_chunk(codec, chunk, buffer.get_mut(end..end_max)?)?;
            self.stored.push(bytes as u32);
            end += bytes;
            let raw = number * CHUNK_BYTES + chunk.len();
            if number + 1 == GIVE_UP_AFTER_CHUNKS.min(chunks) && end - first > raw - raw / (2 * WORTH_PART) {
                return None;
            }
        }
        let bytes = frame_of(chunks, end - first);
        if from + bytes > end_max || bytes > payload.len() - payload.len() / WORTH_PART {
            return None;
        }
        let frame = &mut buffer[from..from + bytes];
        let (at, length) = (table_bytes(chunks), end - first);
        frame.copy_within(at..at + length, bytes - length);
        frame[at..bytes - length].fill(0);
        write_table(frame, &self.stored);
        Some(Encoded { frame: from..from + bytes })
    }

    /// Encodes one chunk to the front of `out`; its length there, or `None` if there is no room.
    fn encode_chunk(&mut self, codec: Codec, chunk: &[u8], out: &mut [u8]) -> Option<usize> {
        let encoded = match decoder::split_of(codec) {
            Some(split) => self.encode_planes(split, chunk, out),
            None => compress(&mut self.plain, chunk, out),
        };
        // One that does not shrink is kept as it is: its length says so.
        if encoded.is_none() {
            out.get_mut(..chunk.len())?.copy_from_slice(chunk);
        }
        Some(encoded.unwrap_or(chunk.len()))
    }

    fn encode_planes(&mut self, split: Split, chunk: &[u8], out: &mut [u8]) -> Option<usize> {
        let half = chunk.len() / 2;
        let (lower, rest) = out.split_at_mut_checked(half)?;
        let upper = self.upper.get_mut(..half)?;
        split.split(chunk, upper, lower);
        compress(&mut self.huffman, upper, rest).map(|bytes| half + bytes)
    }
}

/// Compresses to the front of `out`; the length there, or `None` if that would not be smaller than `bytes` or does not fit.
fn compress(context: &mut CCtx<'static>, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    let room = out.len().min(bytes.len().checked_sub(1)?);
    context.compress2(&mut out[..room], bytes).ok().filter(|length| *length > 0)
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}
