//! Where blocks are at this moment, for those who tell others of it. Unlike a lookup it takes no lease, counts as no use of
//! a block, and answers for each key by itself: a block may be there although one before it has gone.

use pegaflow_tiers::{
    BlockKey, Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, RecordId, Result, Store,
};

use crate::api::{HitTier, LocateRequest, SessionId, Whose};
use crate::inner::Inner;
use crate::tenants;

/// The most keys of one request.
const KEYS_MAX: usize = 65_536;
/// How many keys are looked for in DRAM under one lock, which lookups wait for.
const KEYS_AT_ONCE: usize = 256;

pub(crate) fn locate(inner: &Inner, session: SessionId, request: &LocateRequest) -> Result<Vec<Option<HitTier>>> {
    if request.keys.len() > KEYS_MAX {
        let message = format!("{} keys in one request; the limit is {KEYS_MAX}", request.keys.len());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    if !inner.registry.has_session(session) {
        return Err(Error::new(ErrorKind::NotFound, format!("session {} is not known; open one first", session.0)));
    }
    let Some((namespace, shards)) = whose(inner, request)? else { return Ok(vec![None; request.keys.len()]) };
    let store = inner.drive.store();
    let place = RecordId { namespace, group: request.group, shard: 0, key: BlockKey::ROOT };
    let mut tiers = vec![Some(HitTier::Dram); request.keys.len()];
    for shard in 0..shards {
        let place = RecordId { shard, ..place };
        for (keys, tiers) in request.keys.chunks(KEYS_AT_ONCE).zip(tiers.chunks_mut(KEYS_AT_ONCE)) {
            of_shard(inner, store.as_deref(), place, keys, tiers)?;
        }
    }
    Ok(tiers)
}

/// The namespace that is asked about, and its shards; `None` if there is none.
fn whose(inner: &Inner, request: &LocateRequest) -> Result<Option<(NamespaceHandle, u16)>> {
    let of_tenant =
        |own: NamespaceHandle, descriptor: &NamespaceDescriptor, groups: &[GroupGeometry]| match &request.tenant {
            None => Some(own),
            Some(tenant) => tenants::existing(&inner.drive, descriptor, groups, tenant),
        };
    match &request.whose {
        Whose::Instance(instance) => {
            let view = inner.registry.view(instance, request.group)?;
            if !view.is_complete {
                let message = format!("not all workers of instance {instance} have registered; ask again");
                return Err(Error::new(ErrorKind::Busy, message));
            }
            let namespace = of_tenant(view.namespace, &view.identity.descriptor, &view.identity.groups);
            Ok(namespace.map(|namespace| (namespace, view.geometry.shards)))
        }
        Whose::Namespace(id) => {
            let Some(known) = inner.drive.known(id) else { return Ok(None) };
            let geometry = known.groups.iter().find(|geometry| geometry.group == request.group).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("namespace {id} has no group {}", request.group))
            })?;
            let namespace = of_tenant(known.handle, &known.descriptor, &known.groups);
            Ok(namespace.map(|namespace| (namespace, geometry.shards)))
        }
    }
}

/// Lowers the tier of each block to that of its shard, if that is further away.
fn of_shard(
    inner: &Inner,
    store: Option<&Store>,
    place: RecordId,
    keys: &[BlockKey],
    tiers: &mut [Option<HitTier>],
) -> Result<()> {
    let mut resident = Vec::with_capacity(keys.len());
    inner.residency.get_many(keys.iter().map(|key| place.with_key(*key)), &mut resident);
    let elsewhere = keys.iter().zip(resident).zip(tiers).filter(|((_, resident), _)| resident.is_none());
    for ((key, _), tier) in elsewhere {
        let id = place.with_key(*key);
        let is_stored = match store.map(|store| store.has_fingerprint(store.fingerprint_of(&id, key.prefix()))) {
            None => false,
            Some(Some(is_stored)) => is_stored,
            Some(None) => {
                return Err(Error::new(ErrorKind::Busy, "the store's index is still being read; ask again"));
            }
        };
        *tier = tier.filter(|_| is_stored).map(|_| HitTier::Nvme);
    }
    Ok(())
}
