//! Encoding and decoding of blocks, per kind of bytes, on one core; ratios are printed first. Throughput is in bytes of
//! payload, whichever direction.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pegaflow_benches::KvBytes;
use pegaflow_tiers::{Codec, Decoder, Encoder};

const BLOCK_BYTES: usize = 2 << 20;
const SEED: u64 = 1;

const CASES: [(&str, KvBytes, Codec); 8] = [
    ("bf16", KvBytes::Bf16, Codec::Bf16),
    ("bf16_as_unknown", KvBytes::Bf16, Codec::Zstd),
    ("bf16_as_f16", KvBytes::Bf16, Codec::F16),
    ("fp8", KvBytes::Fp8, Codec::F8E4m3),
    ("fp8_as_unknown", KvBytes::Fp8, Codec::Zstd),
    ("zeros", KvBytes::Zeros, Codec::Bf16),
    ("zeros_as_unknown", KvBytes::Zeros, Codec::Zstd),
    ("random", KvBytes::Random, Codec::Bf16),
];

fn codec(criterion: &mut Criterion) {
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    for (name, bytes, codec) in CASES {
        let payload = bytes.make(BLOCK_BYTES, SEED);
        let mut buffer = vec![0; BLOCK_BYTES];
        let frame = encoder.encode(codec, &payload, &mut buffer, 0).map(|encoded| encoded.frame);
        let stored = frame.as_ref().map_or(BLOCK_BYTES, |frame| frame.len());
        println!("codec ratio {name}: {:.3}", BLOCK_BYTES as f64 / stored as f64);
        group.bench_function(BenchmarkId::new("encode", name), |bencher| {
            bencher.iter(|| encoder.encode(codec, black_box(&payload), &mut buffer, 0));
        });
        let Some(frame) = frame.and_then(|frame| buffer.get(frame)).map(<[u8]>::to_vec) else { continue };
        let mut slot = vec![0; BLOCK_BYTES];
        group.bench_function(BenchmarkId::new("decode", name), |bencher| {
            bencher.iter(|| {
                // As a read leaves it: the frame at the end of the slot.
                let range = BLOCK_BYTES - frame.len()..BLOCK_BYTES;
                slot[range.clone()].copy_from_slice(black_box(&frame));
                decoder.decode_in_place(codec, &mut slot, range, 0, BLOCK_BYTES as u64)
            });
        });
        assert!(slot == payload, "{name} decodes to something else");
    }
    group.finish();
}

criterion_group!(benches, codec);
criterion_main!(benches);
