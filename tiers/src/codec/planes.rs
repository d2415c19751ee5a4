//! Splitting floats into two planes of half their bytes each, and back. The loops work on whole groups so that the
//! compiler makes vectors of them; lengths are multiples of [`GROUP`].

/// Bytes of floats that are split at once, and what lengths are multiples of.
pub(super) const GROUP: usize = 16;
const HALF: usize = GROUP / 2;

/// How floats are split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// 16-bit numbers, turned left by this many bits, into upper and lower bytes.
    Bytes(u32),
    /// 8-bit numbers, turned left by this many bits, into upper and lower halves, two of each to a byte.
    Nibbles(u32),
}

impl Split {
    /// Splits `floats` into the plane to compress and the plane to keep, each half as long.
    pub(super) fn split(self, floats: &[u8], upper: &mut [u8], lower: &mut [u8]) {
        let groups = floats.chunks_exact(GROUP).zip(upper.chunks_exact_mut(HALF)).zip(lower.chunks_exact_mut(HALF));
        match self {
            Self::Bytes(turn) => groups.for_each(|((floats, upper), lower)| {
                for ((pair, upper), lower) in floats.chunks_exact(2).zip(upper).zip(lower) {
                    let number = u16::from_le_bytes([pair[0], pair[1]]).rotate_left(turn);
                    [*lower, *upper] = number.to_le_bytes();
                }
            }),
            Self::Nibbles(turn) => groups.for_each(|((floats, upper), lower)| {
                for ((pair, upper), lower) in floats.chunks_exact(2).zip(upper).zip(lower) {
                    let [first, second] = [pair[0].rotate_left(turn), pair[1].rotate_left(turn)];
                    *upper = first >> 4 | second & 0xf0;
                    *lower = first & 0x0f | second << 4;
                }
            }),
        }
    }

    /// The reverse.
    pub(super) fn merge(self, upper: &[u8], lower: &[u8], floats: &mut [u8]) {
        let groups = floats.chunks_exact_mut(GROUP).zip(upper.chunks_exact(HALF)).zip(lower.chunks_exact(HALF));
        match self {
            Self::Bytes(turn) => groups.for_each(|((floats, upper), lower)| {
                for ((pair, upper), lower) in floats.chunks_exact_mut(2).zip(upper).zip(lower) {
                    let number = u16::from_le_bytes([*lower, *upper]).rotate_right(turn);
                    pair.copy_from_slice(&number.to_le_bytes());
                }
            }),
            Self::Nibbles(turn) => groups.for_each(|((floats, upper), lower)| {
                for ((pair, upper), lower) in floats.chunks_exact_mut(2).zip(upper).zip(lower) {
                    pair[0] = (*upper << 4 | lower & 0x0f).rotate_right(turn);
                    pair[1] = (*upper & 0xf0 | *lower >> 4).rotate_right(turn);
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back_and_exponents_are_in_the_upper_plane() {
        let numbers: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for split in [Split::Bytes(0), Split::Bytes(1), Split::Nibbles(1)] {
            let (mut upper, mut lower) = (vec![0; numbers.len() / 2], vec![0; numbers.len() / 2]);
            split.split(&numbers, &mut upper, &mut lower);
            let mut back = vec![0; numbers.len()];
            split.merge(&upper, &lower, &mut back);
            assert!(back == numbers, "{split:?}");
            for (number, upper) in (0..=u16::MAX).zip(upper) {
                let [first, second] = number.to_le_bytes();
                let expected = match split {
                    Split::Bytes(0) => second,
                    Split::Bytes(_) => (number >> 7 & 0xff) as u8,
                    Split::Nibbles(_) => first >> 3 & 0x0f | (second << 1) & 0xf0,
                };
                assert_eq!(upper, expected, "{split:?} of {number:#x}");
            }
        }
    }
}
