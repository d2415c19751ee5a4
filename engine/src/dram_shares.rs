//! Shares of DRAM as an operator sees them: the setting, and who has how much. What they do is in `scheduler/shares.rs`.

use pegaflow_tiers::{NamespaceDescriptor, NamespaceHandle, Result};

use crate::api::{DramAccount, Stats};
use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::inner::Inner;
use crate::scheduler::AccountState;

/// Digits of a namespace's name that are told.
const DIGITS: usize = 16;

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
    let handle = |tenant: u64| NamespaceHandle(tenant as u32);
    let handles: Vec<NamespaceHandle> =
        shares.accounts.iter().filter_map(|account| account.tenant).map(handle).collect();
    let mut names = inner.drive.namespaces.ids(&handles);
    names.insert(NamespaceHandle(0), NamespaceDescriptor::objects().id());
    if handles.iter().any(|handle| !names.contains_key(handle)) {
        // Their blocks have come back from an earlier run, and no engine has registered.
        let rows = inner.drive.store().map(|store| store.namespaces()).unwrap_or_default();
        names.extend(rows.into_iter().map(|row| (row.handle, row.id)));
    }
    let name = |tenant: u64| {
        names.get(&handle(tenant)).map_or_else(|| "purged".into(), |id| id.to_string().chars().take(DIGITS).collect())
    };
    stats.dram_accounts = (shares.accounts.into_iter())
        .map(|AccountState { tenant, bytes, guaranteed_bytes, is_active }| DramAccount {
            namespace: tenant.map(name),
            bytes,
            guaranteed_bytes,
            is_active,
        })
        .collect();
}
