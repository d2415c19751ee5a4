//! Which engine has seen the beginning of a prompt: it most likely has it in its own cache still.

use std::num::NonZeroUsize;

use lru::LruCache;

/// A prompt is remembered in pieces of so many bytes, so many at most.
pub(crate) const PIECE_BYTES: usize = 1024;
const PIECES_MAX: usize = 256;
/// Pieces kept, of about 100 bytes each.
const KEPT: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();

/// The beginning of a prompt: a digest of all up to the end of each piece.
#[derive(Debug, Clone, Default)]
pub(crate) struct Beginning {
    pieces: Vec<u64>,
    prompt_bytes: usize,
}

impl Beginning {
    /// Of a prompt for a model, of somebody who shares with those of the same salt only. What follows the last whole piece is
    /// left out.
    pub(crate) fn new(model: &str, salt: Option<&str>, prompt: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(model.len() as u64).to_le_bytes()).update(model.as_bytes());
        hasher.update(&[u8::from(salt.is_some())]);
        let salt = salt.unwrap_or_default();
        hasher.update(&(salt.len() as u64).to_le_bytes()).update(salt.as_bytes());
        let digest = |piece: &[u8]| {
            let mut first = [0; 8];
            hasher.update(piece).finalize_xof().fill(&mut first);
            u64::from_le_bytes(first)
        };
        let pieces = prompt.chunks_exact(PIECE_BYTES).take(PIECES_MAX).map(digest).collect();
        Self { pieces, prompt_bytes: prompt.len() }
    }

    /// A digest for each piece, of all up to its end.
    pub(crate) fn pieces(&self) -> &[u64] {
        &self.pieces
    }

    /// The length of the whole prompt.
    pub(crate) fn prompt_bytes(&self) -> usize {
        self.prompt_bytes
    }
}

/// Engines by number, 0 to 63, that have answered prompts with these beginnings. Bounded: the oldest are forgotten.
#[derive(Debug)]
pub(crate) struct Affinity {
    seen: LruCache<u64, u64>,
}

impl Affinity {
    pub(crate) fn new() -> Self {
        Self { seen: LruCache::new(KEPT) }
    }

    /// The share of a beginning that an engine has seen, 0 to 1, without gaps.
    pub(crate) fn share(&self, beginning: &Beginning, engine: usize) -> f64 {
        let has_seen = |digest: &&u64| self.seen.peek(digest).is_some_and(|engines| engines >> engine & 1 == 1);
        beginning.pieces.iter().take_while(has_seen).count() as f64 / beginning.pieces.len().max(1) as f64
    }

    /// An engine has begun with such a prompt.
    pub(crate) fn note(&mut self, beginning: &Beginning, engine: usize) {
        for digest in &beginning.pieces {
            *self.seen.get_or_insert_mut(*digest, || 0) |= 1 << engine;
        }
    }

    /// An engine has gone, and its own cache with it.
    pub(crate) fn forget(&mut self, engine: usize) {
        self.seen.iter_mut().for_each(|(_, engines)| *engines &= !(1 << engine));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_common_beginning_counts() {
        let mut affinity = Affinity::new();
        let (shared, own) = (vec![b'a'; 3 * PIECE_BYTES], vec![b'b'; PIECE_BYTES]);
        let first = Beginning::new("m", None, &[shared.clone(), own].concat());
        affinity.note(&first, 5);
        let other = Beginning::new("m", None, &[shared, vec![b'c'; PIECE_BYTES]].concat());
        assert_eq!(affinity.share(&first, 5), 1.0);
        assert_eq!(affinity.share(&other, 5), 0.75);
        assert_eq!(affinity.share(&other, 4), 0.0);
        affinity.forget(5);
        assert_eq!(affinity.share(&first, 5), 0.0);
    }

    #[test]
    fn another_model_shares_nothing_and_a_short_prompt_has_no_beginning() {
        let mut affinity = Affinity::new();
        let prompt = vec![b'a'; 2 * PIECE_BYTES];
        affinity.note(&Beginning::new("m", None, &prompt), 0);
        assert_eq!(affinity.share(&Beginning::new("n", None, &prompt), 0), 0.0);
        assert_eq!(affinity.share(&Beginning::new("m", None, &prompt[..PIECE_BYTES - 1]), 0), 0.0);
        affinity.note(&Beginning::new("m", Some("b"), &prompt), 0);
        for salt in ["", "a"] {
            assert_eq!(affinity.share(&Beginning::new("m", Some(salt), &prompt), 0), 0.0, "nor another salt");
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut affinity = Affinity::new();
        for number in 0..300_u32 {
            let prompt: Vec<u8> = number.to_le_bytes().repeat(PIECES_MAX * PIECE_BYTES / 4 + 1);
            affinity.note(&Beginning::new("m", None, &prompt), 1);
        }
        assert_eq!(affinity.seen.len(), KEPT.get());
    }
}
