//! What the parts of an open store share: the drive, the regions, the two halves of the index, the namespaces. Owns how
//! a change becomes visible to lookups, which recovery and the writer do alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::calibration::Calibration;
use super::drive::Drive;
use super::encoding::Spares;
use super::encryption::{DataKey, HeaderKey, Keyring};
use super::fill::{Fill, FillPlan};
use super::inbox::Inbox;
use super::namespaces::Namespaces;
use super::poison::{Poison, PoisonReason};
use super::policy::ReclaimPolicy;
use super::regions::Regions;
use super::stats::Counts;
use super::version::StoreUuid;
use crate::block::{BlockKey, NamespaceHandle, RecordId};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexChange, IndexLog, Location, Table};

/// The parts of an open store.
pub(super) struct Shared {
    pub(super) uuid: StoreUuid,
    pub(super) drive: Arc<Drive>,
    pub(super) regions: Arc<Regions>,
    pub(super) table: Table,
    pub(super) fill: Fill,
    pub(super) namespaces: Namespaces,
    /// The keys, if the store is encrypted.
    pub(super) keyring: Option<Arc<Keyring>>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) counts: Counts,
    /// Buffers for encoded records.
    pub(super) spares: Spares,
    /// Bytes of payload per second that the verifiers decode; 0 while not known.
    decode_speed: AtomicU64,
    /// How fast the drives are.
    pub(super) calibration: Calibration,
    pub(super) policy: Arc<dyn ReclaimPolicy>,
    /// Whether the store takes writes.
    pub(super) poison: Poison,
}

impl Shared {
    #[expect(clippy::too_many_arguments, reason = "its parts")]
    pub(super) fn new(
        uuid: StoreUuid,
        drive: Arc<Drive>,
        regions: Arc<Regions>,
        namespaces: Namespaces,
        keyring: Option<Arc<Keyring>>,
        inbox: Arc<Inbox>,
        policy: Arc<dyn ReclaimPolicy>,
        plan: FillPlan,
        calibration: Calibration,
    ) -> Self {
        let is_sealing = keyring.is_some();
        Self {
            uuid,
            drive,
            regions,
            table: Table::new(),
            fill: Fill::new(plan),
            namespaces,
            keyring,
            inbox,
            counts: Counts::default(),
            spares: Spares::new(is_sealing),
            decode_speed: AtomicU64::new(0),
            calibration,
            policy,
            poison: Poison::default(),
        }
    }

    /// The key that authenticates headers, if the store is encrypted.
    pub(super) fn header_key(&self) -> Option<&HeaderKey> {
        self.keyring.as_deref().map(Keyring::header)
    }

    /// The data key of a namespace; `None` inside if the store is not encrypted.
    ///
    /// # Errors
    /// `NotFound` if the namespace is not known, or its key was destroyed and it was not registered again since.
    pub(super) fn data_key(&self, namespace: NamespaceHandle) -> Result<Option<Arc<DataKey>>> {
        let Some(keyring) = &self.keyring else { return Ok(None) };
        let key = self.namespaces.digest(namespace).and_then(|digest| keyring.live(&digest));
        key.map(Some).ok_or_else(|| {
            let message = format!("namespace {} has no key; register it (again)", namespace.0);
            Error::new(ErrorKind::NotFound, message)
        })
    }

    /// Whom the store knows a record as: itself, or in an encrypted store somebody with a name that says nothing. `None` if
    /// the namespace was purged, or has no key: then it has no records.
    pub(super) fn named(&self, id: &RecordId) -> Option<RecordId> {
        if !self.namespaces.is_live(id.namespace) {
            return None;
        }
        match self.data_key(id.namespace) {
            Ok(None) => Some(*id),
            Ok(Some(key)) => Some(key.rename(id)),
            Err(_) => None,
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

    /// Notes how many bytes of payload per second the verifiers decode.
    pub(super) fn set_decode_speed(&self, bytes_per_second: u64) {
        self.decode_speed.store(bytes_per_second, Ordering::Relaxed);
    }

    /// How many bytes of payload per second the verifiers decode; 0 while not known.
    pub(super) fn decode_speed(&self) -> u64 {
        self.decode_speed.load(Ordering::Relaxed)
    }

    /// Whether encoded records are read at least as fast as others: as long as the verifiers decode what the drive would
    /// read without. With a speed unknown they are: a core decodes more than a usual drive's share of it reads.
    pub(super) fn pays_to_decode(&self) -> bool {
        let (decode, drive) = (self.decode_speed(), self.calibration.read_bytes_per_second());
        decode == 0 || decode >= drive
    }

    /// Counts a use of a record, if the table knows it.
    pub(super) fn note_use(&self, id: &RecordId) {
        if let Some(before) = self.table.note_use(id.fingerprint(), self.regions.epoch()) {
            self.regions.note_use(before.location.region, before.uses.count() == 0);
        }
    }

    /// Brings the table up to date with changes that `index` has taken; see [`Shared::commit`].
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
