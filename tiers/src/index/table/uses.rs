//! How often and when a record was used, in two bytes: what a policy can know of ten million records at no cost in
//! memory. Time is counted in epochs, of which the store passes sixteen while as many bytes are written as it holds.

/// How often a record was used, up to [`Uses::MOST`], and in which epoch last.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Uses(u16);

const COUNT_BITS: u32 = 4;
/// Epochs are counted modulo this.
const EPOCHS: u16 = 1 << (u16::BITS - COUNT_BITS);

impl Uses {
    /// The most uses that are counted.
    pub const MOST: u8 = (1 << COUNT_BITS) - 1;
    /// Never used.
    pub(crate) const NONE: Self = Self(0);

    /// How often it was used; each time the record is written again for its use, half of that is forgotten.
    pub fn count(self) -> u8 {
        (self.0 as u8) & Self::MOST
    }

    /// Epochs since the last use, at most 4,095; without meaning if it was never used.
    pub fn idle_epochs(self, now: u16) -> u16 {
        now.wrapping_sub(self.0 >> COUNT_BITS) % EPOCHS
    }

    /// With one use more, in this epoch.
    pub(super) fn noted(self, epoch: u16) -> Self {
        let count = (self.count() + 1).min(Self::MOST);
        Self((epoch % EPOCHS) << COUNT_BITS | u16::from(count))
    }

    /// With half of the uses; the epoch stays.
    pub(super) fn aged(self) -> Self {
        Self(self.0 & !u16::from(Self::MOST) | u16::from(self.count() / 2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_are_counted_to_their_limit_and_fade() {
        let mut uses = Uses::NONE;
        assert_eq!((uses.count(), Uses::default()), (0, Uses::NONE));
        for _ in 0..40 {
            uses = uses.noted(5);
        }
        assert_eq!((uses.count(), uses.idle_epochs(5), uses.idle_epochs(9)), (Uses::MOST, 0, 4));
        assert_eq!((uses.aged().count(), uses.aged().idle_epochs(9)), (7, 4));
        assert_eq!(uses.aged().aged().aged().aged().count(), 0);
    }

    #[test]
    fn epochs_go_around() {
        let uses = Uses::NONE.noted(EPOCHS - 1);
        assert_eq!((uses.count(), uses.idle_epochs(0), uses.idle_epochs(EPOCHS + 1)), (1, 1, 2));
        assert_eq!(Uses::NONE.noted(u16::MAX).idle_epochs(u16::MAX), 0);
    }
}
