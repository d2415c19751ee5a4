//! Encoding and decoding of blocks, per kind of bytes, on one core. Ratios are printed first, with the best of many short runs:
//! that is what a core does while nobody disturbs it. Throughput is in bytes of payload, whichever direction.

use std::hint::black_box;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pegaflow_benches::KvBytes;
use pegaflow_tiers::{Codec, Decoder, Encoder};

const BLOCK_BYTES: usize = 2 << 20;
const SEED: u64 = 1;
/// Runs of which the best is printed.
const RUNS: usize = 300;

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
        let ratio = BLOCK_BYTES as f64 / stored as f64;
        let encode_gbps = best_gbps(|| encoder.encode(codec, black_box(&payload), &mut buffer, 0));
        let mut decode_gbps = f64::NAN;
        if let Some(frame) = frame.as_ref().and_then(|frame| buffer.get(frame.clone())) {
            decode_gbps = best_gbps(|| decoder.decode_each(codec, black_box(frame), BLOCK_BYTES as u64, &mut |_| ()));
        }
        println!(
            "codec {name}: ratio {ratio:.3}, best encode {encode_gbps:.2} GB/s, best decode {decode_gbps:.2} GB/s"
        );
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

/// GB of payload per second of the fastest of many runs.
fn best_gbps<T>(mut run: impl FnMut() -> T) -> f64 {
    let times = (0..RUNS).map(|_| {
        let began = Instant::now();
        black_box(run());
        began.elapsed().as_secs_f64()
    });
    BLOCK_BYTES as f64 / times.fold(f64::INFINITY, f64::min) / 1e9
}

criterion_group!(benches, codec);
criterion_main!(benches);
