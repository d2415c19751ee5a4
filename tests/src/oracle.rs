//! The oracle: every block's bytes are a stream of random numbers seeded by its key, so that any reader can tell right
//! bytes from wrong ones without a second copy.

use pegaflow_engine::{BlockKey, KeyChain};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

/// The keys of one made-up sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// What makes the sequence different from others.
    pub seed: u64,
    /// The keys of its blocks.
    pub keys: Vec<BlockKey>,
}

impl Chain {
    /// A sequence of `length` blocks.
    pub fn new(seed: u64, length: usize) -> Self {
        let mut chain = KeyChain::new();
        let [low, high] = [seed as u32, (seed >> 32) as u32];
        let keys = (0..length).map(|depth| chain.next(&[low, high, depth as u32], b"oracle")).collect();
        Self { seed, keys }
    }

    /// The key before the block at `index`.
    pub fn parent(&self, index: usize) -> BlockKey {
        index.checked_sub(1).and_then(|before| self.keys.get(before)).copied().unwrap_or(BlockKey::ROOT)
    }
}

/// Fills `bytes` with what a block of this key must hold.
pub fn block_bytes(key: &BlockKey, bytes: &mut [u8]) {
    SmallRng::from_seed(*key.as_bytes()).fill_bytes(bytes);
}

/// Where `bytes` differ from what a block of this key must hold; `None` if they are right.
pub fn first_difference(key: &BlockKey, bytes: &[u8]) -> Option<usize> {
    let mut expected = vec![0; bytes.len()];
    block_bytes(key, &mut expected);
    bytes.iter().zip(&expected).position(|(got, expected)| got != expected)
}
