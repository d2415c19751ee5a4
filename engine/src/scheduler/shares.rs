//! Who has how much of a memory, and who gives way. A part of it is guaranteed, in equal parts, to those that asked for
//! something lately; everybody may borrow all that is free. Whoever is most above its guarantee gives way, so what was
//! borrowed comes back when its owner needs it, and nobody's scan can take what is guaranteed to another.
//!
//! Pure arithmetic. A tenant is the number of a namespace. The first few have accounts of their own, the rest share one.

use std::collections::BTreeMap;

/// Tenants with an account of their own, at most.
const ACCOUNTS_MAX: usize = 15;
/// The account of all others.
const OTHERS: u64 = u64::MAX;
/// The part of the memory that is guaranteed.
const GUARANTEED_PERCENT: u64 = 50;
/// Who asked for nothing for so long is guaranteed nothing.
const ACTIVE_MS: u64 = 600_000;

#[derive(Debug, Clone, Copy, Default)]
struct Account {
    bytes: u64,
    asked_ms: Option<u64>,
}

/// See the module.
pub(super) struct Shares {
    capacity_bytes: u64,
    accounts: BTreeMap<u64, Account>,
}

impl Shares {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, accounts: BTreeMap::new() }
    }

    /// The account of a tenant, always the same one; it is opened if there is room.
    pub(super) fn open(&mut self, tenant: u64) -> u64 {
        let has_room = || self.accounts.keys().filter(|account| **account != OTHERS).count() < ACCOUNTS_MAX;
        let account = if self.accounts.contains_key(&tenant) || has_room() { tenant } else { OTHERS };
        self.accounts.entry(account).or_default();
        account
    }

    /// The account that a tenant has, if it was opened.
    pub(super) fn account(&self, tenant: u64) -> u64 {
        if self.accounts.contains_key(&tenant) { tenant } else { OTHERS }
    }

    /// Somebody with that account asks for something.
    pub(super) fn ask(&mut self, account: u64, now_ms: u64) {
        if let Some(account) = self.accounts.get_mut(&account) {
            account.asked_ms = Some(now_ms);
        }
    }

    pub(super) fn enter(&mut self, account: u64, bytes: u64) {
        if let Some(account) = self.accounts.get_mut(&account) {
            account.bytes += bytes;
        }
    }

    pub(super) fn leave(&mut self, account: u64, bytes: u64) {
        if let Some(account) = self.accounts.get_mut(&account) {
            account.bytes = account.bytes.saturating_sub(bytes);
        }
    }

    /// Who gives way first: the account that is above its guarantee by most bytes.
    pub(super) fn first_to_give_way(&self, now_ms: u64) -> Option<u64> {
        self.by_need(now_ms).min().map(|(_, name)| name)
    }

    /// The accounts, who gives way first in front.
    pub(super) fn give_way(&self, now_ms: u64) -> Vec<u64> {
        let mut order: Vec<(i128, u64)> = self.by_need(now_ms).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, name)| name).collect()
    }

    /// How many bytes each account has less than its guarantee; one above it has a number below zero.
    fn by_need(&self, now_ms: u64) -> impl Iterator<Item = (i128, u64)> {
        let is_active =
            move |account: &Account| account.asked_ms.is_some_and(|at| now_ms.saturating_sub(at) < ACTIVE_MS);
        let active = self.accounts.values().filter(|account| is_active(account)).count() as u64;
        let part = (self.capacity_bytes / 100 * GUARANTEED_PERCENT).checked_div(active).unwrap_or(0);
        self.accounts.iter().map(move |(name, account)| {
            let guaranteed = if is_active(account) { part } else { 0 };
            (i128::from(guaranteed) - i128::from(account.bytes), *name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::SplitMix;

    #[test]
    fn nobody_loses_what_is_guaranteed_and_what_was_borrowed_comes_back() {
        let seeds = std::env::var("PEGAFLOW_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        for seed in seeds.map_or(1..60, |seed: u64| seed..seed + 1) {
            println!("PEGAFLOW_TEST_SEED={seed}");
            let mut random = SplitMix::new(seed);
            let tenants = 1 + random.below(ACCOUNTS_MAX) as u64;
            let capacity = 3000;
            let mut shares = Shares::new(capacity);
            let bytes = |shares: &Shares, tenant: u64| shares.accounts.get(&tenant).map_or(0, |of| of.bytes);
            let part = capacity / 100 * GUARANTEED_PERCENT / tenants;
            let accounts: Vec<u64> = (1..=tenants).map(|tenant| shares.open(tenant)).collect();
            accounts.iter().for_each(|account| shares.ask(*account, 0));
            let add = |shares: &mut Shares, account: u64| {
                if shares.accounts.values().map(|of| of.bytes).sum::<u64>() >= capacity {
                    let before = shares.accounts.clone();
                    assert_eq!(shares.first_to_give_way(1), shares.give_way(1).first().copied());
                    let victim = shares.give_way(1).into_iter().find(|at| bytes(shares, *at) > 0).expect("full");
                    assert!(before[&victim].bytes > part, "{victim} loses what is guaranteed to it, seed {seed}");
                    shares.leave(victim, 1);
                }
                shares.enter(account, 1);
            };
            // One borrows all; then all ask, in random order, at random rates.
            (0..capacity).for_each(|_| add(&mut shares, accounts[0]));
            assert_eq!(bytes(&shares, accounts[0]), capacity, "what nobody needs is lent");
            let greed = random.below(accounts.len());
            for _ in 0..20 * capacity {
                let at = if random.unit() < 0.5 { greed } else { random.below(accounts.len()) };
                add(&mut shares, accounts[at]);
            }
            for account in &accounts {
                let has = bytes(&shares, *account);
                assert!(has >= part, "{account} starves with {has} of {part}, seed {seed}");
            }
        }
    }

    #[test]
    fn who_asks_for_nothing_is_guaranteed_nothing_and_accounts_are_bounded() {
        let mut shares = Shares::new(1000);
        let (idle, busy) = (shares.open(1), shares.open(2));
        shares.ask(idle, 0);
        shares.ask(busy, ACTIVE_MS);
        shares.enter(idle, 450);
        shares.enter(busy, 550);
        assert_eq!(shares.give_way(ACTIVE_MS), [idle, busy]);
        shares.ask(idle, ACTIVE_MS);
        assert_eq!(shares.give_way(ACTIVE_MS), [busy, idle]);
        let accounts: Vec<u64> = (1..1000).map(|tenant| shares.open(tenant)).collect();
        assert!(accounts.iter().zip(1..).all(|(account, tenant)| shares.account(tenant) == *account));
        assert_eq!(shares.accounts.len(), ACCOUNTS_MAX + 1);
    }
}
