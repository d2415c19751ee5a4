//! Block keys: a chained 32-byte hash over all tokens up to and including a block.
//! The chain is our own, so a key means the same in every version of vLLM and after every restart.

use std::fmt;

/// The version of the key chain; part of every namespace, so that a change of the chain is a miss, never a mix-up.
pub const KEY_CHAIN_VERSION: u16 = 1;

/// Domain separation for BLAKE3's key derivation mode.
const BLOCK_CONTEXT: &str = "pegaflow 2026-11-22 block key chain v1";
const NAME_CONTEXT: &str = "pegaflow 2026-11-22 named object key v1";

/// The key of one block: BLAKE3 over the parent's key, the block's tokens and whatever else its bytes depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct BlockKey([u8; 32]);

impl BlockKey {
    /// The parent of a first block: all zero. No block has this key.
    pub const ROOT: Self = Self([0; 32]);

    /// A key from its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key of a named object of `PegaEngine.put`: a hash of the name in a domain of its own.
    pub fn from_name(name: &[u8]) -> Self {
        Self(*blake3::Hasher::new_derive_key(NAME_CONTEXT).update(name).finalize().as_bytes())
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether this is [`BlockKey::ROOT`].
    pub fn is_root(&self) -> bool {
        *self == Self::ROOT
    }

    /// The first eight bytes as a number: uniformly distributed, for tables and fingerprints.
    pub fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockKey({self})")
    }
}

/// Computes the keys of one sequence, block after block.
///
/// `key[i] = BLAKE3-derive(context, parent || n_tokens: u32 || tokens: u32 little-endian each || extra)`, where `extra` is
/// whatever else decides the bytes of the block: LoRA content, multimodal content, cache salt.
#[derive(Clone)]
pub struct KeyChain {
    seed: blake3::Hasher,
    parent: BlockKey,
}

impl KeyChain {
    /// The start of a sequence.
    pub fn new() -> Self {
        Self::resume(BlockKey::ROOT)
    }

    /// Goes on after a block whose key is known.
    pub fn resume(parent: BlockKey) -> Self {
        Self { seed: blake3::Hasher::new_derive_key(BLOCK_CONTEXT), parent }
    }

    /// The key of the last block, [`BlockKey::ROOT`] before the first.
    pub fn parent(&self) -> BlockKey {
        self.parent
    }

    /// The key of the next block, which becomes the parent of the one after it.
    pub fn next(&mut self, tokens: &[u32], extra: &[u8]) -> BlockKey {
        let mut hasher = self.seed.clone();
        hasher.update(self.parent.as_bytes());
        let count = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        hasher.update(&count.to_le_bytes());
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        for token in tokens {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        hasher.update(&bytes).update(extra);
        self.parent = BlockKey(*hasher.finalize().as_bytes());
        self.parent
    }
}

impl Default for KeyChain {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for KeyChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyChain").field("parent", &self.parent).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_everything_before_it() {
        let keys = |first: u32, extra: &[u8]| {
            let mut chain = KeyChain::new();
            chain.next(&[first, 2, 3], extra);
            chain.next(&[4, 5, 6], b"")
        };
        assert_eq!(keys(1, b""), keys(1, b""));
        assert_ne!(keys(1, b""), keys(9, b""));
        assert_ne!(keys(1, b""), keys(1, b"lora"));
    }

    #[test]
    fn tokens_and_extra_do_not_run_into_each_other() {
        let mut a = KeyChain::new();
        let mut b = KeyChain::new();
        assert_ne!(a.next(&[1, 7], b""), b.next(&[1], &7u32.to_le_bytes()));
    }

    #[test]
    fn resuming_gives_the_same_keys() {
        let mut whole = KeyChain::new();
        let first = whole.next(&[1, 2], b"");
        let second = whole.next(&[3, 4], b"");
        assert_eq!(KeyChain::resume(first).next(&[3, 4], b""), second);
    }

    /// The chain is part of the on-disk format: this value may only change with [`KEY_CHAIN_VERSION`].
    #[test]
    fn the_chain_is_frozen() {
        let key = KeyChain::new().next(&[1, 2, 3, 4], b"salt");
        assert_eq!(key.to_string(), "b46f3b47ad0847e5dfe59d1375fbfc9102fd85f3628be3c7075b3714880a4840");
    }
}
