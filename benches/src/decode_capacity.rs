//! What the cores of this machine decode when all of them do nothing else.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pegaflow_tiers::{Codec, Decoder, Encoder};

use crate::kv_bytes::KvBytes;

/// Payload bytes per second, in GB, of all cores together, in blocks of `block_bytes` of bf16, over `time`.
///
/// # Errors
/// If such blocks can not be encoded, or a decoder finds fault with one.
pub fn decode_capacity_gbps(block_bytes: usize, time: Duration) -> Result<f64> {
    let payload = KvBytes::Bf16.make(block_bytes, 1);
    let mut buffer = vec![0; block_bytes];
    let encoded = Encoder::new().encode(Codec::Bf16, &payload, &mut buffer, 0).context("bf16 does not shrink")?;
    let frame = buffer.get(encoded.frame).context("a frame outside its buffer")?;
    let cores = std::thread::available_parallelism()?.get();
    let start = Barrier::new(cores);
    let work = || -> Result<f64> {
        let mut decoder = Decoder::new();
        start.wait();
        let (began, mut blocks) = (Instant::now(), 0_u32);
        while began.elapsed() < time {
            decoder.decode_each(Codec::Bf16, frame, block_bytes as u64, &mut |_| ())?;
            blocks += 1;
        }
        Ok(f64::from(blocks) * block_bytes as f64 / began.elapsed().as_secs_f64() / 1e9)
    };
    let speeds: Vec<Result<f64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    ensure!(speeds.len() == cores, "a decoding thread panicked");
    speeds.into_iter().sum()
}
