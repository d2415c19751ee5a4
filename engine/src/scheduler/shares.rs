//! Who has how much of a memory, and who gives way. A part of it is guaranteed, in equal parts, to those that asked for
//! something lately; everybody may borrow all that is free. Whoever is most above its guarantee gives way, so what was
//! borrowed comes back when its owner needs it, and nobody's scan can take what is guaranteed to another.
//!
//! Pure arithmetic. A tenant is the number of a namespace. A few have accounts of their own, the rest share one; who is new
//! and asks gets that of the one who has been idle longest, whose bytes go to the account of the others.

use std::collections::BTreeMap;

/// Tenants with an account of their own, at most.
pub(super) const ACCOUNTS_MAX: usize = 15;
/// The account of all others.
pub(super) const OTHERS: u64 = u64::MAX;
/// Who asked for nothing for so long is guaranteed nothing, and may lose its account.
pub(super) const ACTIVE_MS: u64 = 600_000;

/// An account as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AccountState {
    /// The number of its namespace; `None`: that of all others.
    pub(crate) tenant: Option<u64>,
    /// What it has.
    pub(crate) bytes: u64,
    /// What is guaranteed to it now.
    pub(crate) guaranteed_bytes: u64,
    /// Whether it asked for something lately.
    pub(crate) is_active: bool,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareTotals {
    /// What is guaranteed, in percent.
    pub(crate) guaranteed_percent: u32,
    /// By number of the namespace, that of the others last.
    pub(crate) accounts: Vec<AccountState>,
    /// Blocks that left where several accounts had some, so that the shares said whose.
    pub(crate) decided: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Account {
    bytes: u64,
    asked_ms: Option<u64>,
    /// Whether blocks of its tenant may still be with the others.
    was_other: bool,
}

impl Account {
    fn is_active(&self, now_ms: u64) -> bool {
        self.asked_ms.is_some_and(|at| now_ms.saturating_sub(at) < ACTIVE_MS)
    }
}

/// See the module.
pub(super) struct Shares {
    capacity_bytes: u64,
    /// The part of the memory that is guaranteed; 0: nobody has an account of its own.
    guaranteed_percent: u64,
    accounts: BTreeMap<u64, Account>,
}

impl Shares {
    pub(super) fn new(capacity_bytes: u64, guaranteed_percent: u32) -> Self {
        Self { capacity_bytes, guaranteed_percent: guaranteed_percent.into(), accounts: BTreeMap::new() }
    }

    /// Another part from now on. At 0 accounts are to be closed by whoever owns them, see [`Shares::to_close`].
    pub(super) fn set_guaranteed_percent(&mut self, percent: u32) {
        self.guaranteed_percent = percent.into();
    }

    pub(super) fn guaranteed_percent(&self) -> u32 {
        self.guaranteed_percent as u32
    }

    /// The account of a tenant; it is opened if there is room.
    pub(super) fn open(&mut self, tenant: u64) -> u64 {
        let has_room = || self.guaranteed_percent > 0 && self.own() < ACCOUNTS_MAX;
        let account = if self.accounts.contains_key(&tenant) || has_room() { tenant } else { OTHERS };
        let was_other = self.accounts.contains_key(&OTHERS);
        self.accounts.entry(account).or_insert(Account { was_other, ..Account::default() });
        account
    }

    /// Whether blocks of a tenant may be with the others.
    pub(super) fn is_other(&self, tenant: u64) -> bool {
        self.accounts.get(&tenant).is_none_or(|account| account.was_other)
    }

    /// The account that a tenant has, if it was opened.
    pub(super) fn account(&self, tenant: u64) -> u64 {
        if self.accounts.contains_key(&tenant) { tenant } else { OTHERS }
    }

    /// Whose account is to be closed so that `tenant`, who asks for something and has none, can have one: the longest idle
    /// one, if it is not active. Any, while there are to be none.
    pub(super) fn to_close(&self, tenant: u64, now_ms: u64) -> Option<u64> {
        let mut own = self.accounts.iter().filter(|(name, _)| **name != OTHERS);
        if self.guaranteed_percent == 0 {
            return own.next().map(|(name, _)| *name);
        }
        if self.accounts.contains_key(&tenant) || self.own() < ACCOUNTS_MAX {
            return None;
        }
        let idle = own.filter(|(_, account)| !account.is_active(now_ms));
        // Who has never asked comes first.
        idle.min_by_key(|(_, account)| account.asked_ms).map(|(name, _)| *name)
    }

    /// Closes an account: what it has is that of the others from now on.
    pub(super) fn close(&mut self, account: u64) {
        if let Some(closed) = self.accounts.remove(&account) {
            self.accounts.entry(OTHERS).or_default().bytes += closed.bytes;
        }
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

    /// Whether more than one account has anything: then it is the shares that say whose block leaves.
    pub(super) fn decide(&self) -> bool {
        self.accounts.values().filter(|account| account.bytes > 0).nth(1).is_some()
    }

    /// All accounts, see [`ShareTotals::accounts`].
    pub(super) fn states(&self, now_ms: u64) -> Vec<AccountState> {
        let part = self.part(now_ms);
        let state = |(name, account): (&u64, &Account)| {
            let is_active = account.is_active(now_ms);
            let guaranteed_bytes = if is_active { part } else { 0 };
            let tenant = (*name != OTHERS).then_some(*name);
            AccountState { tenant, bytes: account.bytes, guaranteed_bytes, is_active }
        };
        self.accounts.iter().map(state).collect()
    }

    /// Accounts that belong to one tenant.
    fn own(&self) -> usize {
        self.accounts.len() - usize::from(self.accounts.contains_key(&OTHERS))
    }

    /// What is guaranteed to each account that is active.
    fn part(&self, now_ms: u64) -> u64 {
        let active = self.accounts.values().filter(|account| account.is_active(now_ms)).count() as u64;
        (self.capacity_bytes / 100 * self.guaranteed_percent).checked_div(active).unwrap_or(0)
    }

    /// How many bytes each account has less than its guarantee; one above it has a number below zero.
    fn by_need(&self, now_ms: u64) -> impl Iterator<Item = (i128, u64)> {
        let part = self.part(now_ms);
        self.accounts.iter().map(move |(name, account)| {
            let guaranteed = if account.is_active(now_ms) { part } else { 0 };
            (i128::from(guaranteed) - i128::from(account.bytes), *name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::SplitMix;

    const PERCENT: u64 = 50;

    #[test]
    fn nobody_loses_what_is_guaranteed_and_what_was_borrowed_comes_back() {
        let seeds = std::env::var("PEGAFLOW_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        for seed in seeds.map_or(1..60, |seed: u64| seed..seed + 1) {
            println!("PEGAFLOW_TEST_SEED={seed}");
            let mut random = SplitMix::new(seed);
            let tenants = 1 + random.below(ACCOUNTS_MAX) as u64;
            let capacity = 3000;
            let mut shares = Shares::new(capacity, PERCENT as u32);
            let bytes = |shares: &Shares, tenant: u64| shares.accounts.get(&tenant).map_or(0, |of| of.bytes);
            let part = capacity / 100 * PERCENT / tenants;
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
        let mut shares = Shares::new(1000, PERCENT as u32);
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
