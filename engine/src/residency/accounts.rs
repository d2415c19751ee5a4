//! Who has how much of DRAM, and how much of it is guaranteed.

use crate::scheduler::ShareTotals;

use super::Residency;

impl Residency {
    /// The part of DRAM that is guaranteed to those who ask, in percent, from now on.
    pub(crate) fn set_guaranteed_percent(&self, percent: u32) {
        self.policies.lock().set_guaranteed_percent(percent);
    }

    /// The accounts in which shares are kept.
    pub(crate) fn shares(&self) -> ShareTotals {
        self.policies.lock().totals()
    }
}
