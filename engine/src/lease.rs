//! Leases: bounded promises that looked-up blocks stay readable. A lease holds the blocks in DRAM and pins the regions
//! of the others; it ends by being consumed (once per shard), given back, replaced, or when its time is over.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use pegaflow_tiers::{Error, ErrorKind, Location, RecordId, RegionPins, Result, Store};

use crate::api::{InstanceId, LeaseId, SessionId};
use crate::load_choice::LoadWatch;
use crate::residency::Resident;

/// The most leases at a time; a lookup beyond that is refused as busy.
const LEASES_MAX: usize = 16_384;

/// One looked-up block.
pub(crate) enum Hit {
    /// In DRAM, verified.
    Dram(Arc<Resident>),
    /// On the drive.
    Nvme(RecordId, Location),
}

impl Hit {
    /// Which record it is.
    pub(crate) fn id(&self) -> RecordId {
        match self {
            Self::Dram(resident) => resident.id,
            Self::Nvme(id, _) => *id,
        }
    }

    /// Where it is on the drive, if it is not in DRAM.
    pub(crate) fn location(&self) -> Option<Location> {
        match self {
            Self::Dram(_) => None,
            Self::Nvme(_, location) => Some(*location),
        }
    }
}

/// Regions that are kept from being given up, and the store that their locations are of: another one may have taken its
/// place, for which they mean nothing.
pub(crate) struct Pinned {
    store: Weak<Store>,
    _pins: RegionPins,
}

impl Pinned {
    /// # Errors
    /// `NotFound` if a region was given up already.
    pub(crate) fn new(store: &Arc<Store>, locations: &[Location]) -> Result<Self> {
        Ok(Self { store: Arc::downgrade(store), _pins: store.pin(locations)? })
    }

    /// The store, if it still is.
    pub(crate) fn store(&self) -> Option<Arc<Store>> {
        self.store.upgrade()
    }
}

/// What one shard's load takes over: the blocks, and what keeps them readable.
pub(crate) struct ShardLease {
    /// Who looked the blocks up, and for which request.
    pub(crate) asker: (SessionId, u64),
    pub(crate) hits: Vec<Hit>,
    pub(crate) pinned: Option<Arc<Pinned>>,
    /// Is told how the load ends, if its time is wanted.
    pub(crate) watch: Option<Arc<LoadWatch>>,
}

struct Lease {
    session: SessionId,
    tag: u64,
    instance: InstanceId,
    expires: Instant,
    shards: HashMap<u16, Vec<Hit>>,
    pinned: Option<Arc<Pinned>>,
    watch: Option<Arc<LoadWatch>>,
    /// Workers were told where its blocks lie, and copy them without asking: their session is not the one that took it.
    has_places: bool,
}

#[derive(Default)]
struct State {
    leases: HashMap<LeaseId, Lease>,
    by_tag: HashMap<(SessionId, u64), LeaseId>,
    by_expiry: BTreeSet<(Instant, u128)>,
    granted: u64,
    is_closed: bool,
}

/// All live leases.
pub(crate) struct Leases {
    state: Mutex<State>,
    changed: Condvar,
    secret: [RandomState; 2],
}

impl Leases {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), secret: [RandomState::new(), RandomState::new()] }
    }

    /// Grants a lease; one with the same session and tag is replaced by it.
    ///
    /// # Errors
    /// `Busy` at the most leases that there may be.
    #[expect(clippy::too_many_arguments, reason = "the fields of a lease")]
    pub(crate) fn grant(
        &self,
        session: SessionId,
        tag: u64,
        instance: InstanceId,
        expires: Instant,
        shards: HashMap<u16, Vec<Hit>>,
        pinned: Option<Pinned>,
        has_places: bool,
        watch: Option<Arc<LoadWatch>>,
    ) -> Result<LeaseId> {
        let mut state = self.state.lock();
        let replaced = state.by_tag.get(&(session, tag)).copied().and_then(|old| state.take(old));
        if state.leases.len() >= LEASES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{LEASES_MAX} leases are live; load or release some first"),
            ));
        }
        state.granted += 1;
        let [low, high] = self.secret.each_ref().map(|secret| secret.hash_one((state.granted, session.0, tag)));
        let id = LeaseId((u128::from(high) << 64) | u128::from(low));
        let is_first = state.by_expiry.first().is_none_or(|(first, _)| expires < *first);
        state.by_expiry.insert((expires, id.0));
        state.by_tag.insert((session, tag), id);
        let pinned = pinned.map(Arc::new);
        state.leases.insert(id, Lease { session, tag, instance, expires, shards, pinned, watch, has_places });
        drop(state);
        drop(replaced);
        if is_first {
            self.changed.notify_all();
        }
        Ok(id)
    }

    /// Hands one shard's share over; the lease is gone with its last share.
    ///
    /// # Errors
    /// `NotFound` for a lease that is over, or whose share for this shard was taken before.
    pub(crate) fn consume(&self, id: LeaseId, shard: u16) -> Result<(InstanceId, ShardLease)> {
        let over = || Error::new(ErrorKind::NotFound, "the lease is over; look the blocks up again");
        let mut state = self.state.lock();
        let lease = state.leases.get_mut(&id).filter(|lease| lease.expires > Instant::now()).ok_or_else(over)?;
        let hits = lease.shards.remove(&shard).ok_or_else(over)?;
        let taken = ShardLease {
            asker: (lease.session, lease.tag),
            hits,
            pinned: lease.pinned.clone(),
            watch: lease.watch.clone(),
        };
        let taken = (lease.instance.clone(), taken);
        if lease.shards.is_empty() {
            let ended = state.take(id);
            drop(state);
            drop(ended);
        }
        Ok(taken)
    }

    /// Ends a lease; who had taken it, and for which request.
    pub(crate) fn release(&self, id: LeaseId) -> Option<(SessionId, u64)> {
        let ended = self.state.lock().take(id);
        ended.map(|lease| (lease.session, lease.tag))
    }

    /// Ends all leases of a session but those whose places were told.
    pub(crate) fn end_session(&self, session: SessionId) {
        let mut state = self.state.lock();
        let ids: Vec<LeaseId> = state
            .leases
            .iter()
            .filter(|(_, lease)| lease.session == session && !lease.has_places)
            .map(|(id, _)| *id)
            .collect();
        let ended: Vec<_> = ids.into_iter().map(|id| state.take(id)).collect();
        drop(state);
        drop(ended);
    }

    pub(crate) fn len(&self) -> usize {
        self.state.lock().leases.len()
    }

    /// Ends leases as their time comes, until [`Leases::close`]; sleeps in between, for as long as there is none.
    pub(crate) fn keep_time(&self, ended_some: impl Fn()) {
        let mut state = self.state.lock();
        while !state.is_closed {
            let now = Instant::now();
            let mut ended = Vec::new();
            while let Some(&(_, id)) = state.by_expiry.first().filter(|(expires, _)| *expires <= now) {
                ended.extend(state.take(LeaseId(id)));
            }
            if !ended.is_empty() {
                parking_lot::MutexGuard::unlocked(&mut state, || {
                    drop(ended);
                    ended_some();
                });
                continue;
            }
            match state.by_expiry.first().map(|(expires, _)| *expires) {
                Some(next) => drop(self.changed.wait_until(&mut state, next)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        let ended = (
            std::mem::take(&mut state.leases),
            std::mem::take(&mut state.by_tag),
            std::mem::take(&mut state.by_expiry),
        );
        drop(state);
        drop(ended);
        self.changed.notify_all();
    }
}

impl State {
    fn take(&mut self, id: LeaseId) -> Option<Lease> {
        let lease = self.leases.remove(&id)?;
        self.by_expiry.remove(&(lease.expires, id.0));
        if self.by_tag.get(&(lease.session, lease.tag)) == Some(&id) {
            self.by_tag.remove(&(lease.session, lease.tag));
        }
        Some(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn grant(leases: &Leases, session: u64, tag: u64, lasts: Duration, shards: u16) -> LeaseId {
        let shards = (0..shards).map(|shard| (shard, Vec::new())).collect();
        let instance = InstanceId("i".into());
        leases
            .grant(SessionId(session), tag, instance, Instant::now() + lasts, shards, None, false, None)
            .expect("granted")
    }

    #[test]
    fn a_lease_is_consumed_once_per_shard() {
        let leases = Leases::new();
        let id = grant(&leases, 1, 1, Duration::from_secs(60), 2);
        assert!(leases.consume(id, 0).is_ok());
        assert!(leases.consume(id, 0).is_err());
        assert!(leases.consume(id, 1).is_ok());
        assert_eq!(leases.len(), 0);
    }

    #[test]
    fn a_repeated_lookup_replaces_its_lease() {
        let leases = Leases::new();
        let first = grant(&leases, 1, 7, Duration::from_secs(60), 1);
        let second = grant(&leases, 1, 7, Duration::from_secs(60), 1);
        let other_session = grant(&leases, 2, 7, Duration::from_secs(60), 1);
        assert!(leases.consume(first, 0).is_err());
        leases.end_session(SessionId(1));
        assert!(leases.consume(second, 0).is_err());
        assert_eq!(leases.release(other_session), Some((SessionId(2), 7)));
        assert_eq!(leases.release(other_session), None);
    }

    #[test]
    fn a_lease_whose_places_were_told_outlives_its_session() {
        let leases = Leases::new();
        let shards = HashMap::from([(0, Vec::new())]);
        let expires = Instant::now() + Duration::from_secs(60);
        let id =
            leases.grant(SessionId(1), 1, InstanceId("i".into()), expires, shards, None, true, None).expect("granted");
        leases.end_session(SessionId(1));
        assert!(leases.consume(id, 0).is_ok());
    }

    #[test]
    fn leases_end_by_themselves() {
        let leases = Arc::new(Leases::new());
        let keeper = std::thread::spawn({
            let leases = Arc::clone(&leases);
            move || leases.keep_time(|| {})
        });
        let id = grant(&leases, 1, 1, Duration::from_millis(20), 1);
        while leases.len() > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(leases.consume(id, 0).is_err());
        leases.close();
        keeper.join().expect("ended");
    }
}
