//! What the parts of an open store share: the drive, the regions, the two halves of the index, the namespaces. Owns how
//! a change becomes visible to lookups, which recovery and the writer do alike.

use std::sync::Arc;

use super::drive::Drive;
use super::inbox::Inbox;
use super::namespaces::Namespaces;
use super::poison::{Poison, PoisonReason};
use super::policy::ReclaimPolicy;
use super::regions::Regions;
use super::stats::Counts;
use super::version::StoreUuid;
use crate::block::{BlockKey, RecordId};
use crate::error::{Error, Result};
use crate::index::{IndexChange, IndexLog, Location, Table};

/// The parts of an open store.
pub(super) struct Shared {
    pub(super) uuid: StoreUuid,
    pub(super) drive: Arc<Drive>,
    pub(super) regions: Arc<Regions>,
    pub(super) table: Table,
    pub(super) namespaces: Namespaces,
    pub(super) inbox: Arc<Inbox>,
    pub(super) counts: Counts,
    pub(super) policy: Arc<dyn ReclaimPolicy>,
    /// Whether the store takes writes.
    pub(super) poison: Poison,
}

impl Shared {
    pub(super) fn new(
        uuid: StoreUuid,
        drive: Arc<Drive>,
        regions: Arc<Regions>,
        namespaces: Namespaces,
        inbox: Arc<Inbox>,
        policy: Arc<dyn ReclaimPolicy>,
    ) -> Self {
        Self {
            uuid,
            drive,
            regions,
            table: Table::new(),
            namespaces,
            inbox,
            counts: Counts::default(),
            policy,
            poison: Poison::default(),
        }
    }

    /// Why the store takes no more writes, if so.
    pub(super) fn poisoned(&self) -> Option<Error> {
        self.poison.get().map(|(_, error)| error)
    }

    /// Ends all writing until the store is opened again; the first reason stays. Reads go on.
    pub(super) fn poison(&self, why: &str, cause: &Error) {
        self.poison.set(PoisonReason::of(cause), why, cause);
    }

    /// Where a record lies, if it is there.
    pub(super) fn locate(&self, fingerprint: u64) -> Option<Location> {
        self.table.get(fingerprint).and_then(|location| self.regions.resolve(location))
    }

    /// Brings the table up to date with changes that `index` has taken.
    ///
    /// # Errors
    /// What the index reports.
    pub(super) fn publish(&self, index: &IndexLog, changes: &[IndexChange]) -> Result<()> {
        for change in changes {
            if let IndexChange::Put(row) = change {
                self.point_to(&row.id, row.parent, row.location);
            }
        }
        // A removal takes only what is older than it, which the log alone knows.
        for change in changes {
            if let IndexChange::Remove { id, .. } = change
                && index.get(id)?.is_none()
            {
                self.forget(id);
            }
        }
        Ok(())
    }

    /// Lets lookups find a record.
    pub(super) fn point_to(&self, id: &RecordId, parent: BlockKey, location: Location) {
        let parent = if parent.is_root() { 0 } else { id.with_key(parent).fingerprint() as u32 };
        self.regions.count_in(&location);
        if let Some(replaced) = self.table.insert(id.fingerprint(), parent, location) {
            self.regions.count_out(&replaced);
        }
    }

    /// Lets lookups find no record of this identity.
    pub(super) fn forget(&self, id: &RecordId) {
        if let Some(location) = self.table.get(id.fingerprint()) {
            self.forget_at(id, &location);
        }
    }

    /// Lets lookups no longer find the record at `location`; whether it was found there.
    pub(super) fn forget_at(&self, id: &RecordId, location: &Location) -> bool {
        let was_there = self.table.remove_if(id.fingerprint(), location);
        if was_there {
            self.regions.count_out(location);
        }
        was_there
    }
}
