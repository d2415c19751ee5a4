//! Shares of DRAM as an operator sees them: the setting, and who has how much. What they do is in `scheduler/shares.rs`.

use pegaflow_tiers::Result;

use crate::api::{DramAccount, Stats};
use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::inner::Inner;
use crate::scheduler::AccountState;

impl Engine {
    /// Changes the part of DRAM that is guaranteed to namespaces that ask, in percent; see
    /// [`EngineConfig::guaranteed_percent`]. Blocks change accounts bit by bit, with the requests that follow.
    ///
    /// # Errors
    /// `InvalidInput` above 100, `Closed`.
    pub fn set_guaranteed_percent(&self, percent: u32) -> Result<()> {
        let inner = self.inner()?;
        EngineConfig { guaranteed_percent: percent, ..inner.config.clone() }.validate()?;
        inner.residency.set_guaranteed_percent(percent);
        Ok(())
    }
}

/// Tells who has how much.
pub(crate) fn add(stats: &mut Stats, inner: &Inner) {
    let shares = inner.residency.shares();
    stats.guaranteed_percent = shares.guaranteed_percent;
    stats.dram_share_evicted_blocks = shares.decided;
    let borrowed = |account: &AccountState| account.bytes.saturating_sub(account.guaranteed_bytes);
    stats.dram_borrowed_bytes = shares.accounts.iter().map(borrowed).sum();
    stats.dram_accounts = (shares.accounts.into_iter())
        .map(|AccountState { tenant, bytes, guaranteed_bytes, is_active }| DramAccount {
            is_of_others: tenant.is_none(),
            bytes,
            guaranteed_bytes,
            is_active,
        })
        .collect();
}
