//! Records in chains, as prompts leave them: every chain is one prompt, its keys are as random as hashes, its records lie
//! one after the other in the log. The same seed gives the same records.

use std::ops::Range;

use pegaflow_tiers::{BlockKey, IndexRow, Location, NamespaceHandle, RecordId, RecordKind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The blocks of one prompt: 2,048 blocks of 16 tokens are 32,768 tokens.
pub const PROMPT_BLOCKS: usize = 2048;

const PAGES_PER_RECORD: u32 = 17;
const RECORDS_PER_REGION: u32 = 2048;
const GENERATION: u64 = 1;

/// Made-up records, in the order in which they were written.
pub struct Records {
    ids: Vec<RecordId>,
}

impl Records {
    /// `count` records of one namespace, in chains of [`PROMPT_BLOCKS`].
    pub fn new(count: usize, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let place = RecordId { namespace: NamespaceHandle(1), group: 0, shard: 0, key: BlockKey::ROOT };
        let ids = (0..count).map(|_| place.with_key(BlockKey::from_bytes(random.random()))).collect();
        Self { ids }
    }

    /// The identities, prompt after prompt.
    pub fn ids(&self) -> &[RecordId] {
        &self.ids
    }

    /// The blocks of one whole prompt, drawn at random; all there are if that is less than a prompt.
    pub fn random_prompt(&self, random: &mut impl Rng) -> Range<usize> {
        let prompts = self.ids.len() / PROMPT_BLOCKS;
        if prompts == 0 {
            return 0..self.ids.len();
        }
        let first = random.random_range(0..prompts) * PROMPT_BLOCKS;
        first..first + PROMPT_BLOCKS
    }

    /// What the index knows of each record.
    pub fn rows(&self) -> impl Iterator<Item = IndexRow> + '_ {
        let parents = std::iter::once(None).chain(self.ids.iter().map(Some));
        (0u32..).zip(self.ids.iter().zip(parents)).map(|(number, (&id, before))| {
            let depth = number % PROMPT_BLOCKS as u32;
            IndexRow {
                id,
                parent: before.filter(|_| depth > 0).map_or(BlockKey::ROOT, |before| before.key),
                depth,
                location: Location {
                    region: number / RECORDS_PER_REGION,
                    generation: GENERATION,
                    page: 1 + number % RECORDS_PER_REGION * PAGES_PER_RECORD,
                    pages: PAGES_PER_RECORD,
                },
                payload_bytes: u64::from(PAGES_PER_RECORD - 1) * 4096,
                sequence: u64::from(number) + 1,
                kind: RecordKind::Kv,
            }
        })
    }
}
