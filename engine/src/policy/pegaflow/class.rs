//! What tells one block's prospects from another's, in a handful of bits.

/// Kinds of evidence beside age and rhythm.
pub(super) const FEATURES: usize = 6;
/// Values of each.
pub(super) const VALUES: usize = 8;
/// Classes of the gap before the last use: 0 for none, then each twice as long as the one before.
pub(super) const RHYTHMS: usize = 16;
/// Gaps below one through this many seconds are of the shortest class.
const SHORTEST_GAP_INVERSE: f32 = 2.0;

/// What was known of a block when it was used last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Class(u32);

/// The same, before it is packed.
pub(super) struct Evidence {
    /// Seconds since the use before, if there was one: of the block itself, else of the chain that the request continues.
    pub(super) gap: Option<f32>,
    /// How often the conversation was continued, this request included; from 1.
    pub(super) turn: u32,
    /// Blocks after it in the request.
    pub(super) blocks_after: usize,
    /// Requests that used it before this one.
    pub(super) uses: u32,
    /// Blocks of the request that were not there.
    pub(super) new_blocks: usize,
    /// Blocks of the request.
    pub(super) blocks: usize,
    pub(super) tenant: u64,
}

/// 0, 1, 2 to 3, 4 to 7, ...
fn log_bucket(number: usize) -> u32 {
    usize::BITS - number.leading_zeros()
}

/// Classes of [`Evidence::blocks_after`]: 0, 1, 2, 3 to 4, 5 to 8, ... The last block of a request is rarely full, and then
/// of no use to any other request; so the first classes are single.
pub(super) fn tail_bucket(blocks_after: usize) -> u32 {
    let bucket = if blocks_after <= 1 { blocks_after as u32 } else { 1 + log_bucket(blocks_after - 1) };
    bucket.min(VALUES as u32 - 1)
}

impl Class {
    pub(super) fn new(evidence: &Evidence) -> Self {
        let rhythm = evidence
            .gap
            .map_or(0, |gap| (log_bucket((gap * SHORTEST_GAP_INVERSE) as usize).max(1)).min(RHYTHMS as u32 - 1));
        let values = [
            evidence.turn.saturating_sub(1),
            tail_bucket(evidence.blocks_after),
            log_bucket(evidence.uses as usize),
            log_bucket(evidence.new_blocks),
            log_bucket(evidence.blocks),
            (evidence.tenant % VALUES as u64) as u32,
        ];
        let packed = values.iter().fold(rhythm, |packed, value| packed << 3 | (*value).min(VALUES as u32 - 1));
        Self(packed)
    }

    /// As a number, for [`Class::from_bits`].
    pub(super) fn bits(self) -> u32 {
        self.0
    }

    /// Any number is a class: what does not belong there is left out.
    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits & (((RHYTHMS as u32) << (3 * FEATURES)) - 1))
    }

    pub(super) fn rhythm(self) -> usize {
        (self.0 >> (3 * FEATURES)) as usize % RHYTHMS
    }

    pub(super) fn value(self, feature: usize) -> usize {
        (self.0 >> (3 * (FEATURES - 1 - feature % FEATURES))) as usize % VALUES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_keeps_what_it_was_made_of() {
        let evidence =
            Evidence { gap: Some(5.0), turn: 3, blocks_after: 6, uses: 1, new_blocks: 0, blocks: 100, tenant: 13 };
        let class = Class::new(&evidence);
        let values: Vec<usize> = (0..FEATURES).map(|feature| class.value(feature)).collect();
        assert_eq!((class.rhythm(), values), (4, vec![2, 4, 1, 0, 7, 5]));
        assert_eq!(Class::from_bits(class.bits()), class);
        let most = Class::from_bits(u32::MAX);
        assert!(most.rhythm() < RHYTHMS && Class::from_bits(most.bits()) == most);
        let none =
            Class::new(&Evidence { gap: None, turn: 1, blocks_after: 0, uses: 0, blocks: 0, tenant: 0, ..evidence });
        assert_eq!(none, Class::default());
    }

    #[test]
    fn blocks_near_the_end_have_classes_of_their_own() {
        let buckets: Vec<u32> = [0, 1, 2, 3, 4, 5, 8, 9, 1000].into_iter().map(tail_bucket).collect();
        assert_eq!(buckets, [0, 1, 2, 3, 3, 4, 4, 5, 7]);
    }
}
