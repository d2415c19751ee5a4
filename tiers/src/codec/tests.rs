//! Every codec on every kind of bytes; and frames that are not what they should be: flipped, cut, made up.

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use xxhash_rust::xxh3::xxh3_64;

use super::frame::{read_table, table_bytes};
use super::*;
use crate::error::ErrorKind;

const PAGE: usize = 4096;
const CODECS: [Codec; 4] = [Codec::Zstd, Codec::Bf16, Codec::F16, Codec::F8E4m3];

fn gauss(random: &mut StdRng) -> f32 {
    let (u, v): (f32, f32) = (1.0 - random.random::<f32>(), random.random());
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

fn bf16(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..bytes / 2).flat_map(|_| ((gauss(&mut random).to_bits() >> 16) as u16).to_le_bytes()).collect()
}

fn random_bytes(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..bytes).map(|_| random.random()).collect()
}

/// The frame of a payload, if there is one.
fn encode(codec: Codec, payload: &[u8]) -> Option<Vec<u8>> {
    let mut buffer = vec![0xaa; PAGE + payload.len()];
    let encoded = Encoder::new().encode(codec, payload, &mut buffer, PAGE)?;
    assert_eq!(encoded.frame.start, PAGE);
    assert!(buffer[..PAGE].iter().all(|&byte| byte == 0xaa), "what is before the frame stays");
    let frame = buffer[encoded.frame].to_vec();
    assert!(frame.len().is_multiple_of(PAGE) && frame.len() < payload.len());
    Some(frame)
}

/// Decodes both ways and compares them.
fn decode(codec: Codec, frame: &[u8], raw_bytes: usize) -> Result<Vec<u8>, ErrorKind> {
    let mut decoder = Decoder::new();
    let mut pieces = Vec::new();
    let whole = decoder.decode_each(codec, frame, raw_bytes as u64, &mut |piece| pieces.extend_from_slice(piece));
    let room = PAGE + frame.len().max(raw_bytes);
    let mut buffer = vec![0x55; room];
    buffer[room - frame.len()..].copy_from_slice(frame);
    let place = decoder.decode_in_place(codec, &mut buffer, room - frame.len()..room, PAGE, raw_bytes as u64);
    assert_eq!(whole.is_ok(), place.is_ok());
    assert!(buffer[..PAGE].iter().all(|&byte| byte == 0x55), "what is before the payload stays");
    let checksum = whole.map_err(|error| error.kind())?;
    assert_eq!(place.ok(), Some(checksum));
    assert_eq!(checksum, xxh3_64(&pieces));
    assert!(buffer[PAGE..PAGE + raw_bytes] == pieces[..], "in place as piece by piece");
    Ok(pieces)
}

#[test]
fn bf16_and_fp8_shrink_as_promised() {
    let payload = bf16(2 << 20, 1);
    let frame = encode(Codec::Bf16, &payload).expect("shrinks");
    assert!(payload.len() as f64 / frame.len() as f64 >= 1.47, "{}", frame.len());
    assert!(decode(Codec::Bf16, &frame, payload.len()).expect("decodes") == payload);
    assert!(encode(Codec::Bf16, &random_bytes(1 << 20, 2)).is_none(), "random bytes are not stored larger");
}

#[test]
fn edges_of_lengths_round_trip() {
    for codec in CODECS {
        for raw in [16, 4096, 8192, CHUNK_BYTES - 16, CHUNK_BYTES, CHUNK_BYTES + 16, 3 * CHUNK_BYTES + 4096] {
            for payload in [vec![0; raw], bf16(raw, 3), random_bytes(raw, 4)] {
                if let Some(frame) = encode(codec, &payload) {
                    assert!(decode(codec, &frame, raw).expect("decodes") == payload, "{codec:?} of {raw}");
                }
            }
        }
    }
    assert!(encode(Codec::Bf16, &vec![0; CHUNK_BYTES + 2]).is_none(), "no whole groups");
    assert!(encode(Codec::Zstd, &vec![0; CHUNK_BYTES + 3]).is_some());
    assert!(encode(Codec::Stored, &vec![0; CHUNK_BYTES]).is_none());
}

#[test]
fn a_payload_with_chunks_that_do_not_shrink_decodes_in_place() {
    // The last chunk is as long as what it decodes to and ends where the buffer ends: nothing to spare.
    let payload = [bf16(3 * CHUNK_BYTES, 5), random_bytes(CHUNK_BYTES, 6)].concat();
    for codec in [Codec::Bf16, Codec::Zstd] {
        let frame = encode(codec, &payload).expect("shrinks");
        assert!(decode(codec, &frame, payload.len()).expect("decodes") == payload);
    }
}

#[test]
fn cut_and_misnamed_frames_are_refused() {
    let payload = bf16(CHUNK_BYTES + 4096, 7);
    let frame = encode(Codec::Bf16, &payload).expect("shrinks");
    for cut in [0, 1, 7, 8, 9, PAGE - 1, PAGE, frame.len() - PAGE, frame.len() - 1] {
        assert_eq!(decode(Codec::Bf16, &frame[..cut], payload.len()), Err(ErrorKind::Corrupt), "cut to {cut}");
    }
    let table = table_bytes(2);
    let padded = [&frame[..table], &[0; PAGE], &frame[table..]].concat();
    assert_eq!(decode(Codec::Bf16, &padded, payload.len()), Err(ErrorKind::Corrupt), "a page too many");
    for wrong in [0, 1, 16, payload.len() - 16, payload.len() + 16, 2 * payload.len()] {
        assert_eq!(decode(Codec::Bf16, &frame, wrong), Err(ErrorKind::Corrupt), "decoded to {wrong}");
    }
    assert_eq!(decode(Codec::Zstd, &frame, payload.len()), Err(ErrorKind::Corrupt));
    let mut decoder = Decoder::new();
    for raw in [u64::MAX, 1 << 63, (1 << 30) + 1] {
        let refused = decoder.decode_each(Codec::Bf16, &frame, raw, &mut |_| unreachable!("nothing may be decoded"));
        assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::Corrupt));
    }
}

#[test]
fn a_payload_behind_the_end_of_its_frame_is_refused() {
    let payload = bf16(CHUNK_BYTES, 8);
    let frame = encode(Codec::Bf16, &payload).expect("shrinks");
    // One page less than the payload needs: decoding would run over what is not decoded yet.
    let mut buffer = vec![0; payload.len() - PAGE];
    let start = buffer.len() - frame.len();
    buffer[start..].copy_from_slice(&frame);
    let range = start..buffer.len();
    let refused = Decoder::new().decode_in_place(Codec::Bf16, &mut buffer, range, 0, payload.len() as u64);
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::Corrupt));
    let range = 0..frame.len() + buffer.len();
    assert!(Decoder::new().decode_in_place(Codec::Bf16, &mut buffer, range, 0, payload.len() as u64).is_err());
}

/// A frame whose parts were damaged is refused, or decodes to something of the right length: nothing panics, nothing is read
/// or written elsewhere. That it is wrong is told by the checksums.
#[test]
fn damage_in_every_region_is_an_error_or_a_wrong_checksum() {
    let payload = bf16(CHUNK_BYTES + 8192, 9);
    for codec in CODECS {
        let Some(frame) = encode(codec, &payload) else { continue };
        let mut chunks = Vec::new();
        read_table(codec, &frame, payload.len() as u64, &mut chunks).expect("intact");
        let interesting = chunks.iter().flat_map(|chunk| {
            let lower = if codec.has_planes() { chunk.raw_bytes / 2 } else { 0 };
            let start = chunk.at + lower;
            let end = chunk.at + chunk.stored_bytes;
            // The header of zstd's frame and of its Huffman tables, the streams' lengths, and the ends of the streams.
            (start..(start + 160).min(end)).chain(end.saturating_sub(16)..end).chain([chunk.at])
        });
        let table = 0..table_bytes(chunks.len());
        let mut damaged = frame.clone();
        for at in table.chain(interesting) {
            for flip in [0x01, 0x10, 0x80, 0xff] {
                damaged[at] ^= flip;
                match decode(codec, &damaged, payload.len()) {
                    Err(kind) => assert_eq!(kind, ErrorKind::Corrupt),
                    Ok(decoded) => assert_eq!(decoded.len(), payload.len()),
                }
                damaged[at] ^= flip;
            }
        }
    }
}

/// A few bytes that ask for a gigabyte: refused by the lengths, before anything is decoded.
#[test]
fn bombs_are_refused() {
    let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 1).expect("compresses");
    let raw = 2 * CHUNK_BYTES;
    let mut frame = vec![0; PAGE * bomb.len().div_ceil(PAGE).max(1) + CHUNK_BYTES];
    frame.resize(frame.len().next_multiple_of(PAGE), 0);
    let first = frame.len() - table_bytes(2) - bomb.len();
    let first = first.min(CHUNK_BYTES);
    super::frame::write_table(&mut frame, &[first as u32, bomb.len() as u32]);
    let end = frame.len();
    frame[end - bomb.len()..].copy_from_slice(&bomb);
    assert_eq!(decode(Codec::Zstd, &frame, raw), Err(ErrorKind::Corrupt));
    assert_eq!(decode(Codec::Zstd, &frame[..PAGE], 1 << 30), Err(ErrorKind::Corrupt));
}

/// Made up from intact parts, so that only the decoded length is wrong.
#[test]
fn a_chunk_that_decodes_to_less_is_refused() {
    let short = zstd::bulk::compress(&vec![1u8; CHUNK_BYTES - 16], 1).expect("compresses");
    let mut frame = vec![0; PAGE];
    super::frame::write_table(&mut frame, &[short.len() as u32]);
    frame[PAGE - short.len()..].copy_from_slice(&short);
    assert_eq!(decode(Codec::Zstd, &frame, CHUNK_BYTES), Err(ErrorKind::Corrupt));
}

fn payloads() -> impl Strategy<Value = Vec<u8>> {
    let length = 1usize..(CHUNK_BYTES * 3 / 16);
    (length, 0u8..4, any::<u64>()).prop_map(|(groups, kind, seed)| match kind {
        0 => bf16(groups * 16, seed),
        1 => random_bytes(groups * 16, seed),
        2 => random_bytes(64, seed).into_iter().cycle().take(groups * 16).collect(),
        _ => {
            let mut mixed = vec![0; groups * 16];
            let floats = bf16(mixed.len() / 32 * 16, seed);
            mixed[..floats.len()].copy_from_slice(&floats);
            mixed
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_encoded_comes_back(payload in payloads(), codec in 0usize..4) {
        let codec = CODECS[codec];
        if let Some(frame) = encode(codec, &payload) {
            prop_assert!(decode(codec, &frame, payload.len()).expect("decodes") == payload);
        }
    }

    #[test]
    fn whatever_is_decoded_ends_well(
        payload in payloads(),
        codec in 0usize..4,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        in_table in any::<bool>(),
    ) {
        let codec = CODECS[codec];
        if let Some(mut frame) = encode(codec, &payload) {
            let reach = if in_table { table_bytes(payload.len().div_ceil(CHUNK_BYTES)) } else { frame.len() };
            for (at, byte) in damage {
                frame[at.index(reach)] = byte;
            }
            if let Ok(decoded) = decode(codec, &frame, payload.len()) {
                prop_assert_eq!(decoded.len(), payload.len());
            }
        }
    }

    #[test]
    fn made_up_frames_end_well(pages in 1usize..4, raw in 1usize..(4 * CHUNK_BYTES), codec in 0usize..4, seed in any::<u64>()) {
        let mut frame = random_bytes(pages * PAGE, seed);
        let count = raw.div_ceil(CHUNK_BYTES);
        let each = (frame.len() - table_bytes(count)) / count;
        super::frame::write_table(&mut frame, &vec![each as u32; count]);
        let _ = decode(CODECS[codec], &frame, raw);
    }
}
