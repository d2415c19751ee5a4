//! `Table::prefix` on a table of one million keys: prompts that are all there, and prompts that are not there at all.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pegaflow_benches::Records;
use pegaflow_tiers::Table;
use rand::SeedableRng;
use rand::rngs::StdRng;

const KEYS: usize = 1_000_000;
const SEED: u64 = 1;

fn prefix(criterion: &mut Criterion) {
    let records = Records::new(KEYS, SEED);
    let table = Table::new();
    for row in records.rows() {
        table.insert(row.id.fingerprint(), 0, row.location);
    }
    let fingerprints: Vec<u64> = records.ids().iter().map(|id| id.fingerprint()).collect();
    let unknown: Vec<u64> = Records::new(2048, SEED + 1).ids().iter().map(|id| id.fingerprint()).collect();
    let mut random = StdRng::seed_from_u64(SEED);
    let mut found = Vec::new();

    let mut group = criterion.benchmark_group("table_prefix");
    for blocks in [1usize, 16, 128, 2048] {
        group.throughput(Throughput::Elements(blocks as u64));
        group.bench_function(BenchmarkId::new("all_known", blocks), |bencher| {
            bencher.iter_batched(
                || records.random_prompt(&mut random).start,
                |start| {
                    table.prefix(black_box(&fingerprints[start..start + blocks]).iter().copied(), &mut found);
                    assert_eq!(found.len(), blocks);
                },
                criterion::BatchSize::SmallInput,
            );
        });
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("none_known", |bencher| {
        bencher.iter(|| {
            table.prefix(black_box(&unknown).iter().copied(), &mut found);
            assert!(found.is_empty());
        });
    });
    group.finish();
}

criterion_group!(benches, prefix);
criterion_main!(benches);
